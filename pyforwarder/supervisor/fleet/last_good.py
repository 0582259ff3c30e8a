"""What a fleet had in force last, in a file: the store need not be there for the next start."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

from pyforwarder.errors import ConfigError
from pyforwarder.supervisor.configuration.in_force import Shared
from pyforwarder.supervisor.messages import FleetView

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config import Config
    from pyforwarder.supervisor.configuration.in_force import ConfigSource

_CACHE_MODE: Final = 0o600
_MOST_CACHED: Final = 16 << 20


class LastGood:
    """Reads and writes the file with the last edition of a fleet that was in force, for one
    instance.
    """

    def __init__(self, path: Path) -> None:
        """`path` need not exist, nor its directory."""
        self._path = path

    def read(self, fleet: str) -> Shared:
        """Return what the file has for this fleet; nothing if that cannot be used.

        Root's configuration comes out of it: a file that others could have written is not read.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    return Shared()
                content = json.loads(file.read(_MOST_CACHED))
            if content["fleet"] != fleet:
                return Shared()
            view = FleetView.model_validate(
                {key: content[key] for key in ("serial", "text", "servers")} | {"faults": []}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Shared()
        return Shared(fleet, view.serial, view.text, view.servers)

    def write(self, shared: Shared) -> None:
        """Keep this.

        Raises:
            OSError: it cannot be kept.
        """
        text = json.dumps(
            {
                "fleet": shared.fleet,
                "serial": shared.serial,
                "text": shared.text,
                "servers": {name: dict(servers) for name, servers in shared.servers.items()},
            }
        )
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _CACHE_MODE)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)


def read_first(source: ConfigSource, last_good: LastGood) -> tuple[str, Config, str]:
    """The configuration to begin with, as text and as a model: the machine's own, and the fleet's.

    Third, why what was kept of the fleet's does not go with the machine's own; empty: it does.

    Raises:
        ForwarderError: the machine's own configuration cannot be used.
    """
    own = source.read_own()
    config = source.parse(own)
    source.own = own
    check_files(config)
    not_kept = ""
    if config.fleet is not None:
        source.shared = last_good.read(config.fleet.name)
        try:
            return *source.joined(own, source.shared), not_kept
        except ConfigError as error:
            # The machine's own configuration has changed since.
            not_kept = str(error)
            source.shared = Shared()
    return *source.joined(own, source.shared), not_kept


def check_files(config: Config) -> None:
    """Whether the files that `fleet` names can be used.

    Raises:
        ConfigError: one cannot; it says which, and why.
    """
    if config.fleet is not None:
        from pyforwarder.fleet.files import read_files

        read_files(config.fleet)
