"""Rules and first packets for the tables of `core/express`."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from hypothesis import strategies as st

from pyforwarder.config import parse_config
from pyforwarder.core.address import Address
from pyforwarder.core.express.compiling import Compiled, compile_table
from pyforwarder.core.rule_compiling import compile_rules
from tests.helpers.first_packets import CLIENTS, client_hello, mutated_clients

if TYPE_CHECKING:
    from pyforwarder.core.routing import Ruleset

LOCAL: Final = Address("127.0.0.1", 9999)
CLIENT: Final = "192.0.2.7"
SERVER: Final = "127.0.0.1:1"
OWN: Final = "127.0.0.3:9999"  # as of a listener of this forwarder that came another way

NAMES: Final = ["example.com", "a.example.com", "b.example.com", "example.org", "x"]
LEAVES: Final[list[object]] = [
    "any",
    "silence",
    "mysql",
    "ssh",
    "tls",
    "http",
    {"bytes": {"prefix": "GET "}},
    {"bytes": {"prefix": ["hex:1603", "SSH-2.0-", "SSH-"]}},
    {"bytes": {"prefix": "E", "offset": 1}},
    {"tls": {"sni": "example.com"}},
    {"tls": {"alpn": ["h2", "http/1.1"]}},
    {"tls": {"alpn": "http/1.1", "sni": "*"}},
    {"tls": {"sni": ["a.example.com", "*.example.org", "*"]}},
    {"tls": {"sni": ["*.com", "*ample.com"]}},
    {"http": {"method": ["GET", "HEAD"]}},
    {"http": {"host": ["example.com", "*.example.com"]}},
    {"http": {"host": "*", "method": "POST"}},
    {"client": ["192.0.2.0/24", "2001:db8::/32"]},
    {"client": ["loopback", "private"]},
    {"client": "any"},
    {"client": "::/0"},
    {"port": [9999]},
    {"port": ["1-100"]},
]
# What only userspace can tell.
OTHERS: Final[list[object]] = [
    {"tls": {"version": "1.3"}},
    {"tls": {"sni": "a*.example.com"}},
    {"http": {"path": "/v1/*"}},
    {"client": "public"},
    {"regex": "^E"},
    "rdp",
]
matches = st.recursive(
    st.sampled_from(LEAVES * 3 + OTHERS),
    lambda inner: st.one_of(
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda parts: {"all": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"any_of": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)
rule_lists = st.lists(
    st.builds(
        lambda match, fate: {"match": match, **fate},
        matches,
        st.sampled_from([{"to": SERVER}, {"to": SERVER}, {"reject": "reset"}, {"to": "name:1"}]),
    ),
    min_size=1,
    max_size=5,
)
clients = st.sampled_from(["192.0.2.7", "127.0.0.1", "10.1.2.3", "8.8.8.8", "2001:db8::1", "::1"])


def http_request(host: str | None, *, method: str = "GET", target: str = "/") -> bytes:
    header = "" if host is None else f"Host: {host}\r\n"
    return f"{method} {target} HTTP/1.1\r\nAccept: */*\r\n{header}\r\n".encode()


first_packets = st.one_of(
    mutated_clients(),
    st.binary(max_size=40),
    st.sampled_from(list(CLIENTS.values())),
    st.sampled_from(NAMES).map(lambda name: client_hello(name.encode())),
    st.builds(
        lambda name, method: http_request(name, method=method),
        st.sampled_from([*NAMES, "EXAMPLE.com:80", "a.b.example.com.", "[::1]:80", "", None]),
        st.sampled_from(["GET", "POST", "CONNECT", "get"]),
    ),
    st.just(client_hello(None)),
)


Rules = Sequence[Mapping[str, object]]


def compiled(
    rules: Rules,
    *,
    local: Address = LOCAL,
    top: Mapping[str, object] | None = None,
    listener: Mapping[str, object] | None = None,
) -> tuple[Ruleset, Compiled]:
    """The rules of a listener, for userspace and for the kernel."""
    written = {"bind": str(local), "rules": list(rules), **(listener or {})}
    config = parse_config(json.dumps({"listeners": [written], **(top or {})}), source="test")
    ruleset = compile_rules(config.listeners[0])
    return ruleset, compile_table(
        config, config.listeners[0], ruleset, local, is_own=lambda server: str(server) == OWN
    )


def decided(
    rules: Rules,
    data: bytes,
    *,
    local: Address = LOCAL,
    top: Mapping[str, object] | None = None,
    listener: Mapping[str, object] | None = None,
) -> int | None:
    """The rule that the kernel would have taken a client's connection by."""
    _, found = compiled(rules, local=local, top=top, listener=listener)
    return found.table.decide(data, ipaddress.ip_address(CLIENT)) if found.table else None
