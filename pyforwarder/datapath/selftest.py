"""Prove a datapath before it is trusted: move real bytes through it, on loopback, and compare.

Version numbers lie (distributions backport, and forget to), so `up` and `doctor` believe only
this. It runs in a child under the worker's user: so it also proves that the privileges suffice,
and whatever a broken kernel does to it, the daemon goes on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.kernel import PairTable
from pyforwarder.datapath.rig import Rig, RigError
from pyforwarder.datapath.scenarios import SELF_TEST, SLOW_LIMIT_BYTES
from pyforwarder.datapath.splice import SpliceDatapath
from pyforwarder.datapath.table import REDIRECTED, PairWindow

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.base import Datapath
    from pyforwarder.datapath.kernel import KernelMaps
    from pyforwarder.datapath.splice_keeper import Splicing

TIMEOUT_S: Final = 30.0


class Proof(NamedTuple):
    """What the self-test found."""

    passed: bool
    reason: str  # of the failure
    scenarios: dict[str, float]  # seconds of each that passed
    took_s: float


def prove_sockmap(maps: KernelMaps, *, slots: int, user: str | None) -> Proof:
    """Run the self-test on the real maps, before any worker uses them; leaves them empty."""

    def make(rig: Rig, window: PairWindow) -> Datapath:
        datapath = maps.datapath(rig, window, 0)
        datapath.limit_bytes = SLOW_LIMIT_BYTES
        return datapath

    return _prove(
        make,
        PairTable(workers=1, slots=slots, fd=maps.pairs_fd),
        user,
        lambda: maps.forget_worker(0, slots),
    )


def prove_splice(splicing: Splicing, *, pairs_fd: int, slots: int, user: str | None) -> Proof:
    """The same for splice."""

    def make(rig: Rig, window: PairWindow) -> Datapath:
        return SpliceDatapath(rig, splicing.maps, splicing.client(0), window=window, worker=0)

    return _prove(
        make,
        PairTable(workers=1, slots=slots, fd=pairs_fd),
        user,
        lambda: splicing.clear(0),
    )


def _prove(
    make: Callable[[Rig, PairWindow], Datapath],
    table: PairTable,
    user: str | None,
    forget: Callable[[], None],
) -> Proof:
    started_s = time.monotonic()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        code = 1
        try:
            code = _child(make, table, user, write_fd)
        finally:
            os._exit(code)
    os.close(write_fd)
    said = _read(read_fd, pid)
    forget()
    window = table.windows[0]
    window[:] = bytes(len(window))
    window.close()
    took_s = round(time.monotonic() - started_s, 3)
    if not said:
        return Proof(False, "the self-test did not end in time, or died", {}, took_s)
    result = json.loads(said)
    return Proof(not result["reason"], result["reason"], result["scenarios"], took_s)


def _read(fd: int, pid: int) -> bytes:
    """What the child says until it closes; it is killed when that takes too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    said = b""
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                os.kill(pid, signal.SIGKILL)
                said = b""
                break
            chunk = pipe.read(65536)
            if not chunk:
                break
            said += chunk
    os.waitpid(pid, 0)
    return said


def _child(
    make: Callable[[Rig, PairWindow], Datapath],
    table: PairTable,
    user: str | None,
    write_fd: int,
) -> int:
    from pyforwarder.worker.process import give_up_privileges

    reason = ""
    passed: dict[str, float] = {}
    name = "start"
    try:
        give_up_privileges(user)
        for name, scenario in SELF_TEST.items():
            before_s = time.monotonic()
            window = PairWindow(table.windows[0], first_slot=0, worker_index=0)
            rig = Rig(window)
            try:
                rig.datapath = make(rig, window)
                scenario(rig)
            finally:
                rig.close()
            if not _redirected(window):
                raise RigError("the kernel moved nothing")
            passed[name] = round(time.monotonic() - before_s, 3)
    except (RigError, OSError) as error:
        reason = f"{name}: {error}"
    os.write(write_fd, json.dumps({"reason": reason, "scenarios": passed}).encode())
    return 0


def _redirected(window: PairWindow) -> bool:
    """Whether the verdict program redirected anything for the scenario's pair (slot 0)."""
    slots = range(len(window.words) // window.WORDS)
    return any(
        window.words[slot * window.WORDS + at] for slot in list(slots)[:64] for at in REDIRECTED
    )
