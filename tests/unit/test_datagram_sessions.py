"""What a UDP session keeps of its configuration, what its faults cost, and what the log says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Refuse
from pyforwarder.runtime import askers, resolver
from pyforwarder.runtime.counters import Counter, ListenerCounter, RuleCounter
from pyforwarder.worker.udp.session import Session
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.instruction import ACK, instruction
from tests.helpers.quic import HANDSHAKE, V1, crypto, header, hello, initial

NOBODY = "127.0.0.1:1"


def rules(*written: str, more: str = "") -> str:
    return (
        "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
        f" rules: [{', '.join(written)}]}}]\n{more}"
    )


def rule(name: str, prefix: str, to: str) -> str:
    return f"{{name: {name}, match: {{bytes: {{prefix: {prefix}}}}}, to: '{to}'}}"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


def text_of(server: socket.socket) -> str:
    return "{}:{}".format(*server.getsockname())


@pytest.fixture
def play(server: socket.socket) -> Iterator[DatagramPlay]:
    """Three rules, all to one server."""
    to = text_of(server)
    made = DatagramPlay(rules(*(rule(name, name.upper(), to) for name in "abc")))
    yield made
    made.close()


class Asked:
    """What names are asked for; they are answered once `go` is set."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.go = threading.Event()

    def lookup(self, name: str) -> list[str]:
        self.names.append(name)
        return ["127.0.0.1"] if self.go.wait(20) else []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    names = Asked()
    monkeypatch.setattr(askers, "lookup", names.lookup)
    monkeypatch.setattr(resolver, "cares_knows_all_sources", lambda: False)
    yield names
    names.go.set()


# Packets that others send in our name


@pytest.mark.parametrize("bind", ["", "0.0.0.0:{}"])
def test_datagram_in_the_name_of_a_listener_opens_no_session(
    play: DatagramPlay, server: socket.socket, bind: str
) -> None:
    """What its server answers would be the next one, and so on without an end."""
    to = text_of(server)
    if bind:
        play.reload(rules(rule("a", "A", to)), bind=bind.format(play.address[1]))
    own = play.server.ports["main"].sock
    for _ in range(2):
        own.sendto(b"A", play.address)
    play.run_until(lambda: play.closed(CloseReason.DENIED) == 2, "refusals")
    assert not play.server.by_id
    line = play.said()[-1]
    assert (line["reason"], line["refusal"]) == ("denied", "its sender would be this forwarder")
    with pytest.raises(BlockingIOError):
        server.recv(100)
    client = play.client()
    client.send(b"A")
    assert play.receive(server)[0] == b"A"


# Reload


@pytest.mark.parametrize("end", ["flushed", "idle"])
def test_session_ends_under_the_rules_that_it_was_opened_under(
    play: DatagramPlay, server: socket.socket, end: str
) -> None:
    before = play.state
    client = play.client()
    client.send(b"C1")
    assert play.receive(server)[0] == b"C1"
    play.reload(rules(rule("other", "X", NOBODY)))
    client.send(b"C2")
    assert play.receive(server)[0] == b"C2"
    if end == "flushed":
        assert play.server.flush_ids(None) == [1]
    else:
        play.pass_time(200)
    (line,) = play.said()
    assert (line["rule"], line["reason"], line["up_packets"]) == ("c", end, 2)
    assert play.counters[before.rule_counters[2] + RuleCounter.TAKEN] == 1
    assert play.limits.sessions == 0
    # And the client may come back, to what the rules are now.
    client.send(b"C3")
    play.run_until(lambda: play.closed(CloseReason.NO_MATCH), "refusal")


def test_refusal_after_a_reload_counts_for_the_rule_that_took_the_session(
    asked: Asked,
) -> None:
    play = DatagramPlay(rules(rule("a", "A", NOBODY), rule("b", "B", "name.test:1")))
    before = play.state
    play.client().send(b"B")
    play.run_until(lambda: asked.names, "question")
    play.reload(rules(rule("b", "B", NOBODY), rule("a", "A", NOBODY)))
    play.pass_time(60)
    (line,) = play.said()
    assert (line["rule"], line["reason"]) == ("b", "timeout")
    refused = [play.counters[at + RuleCounter.REFUSED] for at in before.rule_counters]
    assert refused == [0, 1]
    asked.go.set()
    play.close()


def test_session_finds_its_server_after_a_reload_without_its_upstream(
    server: socket.socket, asked: Asked
) -> None:
    port = server.getsockname()[1]
    upstream = f"upstreams: {{web: {{servers: ['name.test:{port}']}}}}"
    play = DatagramPlay(rules("{name: r, match: any, to: web}", more=upstream))
    play.client().send(b"hello")
    play.run_until(lambda: asked.names, "question")
    play.reload(rules(rule("other", "X", NOBODY)))
    asked.go.set()
    assert play.receive(server)[0] == b"hello"
    play.server.flush_ids(None)
    (line,) = play.said()
    assert (line["rule"], line["upstream"]) == ("r", "web")
    play.close()


def test_listener_that_becomes_a_wildcard_answers_from_the_address_that_was_asked(
    play: DatagramPlay, server: socket.socket
) -> None:
    port = play.address[1]
    play.reload(rules(rule("a", "A", text_of(server))), bind=f"0.0.0.0:{port}")
    client = play.client(to=("127.0.0.2", port))
    client.send(b"A")
    source = play.receive(server)[1]
    server.sendto(b"answer", source)
    assert play.receive(client) == (b"answer", ("127.0.0.2", port))


# Faults


def test_fault_in_the_log_leaves_nothing_behind(
    play: DatagramPlay, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = play.client()
    client.send(b"A1")
    play.receive(server)

    def broken(*_: object) -> None:
        raise RuntimeError("no line")

    with monkeypatch.context() as patch:
        patch.setattr(play.server.log, "closed", broken)
        assert len(play.server.flush_ids(None)) == 1
    assert "no line" in str(play.said())
    play.loop.run_once(0)
    assert (play.limits.sessions, play.counters[Counter.OPEN]) == (0, 0)
    client.send(b"A2")
    assert play.receive(server)[0] == b"A2"
    assert play.count(ListenerCounter.ACCEPTED) == 2


@pytest.mark.parametrize("is_known", [False, True])
def test_fault_over_an_answered_name_is_its_sessions(
    server: socket.socket, asked: Asked, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    play = DatagramPlay(rules(rule("r", "A", f"name.test:{server.getsockname()[1]}")))
    if is_known:
        asked.go.set()
        play.client().send(b"A")
        play.receive(server)
    owners: list[object] = []

    def failed(owner: object, error: Exception) -> None:
        owners.append(owner)
        assert str(error) == "a fault of ours"
        assert isinstance(owner, Session)
        play.server.end(owner, CloseReason.INTERNAL)

    def connect(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    play.loop.on_error = failed
    monkeypatch.setattr(play.server.connecting, "_connect", connect)
    play.client().send(b"A")
    asked.go.set()
    play.run_until(lambda: play.closed(CloseReason.INTERNAL), "end")
    assert [type(owner) for owner in owners] == [Session]
    assert play.limits.sessions == int(is_known)
    play.close()


def test_server_that_refuses_one_of_the_waiting_datagrams_fails_once(
    server: socket.socket, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.getsockname()[1]
    server.close()
    upstream = f"upstreams: {{web: {{servers: ['name.test:{port}']}}}}"
    play = DatagramPlay(rules("{name: r, match: any, to: web}", more=upstream))
    failures: list[object] = []
    balancer = play.generation.balancers["web"]
    monkeypatch.setattr(balancer, "failed", lambda server, _now_s: failures.append(server))
    client = play.client()
    for _ in range(5):
        client.send(b"x")
        play.settle()
    asked.go.set()
    play.run_until(lambda: play.closed(CloseReason.REFUSED), "refusal")
    assert len(failures) == 1
    assert play.server.copying._waiting_bytes == 0
    (line,) = play.said()
    assert line["refusal"] == "Connection refused"
    play.close()


# What an upstream says


def test_session_waits_for_its_server_as_long_as_the_upstream_says(asked: Asked) -> None:
    upstream = "upstreams: {web: {servers: ['name.test:1'], connect_timeout: 1s}}"
    play = DatagramPlay(rules("{name: r, match: any, to: web}", more=upstream))
    play.client().send(b"x")
    play.run_until(lambda: asked.names, "question")
    play.pass_time(1.1)
    assert play.closed(CloseReason.TIMEOUT) == 1
    (line,) = play.said()
    assert line["refusal"] == "no answer in time"
    asked.go.set()
    play.close()


@pytest.mark.parametrize(("resolve_every", "questions"), [("60s", 1), ("10s", 2)])
def test_name_is_asked_as_often_as_the_upstream_says(
    server: socket.socket, asked: Asked, resolve_every: str, questions: int
) -> None:
    asked.go.set()
    servers = f"['name.test:{server.getsockname()[1]}']"
    upstream = f"upstreams: {{web: {{servers: {servers}, resolve_every: {resolve_every}}}}}"
    play = DatagramPlay(rules("{name: r, match: any, to: web}", more=upstream))
    for said in (b"first", b"second"):
        play.client().send(said)
        assert play.receive(server)[0] == said
        play.pass_time(30)
    assert len(asked.names) == questions
    play.close()


# The log


@pytest.mark.parametrize(
    ("to", "reason", "words"),
    [
        ("127.0.0.1:9", "denied", "allow does not list 127.0.0.1 port 9"),
        ("name.test:9", "denied", "allow does not list port 9"),
        ("name.test:7", "denied", "allow does not list 127.0.0.1 port 7"),
    ],
)
def test_log_says_why_a_named_server_was_refused(
    asked: Asked, to: str, reason: str, words: str
) -> None:
    asked.go.set()
    play = DatagramPlay(rules("{name: r, match: instruction, allow: ['192.0.2.0/24:7']}"))
    play.client().send(instruction(to))
    (line,) = play.run_until(play.said, "line")
    assert (line["reason"], line["refusal"], line["asked"]) == (reason, words, to)
    play.close()


def test_log_says_why_a_name_was_of_no_use(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"none.test": [], "many.test": [f"192.0.2.{n}" for n in range(200)] * 2}
    monkeypatch.setattr(askers, "lookup", hosts.__getitem__)
    play = DatagramPlay(rules("{name: r, match: instruction, allow: [any]}"))
    for name, words in (
        ("none.test", "the name has no address"),
        ("many.test", "the name has too many addresses"),
    ):
        play.client().send(instruction(f"{name}:7"))
        (line,) = play.run_until(play.said, "line")
        assert (line["reason"], line["refusal"]) == ("unresolved", words)
    play.close()


def test_log_says_that_too_many_names_are_asked(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_CLIENTS_BY_THREADS", resolver.Bounds(1, 1, 1))
    play = DatagramPlay(rules("{name: r, match: instruction, allow: [any]}"))
    play.client().send(instruction("first.test:7"))
    play.settle()
    play.client().send(instruction("second.test:7"))
    (line,) = play.run_until(play.said, "line")
    assert (line["reason"], line["refusal"]) == ("busy", "too many names at once")
    asked.go.set()
    play.close()


def test_log_says_why_a_first_datagram_was_refused(play: DatagramPlay) -> None:
    play.client().send(b"X")
    (line,) = play.run_until(play.said, "line")
    assert (line["reason"], line["refusal"]) == ("no_match", "no rule matches")


def test_log_says_what_a_refused_instruction_was_decided_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = DatagramPlay(rules("{name: r, match: instruction, allow: [any]}"))
    decision = Refuse(
        play.state.ruleset.rules[0],
        CloseReason.TOKEN,
        b"",
        reset=False,
        cause="the token has expired",
        facts=(("key", "ops"),),
    )
    monkeypatch.setattr(play.state.ruleset, "decide", lambda *_a, **_k: decision)
    play.client().send(b"x")
    (line,) = play.run_until(play.said, "line")
    assert (line["reason"], line["rule"]) == ("token", "r")
    assert (line["refusal"], line["key"]) == ("the token has expired", "ops")
    play.close()


# PROXY headers


def proxied(send: str = "v2", to: str = "") -> tuple[DatagramPlay, socket.socket]:
    """A listener that tells its server who the client is."""
    play = DatagramPlay(rules("{match: any, reject: close}"))
    server, text = play.upstream()
    match = (
        "{match: instruction, allow: [any], send_proxy: v2}"
        if to
        else (f"{{match: any, to: web, send_proxy: {send}}}")
    )
    upstream = f"upstreams: {{web: {{servers: ['{text}'], send_proxy: v2}}}}"
    play.reload(rules(match, more=upstream))
    return play, server


def header_of(client: socket.socket, asked: tuple[str, int], session: int) -> bytes:
    """A PROXY header of version 2 for UDP over IPv4, with the session's id."""
    host, port = str(client.getsockname()[0]), int(client.getsockname()[1])
    block = socket.inet_aton(host) + socket.inet_aton(asked[0])
    block += port.to_bytes(2, "big") + asked[1].to_bytes(2, "big")
    block += b"\x05" + len(str(session)).to_bytes(2, "big") + b"%d" % session
    return b"\r\n\r\n\0\r\nQUIT\n\x21\x12" + len(block).to_bytes(2, "big") + block


def test_server_is_told_of_the_client_once_in_front_of_the_first_datagram() -> None:
    play, server = proxied()
    client = play.client()
    for data in (b"first", b"second"):
        client.send(data)
    header = header_of(client, play.address, 1)
    assert play.receive(server)[0] == header + b"first"
    assert play.receive(server)[0] == b"second"
    play.server.flush_ids(None)
    (line,) = play.said()
    assert line["up_bytes"] == len(b"firstsecond")
    other = play.client()
    other.send(b"")
    assert play.receive(server)[0] == header_of(other, play.address, 2)
    play.close()


def test_rule_may_say_that_there_is_no_header() -> None:
    play, server = proxied("'off'")
    play.client().send(b"first")
    assert play.receive(server)[0] == b"first"
    play.close()


def test_header_names_the_address_that_was_asked() -> None:
    play = DatagramPlay(rules("{match: any, reject: close}"))
    server, text = play.upstream()
    port = play.address[1]
    play.reload(rules(f"{{match: any, to: '{text}', send_proxy: v2}}"), bind=f"0.0.0.0:{port}")
    client = play.client(to=("127.0.0.2", port))
    client.send(b"x")
    assert play.receive(server)[0] == header_of(client, ("127.0.0.2", port), 1) + b"x"
    play.close()


def test_header_waits_for_the_first_datagram_behind_an_instruction() -> None:
    play, server = proxied(to="instruction")
    client = play.client()
    client.send(instruction("{}:{}".format(*server.getsockname())))
    assert play.receive(client)[0] == ACK
    client.send(b"payload")
    assert play.receive(server)[0] == header_of(client, play.address, 1) + b"payload"
    play.close()


def test_header_is_not_lost_with_a_datagram_that_has_no_room_for_it() -> None:
    play, server = proxied()
    client = play.client()
    client.send(bytes(65_500))
    play.run_until(lambda: play.counters[Counter.DATAGRAMS_LOST], "loss")
    client.send(b"small")
    assert play.receive(server)[0] == header_of(client, play.address, 1) + b"small"
    play.close()


# QUIC clients whose address changes

SERVER_ID = b"server-1"
HELLO = initial(crypto(0, hello()))


def answer_of_server(connection_id: bytes = SERVER_ID) -> bytes:
    return header(HANDSHAKE[V1], scid=connection_id) + b"\x40\x20" + bytes(32)


def short(connection_id: bytes = SERVER_ID) -> bytes:
    return b"\x41" + connection_id + b"\x33" * 30


def quic_play(to: str = "web") -> tuple[DatagramPlay, socket.socket, socket.socket]:
    """A QUIC client that its server has answered; the client's socket and the server's."""
    play = DatagramPlay(rules("{match: any, reject: close}"))
    play.upstream()
    server, text = play.upstream()
    play.reload(quic_rules(to.replace("SERVER", text), text))
    client = play.client()
    client.send(HELLO)
    source = play.receive(server)[1]
    server.sendto(answer_of_server(), source)
    play.receive(client)
    return play, client, server


def quic_rules(to: str, text: str) -> str:
    return rules(
        f"{{name: q, match: {{quic: {{sni: a.example.com}}}}, to: '{to}'}}",
        f"{{name: rest, match: {{bytes: never}}, to: '{NOBODY}'}}",
        more=f"upstreams: {{web: {{servers: ['{text}']}}}}",
    )


@pytest.mark.parametrize("to", ["web", "SERVER"])
def test_known_connection_id_leads_to_its_server_from_another_address(to: str) -> None:
    play, client, server = quic_play(to)
    moved = play.client()
    moved.send(short())
    data, source = play.receive(server)
    assert data == short()
    server.sendto(b"challenge", source)
    assert play.receive(moved)[0] == b"challenge"
    # The old address is still served: a stranger that has only seen the id turns nobody's answers
    # away.
    client.send(short())
    assert play.receive(server)[1] != source
    play.server.flush_ids(None)
    assert {line["rule"] for line in play.said()} == {"q"}
    play.close()


def test_unknown_connection_id_is_for_the_rules() -> None:
    play, _, _ = quic_play()
    play.client().send(short(b"server-2"))
    play.run_until(lambda: play.closed(CloseReason.NO_MATCH), "refusal")
    # And a known one in a long header: a client that begins.
    play.client().send(header(0, dcid=SERVER_ID) + b"\0\x40\x20" + bytes(32))
    play.run_until(lambda: play.closed(CloseReason.NO_MATCH) == 2, "refusal")
    play.close()


def test_connection_id_leads_on_for_a_while_after_its_session() -> None:
    play, _, server = quic_play()
    play.server.flush_ids(None)
    moved = play.client()
    moved.send(short())
    assert play.receive(server)[0] == short()
    play.server.flush_ids(None)
    play.pass_time(100)
    play.client().send(short())
    assert play.receive(server)[0] == short()
    play.server.flush_ids(None)
    play.pass_time(121)
    play.client().send(short())
    play.run_until(lambda: play.closed(CloseReason.NO_MATCH), "refusal")
    play.close()


def test_connection_id_leads_nowhere_that_a_reload_has_taken_away() -> None:
    play, _, server = quic_play()
    text = text_of(server)
    for config in (
        quic_rules("web", NOBODY),
        quic_rules(NOBODY, text),
        rules("{name: other, match: quic, reject: close}"),
        rules(f"{{name: q, match: {{bytes: never}}, to: '{text}'}}"),
    ):
        before = play.closed(CloseReason.NO_MATCH)
        play.reload(config)
        play.client().send(short())
        play.run_until(lambda: play.closed(CloseReason.NO_MATCH) > before, "refusal")  # noqa: B023
    play.reload(quic_rules("web", text))
    play.client().send(short())
    assert play.receive(server)[0] == short()
    play.close()


def test_followed_client_may_go_no_further_than_allow_says(asked: Asked) -> None:
    asked.go.set()
    play = DatagramPlay(rules("{match: any, reject: close}"))
    server, text = play.upstream()
    port = text.partition(":")[2]
    to_name = "{{name: q, match: quic, to: sni, port: {}, allow: ['{}']}}"
    play.reload(rules(to_name.format(port, "loopback")))
    client = play.client()
    client.send(HELLO)
    server.sendto(answer_of_server(), play.receive(server)[1])
    play.receive(client)
    moved = play.client()
    moved.send(short())
    assert play.receive(server)[0] == short()
    play.reload(rules(to_name.format(port, "192.0.2.0/24")))
    play.client().send(short())
    play.run_until(lambda: play.closed(CloseReason.DENIED), "refusal")
    play.close()


def test_ids_are_learnt_from_servers_of_quic_rules_alone(server: socket.socket) -> None:
    play = DatagramPlay(
        rules(
            "{match: {quic: {sni: other}}, to: '127.0.0.1:1'}",
            f"{{match: any, to: '{text_of(server)}'}}",
        )
    )
    client = play.client()
    client.send(HELLO)
    server.sendto(answer_of_server(), play.receive(server)[1])
    play.receive(client)
    moved = play.client()
    moved.send(short())
    # By the rule for all: the id is not known.
    assert play.receive(server)[0] == short()
    assert not play.ids._held
    play.close()
