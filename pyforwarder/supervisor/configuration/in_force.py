"""The configuration: where it comes from, which is in force, and what workers are told of it."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pyforwarder.config import Config, load_whole, parse_config, validated
from pyforwarder.config.document import read_document
from pyforwarder.config.key_files import read_keys, read_passwords
from pyforwarder.config.merging import check_shared, merged_document, merged_text
from pyforwarder.config.values import suggestion
from pyforwarder.config.warnings import config_warnings
from pyforwarder.core.address import Address
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.errors import ForwarderError, UsageError
from pyforwarder.supervisor.listeners.binding import Bound, BoundSocket, Listeners
from pyforwarder.worker.generation import counter_indexes
from pyforwarder.worker.settings import Settings, with_overrides

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.config.document import Node
    from pyforwarder.config.including import Loaded
    from pyforwarder.runtime.counters import Directory
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.listeners.activation import Activation


@dataclass(frozen=True, slots=True)
class Shared:
    """What a fleet's store has for all of its machines."""

    fleet: str = ""  # its name
    serial: int = 0  # of the edition; 0: there is none
    text: str = ""
    servers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # weights


@dataclass(frozen=True, slots=True)
class _Joined:
    """A text of the whole, and what it was made of."""

    text: str = ""
    own: str = ""
    shared: str = ""
    shared_source: str = ""


class ConfigSource:
    """A file, or what is built in, what a fleet shares, and what the command line says instead."""

    def __init__(self, options: UpOptions) -> None:
        # The daemon leaves the directory that a relative path is in.
        self._path = None if options.config_path is None else options.config_path.absolute()
        # For another process, which may be in another directory.
        self.name_from_anywhere = None if self._path is None else str(self._path)
        self.name = "built-in" if options.config_path is None else str(options.config_path)
        # See `with_overrides`; what `listen_port` was told is added here.
        self.overrides = {
            key: value
            for key, value in (
                ("listen", options.listen),
                ("datapath", options.datapath),
                ("log", "debug" if options.verbosity else None),
            )
            if value is not None
        }

        self._loaded: Loaded | None = None  # as it was read last
        self._loaded_in_force: Loaded | None = None
        self._own = ""
        self._joined = _Joined()  # last
        self.shared = Shared()  # in force

    @property
    def own(self) -> str:
        """The file's text that is in force."""
        return self._own

    @own.setter
    def own(self, text: str) -> None:
        # The file may be read again, and refused: this one's lines are still to be known.
        self._loaded_in_force = self._loaded_as(text)
        self._own = text

    def read(self) -> tuple[str, Config]:
        """The text as it is now, with what the fleet shares, and what it says.

        Raises:
            ForwarderError: it cannot be read, or is wrong.
        """
        return self.joined(self.read_own(), self.shared)

    def read_own(self) -> str:
        """The file's text as it is now, with what it includes.

        Raises:
            ConfigError: it cannot be read, or is wrong.
        """
        if self._path is None:
            return ""
        self._loaded = loaded = load_whole(self._path, source=self.name)
        # Here, where it is known in which file and line each part stands.
        validated(loaded.document, source=self.name)
        return loaded.text

    def joined(self, own: str, shared: Shared) -> tuple[str, Config]:
        """The text of the whole, and what it says.

        Raises:
            ConfigError: one of both is wrong, or they do not fit each other.
        """
        config = self.parse(own)
        if config.fleet is None:
            self._joined = _Joined(own, own)
            return own, config
        if shared.fleet != config.fleet.name:
            shared = Shared()  # that of another
        source = f"fleet {config.fleet.name}, edition {shared.serial}"
        if shared.text:
            check_shared(shared.text, own, source=source)
        text = merged_text(
            own, shared.text, shared.servers, own_source=self.name, shared_source=source
        )
        self._joined = _Joined(text, own, shared.text, source)
        return text, self.parse(text)

    def parse(self, text: str) -> Config:
        """What a text from here says, and the overrides.

        Raises:
            ConfigError: it is wrong, or they do not fit it.
        """
        return with_overrides(parse_config(text, source=self.name), self.overrides)

    def warnings(self, text: str, config: Config) -> list[str]:
        """Return what a configuration has that is hardly meant, with the file and the line.

        `text` is what was read or joined last.
        """
        return config_warnings(config, self._document(text), source=self.name)

    def _document(self, text: str) -> Node | str:
        joined = self._joined
        own = joined.own if joined.text == text else text
        loaded = self._loaded_as(own)
        if joined.text != text or not joined.shared:
            return loaded.document if loaded else own
        document = loaded.document if loaded else read_document(own, source=self.name)
        return merged_document(document, joined.shared, shared_source=joined.shared_source)

    def _loaded_as(self, own: str) -> Loaded | None:
        """The file as it was read with this text; the last time, if more than once."""
        for loaded in (self._loaded, self._loaded_in_force):
            if loaded is not None and loaded.text == own:
                return loaded
        return None

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
    following: Mapping[str, Bound]  # all of its listeners by name
    obsolete: list[BoundSocket]  # of those that are bound, the ones that it has no more


class ConfigInForce:
    """The configuration in force, the settings that workers have of it, and its listeners."""

    config: Config
    settings: Settings

    def __init__(
        self,
        source: ConfigSource,
        *,
        workers: int,
        directory: Directory,
        mtu: Callable[[], int],
        activation: Activation,
    ) -> None:
        """Put nothing in force yet: `take` does.

        `mtu` says what packets may have where pairs can be spliced between interfaces; 0: any.
        """
        self._source = source
        self._directory = directory
        self._mtu = mtu
        # Upstream and server, told to take no new pairs; of those that are configured.
        self.drained: set[tuple[str, str]] = set()
        self.listeners = Listeners(workers, activation)
        self.changes = 0  # of what is in force, each of which may have brought other listeners

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
        """Make a change what workers are told from now on, with its new listeners."""
        self.config, self.settings = change.config, change.settings
        self.changes += 1
        self.drained &= servers_of(change.config)
        self.listeners.bound = dict(change.following)

    def drain(self, text: str, *, drained: bool) -> int:
        """Whether the server `UPSTREAM/SERVER` is to take no new pairs; workers are to be told.

        The server's weight: with 0 it takes none in either case.

        Raises:
            UsageError: there is no such server in the configuration in force.
        """
        # Either part may have a slash in it.
        configured = {
            f"{name}/{server}": (name, server) for name, server in servers_of(self.config)
        }
        if text not in configured:
            hint = suggestion(text, configured) or "no upstream is configured"
            raise UsageError(f"no server {text}: {hint}")
        if drained:
            self.drained.add(configured[text])
        else:
            self.drained.discard(configured[text])
        self.changes += 1
        self.settings = replace(self.settings, drained=tuple(sorted(self.drained)))
        name, address = configured[text]
        servers = self.config.upstreams[name].servers
        return next(one.weight for one in servers if str(one.address) == address)

    def commit(self, change: Change) -> None:
        """Close the listeners that are obsolete, once all workers know of the change."""
        self.listeners.commit(change.config, change.following, change.obsolete)
        self.listeners.limit_packets(change.settings.mtus)
        self.listeners.keep_alive(change.config.keepalive.terms)

    def _make_settings(self, text: str, config: Config, bound: Mapping[str, Bound]) -> Settings:
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
            binds={
                name: tuple(str(each.bind) for each in sockets) for name, sockets in bound.items()
            },
            indexes=counter_indexes(config, self._directory),
            passwords=passwords,
            drained=tuple(sorted(self.drained & servers_of(config))),
            mtus=_mtus(config, bound, self._mtu()),
        )


def servers_of(config: Config) -> set[tuple[str, str]]:
    """Each server that is configured, by its upstream and its own name."""
    return {
        (name, str(server.address))
        for name, upstream in config.upstreams.items()
        for server in upstream.servers
    }


def _mtus(config: Config, bound: Mapping[str, Bound], mtu: int) -> dict[str, int]:
    """The `mtu` for each listener, by name, whose pairs can be spliced between interfaces."""
    return {
        listener.name: mtu
        for listener in config.listeners
        if mtu
        and listener.splice
        and any(
            isinstance(each.bind, Address)
            and not ipaddress.ip_address(each.bind.host.partition("%")[0]).is_loopback
            for each in bound[listener.name]
        )
    }
