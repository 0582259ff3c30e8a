"""What is allowed in a configuration and hardly meant: rules that never match, open key files.

An error would be too much: a rule may be kept for another day, and lists of rules that several
listeners share hold conditions that only one of them can fulfil.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyforwarder.config.document import read_document
from pyforwarder.config.failover_warnings import failover_warnings
from pyforwarder.config.match import bare_protocol, required_protocols
from pyforwarder.core.address import Address, NameIn
from pyforwarder.core.first_packet.matcher import ListenerFacts
from pyforwarder.core.first_packet.table import Terms, build

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config.document import Node
    from pyforwarder.config.listener import Listener
    from pyforwarder.config.model import Config

# Beyond these the first ones have to be mended anyway.
MOST_WARNINGS: Final = 20
_OPEN: Final = stat.S_IRWXO | stat.S_IWGRP

_Warning = tuple[tuple[str | int, ...], str]


def config_warnings(config: Config, document: Node | str, *, source: str) -> list[str]:
    """Return a sentence for each doubt, with the line and the key.

    `document` is what `config` was read from, or its text.  Asks the host for the user and for the
    modes of the files with keys and passwords.
    """
    # What the command line has put in its place stands in no line of the file.
    has_lines = bool(document)
    if isinstance(document, str):
        document = read_document(document, source=source)
    found = []
    for at, reason in _doubts(config):
        file, path, line = document.place(at)
        parts = (file or source, f"line {line}" if has_lines else "", path)
        where = ", ".join(part for part in parts if part)
        found.append(f"{where}: {reason}")
    found += _written_by_others(document)
    if len(found) > MOST_WARNINGS:
        found[MOST_WARNINGS:] = [f"and {len(found) - MOST_WARNINGS} more"]
    return found


def _doubts(config: Config) -> Iterator[_Warning]:
    for position, listener in enumerate(config.listeners):
        for at, reason in _rules_without_effect(listener):
            yield ("listeners", position, *at), reason
    for key_id, path in config.tokens.keys.items():
        yield from _open_file(path, ("tokens", "keys", key_id))
    for name, path in config.users.items():
        yield from _open_file(path, ("users", name))
    yield from _checked_by_another_protocol(config)
    yield from failover_warnings(config)
    yield from _without_limits(config)
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        yield ("user",), f"no user {config.user!r} on this host: `up` as root would refuse to start"


def _checked_by_another_protocol(config: Config) -> Iterator[_Warning]:
    """A server that takes datagrams alone refuses every check, and is down."""
    protocols: dict[str, set[str]] = {}
    for listener in config.listeners:
        for rule in listener.rules:
            if isinstance(rule.to, str):
                protocols.setdefault(rule.to, set()).add(listener.protocol)
    for name, upstream in config.upstreams.items():
        if upstream.health is not None and protocols.get(name) == {"udp"}:
            yield (
                ("upstreams", name, "health"),
                "only UDP listeners use it, and a check is a TCP connect: a server that takes no "
                "TCP there is down",
            )


def _without_limits(config: Config) -> Iterator[_Warning]:
    """What is shared of nothing."""
    sections = [config.limits, *(listener.limits for listener in config.listeners)]
    is_set = any(one.pairs_per_client or one.sessions_per_client for one in sections)
    # Listeners in the store may have limits of their own.
    if config.shares_limits and config.listeners and not is_set:
        yield (
            ("fleet", "limits", "scope"),
            "no limit holds in the fleet: neither `pairs_per_client` nor `sessions_per_client`",
        )


def _rules_without_effect(listener: Listener) -> Iterator[_Warning]:
    ports = {bind.port for bind in listener.addresses if isinstance(bind, Address)}
    facts = ListenerFacts(
        # Port 0: the kernel chooses, and so any port may be it; of systemd's sockets nothing is
        # known here.
        ports=None if 0 in ports or listener.takes_systemd_sockets else frozenset(ports),
        is_unix=listener.is_unix,
        max_bytes=listener.first_packet.max_bytes,
    )
    terms = Terms(datagrams=listener.protocol == "udp")
    takes_all = ""
    taken: dict[str, str] = {}  # protocols, and the rules that take all of their connections
    for index, rule in enumerate(listener.rules):
        if takes_all:
            yield ("rules", index), f"is never reached: the rule {takes_all!r} takes everything"
            continue
        for word in sorted(required_protocols(rule.match) & taken.keys()):
            yield (
                ("rules", index),
                f"is never reached: the rule {taken[word]!r} takes every {word} connection",
            )
            break
        matcher = build(rule.match, terms)
        why = matcher.never(facts)
        if why:
            yield ("rules", index, "match"), f"can never match: {why}"
        elif matcher.always:
            takes_all = rule.name
        word = "" if why else bare_protocol(rule.match)
        # With `to: sni` it leaves those without a name; and which instructions a rule takes
        # depends on its `token`.
        if word and word != "instruction" and not isinstance(rule.to, NameIn):
            taken.setdefault(word, rule.name)


def _written_by_others(document: Node) -> Iterator[str]:
    """Who may write what is included may bind any port, and lead clients anywhere."""
    for path in document.included:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # it has been read a moment ago
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield f"{path}: others may write it (mode {mode & 0o7777:04o}): chmod go-w {path}"


def _open_file(path: Path, at: tuple[str | int, ...]) -> Iterator[_Warning]:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # reading it fails as well, and that is an error of its own
    if mode & _OPEN:
        yield at, f"{path}: others may use it (mode {mode & 0o7777:04o}): chmod 0600 {path}"
