"""How many clients, sessions and places of express the limit on open files has room for."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.splice.keeper_asker import MOST_HELD

if TYPE_CHECKING:
    from pyforwarder.config import Config

# Descriptors that a worker needs beside its connections: maps, rings, epoll, channel, log, spare.
_OWN_DESCRIPTORS: Final = 192 + 2 * MOST_HELD
_TOLD: Final = 1024  # clients beyond the limit on pairs


@dataclass(frozen=True, slots=True)
class Room:
    """How many clients of each kind one worker may have at once, by its descriptors."""

    clients: int  # two descriptors each
    sessions: int  # one each


def room_for(config: Config, opened: int) -> Room:
    """What the limit on open files leaves, TCP and UDP apart: neither can use up the other's.

    A few more than the configured limits, for those who are only told that there is no room. So
    many of the pairs that the kernel has `opened` the worker may get besides (`express_slots`).
    """
    files = max(_files_for(config) - 2 * opened, 4)
    sessions = 0
    if any(listener.protocol == "udp" for listener in config.listeners):
        # A quarter is left for UDP where there is not enough for all.
        clients_want = 2 * (config.limits.pairs + _TOLD)
        sessions = min(config.limits.most_sessions, max(files - clients_want, files // 4))
    return Room(max(1, min(config.limits.pairs + _TOLD, (files - sessions) // 2)), sessions)


def _files_for(config: Config) -> int:
    """The descriptors that a worker may have for its clients; below 0: too few."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    addresses = sum(len(listener.addresses) for listener in config.listeners)
    return files - _OWN_DESCRIPTORS - addresses


def places_for(config: Config, workers: int) -> int:
    """How many connections that the kernel opens there may be at once; 0: none is asked for.

    A worker has two descriptors for each that lasts, which may be half of those that it has for
    clients; and the keeper has one for each port, which may be half of all.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, min(config.express_ports, files // 2, _files_for(config) // 4 * workers))


def slots_of(config: Config, workers: int) -> int:
    """A worker's share of the pair table: room for all its TCP clients, and some for UDP sessions.

    More listeners for UDP may come by a reload, which cannot make the table larger.
    """
    share = express_slots(places_for(config, workers), workers)
    room = room_for(config, share)
    sessions = config.limits.most_sessions
    return (
        room.clients
        + share
        + max(min(room.sessions, 2 * sessions // workers), min(sessions, _TOLD))
    )


def express_slots(places: int, workers: int) -> int:
    """How many of the pairs that the kernel has opened a worker may get: the keeper shares them."""
    return -(-places // workers)
