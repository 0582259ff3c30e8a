"""Prove a datapath before it is trusted: move real bytes through it, on loopback, and compare.

Version numbers lie (distributions backport, and forget to), so `up` and `doctor` believe only
this. It runs in a child under the worker's user: so it also proves that the privileges suffice,
and if a broken kernel kills it or hangs it, the daemon goes on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf import refusal
from pyforwarder.datapath.ebpf.pair_table import REDIRECTED, PairTable, PairWindow
from pyforwarder.datapath.proof import sessions
from pyforwarder.datapath.proof.rig import Rig, RigError
from pyforwarder.datapath.proof.scenarios import SELF_TEST, SLOW_LIMIT_BYTES
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.sessions import SpliceSessions
from pyforwarder.errors import DatapathError, LoadError, Refusal
from pyforwarder.runtime import host, slowness
from pyforwarder.runtime.children import fork
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.privileges import give_up_privileges
from pyforwarder.runtime.seccomp import confine
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.tables import single_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyforwarder.datapath.base import Datapath
    from pyforwarder.datapath.sockmap.maps import KernelMaps
    from pyforwarder.datapath.splice.splicing import Splicing

TIMEOUT_S: Final = 30.0


class Proof(NamedTuple):
    """What the self-test found."""

    passed: bool
    reason: str  # of the failure
    scenarios: dict[str, float]  # seconds of each that passed
    took_s: float
    log: str = ""  # of the compiler or the verifier, if it was one of those that refused
    cause: Refusal | None = None  # of a datapath that did not pass

    @classmethod
    def refused(cls, error: LoadError, took_s: float) -> Proof:
        """There was nothing to try."""
        return cls(False, str(error), {}, took_s, error.log, error.cause)

    def error(self) -> LoadError:
        """Why the datapath is not used."""
        cause = self.cause or Refusal.SELF_TEST
        prefix = "failed its self-test: " if cause is Refusal.SELF_TEST else ""
        return LoadError(f"{prefix}{self.reason}", cause=cause, log=self.log)


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
        lambda: maps.forget_worker(0),
    )


def prove_splice(splicing: Splicing, *, pairs_fd: int, slots: int, user: str | None) -> Proof:
    """The same for splice."""
    if missing := host.missing_capabilities(refusal.NETWORK):
        # It loads with CAP_SYS_ADMIN in the place of some, but nobody may touch sockets so.
        return Proof.refused(refusal.lacking("splice", missing), 0.0)

    def make(rig: Rig, window: PairWindow) -> Datapath:
        keeper = splicing.asker(0, rig.loop, is_patient=True)
        return SpliceDatapath(rig, splicing.maps, keeper, window=window, worker=0)

    return _prove(
        make,
        PairTable(workers=1, slots=slots, fd=pairs_fd),
        user,
        lambda: splicing.clear(0),
    )


def prove_sessions(splicing: Splicing, *, pairs_fd: int, slots: int, user: str | None) -> Proof:
    """The same for UDP sessions."""
    if missing := host.missing_capabilities(refusal.NETWORK):
        return Proof.refused(refusal.lacking("splice", missing), 0.0)
    table = PairTable(workers=1, slots=slots, fd=pairs_fd)

    def scenarios() -> Iterator[tuple[str, float]]:
        window = PairWindow(table.windows[0], first_slot=0, worker_index=0)
        loop = Loop()
        keeper = splicing.asker(0, loop, is_patient=True)
        kernel = SpliceSessions(splicing.maps.sessions, keeper, loop, window=window)
        yield from sessions.play(kernel, keeper, window).items()

    return _run(scenarios, table, user, lambda: splicing.clear(0))


def _prove(
    make: Callable[[Rig, PairWindow], Datapath],
    table: PairTable,
    user: str | None,
    forget: Callable[[], None],
) -> Proof:
    def scenarios() -> Iterator[tuple[str, float]]:
        for name, scenario in SELF_TEST.items():
            before_s = time.monotonic()
            window = PairWindow(table.windows[0], first_slot=0, worker_index=0)
            rig = Rig(window)
            try:
                rig.datapath = make(rig, window)
                scenario(rig)
            except (RigError, OSError) as error:
                raise RigError(f"{name}: {error}") from error
            finally:
                rig.close()
            if not _redirected(window):
                raise RigError(f"{name}: the kernel moved nothing")
            yield name, round(time.monotonic() - before_s, 3)

    return _run(scenarios, table, user, forget)


def _run(
    scenarios: Callable[[], Iterator[tuple[str, float]]],
    table: PairTable,
    user: str | None,
    forget: Callable[[], None],
) -> Proof:
    """Play in a child, and look at what it says; then the table is empty again."""
    started_s = time.monotonic()
    read_fd, write_fd = os.pipe()

    def child() -> int:
        os.close(read_fd)
        return _child(scenarios, user, write_fd)

    pid = fork(child)
    os.close(write_fd)
    output, reason = _read(read_fd, pid)
    try:
        forget()
    except DatapathError as error:  # the keeper has died, or hangs
        output, reason = b"", str(error)
    window = table.windows[0]
    window[:] = bytes(len(window))
    window.close()
    took_s = round(time.monotonic() - started_s, 3)
    if not output:
        return Proof(False, reason, {}, took_s, cause=Refusal.SELF_TEST)
    result = json.loads(output)
    reason = single_line(result["reason"])
    cause = Refusal.SELF_TEST if reason else None
    return Proof(not reason, reason, result["scenarios"], took_s, cause=cause)


def _read(fd: int, pid: int) -> tuple[bytes, str]:
    """What the child says until it closes, or why it says nothing.

    It is killed when that takes too long.
    """
    timeout_s = scaled_s(TIMEOUT_S)
    deadline_s = time.monotonic() + timeout_s
    output = b""
    reason = "the self-test died"
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                os.kill(pid, signal.SIGKILL)
                output = b""
                reason = f"the self-test did not end within {timeout_s:.0f} s; {slowness.advice()}"
                break
            chunk = pipe.read(65536)
            if not chunk:
                break
            output += chunk
    os.waitpid(pid, 0)
    return output, reason


def _child(
    scenarios: Callable[[], Iterator[tuple[str, float]]], user: str | None, write_fd: int
) -> int:
    reason = ""
    passed: dict[str, float] = {}
    try:
        give_up_privileges(user)
        confine()  # what a worker may not do must not be needed
        for name, took_s in scenarios():
            passed[name] = took_s  # noqa: PERF403 - what passed before a failure is told, too
    except (RigError, OSError) as error:
        reason = str(error)
    os.write(write_fd, json.dumps({"reason": reason, "scenarios": passed}).encode())
    return 0


def _redirected(window: PairWindow) -> bool:
    """Whether the verdict program redirected anything for the scenario's pair (slot 0)."""
    slots = range(len(window.words64) // window.WORDS64)
    return any(
        window.words64[slot * window.WORDS64 + at] for slot in list(slots)[:64] for at in REDIRECTED
    )
