"""A worker's process: gives up its privileges, then serves until the supervisor says otherwise.

It reads hostile bytes, so it keeps nothing that they could be used for: an unprivileged user, no
capability, no way to gain one (PR_SET_NO_NEW_PRIVS). What it needs it has inherited: map
descriptors, shared memory, and listeners that the supervisor has bound.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import gc
import os
import pwd
import resource
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.address import Address
from pyforwarder.counters import Counter, Counters
from pyforwarder.datapath.splice import SpliceDatapath
from pyforwarder.errors import ForwarderError
from pyforwarder.limits import SharedLimits
from pyforwarder.loop import EPOLLIN, Loop
from pyforwarder.reasons import CloseReason
from pyforwarder.worker.channel import Channel, text_from_fd
from pyforwarder.worker.datagrams import DatagramServer, adopt_datagram_socket
from pyforwarder.worker.generation import Generation, ListenerState, Settings
from pyforwarder.worker.handover import Handover
from pyforwarder.worker.log import ConnectionLog, Log
from pyforwarder.worker.orphans import adopt_orphans
from pyforwarder.worker.server import Server

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.kernel import KernelMaps, PairTable
    from pyforwarder.datapath.splice_keeper import Splicing
    from pyforwarder.worker.used_tokens import SharedUsedTokens

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
# Descriptors that a worker needs beside its connections: maps, rings, epoll, channel, log, spare.
_OWN_DESCRIPTORS: Final = 64


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker has from its supervisor by fork."""

    worker: int
    workers: int
    channel: Channel
    counters_memory: mmap.mmap
    limits_memory: mmap.mmap
    limits_secret: bytes
    table: PairTable
    maps: KernelMaps | None
    used_tokens: SharedUsedTokens
    user: str | None  # None: stay who we are
    log: Log
    splicing: Splicing | None = None
    last_id: int = 0  # the highest of the pairs that go on from an earlier daemon


def most_clients(pairs: int) -> int:
    """How many clients one worker may have at once: two descriptors for each, and some to spare."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(pairs + 1024, (files - _OWN_DESCRIPTORS) // 2))


def give_up_privileges(user: str | None) -> None:
    """Become `user`, for good.

    Raises:
        ForwarderError: there is no such user.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if user is not None and os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise ForwarderError(f"no user {user!r} on this host") from None
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        # Leaving uid 0 clears every capability set (capabilities(7)).
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Changing the user has cleared the parent-death signal: set it after.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(inheritance: Inheritance) -> None:
    """Serve; returns when the supervisor is gone or has said stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal's Ctrl-C reaches the whole group; the supervisor decides what it means.
        signal.signal(number, signal.SIG_IGN)
    supervisor = os.getppid()
    give_up_privileges(inheritance.user)
    if os.getppid() != supervisor:
        return  # it died before the signal was set
    worker = _Worker(inheritance)
    # Objects made so far live as long as the process: keep the collector away from them.
    gc.collect()
    gc.freeze()
    # A connection is no reference cycle, so collections find nothing: let them be rare.
    gc.set_threshold(50_000, 20, 100)
    worker.loop.run()


class _Worker:
    """Obeys the supervisor's messages."""

    def __init__(self, inheritance: Inheritance) -> None:
        self._inheritance = inheritance
        self._channel = inheritance.channel
        self._counters = Counters(inheritance.counters_memory, inheritance.workers)
        self.loop = Loop()
        self._server: Server | None = None
        self._datagrams: DatagramServer | None = None
        self._sockets: dict[str, _socket.socket] = {}
        self._draining = False
        self.loop.watch(self._channel.fileno(), EPOLLIN, self._hear, self)

    def _hear(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            received = self._channel.receive()
        except BlockingIOError:
            return
        if received is None:
            self.loop.stop()  # the supervisor is gone; closing resets every pair
            return
        message, fds = received
        if "granted" in message:
            self._serving().granted(message["number"], done=message["granted"])
            return
        answer: dict[str, object]
        try:
            answer = {"result": self._obey(message, fds)}
        except ForwarderError as error:
            answer = {"error": str(error)}
        self._channel.send({"n": message["n"], **answer})

    def _obey(self, message: dict[str, Any], fds: list[int]) -> object:
        match message["do"]:
            case "settings":
                self._take_settings(message["listeners"], fds)
            case "flush":
                ids = message["ids"]
                return self._serving().flush_ids(ids) + self._datagrams_of().flush_ids(ids)
            case "drain":
                self._drain()
            case "stop":
                self._serving().reset_all(CloseReason.SHUTDOWN)
                self._datagrams_of().end_all(CloseReason.SHUTDOWN)
                self.loop.defer(lambda _: self.loop.stop(), None)
            case "upstreams":
                return self._serving().upstreams()
            case "health":
                self._serving().mark(message["upstream"], message["server"], up=message["up"])
            case "pair_with":
                return self._serving().pair_with(message["cookies"])
            case "join":
                return self._serving().join_sockets(fds[0], fds[1])
            case unknown:
                raise ForwarderError(f"unknown message {unknown!r}")
        return None

    def _serving(self) -> Server:
        assert self._server is not None  # settings are always the first message
        return self._server

    def _datagrams_of(self) -> DatagramServer:
        assert self._datagrams is not None
        return self._datagrams

    def _take_settings(self, names: list[str], fds: list[int]) -> None:
        """A new configuration: the text in the first descriptor, then one listener per name."""
        text_fd, *listener_fds = fds
        settings = Settings.from_json(text_from_fd(text_fd))
        previous = self._server.generation if self._server else None
        generation = Generation(
            settings,
            worker=self._inheritance.worker,
            previous=previous,
            used_tokens=self._inheritance.used_tokens,
            counters=self._counters,
        )
        if self._server is None:
            self._server = self._make_server(generation)
        server = self._server
        server.generation = generation
        log = generation.config.log
        server.log.change(level=log.level, form=log.format)
        stays = {os.fstat(fd).st_ino for fd in listener_fds}
        for sock in self._sockets.values():
            if os.fstat(sock.fileno()).st_ino not in stays:
                server.accept_rest(sock)
            server.unlisten(sock)
            sock.close()
        self._sockets = {}
        for name, fd in zip(names, listener_fds, strict=True):
            state = generation.listeners[name]
            if state.config.protocol == "udp":
                self._listen_for_datagrams(name, fd, state)
                continue
            family = socket.AF_UNIX if state.is_unix else socket.AF_INET
            if not state.is_unix and ":" in str(state.bind).rpartition(":")[0]:
                family = socket.AF_INET6
            sock = _socket.socket(family, _socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            self._sockets[name] = sock
            server.listen(sock, state)
        udp = [name for name in names if generation.listeners[name].config.protocol == "udp"]
        self._datagrams_of().keep_only(udp)

    def _listen_for_datagrams(self, name: str, fd: int, state: ListenerState) -> None:
        assert isinstance(state.bind, Address)
        sock = adopt_datagram_socket(fd, ipv6=state.bind.is_ipv6, wildcard=state.endpoint is None)
        self._datagrams_of().listen(name, sock, state)

    def _make_server(self, generation: Generation) -> Server:
        given = self._inheritance
        limits = SharedLimits(
            given.limits_memory,
            worker=given.worker,
            workers=given.workers,
            secret=given.limits_secret,
        )
        limits.reset_own()
        config = generation.config
        window = given.table.take_window(given.worker)
        server = Server(
            self.loop,
            generation=generation,
            counters=self._counters.block(given.worker),
            limits=limits,
            window=window,
            log=ConnectionLog(given.log),
            worker=given.worker,
            workers=given.workers,
            most_clients=most_clients(config.limits.pairs),
            ask_supervisor=self._ask_supervisor,
            last_id=given.last_id,
        )
        sockmap = given.maps.datapath(server, window, given.worker) if given.maps else None
        splice = None
        if given.splicing is not None:
            splice = SpliceDatapath(
                server,
                given.splicing.maps,
                given.splicing.client(given.worker),
                window=window,
                worker=given.worker,
            )
            given.splicing.keep_only(given.worker)
        server.handover = Handover(server, sockmap, splice)
        if splice is not None:
            adopted = adopt_orphans(server, splice)
            if adopted:
                server.log.log.write("info", "adopted", worker=given.worker, pairs=adopted)
        self._datagrams = DatagramServer(
            self.loop,
            counters=server.counters,
            limits=limits,
            window=window,
            log=server.log,
            next_id=server.next_id,
            most_sessions=most_clients(config.limits.pairs),
        )
        return server

    def _ask_supervisor(self, what: str, fds: list[int], number: int) -> None:
        # A lost request is asked again by whoever still needs it.
        with contextlib.suppress(OSError):
            self._channel.send({"ask": what, "number": number}, fds)

    def _drain(self) -> None:
        """Accept no more, and end when the last connection has."""
        server = self._serving()
        for sock in self._sockets.values():
            server.accept_rest(sock)
            server.unlisten(sock)
            sock.close()
        self._sockets = {}
        # A datagram session has no end to wait for.
        self._datagrams_of().end_all(CloseReason.SHUTDOWN)
        if not self._draining:
            self._draining = True
            self._stop_when_empty()

    def _stop_when_empty(self) -> None:
        if self._serving().counters[Counter.OPEN] == 0:
            self.loop.stop()
        else:
            self.loop.after(0.05, self._stop_when_empty)


def main(inheritance: Inheritance) -> int:
    """`run`, with an exit code; what goes wrong is printed, for the supervisor's log."""
    try:
        run(inheritance)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return 1
    return 0
