"""The programs that open connections in the kernel, on a host of a test, without a daemon."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.arrays import create_pairs
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connection_maps import ConnectionMaps
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SpliceState
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.records import FLOW, KEY_BYTES, set_state
from tests.helpers.express import Rules, compiled
from tests.helpers.waiting import DEADLINE_S

if TYPE_CHECKING:
    from tests.helpers.netns import Network

PLACES: Final = 64
FIRST_PORT: Final = 20000
TABLES: Final = 32
MSS: Final = {4: 1460, 6: 1440}


def words(address: str) -> tuple[int, ...]:
    """As in a key."""
    packed = ipaddress.ip_address(address).packed
    return struct.unpack("=4I", packed if len(packed) == 16 else b"\0" * 10 + b"\xff\xff" + packed)


class Kernel:
    """Maps and programs in a namespace, without a keeper: `free` does what that would do."""

    def __init__(self, network: Network, *, places: int = PLACES) -> None:
        self.network = network
        self._numbers = itertools.cycle(range(1, TABLES))
        self._keys: list[abi.ListenerKey] = []
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opened, network.entered():
            slots = max(64, places)
            pairs_fd = create_pairs(slots)
            opened.callback(os.close, pairs_fd)
            self.maps = SpliceMaps.create(workers=1, slots=slots, pairs_fd=pairs_fd)
            opened.callback(self.maps.close)
            self.connections = ConnectionMaps(
                tables=TABLES,
                places=places,
                first_splice=self.maps.entries - places,
                first_port=FIRST_PORT,
            )
            opened.callback(self.connections.close)
            self.maps.attach(self.maps.load_programs(self.connections))
            self.connections.begin(self.connections.load(self.maps))
            self._memory = bpf.map_memory(
                self.maps.splices_fd, self.maps.entries * SPLICE_BYTES, write=True
            )
            opened.callback(self._memory.close)
            self._opened = opened.pop_all()

    def listen(self, address: tuple[str, int]) -> socket.socket:
        """A listener, as a worker has it; the caller closes it."""
        version = 6 if ":" in address[0] else 4
        with self.network.entered():
            listener = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS[version])
        listener.bind(address)
        listener.listen(128)
        listener.settimeout(DEADLINE_S)
        return listener

    def decide(
        self,
        listener: socket.socket,
        rules: Rules,
        targets: Sequence[abi.Target],
        *,
        told_mss: int = 0,
    ) -> Sequence[int]:
        """Connections to it are decided by these rules, each with its target; their numbers.

        `told_mss` is what clients are told, if it is not what `listen` has set.
        """
        _, found = compiled(rules)
        assert found.table is not None
        number = next(self._numbers)
        self.connections.tables.write(number, found.table)
        address, port = listener.getsockname()[:2]
        told_mss = told_mss or MSS[6 if ":" in address else 4]
        told = abi.Listener(table=number, advertised_mss=told_mss)
        numbers = [number * abi.MOST_RULES + place for place in range(len(targets))]
        for place, (at, target) in enumerate(zip(numbers, targets, strict=True)):
            self.connections.write_target(at, target)
            told.target[place] = at
        key = abi.ListenerKey(port=socket.htons(port))
        key.address[:] = words(address)
        self.connections.add_listener(key, told)
        self._keys.append(key)
        return numbers

    def target(self, address: tuple[str, int], *, source: str, interface: str) -> abi.Target:
        """A server."""
        with self.network.entered():
            out = socket.if_nametoindex(interface)
        version = 6 if ":" in address[0] else 4
        target = abi.Target(port=socket.htons(address[1]), mss=MSS[version], out=out)
        target.source[:], target.server[:] = words(source), words(address[0])
        target.from_interfaces[:] = out, out
        return target

    def counts(self) -> dict[str, int]:
        """What the programs have counted, by its names in `Count`."""
        return {kind.name: n for kind, n in self.connections.counts().items()}

    def record(self, place: int) -> Splice:
        """The pair of a place."""
        index = self.connections.first_splice + place
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)

    def flows_of(self, place: int) -> int:
        """How many of its two flows packets find."""
        flows = bpf.Map(self.maps.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        index = self.connections.first_splice + place
        return [FLOW.unpack(flows.lookup(key))[0] for key in flows.all_keys()].count(index)

    def run_ahead(self, place: int, *, ahead_ms: int, sent_bytes: int) -> None:
        """A place's client seems to have a clock that was so fast, and to have sent so much."""
        at = (self.connections.first_splice + place) * SPLICE_BYTES
        record = Splice.from_buffer(self._memory, at)
        first_tc = self.connections.ask(place).first_client_tsval
        record.direction[0].ts_recent = (first_tc + ahead_ms) & 0xFFFFFFFF
        record.direction[0].bytes = sent_bytes
        del record

    def store_state(self, place: int, state: SpliceState) -> None:
        """Change the state of a place's pair."""
        set_state(self._memory, self.connections.first_splice + place, state)

    def free(self) -> None:
        """All listeners and places, those with connections as well."""
        while self._keys:
            self.connections.remove_listener(self._keys.pop())
        self.free_all()

    def free_all(self) -> None:
        """All places alone; no program runs any more that knew their connections."""
        for place, word in enumerate(self.connections.words()):
            self.connections.end_connection(place, word)
        now_s = time.monotonic()
        self.connections.wait_for_programs()
        self.connections.go_round(now_s, is_short=False, passed_ns=int(now_s * 1e9))

    def close(self) -> None:
        """Take the programs off."""
        self._opened.close()
