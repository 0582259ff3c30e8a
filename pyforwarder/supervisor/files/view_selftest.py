"""Which view this host can have, proven by reading one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairState, pack_endpoint
from pyforwarder.datapath.ebpf.arrays import Arrays
from pyforwarder.datapath.ebpf.pair_table import PairTable, PairWindow, slots_for
from pyforwarder.errors import LoadError
from pyforwarder.runtime import tables
from pyforwarder.supervisor.files.view_walks import WALKS, Walk
from pyforwarder.supervisor.files.views import View

if TYPE_CHECKING:
    from collections.abc import Sequence

# What it means for the files that the kernel does not print them.
WITHOUT_VIEW: Final = (
    "the daemon fills the files in proc/ itself; once it is killed they say what they said last"
)
_ID: Final = 4711
_BYTES: Final = 23


@dataclass(frozen=True, slots=True)
class ViewProof:
    """What came of making a view and reading it."""

    walk: Walk | None  # how the kernel prints it; None: it cannot
    detail: str  # for people: the walk and why no earlier one, or the cause and the consequence
    log: str = ""


def prove_view(walks: Sequence[Walk] = WALKS) -> ViewProof:
    """Make a view of a table with one pair, and read it; nothing is pinned, and nothing stays."""
    slots = slots_for(1)
    try:
        arrays = Arrays.create(workers=1, slots=slots)
        try:
            view = View.load(arrays, None, workers=1, slots=slots, walks=walks)
            try:
                return _proof_of(view, arrays, slots)
            finally:
                view.close()
        finally:
            arrays.close()
    except LoadError as error:
        return ViewProof(None, f"{error}: {WITHOUT_VIEW}", error.log)


def _proof_of(view: View, arrays: Arrays, slots: int) -> ViewProof:
    (memory,) = PairTable(workers=1, slots=slots, fd=arrays.pairs_fd).windows
    window = PairWindow(memory, first_slot=0, worker_index=0)
    try:
        slot = window.allocate()
        now_ns = time.monotonic_ns()
        window.count(slot, Direction.UP, _BYTES, 1, now_ns)
        window.describe(
            slot,
            pair_id=_ID,
            started_ns=now_ns,
            endpoints=pack_endpoint(None) * 4,
            rule=b"proof",
            listener=b"proof",
            state=PairState.JOINED,
            datapath=DatapathKind.COPY,
            reason=0,
        )
        try:
            rows = tables.parse(view.read("show"))
        except OSError as error:
            return ViewProof(None, f"read it: {error.strerror}: {WITHOUT_VIEW}")
    finally:
        window.close()
    if [(row["id"], row["up_bytes"]) for row in rows] != [(str(_ID), str(_BYTES))]:
        return ViewProof(None, f"the {view.walk.title} do not show what is there: {WITHOUT_VIEW}")
    because = view.why_no_other()
    return ViewProof(
        view.walk,
        f"printed by the kernel, by {view.walk.title}" + (f" ({because})" if because else ""),
    )
