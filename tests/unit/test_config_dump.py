"""`check --dump`: the whole configuration as YAML that means the same."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.config import Config, parse_config, values
from pyforwarder.config.dump import dump_config
from pyforwarder.config.section import Section
from pyforwarder.errors import ConfigError
from tests.helpers.documents import blocks

ROOT = Path(__file__).parents[2]


def example(word: str) -> str:
    """The longest configuration in docs/configuration.md with this word in it."""
    found = [block.text for block in blocks("yaml") if word in block.text]
    return max(found, key=len)


TEXTS = [
    "",
    example("first_packet: {"),
    example("slow_start:").replace("*", "x"),
    (ROOT / "packaging" / "default.yaml").read_text(),
    "handover: {after_bytes: 1MiB}",
    "keepalive: off",
    "keepalive: {idle: 2m, interval: 1s, count: 127}",
    "handover: {after_bytes: 1MiB, splice_after_bytes: 0}",
    """
    listeners:
      - {bind: "unix:/x", mode: 0660, rules: [{match: [ssh, {tls: {}}], to: "unix:/y"}]}
      - bind: "[::1]:53"
        protocol: udp
        amplification: 3
        idle: 30s
        limits: {pairs: 5, sessions_per_client: 3}
        rules:
          - {match: {dns: {qname: "*.a.test"}, not: {client: loopback}}, to: a}
          - {match: {any: }, reject: close}
      - bind: 127.0.0.1:1
        limits: {pairs: 5, memory: 8MiB}
        proxy_protocol: {accept: true, trusted: [10.0.0.0/8, "2001:db8::/32"]}
        rules:
          - {match: tls, to: sni, port: 8443, allow: ["public:443,8000-9000"]}
          - {match: instruction, allow: [any], token: required}
    upstreams:
      a: {servers: [a.test:1, {address: "[::1]:2", weight: 0}], resolve_every: 1500ms,
          source: ["::1"], health: {}}
    tokens: {keys: {ops: /ops.key}, max_lifetime: 1h30m}
    users: {alice: /alice}
    timeouts: {idle: 90s, connect: 1d, drain: 0}
    limits: {pairs: 7, client_prefix: {ipv6: 56}, memory: 64MiB}
    metrics: {bind: 127.0.0.1:2}
    workers: 3
    """,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_dump_is_taken_and_means_the_same(text: str) -> None:
    config = parse_config(textwrap.dedent(text), source="first")
    dumped = dump_config(config)
    again = parse_config(dumped, source="dump")
    assert dump_config(again) == dumped
    assert again.handover.splice_after_bytes == config.handover.splice_after_bytes
    for name in Config.model_fields:
        if name != "handover":
            assert getattr(again, name) == getattr(config, name), name


def sections(section: Section) -> Iterator[Section]:
    yield section
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, tuple)
            else [value]
        ):
            if isinstance(item, Section):
                yield from sections(item)


def test_every_key_with_a_value_is_in_the_dump_unless_it_means_nothing_there() -> None:
    config = parse_config("", source="first")
    dumped = dump_config(config)
    keys = {match[1] for match in re.finditer(r"(?m)^[ -]*([a-z_0-9]+):", dumped)}
    for section in sections(config):
        for name, field in type(section).model_fields.items():
            if getattr(section, name) is None:
                continue
            key = field.alias or name
            if key not in keys:
                # Then it must not be written.
                with pytest.raises(ConfigError, match=key):
                    written_into(dumped, section, key)


def written_into(dumped: str, section: Section, key: str) -> Config:
    value = section.model_dump(by_alias=True)[key]
    after = {"Rule": "    match: instruction\n", "Listener": "  splice: true\n"}[
        type(section).__name__
    ]
    indent = re.match(" *", after)
    assert indent is not None
    assert after in dumped
    line = f"{indent.group()}{key}: {value or '[]'}\n"
    return parse_config(dumped.replace(after, after + line, 1), source="x")


@given(st.integers(0, 366 * 86400 * 1000))
def test_any_duration_is_written_as_it_is_read(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert values.parse_duration(values.format_duration(seconds)) == pytest.approx(seconds)


@given(st.integers(0, 1 << 40))
def test_any_size_is_written_as_it_is_read(size: int) -> None:
    assert values.parse_size(values.format_size(size)) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, 0), (0.25, "250ms"), (90, "90s"), (3600, "1h"), (5400, "90m"), (0.0000015, "0.0015ms")],
)
def test_a_duration_is_written_in_the_largest_unit(seconds: float, text: object) -> None:
    assert values.format_duration(seconds) == text
