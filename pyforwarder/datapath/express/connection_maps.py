"""The maps and programs that open connections in the kernel (bpf/express_connect.c).

`ConnectionMaps` is created first. `SpliceMaps.load_programs` gets it, so that the programs on the
interfaces can tail-call these; then `load` puts these into the map of programs. A place is a local
port and a record among the splices: `place` has the port `first_port + place` and the record
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
from pyforwarder.datapath.express.rule_maps import Tables
from pyforwarder.errors import LoadError
from pyforwarder.runtime.one_store import store32, store64

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

PROGRAMS: Final = ("begin4", "begin6", "asked4", "asked6", "by_rules", "ask4", "ask6", "by_choice")
MOST_LISTENERS: Final = 256
MOST_TARGETS: Final = 4096
# Kinds of ends that are counted by sums: of a rule, a port of its listener, and a server.
MOST_ENDS: Final = 4096
# As long as TIME_WAIT, in which TCP keeps the ports of a closed connection: a FIN may be repeated.
REST_S: Final = 60.0
# The least where places are short: by then a lost FIN was repeated (200 ms, the least RTO). If the
# server still has the old connection, the next one from this port begins with higher numbers
# (`bpf/express_numbers.h`), unless those of the old one have increased faster than our clocks.
LEAST_REST_S: Final = 0.5
# With client and server both on this host no packet is under way for longer than that RTO.
LEAST_REST_HERE_S: Final = 0.25
_FIELDS: Final = {
    "request_sock": ("num_timeout", "mss"),
    "sock_common": ("skc_rcv_wnd", "skc_bound_dev_if"),
    "inet_request_sock": ("snd_wscale",),
    "tcp_request_sock": ("rcv_isn", "snt_isn", "is_mptcp", "tfo_listener"),
}
# Only on newer kernels: Linux 6.7 and 6.18.
_LATER_FIELDS: Final = ("req_usec_ts", "accecn_ok")
_NUMBER: Final = struct.Struct("=I")
# Behind an Ethernet header: place, word, until when its target is not asked; and padding, as the
# kernel runs a program only with a packet that is at least as long as an IP header.
_END_CONNECTION: Final = struct.Struct("=14xI4xQQ28x")
_NO_PACKET: Final = bytes(14 + 40)


class OwnPrograms(NamedTuple):
    """Descriptors of the programs that the keeper runs itself."""

    end_connection: int
    go_round: int


class Gone(NamedTuple):
    """The results of a round."""

    counted: int
    freed: int
    unused: int  # free places, among those that it has walked
    is_whole: bool  # it has walked all places
    leaving: int = 0  # places that become free once all programs have returned that are running now


class ConnectionMaps:
    """Maps and programs for rules, listeners, targets and places; closed by `close`."""

    def __init__(
        self, *, tables: int, places: int, first_splice: int, first_port: int, is_open: bool = True
    ) -> None:
        """Create the maps. Unless `is_open`, the queue of free places is empty until `offer` is
        called.

        Raises:
            OSError: the kernel refuses.
        """
        self.places, self.first_splice, self.first_port = places, first_splice, first_port
        # Random: a packet with this mark counts as checked already.
        self.mark = secrets.randbits(32) | 1
        # The key of the hash for the ISNs of connections to servers (RFC 6528).
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
            # Not preallocated: a program that reads an old element must not see parts of a new one.
            self.listeners_fd = make(
                "listeners", kinds.HASH, key, listener, MOST_LISTENERS, bpf.F_NO_PREALLOC
            )
            self.targets_fd = make("targets", kinds.ARRAY, 4, target, MOST_TARGETS)
            self.asks_fd = make("asks", kinds.ARRAY, 4, abi.ASK_BYTES, places, bpf.F_MMAPABLE)
            self.saved_fd = make("saved", kinds.ARRAY, 4, abi.SAVED_BYTES, places, bpf.F_MMAPABLE)
            self.places_fd = make("places", kinds.QUEUE, 0, 4, places)
            self.counts_fd = make("counts", kinds.ARRAY, 4, 8, len(abi.Count))
            self.made_fd = make("made", kinds.PERCPU_ARRAY, 4, abi.NEW_PACKET_BYTES, 1)
            self.asking_fd = make("asking", kinds.PERCPU_ARRAY, 4, abi.CONTEXT_BYTES, 1)
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
            self._saved = bpf.map_memory(self.saved_fd, places * abi.SAVED_BYTES, write=False)
            opened.callback(self._saved.close)
            self._number_from(secrets.randbits(29))
            self._listeners = bpf.Map(self.listeners_fd, key_bytes=key, value_bytes=listener)
            self._targets = bpf.Map(self.targets_fd, key_bytes=4, value_bytes=target)
            self._counts = bpf.Map(self.counts_fd, key_bytes=4, value_bytes=8)
            if is_open:
                for place in range(places):
                    bpf.push(self.places_fd, _NUMBER.pack(place))
            self._own = OwnPrograms(-1, -1)
            self._opened = opened.pop_all()

    def _number_from(self, first: int) -> None:
        """Let the connections of each place have numbers from this one on.

        An earlier daemon may still have pairs of these places, in maps of its own: ids are made of
        places and numbers.
        """
        word = struct.pack("=Q", first << abi.STATE_BITS | abi.AskState.FREE)
        for at in range(abi.Ask.word.offset, len(self.memory), _stride()):
            self.memory[at : at + len(word)] = word

    def load(self, splice: SpliceMaps) -> OwnPrograms:
        """Load the programs, and put them into the map from which those on the interfaces tail-call
        them.

        Returns the descriptors of the programs that the keeper runs, for `begin`: this may happen
        in another process.

        Raises:
            LoadError: they do not compile, or the kernel refuses them.
        """
        offsets = btf.field_offsets(_FIELDS)
        for field in _LATER_FIELDS:
            with contextlib.suppress(LoadError):
                offsets |= btf.field_offsets({"tcp_request_sock": (field,)})
        *descriptors, end_connection_fd, go_round_fd = load_programs(
            "express_connect.c",
            [(name, "sched_cls") for name in (*PROGRAMS, *OwnPrograms._fields)],
            defines={**btf.defines(offsets), **splice.defines},
            maps={
                **self.tables.maps,
                **self.choices.maps,
                "MAP_EXPRESS_LISTENERS_FD": self.listeners_fd,
                "MAP_EXPRESS_TARGETS_FD": self.targets_fd,
                "MAP_EXPRESS_ASKS_FD": self.asks_fd,
                "MAP_EXPRESS_SAVED_FD": self.saved_fd,
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
            os.close(end_connection_fd)
            os.close(go_round_fd)
            raise LoadError(f"put the programs of express in place: {error.strerror}") from error
        finally:
            for fd in descriptors:
                os.close(fd)
        return OwnPrograms(end_connection_fd, go_round_fd)

    def begin(self, own: Sequence[int]) -> None:
        """Use the loaded programs from here on; `close` closes the descriptors."""
        for fd in own:
            self._opened.callback(os.close, fd)
        self._own = OwnPrograms(*own)

    def offer(self, place: int) -> None:
        """Put a place into the queue of free places; no connection may have it."""
        bpf.push(self.places_fd, _NUMBER.pack(place))

    def take_free_places(self) -> Iterator[int]:
        """Take all places out of the queue of free places, one by one."""
        while (value := bpf.pop(self.places_fd, _NUMBER.size)) is not None:
            yield _NUMBER.unpack(value)[0]

    def add_listener(self, key: abi.ListenerKey, listener: abi.Listener) -> None:
        """From here on the kernel decides the connections to an address."""
        self._listeners.update(bytes(key), bytes(listener))

    def remove_listener(self, key: abi.ListenerKey) -> None:
        """From here on workers get all connections to an address; no error if they did before."""
        with contextlib.suppress(FileNotFoundError):
            self._listeners.delete(bytes(key))

    def write_target(self, number: int, target: abi.Target) -> None:
        """Write a target: a server, and how it is reached."""
        self._targets.update(_NUMBER.pack(number), bytes(target))

    def target(self, number: int) -> abi.Target:
        """A target as it is now, with what the programs have written."""
        return abi.Target.from_buffer_copy(self._targets.lookup(_NUMBER.pack(number)))

    def words(self) -> list[int]:
        """The words of all places: the number of the connection, and the state (`AskState`)."""
        stride = _stride() // 8
        with (
            memoryview(self.memory) as whole,
            whole.cast("Q") as numbers,
            numbers[abi.Ask.word.offset // 8 :: stride] as found,
        ):
            return found.tolist()

    def word(self, place: int) -> int:
        """The word of a place: the number of its connection, and its state."""
        at = place * _stride() + abi.Ask.word.offset
        return int.from_bytes(self.memory[at : at + 8], "little")

    def end_connection(self, place: int, word: int, *, not_before_ns: int = 0) -> bool:
        """End the connection with this word: no packet finds it any more.

        Returns False if the place has another connection, or its state has changed. Else the place
        becomes free in a later round, when all programs have returned that may have found the
        connection. A target that has not answered is not asked again until `not_before_ns`
        (CLOCK_MONOTONIC).
        """
        request = _END_CONNECTION.pack(place, word, not_before_ns)
        return bool(bpf.run_program(self._own.end_connection, request))

    def wait_for_programs(self) -> None:
        """Wait until all programs have returned that are running now.

        The kernel makes a caller that changes a map in a map wait until no program can still use
        the old one (`maybe_wait_bpf_programs`, kernel/bpf/syscall.c). Here the map is used for that
        alone.

        Raises:
            OSError: the kernel has not waited.
        """
        self._waits.update(_NUMBER.pack(0), self._inner)

    def taken(self) -> int:
        """How many connections have taken a place so far."""
        return int.from_bytes(self._counts.lookup(_NUMBER.pack(abi.Count.TAKEN)), "little")

    def go_round(self, now_s: float, *, is_short: bool, passed_ns: int = 0) -> Gone:
        """Count connections that have ended (`ends`), and free places that have rested, sooner if
        `is_short`.

        `now_s` is CLOCK_MONOTONIC, and later than that of the round before. A place that has rested
        becomes free in a later round whose `passed_ns` (nanoseconds) says that all programs have
        returned that were running when this round ended. A signal may end a round early: the next
        one does the rest.

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
            times = -(-self.places // abi.PLACES_AT_ONCE)
            bpf.run_program(self._own.go_round, _NO_PACKET, times=times)
        done = abi.Round.from_buffer_copy(self._round)
        is_whole = bool(done.next >= self.places)
        return Gone(done.counted, done.freed, done.unused, is_whole, done.leaving)

    def rest(self, place: int, word: int, now_s: float) -> None:
        """Make a place RESTING: the end of the connection with this word is known, and it still has
        the place.
        """
        at = place * _stride()
        store64(self.memory, at + abi.Ask.resting_since_ns.offset, int(now_s * 1e9))
        resting = word & ~abi.STATE_MASK | abi.AskState.RESTING
        # After `resting_since_ns`. No one else changes the word of a place that is JOINED. Only its
        # lowest byte, with the state, is stored: `struct.pack_into` would write zeros first, which
        # mean FREE if the keeper is killed at that moment.
        self.memory[at + abi.Ask.word.offset] = resting & 0xFF

    def set_port_lost(self, place: int, *, is_lost: bool) -> None:
        """Say whether another program may have the place's port: then the place keeps resting."""
        store32(self.memory, place * _stride() + abi.Ask.port_lost.offset, is_lost)

    def end_keys(self) -> list[bytes]:
        """The keys of all sums, each a struct express_end_key."""
        return self._ends.all_keys()

    def ends(self, key: bytes) -> abi.Ends:
        """The sums of a key so far."""
        return abi.Ends.from_buffer_copy(self._ends.lookup(key))

    def write_ends(self, key: bytes, ends: abi.Ends) -> None:
        """Write the sums of a key. Not while `go_round` runs.

        Raises:
            OSError: there is no room for another key.
        """
        self._ends.update(key, bytes(ends))

    def delete_ends(self, key: bytes) -> None:
        """Delete a key and its sums."""
        self._ends.delete(key)

    def counts(self) -> dict[abi.Count, int]:
        """The programs' counters."""
        return {
            kind: int.from_bytes(self._counts.lookup(_NUMBER.pack(kind)), "little")
            for kind in abi.Count
        }

    def ask(self, place: int) -> abi.Ask:
        """A place as it is now."""
        return abi.Ask.from_buffer_copy(self.memory, place * _stride())

    def saved(self, place: int, word: int) -> bytes:
        """The saved bytes of the connection with this word; empty: another one has the place."""
        length = min(self.ask(place).saved_bytes, abi.SAVED_BYTES)
        at = place * abi.SAVED_BYTES
        saved = self._saved[at : at + length]
        # Behind these: they are the connection's if it still has the place.
        return saved if self.word(place) == word else b""

    def mark_counted(self, place: int) -> None:
        """Mark the place's connection as counted by a worker, or as reported to one by itself."""
        at = place * _stride() + abi.Ask.counted_number.offset
        store32(self.memory, at, _number_of(self.word(place)))

    def is_counted(self, ask: abi.Ask) -> bool:
        """Whether `mark_counted` was called for this connection, by any keeper."""
        return bool(ask.counted_number == _number_of(ask.word))

    def close(self) -> None:
        """Close the maps: from then on no connection begins."""
        self.memory.close()
        self._opened.close()


def _stride() -> int:
    """Bytes from one value of the array to the next."""
    return abi.ASK_BYTES + -abi.ASK_BYTES % 8


def _number_of(word: int) -> int:
    return word >> abi.STATE_BITS & 0xFFFFFFFF
