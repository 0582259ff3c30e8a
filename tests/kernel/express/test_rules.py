"""The program that decides by first packets says what its model says."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express.rule_maps import Tables
from tests.helpers.express import (
    CLIENT,
    NAMES,
    SERVER,
    Rules,
    clients,
    compiled,
    first_packets,
    http_request,
    rule_lists,
)
from tests.helpers.first_packets import CLIENTS, client_hello

if TYPE_CHECKING:
    from pyforwarder.core.express.table import Table

# BPF_PROG_TEST_RUN takes no packet that is longer than a page less some head room.
MOST_BYTES: Final = 3000
TABLE: Final = 1


class Program:
    """The program, and its tables."""

    def __init__(self) -> None:
        self.tables = Tables(2)
        try:
            self.fd = self.tables.load()
        except BaseException:
            self.tables.close()
            raise

    def close(self) -> None:
        os.close(self.fd)
        self.tables.close()

    def judge(self, data: bytes, client: str = CLIENT, table: int = TABLE) -> int | None:
        """The rule that the program says, by the table that was written last."""
        address = ipaddress.ip_address(client)
        question = struct.pack("=IB3x16s", table, address.version, address.packed)
        said = bpf.run_program(self.fd, bytes(14) + question + data)
        return None if said == -1 else said

    def agrees(self, table: Table, data: bytes, client: str = CLIENT) -> int | None:
        """What both say; they must say the same."""
        said = self.judge(data, client)
        assert said == table.decide(data, ipaddress.ip_address(client))
        return said


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.close()


def written(program: Program, rules: Rules) -> Table:
    _, found = compiled(rules)
    assert found.table is not None
    program.tables.write(TABLE, found.table)
    return found.table


def test_any_rules_and_any_first_packet(program: Program) -> None:
    @given(rule_lists, st.lists(first_packets, min_size=1, max_size=20), clients)
    def agree(rules: list[dict[str, object]], packets: list[bytes], client: str) -> None:
        _, found = compiled(rules)
        if found.table is None:
            return
        program.tables.write(TABLE, found.table)
        for data in packets:
            program.agrees(found.table, data[:MOST_BYTES], client)

    agree()


ALL: Final[Rules] = [
    {"match": {"tls": {"sni": ["a.example.com", "*.example.org"]}}, "to": SERVER},
    {"match": {"tls": {"alpn": ["h3", "h1h2h3"]}}, "to": SERVER},
    {"match": {"tls": {"sni": "*.com", "alpn": "http/1.1"}}, "to": SERVER},
    {"match": {"tls": {"sni": "*.com"}}, "to": SERVER},
    {"match": {"tls": {"sni": "*"}}, "to": SERVER},
    {"match": {"http": {"host": ["*.example.com", "x"], "method": ["GET", "POST"]}}, "to": SERVER},
    {"match": {"http": {"host": "*"}}, "to": SERVER},
    {"match": ["ssh", {"bytes": {"prefix": "hex:00", "offset": 3}}], "to": SERVER},
    {"match": {"not": ["http", "tls"]}, "to": SERVER},
    {"match": {"client": "10.0.0.0/8"}, "to": SERVER},
    {"match": "any", "reject": "reset"},
]


@pytest.mark.parametrize("name", CLIENTS)
def test_real_clients_at_every_cut(program: Program, name: str) -> None:
    table = written(program, ALL)
    data = CLIENTS[name][:MOST_BYTES]
    for size in range(1, len(data) + 1):
        program.agrees(table, data[:size])


def test_every_byte_of_a_hello_and_of_a_request_changed(program: Program) -> None:
    table = written(program, ALL)
    for data in (client_hello(b"A.example.com."), http_request("x.Example.com:80", target="/a?b")):
        for at in range(len(data)):
            for byte in (*range(0, 256, 7), data[at] ^ 1, data[at] ^ 0x20, 0x0A, 0x0D, 0x3A, 0xFF):
                program.agrees(table, data[:at] + bytes([byte]) + data[at + 1 :])


@pytest.mark.parametrize("name", [*NAMES, "a", "a" * 127, "a" * 128, "a" * 129, "b.example.org."])
def test_names_of_every_length(program: Program, name: str) -> None:
    table = written(program, ALL)
    program.agrees(table, client_hello(name.encode()))
    program.agrees(table, http_request(name))
    program.agrees(table, http_request(f"{name}:8080"))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33])
def test_messages_of_many_parts(program: Program, count: int) -> None:
    table = written(program, ALL)
    hello = bytearray(client_hello(b"a.example.com"))
    extra = b"".join(struct.pack("!HH", 1000 + n, 0) for n in range(count))
    names = b"".join(b"\2h%d" % (n % 10) for n in range(count))
    alpn = struct.pack("!HHH", 16, 2 + len(names), len(names)) + names
    for more in (extra, alpn, extra + extra, alpn + alpn):
        whole = hello + more
        for at, size in ((3, 5), (7, 9), (9 + 2 + 32 + 1 + 4 + 2, 9 + 2 + 32 + 1 + 4 + 2 + 2)):
            whole[at : at + 2] = struct.pack("!H", len(whole) - size)
        program.agrees(table, bytes(whole))
    lines = "".join(f"X-{n}: {'v' * n}\r\n" for n in range(count))
    program.agrees(table, http_request(f"x\r\n{lines}Y: z"))


def hello_with_alpn(*names: bytes) -> bytes:
    hello = bytearray(client_hello(None))
    listed = b"".join(bytes([len(name)]) + name for name in names)
    hello += struct.pack("!HHH", 16, 2 + len(listed), len(listed)) + listed
    for at, size in ((3, 5), (7, 9), (50, 52)):
        hello[at : at + 2] = struct.pack("!H", len(hello) - size)
    return bytes(hello)


PROTOCOLS: Final = [b"h2", b"h2\0", b"h", b"\2h2", b"x" * 31, b"x" * 32, b"x" * 33, b"H2"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_asked_for_by_all_its_bytes(program: Program, name: bytes) -> None:
    match = {"any_of": [{"tls": {"alpn": "h2"}}, {"tls": {"alpn": "x" * 32}}]}
    table = written(program, [{"match": match, "to": SERVER}])
    rule = 0 if name in (b"h2", b"x" * 32) else None
    assert program.agrees(table, hello_with_alpn(name)) == rule
    assert program.agrees(table, hello_with_alpn(b"other", name, b"h3")) == rule
    assert program.agrees(table, hello_with_alpn(name, b"h2")) == 0


def test_nothing_is_decided_by_a_table_that_is_gone(program: Program) -> None:
    table = written(program, [{"match": "any", "to": SERVER}])
    assert program.agrees(table, b"x") == 0
    assert program.judge(b"x", table=0) is None
    assert program.judge(b"x", table=2) is None
    program.tables.forget(TABLE)
    assert program.judge(b"x") is None


def test_tables_do_not_answer_for_each_other(program: Program) -> None:
    first = written(program, [{"match": {"tls": {"sni": "a"}}, "to": SERVER}])
    _, second = compiled([{"match": {"tls": {"sni": "b"}}, "to": SERVER}])
    assert second.table is not None
    program.tables.write(0, second.table)
    assert program.agrees(first, client_hello(b"a")) == 0
    assert program.judge(client_hello(b"a"), table=0) is None
    assert program.judge(client_hello(b"b"), table=0) == 0
    program.tables.forget(0)
