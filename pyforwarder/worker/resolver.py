"""Host names to addresses, off the loop: getaddrinfo(3) blocks, so threads do it.

Bounded in every way: so many threads, so many questions waiting, and answers are kept only for a
while: `KEEP_S`, or what an upstream says (`resolve_every`). A question that takes longer than its
connection's deadline is answered to nobody. While nobody can be asked, a name keeps the addresses
that it had (RFC 8767, serve-stale): a name server's failure is not its servers'.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyforwarder.address import Address
from pyforwarder.loop import EPOLLIN

if TYPE_CHECKING:
    from pyforwarder.loop import Loop

THREADS: Final = 4
MOST_WAITING: Final = 1024
KEEP_S: Final = 5.0  # getaddrinfo hides the record's TTL; short enough for a name that moves
STALE_S: Final = 86400.0  # RFC 8767 section 5 suggests one to three days
_MOST_KEPT: Final = 4096
# What getaddrinfo(3) says when there is no such name or it has no address; else it does not know.
_NO_SUCH_NAME: Final = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})

Answer = Callable[[list[str]], None]  # addresses in getaddrinfo's order (RFC 6724), [] if none


class Resolver:
    """Answers on the loop, through an eventfd."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._questions: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, list[str] | None]] = queue.SimpleQueue()
        self._waiting: dict[str, list[Answer]] = {}
        # By name: when it was asked for last, when it was answered last, and that answer.
        self._kept: dict[str, tuple[float, float, list[str]]] = {}
        self._threads = 0
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.watch(self._event_fd, EPOLLIN, self._answered, self)

    def resolve(self, name: str, answer: Answer, *, keep_s: float = KEEP_S) -> bool:
        """Call `answer` with the name's addresses, now if they are known, else from the loop.

        What was answered up to `keep_s` ago counts as known. False if too many questions wait
        already: then `answer` is never called.
        """
        kept = self._kept.get(name)
        if kept is not None and kept[0] + keep_s > self._loop.now_s:
            answer(kept[2])
            return True
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.append(answer)
            return True
        if len(self._waiting) >= MOST_WAITING:
            return False
        self._waiting[name] = [answer]
        self._questions.put(name)
        if self._threads < THREADS:
            # Threads are made with the first names: a worker that never needs one has none.
            self._threads += 1
            threading.Thread(target=self._work, name="resolver", daemon=True).start()
        return True

    def _work(self) -> None:
        while True:
            name = self._questions.get()
            self._answers.put((name, lookup(name)))
            os.eventfd_write(self._event_fd, 1)

    def _answered(self, _owner: object, fd: int, _mask: int) -> None:
        os.eventfd_read(fd)
        while not self._answers.empty():
            name, addresses = self._answers.get()
            addresses = self._keep(name, addresses)
            for answer in self._waiting.pop(name, ()):
                answer(addresses)

    def _keep(self, name: str, addresses: list[str] | None) -> list[str]:
        """Remember an answer; what to tell whoever asked."""
        now_s = answered_s = self._loop.now_s
        old = self._kept.pop(name, None)
        if addresses is None:
            if old is None or now_s - old[1] >= STALE_S:
                return []
            _, answered_s, addresses = old
        if addresses:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[name] = (now_s, answered_s, addresses)
        return addresses


def lookup(name: str) -> list[str] | None:
    """The name's addresses without duplicates; [] if it has none, None if that is not known.

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
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def addresses_of(hosts: list[str], port: int) -> list[Address]:
    """The answer as addresses; a zone (`fe80::1%eth0`) makes no address we would connect to."""
    return [Address(host, port) for host in hosts if "%" not in host]
