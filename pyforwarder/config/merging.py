"""One configuration out of a file's text and the text that a fleet shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import ValidationError

from pyforwarder.config.document import Node, read_document
from pyforwarder.config.model import Config
from pyforwarder.config.problems import config_error
from pyforwarder.config.values import parse_networks, parse_server, suggestion
from pyforwarder.errors import ConfigError

# What may stand in a fleet's configuration; the rest is each machine's own.
SHARED_KEYS: Final = ("listeners", "upstreams")
# A machine whose listeners are all in the store may have none.
_SOME_FLEET: Final = {"endpoints": ["http://127.0.0.1:2379"], "name": "shared"}


def check_shared(text: str, own: str, *, source: str) -> None:
    """Whether a text can be a fleet's configuration, on a machine whose own text is `own`.

    Its rules may name the machine's token keys and users, and nothing else that is not in it.

    Raises:
        ConfigError: with the line and the key of the first thing that is wrong.
    """
    document = read_document(text, source=source)
    if document.entries is None:
        raise ConfigError(f"must be keys and values ({', '.join(SHARED_KEYS)})", source=source)
    for key, line in document.key_lines.items():
        if key not in SHARED_KEYS:
            hint = suggestion(key, SHARED_KEYS)
            raise ConfigError(
                f"{key!r} is each machine's own, {hint}",
                path=key,
                line=line,
                source=source,
            )
    mapping = as_mapping(read_document(own, source="own"))
    named = {key: value for key, value in mapping.items() if key in ("tokens", "users")}
    shared = {"listeners": [], "fleet": _SOME_FLEET, **named, **as_mapping(document)}
    try:
        Config.model_validate(shared)
    except ValidationError as error:
        raise config_error(error, document, source=source) from error


def as_mapping(document: Node) -> dict[str, Any]:
    """A document's keys and values; none if it is no mapping."""
    plain = document.plain()
    return plain if isinstance(plain, dict) else {}


def merged_text(
    own: str,
    shared: str,
    servers: Mapping[str, Mapping[str, int]],
    *,
    own_source: str,
    shared_source: str,
) -> str:
    """The text of the whole: listeners and upstreams of both, servers that have registered.

    `servers` are weights by upstream and address. Those of an upstream that takes none, or not from
    that address (`registered: [10.0.0.0/8]`), and those that stand there anyway, are left out.

    Both have been checked by themselves.

    Raises:
        ConfigError: both have an upstream or a listener of the same name.
    """
    shared_document = read_document(shared, source=shared_source)
    whole = as_mapping(read_document(own, source=own_source))
    other = as_mapping(shared_document)
    for key, add in (("listeners", _add_listeners), ("upstreams", _add_upstreams)):
        if other.get(key) is not None:
            add(whole, other[key], shared_document, shared_source)
    if whole.get("upstreams"):
        whole["upstreams"] = {
            name: _with_servers(upstream, servers.get(name, {}))
            for name, upstream in whole["upstreams"].items()
        }
    return json.dumps(whole)


def merged_document(own: Node, shared: str, *, shared_source: str) -> Node:
    """The document in which each part of `merged_text` has its file and its line.

    `own` stays as it is. Servers that have registered stand in no line, and are left out. Both
    have been checked.
    """
    other = read_document(shared, source=shared_source)
    if own.entries is None or other.entries is None:
        return own
    whole = replace(own, entries=dict(own.entries), key_lines=dict(own.key_lines))
    assert whole.entries is not None
    for key in SHARED_KEYS:
        more = other.entries.get(key)
        if more is None or (more.items is None and more.entries is None):
            continue
        present = whole.entries.get(key)
        if present is None or (present.items is None and present.entries is None):
            present = Node(more.line, file=shared_source)
            whole.key_lines[key] = other.key_lines[key]
        whole.entries[key] = _joined(present, more, shared_source)
    return whole


def _joined(present: Node, more: Node, source: str) -> Node:
    """A list or a mapping with what another one of the same kind has, which knows its `source`."""
    if more.items is not None:
        added = [replace(one, file=source, number=n) for n, one in enumerate(more.items)]
        return replace(present, items=[*(present.items or ()), *added], entries=None)
    entries = {name: replace(one, file=source) for name, one in (more.entries or {}).items()}
    return replace(
        present,
        items=None,
        entries={**(present.entries or {}), **entries},
        key_lines={**present.key_lines, **more.key_lines},
    )


def _add_listeners(whole: dict[str, Any], more: Any, document: Node, source: str) -> None:
    own = whole.get("listeners") or []
    names = {item["name"] for item in own if isinstance(item, dict) and item.get("name")}
    for index, item in enumerate(more):
        if isinstance(item, dict) and item.get("name") in names:
            path, line = document.locate(["listeners", index, "name"])
            raise ConfigError(
                f"this machine has a listener {item['name']!r} of its own",
                path=path,
                line=line,
                source=source,
            )
    whole["listeners"] = [*own, *more]


def _add_upstreams(whole: dict[str, Any], more: Any, document: Node, source: str) -> None:
    own = whole.get("upstreams") or {}
    for name in more:
        if name in own:
            path, line = document.locate(["upstreams", name])
            raise ConfigError(
                f"this machine has an upstream {name!r} of its own",
                path=path,
                line=line,
                source=source,
            )
    whole["upstreams"] = {**own, **more}


def _with_servers(upstream: dict[str, Any], registered: Mapping[str, int]) -> dict[str, Any]:
    if not upstream.get("registered"):
        return upstream
    networks = parse_networks(upstream["registered"])
    servers = list(upstream.get("servers") or [])
    present = {
        str(parse_server(server["address"] if isinstance(server, dict) else server))
        for server in servers
    }
    for address, weight in sorted(registered.items()):
        host = address.rpartition(":")[0].strip("[]")
        if address not in present and networks.contains(host):
            servers.append({"address": address, "weight": weight})
    return {**upstream, "servers": servers}
