"""How large an instance is: its workers, and the descriptors that its processes may have."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

from pyforwarder.worker.room import express_slots, places_for, room_for

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.supervisor.takeover.predecessor import Predecessor
    from pyforwarder.worker.log import Log


def count_workers(config: Config, predecessor: Predecessor | None, log: Log) -> int:
    """How many workers there are: as many as a predecessor has, if there is one."""
    workers = (os.cpu_count() or 1) if config.workers == "auto" else int(config.workers)
    workers = min(workers, 255)
    if predecessor is None:
        return workers
    # Each of the predecessor's sockets needs a worker that accepts, and each of its workers one
    # that gets its pairs.
    if workers != predecessor.offer.workers:
        log.write("warning", "restart_needed", keys="workers")
    return predecessor.offer.workers


def raise_limits(config: Config, workers: int, log: Log) -> None:
    """Have as many descriptors as we may, and say so if they are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    places = places_for(config, workers)
    clients = room_for(config, express_slots(places, workers)).clients
    if clients * workers < config.limits.pairs:
        log.write(
            "warning",
            "few_descriptors",
            limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            pairs_per_worker=clients,
            configured=config.limits.pairs,
        )
