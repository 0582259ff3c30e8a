"""A store as a configuration names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.fleet.files import read_files
from pyforwarder.fleet.store import REQUEST_TIMEOUT_S, Store

if TYPE_CHECKING:
    from pyforwarder.config import Fleet


def open_store(fleet: Fleet, *, timeout_s: float = REQUEST_TIMEOUT_S) -> Store:
    """The store, its files read; no connection is made yet. A request waits so long for a member.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    return Store(fleet, read_files(fleet), timeout_s=timeout_s)
