"""`check` and `up` on configurations: what is accepted, and what an error says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import Place, run_command

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

DOCUMENTED = """
listeners:
  - name: main
    bind: 127.0.0.1:9999
    protocol: tcp
    proxy_protocol: {accept: false, trusted: [10.0.0.0/8]}
    first_packet: {timeout: 5s, max_bytes: 16KiB}
    rules:
      - {name: named, match: instruction, allow: [loopback], ack: true, checksum: lenient, token: "off"}
      - {match: {bytes: {prefix: "hex:0016"}}, to: 127.0.0.1:70}
      - {match: {regex: "^EHLO "}, to: "[::1]:25"}
      - {match: silence, to: 127.0.0.1:25}
      - {match: any, reject: reset}
upstreams:
  web: {servers: [10.0.0.1:443, 10.0.0.2:443], balance: round_robin, connect_timeout: 3s, send_proxy: "off", health: {interval: 5s}, source: [10.0.0.9, 10.0.0.10]}
datapath: auto
handover: {after_bytes: 256KiB, after_round_trips: 4, after: 1s}
backlog_limit: 1MiB
limits: {pairs: 10000, pairs_per_client: 0, new_per_second: 0}
timeouts: {connect: 5s, idle: 1h, half_closed: 5m, drain: 30s}
metrics: {bind: 127.0.0.1:9998}
log: {level: info, format: text}
"""  # noqa: E501

RULE = "{match: instruction, allow: [loopback]}"


def listener(rules: str = f"[{RULE}]", *, bind: str = "127.0.0.1:0", more: str = "") -> str:
    return f"listeners:\n  - name: main\n    bind: {bind}\n    rules: {rules}\n{more}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        DOCUMENTED,
        listener(),
        listener(bind='"[::1]:0"'),
        listener(bind="unix:/run/some/path"),
        listener(more="datapath: copy\n"),
        listener(more="handover: {after_bytes: 0, after_round_trips: 0, after: 0s}\n"),
        listener(more="timeouts: {connect: 250ms, idle: 1h}\nbacklog_limit: 64KiB\n"),
    ],
)
def test_a_valid_configuration_passes_the_check(place: Place, text: str) -> None:
    path = place.bpffs.parent / "config.yaml"
    path.write_text(text)
    done = run_command(place, "check", str(path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("listener: []\n", 1, ["listener", "listeners"]),
        (listener(more="datapaht: copy\n"), 5, ["datapaht", "datapath"]),
        (listener(more="datapath: fast\n"), 5, ["datapath", "sockmap"]),
        (listener("[{match: instruction}]"), 4, ["listeners[0].rules[0]", "allow"]),
        (listener("[{match: instruction, allow: [loopbak]}]"), 4, ["allow", "loopback"]),
        (listener("[{match: instruction, allow: [10.0.0.0/33]}]"), 4, ["allow", "10.0.0.0/33"]),
        (listener("[{match: any, to: nowhere}]"), 4, ["listeners[0].rules[0].to", "nowhere"]),
        (listener("[{match: any}]"), 4, ["listeners[0].rules[0]", "to", "reject"]),
        (listener("[{match: any, reject: politely}]"), 4, ["reject", "reset", "close"]),
        (listener("[{match: anything, reject: reset}]"), 4, ["match", "anything"]),
        (listener("[{match: {regex: '('}, reject: reset}]"), 4, ["regex"]),
        (listener("[{match: {bytes: {prefix: 'hex:0g'}}, reject: reset}]"), 4, ["bytes", "hex:0g"]),
        (listener(bind="localhost:80"), 3, ["listeners[0].bind", "localhost"]),
        (listener(bind="127.0.0.1:65536"), 3, ["listeners[0].bind", "65536"]),
        (listener(bind="'::1:80'"), 3, ["listeners[0].bind", "["]),
        (listener(more="timeouts: {connect: 5}\n"), 5, ["timeouts.connect", "5s"]),
        (listener(more="timeouts: {connect: -1s}\n"), 5, ["timeouts.connect"]),
        (listener(more="timeouts: {conect: 1s}\n"), 5, ["conect", "connect"]),
        (listener(more="backlog_limit: 1 parsec\n"), 5, ["backlog_limit", "parsec"]),
        (listener(more="limits:\n  pairs: many\n"), 6, ["limits.pairs"]),
        (listener(more="limits:\n  pairs: -1\n"), 6, ["limits.pairs"]),
        (listener(more="upstreams:\n  web: {servers: []}\n"), 6, ["upstreams.web", "servers"]),
        (listener(more="datapath: copy\ndatapath: copy\n"), 6, ["datapath"]),
        (listener() + listener().removeprefix("listeners:\n"), 5, ["main"]),
        ("listeners: [\n", 2, []),
        ("- a list\n", 1, []),
        ("listeners:\n\t- name: tab\n", 2, []),
    ],
)
def test_an_error_names_the_line_and_the_key(
    place: Place, text: str, line: int, words: list[str]
) -> None:
    path = place.bpffs.parent / "config.yaml"
    path.write_text(text)
    done = run_command(place, "check", str(path))
    assert done.returncode == 2, done.stdout
    assert done.stdout == ""
    assert f"line {line}" in done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_the_built_in_configuration_passes_the_check(place: Place) -> None:
    assert run_command(place, "check").returncode == 0


def test_a_file_that_is_not_there_is_a_config_error(place: Place) -> None:
    path = place.bpffs.parent / "none.yaml"
    done = run_command(place, "check", str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr


def test_a_file_full_of_aliases_is_refused_quickly(place: Place) -> None:
    """The billion laughs: nine levels of nine aliases each."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = place.bpffs.parent / "bomb.yaml"
    path.write_text("\n".join(lines))
    assert run_command(place, "check", str(path), deadline_s=scaled_s(10)).returncode == 2


def test_up_refuses_a_bad_configuration_and_leaves_nothing(place: Place) -> None:
    path = place.bpffs.parent / "config.yaml"
    path.write_text(listener("[{match: instruction}]"))
    done = run_command(place, "up", "-c", str(path))
    assert done.returncode == 2
    assert "allow" in done.stderr
    assert place.pins() == []
    assert place.processes() == []


def test_up_with_an_address_in_use_fails_and_names_it(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(listener())
    taken = f"127.0.0.1:{forwarder.address[1]}"
    path = place.bpffs.parent / "second.yaml"
    path.write_text(listener(bind=taken))
    done = run_command(
        place, "up", "--instance", "second", "-c", str(path), deadline_s=scaled_s(30)
    )
    assert done.returncode == 1
    assert taken in done.stderr
    assert "Traceback" not in done.stderr
