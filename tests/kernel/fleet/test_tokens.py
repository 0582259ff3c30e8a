"""Single-use tokens in a fleet: used up at one machine, used up at all of them."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pyforwarder.core import token
from pyforwarder.core.address import Address
from tests.helpers.etcd import Etcd, running
from tests.helpers.instruction import ACK, refusal
from tests.helpers.peers import AnswerServer, dial, read_to_end
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

KEY = bytes(range(32))
REFUSED = refusal("token")
TOKENS = 60
REPLAYS = 100_000


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))


def config(etcd: Etcd, directory: Path, name: str, tokens: str = "{}") -> str:
    (directory / "ops.key").write_bytes(KEY)
    (directory / "ops.key").chmod(0o600)
    return (
        f"fleet: {{endpoints: ['{etcd.endpoint}'], name: edge, instance: {name}, "
        f"tokens: {tokens}}}\n"
        "workers: 2\ndatapath: copy\n"
        "listeners:\n"
        "- {name: main, bind: '127.0.0.1:0', rules: [&rule "
        "{match: instruction, allow: [loopback], token: required}]}\n"
        "- {name: udp, bind: '127.0.0.1:0', protocol: udp, rules: [*rule]}\n"
        f"tokens: {{keys: {{ops: {directory}/ops.key}}, max_lifetime: 1h}}\n"
    )


def signed(server: tuple[str, int], number: int) -> bytes:
    """A token; each number gives another one, also a few seconds later."""
    now_unix_s = int(time.time())  # noqa: TID251 - tokens expire by the wall clock
    return token.make(
        Address(*server), expires_unix_s=now_unix_s + 600 + 20 * number, key_id="ops", key=KEY
    )


def answer(machine: Daemon, instruction: bytes) -> bytes:
    return answer_at(machine.address, instruction)


def answer_at(address: tuple[str, int], instruction: bytes) -> bytes:
    with dial(address) as sock:
        sock.sendall(instruction)
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


def datagrams_are_claimed_too(first: Daemon, second: Daemon) -> None:
    def dialed(machine: Daemon) -> socket.socket:
        (row,) = [row for row in machine.show("listeners") if row["name"] == "udp"]
        host, _, port = str(row["bind"]).rpartition(":")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(DEADLINE_S)
        sock.connect((host, int(port)))
        return sock

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(DEADLINE_S)
        once = signed(server.getsockname(), 0)
        with dialed(first) as client:
            client.send(once + b"one")
            client.send(b"two")  # before it is known whether it may
            assert client.recv(100) == ACK
            assert [server.recv(100) for _ in range(2)] == [b"one", b"two"]
        with dialed(second) as client:
            client.send(once)
            assert client.recv(100) == REFUSED


def test_a_token_is_good_once_in_the_whole_fleet(
    start_forwarder: StartForwarder, etcd: Etcd, tmp_path: Path
) -> None:
    machines = [
        start_forwarder(config(etcd, tmp_path, name), instance=name) for name in ("one", "two")
    ]
    with AnswerServer("server") as server:
        tokens = [signed(server.address, number) for number in range(TOKENS)]
        for number, once in enumerate(tokens):
            first, second = machines[number % 2], machines[(number + 1) % 2]
            assert answer(first, once) == ACK
            assert answer(second, once) == REFUSED
        # All of them again, everywhere.
        for machine in machines:
            for once in random.sample(tokens, 20):
                assert answer(machine, once) == REFUSED
        # Both at the same instant: one of them.
        for number in range(TOKENS, TOKENS + 20):
            once = signed(server.address, number)
            answers: list[bytes] = []
            barrier = threading.Barrier(2)

            def use(machine: Daemon, once: bytes = once) -> None:
                barrier.wait()  # noqa: B023 - joined before the next turn
                answers.append(answer(machine, once))  # noqa: B023

            users = [threading.Thread(target=use, args=(machine,)) for machine in machines]
            for user in users:
                user.start()
            for user in users:
                user.join()
            assert sorted(answers) == sorted([ACK, REFUSED])
    datagrams_are_claimed_too(*machines)
    machines[1].wait_for_line("used already at another machine of the fleet")
    # With a lease, few of which are for all of them.
    keys = etcd.ctl("get", "--prefix", "--keys-only", "/pyforwarder/edge/tokens/").split()
    assert len(keys) == TOKENS + 20 + 1
    assert 0 < len(etcd.ctl("lease", "list").split("\n")) < 20


@pytest.mark.soak
def test_no_replay_of_a_hundred_thousand_is_taken_at_another_machine(
    start_forwarder: StartForwarder, etcd: Etcd, tmp_path: Path, soak_s: float
) -> None:
    """Of tokens that were used at the first, and of some that are used just then."""
    first, second = (
        start_forwarder(config(etcd, tmp_path, name), instance=name) for name in ("one", "two")
    )
    wanted = REPLAYS if soak_s >= 600 else REPLAYS // 20
    with AnswerServer("server") as server:
        used = [signed(server.address, number) for number in range(TOKENS)]
        for once in used:
            assert answer(first, once) == ACK
        counts: Counter[bytes] = Counter()
        young: list[bytes] = []
        # It is looked for in all that the daemon has said, which is much in the end.
        address = second.address

        def replay(seed: int) -> Counter[bytes]:
            rng = random.Random(seed)
            return Counter(
                answer_at(
                    address,
                    rng.choice(young[-4:] or used) if rng.random() < 0.1 else rng.choice(used),
                )
                for _ in range(wanted // 4)
            )

        with ThreadPoolExecutor(4) as threads:
            replays = [threads.submit(replay, seed) for seed in range(4)]
            while not all(one.done() for one in replays):
                if len(young) < TOKENS:
                    once = signed(server.address, TOKENS + len(young))
                    assert answer(first, once) == ACK
                    young.append(once)
                wait([*replays], timeout=0.2, return_when=FIRST_COMPLETED)
            for one in replays:
                counts += one.result()
        assert counts == {REFUSED: 4 * (wanted // 4)}
        print(f"{counts.total()} replays of {TOKENS + len(young)} tokens")


def test_without_the_store_tokens_are_refused_and_nobody_else_waits(
    start_forwarder: StartForwarder, etcd: Etcd, tmp_path: Path
) -> None:
    machine = start_forwarder(config(etcd, tmp_path, "one"))
    with AnswerServer("server") as server:
        assert answer(machine, signed(server.address, 0)) == ACK
        etcd.stop()
        unknown = signed(server.address, 1)
        assert answer(machine, unknown) == REFUSED
        machine.wait_for_line("fleet_tokens_lost")
        machine.wait_for_line("store does not say whether it was used")
        machine.reconfigure(config(etcd, tmp_path, "one", tokens="{store_lost: machine}"))
        assert machine.command("reload").returncode == 0
        once = signed(server.address, 2)
        assert answer(machine, once) == ACK
        assert answer(machine, once) == REFUSED  # here it is used up all the same
        assert answer(machine, unknown) == REFUSED
        etcd.start()
        assert answer(machine, signed(server.address, 3)) == ACK
        machine.reconfigure(config(etcd, tmp_path, "one", tokens="{scope: machine}"))
        assert machine.command("reload").returncode == 0
        etcd.stop()
        assert answer(machine, signed(server.address, 4)) == ACK


def test_a_store_that_hangs_is_waited_for_so_long_and_by_nobody_else(
    start_forwarder: StartForwarder, etcd: Etcd, tmp_path: Path
) -> None:
    machine = start_forwarder(config(etcd, tmp_path, "one", tokens="{wait: 500ms}"))
    with AnswerServer("server") as server:
        assert answer(machine, signed(server.address, 0)) == ACK
        speakers = [
            child
            for child in psutil.Process(machine.process.pid).children()
            if any(etcd.port in (c.raddr or ()) for c in child.net_connections())
        ]
        assert len(speakers) == 2
        with etcd.suspended():
            with dial(machine.address) as waits:
                waits.sendall(signed(server.address, 1) + b"payload")
                # Meanwhile the same worker decides about others, whichever it is.
                for _ in range(10):
                    assert answer(machine, b"06xx") == refusal("malformed")
                waits.shutdown(socket.SHUT_WR)
                assert read_to_end(waits) == REFUSED
            # The process that asks is replaced, and clients that wait for it are answered.
            with dial(machine.address) as waits:
                waits.sendall(signed(server.address, 2))
                waits.shutdown(socket.SHUT_WR)
                for speaker in speakers:
                    speaker.kill()
                assert read_to_end(waits) == REFUSED
        machine.wait_for_line("fleet_tokens_died")
        wait_for(
            lambda: answer(machine, signed(server.address, random.randrange(9, 99))) == ACK,
            "tokens are claimed again",
        )
