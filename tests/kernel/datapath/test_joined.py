"""What a worker does while a joined pair's bytes flow: nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.peers import digest, pair_through, pattern, read_exactly
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from tests.kernel.conftest import StartForwarder

MIB: Final = 1 << 20
# A whole gigabyte takes half a minute on a small machine.
BYTES: Final = int(os.environ.get("PYFORWARDER_TEST_JOINED_MIB", "256")) * MIB
# One block is acknowledged before the next is sent: never more than that waits anywhere.
BLOCK: Final = MIB // 4
MOVING: Final = (
    "read,readv,pread64,preadv,preadv2,write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,"
    "sendmmsg,recvfrom,recvmsg,recvmmsg,splice,tee,vmsplice,sendfile"
)
CONFIG: Final = """
workers: 1
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
datapath: DATAPATH
"""


@contextlib.contextmanager
def traced(pid: int, path: Path) -> Iterator[None]:
    """Note every system call of the process that moves bytes, with what its descriptor is."""
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-yy",
            "-e",
            f"trace={MOVING}",
            "-s",
            "0",
            "-o",
            str(path),
            "-p",
            str(pid),
        ],
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=scaled_s(15))


def exchange(
    client: socket.socket, server: socket.socket, size: int, *, block: int = BLOCK
) -> tuple[str, str]:
    """`size` bytes each way in lock step; the hashes of what came up, and of what came down."""
    data = pattern(size)
    hashes = hashlib.sha256(), hashlib.sha256()
    for start in range(0, size, block):
        piece = data[start : start + block]
        for sender, receiver, sha in (
            (client, server, hashes[0]),
            (server, client, hashes[1]),
        ):
            thread = threading.Thread(target=sender.sendall, args=(piece,))
            thread.start()
            sha.update(read_exactly(receiver, len(piece)))
            thread.join()
    return hashes[0].hexdigest(), hashes[1].hexdigest()


def calls_on_tcp(path: Path) -> Counter[str]:
    """How often each call was made on a TCP socket."""
    return Counter(
        match[1]
        for line in path.read_text().splitlines()
        if (match := re.search(r"(\w+)\(\d+<TCP", line))
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("datapath", ["sockmap", "copy"])
def test_no_byte_of_a_joined_pair_passes_through_userspace(
    start_forwarder: StartForwarder, tmp_path: Path, datapath: str
) -> None:
    """Counted with strace; with copy, too, to show that it would be seen."""
    forwarder = start_forwarder(CONFIG.replace("DATAPATH", datapath))
    (worker,) = forwarder.workers()
    size = BYTES // 2 if datapath == "sockmap" else 4 * MIB
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server, 200_000)
        before = forwarder.wait_for_pair(lambda row: row["datapath"] == datapath)
        cpu_s = sum(worker.cpu_times()[:2])
        with traced(worker.pid, tmp_path / "calls"):
            assert exchange(client, server, size) == (digest(size), digest(size))
        cpu_s = sum(worker.cpu_times()[:2]) - cpu_s

        def counted() -> bool:
            row = forwarder.pairs()[0]
            return all(row[name] - before[name] == size for name in ("up_bytes", "down_bytes"))

        wait_for(counted, "every byte is counted")
    calls = calls_on_tcp(tmp_path / "calls")
    if datapath == "sockmap":
        assert not calls
        assert cpu_s < 0.1
    else:
        assert sum(calls.values()) >= 2 * size // BLOCK
