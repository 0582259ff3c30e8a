"""How each scenario is run against one target, and which numbers it yields."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from bench import cpu_time, first_bytes, memory
from bench import load as load_module
from bench.measures import (
    ANSWERS_KIB,
    DATAGRAM_BYTES,
    DATAGRAM_RATES,
    DIRECT,
    EXPRESS,
    MANY_DATAGRAM_SESSIONS,
    PACED_DATAGRAM_SESSIONS,
    PAUSE_ANSWER_MIB,
)
from bench.targets import TAKE_NAMES
from bench.topology import (
    DATAGRAM_PORT,
    FORWARDER_PORT,
    HOST_PORT,
    INSTRUCTION_PORT,
    SERVER_PORT,
    SNI_PORT,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from bench.load import Load, Session
    from bench.targets import Target
    from bench.topology import Site

KIB: Final = 1024
MIB: Final = 1024 * 1024
STALLED_PAIRS: Final = 16  # their queues stand out against what the machine's memory does anyhow
STALL_CAP_BYTES: Final = 64 * MIB  # per pair: who takes more than that has no bound
DELAY_BYTES_PER_S: Final = 1e9 / 8  # a gigabit: far from saturation everywhere
CONNECTIONS: Final = 64  # at a time
PAUSE_STREAMS: Final = 4
PACED_CONNECTIONS_PER_S: Final = 1_000
# Enough of them to stand out against what the machine does anyhow, and every forwarder holds it.
CPU_CONNECTIONS_PER_S: Final = 4_000
# pyforwarder's workers are told so much later of what the kernel has done alone; of very many at
# once it may take longer.
COUNTED_AFTER_S: Final = 1.5
COUNTED_WITHIN_S: Final = 10.0
# At least so many of a run's connections must be the kernel's, to be called `express`.
EXPRESS_SHARE: Final = 0.8
PACED_DATAGRAMS_PER_S: Final = 20_000
PACE_TOLERANCE: Final = 0.05
# Some hundred sessions in a second are handed over to the kernel.
SPLICED_WITHIN_S: Final = 60.0
LOOKS_PER_S: Final = 10  # `watch cat show` is one every two seconds
# What the generator calls the ways in which a connection fails; the last two got their answer and
# then no clean end.
FAILURES: Final = (
    "not_connected",
    "reset",
    "ended_early",
    "wrong_answer",
    "silent",
    "end_reset",
    "end_silent",
)
# Frees what closed connections held, and outlasts `handover.after`, when a forwarder may move an
# idle pair to its lasting datapath.
SETTLE_S: Final = 1.5

Values = dict[str, float]


class ScenarioError(Exception):
    """A run whose numbers mean something else than the row says."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: seconds per run, pairs of `idle`, bytes per second of `cpu_*`.

    Rows of more `sessions` of datagrams are left out. `quiet` is the share of the machine that must
    be free around a run of `cpu_*`.
    """

    seconds: float
    pairs: int
    sessions: int
    pace_bytes_per_s: float
    quiet: float


@dataclass(frozen=True, slots=True)
class Stage:
    """One target in its place, ready to be measured."""

    target: Target
    site: Site
    directory: Path
    program: Path
    effort: Effort

    def load(self, *, port: int = FORWARDER_PORT) -> Load:
        """The generator, aimed at the target: at the servers themselves if it is `direct`."""
        servers = f"{self.site.servers}:{SERVER_PORT}"
        to = servers if self.target.name == DIRECT else f"{self.site.listen_ip}:{port}"
        common = {
            "client_ns": self.site.client_ns,
            "server_ns": self.site.server_ns,
            "to": to,
            "servers": servers,
            "sources": self.site.sources,
            "seconds": self.effort.seconds,
            "warm_up_s": max(0.1, self.effort.seconds / 5),
        }
        return load_module.Load(self.program, common)


def _settled_bytes(stage: Stage, *, settle_s: float = SETTLE_S) -> tuple[int, int]:
    """What machine and target hold once nothing moves any more."""
    time.sleep(settle_s)
    processes = memory.tree_bytes(stage.target.pid) if stage.target.pid else 0
    return memory.machine_used_bytes(), processes


def _idle(stage: Stage) -> Values:
    pairs = min(stage.effort.pairs, stage.target.max_pairs)
    session: Session
    with stage.load().session(stage.directory, "idle", pairs=pairs, trips=1) as session:
        session.report()
        machine_before, processes_before = _settled_bytes(stage, settle_s=SETTLE_S / 3)
        session.go_on()
        session.report()
        machine, processes = _settled_bytes(stage)
        session.finish()
    values = {"idle_memory": (machine - machine_before) / pairs / KIB}
    if stage.target.pid:
        values["idle_process_memory"] = (processes - processes_before) / pairs / KIB
    return values


def _stall(stage: Stage, way: str) -> Values:
    with stage.load().session(
        stage.directory,
        "stall",
        pairs=STALLED_PAIRS,
        down=way == "down",
        cap_bytes=STALL_CAP_BYTES,
    ) as session:
        session.report()
        before, _ = _settled_bytes(stage, settle_s=0.2)
        session.go_on()
        report = session.report()
        held, _ = _settled_bytes(stage, settle_s=0.2)
        session.go_on()
        session.report()  # every byte arrived once the readers woke
        session.finish()
    return {
        f"stall_{way}_accepted": report["most_bytes"] / MIB,
        f"stall_{way}_memory": (held - before) / STALLED_PAIRS / MIB,
    }


def _percentiles(scenario: str, report: Values) -> Values:
    return {f"{scenario}_p{percent}": report[f"p{percent}_us"] for percent in (50, 99)}


def _rtt_near(stage: Stage) -> Values:
    cpu = min(os.sched_getaffinity(0))
    return _percentiles("rtt_near", stage.load().run("rtt", client_cpu=cpu, server_cpu=cpu))


def _rtt_far(stage: Stage) -> Values:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        raise ScenarioError("this machine has one CPU")
    report = stage.load().run("rtt", client_cpu=cpus[0], server_cpu=cpus[1])
    return _percentiles("rtt_far", report)


def _rtt_64(stage: Stage) -> Values:
    return _percentiles("rtt_64", stage.load().run("rtt", pairs=CONNECTIONS))


def _bulk(stage: Stage, streams: int, way: str) -> Values:
    report = stage.load().run("bulk", pairs=streams, down=way == "down")
    return {f"bulk_{streams}_{way}": report["bytes_per_s"] * 8 / 1e9}


def _cpu(stage: Stage, way: str) -> Values:
    wanted = stage.effort.pace_bytes_per_s
    with load_module.soakers(stage.program, stage.directory) as soak_file:
        report = stage.load().run(
            "bulk",
            down=way == "down",
            bytes_per_s=wanted,
            soak_file=soak_file,
            calibrate_s=max(0.3, stage.effort.seconds / 2),
        )
    if report["quiet"] < stage.effort.quiet:
        raise ScenarioError(
            f"the machine was busy with other things ({1 - report['quiet']:.0%} of it)"
        )
    if report["bytes_per_s"] < wanted * (1 - PACE_TOLERANCE):
        # At another rate a byte costs another price: batches grow when a CPU is full.
        raise ScenarioError(
            f"could not hold the paced rate: {report['bytes_per_s'] * 8 / 1e9:.2f} "
            f"of {wanted * 8 / 1e9:.2f} Gbit/s"
        )
    return {f"cpu_{way}": report["cpu_s"] / (report["bytes"] / 1e9)}


def _delay(stage: Stage, way: str) -> Values:
    report = stage.load().run("delay", down=way == "down", bytes_per_s=DELAY_BYTES_PER_S)
    return {f"delay_{way}_p99": report["p99_us"], f"delay_{way}_max": report["max_us"]}


@contextlib.contextmanager
def _read_again_and_again(path: Path | None) -> Iterator[list[int]]:
    """Somebody watches the file while the block runs; how often. Without a file, nobody does."""
    looks = [0]
    stop = threading.Event()

    def watch(path: Path) -> None:
        while not stop.wait(1 / LOOKS_PER_S):
            path.read_bytes()
            looks[0] += 1

    if path is None:
        yield looks
        return
    thread = threading.Thread(target=watch, args=(path,))
    thread.start()
    try:
        yield looks
    finally:
        stop.set()
        thread.join()


def _view(stage: Stage, what: str) -> Values:
    """The same run unread and read, there and back, so that what drifts favours neither.

    A target without a view is run four times alike: how far its ratio is away from 1 is noise.
    A single round trip would not do: it has two modes, by where the scheduler puts whom. The CPU
    time is without the reader's own, which runs while the idle machine is looked at, too.
    """
    instance = stage.target.instance
    path = instance.bpffs_dir / "show" if instance is not None else None
    totals = {True: 0.0, False: 0.0}
    for is_read in (False, True, True, False):
        with _read_again_and_again(path if is_read else None) as looks:
            if what == "rtt":
                totals[is_read] += stage.load().run("rtt", pairs=CONNECTIONS)["p50_us"]
            else:
                totals[is_read] += _cpu(stage, "up")["cpu_up"]
        if is_read and path is not None and not looks[0]:
            raise ScenarioError("`show` was not read")
    return {f"view_{what}": totals[True] / totals[False]}


def _connect(stage: Stage, *, port: int = FORWARDER_PORT, **options: object) -> Values:
    report = stage.load(port=port).run("connect", **{"pairs": CONNECTIONS, **options})
    if report["failed"]:
        why = ", ".join(f"{key} {report[key]:.0f}" for key in FAILURES if report[key])
        raise ScenarioError(
            f"{report['failed']:.0f} of {report['done'] + report['failed']:.0f} connections "
            f"failed: {why}"
        )
    return report


def _connect_paced(stage: Stage) -> Values:
    report = _connect(stage, connections_per_s=PACED_CONNECTIONS_PER_S)
    return _percentiles("connect_paced", report)


def _connect_one(stage: Stage) -> Values:
    return _percentiles("connect_one", _connect(stage, pairs=1))


def _connect_cpu(stage: Stage) -> Values:
    # Counting what has ended is part of the price: from the first moment on as much as later.
    settle_s = max(0.5, min(2.0, stage.effort.seconds))
    with load_module.soakers(stage.program, stage.directory) as soak_file:
        report = _connect(
            stage,
            connections_per_s=CPU_CONNECTIONS_PER_S,
            soak_file=soak_file,
            calibrate_s=max(0.3, stage.effort.seconds / 2),
            quiet_s=settle_s,
            warm_up_s=settle_s,
        )
    if report["quiet"] < stage.effort.quiet:
        raise ScenarioError(
            f"the machine was busy with other things ({1 - report['quiet']:.0%} of it)"
        )
    rate = report["in_window"] / report["window_s"]
    if rate < CPU_CONNECTIONS_PER_S * (1 - PACE_TOLERANCE):
        raise ScenarioError(f"{rate:.0f} of {CPU_CONNECTIONS_PER_S} connections per second ended")
    return {"connect_cpu": report["cpu_s"] / report["in_window"] * 1e4}


def _connect_at_most(
    stage: Stage, scenario: str, *, port: int = FORWARDER_PORT, **options: object
) -> Values:
    pid = stage.target.pid
    before = cpu_time.tree_seconds(pid) if pid else 0.0
    report = _connect(stage, port=port, **options)
    values = {scenario: report["connections_per_s"]}
    if pid:
        values[f"{scenario}_cpu"] = (cpu_time.tree_seconds(pid) - before) / report["done"] * 1e6
    return values


def _connect_first(stage: Stage, order: str) -> Values:
    return _connect_at_most(stage, f"connect_{order}_first", server_closes=order == "server")


def _connect_named(
    stage: Stage, what: str, port: int, first: Callable[[], bytes], vary_at: int
) -> Values:
    file = stage.directory / what
    file.write_bytes(first())
    # No two clients say the same: a reader that remembers the last one would not read.
    return _connect_at_most(stage, f"connect_{what}", port=port, request_file=file, vary_at=vary_at)


def _connect_instruction(stage: Stage) -> Values:
    return _connect_at_most(stage, "connect_instruction", port=INSTRUCTION_PORT, instruction=True)


def _answer(stage: Stage, kib: int) -> Values:
    """Both processors are full, so the rate is that of what a connection costs in all."""
    report = _connect(stage, answer_bytes=kib * KIB, server_closes=True)
    return {f"answer_{kib}k": report["connections_per_s"]}


def _pause(stage: Stage) -> Values:
    """A new connection after the other, few at once, so that all of them flow all the time."""
    report = _connect(
        stage, pairs=PAUSE_STREAMS, answer_bytes=PAUSE_ANSWER_MIB * MIB, server_closes=True
    )
    return {f"pause_{key}": report[f"pause_{key}_us"] / 1e3 for key in ("p50", "p99", "max")}


def _datagrams(stage: Stage, mode: str, *, pairs: int = 1, **options: object) -> Values:
    """One run, which begins once all its sessions are where they stay.

    `forwarder_s` is the CPU time of the target's processes from there on.
    """
    pid = stage.target.pid
    load = stage.load(port=DATAGRAM_PORT)
    stage.target.end_sessions()  # of an earlier run, which would take part and not be counted
    before = stage.target.spliced()
    session: Session
    with load.session(stage.directory, mode, pairs=pairs, waits=True, **options) as session:
        session.report()
        until_s = time.monotonic() + SPLICED_WITHIN_S
        while before is not None and (known := stage.target.spliced() or 0) - before < pairs:
            if time.monotonic() > until_s:
                raise ScenarioError(f"only {known - before} of {pairs} sessions were handed over")
            time.sleep(0.1)
        session.go_on()
        session.report()
        used_s = cpu_time.tree_seconds(pid) if pid else 0.0
        report = session.report()
        used_s = (cpu_time.tree_seconds(pid) if pid else 0.0) - used_s
        session.finish()
    return {**report, "forwarder_s": used_s}


def _udp_rtt(stage: Stage, where: str) -> Values:
    cpus = sorted(os.sched_getaffinity(0))
    if where == "far" and len(cpus) == 1:
        raise ScenarioError("this machine has one CPU")
    server_cpu = cpus[1] if where == "far" else cpus[0]
    report = _datagrams(stage, "udp_rtt", client_cpu=cpus[0], server_cpu=server_cpu)
    return _percentiles(f"udp_rtt_{where}", report)


def _udp_rate(stage: Stage, size: int, sessions: int) -> Values:
    """As many as arrive, while no more are under way than any socket's buffer takes."""
    report = _datagrams(stage, "udp_rate", pairs=sessions, datagram_bytes=size)
    key = f"udp_{size}_{sessions}"
    # Those of a window are not exactly those that were sent in it.
    lost = max(0.0, 1 - report["datagrams"] / max(report["sent"], report["datagrams"])) * 100
    values = {key: report["datagrams_per_s"], f"{key}_lost": lost}
    if stage.target.pid:
        values[f"{key}_cpu"] = report["forwarder_s"] / report["in_all"] * 1e6
    return values


def _udp_cpu(stage: Stage) -> Values:
    with load_module.soakers(stage.program, stage.directory) as soak_file:
        report = _datagrams(
            stage,
            "udp_rate",
            pairs=PACED_DATAGRAM_SESSIONS,
            datagram_bytes=DATAGRAM_BYTES[-1],
            datagrams_per_s=PACED_DATAGRAMS_PER_S,
            soak_file=soak_file,
            calibrate_s=max(0.3, stage.effort.seconds / 2),
        )
    if report["quiet"] < stage.effort.quiet:
        raise ScenarioError(
            f"the machine was busy with other things ({1 - report['quiet']:.0%} of it)"
        )
    if report["datagrams_per_s"] < PACED_DATAGRAMS_PER_S * (1 - PACE_TOLERANCE):
        raise ScenarioError(
            f"{report['datagrams_per_s']:.0f} of {PACED_DATAGRAMS_PER_S} datagrams per second came"
        )
    return {"udp_cpu": report["cpu_s"] / report["datagrams"] * 1e6}


_WAYS: Final = ("up", "down")
_ORDERS: Final = ("client", "server")
# One per scenario of `measures.SCENARIOS`.
RUNS: Final[Mapping[str, Callable[[Stage], Values]]] = {
    "idle": _idle,
    **{f"stall_{way}": partial(_stall, way=way) for way in _WAYS},
    "rtt_near": _rtt_near,
    "rtt_far": _rtt_far,
    "rtt_64": _rtt_64,
    **{f"bulk_{n}_{way}": partial(_bulk, streams=n, way=way) for n in (1, 8) for way in _WAYS},
    **{f"cpu_{way}": partial(_cpu, way=way) for way in _WAYS},
    **{f"delay_{way}": partial(_delay, way=way) for way in _WAYS},
    **{f"view_{what}": partial(_view, what=what) for what in ("rtt", "cpu")},
    **{f"udp_rtt_{where}": partial(_udp_rtt, where=where) for where in ("near", "far")},
    **{
        f"udp_{size}_{sessions}": partial(_udp_rate, size=size, sessions=sessions)
        for size, sessions in DATAGRAM_RATES
    },
    "udp_cpu": _udp_cpu,
    "connect_one": _connect_one,
    "connect_paced": _connect_paced,
    "connect_cpu": _connect_cpu,
    "connect_sni": partial(
        _connect_named,
        what="sni",
        port=SNI_PORT,
        first=first_bytes.client_hello,
        vary_at=first_bytes.RANDOM_AT,
    ),
    "connect_host": partial(
        _connect_named,
        what="host",
        port=HOST_PORT,
        first=first_bytes.http_head,
        vary_at=first_bytes.PATH_AT,
    ),
    **{f"connect_{order}_first": partial(_connect_first, order=order) for order in _ORDERS},
    "connect_instruction": _connect_instruction,
    "pause": _pause,
    **{f"answer_{kib}k": partial(_answer, kib=kib) for kib in ANSWERS_KIB},
}


_MANY: Final = {f"udp_{n}_{s}" for n, s in DATAGRAM_RATES if s == MANY_DATAGRAM_SESSIONS}


def is_possible(scenario: str, target: Target, effort: Effort) -> bool:
    """Whether the target can take part: only pyforwarder takes instructions and has a view.

    And not all take datagrams, or very many sessions.

    `direct` says how far a ratio of equal runs is away from 1. `express` is about how connections
    begin: the others are a worker's, or what `splice` is.
    """
    if target.name == EXPRESS:
        is_about_it = scenario.startswith(("connect_", "answer_"))
        return is_about_it and scenario != "connect_instruction"
    if scenario in ("connect_sni", "connect_host"):
        return target.name in TAKE_NAMES
    if scenario.startswith("view_"):
        return target.instance is not None or target.name == DIRECT
    if scenario.startswith("udp_"):
        sessions = MANY_DATAGRAM_SESSIONS if scenario in _MANY else 1
        return sessions <= min(effort.sessions, target.max_sessions)
    return scenario != "connect_instruction" or target.takes_instructions


def run(scenario: str, stage: Stage) -> Values:
    """One run; values by the keys of `measures.MEASURES`.

    Raises:
        ScenarioError: the numbers would not mean what the row says.
        load.LoadError: the generator gave none.
        targets.TargetError: the target is gone.
    """
    before = stage.target.joined()
    is_express = stage.target.name == EXPRESS
    before_all = stage.target.opened() if is_express else 0
    left = stage.target.left() if is_express else {}
    values = RUNS[scenario](stage)
    if is_express:
        _prove_share(stage.target, before or 0, before_all, left)
    elif before is not None and stage.target.joined() == before:
        raise ScenarioError(f"not one pair was joined by {stage.target.name}: something else ran")
    return values


def _prove_share(
    target: Target, before: int, before_all: int, left_before: Mapping[str, int]
) -> None:
    """Raise ScenarioError unless nearly all connections since were opened by the kernel.

    What the kernel cannot open (no port is left, say) goes by a worker, and would be another row.
    The error says why it could not, the commonest reason first.
    """
    until_s = time.monotonic() + COUNTED_WITHIN_S
    known = last = (-1, -1)
    while time.monotonic() < until_s:
        known = (target.joined() or 0) - before, target.opened() - before_all
        if known == last:
            break  # nothing more is counted
        last = known
        time.sleep(COUNTED_AFTER_S)
    by_kernel, in_all = known
    if not by_kernel or by_kernel < in_all * EXPRESS_SHARE:
        left = target.left()
        why = sorted(
            ((number - left_before.get(reason, 0), reason) for reason, number in left.items()),
            reverse=True,
        )
        reasons = ", ".join(f"{number} {reason}" for number, reason in why if number > 0)
        raise ScenarioError(
            f"the kernel has opened only {by_kernel} of {in_all} connections; it has left packets"
            f" to workers: {reasons or 'none'}"
        )
