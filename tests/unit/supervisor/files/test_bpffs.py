"""Finding the file system that pins go to."""

from __future__ import annotations

from pathlib import Path

from pyforwarder.supervisor.files.bpffs import Mount, mount_of, parse_mounts

TABLE = r"""22 27 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
33 22 0:29 / /sys/fs/bpf rw,nosuid shared:12 - bpf bpf rw,mode=700
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
90 27 0:50 / /tmp/with\040blank rw - bpf pyforwarder rw,mode=700
91 90 0:51 / /tmp/with\040blank rw - tmpfs over\134it rw
"""


def test_mount_table_is_read() -> None:
    assert parse_mounts(TABLE) == [
        Mount(Path("/sys"), "sysfs", "sysfs"),
        Mount(Path("/sys/fs/bpf"), "bpf", "bpf"),
        Mount(Path("/"), "ext4", "/dev/vda"),
        Mount(Path("/tmp/with blank"), "bpf", "pyforwarder"),
        Mount(Path("/tmp/with blank"), "tmpfs", "over\\it"),
    ]


def test_a_path_is_in_the_deepest_mount_and_there_in_the_last() -> None:
    mounts = parse_mounts(TABLE)
    kinds = {
        path: getattr(mount_of(Path(path), mounts), "kind", None)
        for path in (
            "/sys/fs/bpf/pyforwarder/default",
            "/sys/fs/bpf",
            "/sys/fs/bpfother",
            "/run",
            "/tmp/with blank/x",
        )
    }
    assert kinds == {
        "/sys/fs/bpf/pyforwarder/default": "bpf",
        "/sys/fs/bpf": "bpf",
        "/sys/fs/bpfother": "sysfs",
        "/run": "ext4",
        "/tmp/with blank/x": "tmpfs",
    }


def test_without_any_mount_there_is_none() -> None:
    assert mount_of(Path("/run"), []) is None
