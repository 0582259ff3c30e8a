"""Asking for a name's addresses, off the loop; answers come back through a `Mailbox`.

Two ways: the host's own getaddrinfo(3), which knows every source that nsswitch.conf(5) names and
blocks a thread for each question, and c-ares, which asks name servers for thousands of names at the
same time. Neither can be told to stop; the resolver stops listening instead.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pycares

from pyforwarder.runtime.loop import EPOLLIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyforwarder.runtime.loop import Loop

# What getaddrinfo(3) says when there is no such name or it has no address; else it does not know.
_NO_SUCH_NAME: Final = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
# Likewise for ares_getaddrinfo(3).
_ARES_NO_SUCH_NAME: Final = frozenset(
    {
        pycares.errno.ARES_ENODATA,
        pycares.errno.ARES_ENOTFOUND,
        pycares.errno.ARES_EBADNAME,
    }
)
# A name server gets this long for its first try, and twice that for the second.
_ARES_TIMEOUT_S: Final = 1.5
_ARES_TRIES: Final = 2
# c-ares keeps answers for as long as they say, and sets no bound on how many: it forgets all of
# them after so many questions (ares_reinit(3)). An answer takes a kilobyte or two, but whose name
# a client gives may make it 64 KiB on the wire, for each family.
_ARES_QUESTIONS: Final = 64
# A name with more addresses has none of use to a client: all are judged before one is taken. Of an
# answer with more (4000 fit into one) no more than one too many are kept.
MOST_ADDRESSES: Final = 256
# What c-ares, or `HostNames` for it, answers as the C library would.
_ARES_SOURCES: Final = frozenset({"files", "dns", "resolve", "myhostname"})
# What nss-myhostname(8) knows, and to c-ares is always ::1 and 127.0.0.1 (RFC 6761).
_OF_EVERY_HOST: Final = frozenset({"localhost", "_gateway", "_outbound"})
_HOST_THREADS: Final = 2
_HOSTS: Final = Path("/etc/hosts")
_RESOLV_CONF: Final = Path("/etc/resolv.conf")
_NSSWITCH: Final = Path("/etc/nsswitch.conf")


class Mailbox:
    """Answers from other threads, handed over on the loop."""

    def __init__(self, loop: Loop, receive: Callable[[str, list[str] | None], None]) -> None:
        self._loop = loop
        self._receive = receive
        self._answers: queue.SimpleQueue[tuple[str, list[str] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.watch(self._event_fd, EPOLLIN, self._arrived, self)

    def put(self, name: str, hosts: list[str] | None) -> None:
        """Store a name's addresses, from any thread: [] if it has none, None if that is not
        known.
        """
        with self._lock:  # the descriptor's number may be another's once it is closed
            if self._event_fd >= 0:
                self._answers.put((name, hosts))
                os.eventfd_write(self._event_fd, 1)

    def _arrived(self, _owner: object, fd: int, _mask: int) -> None:
        os.eventfd_read(fd)
        with contextlib.suppress(queue.Empty):
            while True:
                self._receive(*self._answers.get_nowait())

    def close(self) -> None:
        """Receive no more."""
        with self._lock:
            self._loop.forget(self._event_fd)
            os.close(self._event_fd)
            self._event_fd = -1


class Asker(Protocol):
    """Asks for names; every answer goes into the mailbox it was made with."""

    def ask(self, name: str) -> None:
        """Ask for a name, unless that is being done."""
        ...

    def forget(self, name: str) -> bool:
        """Nobody waits for the name any more; whether asking for it costs nothing from now on."""
        ...

    def close(self) -> None:
        """Drop what was asked, and ask for no more names."""
        ...


class ThreadAsker:
    """getaddrinfo(3) in up to `threads` threads, made as they are needed."""

    def __init__(self, mailbox: Mailbox, *, threads: int) -> None:
        self._mailbox = mailbox
        self._most = threads
        self._threads = 0
        self._waiting: dict[str, None] = {}  # names, the oldest first
        self._running: set[str] = set()  # names that a thread is at
        self._closed = False
        self._changed = threading.Condition()

    def ask(self, name: str) -> None:
        """Ask for a name, unless that is being done."""
        with self._changed:
            if name in self._waiting or name in self._running:
                return
            self._waiting[name] = None
            self._changed.notify()
            asked = len(self._waiting) + len(self._running)
        if self._threads < min(asked, self._most):
            self._threads += 1
            threading.Thread(target=self._work, name="resolver", daemon=True).start()

    def forget(self, name: str) -> bool:
        """Take the name out of the queue; False if a thread is at it."""
        with self._changed:
            if name in self._running:
                return False
            self._waiting.pop(name, None)
            return True

    def _work(self) -> None:
        while (name := self._take()) is not None:
            hosts = lookup(name)
            with self._changed:
                self._running.discard(name)
            self._mailbox.put(name, hosts)

    def _take(self) -> str | None:
        """Wait for a name to ask for; None if there will be none."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            name = next(iter(self._waiting))
            del self._waiting[name]
            self._running.add(name)
            return name

    def close(self) -> None:
        """Let the threads end, each after its present name."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class HostNames:
    """The names that this host knows by itself, without a name server.

    The C library is asked for them. c-ares would give a name in hosts(5) the addresses of every
    other name that shares one with it (1.34, ares_hosts_file.c).
    """

    def __init__(self, hosts: Path = _HOSTS) -> None:
        self._hosts = hosts
        self._version: tuple[int, ...] | None = None
        self._names: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        version = _version_of(self._hosts)
        if version != self._version:
            self._version = version
            self._names = _OF_EVERY_HOST | {socket.gethostname().lower()} | self._read()
        return name in self._names

    def _read(self) -> set[str]:
        names: set[str] = set()
        with contextlib.suppress(OSError), self._hosts.open(errors="replace") as file:
            for line in file:
                names.update(line.partition("#")[0].lower().split()[1:])
        return names


class CaresAsker:
    """c-ares with a thread of its own; it reads resolv.conf(5) again when that has changed."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._channel: pycares.Channel | None = None
        self._asked: set[str] = set()
        self._questions = 0
        self._read_from: tuple[int, ...] = ()
        self._host_names = HostNames()
        self._host = ThreadAsker(mailbox, threads=_HOST_THREADS)

    def ask(self, name: str) -> None:
        """Ask for a name, unless that is being done."""
        if name in self._host_names:
            self._host.ask(name)
            return
        if name in self._asked:
            return
        try:
            if self._channel is None:
                # Not lookups="b" (name servers only): pycares 5.2 frees that text before c-ares
                # reads it, and a channel that read something else asks nobody. What is in
                # hosts(5) does not come here anyway.
                self._channel = pycares.Channel(timeout=_ARES_TIMEOUT_S, tries=_ARES_TRIES)
                self._read_from = _version_of(_RESOLV_CONF)
            self._questions += 1
            # What it watches is the name in /etc, not the file that a link there leads to.
            read_from = _version_of(_RESOLV_CONF)
            if self._questions == _ARES_QUESTIONS or read_from != self._read_from:
                self._questions = 0
                self._read_from = read_from
                self._channel.reinit()
        except pycares.AresError:  # no thread or memory for it
            self._host.ask(name)
            return
        self._asked.add(name)

        def answered(result: pycares.AddrInfoResult | None, error: int | None) -> None:
            self._asked.discard(name)
            self._mailbox.put(name, _hosts_of(result, error))

        try:
            self._channel.getaddrinfo(name, None, type=socket.SOCK_STREAM, callback=answered)
        except UnicodeError:  # no name that a name server has
            self._asked.discard(name)
            self._mailbox.put(name, [])

    def forget(self, name: str) -> bool:
        """c-ares cannot cancel one question, nor can a thread."""
        return name not in self._asked and self._host.forget(name)

    def close(self) -> None:
        """Cancel what is asked for."""
        self._host.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _version_of(path: Path) -> tuple[int, ...]:
    """What differs between two contents of a file; empty if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def cares_knows_all_sources(nsswitch: Path = _NSSWITCH) -> bool:
    """Whether c-ares finds the names that this host's C library finds (nsswitch.conf(5))."""
    try:
        text = nsswitch.read_text(errors="replace")
    except OSError:
        return True  # then it is hosts(5) and name servers
    hosts = re.search(r"^\s*hosts:([^#\n]*)", text, re.MULTILINE)
    return hosts is None or set(re.sub(r"\[.*?\]", " ", hosts[1]).split()) <= _ARES_SOURCES


def lookup(name: str) -> list[str] | None:
    """The name's addresses without duplicates; [] if it has none, None if that is not known.

    One more than `MOST_ADDRESSES` are as many as there are told to be.

    Blocks.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return [] if error.errno in _NO_SUCH_NAME else None
    except UnicodeError:
        return []
    except OSError:
        return None
    return _without_duplicates(str(entry[4][0]) for entry in found)


def _without_duplicates(hosts: Iterable[str]) -> list[str]:
    """Return the addresses in their order, each once; one more than `MOST_ADDRESSES` at most."""
    found: dict[str, None] = {}
    for host in hosts:
        found[host] = None
        if len(found) > MOST_ADDRESSES:
            break
    return list(found)


def _hosts_of(result: pycares.AddrInfoResult | None, error: int | None) -> list[str] | None:
    """What c-ares has answered, as `lookup` would; it sorts as RFC 6724 says, too."""
    if result is None:
        return [] if error in _ARES_NO_SUCH_NAME else None
    return _without_duplicates(_host_of(node) for node in result.nodes)


def _host_of(node: pycares.AddrInfoNode) -> str:
    host, *rest = node.addr
    zone = f"%{rest[2]}" if len(rest) == 3 and rest[2] else ""
    return f"{host.decode('ascii')}{zone}"
