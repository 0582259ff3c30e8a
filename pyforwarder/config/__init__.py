"""The configuration: read, checked, and as frozen values.

`document` reads YAML and remembers lines, `values` and `match` say what single values may be,
`model` and its neighbours (`listener`, `upstream`, `limits`, `fleet`) say which keys there are,
`problems` turns complaints into `ConfigError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from pyforwarder.config.document import MAX_BYTES
from pyforwarder.config.fleet import Failover, Fleet
from pyforwarder.config.including import Loaded, load
from pyforwarder.config.limits import ClientPrefix, Limits, ListenerLimits
from pyforwarder.config.listener import FirstPacket, Listener, ProxyProtocol, Rule
from pyforwarder.config.model import Config, Handover, Log, Metrics, Timeouts, Tokens
from pyforwarder.config.problems import config_error
from pyforwarder.config.upstream import Ejection, Health, Server, Upstream
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config.document import Node

__all__ = [
    "ClientPrefix",
    "Config",
    "Ejection",
    "Failover",
    "FirstPacket",
    "Fleet",
    "Handover",
    "Health",
    "Limits",
    "Listener",
    "ListenerLimits",
    "Log",
    "Metrics",
    "ProxyProtocol",
    "Rule",
    "Server",
    "Timeouts",
    "Tokens",
    "Upstream",
    "load_config",
    "load_whole",
    "parse_config",
    "read_config_text",
    "validated",
]


def read_config_text(path: Path, *, source: str | None = None) -> str:
    """A config file's text, to be passed on before it is parsed.

    `source` is what errors call it (None: its path).

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB or is not UTF-8.
    """
    source = source or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(error.strerror or str(error), source=source) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB", source=source)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", line=line, source=source) from error


def load_config(path: Path | None) -> Config:
    """The configuration in a file, or the built-in one.

    Raises:
        ConfigError: the file cannot be read or used.
    """
    if path is None:
        return parse_config("", source="built-in")
    return validated(load_whole(path).document, source=str(path))


def load_whole(path: Path, *, source: str | None = None) -> Loaded:
    """A config file and what it includes: the text of the whole, and where each part stands.

    Raises:
        ConfigError: a file cannot be read, or they do not fit each other.
    """
    source = source or str(path)
    text = read_config_text(path, source=source)
    return load(text, source=source, path=path, read=read_config_text)


def validated(document: Node, *, source: str) -> Config:
    """The configuration in a document; `source` is what errors call it.

    Raises:
        ConfigError: as `parse_config`.
    """
    plain = document.plain()
    try:
        return Config.model_validate({} if plain is None else plain)
    except ValidationError as error:
        raise config_error(error, document, source=source) from error


def parse_config(text: str, *, source: str) -> Config:
    """The configuration in a YAML text; `source` is what errors call it.

    It stands in no file, so what it includes has to be an absolute path.

    Raises:
        ConfigError: with the line and the key (`listeners[0].rules[1].allow`) of the first thing
            that is wrong; its message lists the others too.
    """
    loaded = load(text, source=source, path=None, read=read_config_text)
    return validated(loaded.document, source=source)
