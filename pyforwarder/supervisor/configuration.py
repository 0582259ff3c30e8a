"""The configuration: where it comes from, which is in force, and what workers are told of it."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyforwarder.address import Address
from pyforwarder.config import Config, parse_config, read_config_text
from pyforwarder.errors import ConfigError, ForwarderError
from pyforwarder.key_files import read_keys, read_passwords
from pyforwarder.routing import compile_rules
from pyforwarder.supervisor.listeners import BoundListener, Listeners
from pyforwarder.worker.channel import MOST_LISTENERS
from pyforwarder.worker.generation import Settings, counter_indexes, with_overrides

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.counters import Directory
    from pyforwarder.supervisor import UpOptions


class ConfigSource:
    """A file, or what is built in, and what the command line says instead of it."""

    def __init__(self, options: UpOptions) -> None:
        self._path = options.config_path
        self.name = "built-in" if self._path is None else str(self._path)
        # See `with_overrides`; what `listen_port` was told is added here.
        self.overrides = {
            key: value
            for key, value in (("listen", options.listen), ("datapath", options.datapath))
            if value is not None
        }

    def read(self) -> tuple[str, Config]:
        """The text as it is now, and what it says.

        Raises:
            ForwarderError: it cannot be read, or is wrong.
        """
        text = "" if self._path is None else read_config_text(self._path)
        return text, self.parse(text)

    def parse(self, text: str) -> Config:
        """What a text from here says, and the overrides.

        Raises:
            ConfigError: it is wrong, or they do not fit it.
        """
        config = with_overrides(parse_config(text, source=self.name), self.overrides)
        if len(config.listeners) > MOST_LISTENERS:
            raise ConfigError(f"more than {MOST_LISTENERS} listeners", path="listeners")
        return config

    @contextlib.contextmanager
    def moving(self, listener: str, port: int) -> Iterator[None]:
        """`listen_port`: the listener is at another port from here on, unless the body raises."""
        before = dict(self.overrides)
        self.overrides["moved"] = f"{listener} {port}"
        try:
            yield
        except ForwarderError:
            self.overrides = before
            raise


@dataclass(frozen=True, slots=True)
class Change:
    """A configuration that can be in force: its listeners are bound, its rules compile."""

    config: Config
    settings: Settings
    following: Mapping[str, BoundListener]  # all of its listeners by name
    obsolete: list[BoundListener]  # those that it has no more


class InForce:
    """The configuration in force, the settings that workers have of it, and its listeners."""

    config: Config
    settings: Settings

    def __init__(
        self, source: ConfigSource, *, workers: int, directory: Directory, mtu: Callable[[], int]
    ) -> None:
        """Nothing is in force before the first `take`.

        `mtu` says what packets may have where pairs can be spliced between interfaces; 0: any.
        """
        self._source = source
        self._directory = directory
        self._mtu = mtu
        self.listeners = Listeners(workers)

    def change_to(self, text: str, config: Config) -> Change:
        """Everything about a change that can fail; until it is taken, nothing has changed.

        The caller takes and commits it, or else abandons it.

        Raises:
            ForwarderError: an address cannot be bound, or a rule or a key file cannot be used.
        """
        following, obsolete = self.listeners.change_to(config)
        try:
            settings = self._make_settings(text, config, following)
        except ForwarderError:
            self.listeners.abandon(following)
            raise
        return Change(config, settings, following, obsolete)

    def abandon(self, change: Change) -> None:
        """The change does not come."""
        self.listeners.abandon(change.following)

    def take(self, change: Change) -> None:
        """This is what workers are to be told from here on, the new listeners included."""
        self.config, self.settings = change.config, change.settings
        self.listeners.bound = dict(change.following)

    def commit(self, change: Change) -> None:
        """Now that all know of the change: close the listeners that are no more."""
        self.listeners.commit(change.config, change.following, change.obsolete)
        self.listeners.limit_packets(change.settings.mtus)

    def _make_settings(
        self, text: str, config: Config, bound: Mapping[str, BoundListener]
    ) -> Settings:
        """What workers are told; compiles the rules once, so that they cannot fail over it.

        Raises:
            ConfigError: a rule or a key file cannot be used.
        """
        keys, passwords = read_keys(config), read_passwords(config)
        for index, listener in enumerate(config.listeners):
            compile_rules(listener, None, passwords=passwords, path=f"listeners[{index}]")
        return Settings(
            config_text=text,
            source=self._source.name,
            overrides=dict(self._source.overrides),  # they may be tried out and taken back
            keys=keys,
            binds={name: str(listener.bind) for name, listener in bound.items()},
            indexes=counter_indexes(config, self._directory),
            passwords=passwords,
            mtus=_mtus(config, self._mtu()),
        )


def _mtus(config: Config, mtu: int) -> dict[str, int]:
    """By listener, where its pairs can be spliced between interfaces."""
    return {
        listener.name: mtu
        for listener in config.listeners
        if mtu
        and listener.splice
        and isinstance(listener.bind, Address)
        and not ipaddress.ip_address(listener.bind.host).is_loopback
    }
