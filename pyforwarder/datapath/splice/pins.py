"""What an earlier daemon has left in bpffs: its maps are opened, and its pairs continue.

BPFFS/NAME/splice/flows_V splices_V pairs_V    the maps, V is the version of their records
BPFFS/NAME/splice/session_flows_V sessions_V   those of UDP sessions
BPFFS/NAME/splice/in_N out_N                   the links to interface N, where there is tcx
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import ABI_VERSION, PAIR_BYTES
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.abi import (
    HELD,
    NO_SLOT,
    SPLICE_BYTES,
    VERSION,
    Splice,
    SpliceState,
)
from pyforwarder.datapath.splice.records import (
    FLOW,
    KEY_BYTES,
    LAST_SLOT_AT,
    SLOT_AT,
    forget_flows,
    set_state,
    shown_of,
    shown_slot,
    store,
    used_indexes,
)
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES
from pyforwarder.errors import LoadError

MAPS: Final = (f"flows_{VERSION}", f"splices_{VERSION}", f"pairs_{ABI_VERSION}")
_OURS: Final = re.compile(r"(flows|splices|pairs|session_flows|sessions|in|out)_\d+")


@dataclass(frozen=True, slots=True)
class Found:
    """A pair of an earlier daemon that continues."""

    index: int
    id: int
    record: bytes  # of the pair table: what `show` printed for it; empty: not known


def unpin(directory: Path) -> None:
    """Remove the pins, and detach the programs. Never raises.

    The next packet of a pair that was still spliced gets the kernel's RST.
    """
    attaching.remove(directory)
    with contextlib.suppress(OSError):
        for path in pins_in(directory):
            path.unlink(missing_ok=True)
        directory.rmdir()


def pins_of(directory: Path) -> Path:
    """The directory of splice's pins, for an instance whose pins are in `directory`."""
    return directory / "splice"


def has_pins(directory: Path) -> bool:
    """Whether an earlier daemon may have left something there; False without permission to look.

    /sys/fs/bpf belongs to root (0700): for other users nothing there can be theirs.
    """
    return os.path.isdir(directory)


def pins_in(directory: Path) -> list[Path]:
    """The pins of splice, of any version; none without permission to look, as none can be ours
    then.
    """
    try:
        return [path for path in directory.iterdir() if _OURS.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


@dataclass(frozen=True, slots=True)
class Left:
    """The opened maps that an earlier daemon has left."""

    flows_fd: int
    splices_fd: int
    pairs_fd: int
    entries: int
    interfaces: frozenset[int]  # where its programs are attached

    def take_over(self) -> tuple[Found, ...]:
        """The pairs that continue; those that had not begun, or have ended, are forgotten."""
        memory = bpf.map_memory(self.splices_fd, self.entries * SPLICE_BYTES, write=True)
        pairs = bpf.map_sizes(self.pairs_fd).entries
        table = bpf.map_memory(self.pairs_fd, pairs * PAIR_BYTES, write=False)
        flows = bpf.Map(self.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        found = []
        try:
            for index in used_indexes(memory):
                record = Splice.from_buffer_copy(memory, index * SPLICE_BYTES)
                # Not those of other machines: this daemon gets them again from the fleet.
                if record.state == SpliceState.ACTIVE and record.id and record.worker != HELD:
                    said = shown_of(table, record, pairs)
                    if said:
                        self._store(memory, index, LAST_SLOT_AT, shown_slot(table, record, pairs))
                    # It has no slot in the new table yet.
                    self._store(memory, index, SLOT_AT, NO_SLOT)
                    found.append(Found(index, record.id, said))
                else:
                    forget_flows(flows, index, record)
                    set_state(memory, index, SpliceState.FREE)
        finally:
            memory.close()
            table.close()
        return tuple(found)

    @staticmethod
    def _store(memory: mmap.mmap, index: int, at: int, number: int) -> None:
        store(memory, index, at, number)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.flows_fd, self.splices_fd, self.pairs_fd):
            os.close(fd)


def open_left(pins: Path) -> Left | None:
    opened: dict[str, int] = {}
    try:
        for name in MAPS:
            opened[name] = bpf.open_pin(pins / name)
        flows, splices, pairs = opened.values()
        sizes = bpf.map_sizes(splices)
        is_ours = sizes.value_bytes == SPLICE_BYTES
        is_ours = is_ours and bpf.map_sizes(pairs).value_bytes == PAIR_BYTES
        is_ours = is_ours and bpf.map_sizes(flows)[:2] == (KEY_BYTES, FLOW.size)
        interfaces = frozenset(attaching.left_on(pins))
    except OSError:
        is_ours = False
    if is_ours:
        return Left(flows, splices, pairs, sizes.entries, interfaces)
    # Of another version, or incomplete: no daemon can continue those pairs.
    for fd in opened.values():
        os.close(fd)
    unpin(pins)
    return None


def must_fit(pins: Path) -> None:
    """Raise LoadError unless all maps of another daemon exist, with records of this version."""
    names = (*MAPS, *session_maps.PINS)
    sizes = {}
    for name in names:
        try:
            fd = bpf.open_pin(pins / name)
        except OSError:
            raise LoadError(
                f"spliced pairs of the running daemon: {pins / name} is not there",
                advice="its version keeps them in another way than this one",
            ) from None
        try:
            sizes[name] = bpf.map_sizes(fd)
        except OSError:
            raise LoadError(
                f"spliced pairs of the running daemon: {pins / name} is no map"
            ) from None
        finally:
            os.close(fd)
    flows, splices, pairs, session_flows, sessions = sizes.values()
    if (
        (flows[:2], session_flows[:2]) != ((KEY_BYTES, FLOW.size),) * 2
        or (splices.value_bytes, pairs.value_bytes) != (SPLICE_BYTES, PAIR_BYTES)
        or sessions.value_bytes != SESSION_BYTES
    ):
        raise LoadError(
            "spliced pairs of the running daemon: their records are of another version",
            advice="`down` lets them end before the new version's `up`",
        )
