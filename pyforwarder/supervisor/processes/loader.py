"""Children that load and prove programs while we serve: compiling and verifying take seconds.

Such a child has inherited the maps, and hands over each part as soon as it has loaded it:
descriptors, and a few words. Of a part that it cannot load it says why, and that is raised here as
the `LoadError` that it was there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import children, slowness
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

# All parts together: compiling 60 s, the self-test 30 s each, and some more.
TIMEOUT_S: Final = 240.0
_PR_SET_PDEATHSIG: Final = 1
_NICE: Final = 5  # a third of what others get
# The kernel takes 253 with a message (SCM_MAX_FD); there is one for each worker.
_MOST_DESCRIPTORS: Final = 250
# A message must fit into the socket's buffer whole.
_MOST_BYTES: Final = 96 * 1024
_MOST_LOG_CHARACTERS: Final = 32 * 1024


class Loaded(NamedTuple):
    """What one part has come to, for its sender and for its receiver."""

    descriptors: Sequence[int]
    said: Mapping[str, Any]


Part = Callable[[], Loaded]  # raises LoadError
Take = Callable[[str, Loaded | LoadError], None]


class LoaderProcess:
    """One child, from fork to wait."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        *,
        close_in_child: Callable[[], None],
        is_in_no_hurry: bool = False,
    ) -> None:
        """Fork the process, which works on the parts in their order, after `close_in_child`.

        `is_in_no_hurry`: a daemon serves meanwhile, and needs the processors more.
        """
        self._left = list(parts)
        self._come: list[int] = []  # descriptors of a part of which more are to come
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def child() -> int:
            # It ends with us, however we end.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            self._ours.close()
            if is_in_no_hurry:
                os.nice(_NICE)
            close_in_child()
            for name, part in parts.items():
                _send(theirs, name, part)
            return 0

        self._pid = children.fork(child)
        theirs.close()
        self._deadline_s = time.monotonic() + scaled_s(TIMEOUT_S)

    def fileno(self) -> int:
        """Readable when `next` has something to say; until `close`."""
        return self._ours.fileno()

    @property
    def is_over(self) -> bool:
        """Whether all parts have come, or will not come: then close it."""
        return not self._left

    @property
    def time_left_s(self) -> float:
        """How long until the child has to be given up (`give_up`)."""
        return max(0.0, self._deadline_s - time.monotonic())

    def next(self) -> Iterator[tuple[str, Loaded | LoadError]]:
        """Yield what has come, by the part's name; the descriptors are the caller's.

        Waits for nothing if `fileno` is readable. When the child has ended early, all parts that
        are left have failed.
        """
        with contextlib.suppress(ConnectionError):
            data, fds, _, _ = socket.recv_fds(self._ours, _MOST_BYTES, _MOST_DESCRIPTORS)
            if data:
                for fd in fds:
                    os.set_inheritable(fd, False)
                answer = json.loads(data)
                name = answer["part"]
                fds, self._come = [*self._come, *fds], []
                if answer["more"]:
                    self._come = fds
                    return
                self._left.remove(name)
                if "error" in answer:
                    yield name, _error(answer["error"])
                else:
                    yield name, Loaded(fds, answer["said"])
                return
        yield from self._fail("the process that loads it has died")

    def give_up(self) -> Iterator[tuple[str, LoadError]]:
        """Fail the parts that have not come, as they take too long; yields each with the error."""
        yield from self._fail(
            f"not loaded within {scaled_s(TIMEOUT_S):.0f} s; {slowness.advice()}", Refusal.TIMEOUT
        )

    def _fail(self, reason: str, cause: Refusal = Refusal.OTHER) -> Iterator[tuple[str, LoadError]]:
        left, self._left = self._left, []
        self._close_come()
        for name in left:
            yield name, LoadError(reason, cause=cause)

    def wait(self) -> Iterator[tuple[str, Loaded | LoadError]]:
        """Yield all that comes, until the process is done."""
        while not self.is_over:
            poll = select.poll()
            poll.register(self._ours, select.POLLIN)
            if poll.poll(self.time_left_s * 1000):
                yield from self.next()
            elif not self.time_left_s:
                yield from self.give_up()

    def close(self) -> None:
        """End the process; nothing happens if it has ended."""
        self._left = []
        self._close_come()
        self._ours.close()
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _close_come(self) -> None:
        come, self._come = self._come, []
        for fd in come:
            os.close(fd)

    def close_in_child(self) -> None:
        """Close the socket, in another process."""
        self._ours.close()


class Loaders:
    """The children of one daemon; each ends when its parts have come, or take too long."""

    def __init__(self, loop: Loop, take: Take, close_in_child: Callable[[], None]) -> None:
        """`take` gets each part that comes by the loop, by its name, or why it does not come."""
        self._loop = loop
        self._take = take
        self._close_in_child = close_in_child
        self._all: list[LoaderProcess] = []

    def start(self, parts: Mapping[str, Part], *, is_in_no_hurry: bool = False) -> None:
        """Fork a child for these parts; not reported before `wait_for_first` or `watch`."""
        self._all.append(
            LoaderProcess(parts, close_in_child=self._close_in_child, is_in_no_hurry=is_in_no_hurry)
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing is to come any more."""
        return all(one.is_over for one in self._all)

    def wait_for_first(self) -> Iterator[tuple[str, Loaded | LoadError]]:
        """What the first child has, to its end; nobody is served meanwhile."""
        yield from self._all[0].wait()
        self._all[0].close()

    def wait(self) -> Iterator[tuple[str, Loaded | LoadError]]:
        """What all of them have, likewise."""
        for one in self._all:
            yield from one.wait()
            one.close()

    def watch(self) -> None:
        """Take by the loop what is still to come."""
        for one in self._all:
            if not one.is_over:
                self._watch(one)

    def watch_more(self, parts: Mapping[str, Part]) -> None:
        """Start parts of which it turns out only now that they are wanted, and watch them."""
        self.start(parts)
        self._watch(self._all[-1])

    def _watch(self, one: LoaderProcess) -> None:
        self._loop.watch(one.fileno(), EPOLLIN, self._received, one)
        self._loop.after(one.time_left_s, lambda: self._give_up(one))

    def _received(self, one: LoaderProcess, fd: int, _mask: int) -> None:
        found = list(one.next())
        if one.is_over:
            self._loop.forget(fd)
            one.close()
        for name, loaded in found:
            self._take(name, loaded)

    def _give_up(self, one: LoaderProcess) -> None:
        if not one.is_over:
            self._loop.forget(one.fileno())
            found = list(one.give_up())
            one.close()
            for name, error in found:
                self._take(name, error)

    def stop(self) -> None:
        """End all processes, while the loop goes on: nothing that they send is taken any more."""
        for one in self._all:
            if not one.is_over:
                self._loop.forget(one.fileno())
            one.close()

    def close_in_child(self) -> None:
        """Close the sockets to these processes, in another child."""
        for one in self._all:
            one.close_in_child()

    def close(self) -> None:
        """End all processes, when the loop is not needed any more."""
        for one in self._all:
            one.close()


def _send(sock: socket.socket, name: str, part: Part) -> None:
    descriptors: Sequence[int] = ()
    answer: dict[str, Any] = {"part": name, "more": False}
    try:
        descriptors, answer["said"] = part()
    except LoadError as error:
        answer["error"] = {
            "operation": error.operation,
            "cause": error.cause,
            "advice": error.advice,
            "log": error.log[-_MOST_LOG_CHARACTERS:],
        }
    with contextlib.suppress(ConnectionError):  # nobody wants it any more
        rest = list(descriptors)
        while len(rest) > _MOST_DESCRIPTORS:
            some, rest = rest[:_MOST_DESCRIPTORS], rest[_MOST_DESCRIPTORS:]
            socket.send_fds(sock, [json.dumps({"part": name, "more": True}).encode()], some)
        socket.send_fds(sock, [json.dumps(answer).encode()], rest)
    for fd in descriptors:
        os.close(fd)


def _error(refusal: Mapping[str, Any]) -> LoadError:
    return LoadError(
        refusal["operation"],
        cause=Refusal(refusal["cause"]),
        advice=refusal["advice"],
        log=refusal["log"],
    )
