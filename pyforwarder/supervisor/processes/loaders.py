"""Processes that load and prove beside the daemon: what has come of them, and who is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.supervisor.processes.loader import Loaded, Part, Preparation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyforwarder.errors import LoadError
    from pyforwarder.runtime.loop import Loop

    Take = Callable[[str, Loaded | LoadError], None]


class Preparations:
    """The children that load programs; each ends when its parts have come, or take too long."""

    def __init__(self, loop: Loop, take: Take, close_in_child: Callable[[], None]) -> None:
        """`take` gets each part that comes by the loop, by its name, or why it does not come."""
        self._loop = loop
        self._take = take
        self._close_in_child = close_in_child
        self._all: list[Preparation] = []

    def start(self, parts: Mapping[str, Part], *, is_in_no_hurry: bool = False) -> None:
        """Fork a child for these parts; not reported before `wait_for_first` or `watch`."""
        self._all.append(
            Preparation(parts, close_in_child=self._close_in_child, is_in_no_hurry=is_in_no_hurry)
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

    def _watch(self, one: Preparation) -> None:
        self._loop.watch(one.fileno(), EPOLLIN, self._prepared, one)
        self._loop.after(one.time_left_s, lambda: self._give_up(one))

    def _prepared(self, one: Preparation, fd: int, _mask: int) -> None:
        found = list(one.next())
        if one.is_over:
            self._loop.forget(fd)
            one.close()
        for name, loaded in found:
            self._take(name, loaded)

    def _give_up(self, one: Preparation) -> None:
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
