"""What a worker serves with, made of what it has inherited and its first configuration."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.sessions import SpliceSessions
from pyforwarder.runtime.limits import SharedLimits
from pyforwarder.worker.adoption import Adoption
from pyforwarder.worker.express import Opened
from pyforwarder.worker.handover import Handover
from pyforwarder.worker.log import USUAL_OF_SESSIONS, ConnectionLog
from pyforwarder.worker.pair_receiver import PairReceiver
from pyforwarder.worker.room import room_for
from pyforwarder.worker.server import Server
from pyforwarder.worker.udp.connection_ids import ConnectionIds
from pyforwarder.worker.udp.server import DatagramServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.counters import Counters
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.generation import Generation
    from pyforwarder.worker.inheritance import Inheritance, WorkerMemory


class WorkerParts:
    """Has the parts of a worker, from the first configuration to the end of the process."""

    def __init__(
        self,
        given: Inheritance,
        memory: WorkerMemory,
        counters: Counters,
        loop: Loop,
        generation: Generation,
        *,
        express_slots: int,
        ask_supervisor: Callable[[str, list[int], int], None],
    ) -> None:
        """What lives on of an earlier worker or daemon is taken in, if the keeper answers soon.

        `express_slots`: how many pairs of the kernel's this worker may get. `ask_supervisor`: see
        `Server`. Maps, programs and links that are not needed any more are closed.
        """
        limits = SharedLimits(
            memory.limits,
            worker=given.worker,
            secret=given.limits_secret,
            others=memory.other_machines,
        )
        limits.reset_own()
        room = room_for(generation.config, express_slots)
        window = given.table.take_window(given.worker)
        server = self.server = Server(
            loop,
            generation=generation,
            counters=counters.block(given.worker),
            limits=limits,
            window=window,
            log=ConnectionLog(given.log),
            worker=given.worker,
            workers=given.workers,
            most_clients=room.clients,
            ask_supervisor=ask_supervisor,
            last_id=given.last_id,
            send_claim=lambda message: given.channel.send(message, wait=False),
        )
        sockmap = given.maps.datapath(server, window, given.worker) if given.maps else None
        self.sockmap = sockmap
        keeper = splice = sessions = None
        if given.splicing is not None:
            # One for both: it reads all that comes.
            keeper = given.splicing.asker(given.worker, loop)
            splice = SpliceDatapath(
                server, given.splicing.maps, keeper, window=window, worker=given.worker
            )
            sessions = SpliceSessions(given.splicing.maps.sessions, keeper, loop, window=window)
            given.splicing.keep_only(given.worker)
        self.splice = splice
        self.keeper = keeper
        _drop_kernel_objects(given)
        server.pressure.start()
        server.handover = Handover(server, sockmap, splice)
        adoption = self.adoption = Adoption(
            server, worker=given.worker, keeper=keeper, splice=splice, sessions=sessions
        )
        self.opened: Opened | None = None
        if splice is not None and given.splicing is not None and given.splicing.express:
            sock = given.splicing.express.workers[given.worker]
            adopt = partial(adoption.adopt_pairs, lambda: None, level="debug")
            self.opened = Opened(server, sock, adopt)
            adoption.facts_of = self.opened.facts_of
        if splice is not None and given.splicing is not None and given.splicing.has_begun:
            adoption.adopt(lambda: None)
            adoption.wait()
        self.datagrams = DatagramServer(
            loop,
            counters=server.counters,
            limits=limits,
            window=window,
            # Lines of its own: made-up addresses must not use up those about connections.
            log=ConnectionLog(given.log, usual=USUAL_OF_SESSIONS),
            next_id=server.next_id,
            names=server.names,
            most_sessions=room.sessions,
            most_shown=given.table.slots - room.clients - express_slots,
            ids=ConnectionIds(memory.connection_ids, given.worker),
            ask_supervisor=ask_supervisor,
            kernel=sessions,
            claims=server.claims,
        )
        self.pair_receiver: PairReceiver | None = None
        if given.from_predecessor is not None:
            self.pair_receiver = PairReceiver(
                given.from_predecessor, server, self.datagrams, splice
            )


def _drop_kernel_objects(given: Inheritance) -> None:
    """Close the descriptors of maps, programs and links, but for those that are written by
    descriptor: the others are everybody's.

    All else is memory by now, and that has none.
    """
    kept = set()
    if given.maps is not None:
        kept |= set(given.maps.of[given.worker].fds)
    if given.splicing is not None:
        kept.add(given.splicing.maps.ring_fds[given.worker])
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) not in kept and "bpf" in os.readlink(f"/proc/self/fd/{name}"):
                os.close(int(name))
