"""The configuration: read, checked, and as frozen values.

`document` reads YAML and remembers lines, `values` and `match` say what single values may be,
`model` says which keys there are, `problems` turns complaints into `ConfigError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from pyforwarder.config.document import MAX_BYTES, read_document
from pyforwarder.config.model import (
    Config,
    Ejection,
    FirstPacket,
    Handover,
    Health,
    Limits,
    Listener,
    Log,
    Metrics,
    ProxyProtocol,
    Rule,
    Server,
    Timeouts,
    Tokens,
    Upstream,
)
from pyforwarder.config.problems import config_error
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Config",
    "Ejection",
    "FirstPacket",
    "Handover",
    "Health",
    "Limits",
    "Listener",
    "Log",
    "Metrics",
    "ProxyProtocol",
    "Rule",
    "Server",
    "Timeouts",
    "Tokens",
    "Upstream",
    "load_config",
    "parse_config",
    "read_config_text",
]


def read_config_text(path: Path) -> str:
    """A config file's text, for whoever passes it on before it is parsed.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(error.strerror or str(error), source=str(path)) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB", source=str(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", line=line, source=str(path)) from error


def load_config(path: Path | None) -> Config:
    """The configuration in a file, or the built-in one.

    Raises:
        ConfigError: the file cannot be read or used.
    """
    if path is None:
        return parse_config("", source="built-in")
    return parse_config(read_config_text(path), source=str(path))


def parse_config(text: str, *, source: str) -> Config:
    """The configuration in a YAML text; `source` is what errors call it.

    Raises:
        ConfigError: with the line and the key (`listeners[0].rules[1].allow`) of the first thing
            that is wrong; its message lists the others too.
    """
    document = read_document(text, source=source)
    plain = document.plain()
    try:
        return Config.model_validate({} if plain is None else plain)
    except ValidationError as error:
        raise config_error(error, document, source=source) from error
