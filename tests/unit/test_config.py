"""The configuration as a whole: its defaults, its cross checks and what its errors say."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pyforwarder.config import Config, Rule, load_config, parse_config
from pyforwarder.config.warnings import config_warnings
from pyforwarder.core.address import Address, HostPort, NameIn, UnixAddress
from pyforwarder.core.keepalive import OFF, Keepalive
from pyforwarder.core.policy import AllowList, Networks
from pyforwarder.errors import ConfigError


def parse(text: str) -> Config:
    return parse_config(textwrap.dedent(text), source="a.yaml")


def refuse(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value


def listener(rule: str, extra: str = "") -> str:
    """A config with one listener of one rule, which stands in line 4."""
    return f"listeners:\n- bind: 127.0.0.1:7001\n  rules:\n  - {rule}\n{extra}"


def rule_of(rule: str, extra: str = "") -> Rule:
    return parse(listener(rule, extra)).listeners[0].rules[0]


# --- what is good


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}", "null", "metrics:\n"])
def test_an_empty_file_is_the_built_in_config(text: str) -> None:
    assert parse(text) == load_config(None)


def test_the_built_in_config_is_a_local_listener_for_instructions_to_loopback() -> None:
    config = load_config(None)
    (main,) = config.listeners
    (rule,) = main.rules
    assert (main.name, main.bind, main.protocol) == ("main", (Address("127.0.0.1", 9999),), "tcp")
    assert (rule.name, rule.match) == ("instruction", "instruction")
    assert rule.allow == AllowList.parse(["loopback"])
    assert (rule.ack, rule.checksum, rule.token) == (True, "lenient", "off")
    assert (rule.to, rule.reject, rule.datapath) == (None, None, None)
    assert rule.client_names_destination
    assert (main.first_packet.timeout_s, main.first_packet.max_bytes) == (5.0, 16_384)
    assert main.proxy_protocol.accept is False
    assert config.datapath == "auto"
    assert config.handover.after_bytes == 262_144
    assert config.handover.splice_after_bytes == 4_194_304
    assert (config.handover.after_round_trips, config.handover.after_s) == (4, 1.0)
    limits = config.limits
    assert (limits.pairs, limits.pairs_per_client, limits.new_per_second) == (10_000, 0, 0)
    timeouts = config.timeouts
    assert (timeouts.connect_s, timeouts.idle_s) == (5.0, 3600.0)
    assert (timeouts.half_closed_s, timeouts.drain_s) == (300.0, 30.0)
    assert config.keepalive.terms == Keepalive(60, 10, 3)
    assert config.metrics is None
    assert (config.log.level, config.log.format) == ("info", "text")
    assert (config.workers, config.user) == ("auto", "nobody")


EVERY_KEY = """
    listeners:
      - name: main
        bind: "[::]:0"
        protocol: tcp
        proxy_protocol: {accept: true, trusted: [10.0.0.0/8, loopback]}
        first_packet: {timeout: 250ms, max_bytes: 1KiB}
        datapath: sockmap
        splice: off
        rules:
          - {name: named, match: instruction, allow: ["10.0.0.0/8:80,443", loopback], ack: false,
             checksum: required, token: off, datapath: copy}
          - {match: {bytes: {prefix: "hex:0016"}}, to: web, send_proxy: v2}
          - {match: {regex: "^EHLO "}, to: "[::1]:25"}
          - {match: [silence, {bytes: "Q"}], to: mail.example:25, allow: [private]}
          - {match: {all: [{client: 10.0.0.0/8}, {not: silence}]}, to: unix:/run/a.sock}
          - {match: any, reject: close}
      - {bind: 127.0.0.1:5353, protocol: udp, rules: [{match: any, to: 127.0.0.1:53}]}
    upstreams:
      web:
        servers:
          - 10.0.0.1:443
          - {address: "unix:/run/web.sock", weight: 7}
          - {address: "web.example:443", backup: yes}
        balance: source_hash
        connect_timeout: 3s
        send_proxy: v1
        health: {interval: 1s, timeout: 500ms, rise: 3, fall: 5}
        eject: {failures: 7, for: 1m}
        slow_start: 20s
        resolve_every: 1m
        source: [10.0.0.9, "fd00::9"]
    datapath: copy
    handover: {after_bytes: 0, after_round_trips: 9, after: 0}
    backlog_limit: 64KiB
    limits: {pairs: 23, pairs_per_client: 5, new_per_second: 100}
    timeouts: {connect: 1s, idle: 2h, half_closed: 3m, drain: 0s}
    keepalive: {idle: 9h, interval: 75s, count: 9}
    tokens: {keys: {ops: /etc/ops.key}, clock_skew: 5s, max_lifetime: 1h, single_use: true}
    users: {alice: /etc/alice.password}
    metrics: {bind: 127.0.0.1:9998}
    log: {level: debug, format: json}
    workers: 3
    user: forwarder
"""


def test_every_key_reaches_its_attribute() -> None:
    config = parse(EVERY_KEY)
    main, dns = config.listeners
    assert (main.bind, main.datapath, main.splice) == ((Address("::", 0),), "sockmap", False)
    assert main.proxy_protocol.accept is True
    assert main.proxy_protocol.trusted == Networks.parse(["10.0.0.0/8", "loopback"])
    assert (main.first_packet.timeout_s, main.first_packet.max_bytes) == (0.25, 1024)
    first = main.rules[0]
    assert (first.name, first.ack, first.checksum) == ("named", False, "required")
    assert (first.token, first.datapath) == ("off", "copy")
    assert first.allow == AllowList.parse(["10.0.0.0/8:80,443", "loopback"])
    assert [rule.to for rule in main.rules] == [
        None,
        "web",
        Address("::1", 25),
        HostPort("mail.example", 25),
        UnixAddress("/run/a.sock"),
        None,
    ]
    assert [rule.name for rule in main.rules] == [
        "named", "bytes", "regex", "silence", "client", "any",
    ]  # fmt: skip
    assert main.rules[1].send_proxy == "v2"
    assert main.rules[1].match == {"bytes": {"prefix": "hex:0016"}}
    assert main.rules[3].allow == AllowList.parse(["private"])
    assert main.rules[5].reject == "close"
    assert [rule.client_names_destination for rule in main.rules] == [True] + [False] * 5
    assert (dns.name, dns.protocol) == ("main-2", "udp")

    web = config.upstreams["web"]
    assert [(s.address, s.weight, s.backup) for s in web.servers] == [
        (Address("10.0.0.1", 443), 1, False),
        (UnixAddress("/run/web.sock"), 7, False),
        (HostPort("web.example", 443), 1, True),
    ]
    assert (web.balance, web.connect_timeout_s, web.send_proxy) == ("source_hash", 3.0, "v1")
    assert web.health is not None
    assert (web.health.interval_s, web.health.timeout_s) == (1.0, 0.5)
    assert (web.health.rise, web.health.fall) == (3, 5)
    assert (web.eject.failures, web.eject.for_s) == (7, 60.0)
    assert (web.slow_start_s, web.resolve_every_s) == (20.0, 60.0)
    assert (web.source, web.transparent) == (("10.0.0.9", "fd00::9"), False)

    assert config.datapath == "copy"
    handover = config.handover
    assert (handover.after_bytes, handover.after_round_trips, handover.after_s) == (0, 9, 0.0)
    assert handover.splice_after_bytes == 0
    assert config.backlog_limit_bytes == 65_536
    limits = config.limits
    assert (limits.pairs, limits.pairs_per_client, limits.new_per_second) == (23, 5, 100)
    timeouts = config.timeouts
    assert (timeouts.connect_s, timeouts.idle_s) == (1.0, 7200.0)
    assert (timeouts.half_closed_s, timeouts.drain_s) == (180.0, 0.0)
    assert config.keepalive.terms == Keepalive(32_400, 75, 9)
    tokens = config.tokens
    assert tokens.keys == {"ops": Path("/etc/ops.key")}
    assert (tokens.clock_skew_s, tokens.max_lifetime_s) == (5.0, 3600.0)
    assert tokens.single_use is True
    assert config.users == {"alice": Path("/etc/alice.password")}
    assert config.metrics is not None
    assert config.metrics.bind == Address("127.0.0.1", 9998)
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert (config.workers, config.user) == (3, "forwarder")


EVERY_PROTOCOL = """
    users: {alice: /etc/alice.password}
    upstreams: {web: {servers: [10.0.0.1:443, 10.0.0.2:443]}}
    listeners:
      - bind: 127.0.0.1:9999
        rules:
          - {match: {tls: {sni: ["*.example.com"], alpn: [h2]}}, to: web}
          - {match: {http: {host: [api.example.com], path: ["/v1/*"]}}, to: 127.0.0.1:8080}
          - {match: ssh, to: 127.0.0.1:22}
          - {match: http2, to: web}
          - {match: {postgres: {user: [app], database: [app]}}, to: 127.0.0.1:5432}
          - {match: rdp, to: 127.0.0.1:3389}
          - {match: redis, to: 127.0.0.1:6379}
          - {match: mqtt, to: 127.0.0.1:1883}
          - {match: dns, to: 127.0.0.1:53}
          - {match: openvpn, to: 127.0.0.1:1194}
          - {match: xmpp, to: 127.0.0.1:5222}
          - {match: adb, to: 127.0.0.1:5037}
          - {match: [socks, http_connect], allow: [private], users: [alice]}
          - {match: {all: [socks, {client: [loopback]}]}, allow: [any]}
          - {match: {http_connect: {}, port: 9999}, allow: [any]}
          - {match: socks, to: 127.0.0.1:1080}
          - {match: [mysql, smtp], to: 127.0.0.1:3306}
"""


def test_every_protocol_has_its_word() -> None:
    rules = parse(EVERY_PROTOCOL).listeners[0].rules
    assert [rule.name for rule in rules] == [
        "tls", "http", "ssh", "http2", "postgres", "rdp", "redis", "mqtt", "dns", "openvpn",
        "xmpp", "adb", "socks", "socks-2", "http_connect", "socks-3", "mysql",
    ]  # fmt: skip
    named = [rule.name for rule in rules if rule.client_names_destination]
    assert named == ["socks", "socks-2", "http_connect"]
    assert rules[12].users == ("alice",)


@pytest.mark.parametrize("match", ["socks", "http_connect", "[socks, instruction]"])
def test_every_protocol_that_names_a_destination_must_say_allow(match: str) -> None:
    error = refuse(listener(f"{{match: {match}}}"))
    assert error.path == "listeners[0].rules[0].allow"


def test_users_exist() -> None:
    users = "users: {alice: /etc/alice.password}\n"
    error = refuse(listener("{match: socks, allow: any, users: [alise]}", users))
    assert error.path == "listeners[0].rules[0].users"
    assert "no user is called 'alise' (did you mean 'alice'?)" in error.reason


def test_configs_of_the_same_text_are_equal() -> None:
    assert parse(EVERY_KEY) == parse(EVERY_KEY)
    assert parse(EVERY_KEY) != parse("")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse("").limits.pairs = 5  # type: ignore[misc]


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_token_off_needs_no_quotes(word: str) -> None:
    assert rule_of(f"{{match: instruction, allow: any, token: {word}}}").token == "off"


def test_a_single_entry_needs_no_list() -> None:
    rule = rule_of("{match: instruction, allow: loopback}")
    assert rule.allow == AllowList.parse(["loopback"])


def test_an_instruction_with_to_is_only_recognised() -> None:
    rule = rule_of("{match: instruction, to: 127.0.0.1:22}")
    assert not rule.client_names_destination
    assert rule.allow is None


def test_unnamed_rules_get_distinct_names_that_do_not_depend_on_the_others_outcome() -> None:
    rules = "".join(
        f"  - {rule}\n"
        for rule in (
            "{match: any, to: 127.0.0.1:1}",
            "{match: any, to: 127.0.0.1:2}",
            "{name: any-3, match: any, to: 127.0.0.1:3}",
            "{match: any, to: 127.0.0.1:4}",
            "{match: {not: silence}, to: 127.0.0.1:5}",
        )
    )
    config = parse(f"listeners:\n- bind: 127.0.0.1:0\n  rules:\n{rules}")
    names = [rule.name for rule in config.listeners[0].rules]
    assert names == ["any", "any-2", "any-3", "any-4", "not"]


def test_the_first_tcp_listener_can_be_moved() -> None:
    config = parse(EVERY_KEY)
    moved = config.listening_on("127.0.0.1:0")
    assert moved.listeners[0].bind == (Address("127.0.0.1", 0),)
    assert moved.listeners[0].rules == config.listeners[0].rules
    assert moved.listeners[1] == config.listeners[1]
    assert config.listeners[0].bind == (Address("::", 0),)
    with pytest.raises(ConfigError, match="--listen: 'nowhere' has no :port"):
        config.listening_on("nowhere")


def test_a_listener_is_not_moved_to_where_it_would_be_wrong() -> None:
    config = parse(listener("{match: any, to: 127.0.0.1:7002}", "metrics: {bind: 127.0.0.1:7003}"))
    with pytest.raises(ConfigError, match=r"--listen: 127\.0\.0\.1:7002 is a listener of this"):
        config.listening_on("127.0.0.1:7002")
    with pytest.raises(ConfigError, match=r"--listen: 127\.0\.0\.1:7003 is bound by"):
        config.listening_on("127.0.0.1:7003")
    udp = "listeners: [{bind: 127.0.0.1:1, protocol: udp, rules: [{match: any, reject: reset}]}]"
    with pytest.raises(ConfigError, match="no TCP listener"):
        parse(udp).listening_on("127.0.0.1:7003")


def test_two_listeners_may_share_a_port_across_protocols_and_port_zero() -> None:
    any_to = "rules: [{match: any, to: 127.0.0.1:9}]"
    config = parse(
        f"""
        listeners:
        - {{bind: 127.0.0.1:53, protocol: tcp, {any_to}}}
        - {{bind: 127.0.0.1:53, protocol: udp, {any_to}}}
        - {{bind: 127.0.0.1:0, {any_to}}}
        - {{bind: 127.0.0.1:0, {any_to}}}
        """
    )
    assert [listener.name for listener in config.listeners] == [
        "main", "main-2", "main-3", "main-4",
    ]  # fmt: skip


# --- what is not


@pytest.mark.parametrize(
    ("text", "line", "path", "reason"),
    [
        ("listners: []", 1, "listners", "unknown key 'listners', did you mean 'listeners'?"),
        ("limits:\n  pair: 5", 2, "limits.pair", "unknown key 'pair', did you mean 'pairs'?"),
        (
            "limits:\n  zzz:",
            2,
            "limits.zzz",
            "unknown key 'zzz', known: client_prefix, memory, new_per_second, ",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', rules: [{match: tls, sni: a.test, reject: close}]}]",
            1,
            "listeners[0].rules[0].sni",
            "unknown key 'sni', write match: {tls: {sni: ...}}",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', rules: [{match: [ssh, {http: {method: GET}}],"
            " host: 'https://', reject: close}]}]",
            1,
            "listeners[0].rules[0].host",
            "unknown key 'host', write match: {http: {host: ...}}",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', rules: [{match: {wxyz: 1}, vw: 1, reject: close}]}]",
            1,
            "listeners[0].rules[0].vw",
            "unknown key 'vw', known: ",
        ),
        (
            "limits: 5",
            1,
            "limits",
            "must be keys and values (pairs, pairs_per_client, sessions, ",
        ),
        (
            "limits: {client_prefix: {ipv6: 129}}",
            1,
            "limits.client_prefix.ipv6",
            "must be less than or equal to 128, not 129",
        ),
        ("limits: {memory: 1MiB}", 1, "limits.memory", "must be at least 8MiB"),
        ("limits: {memory: 0}", 1, "limits.memory", "must be auto or a size"),
        (
            "listeners: [{bind: '127.0.0.1:1', protocol: udp, limits: {memory: 8MiB},"
            " rules: [{match: any, reject: reset}]}]",
            1,
            "listeners[0].limits.memory",
            "`memory` is for TCP",
        ),
        (
            "listeners:\n- bind: '127.0.0.1:1'\n  protocol: udp\n  rules:\n"
            "  - {match: dns, to: '127.0.0.1:2'}\n"
            "  - {match: any, to: '127.0.0.1:2', datapath: express}",
            6,
            "listeners[0].rules[1].datapath",
            "`datapath: express` is for TCP",
        ),
        (
            "listeners:\n- bind: '127.0.0.1:1'\n  protocol: udp\n  datapath: express\n"
            "  rules: [{match: any, to: '127.0.0.1:2'}]",
            4,
            "listeners[0].datapath",
            "`datapath: express` is for TCP",
        ),
        (
            "limits: {client_prefix: 64}",
            1,
            "limits.client_prefix",
            "must be keys and values (ipv4, ipv6), not 64",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', limits: {sessions: 5},"
            " rules: [{match: any, reject: reset}]}]",
            1,
            "listeners[0].limits.sessions",
            "`sessions` is for UDP",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', amplification: 3,"
            " rules: [{match: any, reject: reset}]}]",
            1,
            "listeners[0].amplification",
            "`amplification` is for UDP",
        ),
        (
            "listeners: [{bind: '127.0.0.1:1', idle: 5m, rules: [{match: any, reject: reset}]}]",
            1,
            "listeners[0].idle",
            "`idle` of a listener is for UDP",
        ),
        ("- a\n", 1, "", "must be keys and values"),
        ("listeners: {}", 1, "listeners", "must be a list, not a mapping"),
        ("listeners: []", 1, "listeners", "a forwarder needs a listener"),
        ("listeners:\n- {rules: []}", 2, "listeners[0].bind", "the key 'bind' is missing"),
        ("listeners:\n- bind: 127.0.0.1:1", 2, "listeners[0].rules", "the key 'rules' is missing"),
        ("listeners:\n- bind: 127.0.0.1:1\n  rules: []", 3, "listeners[0].rules", "without rules"),
        (
            "listeners:\n- {bind: localhost:1, rules: [{match: any, reject: reset}]}",
            2,
            "listeners[0].bind",
            "binds an IP address, not a name",
        ),
        (
            "datapath: sokmap",
            1,
            "datapath",
            "'sokmap' is not possible here, did you mean 'sockmap'?",
        ),
        (
            "datapath: xyz",
            1,
            "datapath",
            "'xyz' is not possible here, must be auto or express or sockmap or splice or copy",
        ),
        ("datapath: 5", 1, "datapath", "5 is not possible here"),
        ("limits: {pairs: 0}", 1, "limits.pairs", "must be greater than or equal to 1, not 0"),
        ("limits: {pairs: many}", 1, "limits.pairs", "must be a valid integer, not 'many'"),
        ("limits: {pairs: '5'}", 1, "limits.pairs", "must be a valid integer, not '5'"),
        (
            "limits: {pairs_per_client: -1}",
            1,
            "limits.pairs_per_client",
            "greater than or equal to 0",
        ),
        ("timeouts:\n  connect: 5", 2, "timeouts.connect", "did you mean 5s?"),
        ("timeouts:\n  connect: 0s", 2, "timeouts.connect", "must be greater than 0, not '0s'"),
        ("backlog_limit: 1MB", 1, "backlog_limit", "did you mean 1MiB?"),
        ("backlog_limit: 1B", 1, "backlog_limit", "must be 4KiB to 1GiB"),
        ("workers: 0", 1, "workers", "neither auto nor 1 to 256"),
        ("metrics: {bind: 'unix:/x'}", 1, "metrics.bind", "unix socket cannot be used here"),
        ("metrics: {}", 1, "metrics.bind", "the key 'bind' is missing"),
        ("tokens: {keys: {ops: ops.key}}", 1, "tokens.keys.ops", "not an absolute path"),
        ("tokens:\n  keys:\n    'o ps': /ops.key", 3, "tokens.keys.o ps", "no blanks"),
        ("log: {level: warn}", 1, "log.level", "did you mean 'warning'?"),
        ("upstreams: {'a:b': {servers: [1.2.3.4:5]}}", 1, "upstreams.a:b", "has no colon"),
        ("upstreams:\n  a: {servers: []}", 2, "upstreams.a.servers", "an upstream needs a server"),
        (
            "upstreams:\n  a:\n    servers:\n    - 1.2.3.4:5\n    - 1.2.3.4",
            5,
            "upstreams.a.servers[1]",
            "has no :port",
        ),
        (
            "upstreams:\n  a:\n    servers:\n    - 1.2.3.4:5\n    - 1.2.3.4:5",
            5,
            "upstreams.a.servers[1]",
            "stands here twice",
        ),
        (
            "upstreams: {a: {servers: [{adress: '1.2.3.4:5'}]}}",
            1,
            "upstreams.a.servers[0].adress",
            "did you mean 'address'?",
        ),
        (
            "upstreams: {a: {servers: [1.2.3.4:5], source: [host]}}",
            1,
            "upstreams.a.source",
            "'host' is not a numeric address",
        ),
        (
            "upstreams: {a: {servers: [1.2.3.4:5], source: [1.2.3.4], transparent: on}}",
            1,
            "upstreams.a.source",
            "takes the client's address",
        ),
        (
            "upstreams: {a: {servers: [1.2.3.4:5], balance: roundrobin}}",
            1,
            "upstreams.a.balance",
            "did you mean 'round_robin'?",
        ),
        ("a: 1\na: 2\n", 2, "a", "stands here a second time"),
    ],
)
def test_an_error_names_line_key_and_reason(text: str, line: int, path: str, reason: str) -> None:
    error = refuse(text)
    assert (error.line, error.path) == (line, path)
    assert reason in error.reason
    assert str(error).startswith(f"a.yaml, line {line}{', ' if path else ''}{path}: ")


@pytest.mark.parametrize(
    ("rule", "key", "reason"),
    [
        ("{match: instruction}", ".allow", "say what it may reach"),
        ("{match: {instruction: {}, client: 10.0.0.0/8}}", ".allow", "say what it may reach"),
        ("{match: {all: [instruction, {port: 80}]}}", ".allow", "say what it may reach"),
        ("{match: instruction, allow: []}", ".allow", "an empty list allows nothing"),
        ("{match: instruction, allow: [lopback]}", ".allow", "'lopback' is not one of loopback"),
        ("{match: instruction, allow: [10.0.0.0/8:80,443]}", ".allow", "needs quotes"),
        ("{match: instruction, allow: [[::1]:80]}", ".allow[0]", "[ip6]:port needs quotes"),
        ("{match: any}", "", "neither `to` (where) nor `reject`"),
        ("{match: {not: instruction}}", "", "neither `to` (where) nor `reject`"),
        ("{match: any, allow: any}", "", "neither `to` (where) nor `reject`"),
        ("{match: [instruction, any], allow: any}", ".match", "write a rule for each"),
        (
            "{match: {any_of: [instruction, silence]}, allow: any}",
            ".match",
            "write a rule for each",
        ),
        ("{to: 127.0.0.1:22}", ".match", "the key 'match' is missing"),
        ("{match: any, to: 127.0.0.1:22, reject: reset}", ".reject", "not both"),
        ("{match: any, reject: drop}", ".reject", "must be reset or close"),
        ("{match: any, to: web}", ".to", "no upstream is called 'web' (there are none)"),
        ("{match: any, to: 127.0.0.1}", ".to", "a server is written host:port"),
        ("{match: any, to: [::1]:80}", "", "not YAML"),
        ("{match: any, to: 127.0.0.1:7001}", ".to", "that would be a loop"),
        ("{match: any, to: '0.0.0.0:7001'}", ".to", "that would be a loop"),
        ("{match: any, to: '[::ffff:127.0.0.1]:7001'}", ".to", "that would be a loop"),
        ("{match: instruction, allow: any, token: required}", ".token", "checked with keys"),
        (
            "{match: instruction, allow: any, token: maybe}",
            ".token",
            "must be required or optional or off",
        ),
        (
            "{match: instruction, allow: any, checksum: requird}",
            ".checksum",
            "did you mean 'required'?",
        ),
        ("{match: instruction, allow: any, ack: maybe}", ".ack", "neither true nor false"),
        ("{match: any, to: 127.0.0.1:22, ack: true}", ".ack", "rules that read an instruction"),
        (
            "{match: any, to: 127.0.0.1:22, token: required}",
            ".token",
            "rules that read an instruction",
        ),
        ("{match: instruction, to: 127.0.0.1:22, token: required}", ".token", "rules that read"),
        ("{match: any, to: 127.0.0.1:22, users: [alice]}", ".users", "SOCKS or HTTP CONNECT"),
        ("{match: any, reject: reset, allow: any}", ".allow", "means nothing"),
        ("{match: any, reject: reset, datapath: copy}", ".datapath", "means nothing"),
        ("{match: any, reject: reset, name: 'a b'}", ".name", "no blanks"),
        ("{match: anny, reject: reset}", ".match", "did you mean any?"),
        ("{match: 5, reject: reset}", ".match", "5"),
        ("{match: [], reject: reset}", ".match", "at least one"),
        (
            "{match: {bytes: {prefix: x, offst: 1}}, reject: reset}",
            ".match.bytes.offst",
            "did you mean offset?",
        ),
        ("{match: {bytes: {prefix: 'hex:0'}}, reject: reset}", ".match.bytes", "hex:"),
        ("{match: {all: [any, {regex: '('}]}, reject: reset}", ".match.all[1].regex", "'('"),
        ("{mach: any, reject: reset}", ".mach", "did you mean 'match'?"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_an_error(rule: str, key: str, reason: str) -> None:
    error = refuse(listener(rule))
    assert reason in error.reason
    assert error.line == 4
    if "YAML" not in reason:
        assert error.path == f"listeners[0].rules[0]{key}"


def test_references_are_followed_with_suggestions() -> None:
    upstream = "upstreams: {web: {servers: [1.2.3.4:5]}}\n"
    assert rule_of("{match: any, to: web}", upstream).to == "web"
    error = refuse(listener("{match: any, to: wed}", upstream))
    assert "no upstream is called 'wed' (did you mean 'web'?)" in error.reason
    keys = "tokens: {keys: {ops: /etc/ops.key}}\n"
    rule = rule_of("{match: instruction, allow: any, token: required}", keys)
    assert rule.token == "required"


@pytest.mark.parametrize(
    ("extra", "key", "reason"),
    [
        ("protocol: tpc", "protocol", "did you mean 'tcp'?"),
        ("proxy_protocol: {accept: true}", "proxy_protocol.trusted", "whose PROXY headers"),
        ("proxy_protocol: {accept: on, trusted: []}", "proxy_protocol.trusted", "whose PROXY"),
        ("proxy_protocol: {trusted: ['10.0.0.0/8:80']}", "proxy_protocol.trusted", "ports mean"),
        ("first_packet: {max_bytes: 0}", "first_packet.max_bytes", "must be 1 to 1MiB"),
        ("first_packet: {max_bytes: 2MiB}", "first_packet.max_bytes", "must be 1 to 1MiB"),
        ("first_packet: {timeout: 0}", "first_packet.timeout", "must be greater than 0"),
        ("{splice: off, datapath: splice}", "splice", "contradicts"),
        (
            "{protocol: udp, proxy_protocol: {accept: on, trusted: any}}",
            "proxy_protocol.accept",
            "for TCP",
        ),
        ("{bind: 'unix:/x', protocol: udp}", "protocol", "stream"),
        ("{bind: 'unix:/x', mode: 0888}", "mode", "no mode like 0660"),
        ("{bind: 'unix:/x', mode: rw}", "mode", "no mode like 0660"),
        ("{bind: 'unix:/x', mode: 4755}", "mode", "no mode like 0660"),
        ("{bind: 'unix:/x', mode: true}", "mode", "no mode like 0660"),
        ("mode: 0660", "mode", "only a unix socket has a mode"),
    ],
)
def test_a_listener_that_cannot_be_meant_is_an_error(extra: str, key: str, reason: str) -> None:
    fields = extra[1:-1] if extra.startswith("{") and extra.endswith("}") else extra
    bind = "" if "bind" in fields else "bind: 127.0.0.1:7001, "
    error = refuse(f"listeners:\n- {{{bind}{fields}, rules: [{{match: any, reject: reset}}]}}\n")
    assert reason in error.reason
    assert error.path == f"listeners[0].{key}"


@pytest.mark.parametrize("written", ["0660", "660", "'0660'", '"660"'])
def test_a_mode_is_its_octal_digits(written: str) -> None:
    config = parse(
        f"listeners: [{{bind: 'unix:/x', mode: {written}, rules: [{{match: any, reject: reset}}]}}]"
    )
    assert config.listeners[0].mode == 0o660


def test_a_unix_listener_may_take_proxy_headers_from_every_client() -> None:
    config = parse(
        """
        listeners:
        - bind: unix:/run/x.sock
          proxy_protocol: {accept: true}
          rules: [{match: any, reject: reset}]
        """
    )
    assert config.listeners[0].proxy_protocol.accept is True


@pytest.mark.parametrize(
    ("rule", "upstream", "key", "reason"),
    [
        ("{match: any, to: web, send_proxy: v1}", "", ".send_proxy", "version 1 are for TCP"),
        ("{match: any, to: '1.2.3.4:5', send_proxy: v1}", "", ".send_proxy", "for TCP"),
        ("{match: any, to: web}", ", send_proxy: v1", ".send_proxy", "`send_proxy: v2`"),
    ],
)
def test_what_datagrams_would_go_without_is_an_error(
    rule: str, upstream: str, key: str, reason: str
) -> None:
    text = (
        f"listeners: [{{bind: '127.0.0.1:53', protocol: udp, rules: [{rule}]}}]\n"
        f"upstreams: {{web: {{servers: ['1.2.3.4:53']{upstream}}}}}\n"
    )
    error = refuse(text)
    assert reason in error.reason
    assert error.path == f"listeners[0].rules[0]{key}"
    # An upstream for TCP may serve datagrams too, if the rule says that they have another header.
    if "send_proxy: v1" in upstream:
        parse(text.replace("to: web", "to: web, send_proxy: off"))
        parse(text.replace("to: web", "to: web, send_proxy: v2"))


def test_silence_is_no_match_for_datagrams() -> None:
    error = refuse(
        """
        listeners:
        - bind: 127.0.0.1:53
          protocol: udp
          rules:
          - {match: any, reject: reset}
          - {match: [silence, any], reject: reset}
        """
    )
    assert (error.line, error.path) == (7, "listeners[0].rules[1].match[0]")
    assert "silence needs a stream" in error.reason


def test_names_are_unique() -> None:
    error = refuse(
        """
        listeners:
        - {name: a, bind: 127.0.0.1:1, rules: [{match: any, reject: reset}]}
        - {name: a, bind: 127.0.0.1:2, rules: [{match: any, reject: reset}]}
        """
    )
    assert (error.line, error.path) == (4, "listeners[1].name")
    error = refuse(
        """
        listeners:
        - bind: 127.0.0.1:1
          rules:
          - {name: r, match: any, reject: reset}
          - {name: r, match: any, reject: reset}
        """
    )
    assert (error.line, error.path) == (6, "listeners[0].rules[1].name")
    assert error.reason == "the name 'r' is taken already"


def test_an_address_is_bound_once() -> None:
    reject = "rules: [{match: any, reject: reset}]"
    error = refuse(
        f"listeners:\n- {{name: a, bind: '[::1]:1', {reject}}}\n- {{bind: '[0::1]:1', {reject}}}\n"
    )
    assert (error.line, error.path) == (3, "listeners[1].bind")
    assert "by the listener 'a' already" in error.reason
    error = refuse("metrics: {bind: 127.0.0.1:9999}")
    assert (error.line, error.path) == (1, "metrics.bind")
    assert "by the listener 'main' already" in error.reason


def test_a_loop_through_another_listener_is_found() -> None:
    error = refuse(
        """
        listeners:
        - {bind: 0.0.0.0:7001, rules: [{match: any, reject: reset}]}
        - {bind: 127.0.0.1:7002, rules: [{match: any, to: 127.0.0.9:7001}]}
        """
    )
    assert error.path == "listeners[1].rules[0].to"
    assert "0.0.0.0:7001" not in error.reason


def test_all_errors_are_listed_in_the_order_of_their_lines() -> None:
    error = refuse(
        """
        timeouts: {connect: 5}
        limits:
          pairs: many
        datapath: fast
        """
    )
    assert str(error).splitlines() == [
        "a.yaml, line 2, timeouts.connect: 5 is no duration like 250ms, 5s or 1h: did you mean 5s?",
        "a.yaml, line 4, limits.pairs: must be a valid integer, not 'many'",
        "a.yaml, line 5, datapath: 'fast' is not possible here, "
        "must be auto or express or sockmap or splice or copy",
    ]
    assert (error.line, error.path) == (2, "timeouts.connect")


def test_a_flood_of_errors_is_cut_short() -> None:
    rules = "".join("  - {match: any, reject: no}\n" for _ in range(30))
    error = refuse(f"listeners:\n- bind: 127.0.0.1:1\n  rules:\n{rules}")
    assert len(str(error).splitlines()) == 11
    assert str(error).endswith("\nand 20 more")


# --- files


def test_a_file_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("\ufefflimits: {pairs: 7}\n", encoding="utf-8")
    assert load_config(file).limits.pairs == 7


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("x: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}, line 1, x: ")
    assert caught.value.source == str(file)
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_a_file_that_is_not_text_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        load_config(file)
    assert caught.value.line == 2


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(Path("/dev/zero"))


# --- any text and any values

_KEYS = st.sampled_from(
    [
        "listeners", "upstreams", "datapath", "handover", "backlog_limit", "limits", "timeouts",
        "tokens", "metrics", "log", "workers", "users", "user", "bind", "rules", "match", "to",
        "allow", "name", "servers", "keys", "proxy_protocol", "first_packet", "reject", "x",
    ]
)  # fmt: skip
_SCALARS = st.sampled_from(
    ["", "x", "5", "5s", "1KiB", "any", "instruction", "127.0.0.1:80", "'off'", "true", "reset"]
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(_KEYS, inner, max_size=4).map(
            lambda entries: f"{{{', '.join(f'{key}: {value}' for key, value in entries.items())}}}"
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _TREES, max_size=3))
def test_any_tree_is_a_config_or_a_config_error(tree: dict[str, str]) -> None:
    text = "".join(f"{key}: {value}\n" for key, value in tree.items())
    try:
        config = parse_config(text, source="x")
    except ConfigError as error:
        line = error.line
    else:
        line = len(config.listeners)
    assert line is not None
    assert line >= 1


@pytest.mark.parametrize(
    ("rule", "key", "reason"),
    [
        ("{match: tls, to: sni}", "allow", "allow: [public]"),
        ("{match: ssh, to: sni, allow: [any]}", "to", "matches tls alone"),
        ("{match: [tls, ssh], to: sni, allow: [any]}", "to", "matches tls alone"),
        ("{match: {not: tls}, to: sni, allow: [any]}", "to", "matches tls alone"),
        ("{match: tls, to: host, allow: [any]}", "to", "matches http alone"),
        ("{match: tls, to: 127.0.0.1:1, port: 443}", "port", "goes with"),
        ("{match: tls, to: sni, port: 0, allow: [any]}", "port", "greater"),
        ("{match: tls, to: sni, port: '443', allow: [any]}", "port", "integer"),
    ],
)
def test_a_destination_from_a_name_that_cannot_be_meant(rule: str, key: str, reason: str) -> None:
    error = refuse(f"listeners: [{{bind: 127.0.0.1:1, rules: [{rule}]}}]")
    assert error.path == f"listeners[0].rules[0].{key}" or key == "allow"
    assert reason in error.reason


def test_a_destination_from_a_name_has_a_port() -> None:
    rules = (
        "[{match: tls, to: sni, allow: [any]}, {match: http, to: host, port: 8080, allow: [any]}]"
    )
    config = parse(f"listeners: [{{bind: 127.0.0.1:1, rules: {rules}}}]")
    assert [rule.to for rule in config.listeners[0].rules] == [
        NameIn("sni", 443),
        NameIn("host", 8080),
    ]
    assert "means the name" in str(refuse("upstreams: {sni: {servers: [127.0.0.1:1]}}"))


# What is allowed, and hardly meant.


def warnings_of(text: str) -> list[str]:
    text = textwrap.dedent(text)
    return config_warnings(parse_config(text, source="x.yaml"), text, source="x.yaml")


@pytest.mark.parametrize(
    ("protocol", "first", "second", "word"),
    [
        ("udp", "{match: quic, to: '1.2.3.4:5'}", "{quic: {sni: a.example}}", "quic"),
        ("tcp", "{match: {tls: {}}, to: '1.2.3.4:5'}", "{tls: {alpn: h2}, client: any}", "tls"),
        ("tcp", "{match: [ssh], to: '1.2.3.4:5'}", "{all: [ssh, {not: {port: 1}}]}", "ssh"),
        ("udp", "{match: dns, reject: close}", "[dns, {dns: {qtype: A}}]", "dns"),
        ("udp", "{match: {dns: {qtype: A}}, reject: close}", "dns", ""),
        ("udp", "{match: quic, to: '1.2.3.4:5'}", "[quic, {client: 10.0.0.0/8}]", ""),
        ("udp", "{match: quic, to: '1.2.3.4:5'}", "{not: quic}", ""),
        ("udp", "{match: quic, to: sni, allow: [any]}", "quic", ""),
        ("udp", "{match: {quic: {}, port: 1}, to: '1.2.3.4:5'}", "quic", ""),
        ("tcp", "{match: instruction, allow: [any]}", "[instruction, ssh]", ""),
        ("tcp", "{match: tls, to: '1.2.3.4:5'}", "{any_of: [tls, ssh]}", ""),
    ],
)
def test_a_rule_behind_one_for_its_whole_protocol_is_told_of(
    protocol: str, first: str, second: str, word: str
) -> None:
    found = warnings_of(
        f"listeners: [{{bind: '127.0.0.1:1', protocol: {protocol}, rules: [{first},"
        f" {{match: {second}, to: '1.2.3.4:5'}}]}}]"
    )
    wanted = f"is never reached: the rule {word!r} takes every {word} connection"
    assert found == ([f"x.yaml, line 1, listeners[0].rules[1]: {wanted}"] if word else [])


def test_a_rule_that_no_connection_reaches_or_fits_is_told_of() -> None:
    found = warnings_of(
        """
        listeners:
          - bind: 127.0.0.1:443
            first_packet: {max_bytes: 100B}
            rules:
              - {match: {port: 80}, to: 127.0.0.1:1}
              - {match: {bytes: {prefix: [xy, x], offset: 100}}, to: 127.0.0.1:1}
              - {match: {bytes: {prefix: [xy, x], offset: 99}}, to: 127.0.0.1:1}
              - {match: {ssh: {}, not: any}, to: 127.0.0.1:1}
              - {match: [{port: 80}, {client: 10.0.0.0/8, port: 81}], to: 127.0.0.1:1}
              - {match: [{port: 80}, ssh], to: 127.0.0.1:1}
              - {name: rest, match: [ssh, any], reject: close}
              - {match: ssh, to: 127.0.0.1:1}
          - bind: unix:/x
            rules: [{match: {client: any}, reject: close}, {match: any, reject: close}]
          - bind: 127.0.0.1:0
            rules: [{match: {port: 80}, reject: close}, {match: {any: {}, ssh: {}}, reject: close}]
        """
    )
    assert found == [
        "x.yaml, line 6, listeners[0].rules[0].match: can never match: the listener's port is 443",
        "x.yaml, line 7, listeners[0].rules[1].match: can never match: it needs 101 bytes, and "
        "first_packet.max_bytes is 100",
        "x.yaml, line 9, listeners[0].rules[3].match: can never match: what stands under `not` "
        "always matches",
        "x.yaml, line 10, listeners[0].rules[4].match: can never match: the listener's port is 443",
        "x.yaml, line 13, listeners[0].rules[7]: is never reached: the rule 'rest' takes "
        "everything",
        "x.yaml, line 15, listeners[1].rules[0].match: can never match: clients of a unix socket "
        "have no address",
    ]


def test_files_that_others_may_read_and_a_user_that_is_none_are_told_of(tmp_path: Path) -> None:
    key, password = tmp_path / "ops.key", tmp_path / "alice.password"
    for path in (key, password):
        path.write_text("x" * 40)
    key.chmod(0o640)
    password.chmod(0o604)
    text = (
        f"tokens: {{keys: {{ops: {key}, gone: {tmp_path}/none}}}}\n"
        f"users: {{alice: {password}}}\nuser: no-such-user\n"
    )
    found = warnings_of(text)
    assert [warning.partition(": ")[0] for warning in found] == [
        "x.yaml, line 2, users.alice",
        "x.yaml, line 3, user",
    ]
    assert "0604" in found[0]
    assert "no-such-user" in found[1]
    password.chmod(0o600)
    key.chmod(0o620)
    assert [warning.partition(": ")[0] for warning in warnings_of(text)] == [
        "x.yaml, line 1, tokens.keys.ops",
        "x.yaml, line 3, user",
    ]


def test_what_is_built_in_is_beyond_doubt_and_many_doubts_are_cut_short() -> None:
    assert warnings_of("") == []
    rules = "      - {match: any, reject: close}\n" * 30
    found = warnings_of(f"listeners:\n  - bind: 127.0.0.1:1\n    rules:\n{rules}")
    assert len(found) == 21
    assert found[-1] == "and 9 more"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listeners: [{bind: ':9200', RULES}]", "0.0.0.0:9200"),
        ("listeners: [{bind: '*:9200', RULES}]", "[::]:9200"),
        ("listeners: [{bind: 9200, RULES}]", "127.0.0.1:9200"),
        ("listeners: [{bind: '9200', RULES}]", "127.0.0.1:9200"),
        ("listeners: [{bind: 'localhost:80', RULES}]", "127.0.0.1:80"),
        ("listeners: [{bind: 'tcp://127.0.0.1:80', RULES}]", "write 127.0.0.1:80"),
        ("listeners: [{bind: '127.0.0.1', RULES}]", "write 127.0.0.1:PORT"),
        ("listeners: [{bind: '127.0.0.1:https', RULES}]", "write 443"),
        ("listeners: [{bind: '::1:80', RULES}]", "[::1]:80"),
        ("listeners: [{bind: '::1', RULES}]", "[::1]:PORT"),
        ("listeners: [{bind: '[::1]', RULES}]", "[::1]:PORT"),
        ("listeners: [{bind: [::1]:80, RULES}]", 'write "[::1]:80" in quotes'),
        ("listeners:\n- bind: [::1]:80\n  RULES", 'write "[::1]:80" in quotes'),
        ("upstreams: {a: {servers: ['http://a.test/x']}}", "write a.test:80"),
        ("upstreams: {a: {servers: ['https://u:p@[::1]']}}", "write [::1]:443"),
        ("upstreams: {a: {servers: ['redis://a.test:7']}}", "write a.test:7"),
        ("upstreams: {a: {servers: [80]}}", "127.0.0.1:80"),
        ("upstreams:\n\ta: {servers: [127.0.0.1:80]}", "blanks, not tabs"),
        ("timeouts: {idle: 0}", "up to 366d"),
        ("timeouts: {idle: 5}", "5s"),
        ("listeners: [{bind: '127.0.0.1:80', protocol: tcp/udp, RULES}]", "write two listeners"),
        ("listeners: [{bind: '127.0.0.1:80', protocol: TCP+UDP, RULES}]", "write two listeners"),
        ("listeners: [{bind: '127.0.0.1:80', protocol: [tcp, udp], RULES}]", "write two listeners"),
        ("upstreams: {a: {servers: ['127.0.0.1:8000-9000']}}", "127.0.0.1:same is the one that"),
        (
            "listeners: [{bind: '127.0.0.1:80', rules: [{match: any, to: '127.0.0.1:80-90'}]}]",
            "127.0.0.1:same is the one that",
        ),
    ],
)
def test_a_common_mistake_is_answered_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text.replace("RULES", "rules: [{match: any, reject: close}]"), source="x")
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["off", "false", "{idle: 0}", '"off"'])
def test_keepalives_can_be_switched_off(text: str) -> None:
    assert parse(f"keepalive: {text}").keepalive.terms == OFF


@pytest.mark.parametrize(
    "text",
    [
        "{idle: 1500ms}",
        "{idle: 60}",
        "{idle: 10h}",
        "{interval: 0}",
        "{interval: 500ms}",
        "{count: 0}",
        "{count: 128}",
        "{count: 2.5}",
        "true",
        "{every: 5s}",
    ],
)
def test_keepalives_that_the_kernel_does_not_take_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="keepalive"):
        parse(f"keepalive: {text}")


def test_a_check_of_a_server_that_takes_datagrams_alone_is_warned_of() -> None:
    text = """
        listeners:
          - {bind: "127.0.0.1:53", protocol: udp, rules: &rules [{match: dns, to: web}]}
          - {bind: "127.0.0.1:53", protocol: PROTOCOL, rules: *rules}
        upstreams:
          web: {servers: ["10.0.0.1:53"], health: {}}
          unused: {servers: ["10.0.0.1:53"], health: {}}
        """
    assert warnings_of(text.replace("PROTOCOL", "tcp")) == []
    udp = text.replace("PROTOCOL", "udp").replace("127.0.0.1:53", "127.0.0.2:53", 1)
    (warning,) = warnings_of(udp)
    assert warning.startswith("x.yaml, line 6, upstreams.web.health: only UDP listeners use it")
    assert warnings_of(udp.replace(", health: {}", "", 1)) == []
