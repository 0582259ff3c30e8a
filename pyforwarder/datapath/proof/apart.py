"""The self-test with maps and programs of its own, beside what else is loaded on this host."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import refusal
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.ebpf.arrays import create_pairs
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.datapath.proof.express import play as play_express
from pyforwarder.datapath.proof.rig import Rig, RigError
from pyforwarder.datapath.proof.scenarios import SELF_TEST
from pyforwarder.datapath.proof.selftest import (
    Proof,
    prove_sessions,
    prove_sockmap,
    prove_splice,
)
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from pyforwarder.datapath.splice.supervised import make_express
from pyforwarder.errors import DatapathError, LoadError, Refusal
from pyforwarder.runtime import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyforwarder.datapath.splice.maps import Programs

SLOTS: Final = 64


def prove_sockmap_apart(user: str | None) -> Proof:
    """The proof of sockmap; the scenarios run as `user`."""
    started_s = time.monotonic()
    try:
        maps = KernelMaps.load(workers=1, slots=SLOTS)
    except LoadError as error:
        return Proof.refused(error, round(time.monotonic() - started_s, 3))
    try:
        return prove_sockmap(maps, slots=SLOTS, user=user)
    finally:
        maps.close()


def prove_splice_apart(user: str | None) -> Proof:
    """The same of splice, on interfaces of this network namespace."""
    return _with_programs(user, prove_splice)


def prove_sessions_apart(user: str | None) -> Proof:
    """The same of UDP sessions."""
    return _with_programs(user, prove_sessions)


def _with_programs(user: str | None, prove: Callable[..., Proof]) -> Proof:
    if host.is_realtime():
        return Proof.refused(_mixes_packets(), 0.0)
    started_s = time.monotonic()
    try:
        pairs_fd = create_pairs(SLOTS)
    except OSError as error:
        why = refusal.explain("create a BPF map", error.errno or 0, needs=refusal.NETWORK)
        return Proof.refused(why, 0.0)
    try:
        splicing = Splicing(
            SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=pairs_fd, sessions=SLOTS), workers=1
        )
    except LoadError as error:
        os.close(pairs_fd)
        return Proof.refused(error, round(time.monotonic() - started_s, 3))
    try:
        proof = prove(splicing, pairs_fd=pairs_fd, slots=SLOTS, user=user)
        taken = "; ".join(splicing.maps.links.refusals.values())
        if not proof.passed and taken:
            proof = proof._replace(reason=f"{proof.reason} ({taken})")
        return proof
    finally:
        splicing.close()
        os.close(pairs_fd)


def prove_express_apart(_user: str | None) -> Proof:
    """The same of connections that the kernel opens; clients and servers are sockets of ours."""
    started_s = time.monotonic()

    def took_s() -> float:
        return round(time.monotonic() - started_s, 3)

    if host.is_realtime():
        return Proof.refused(_mixes_packets(), 0.0)
    if missing := host.missing_capabilities(refusal.NETWORK):
        return Proof.refused(refusal.lacking("express", missing), 0.0)
    with contextlib.ExitStack() as opened:
        try:
            splicing, programs = opened.enter_context(load_express_apart())
            splicing.begin(programs)
        except LoadError as error:
            return Proof.refused(error, took_s())
        except OSError as error:
            why = refusal.explain("make ready", error.errno or 0, needs=refusal.NETWORK)
            return Proof.refused(why, took_s())
        try:
            passed = play_express(splicing)
        except (RigError, OSError, DatapathError) as error:
            return Proof(False, str(error), {}, took_s(), cause=Refusal.SELF_TEST)
        return Proof(True, "", passed, took_s())


@contextlib.contextmanager
def load_express_apart() -> Iterator[tuple[Splicing, Programs]]:
    """Splice and express, with maps and programs of their own, which are at no interface yet.

    The programs are the caller's: for `Splicing.begin`, or to be closed. All else is closed
    afterwards.

    Raises:
        LoadError: they cannot be loaded.
        OSError: the maps cannot be made, or there are no ports.
    """
    with contextlib.ExitStack() as opened:
        pairs_fd = create_pairs(SLOTS)
        opened.callback(os.close, pairs_fd)
        maps = SpliceMaps.create(workers=1, slots=SLOTS, pairs_fd=pairs_fd, places=2 * SLOTS)
        with contextlib.ExitStack() as unless_made:
            unless_made.callback(maps.close)
            express = make_express(maps, SLOTS, workers=1)
            unless_made.callback(express.close)
            programs = maps.load_programs(express.connections)
            for fd in programs:
                unless_made.callback(os.close, fd)
            express.connections.begin(express.connections.load(maps))
            express.has_begun = True
            splicing = Splicing(maps, workers=1, express=express)
            unless_made.pop_all()
        opened.callback(splicing.close)
        yield splicing, programs


def _mixes_packets() -> LoadError:
    """Why programs on packets are not used where one interrupts the other.

    They have records of each processor (maps of PERCPU_ARRAY), and rely on it that no other program
    runs there before they end. With CONFIG_PREEMPT_RT that is no longer so since Linux 6.18 (unless
    CONFIG_PREEMPT_RT_NEEDS_BH_LOCK is set): local_bh_disable() keeps a task on its processor, and
    lets it be preempted by one that does the same (kernel/softirq.c). Bytes of one connection could
    then be sent in another's packet. No test would find that; so no such kernel is trusted.
    """
    return LoadError(
        "this kernel is built with PREEMPT_RT: programs that handle packets may interrupt each "
        "other, and would mix two connections",
        cause=Refusal.REALTIME,
        advice="`sockmap` and `copy` work here",
    )


def prove_copy(_user: str | None) -> Proof:
    """The same of copy, in this process: nothing here can harm it."""
    started_s = time.monotonic()
    passed: dict[str, float] = {}
    for name, scenario in SELF_TEST.items():
        before_s = time.monotonic()
        memory = mmap.mmap(-1, SLOTS * PAIR_BYTES)
        rig = Rig(PairWindow(memory, first_slot=0, worker_index=0))
        try:
            scenario(rig)
        except (RigError, OSError) as error:
            took_s = round(time.monotonic() - started_s, 3)
            return Proof(False, f"{name}: {error}", passed, took_s)
        finally:
            rig.close()
            rig.window.close()
        passed[name] = round(time.monotonic() - before_s, 3)
    return Proof(True, "", passed, round(time.monotonic() - started_s, 3))
