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
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf import btf
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.choices import Choices
from pyforwarder.datapath.express.maps import Tables
from pyforwarder.errors import LoadError
from pyforwarder.runtime.one_store import store32, store64

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

PROGRAMS: Final = ("begin4", "begin6", "asked4", "asked6", "by_rules", "ask4", "ask6", "by_choice")
MOST_LISTENERS: Final = 256
MOST_TARGETS: Final = 4096
# Kinds of ends that are counted in the kernel: of a rule, a port of its listener, and a server.
MOST_ENDS: Final = 4096
# TCP keeps a closed connection's ports for TIME_WAIT: so long a FIN may come again.
REST_S: Final = 60.0
# Where places are short, less: a FIN that was lost has come again by then (200 ms, the least RTO).
# To a server that keeps the old
# one still, the next one begins with higher numbers (`bpf/express_numbers.h`), if those of the old
# one have not risen faster than our clocks.
LEAST_REST_S: Final = 0.5
# Where client and server are both on this host, nothing is under way for longer than that RTO.
LEAST_REST_HERE_S: Final = 0.25
_FIELDS: Final = {
    "request_sock": ("num_timeout", "mss"),
    "sock_common": ("skc_rcv_wnd", "skc_bound_dev_if"),
    "inet_request_sock": ("snd_wscale",),
    "tcp_request_sock": ("rcv_isn", "snt_isn", "is_mptcp", "tfo_listener"),
}
# Not on all kernels: Linux 6.7 and 6.18.
_LATER_FIELDS: Final = ("req_usec_ts", "accecn_ok")
# struct asking: a key, what was read of the packet, a listener's key, and some numbers.
_ASKING_BYTES: Final = 36 + 36 + 20 + 9 * 4
# struct made: two headers of IP and TCP, and some numbers.
_MADE_BYTES: Final = 208 + 32 + 8 + 8 + 20 + 12 + 12 + 8
_NUMBER: Final = struct.Struct("=I")
# Behind a header of Ethernet: place, word, until when its target is not asked; and some more, as
# the kernel runs a program with no packet that is shorter than a header of IP.
_LET_GO: Final = struct.Struct("=14xI4xQQ28x")
_NO_PACKET: Final = bytes(14 + 40)
# Of one run of `go_round` (bpf/express_connect.c).
_PLACES_AT_ONCE: Final = 16


class OwnPrograms(NamedTuple):
    """Those that the keeper runs itself."""

    let_go: int
    go_round: int


class Gone(NamedTuple):
    """What a round has done."""

    counted: int
    freed: int
    unused: int  # places that are free now, of those that it came by
    is_whole: bool  # it came by all of them
    leaving: int = 0  # that are free when the programs have ended that run now


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
        # With which the first numbers of connections to servers are made (RFC 6528).
        self.secret = tuple(secrets.randbits(32) for _ in range(4))
        kinds = bpf.MapType
        with contextlib.ExitStack() as opened:
            self.tables = Tables(tables)
            opened.callback(self.tables.close)
            self.choices = Choices(MOST_TARGETS)
            opened.callback(self.choices.close)

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
            ends, round_bytes = ctypes.sizeof(abi.Ends), ctypes.sizeof(abi.Round)
            self.ends_fd = make("ends", kinds.HASH, ctypes.sizeof(abi.EndKey), ends, MOST_ENDS)
            self.round_fd = make("round", kinds.ARRAY, 4, round_bytes, 1, bpf.F_MMAPABLE)
            one = bpf.create_map(kinds.ARRAY, key_bytes=4, value_bytes=4, entries=1)
            opened.callback(os.close, one)
            self._inner = _NUMBER.pack(one)
            waits_fd = bpf.create_map(
                kinds.ARRAY_OF_MAPS,
                key_bytes=4,
                value_bytes=4,
                entries=1,
                inner_map_fd=one,
                name="pf_ex_waits",
            )
            opened.callback(os.close, waits_fd)
            self._waits = bpf.Map(waits_fd, key_bytes=4, value_bytes=4)
            self._round = bpf.map_memory(self.round_fd, round_bytes, write=True)
            opened.callback(self._round.close)
            self._ends = bpf.Map(
                self.ends_fd, key_bytes=ctypes.sizeof(abi.EndKey), value_bytes=ends
            )
            self.memory = bpf.map_memory(self.asks_fd, places * _stride(), write=True)
            self._listeners = bpf.Map(self.listeners_fd, key_bytes=key, value_bytes=listener)
            self._targets = bpf.Map(self.targets_fd, key_bytes=4, value_bytes=target)
            self._counts = bpf.Map(self.counts_fd, key_bytes=4, value_bytes=8)
            if is_open:
                for place in range(places):
                    bpf.push(self.places_fd, _NUMBER.pack(place))
            self._own = OwnPrograms(-1, -1)
            self._opened = opened.pop_all()

    def load(self, splice: SpliceMaps) -> OwnPrograms:
        """Load the programs, and put them where those on the interfaces go on with them.

        The descriptors are of other ones, which `begin` is to be given: they may be loaded in
        another process.

        Raises:
            LoadError: they do not compile, or the kernel refuses them.
        """
        offsets = btf.field_offsets(_FIELDS)
        for field in _LATER_FIELDS:
            with contextlib.suppress(LoadError):
                offsets |= btf.field_offsets({"tcp_request_sock": (field,)})
        *descriptors, let_go_fd, go_round_fd = load_programs(
            "express_connect.c",
            [(name, "sched_cls") for name in (*PROGRAMS, *OwnPrograms._fields)],
            defines={**btf.defines(offsets), **splice.defines},
            maps={
                **self.tables.maps,
                **self.choices.maps,
                "MAP_EXPRESS_LISTENERS_FD": self.listeners_fd,
                "MAP_EXPRESS_TARGETS_FD": self.targets_fd,
                "MAP_EXPRESS_ASKS_FD": self.asks_fd,
                "MAP_EXPRESS_PLACES_FD": self.places_fd,
                "MAP_EXPRESS_COUNTS_FD": self.counts_fd,
                "MAP_EXPRESS_MADE_FD": self.made_fd,
                "MAP_EXPRESS_ASKING_FD": self.asking_fd,
                "MAP_EXPRESS_PROGRAMS_FD": self.programs_fd,
                "MAP_EXPRESS_ENDS_FD": self.ends_fd,
                "MAP_EXPRESS_ROUND_FD": self.round_fd,
                "MAP_FLOWS_FD": splice.flows_fd,
                "MAP_SPLICES_FD": splice.splices_fd,
                "MAP_COUNTERS_FD": splice.counters_fd,
                "MAP_SCRATCH_FD": splice.scratch_fd,
                "MAP_OUR_PORTS_FD": splice.our_ports_fd,
            },
            values={
                "FIRST_SPLICE": self.first_splice,
                "FIRST_PORT": self.first_port,
                "FOR_OUR_STACK": self.mark,
                **{f"SECRET_{n}": number for n, number in enumerate(self.secret)},
            },
        )
        programs = bpf.Map(self.programs_fd, key_bytes=4, value_bytes=4)
        try:
            for place, fd in enumerate(descriptors):
                programs.update(_NUMBER.pack(place), _NUMBER.pack(fd))
        except OSError as error:
            os.close(let_go_fd)
            os.close(go_round_fd)
            raise LoadError(f"put the programs of express in place: {error.strerror}") from error
        finally:
            for fd in descriptors:
                os.close(fd)
        return OwnPrograms(let_go_fd, go_round_fd)

    def begin(self, own: Sequence[int]) -> None:
        """What was loaded is used from here on; the descriptors are ours to close."""
        for fd in own:
            self._opened.callback(os.close, fd)
        self._own = OwnPrograms(*own)

    def offer(self, place: int) -> None:
        """The programs may open a connection in this place, which nobody has."""
        bpf.push(self.places_fd, _NUMBER.pack(place))

    def take_back(self) -> Iterator[int]:
        """Each place that is free; the programs have it no more until it is offered again."""
        while (value := bpf.pop(self.places_fd, _NUMBER.size)) is not None:
            yield _NUMBER.unpack(value)[0]

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

    def aimed(self, number: int) -> abi.Target:
        """The same as it is now: what a program has said of it, too."""
        return abi.Target.from_buffer_copy(self._targets.lookup(_NUMBER.pack(number)))

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
        """No packet finds the connection with this word any more, if it came no further.

        False: another has the place, or it did. Else the place is free in a later round, when no
        program runs that has found the connection before. A target that has not answered is left
        alone until `not_before_ns` (CLOCK_MONOTONIC).
        """
        request = _LET_GO.pack(place, word, not_before_ns)
        return bool(bpf.run_program(self._own.let_go, request))

    def wait_for_programs(self) -> None:
        """Return when all programs have ended that run now.

        The kernel has a caller that changes a map in a map wait until no program can have read it
        before (`maybe_wait_bpf_programs`, kernel/bpf/syscall.c); so here, where none has.

        Raises:
            OSError: the kernel has not waited.
        """
        self._waits.update(_NUMBER.pack(0), self._inner)

    def taken(self) -> int:
        """How many connections have taken a place so far, and asked a server."""
        return int.from_bytes(self._counts.lookup(_NUMBER.pack(abi.Count.TAKEN)), "little")

    def go_round(self, now_s: float, *, is_short: bool, passed_ns: int = 0) -> Gone:
        """Count what has ended (`ends`), and let places go that have rested, sooner if `is_short`.

        `now_s` is of CLOCK_MONOTONIC, and later than that of the round before. Such a place is free
        in a round that is told by `passed_ns`, in nanoseconds, that no program runs any more that
        ran when the round of that time ended. A signal may end a round early: the next one does
        the rest.

        Raises:
            OSError: the kernel could not run the program.
        """
        order = abi.Round(
            now_ns=int(now_s * 1e9),
            passed_ns=passed_ns,
            least_rest_here_ns=int(LEAST_REST_HERE_S * 1e9),
            least_rest_ns=int(LEAST_REST_S * 1e9),
            rest_ns=int(REST_S * 1e9),
            is_short=is_short,
        )
        self._round[: ctypes.sizeof(order)] = bytes(order)
        with contextlib.suppress(InterruptedError):
            times = -(-self.places // _PLACES_AT_ONCE)
            bpf.run_program(self._own.go_round, _NO_PACKET, times=times)
        done = abi.Round.from_buffer_copy(self._round)
        is_whole = bool(done.next >= self.places)
        return Gone(done.counted, done.freed, done.unused, is_whole, done.leaving)

    def rest(self, place: int, word: int, now_s: float) -> None:
        """The end of the connection with this word is known, and that it has the place still."""
        at = place * _stride()
        store64(self.memory, at + abi.Ask.rests_ns.offset, int(now_s * 1e9))
        resting = word & ~abi.STATE_MASK | abi.AskState.RESTING
        # Behind that. Nobody else changes the word of one that is joined. Its lowest byte has the
        # state: `struct.pack_into` would write zeros first, which are FREE if we are killed there.
        self.memory[at + abi.Ask.word.offset] = resting & 0xFF

    def set_port_lost(self, place: int, *, is_lost: bool) -> None:
        """A place that rests stays so as long as another program may have its port."""
        store32(self.memory, place * _stride() + abi.Ask.port_lost.offset, is_lost)

    def end_keys(self) -> list[bytes]:
        """Of the ends that are counted, each a struct express_end_key."""
        return self._ends.all_keys()

    def ends(self, key: bytes) -> abi.Ends:
        """What has been counted so far."""
        return abi.Ends.from_buffer_copy(self._ends.lookup(key))

    def count_ends(self, key: bytes, ends: abi.Ends) -> None:
        """Count these, from this number on. Not while `go_round` runs.

        Raises:
            OSError: there is no room for another key.
        """
        self._ends.update(key, bytes(ends))

    def count_ends_no_more(self, key: bytes) -> None:
        """Forget a key, and what was counted."""
        self._ends.delete(key)

    def counts(self) -> dict[abi.Count, int]:
        """What the programs have counted."""
        return {
            kind: int.from_bytes(self._counts.lookup(_NUMBER.pack(kind)), "little")
            for kind in abi.Count
        }

    def ask(self, place: int) -> abi.Ask:
        """A place as it is now."""
        return abi.Ask.from_buffer_copy(self.memory, place * _stride())

    def saved(self, place: int, word: int) -> bytes:
        """The first packet of the connection with this word; empty: another has the place."""
        at = place * _stride()
        ask = abi.Ask.from_buffer_copy(self.memory, at)
        if self.word(place) != word:
            return b""
        return bytes(ask.bytes[: min(ask.saved, abi.SAVED_BYTES)])

    def head(self, place: int) -> abi.AskHead:
        """The same without the saved bytes."""
        return abi.AskHead.from_buffer_copy(self.memory, place * _stride())

    def mark_counted(self, place: int) -> None:
        """A worker has counted the connection that has a place, or is told of its end alone."""
        at = place * _stride() + abi.Ask.counted.offset
        store32(self.memory, at, _number_of(self.word(place)))

    def is_counted(self, ask: abi.Ask | abi.AskHead) -> bool:
        """Whether `mark_counted` was called for this very connection, by any keeper."""
        return bool(ask.counted == _number_of(ask.word))

    def close(self) -> None:
        """Close the maps: from then on nothing begins any more."""
        self.memory.close()
        self._opened.close()


def _stride() -> int:
    """Of values of an array."""
    return abi.ASK_BYTES + -abi.ASK_BYTES % 8


def _number_of(word: int) -> int:
    return word >> abi.STATE_BITS & 0xFFFFFFFF
