"""The walks by which the kernel can print the view's tables, and which of them this host takes.

    map     over the elements of the maps (bpf_map_elem); the first choice
    ksym    over the kernel's symbols, whose visits are only counted: the n-th prints slot n
            (bpf/view.c); for kernels that refuse to iterate over maps

All are programs of bpf/view.c, and print the same. Where the kernel takes none of them there is no
view, and the daemon itself fills the files (view_and_proc.py). PYFORWARDER_VIEW names the only walk
that is tried, or is `daemon`: none (tests need that).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyforwarder.datapath.base import OPENED_BY_KERNEL
from pyforwarder.datapath.ebpf import btf, refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.arrays import LISTENER_LINES, STAT_LINES, Arrays
from pyforwarder.datapath.ebpf.loading import ProgramKind, RefusedProgram, load_first
from pyforwarder.errors import LoadError, UsageError
from pyforwarder.runtime.counters import BLOCK_WORDS

if TYPE_CHECKING:
    from pyforwarder.datapath.sockmap.maps import KernelMaps

FILES: Final = ("show", "stats", "listeners")


class Walk(NamedTuple):
    """How the tables are walked, by one kind of iterator."""

    name: str  # in PYFORWARDER_VIEW
    title: str  # for people
    kind: ProgramKind
    suffix: str  # of its programs' names
    walks_maps: bool


MAP: Final = Walk("map", "map iterators", "map_iterator", "", walks_maps=True)
KSYM: Final = Walk("ksym", "the ksym iterator", "ksym_iterator", "_by_visits", walks_maps=False)
# In the order in which they are tried.
WALKS: Final = (MAP, KSYM)

# What tells of the backlogs, in the order in which it is tried; without any they are not known.
_SOCKET_BACKLOG: Final[tuple[str, ProgramKind]] = ("backlog", "socket_iterator")
_BACKLOGS: Final[tuple[tuple[str, ProgramKind], ...]] = (
    _SOCKET_BACKLOG,
    ("backlog_of_tcp", "tcp_iterator"),
)

# How many may read `stats` at the same moment.
_MOST_READERS: Final = 256
_SUMS_BYTES: Final = (2 + STAT_LINES) * 8  # struct sums
# Kernel structure fields that the programs read.
_FIELDS: Final = {"tcp_sock": ("write_seq",), "bpf_map": ("writecnt",)}

_SYMBOLS: Final = Path("/proc/kallsyms")
# Each more is another copy of the loop for the verifier, which gives up before 16.
_MOST_PAIRS_PER_VISIT: Final = 8


def walks_of(environ: Mapping[str, str]) -> tuple[Walk, ...]:
    """The walks to try, in this order.

    Raises:
        UsageError: PYFORWARDER_VIEW names none.
    """
    wanted = environ.get("PYFORWARDER_VIEW")
    if not wanted:
        return WALKS
    if wanted == "daemon":
        return ()
    named = tuple(walk for walk in WALKS if walk.name == wanted)
    if not named:
        names = ", ".join(walk.name for walk in WALKS)
        raise UsageError(f"PYFORWARDER_VIEW={wanted}: {names} or daemon wanted")
    return named


@dataclass(frozen=True, slots=True)
class Links:
    """The linked programs of a view; the owner closes the descriptors."""

    walk: Walk
    refused: list[RefusedProgram]  # programs of the walks that were tried before
    files: dict[str, int]  # the link of each of FILES
    backlogs: tuple[int, ...]  # links; none: nothing tells of the backlogs
    tells_all_backlogs: bool  # of sockets in every network namespace
    opened: tuple[int, ...]  # all descriptors, these among them

    def for_another_process(self) -> tuple[list[int], dict[str, object]]:
        """The links, which are enough (each holds its program), and the words that go with them."""
        descriptors = [*(self.files[name] for name in FILES), *self.backlogs]
        facts = {"way": self.walk.name, "tells_all_backlogs": self.tells_all_backlogs}
        return descriptors, facts

    @classmethod
    def of_another_process(cls, descriptors: Sequence[int], facts: Mapping[str, Any]) -> Links:
        """Return the links that `for_another_process` has sent; of walks tried before nothing is
        known.
        """
        return cls(
            next(walk for walk in WALKS if walk.name == facts["way"]),
            [],
            dict(zip(FILES, descriptors, strict=False)),
            tuple(descriptors[len(FILES) :]),
            tells_all_backlogs=facts["tells_all_backlogs"],
            opened=tuple(descriptors),
        )


def link(
    arrays: Arrays, maps: KernelMaps | None, walks: Sequence[Walk], *, workers: int, slots: int
) -> Links:
    """Load and link the programs of the first walk that the kernel takes.

    Raises:
        LoadError: it takes none; says what it said of each.
    """
    if not walks:
        raise LoadError("PYFORWARDER_VIEW=daemon")
    per_visit, few_symbols = 1, None
    if KSYM in walks:
        try:
            per_visit = pairs_per_visit(workers * slots)
        except LoadError as error:
            few_symbols = error
            walks = [walk for walk in walks if walk != KSYM]
            if not walks:
                raise
    backlogs = (*_BACKLOGS, None) if maps is not None else (None,)
    combined = [(walk, backlog) for walk in walks for backlog in backlogs]
    opened: list[int] = []
    walk: Walk | None = None
    try:
        fds = _maps_of(arrays, maps, opened)
        loaded = load_first(
            "view.c",
            [
                [
                    *((name + walk.suffix, walk.kind) for name in FILES),
                    *([backlog] if backlog else []),
                ]
                for walk, backlog in combined
            ],
            defines={
                **btf.defines(btf.field_offsets(_FIELDS)),
                "WORKERS": workers,
                "SLOTS": slots,
                "PAIRS_PER_VISIT": per_visit,
                "BLOCK_WORDS": BLOCK_WORDS,
                "STAT_LINES": STAT_LINES,
                "LISTENER_LINES": LISTENER_LINES,
                **{f"REASON_{reason.name}": reason for reason in OPENED_BY_KERNEL},
            },
            maps=fds,
        )
        opened += loaded.descriptors
        walk, backlog = combined[loaded.alternative]
        walked: list[tuple[int, int | None]] = []  # a program, and the map that it walks
        of_files = loaded.descriptors[: len(FILES)]
        targets = (arrays.pairs_fd, arrays.pairs_fd, arrays.listeners_fd)
        walked += zip(of_files, targets if walk.walks_maps else [None] * len(FILES), strict=True)
        if backlog is not None and maps is not None:
            program = loaded.descriptors[-1]
            if backlog is _SOCKET_BACKLOG:
                walked += [(program, own.sockets_fd) for own in maps.of]
            else:
                walked.append((program, None))
        links = []
        for program, target in walked:
            links.append(bpf.link_iterator(program, target))
            opened.append(links[-1])
    except (LoadError, OSError) as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, OSError):
            # A kernel that takes a program may still refuse its link.
            if walk is None or walk == walks[-1]:
                raise refusal.explain(
                    "make the view", error.errno or errno.EIO, needs=refusal.TRACING
                ) from error
            following = walks[walks.index(walk) + 1 :]
            links_of_next = link(arrays, maps, following, workers=workers, slots=slots)
            before = [*loaded.refused, _refused_link(walk, error)]
            return replace(links_of_next, refused=[*before, *links_of_next.refused])
        if few_symbols is not None:
            text = f"{error.operation}; {few_symbols}"
            raise LoadError(text, cause=error.cause, advice=error.advice, log=error.log) from error
        raise
    return Links(
        walk,
        loaded.refused,
        dict(zip(FILES, links, strict=False)),
        tuple(links[len(FILES) :]),
        tells_all_backlogs=maps is None or backlog is _SOCKET_BACKLOG,
        opened=tuple(opened),
    )


def _refused_link(walk: Walk, error: OSError) -> RefusedProgram:
    # No errno: it would be taken for the verifier's.
    facts = {"program": FILES[0] + walk.suffix, "kind": walk.kind, "errno": 0}
    return RefusedProgram("view.c", {**facts, "reason": f"its link: {error.strerror}"}, "")


def _maps_of(arrays: Arrays, maps: KernelMaps | None, opened: list[int]) -> dict[str, int]:
    """The macros that name the maps; those made for it are added to `opened`. Raises OSError."""
    sums = bpf.create_map(
        bpf.MapType.HASH,
        name="pf_sums",
        key_bytes=8,
        value_bytes=_SUMS_BYTES,
        entries=_MOST_READERS,
        flags=bpf.F_NO_PREALLOC,
    )
    opened.append(sums)
    zero = bpf.create_map(
        bpf.MapType.ARRAY, name="pf_zero", key_bytes=4, value_bytes=_SUMS_BYTES, entries=1
    )
    opened.append(zero)
    fds = {
        "MAP_PAIRS_FD": arrays.pairs_fd,
        "MAP_COUNTERS_FD": arrays.counters_fd,
        "MAP_STATS_FD": arrays.stats_fd,
        "MAP_LISTENERS_FD": arrays.listeners_fd,
        "MAP_SUMS_FD": sums,
        "MAP_ZERO_FD": zero,
    }
    if maps is not None:
        fds["MAP_ALL_OWNERS_FD"] = all_owners = bpf.create_map(
            bpf.MapType.ARRAY_OF_MAPS,
            name="pf_all_owners",
            key_bytes=4,
            value_bytes=4,
            entries=len(maps.of),
            inner_map_fd=maps.of[0].owners_fd,
        )
        opened.append(all_owners)
        table = bpf.Map(all_owners, key_bytes=4, value_bytes=4)
        for worker, own in enumerate(maps.of):
            table.update(
                worker.to_bytes(4, sys.byteorder), own.owners_fd.to_bytes(4, sys.byteorder)
            )
    return fds


def pairs_per_visit(pairs: int, *, symbols: Path = _SYMBOLS) -> int:
    """How many pairs each visit to a symbol has to print, so that there are enough visits.

    Only the kernel's own symbols count: they stay, those of modules and BPF programs come and go.

    Raises:
        LoadError: too many for this kernel's symbols, or they cannot be counted.
    """
    # Two more: `stats` is printed after the last pair, and a walk's last visit may be made twice.
    spare = 2
    wanted = max(pairs, LISTENER_LINES) + spare
    try:
        visits = _count_symbols(symbols, most=wanted)
    except OSError as error:
        raise LoadError(f"read {symbols}: {error.strerror}") from error
    usable = visits - spare
    per_visit = -(-pairs // usable) if usable >= LISTENER_LINES else _MOST_PAIRS_PER_VISIT + 1
    if per_visit > _MOST_PAIRS_PER_VISIT:
        raise LoadError(f"{pairs} slots for pairs are too many for {visits} kernel symbols")
    return per_visit


def _count_symbols(path: Path, *, most: int) -> int:
    """How many symbols the kernel itself has, or `most`; those of modules follow, in brackets."""
    count = 0
    with path.open("rb") as file:
        while count < most and (chunk := file.read(1 << 16)):
            own, bracket, _ = chunk.partition(b"[")
            count += own.count(b"\n")
            if bracket:
                break
    return min(count, most)
