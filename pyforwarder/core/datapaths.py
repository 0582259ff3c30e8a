"""The datapaths: one row each, from which the other parts of the program take what they need.

To add a datapath: a row here, its name in `DatapathName` if the configuration may ask for it, and
a folder or file of its own below `datapath/`. Where it has pairs in the table that `show` prints,
it needs a number there (`enum pf_datapath` in bpf/abi.h, its word in bpf/view.c, `DatapathKind`)
and a counter `JOINED_...` (`runtime/counters.py`). Its class for workers is made in
worker/parts.py, from what worker/inheritance.py has of it (filled in supervisor/workers/starting.py
from supervisor/datapaths.py); worker/handover.py decides which pairs it gets. What its pairs are
like, a row says: worker/ and supervisor/ ask for that, and compare no name; a test names the places
that do, and why. To have its pairs moved to another daemon, worker/pair_sender.py must know how.

Functions and classes are named as entry points are, `module:name`, and imported where they are used
(`pkgutil.resolve_name`): this file itself imports nothing.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, get_args

DatapathName = Literal["auto", "express", "sockmap", "splice", "copy"]
NAMES: Final[tuple[str, ...]] = get_args(DatapathName)


class DatapathRow(NamedTuple):
    """A row."""

    name: str  # in the configuration, in `show`, `doctor`, metrics and the log
    proof: str  # its self-test: a function from a user's name (None: stay who you are) to a Proof
    # What the supervisor has of it, a `datapath.supervised.KernelDatapath`; empty: it needs nothing
    # of the kernel, and is always there.
    supervised: str = ""
    # What it is like, for the worker and the supervisor, who ask for this and not for its name.
    outlives_worker: bool = False  # its pairs go on where the worker that had them has died
    # Client and server speak TCP with each other: our sockets hold none of a pair's bytes, and say
    # nothing to its peers.
    is_end_to_end: bool = False
    asks_keeper: bool = False  # for each pair, a process of root's, while the pair stands still
    has_backlog: bool = False  # bytes of its pairs wait in the kernel, and the view knows how many
    takes_sessions: bool = False  # of UDP, too


# The best first: `auto` takes the first that host and pair allow.
DATAPATHS: Final = (
    DatapathRow(
        "splice",
        proof="pyforwarder.datapath.proof.apart:prove_splice_apart",
        supervised="pyforwarder.datapath.splice.supervised:SupervisedSplice",
        outlives_worker=True,
        is_end_to_end=True,
        asks_keeper=True,
        takes_sessions=True,
    ),
    DatapathRow(
        "sockmap",
        proof="pyforwarder.datapath.proof.apart:prove_sockmap_apart",
        supervised="pyforwarder.datapath.sockmap.supervised:SupervisedSockmap",
        has_backlog=True,
    ),
    DatapathRow("copy", proof="pyforwarder.datapath.proof.apart:prove_copy"),
)
# Of UDP, loaded together with one above.
SESSIONS: Final = (
    DatapathRow("splice_udp", proof="pyforwarder.datapath.proof.apart:prove_sessions_apart"),
)
# Of TCP, loaded together with one above: what this does not take goes by `auto`.
EXPRESS: Final = (
    DatapathRow("express", proof="pyforwarder.datapath.proof.apart:prove_express_apart"),
)
IN_KERNEL: Final = tuple(row for row in DATAPATHS if row.supervised)
OUTLIVING: Final = frozenset(row.name for row in DATAPATHS if row.outlives_worker)


def row_of(name: str) -> DatapathRow:
    """The row of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME: Final = {row.name: row for row in (*DATAPATHS, *SESSIONS, *EXPRESS)}
