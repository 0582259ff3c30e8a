"""A worker obeys what its supervisor says: settings first, and in the end to drain or to stop."""

from __future__ import annotations

import _socket
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.channel import Channel, text_from_fd
from pyforwarder.runtime.counters import Counter, Counters
from pyforwarder.runtime.loop import EPOLLIN, Loop
from pyforwarder.runtime.pulse import PULSE_S
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.adoption import ADOPTION_S
from pyforwarder.worker.generation import Generation, ListenerState
from pyforwarder.worker.pair_sender import PairSender
from pyforwarder.worker.parts import WorkerParts
from pyforwarder.worker.room import express_slots, room_for
from pyforwarder.worker.settings import Settings
from pyforwarder.worker.udp.client_addresses import FIRST_NUMBER
from pyforwarder.worker.udp.sockets import datagram_socket_from_fd
from pyforwarder.worker.used_tokens import SharedUsedTokens

if TYPE_CHECKING:
    from pyforwarder.worker.inheritance import Inheritance


class Worker:
    """Obeys the supervisor's messages."""

    def __init__(self, inheritance: Inheritance) -> None:
        self._inheritance = inheritance
        self._channel = inheritance.channel
        self._memory = inheritance.take_memory()
        self._counters = Counters(self._memory.counters)
        self._used_tokens = SharedUsedTokens(self._memory.used_tokens, self._memory.own_used_tokens)
        self.loop = Loop()
        self._parts: WorkerParts | None = None
        self._sockets: list[_socket.socket] = []
        self._given: list[int] = []  # listening sockets that came before their settings
        self._draining = False
        self._gets_more = False  # while it drains: the keeper has pairs for it still
        # As many as there are since the start: a reload changes nothing about it.
        express = inheritance.splicing.express if inheritance.splicing else None
        places = express.connections.places if express else 0
        self._express_slots = express_slots(places, inheritance.workers)
        self._has_retired = False
        self._pair_sender: PairSender | None = None
        self.loop.watch(self._channel.fileno(), EPOLLIN, self._receive, self)
        self._beat()

    def _beat(self) -> None:
        if self._inheritance.pulse is not None:
            self._inheritance.pulse.beat()
            self.loop.after(PULSE_S, self._beat)

    def finish(self) -> None:
        """Tell the keeper of all that has ended, once no client is served any more."""
        if self._parts is not None:
            self._parts.server.handover.finish_ends()
            self._parts.datagrams.handover.finish()

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
            self._made.server.claims.answered(message["claimed"], message["first"])
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

        timer = self.loop.after(scaled_s(ADOPTION_S), answer)
        match do:
            case "adopt":  # what went through another machine
                self._made.adoption.adopt_pairs(answer)
            case "take_over":  # what the daemon before had spliced is the keeper's now
                adoption, receiver = self._made.adoption, self._made.pair_receiver
                if receiver is not None:
                    receiver.take_over_spliced(lambda: adoption.adopt(answer))
                else:
                    adoption.adopt(answer)

    def _obey(self, message: dict[str, Any], fds: list[int]) -> object:
        match message["do"]:
            case "sockets":
                self._given += fds
            case "settings":
                self._take_settings(message["listeners"], fds)
            case "flush":
                ids = message["ids"]
                return self._made.server.flush_ids(ids) + self._made.datagrams.flush_ids(ids)
            case "drain":
                self._drain(gets_more=message["more"])
            case "retire":
                self._retire(fds, keeps_spliced=message["keeps"], gets_more=message["more"])
            case "spliced_left":
                return self._pair_sender.spliced_left() if self._pair_sender is not None else 0
            case "stop":
                self._stop()
                self.loop.defer(lambda _: self.loop.stop(), None)
            case "upstreams":
                return self._made.server.servers.rows()
            case "health":
                self._made.server.servers.mark(
                    message["upstream"], message["server"], up=message["up"]
                )
                self._made.datagrams.losses.servers_changed()
            case "datapaths":
                if self._pair_sender is not None:
                    return None  # nothing more goes to the kernel
                available = message["available"]
                self._made.server.handover.settle(
                    sockmap="sockmap" in available,
                    splice="splice" in available,
                    express="express" in available,
                )
                self._made.datagrams.handover.settle(splice="splice_udp" in available)
            case "pair_with":
                return self._made.server.foreign_pairs.pair_with(message["cookies"])
            case "join":
                return self._made.server.foreign_pairs.join_sockets(fds[0], fds[1])
            case unknown:
                raise ForwarderError(f"unknown message {unknown!r}")
        return None

    @property
    def _made(self) -> WorkerParts:
        assert self._parts is not None  # settings are always the first message
        return self._parts

    def _take_settings(self, positions: list[tuple[str, int]], fds: list[int]) -> None:
        """A new configuration: the text in the first descriptor, then the listening sockets.

        `positions` says of each which listener's it is, and which one of that listener's.
        """
        text_fd = fds[0]
        listener_fds = [*self._given, *fds[1:]]
        self._given = []
        settings = Settings.from_json(text_from_fd(text_fd))
        previous = self._parts.server.generation if self._parts is not None else None
        generation = Generation(
            settings,
            worker=self._inheritance.worker,
            previous=previous,
            used_tokens=self._used_tokens,
            counters=self._counters,
        )
        if self._parts is None:
            self._parts = WorkerParts(
                self._inheritance,
                self._memory,
                self._counters,
                self.loop,
                generation,
                express_slots=self._express_slots,
                ask_supervisor=self._ask_supervisor,
            )
        server = self._made.server
        server.generation = generation
        server.servers.write()
        room = room_for(generation.config, self._express_slots)
        server.most_clients = room.clients
        server.pressure.memory_bytes = generation.memory_bytes
        self._made.datagrams.most_sessions = room.sessions
        log = generation.config.log
        for lines in (server.log, self._made.datagrams.log):
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
        for (name, position), fd in zip(positions, listener_fds, strict=True):
            listener = generation.addresses[name][position]
            if listener.config.protocol == "udp":
                udp.append(self._listen_for_datagrams(fd, listener))
                continue
            family = socket.AF_UNIX
            if isinstance(listener.bind, Address):
                family = socket.AF_INET6 if listener.bind.is_ipv6 else socket.AF_INET
            sock = _socket.socket(family, _socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            self._sockets.append(sock)
            server.accepting.listen(sock, listener)
        self._made.datagrams.listen_only_at(udp)
        self._made.datagrams.losses.servers_changed(generation.balancers)
        if positions:
            self._made.adoption.take_in_sessions(self._made.datagrams)

    def _listen_for_datagrams(self, fd: int, listener: ListenerState) -> str:
        """Serve a UDP socket; what the server knows it by."""
        assert isinstance(listener.bind, Address)
        sock = datagram_socket_from_fd(
            fd, ipv6=listener.bind.is_ipv6, wildcard=listener.endpoint is None
        )
        name = f"{listener.config.name} {listener.bind}"
        self._made.datagrams.listen(name, sock, listener)
        return name

    def _retire(self, fds: list[int], *, keeps_spliced: bool, gets_more: bool) -> None:
        """Accept no more: another daemon does, and gets the pairs; those that stay may end.

        `keeps_spliced`: those that are spliced stay. `gets_more`: see `_drain`.
        """
        self._gets_more = gets_more
        if self._has_retired:
            return
        self._has_retired = True
        self._used_tokens.retire()
        server = self._made.server
        self._receive_opened()
        for sock in self._sockets:
            # What waits there is not lost: the other daemon has the same socket.
            server.accepting.unlisten(sock)
            sock.close()
        self._sockets = []
        self._made.datagrams.listen_no_more()
        if fds:
            to_successor = Channel(socket.socket(fileno=fds[0]))
            self._pair_sender = PairSender(
                to_successor,
                server,
                self._made.datagrams,
                self._made.splice,
                self._made.sockmap,
                keeps_spliced=keeps_spliced,
            )
        elif keeps_spliced:
            # This worker is in the place of one that died: pairs go on, and nobody has its
            # sessions.
            server.handover.stop()
            self._made.datagrams.handover.settle(splice=False)
            self._made.datagrams.drain(CloseReason.SHUTDOWN)
            self._made.adoption.end_sessions(self._made.datagrams)
        if not self._draining:
            self._draining = True
            self._stop_when_empty()

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
        asker = self._made.datagrams if number > FIRST_NUMBER else self._made.server
        asker.granted(number, done=done)

    def _drain(self, *, gets_more: bool) -> None:
        """Accept no more, and end when the last connection has.

        `gets_more`: not before this is said again, without it.
        """
        self._gets_more = gets_more
        server = self._made.server
        self._receive_opened()
        for sock in self._sockets:
            server.accepting.accept_rest(sock)
            server.accepting.unlisten(sock)
            sock.close()
        self._sockets = []
        # A datagram session has no end to wait for.
        self._made.datagrams.drain(CloseReason.SHUTDOWN)
        self._made.adoption.end_sessions(self._made.datagrams)
        if not self._draining:
            self._draining = True
            self._stop_when_empty()

    def _receive_opened(self) -> None:
        """What the kernel has opened is ours soon: the keeper is asked for it."""
        if self._made.opened is not None:
            self._made.opened.receive()

    def _stop_when_empty(self) -> None:
        self._receive_opened()
        if self._is_empty():
            self.loop.stop()
        else:
            self.loop.after(0.05, self._stop_when_empty)

    def _is_empty(self) -> bool:
        """Whether the worker has nothing any more, and nothing is on its way to it."""
        # The keeper may have pairs for us still, or ends to tell to their peers.
        keeper = self._made.keeper
        if self._gets_more or (keeper is not None and keeper.unsettled):
            return False
        if self._made.adoption.has_more:
            return False
        return self._made.server.counters[Counter.OPEN] == 0

    def _stop(self) -> None:
        """Reset what is left."""
        self._receive_opened()
        self._made.adoption.wait()
        # What it has told of is ours, too, once the keeper has given it.
        self._made.server.handover.finish()
        self._made.server.reset_all(CloseReason.SHUTDOWN)
        self._made.server.handover.finish_ends()
        self._made.datagrams.end_all(CloseReason.SHUTDOWN)
        self._made.adoption.end_all_sessions(self._made.datagrams)
