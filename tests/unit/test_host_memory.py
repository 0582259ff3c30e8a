"""How much memory there is: the machine's, or what control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyforwarder.runtime.host_memory import available_bytes, tcp_pages

MIB = 1 << 20
SOCKSTAT = b"""sockets: used 23
TCP: inuse 5 orphan 0 tw 2 alloc 7 mem 1234
UDP: inuse 3 mem 99
"""


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal:       {4096 * 1024} kB\nMemFree: 1 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096 * MIB),
        ({"proc/self/cgroup": "0::/\n"}, 4096 * MIB),
        (
            {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{512 * MIB}\n"},
            512 * MIB,
        ),
        (  # a group above limits, too
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": f"{256 * MIB}\n",
            },
            256 * MIB,
        ),
        (  # in a container the group's own directory is the root
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{1024 * MIB}\n"},
            1024 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/x\n1:name=systemd:/y\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{128 * MIB}\n",
            },
            128 * MIB,
        ),
        ({"proc/self/cgroup": "0::/../outside\n"}, 4096 * MIB),
    ],
)
def test_least_of_machine_and_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert available_bytes(host(tmp_path, {**MACHINE, **files})) == expected


def test_where_nothing_can_be_read_it_is_a_small_machine(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 1024 * MIB


def test_pages_of_tcp_are_read_and_not_those_of_udp() -> None:
    assert tcp_pages(SOCKSTAT) == 1234
    assert tcp_pages(b"sockets: used 1\n") is None
