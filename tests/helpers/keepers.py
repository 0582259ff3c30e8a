"""The keeper of a daemon, and what happens to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon


def keeper_of(daemon: Daemon) -> psutil.Process:
    """The only one of the daemon's children that stays root."""
    children = psutil.Process(daemon.process.pid).children()
    (keeper,) = (child for child in children if child.uids().real == 0)
    return keeper


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It does nothing meanwhile."""
    process.suspend()
    try:
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "it is stopped")
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
