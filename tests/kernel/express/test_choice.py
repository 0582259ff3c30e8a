"""The program that chooses a server says what its model says, also while its tables change."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import math
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address
from pyforwarder.core.express.choosing import (
    MOST_SERVERS,
    MOST_TURNS,
    ByClient,
    Choice,
    Drawing,
    InTurn,
    Target,
)
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.express.choice_abi import Outcome
from pyforwarder.datapath.express.choices import MOST_CHOICES, REST_S, Choices

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
SERVERS = [Address("10.0.0.1", port) for port in range(1, MOST_TURNS + 1)]


def place_of(server: Address) -> int:
    """Of a server among the targets."""
    return server.port


def target_of(target: Target) -> int:
    """The place of its server."""
    return place_of(target.server)


class Program:
    """The program, and its choices."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as opened:
            self.choices = Choices(MOST_TURNS + 1)
            opened.callback(self.choices.close)
            (self.fd,) = load_programs(
                "express_choice.c",
                [("judge_choice", "sched_cls")],
                defines={},
                maps=self.choices.maps,
            )
            opened.callback(os.close, self.fd)
            self._opened = opened.pop_all()
        self.numbers = itertools.count()

    def close(self) -> None:
        self._opened.close()

    def write(self, choice: Choice) -> int:
        """The number that a new choice has."""
        number = next(self.numbers) % MOST_CHOICES
        self.choices.write(number, choice, target_of)
        return number

    def judge(self, number: int, client: IpAddress | str = "192.0.2.1") -> int:
        """The place of the server that the program says; 0: none."""
        address = ipaddress.ip_address(client)
        question = struct.pack("=IB3x16s", number, address.version, address.packed)
        return bpf.run_program(self.fd, bytes(14) + question)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.close()


clients = st.one_of(
    st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address),
    st.integers(2**32 << 32, 2**128 - 1).map(ipaddress.IPv6Address),
)
drawings = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 256)), min_size=1, max_size=MOST_SERVERS
)


def by_client(drawn: list[tuple[int, int]]) -> ByClient:
    return ByClient(
        "up",
        tuple(Drawing(SERVERS[n], seed, weight) for n, (seed, weight) in enumerate(drawn)),
    )


def test_any_servers_and_any_client(program: Program) -> None:
    @given(drawings, st.lists(clients, min_size=1, max_size=50))
    def agree(drawn: list[tuple[int, int]], them: list[IpAddress]) -> None:
        choice = by_client(drawn)
        number = program.write(choice)
        for client in them:
            said = choice.choose(client)
            assert program.judge(number, client) == (place_of(said) if said else 0)

    agree()


def test_a_choice_that_is_not_certain_is_left_to_userspace(program: Program) -> None:
    number = program.write(by_client([(7, 1), (7, 1)]))
    assert program.judge(number) == 0
    number = program.write(by_client([(7, 2), (7, 1)]))
    assert program.judge(number) == 1


def test_an_ipv4_address_in_ipv6_is_left_to_userspace(program: Program) -> None:
    number = program.write(by_client([(7, 1)]))
    assert program.judge(number, "2001:db8::1") == 1
    assert program.judge(number, "::ffff:192.0.2.1") == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, MOST_TURNS])
def test_turns_come_round(program: Program, count: int) -> None:
    number = program.write(InTurn("up", tuple(SERVERS[:count])))
    first = program.judge(number)
    said = [program.judge(number) for _ in range(2 * count)]
    assert said == [(first + n) % count + 1 for n in range(2 * count)]


def test_turns_are_fair_among_processors(program: Program) -> None:
    servers = (*SERVERS[:3], SERVERS[0])
    number = program.write(InTurn("up", servers))
    said: list[Counter[int]] = []
    processors = sorted(os.sched_getaffinity(0))

    def ask(processor: int) -> None:
        os.sched_setaffinity(0, {processor})
        said.append(Counter(program.judge(number) for _ in range(1000)))

    threads = [threading.Thread(target=ask, args=(one,)) for one in processors * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(said, Counter[int]())
    rounds = 1000 * len(threads) // 4
    assert total == {1: 2 * rounds, 2: rounds, 3: rounds}


def test_what_is_no_choice_is_left_to_userspace(program: Program) -> None:
    assert program.judge(MOST_CHOICES - 1) == 0  # nobody has written it
    assert program.judge(MOST_CHOICES) == 0
    assert program.judge(0xFFFFFFFF) == 0


def test_a_change_has_another_number_which_nobody_can_still_be_reading() -> None:
    with contextlib.closing(Choices(MOST_TURNS + 1)) as choices:

        def number_of(choice: Choice, now_s: float) -> int | None:
            return choices.number_of(choice, target_of, now_s)

        some = [InTurn("up", (SERVERS[n], SERVERS[n + 1])) for n in range(MOST_CHOICES // 2 - 200)]
        numbers = [number_of(one, 100.0) for one in some]
        assert None not in numbers
        assert len(set(numbers)) == len(some)
        assert [number_of(one, 100.0) for one in some] == numbers
        assert choices.rests_until_s(100.0) == math.inf
        choices.keep(some[1:], 100.0)
        assert choices.rests_until_s(100.0) == 100.0 + REST_S
        others: list[int] = []
        while True:
            other = InTurn(f"up {len(others)}", (SERVERS[0], SERVERS[1]))
            number = number_of(other, 100.0 + REST_S - 0.1)
            if number is None:
                break
            others.append(number)
        # All but that of the first, which rests.
        assert len(others) + len(some) == MOST_CHOICES
        assert numbers[0] not in others
        assert number_of(some[0], 100.0 + REST_S) == numbers[0]


def test_a_number_that_is_another_server_s_begins_with_nothing_counted() -> None:
    with contextlib.closing(Choices(MOST_TURNS + 1)) as choices:
        for target in (1, 2):
            counted = bytes(Outcome(opened=5, failed=3, in_a_row=2))
            choices._counts.update(struct.pack("=I", target), counted)
            assert choices.outcome(target).failed == 3
        choices.forget_outcome(1)
        assert bytes(choices.outcome(1)) == bytes(Outcome())
        assert choices.outcome(2).failed == 3
