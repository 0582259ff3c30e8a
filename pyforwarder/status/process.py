"""What runs in the process that answers HTTP: a loop, and a server for each address."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyforwarder.core.password import is_hash
from pyforwarder.runtime.loop import Loop
from pyforwarder.status.gate import Gate
from pyforwarder.status.history import History
from pyforwarder.status.metrics import Source, metrics_site
from pyforwarder.status.sampling import Sampler
from pyforwarder.status.server import Server
from pyforwarder.status.site import PageSite, read_files
from pyforwarder.status.steering import SupervisorLink

if TYPE_CHECKING:
    import mmap

    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.counters import Counters
    from pyforwarder.status.page_data import About, HealthChange
    from pyforwarder.status.plan import Plan


@dataclass(frozen=True, slots=True)
class PageSource:
    """Everything that the page shows, and who may see it."""

    about: About
    plan: Plan
    counters: Counters
    windows: Sequence[mmap.mmap]
    passwords: Mapping[str, bytes]
    health: tuple[HealthChange, ...]
    down: frozenset[tuple[str, str]]
    unix_time_s: Callable[[], float]


class Serving:
    """The prepared process: `run` serves until the supervisor goes."""

    def __init__(self, loop: Loop, fds: Sequence[int]) -> None:
        self._loop = loop
        self.fds = fds

    def run(self) -> None:
        """Answer until the supervisor goes."""
        self._loop.run()


def prepare(
    sockets: Mapping[str, socket.socket],
    source: Source,
    page: PageSource | None,
    channel: Channel,
) -> Serving:
    """Read what has to be read while it may be, and watch the sockets, by their keys.

    The sockets and the channel stay the caller's.
    """
    loop = Loop()
    if "metrics" in sockets:
        Server(loop, sockets["metrics"], metrics_site(source))
    site: PageSite | None = None

    def changed(change: HealthChange) -> None:
        if site is not None:
            site.health_changed(change)

    def fleet_changed(fleet: list[Any]) -> None:
        source.fleet[:] = fleet

    def exchanged(exchanges: list[Any]) -> None:
        source.exchanges[:] = exchanges

    link = SupervisorLink(loop, channel, changed, fleet_changed, exchanged)
    if page is not None and "status" in sockets:
        site = page_site(loop, page, link)
        Server(loop, sockets["status"], site)
    return Serving(loop, [loop.fileno(), *(sock.fileno() for sock in sockets.values())])


def page_site(loop: Loop, page: PageSource, link: SupervisorLink | None) -> PageSite:
    """The site of one daemon."""
    status = page.about.config.status
    assert status is not None
    passwords = {name: page.passwords[name] for name in status.users}
    if any(map(is_hash, passwords.values())):
        # Once we are nobody, their files may not be ours to read.
        import argon2  # noqa: F401
        import bcrypt  # noqa: F401
    gate = Gate(hosts=status.hosts, passwords=passwords)
    return PageSite(
        loop,
        page.about,
        Sampler(page.plan, page.counters, page.windows),
        History(page.plan),
        gate,
        link,
        files=read_files(),
        health=page.health,
        down=page.down,
        unix_time_s=page.unix_time_s,
    )
