"""The maps and programs that open connections in the kernel (bpf/express_connect.c).

`Connecting` is made first; `SpliceMaps.load_programs` is given it, so that the programs on the
interfaces go on with these; then `load` puts these in their places. A place is a port of ours, and
a record among the splices: `place` has the port `first_port + place` and the record
`first_splice + place`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import struct
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import btf
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.maps import Tables
from pyforwarder.errors import LoadError

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

PROGRAMS: Final = ("begin4", "begin6", "asked4", "asked6", "by_rules", "ask4", "ask6")
MOST_LISTENERS: Final = 256
MOST_TARGETS: Final = 4096
_FIELDS: Final = {
    "request_sock": ("num_timeout", "mss"),
    "sock_common": ("skc_rcv_wnd", "skc_bound_dev_if"),
    "inet_request_sock": ("snd_wscale",),
    "tcp_request_sock": ("rcv_isn", "snt_isn", "is_mptcp", "tfo_listener"),
}
# Not on all kernels: Linux 6.7 and 6.18.
_LATER_FIELDS: Final = ("req_usec_ts", "accecn_ok")
# struct asking: a key, what was read of the packet, a listener's key, and some numbers.
_ASKING_BYTES: Final = 36 + 32 + 20 + 7 * 4
# struct made: two IP headers, two of TCP, and some numbers.
_MADE_BYTES: Final = 80 + 128 + 32 + 8 + 8 + 20 + 12 + 16 + 16
_NUMBER: Final = struct.Struct("=I")
# Behind a header of Ethernet: place, word, until when its target is not asked; and some more, as
# the kernel runs a program with no packet that is shorter than a header of IP.
_LET_GO: Final = struct.Struct("=14xI4xQQ28x")


class Connecting:
    """Rules, listeners, targets and places; closed by `close`."""

    def __init__(
        self, *, tables: int, places: int, first_splice: int, first_port: int, is_open: bool = True
    ) -> None:
        """Make the maps; unless `is_open` the programs have no place before it is offered.

        Raises:
            OSError: the kernel refuses.
        """
        self.places, self.first_splice, self.first_port = places, first_splice, first_port
        # Not to be guessed: what bears it is believed to have been looked at.
        self.mark = secrets.randbits(32) | 1
        kinds = bpf.MapType
        with contextlib.ExitStack() as opened:
            self.tables = Tables(tables)
            opened.callback(self.tables.close)

            def make(
                name: str, kind: bpf.MapType, key: int, value: int, entries: int, flags: int = 0
            ) -> int:
                fd = bpf.create_map(
                    kind,
                    key_bytes=key,
                    value_bytes=value,
                    entries=entries,
                    flags=flags,
                    name=f"pf_ex_{name}",
                )
                opened.callback(os.close, fd)
                return fd

            key, listener = ctypes.sizeof(abi.ListenerKey), ctypes.sizeof(abi.Listener)
            target = ctypes.sizeof(abi.Target)
            self.programs_fd = make("programs", kinds.PROG_ARRAY, 4, 4, len(PROGRAMS))
            # Not preallocated: a program that reads an old one must not see parts of a new one.
            self.listeners_fd = make(
                "listeners", kinds.HASH, key, listener, MOST_LISTENERS, bpf.F_NO_PREALLOC
            )
            self.targets_fd = make("targets", kinds.ARRAY, 4, target, MOST_TARGETS)
            self.asks_fd = make("asks", kinds.ARRAY, 4, abi.ASK_BYTES, places, bpf.F_MMAPABLE)
            self.places_fd = make("places", kinds.QUEUE, 0, 4, places)
            self.counts_fd = make("counts", kinds.ARRAY, 4, 8, len(abi.Count))
            self.made_fd = make("made", kinds.PERCPU_ARRAY, 4, _MADE_BYTES, 1)
            self.asking_fd = make("asking", kinds.PERCPU_ARRAY, 4, _ASKING_BYTES, 1)
            self.memory = bpf.map_memory(self.asks_fd, places * _stride(), write=True)
            self._listeners = bpf.Map(self.listeners_fd, key_bytes=key, value_bytes=listener)
            self._targets = bpf.Map(self.targets_fd, key_bytes=4, value_bytes=target)
            self._counts = bpf.Map(self.counts_fd, key_bytes=4, value_bytes=8)
            for place in range(places):
                at = place * _stride() + abi.Ask.secret.offset
                self.memory[at : at + 4] = secrets.token_bytes(4)
                if is_open:
                    bpf.push(self.places_fd, _NUMBER.pack(place))
            self._let_go_fd = -1
            self._opened = opened.pop_all()

    def load(self, splice: SpliceMaps) -> int:
        """Load the programs, and put them where those on the interfaces go on with them.

        The descriptor is of another one, which `begin` is to be given: it may be loaded in another
        process.

        Raises:
            LoadError: they do not compile, or the kernel refuses them.
        """
        offsets = btf.field_offsets(_FIELDS)
        for field in _LATER_FIELDS:
            with contextlib.suppress(LoadError):
                offsets |= btf.field_offsets({"tcp_request_sock": (field,)})
        *descriptors, let_go_fd = load_programs(
            "express_connect.c",
            [(name, "sched_cls") for name in (*PROGRAMS, "let_go")],
            defines={**btf.defines(offsets), **splice.defines},
            maps={
                **self.tables.maps,
                "MAP_EXPRESS_LISTENERS_FD": self.listeners_fd,
                "MAP_EXPRESS_TARGETS_FD": self.targets_fd,
                "MAP_EXPRESS_ASKS_FD": self.asks_fd,
                "MAP_EXPRESS_PLACES_FD": self.places_fd,
                "MAP_EXPRESS_COUNTS_FD": self.counts_fd,
                "MAP_EXPRESS_MADE_FD": self.made_fd,
                "MAP_EXPRESS_ASKING_FD": self.asking_fd,
                "MAP_EXPRESS_PROGRAMS_FD": self.programs_fd,
                "MAP_FLOWS_FD": splice.flows_fd,
                "MAP_SPLICES_FD": splice.splices_fd,
                "MAP_COUNTERS_FD": splice.counters_fd,
                "MAP_SCRATCH_FD": splice.scratch_fd,
            },
            values={
                "FIRST_SPLICE": self.first_splice,
                "FIRST_PORT": self.first_port,
                "FOR_OUR_STACK": self.mark,
            },
        )
        programs = bpf.Map(self.programs_fd, key_bytes=4, value_bytes=4)
        try:
            for place, fd in enumerate(descriptors):
                programs.update(_NUMBER.pack(place), _NUMBER.pack(fd))
        finally:
            for fd in descriptors:
                os.close(fd)
        return let_go_fd

    def begin(self, let_go_fd: int) -> None:
        """What was loaded is used from here on; the descriptor is ours to close."""
        self._opened.callback(os.close, let_go_fd)
        self._let_go_fd = let_go_fd

    def offer(self, place: int) -> None:
        """The programs may open a connection in this place, which nobody has."""
        bpf.push(self.places_fd, _NUMBER.pack(place))

    def take_back(self) -> list[int]:
        """All places that are free; the programs have none until they are offered again."""
        found = []
        while (value := bpf.pop(self.places_fd, _NUMBER.size)) is not None:
            (place,) = _NUMBER.unpack(value)
            found.append(place)
        return found

    def listen(self, key: abi.ListenerKey, listener: abi.Listener) -> None:
        """Decide the connections to an address from here on."""
        self._listeners.update(bytes(key), bytes(listener))

    def listen_no_more(self, key: abi.ListenerKey) -> None:
        """Leave them all to workers; nothing happens if that was so."""
        with contextlib.suppress(FileNotFoundError):
            self._listeners.delete(bytes(key))

    def aim(self, number: int, target: abi.Target) -> None:
        """A server, and how it is reached."""
        self._targets.update(_NUMBER.pack(number), bytes(target))

    def words(self) -> list[int]:
        """Of every place, the number of its connection and its state (`AskState`)."""
        stride = _stride() // 8
        with (
            memoryview(self.memory) as whole,
            whole.cast("Q") as numbers,
            numbers[abi.Ask.word.offset // 8 :: stride] as found,
        ):
            return found.tolist()

    def word(self, place: int) -> int:
        """The number of a place's connection and its state."""
        at = place * _stride() + abi.Ask.word.offset
        return int.from_bytes(self.memory[at : at + 8], "little")

    def let_go(self, place: int, word: int, *, not_before_ns: int = 0) -> bool:
        """Free a place, if the connection with this word still has it and came no further.

        A target that has not answered is left alone until `not_before_ns` (CLOCK_MONOTONIC).
        """
        request = _LET_GO.pack(place, word, not_before_ns)
        return bool(bpf.run_program(self._let_go_fd, request))

    def counts(self) -> dict[abi.Count, int]:
        """What the programs have counted."""
        return {
            kind: int.from_bytes(self._counts.lookup(_NUMBER.pack(kind)), "little")
            for kind in abi.Count
        }

    def ask(self, place: int) -> abi.Ask:
        """A place as it is now."""
        return abi.Ask.from_buffer_copy(self.memory, place * _stride())

    def close(self) -> None:
        """Close the maps: from then on nothing begins any more."""
        self.memory.close()
        self._opened.close()


def _stride() -> int:
    """Of values of an array."""
    return abi.ASK_BYTES + -abi.ASK_BYTES % 8
