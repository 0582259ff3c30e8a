"""A worker's process: gives up its privileges, then serves until the supervisor says otherwise.

It reads hostile bytes, so it keeps nothing that they could be used for: an unprivileged user, no
capability, no way to gain one (PR_SET_NO_NEW_PRIVS). What it needs it has inherited: map
descriptors, shared memory, and listeners that the supervisor has bound.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.sessions import SessionOrphan, SpliceSessions
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime import collecting
from pyforwarder.runtime.channel import Channel, text_from_fd
from pyforwarder.runtime.counters import Counter, Counters
from pyforwarder.runtime.limits import SharedLimits
from pyforwarder.runtime.loop import EPOLLIN, Loop
from pyforwarder.runtime.privileges import give_up_privileges
from pyforwarder.runtime.pulse import PULSE_S
from pyforwarder.runtime.seccomp import confine
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.tables import visible
from pyforwarder.worker.express import Opened
from pyforwarder.worker.generation import Generation, ListenerState
from pyforwarder.worker.handover import Handover
from pyforwarder.worker.log import USUAL_OF_SESSIONS, ConnectionLog, Log
from pyforwarder.worker.orphans import adopt_orphans
from pyforwarder.worker.pair_receiver import PairReceiver
from pyforwarder.worker.pair_sender import PairSender
from pyforwarder.worker.room import express_share, room_for
from pyforwarder.worker.server import Server
from pyforwarder.worker.settings import Settings
from pyforwarder.worker.udp.client_addresses import FIRST_NUMBER
from pyforwarder.worker.udp.connection_ids import ConnectionIds
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE
from pyforwarder.worker.udp.server import DatagramServer
from pyforwarder.worker.udp.sockets import adopt_datagram_socket
from pyforwarder.worker.used_tokens import SharedUsedTokens

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.kernel import KernelMaps, PairTable
    from pyforwarder.datapath.sockmap import SockmapDatapath
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.splicing import Splicing
    from pyforwarder.runtime.pulse import Pulse

# So long a worker that begins waits for a keeper. That takes milliseconds.
_ADOPTION_S: Final = 1.0


class WorkerMemory(NamedTuple):
    """A block of each worker, of which its own is writable.

    Of used tokens there are more (used_tokens.py), of which this worker has the one of a number.
    """

    counters: Sequence[mmap.mmap]
    limits: Sequence[mmap.mmap]
    other_machines: mmap.mmap  # what they have of clients; no worker writes it
    used_tokens: Sequence[mmap.mmap]
    own_used_tokens: int
    connection_ids: Sequence[mmap.mmap]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker has from its supervisor by fork."""

    worker: int
    workers: int
    channel: Channel
    take_memory: Callable[[], WorkerMemory]  # in the worker; what else it shares it gives up
    limits_secret: bytes
    table: PairTable
    maps: KernelMaps | None
    user: str | None  # None: stay who we are
    log: Log
    splicing: Splicing | None = None
    pulse: Pulse | None = None  # where it shows that it works
    last_id: int = 0  # the highest of the pairs that go on from an earlier daemon
    heir: Channel | None = None  # where a worker of the daemon before sends its pairs


def run(inheritance: Inheritance) -> None:
    """Serve; returns when the supervisor is gone or has said stop."""
    supervisor = os.getppid()
    give_up_privileges(inheritance.user)
    if os.getppid() != supervisor:
        return  # it died before the signal was set
    # Before there is a thread, and before the first byte of a client.
    unconfined = confine()
    if unconfined:
        inheritance.log.write("warning", "no_seccomp", reason=unconfined)
    worker = _Worker(inheritance)
    # A connection is no reference cycle, so collections find nothing: let them be rare.
    collecting.settle((50_000, 20, 100))
    worker.loop.run()
    worker.finish()


class _Worker:
    """Obeys the supervisor's messages."""

    def __init__(self, inheritance: Inheritance) -> None:
        self._inheritance = inheritance
        self._channel = inheritance.channel
        self._memory = inheritance.take_memory()
        self._counters = Counters(self._memory.counters)
        self._used_tokens = SharedUsedTokens(self._memory.used_tokens, self._memory.own_used_tokens)
        self.loop = Loop()
        self._server: Server | None = None
        self._datagrams: DatagramServer | None = None
        self._sockets: list[_socket.socket] = []
        self._given: list[int] = []  # listening sockets that came before their settings
        self._draining = False
        self._gets_more = False  # while it drains: the keeper has pairs for it still
        self._ends_sessions = False  # those that have lost their worker, too
        # Sessions that have lost their worker, until the listeners are known.
        self._orphans: list[SessionOrphan] = []
        self._sessions: SpliceSessions | None = None
        self._splice: SpliceDatapath | None = None
        self._sockmap: SockmapDatapath | None = None
        self._opened: Opened | None = None
        # As many as there are since the start: a reload changes nothing about it.
        express = inheritance.splicing.express if inheritance.splicing else None
        places = express.connecting.places if express else 0
        self._express_share = express_share(places, inheritance.workers)
        self._keeper: KeeperAsker | None = None
        self._adopting = 0  # how often the keeper is asked, and has more
        self._listens = False
        self._pair_sender: PairSender | None = None
        self._pair_receiver: PairReceiver | None = None
        self.loop.watch(self._channel.fileno(), EPOLLIN, self._receive, self)
        self._beat()

    def _beat(self) -> None:
        if self._inheritance.pulse is not None:
            self._inheritance.pulse.beat()
            self.loop.after(PULSE_S, self._beat)

    def finish(self) -> None:
        """No client is served any more; the keeper should know of all that has ended."""
        if self._server is not None:
            self._server.handover.finish_ends()
        if self._datagrams is not None:
            self._datagrams.handover.finish()

    def _receive(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            received = self._channel.receive()
        except BlockingIOError:
            return
        if received is None:
            self.loop.stop()  # the supervisor is gone; closing resets every pair
            return
        message, fds = received
        if "granted" in message:
            self._granted(message["number"], done=message["granted"])
            return
        if "claimed" in message:
            self._serving().claims.answered(message["claimed"], message["first"])
            return
        if message["do"] in ("take_over", "adopt"):
            self._answer_later(message["n"], message["do"])
            return
        answer: dict[str, object]
        try:
            answer = {"result": self._obey(message, fds)}
        except ForwarderError as error:
            answer = {"error": str(error)}
        self._channel.send({"n": message["n"], **answer})

    def _answer_later(self, number: int, do: str) -> None:
        """Go on with spliced pairs; say so once that is done, or will take a while longer."""
        is_answered = False

        def answer() -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                self.loop.cancel(timer)
                self._channel.send({"n": number, "result": None})

        timer = self.loop.after(scaled_s(_ADOPTION_S), answer)
        match do:
            case "adopt":  # what went through another machine
                self._adopt_pairs(answer)
            case "take_over":  # what the daemon before had spliced is the keeper's now
                if self._pair_receiver is not None:
                    self._pair_receiver.take_over_spliced(lambda: self._adopt(answer))
                else:
                    self._adopt(answer)

    def _obey(self, message: dict[str, Any], fds: list[int]) -> object:
        match message["do"]:
            case "sockets":
                self._given += fds
            case "settings":
                self._take_settings(message["listeners"], fds)
            case "flush":
                ids = message["ids"]
                return self._serving().flush_ids(ids) + self._datagrams_of().flush_ids(ids)
            case "drain":
                self._drain(gets_more=message["more"])
            case "retire":
                self._retire(fds)
            case "spliced_left":
                return self._pair_sender.spliced_left() if self._pair_sender is not None else 0
            case "stop":
                self._stop()
                self.loop.defer(lambda _: self.loop.stop(), None)
            case "upstreams":
                return self._serving().servers.rows()
            case "health":
                self._serving().servers.mark(
                    message["upstream"], message["server"], up=message["up"]
                )
                self._datagrams_of().losses.servers_changed()
            case "datapaths":
                if self._pair_sender is not None:
                    return None  # nothing more goes to the kernel
                available = message["available"]
                self._serving().handover.settle(
                    sockmap="sockmap" in available,
                    splice="splice" in available,
                    express="express" in available,
                )
                self._datagrams_of().handover.settle(splice="splice_udp" in available)
            case "pair_with":
                return self._serving().joining.pair_with(message["cookies"])
            case "join":
                return self._serving().joining.join_sockets(fds[0], fds[1])
            case unknown:
                raise ForwarderError(f"unknown message {unknown!r}")
        return None

    def _serving(self) -> Server:
        assert self._server is not None  # settings are always the first message
        return self._server

    def _datagrams_of(self) -> DatagramServer:
        assert self._datagrams is not None
        return self._datagrams

    def _take_settings(self, places: list[tuple[str, int]], fds: list[int]) -> None:
        """A new configuration: the text in the first descriptor, then the listening sockets.

        `places` says of each which listener's it is, and which one of that listener's.
        """
        text_fd = fds[0]
        listener_fds = [*self._given, *fds[1:]]
        self._given = []
        settings = Settings.from_json(text_from_fd(text_fd))
        previous = self._server.generation if self._server else None
        generation = Generation(
            settings,
            worker=self._inheritance.worker,
            previous=previous,
            used_tokens=self._used_tokens,
            counters=self._counters,
        )
        if self._server is None:
            self._make_server(generation)
        server = self._serving()
        server.generation = generation
        server.servers.write()
        room = room_for(generation.config, self._express_share)
        server.most_clients = room.clients
        server.pressure.memory_bytes = generation.memory_bytes
        self._datagrams_of().most_sessions = room.sessions
        log = generation.config.log
        for lines in (server.log, self._datagrams_of().log):
            lines.change(
                level=log.level,
                form=log.format,
                null_connections=log.null_connections,
                sample=log.sample,
            )
        stays = {os.fstat(fd).st_ino for fd in listener_fds}
        for sock in self._sockets:
            if os.fstat(sock.fileno()).st_ino not in stays:
                server.accepting.accept_rest(sock)
            server.accepting.unlisten(sock)
            sock.close()
        self._sockets = []
        udp = []
        for (name, position), fd in zip(places, listener_fds, strict=True):
            state = generation.addresses[name][position]
            if state.config.protocol == "udp":
                udp.append(self._listen_for_datagrams(fd, state))
                continue
            family = socket.AF_UNIX
            if isinstance(state.bind, Address):
                family = socket.AF_INET6 if state.bind.is_ipv6 else socket.AF_INET
            sock = _socket.socket(family, _socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            self._sockets.append(sock)
            server.accepting.listen(sock, state)
        self._datagrams_of().listen_only_at(udp)
        self._datagrams_of().losses.servers_changed(generation.balancers)
        if places:
            self._listens = True
            self._take_in_sessions()

    def _take_in_sessions(self) -> None:
        """Go on with the sessions that have lost their worker, now that there are listeners."""
        orphans, self._orphans = self._orphans, []
        taken = self._datagrams_of().adoption.take_in(orphans)
        if taken:
            log, worker = self._serving().log.log, self._inheritance.worker
            log.write("info", "adopted", worker=worker, sessions=taken)

    def _end_sessions(self) -> None:
        """Nobody goes on with sessions that have lost their worker; some end in each turn."""
        some, self._orphans = self._orphans[:ENDS_AT_ONCE], self._orphans[ENDS_AT_ONCE:]
        generation = self._serving().generation
        self._datagrams_of().adoption.end(some, generation, CloseReason.SHUTDOWN)
        if self._orphans:
            self.loop.defer(lambda _: self._end_sessions(), None)

    def _listen_for_datagrams(self, fd: int, state: ListenerState) -> str:
        """Serve a UDP socket; what the server knows it by."""
        assert isinstance(state.bind, Address)
        sock = adopt_datagram_socket(fd, ipv6=state.bind.is_ipv6, wildcard=state.endpoint is None)
        name = f"{state.config.name} {state.bind}"
        self._datagrams_of().listen(name, sock, state)
        return name

    def _make_server(self, generation: Generation) -> None:
        given = self._inheritance
        limits = SharedLimits(
            self._memory.limits,
            worker=given.worker,
            secret=given.limits_secret,
            others=self._memory.other_machines,
        )
        limits.reset_own()
        room = room_for(generation.config, self._express_share)
        window = given.table.take_window(given.worker)
        server = self._server = Server(
            self.loop,
            generation=generation,
            counters=self._counters.block(given.worker),
            limits=limits,
            window=window,
            log=ConnectionLog(given.log),
            worker=given.worker,
            workers=given.workers,
            most_clients=room.clients,
            ask_supervisor=self._ask_supervisor,
            last_id=given.last_id,
            send_claim=lambda message: self._channel.send(message, wait=False),
        )
        sockmap = given.maps.datapath(server, window, given.worker) if given.maps else None
        self._sockmap = sockmap
        splice = None
        if given.splicing is not None:
            # One for both: it reads all that comes.
            keeper = self._keeper = given.splicing.asker(given.worker, self.loop)
            splice = self._splice = SpliceDatapath(
                server, given.splicing.maps, keeper, window=window, worker=given.worker
            )
            self._sessions = SpliceSessions(
                given.splicing.maps.sessions, keeper, self.loop, window=window
            )
            given.splicing.keep_only(given.worker)
        self._drop_kernel_objects()
        server.pressure.start()
        server.handover = Handover(server, sockmap, splice)
        if splice is not None and given.splicing is not None and given.splicing.express:
            sock = given.splicing.express.workers[given.worker]
            adopt = partial(self._adopt_pairs, lambda: None, level="debug")
            self._opened = Opened(server, sock, adopt)
        self._splice = splice
        if splice is not None and given.splicing is not None and given.splicing.has_begun:
            self._adopt(lambda: None)
            self._wait_for_adoption()
        self._datagrams = DatagramServer(
            self.loop,
            counters=server.counters,
            limits=limits,
            window=window,
            # Lines of its own: made-up addresses must not use up those about connections.
            log=ConnectionLog(given.log, usual=USUAL_OF_SESSIONS),
            next_id=server.next_id,
            names=server.names,
            most_sessions=room.sessions,
            most_shown=given.table.slots - room.clients - self._express_share,
            ids=ConnectionIds(self._memory.connection_ids, given.worker),
            ask_supervisor=self._ask_supervisor,
            kernel=self._sessions,
            claims=server.claims,
        )
        if given.heir is not None:
            self._pair_receiver = PairReceiver(given.heir, server, self._datagrams, splice)

    def _adopt(self, then: Callable[[], None]) -> None:
        """Take in what has lost its worker, or its daemon, as the keeper gives it; then `then`."""
        sessions = self._sessions
        if sessions is None:
            then()
            return
        self._adopting += 1

        def done() -> None:
            self._adopting -= 1
            if self._ends_sessions:
                self._end_sessions()
            elif self._listens:
                self._take_in_sessions()
            then()

        # Settings may come meanwhile, and those that have come by then are taken in with these.
        self._adopt_pairs(lambda: sessions.adopt(lambda one: self._orphans.append(one), done))

    def _adopt_pairs(self, then: Callable[[], None], *, level: str = "info") -> None:
        """The same of pairs alone; `then` is called when there are no more.

        `level` is the log line's: those that the kernel has opened, and that last, are nothing new.
        """
        server, splice = self._serving(), self._splice
        if splice is None:
            then()
            return

        def done(adopted: int) -> None:
            if adopted:
                log, worker = server.log.log, self._inheritance.worker
                log.write(level, "adopted", worker=worker, pairs=adopted)
            then()

        if self._opened is None:
            adopt_orphans(server, splice, done, level=level)
        else:
            adopt_orphans(server, splice, done, self._opened.facts_of, level=level)

    def _wait_for_adoption(self) -> None:
        """No client is served yet: our orphans are known before, if the keeper answers soon.

        Their ports are theirs from then on: no connection of ours gets one, which the kernel would
        take for the pair's. A keeper that hangs is not waited for: the supervisor waits for us, and
        clients in our queues. What it gives later is taken in then.
        """
        assert self._keeper is not None
        self._keeper.wait_until(lambda: not self._adopting, scaled_s(_ADOPTION_S))

    def _retire(self, fds: list[int]) -> None:
        """Accept no more: another daemon does, and gets the pairs; those that stay may end."""
        self._used_tokens.retire()
        self._gets_more = False
        server = self._serving()
        self._receive_opened()
        for sock in self._sockets:
            # What waits there is not lost: the other daemon has the same socket.
            server.accepting.unlisten(sock)
            sock.close()
        self._sockets = []
        self._datagrams_of().listen_no_more()
        if fds:
            heir = Channel(socket.socket(fileno=fds[0]))
            self._pair_sender = PairSender(
                heir, server, self._datagrams_of(), self._splice, self._sockmap
            )
        if not self._draining:
            self._draining = True
            self._stop_when_empty()

    def _drop_kernel_objects(self) -> None:
        """Of maps, programs and links, which are everybody's, keep what is written by descriptor.

        All else is memory by now, and that has none.
        """
        given = self._inheritance
        kept = set()
        if given.maps is not None:
            kept |= set(given.maps.of[given.worker].fds)
        if given.splicing is not None:
            kept.add(given.splicing.maps.ring_fds[given.worker])
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if int(name) not in kept and "bpf" in os.readlink(f"/proc/self/fd/{name}"):
                    os.close(int(name))

    def _ask_supervisor(self, what: str, fds: list[int], number: int) -> None:
        # Never waited for: every other pair would wait, too. What is lost is asked again by those
        # who still need it; but a client that waits for an answer gets one.
        try:
            self._channel.send({"ask": what, "number": number}, fds, wait=False)
        except OSError:
            if what == "transparent":
                self.loop.after(0.0, partial(self._granted, number, done=False))

    def _granted(self, number: int, *, done: bool) -> None:
        """What the supervisor says to a request of `_ask_supervisor`."""
        asker = self._datagrams_of() if number > FIRST_NUMBER else self._serving()
        asker.granted(number, done=done)

    def _drain(self, *, gets_more: bool) -> None:
        """Accept no more, and end when the last connection has.

        `gets_more`: not before this is said again, without it.
        """
        self._gets_more = gets_more
        server = self._serving()
        self._receive_opened()
        for sock in self._sockets:
            server.accepting.accept_rest(sock)
            server.accepting.unlisten(sock)
            sock.close()
        self._sockets = []
        # A datagram session has no end to wait for.
        self._datagrams_of().drain(CloseReason.SHUTDOWN)
        self._ends_sessions = True
        self._end_sessions()
        if not self._draining:
            self._draining = True
            self._stop_when_empty()

    def _receive_opened(self) -> None:
        """What the kernel has opened is ours soon: the keeper is asked for it."""
        if self._opened is not None:
            self._opened.receive()

    def _stop_when_empty(self) -> None:
        self._receive_opened()
        if self._is_empty():
            self.loop.stop()
        else:
            self.loop.after(0.05, self._stop_when_empty)

    def _is_empty(self) -> bool:
        """Whether it has nothing any more, and nothing is on its way to it."""
        # The keeper may have pairs for us still, or ends to tell to their peers.
        if self._gets_more or (self._keeper is not None and self._keeper.unsettled):
            return False
        if self._ends_sessions and (self._orphans or self._adopts_later()):
            return False
        return self._serving().counters[Counter.OPEN] == 0

    def _adopts_later(self) -> bool:
        """Whether pairs that are ours cannot be had yet."""
        return self._splice is not None and self._splice.adopts_later

    def _stop(self) -> None:
        """Reset what is left."""
        self._receive_opened()
        if self._adopting:
            self._wait_for_adoption()
        # What it has told of is ours, too, once the keeper has given it.
        self._serving().handover.finish()
        self._serving().reset_all(CloseReason.SHUTDOWN)
        self._serving().handover.finish_ends()
        self._datagrams_of().end_all(CloseReason.SHUTDOWN)
        self._ends_sessions = True
        while self._orphans:
            self._end_sessions()


def main(inheritance: Inheritance) -> int:
    """`run`, with an exit code; what goes wrong is printed, for the supervisor's log."""
    try:
        run(inheritance)
    except Exception:
        sys.stderr.write(visible(traceback.format_exc()))
        return 1
    return 0
