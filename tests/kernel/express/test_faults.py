"""Connections that the kernel opens: a bad network, and people who send what they should not."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from pyforwarder.datapath.express.connection_maps import LEAST_REST_S
from pyforwarder.datapath.express.places import ANSWER_TIMEOUT_S, Places
from tests.helpers import express_talks as talks
from tests.helpers.connections import Kernel
from tests.helpers.express_site import Site, asked, asked_place, looked_after, opener
from tests.helpers.faults import Action, faults
from tests.helpers.forged import ACK, FIN, PSH, RST, SYN, Forger, Segment, timestamp
from tests.helpers.peers import half_close, pattern, read_exactly, read_to_end
from tests.helpers.topology import Topology, topology
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.express_site import Open

SEED: Final = int(
    os.environ.get("PYFORWARDER_TEST_SEED") or random.SystemRandom().randrange(1 << 32)
)


class Bad(NamedTuple):
    """Which share of all packets is lost, doubled or comes late, at each of four interfaces."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0


NETWORKS: Final = {
    "good": Bad(),
    "doubling": Bad(duplicate=0.05, delay=0.05),
    "1 % loss": Bad(lose=0.01),
    "2 % loss and all else": Bad(lose=0.02, duplicate=0.02, delay=0.02),
    "5 % loss": Bad(lose=0.05, duplicate=0.01),
}
_TCP_REPAIR: Final = 19  # linux/tcp.h
_TCP_FASTOPEN: Final = 23


@pytest.fixture(scope="module")
def hosts() -> Iterator[Topology]:
    with topology(direct=True) as made:
        yield made


@pytest.fixture(scope="module")
def kernel(hosts: Topology) -> Iterator[Kernel]:
    with contextlib.closing(Kernel(hosts.forwarder, places=512)) as made:
        yield made


@pytest.fixture
def site(hosts: Topology, kernel: Kernel) -> Iterator[Open]:
    with opener(hosts, kernel) as made:
        yield made
    kernel.free()


# ------------------------------------------------------------------------- a bad network


@contextlib.contextmanager
def keeper(here: Site) -> Iterator[Places]:
    """Frees places that have ended, and those that were reset or last; in a thread."""
    places = looked_after(here)
    over = threading.Event()
    lasting: dict[int, float] = {}

    def look() -> None:
        while not over.wait(0.1):
            now_s = time.monotonic()
            seen = places.look(now_s)
            for ended in seen.ended:
                places.told(ended.place, ended.ask.word, now_s)
            for place in seen.lasting:
                lasting[place] = now_s
            for place, since_s in list(lasting.items()):
                record = here.kernel.record(place)
                # A worker would have its sockets there, which reset both ends.
                has_ended = record.reset or all(way.fin_acked for way in record.direction)
                if has_ended and now_s - since_s > 2 * LEAST_REST_S:
                    connections = here.kernel.connections
                    connections.end_connection(place, connections.word(place))
                    del lasting[place]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield places
    finally:
        over.set()
        thread.join()


def converse(
    here: Site, address: tuple[str, int], todo: list[talks.Talk], seen: list[talks.Seen]
) -> None:
    """All of them, some at a time, to the listener or the server itself."""

    def play(number: int) -> None:
        one = todo[number]
        with here.way.client.entered():
            sock = socket.create_connection(address, timeout=talks.PATIENCE_S)
        sock.send(one.first, socket.MSG_MORE if one.kind is talks.Kind.AT_ONCE else 0)
        talks.be_client(sock, one, seen[number])

    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(play, number) for number in range(len(todo))]:
            done.result()


def complaints(todo: list[talks.Talk], seen: list[talks.Seen]) -> list[str]:
    """What was not as it has to be."""
    return [
        f"{one.number} ({one.kind.value}; {len(one.first)} + {one.more}, {one.answer}): "
        f"{saw.client}, {saw.server}, {saw.wrong}"
        for one, saw in zip(todo, seen, strict=True)
        if saw.wrong or (saw.client, saw.server) != talks.due(one)
    ]


def play_both_ways(here: Site, network: Bad, count: int, seed: int) -> int:
    """So many conversations through express, and the same directly; how many express has had."""
    todo = [talks.talk(seed, number) for number in range(count)]

    def connect() -> socket.socket:
        with here.kernel.network.entered():
            return socket.create_connection(here.waiting.address, timeout=talks.PATIENCE_S)

    before = here.counted().get("COMMITTED", 0)
    for address in (here.waiting.address, here.listener.getsockname()[:2]):
        seen = [talks.Seen() for _ in todo]
        serve = partial(talks.be_server, talks=todo, seen=seen)
        with (
            talks.accepting(here.waiting.listener, serve),
            talks.accepting(here.listener, partial(talks.forward, connect=connect)),
            faults() as bad,
            bad.put_on(*here.way.doors),
        ):
            bad.set(seed=seed, lose=network.lose, duplicate=network.duplicate, delay=network.delay)
            converse(here, address, todo, seen)
        found = complaints(todo, seen)
        way = "directly" if address == here.waiting.address else "through express"
        assert not found, f"seed {seed}, {way}, {network}: " + "; ".join(found)
    return here.counted().get("COMMITTED", 0) - before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("version", [4, 6])
def test_conversations_end_as_direct_ones_do(site: Open, network: str, version: int) -> None:
    """Every byte, and every ending: a FIN of either side, a reset of either side."""
    here = site((False, False), version)
    with keeper(here):
        taken = play_both_ways(here, NETWORKS[network], 60, SEED)
    assert taken >= 30, here.counted()


@pytest.mark.soak
def test_soak(hosts: Topology, soak_s: float) -> None:
    """Thousands of them over few places, in every network in turns."""
    ends_s = time.monotonic() + soak_s
    number = taken = 0
    with contextlib.closing(Kernel(hosts.forwarder, places=256)) as kernel:
        while time.monotonic() < ends_s:
            for version in (4, 6):
                for network in NETWORKS.values():
                    with opener(hosts, kernel) as opened:
                        here = opened((False, False), version)
                        with keeper(here):
                            taken += play_both_ways(here, network, 200, SEED + number)
                        number += 200
                    kernel.free()
        assert taken > number / 2
    print(f"{number} conversations, {taken} by express, seed {SEED}")


@pytest.mark.parametrize("action", [Action.LOSE, Action.DUPLICATE, Action.DELAY])
@pytest.mark.parametrize("version", [4, 6])
def test_the_reset_for_our_own_stack_never_reaches_the_server(
    site: Open, action: Action, version: int
) -> None:
    """Also if somebody in front of us takes its mark off: then it looks like the client's."""
    here = site((False, False), version)
    with faults() as bad, bad.put_on(here.way.doors[1]):
        for _ in range(5):
            bad.set(marked=True, exact={1: action})
            with here.pair() as (client, server, place):
                wait_for(lambda: bad.counts()["matched"], "seen")
                for sender, receiver in ((client, server), (server, client)):
                    sender.sendall(b"and more")
                    assert read_exactly(receiver, 8) == b"and more"
                half_close(client)
                assert read_to_end(server) == b""
                server.sendall(b"last")
                half_close(server)
                assert read_to_end(client) == b"last"
                assert not here.kernel.record(place).reset
    assert here.counted()["COMMITTED"] == 5


@pytest.mark.parametrize("version", [4, 6])
def test_packets_to_ports_that_nobody_has(site: Open, version: int) -> None:
    """No packet of a server to a port of the range begins anything, or spoils the next."""
    here = site((False, False), version)
    first_port, places = here.kernel.connections.first_port, here.kernel.connections.places
    with (
        contextlib.closing(Forger(here.way.server, "s0", here.kernel.network, "f1")) as forger,
        faults() as answers,
        answers.put_on((here.way.server, "s0")),
    ):
        before, words = here.counted(), list(here.kernel.connections.words())
        answers.set(flags=RST)
        kinds = (SYN, SYN | ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK, 0)
        for port in (first_port, first_port + 1, first_port + places - 1):
            for flags in kinds:
                forger.send(
                    Segment(
                        version=version,
                        source=here.waiting.address,
                        target=(here.source, port),
                        seq=1 << 30,
                        ack=1 << 29,
                        flags=flags,
                        data=b"bytes" if flags & PSH else b"",
                    )
                )
        # The stack answers those that are no resets, as it does where nobody listens.
        wait_for(lambda: answers.counts()["matched"] >= 3 * 5, "answers")
        assert here.counted() == before
        assert list(here.kernel.connections.words()) == words
    for _ in range(3):
        with here.pair() as (client, server, _):
            server.sendall(b"back")
            assert read_exactly(client, 4) == b"back"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ways", [(True, True), (False, True), (False, False)])
def test_the_reset_for_our_own_stack_is_lost(
    site: Open, ways: tuple[bool, bool], version: int
) -> None:
    """It repeats its SYN-ACK, and forgets what it cannot send; before that nobody could adopt."""
    here = site(ways, version)

    port = f":{here.listener.getsockname()[1]:04X}"  # others' may be left of other tests

    def requests() -> int:
        name = "tcp6" if version == 6 else "tcp"
        with here.kernel.network.entered():
            rows = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
        ours = [row.split() for row in rows if row.split()[1].endswith(port)]
        return sum(row[3] == "03" for row in ours)  # TCP_SYN_RECV

    with faults() as bad, bad.put_on(here.way.doors[:2][-1]):
        bad.set(marked=True, exact={1: Action.LOSE})
        with here.pair() as (client, server, place):
            assert bad.counts()["lost"] == 1
            assert requests() == 1
            wait_for(lambda: requests() == 0, "it has forgotten it")
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(b"and more")
                assert read_exactly(receiver, 8) == b"and more"
            assert not here.kernel.record(place).reset
    assert here.nobody_was_accepted()


# --------------------------------------------------------------- while a server is asked


@contextlib.contextmanager
def unanswered(here: Site) -> Iterator[tuple[socket.socket, Segment, Forger]]:
    """A client whose server is asked, what it would send again, and one who sends it."""
    with (
        contextlib.closing(Forger(here.way.client, "c0", here.kernel.network, "f0")) as forger,
        faults() as bad,
        bad.put_on((here.way.server, "s0")),
    ):
        bad.set(lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            ask = asked(here)
            yield (
                client,
                Segment(
                    version=6 if client.family == socket.AF_INET6 else 4,
                    source=client.getsockname()[:2],
                    target=client.getpeername()[:2],
                    seq=ask.client_isn + 1,
                    ack=ask.kernel_isn + 1,
                    flags=ACK | PSH,
                    data=b"hello",
                ),
                forger,
            )


@pytest.mark.parametrize("version", [4, 6])
def test_an_old_packet_does_not_take_the_clocks_back(site: Open, version: int) -> None:
    """What comes late has old timestamps; the newest are what the server has been told."""
    here = site((False, False), version)
    with unanswered(here) as (_, again, forger):
        ask = asked(here)
        seen = here.counted().get("ASKED_AGAIN", 0)
        for later in (5, -3, 7, 2, -(1 << 20)):
            again.options = timestamp(ask.client_tsval + later, ask.client_tsecr + later)
            forger.send(again)
        wait_for(lambda: here.counted().get("ASKED_AGAIN", 0) >= seen + 5, "seen")
        now = asked(here)
        # The client itself sends again, too, with a clock of its own.
        assert (now.client_tsval - ask.client_tsval) % (1 << 32) >= 7
        assert (now.client_tsecr - ask.client_tsecr) % (1 << 32) in (0, 7)
        assert (now.client_tsval, now.client_tsecr) != (ask.client_tsval, ask.client_tsecr)


@pytest.mark.parametrize("version", [4, 6])
def test_a_client_that_begins_anew_is_not_kept_waiting(site: Open, version: int) -> None:
    """Its host has died without a word while a server was asked, and uses the same port again."""
    here = site((False, False), version)
    with faults() as bad, bad.put_on((here.way.server, "s0")):
        bad.set(lose=1.0)
        with here.dial(b"hello", alone=True) as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            own = client.getsockname()
            client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        bad.set()
        # Its SYN begins in the window of the old connection for so long (64 ns a number), and a
        # request takes that for its end (tcp_check_req).
        over_s = time.monotonic() + 0.01
        wait_for(lambda: time.monotonic() > over_s, "some milliseconds")
        with here.way.client.entered():
            client = socket.socket(client.family)
        with client:
            client.settimeout(DEADLINE_S)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(own)
            client.connect(here.listener.getsockname()[:2])
            assert here.counted()["ENDED"] == 1
            client.sendall(b"once more")
            server, _ = here.accept(b"once more")
            with server:
                server.sendall(b"back")
                assert read_exactly(client, 4) == b"back"
    assert here.nobody_was_accepted()


@pytest.mark.parametrize("version", [4, 6])
def test_our_own_stack_stays_silent_while_a_server_is_asked(site: Open, version: int) -> None:
    """It would repeat its SYN-ACK: that client has got it, and would answer each."""
    here = site((False, False), version)
    with unanswered(here) as (client, _, _):
        heard = here.way.client.counters()["TcpExtTCPSYNChallenge"]
        # The kernel has repeated it by now (TCP_TIMEOUT_INIT).
        begun_s = asked(here).begun_ns / 1e9
        wait_for(lambda: time.monotonic() > begun_s + 1.5, "a second and a half")
        assert here.way.client.counters()["TcpExtTCPSYNChallenge"] == heard
        assert client.fileno() >= 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ways", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("how", ["given up", "refused"])
def test_a_worker_gets_a_client_whose_server_was_asked_for_seconds(
    site: Open, ways: tuple[bool, bool], version: int, how: str
) -> None:
    """Our own stack remembers its handshake, although it was kept from repeating its SYN-ACK."""
    here = site(ways, version)
    places = looked_after(here)
    with faults() as bad, here.dial() as client:
        with bad.put_on(here.way.doors[-1]):
            bad.set(flags=SYN, lose=1.0)
            client.sendall(b"hello")
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            # The kernel has tried to repeat it twice by then (TCP_TIMEOUT_INIT, doubled).
            begun_s = asked(here).begun_ns / 1e9
            wait_for(lambda: time.monotonic() > begun_s + 3.2, "some seconds")
            if how == "given up":
                places.look(time.monotonic() + ANSWER_TIMEOUT_S + 1)
                assert here.counted()["UNANSWERED"] == 1
            else:
                here.waiting.listener.close()
        here.falls_back(client, b"hello")


@pytest.mark.parametrize("version", [4, 6])
def test_only_what_no_syn_of_ours_could_cause_is_reset(site: Open, version: int) -> None:
    """RFC 9293, 3.10.7.3: an acknowledgement of our SYN alone is dropped, others are reset."""
    here = site((False, False), version)
    with (
        unanswered(here),
        contextlib.closing(Forger(here.way.server, "s0", here.kernel.network, "f1")) as forger,
        faults() as resets,
        resets.put_on((here.way.server, "s0")),
    ):
        resets.set(flags=RST, lose=1.0)
        place = asked_place(here)
        says = Segment(
            version=version,
            source=here.waiting.address,
            target=(here.source, here.kernel.connections.first_port + place),
            seq=1,
            ack=asked(here).own_isn + 1,
        )
        forger.send(says)
        for off in (1, -1, 1 << 30):
            says.ack = asked(here).own_isn + 1 + off
            forger.send(says)
        wait_for(lambda: resets.counts()["matched"] >= 3, "three resets")
        assert resets.counts()["matched"] == 3
        assert asked_place(here) == place


@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_with_bytes_in_it(site: Open, version: int) -> None:
    """The kernel ignores them without TFO; they are the first that come again behind it."""
    here = site((False, False), version)
    # A client of TFO that has no cookie yet asks for one; then it has, and sends bytes at once.
    here.kernel.network.set(ipv4__tcp_fastopen=3)
    here.way.client.set(ipv4__tcp_fastopen=1)
    try:
        here.listener.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN, 16)
        for number in range(3):
            first = b"fast %d" % number
            with here.way.client.entered():
                client = socket.socket(here.listener.family)
            with client:
                client.sendto(first, socket.MSG_FASTOPEN, here.listener.getsockname()[:2])
                client.settimeout(DEADLINE_S)
                if number == 0:
                    server, _ = here.accept(first)  # no cookie: a handshake as any other
                    server.close()
                else:
                    here.falls_back(client, first)
        assert here.counted()["TAKEN"] == 1
    finally:
        here.kernel.network.set(ipv4__tcp_fastopen=1)


@pytest.mark.parametrize("version", [4, 6])
def test_mptcp_is_a_workers(site: Open, version: int) -> None:
    """The client's, of a listener that speaks it; and to one that does not it is plain TCP."""
    here = site((False, False), version)
    with here.way.client.entered():
        client = socket.socket(here.listener.family, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    with client:
        client.settimeout(DEADLINE_S)
        client.connect(here.listener.getsockname()[:2])
        client.sendall(b"hello")
        server, _ = here.accept(b"hello")
        with server:
            server.sendall(b"back")
            assert read_exactly(client, 4) == b"back"


@pytest.mark.parametrize("version", [4, 6])
def test_a_router_says_that_the_first_bytes_are_too_long(version: int) -> None:
    """They were told to fit the interfaces, and a router behind has a narrower one."""
    with (
        topology(router=True) as routed,
        contextlib.closing(Kernel(routed.forwarder)) as kernel,
        opener(routed, kernel) as opened,
    ):
        here = opened((False, False), version)
        routed.limit_path(1300)
        with here.pair(b"hello") as (client, server, _):
            client.sendall(pattern(100_000))
            assert read_exactly(server, 100_000) == pattern(100_000)
        client = here.dial(pattern(1400))
        with client:
            server, _ = here.accept(pattern(1400))
            with server:
                client.sendall(b"more")
                assert read_exactly(server, 4) == b"more"
        assert here.counted()["COMMITTED"] == 2


@pytest.mark.parametrize("version", [4, 6])
def test_odd_flags_while_a_server_is_asked_end_nothing(site: Open, version: int) -> None:
    """Not even a packet with all the right numbers."""
    here = site((False, False), version)
    with unanswered(here) as (_, again, forger):
        place = asked_place(here)
        for flags in (SYN, SYN | ACK, 0, RST | SYN):
            again.flags = flags
            forger.send(again)
        seen = here.counted().get("ASKED_AGAIN", 0)
        again.flags = ACK | PSH
        again.options = timestamp(asked(here).client_tsval, asked(here).client_tsecr)
        forger.send(again)
        wait_for(lambda: here.counted().get("ASKED_AGAIN", 0) > seen, "seen")
        assert asked_place(here) == place


@pytest.mark.parametrize("version", [4, 6])
def test_a_socket_that_has_come_up_meanwhile_keeps_the_client(site: Open, version: int) -> None:
    """What came behind the handshake was with our stack when the first bytes were taken.

    A worker may have spoken to its client by then: of two who answer, one is heard, from the first
    byte on.
    """
    here = site((False, False), version)
    network = here.kernel.network
    with (
        contextlib.closing(Forger(network, "lo", network, "lo")) as stack,
        faults() as bad,
        bad.put_on((here.way.server, "s0")),
    ):
        stack.mark(here.kernel.connections.mark)
        bad.set(lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            ask = asked(here)
            stack.send(
                Segment(
                    version=version,
                    source=client.getsockname()[:2],
                    target=client.getpeername()[:2],
                    seq=ask.client_isn + 1,
                    ack=ask.kernel_isn + 1,
                    options=timestamp(ask.client_tsval, ask.client_tsecr),
                )
            )
            worker, _ = here.listener.accept()
            with worker:
                worker.settimeout(DEADLINE_S)
                worker.sendall(b"from a worker")
                half_close(worker)
                bad.set()
                assert read_exactly(worker, 5) == b"hello"
                assert read_to_end(client) == b"from a worker"
                half_close(client)
                assert read_to_end(worker) == b""
    assert here.waiting.nobody_came()
    counted = here.counted()
    assert "COMMITTED" not in counted
    assert "REFUSED" not in counted  # the server has not
