"""What the supervisor tells its workers of the configuration: text, secrets, addresses in force."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyforwarder.config import Config, parse_config


@dataclass(frozen=True, slots=True)
class Settings:
    """What the supervisor tells its workers: all that a generation is made of, and nothing else.

    A worker cannot read key files (it has no privilege), so their content travels along.
    """

    config_text: str
    source: str
    overrides: Mapping[str, str]  # see `with_overrides`
    keys: Mapping[str, bytes]
    # Listener name -> its addresses in force, port 0 resolved, in the order of its sockets.
    binds: Mapping[str, tuple[str, ...]]
    # "listener", "listener rule" or "upstream NAME SERVER" -> its counters
    indexes: Mapping[str, int]
    passwords: Mapping[str, bytes] = field(default_factory=dict)  # by users' names
    # Listener name -> what packets of its connections, and of those to their servers, may have.
    mtus: Mapping[str, int] = field(default_factory=dict)

    drained: tuple[tuple[str, str], ...] = ()  # upstream and server, of the command `server`

    def to_json(self) -> str:
        """Return the settings as text, for a pipe to another process."""
        return json.dumps(
            {
                "config_text": self.config_text,
                "source": self.source,
                "overrides": dict(self.overrides),
                "keys": _as_text(self.keys),
                "passwords": _as_text(self.passwords),
                "binds": dict(self.binds),
                "indexes": dict(self.indexes),
                "mtus": dict(self.mtus),
                "drained": list(self.drained),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings that `to_json` has written."""
        fields: dict[str, Any] = json.loads(text)
        for secrets in ("keys", "passwords"):
            fields[secrets] = {n: base64.b64decode(text) for n, text in fields[secrets].items()}
        fields["drained"] = tuple((upstream, server) for upstream, server in fields["drained"])
        fields["binds"] = {name: tuple(binds) for name, binds in fields["binds"].items()}
        return cls(**fields)

    def config(self) -> Config:
        """The configuration with the command line's overrides."""
        return with_overrides(parse_config(self.config_text, source=self.source), self.overrides)


def _as_text(secrets: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(secret).decode() for name, secret in secrets.items()}


def with_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """`--listen` replaces the first TCP listener's address, `--datapath` every choice of datapath.

    `log` is the level of the log (`up -v`).
    `moved` is what `listen_port` was told: a listener's name, a blank, and its port.

    Raises:
        ConfigError: the listener cannot listen there.
    """
    if "listen" in overrides:
        config = config.listening_on(overrides["listen"])
    if "moved" in overrides:
        name, _, port = overrides["moved"].rpartition(" ")
        config = config.with_port(name, int(port))
    if "datapath" in overrides:
        listeners = tuple(
            listener.model_copy(
                update={
                    "datapath": None,
                    "rules": tuple(
                        rule.model_copy(update={"datapath": None}) for rule in listener.rules
                    ),
                }
            )
            for listener in config.listeners
        )
        config = config.model_copy(
            update={"datapath": overrides["datapath"], "listeners": listeners}
        )
    if "log" in overrides:
        config = config.model_copy(
            update={"log": config.log.model_copy(update={"level": overrides["log"]})}
        )
    return config
