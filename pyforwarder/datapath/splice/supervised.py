"""The splice datapath in the supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyforwarder.datapath import supervised
from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express.connection_maps import ConnectionMaps
from pyforwarder.datapath.express.ports import free_ports
from pyforwarder.datapath.express.sharing import TABLES, Express
from pyforwarder.datapath.splice.maps import Programs, SpliceMaps
from pyforwarder.datapath.splice.pins import has_pins, pins_of
from pyforwarder.datapath.splice.splicing import Splicing
from pyforwarder.errors import LoadError
from pyforwarder.runtime.counters import BLOCK_BYTES

if TYPE_CHECKING:
    from pyforwarder.config import Config


class SupervisedSplice(supervised.KernelDatapath):
    """Maps, keeper, and the programs on the interfaces."""

    def __init__(
        self,
        splicing: Splicing,
        warn: supervised.Warn,
        *,
        takes_over: bool,
        splices_sessions: bool,
        no_express: str = "",
    ) -> None:
        self.splicing = splicing
        self.takes_over = takes_over
        self._warn = warn
        self._splices_sessions = splices_sessions
        self._no_express = no_express

    @classmethod
    def make(cls, given: supervised.Given) -> SupervisedSplice | None:
        """Created even if the configuration does not use it, if pairs of an earlier daemon
        continue.
        """
        pins = given.splice_pins or pins_of(given.pins)
        takes_over = has_pins(pins)
        if "splice" not in given.choices and not takes_over:
            if not given.is_successor:
                attaching.remove_unpinned(pins)
            if given.handshakes_fd >= 0:
                os.close(given.handshakes_fd)
            return None
        arrays = given.arrays()
        wanted = given.config.express_ports
        maps = SpliceMaps.create(
            workers=given.workers,
            slots=given.slots,
            pairs_fd=arrays.pairs_fd,
            counters_fd=arrays.counters_fd,
            pins=pins,
            sessions=given.config.limits.most_sessions,
            is_successor=given.is_successor,
            handshakes_fd=given.handshakes_fd,
            places=given.places,
        )
        if maps.has_replaced:
            given.warn("splice_pins_replaced", directory=pins)
        express: Express | None = None
        why_not = ""
        if wanted and not given.places:
            why_not = "make ready for express: the limit on open files is too low"
        elif wanted:
            try:
                express = make_express(maps, given.places, workers=given.workers)
            except OSError as error:
                why_not = f"make ready for express: {error.strerror}"
            else:
                ports = express.connections.places
                if ports < wanted:
                    given.warn("few_express_ports", ports=ports, configured=wanted)
        splicing = Splicing(
            maps, workers=given.workers, close_in_child=given.close_in_child, express=express
        )
        fleet = given.config.fleet
        if fleet is not None and fleet.failover is not None:
            splicing.keeper.standby_addresses = fleet.failover.addresses
        return cls(
            splicing,
            given.warn,
            takes_over=takes_over,
            splices_sessions=splices_sessions(given.config),
            no_express=why_not,
        )

    @property
    def wants_express(self) -> bool:
        """Whether a listener uses express, and `load` has to prove that it works."""
        return self.splicing.express is not None or bool(self._no_express)

    def load(self, prove: Callable[[str], str]) -> supervised.LoadedPrograms:
        """Load the programs, with those of express and of UDP if the configuration needs them."""
        proof = prove("splice")
        extras: dict[str, str] = {}
        if self._splices_sessions:
            # If that fails, UDP is copied; TCP is spliced all the same.
            try:
                prove("splice_udp")
            except LoadError as error:
                extras["splice_udp"] = str(error)
            else:
                extras["splice_udp"] = ""
        maps, express = self.splicing.maps, self.splicing.express
        if self._no_express:
            extras["express"] = self._no_express
        if express is not None:
            try:
                prove("express")
                programs = maps.load_programs(express.connections)
                own = express.connections.load(maps)
            except LoadError as error:
                extras["express"] = str(error)
            else:
                extras["express"] = ""
                return supervised.LoadedPrograms([*programs, *own], proof, extras)
        return supervised.LoadedPrograms(maps.load_programs(), proof, extras)

    def attach(self, descriptors: Sequence[int]) -> None:
        """Attach the programs to all interfaces that accept them; the log names the others."""
        most = len(Programs._fields)
        programs, own = descriptors[:most], descriptors[most:]
        express = self.splicing.express
        if express is not None and own:
            express.connections.begin(own)
            express.has_begun = True
        self.splicing.begin(Programs(*programs))
        for reason in self.splicing.maps.links.refusals.values():
            self._warn("splice_not_on_interface", reason=reason)

    @property
    def can_pin(self) -> bool:
        """Whether programs are loaded."""
        return self.splicing.has_begun

    def pin(self) -> None:
        """Pin maps, programs and links."""
        self.splicing.maps.pin()

    def release(self) -> None:
        """End the keeper; the pairs continue."""
        self.splicing.hand_over()

    def worker_died(self, worker: int) -> None:
        """A worker has died: its spliced pairs continue, and wait for its successor."""
        self.splicing.worker_died(worker)

    def close(self) -> None:
        """End the keeper, remove the pins, and close the maps."""
        self.splicing.close()


def make_express(maps: SpliceMaps, ports: int, *, workers: int) -> Express:
    """Create express with `ports` ports, or as many as the maps of an earlier daemon have room for.

    Raises:
        OSError: the kernel refuses, or there are no such ports.
    """
    places = min(ports, maps.entries // 4)
    connections = ConnectionMaps(
        tables=TABLES,
        places=places,
        first_splice=maps.entries - places,
        first_port=free_ports(places),
        is_open=False,
    )
    if maps.owns_counters:
        return Express(connections, workers=workers)  # no process reads them
    try:
        # The first worker's block, a whole number of pages.
        counters = bpf.map_memory(maps.counters_fd, BLOCK_BYTES, write=True)
    except OSError:
        connections.close()
        raise
    return Express(connections, workers=workers, counters=counters)


def splices_sessions(config: Config) -> bool:
    """Whether there is a UDP listener whose sessions may be spliced."""
    return any(
        not {"auto", "express", "splice"}.isdisjoint(
            rule.datapath or listener.datapath or config.datapath for rule in listener.rules
        )
        for listener in config.listeners
        if listener.protocol == "udp" and listener.splice
    )
