"""bpf/abi.h and its mirror in Python: every structure, field, enumerator and constant."""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import re
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address, UnixAddress, ip_text
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import abi
from pyforwarder.datapath.ebpf.loading import bpf_directory
from tests.helpers import mirrors

STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "endpoint": abi.Endpoint,
    "kernel_direction": abi.KernelDirection,
    "worker_direction": abi.WorkerDirection,
    "pair": abi.PairRecord,
    "socket_owner": abi.SocketOwner,
    "wakeup": abi.Wakeup,
    "view_line": abi.ViewLine,
    "backlog": abi.Backlog,
}
ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "pf_state": abi.PairState,
    "pf_datapath": abi.DatapathKind,
    "pf_family": abi.Family,
    "pf_line": abi.LineKind,
}
CONSTANTS: Final[dict[str, int]] = {
    "PF_ABI_VERSION": abi.ABI_VERSION,
    "PF_UP": abi.Direction.UP,
    "PF_DOWN": abi.Direction.DOWN,
    "PF_NAME_BYTES": abi.NAME_BYTES,
}
# In C an enumerator needs a name of its own where Python says NONE of its enum.
NAMED_IN_C: Final = {("pf_datapath", "NONE"): "NO_DATAPATH", ("pf_line", "NONE"): "NO_LINE"}

WITHOUT_COMMENTS: Final = mirrors.without_comments("abi.h")


def enumerators(name: str) -> list[str]:
    """The C names of an enum, in order."""
    body = re.search(rf"enum {name} \{{(.*?)\}}", WITHOUT_COMMENTS, re.DOTALL)
    assert body is not None
    return re.findall(r"\b(PF_\w+)", body[1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says, by expression."""
    words = [*CONSTANTS, *(word for name in ENUMS for word in enumerators(name))]
    expressions = [*mirrors.layout(STRUCTURES), *words]
    return mirrors.compiled("abi.h", expressions, tmp_path_factory.mktemp("abi"))


def test_every_structure_of_the_header_has_a_mirror() -> None:
    assert mirrors.structures_of("abi.h") == set(STRUCTURES)


def test_every_structure_in_python_is_one_of_the_header() -> None:
    mirrored = {
        value
        for value in vars(abi).values()
        if isinstance(value, type) and issubclass(value, ctypes.Structure)
    }
    assert mirrored == set(STRUCTURES.values())


def test_every_enum_and_constant_of_the_header_has_a_mirror() -> None:
    assert set(re.findall(r"^enum (\w+) \{", WITHOUT_COMMENTS, re.MULTILINE)) == set(ENUMS)
    assert set(re.findall(r"^#define (PF_\w+)", WITHOUT_COMMENTS, re.MULTILINE)) == set(CONSTANTS)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_is_laid_out_as_the_compiler_does(name: str, compiled: dict[str, int]) -> None:
    in_python = mirrors.layout({name: STRUCTURES[name]})
    assert {expression: compiled[expression] for expression in in_python} == in_python


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_has_no_gap_that_nobody_declared(name: str) -> None:
    # What the compiler would insert is written out, so that no program leaks or compares it; and
    # with the sizes equal, no field of the header can be missing here.
    structure = STRUCTURES[name]
    at = 0
    for field in mirrors.fields(structure):
        assert getattr(structure, field).offset == at, field
        at += getattr(structure, field).size
    assert at == ctypes.sizeof(structure)


@pytest.mark.parametrize("name", ENUMS)
def test_enum_has_the_same_names_and_values(name: str, compiled: dict[str, int]) -> None:
    in_python = {
        f"PF_{NAMED_IN_C.get((name, member.name), member.name)}": member.value
        for member in ENUMS[name]
    }
    assert {word: compiled[word] for word in enumerators(name)} == in_python


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_has_the_same_value(name: str, compiled: dict[str, int]) -> None:
    assert compiled[name] == CONSTANTS[name]


def test_pair_fills_whole_slots_of_a_page() -> None:
    # Windows of workers begin on pages; a record across two would be mapped by two workers.
    assert abi.PAIR_BYTES == 512
    assert 4096 % abi.PAIR_BYTES == 0


def test_what_the_program_counts_shares_no_cache_line_with_what_the_worker_writes() -> None:
    line = 64
    kernel = abi.PairRecord.kernel
    worker = abi.PairRecord.worker
    assert kernel.offset % line == worker.offset % line == 0
    assert ctypes.sizeof(abi.KernelDirection) % line == 0
    assert ctypes.sizeof(abi.WorkerDirection) % line == 0


def test_reasons_fit_their_byte_and_have_words() -> None:
    assert max(PairReason) < 256
    assert len({reason.text for reason in PairReason}) == len(PairReason)


# Endpoints


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("127.0.0.1", 9999), "127.0.0.1:9999"),
        (Address("255.255.255.255", 65535), "255.255.255.255:65535"),
        (Address("::1", 443), "[::1]:443"),
        (Address("2001:db8::23", 1), "[2001:db8::23]:1"),
        (UnixAddress("/run/x"), "unix:"),
        (None, "-"),
    ],
)
def test_endpoint_reads_as_it_was_written(address: Address | UnixAddress, text: str) -> None:
    packed = abi.pack_endpoint(address)
    assert len(packed) == ctypes.sizeof(abi.Endpoint)
    assert abi.unpack_endpoint(abi.Endpoint.from_buffer_copy(packed)) == text


def test_ipv4_endpoint_stands_as_a_mapped_address_with_its_port_in_host_order() -> None:
    endpoint = abi.Endpoint.from_buffer_copy(abi.pack_endpoint(Address("192.0.2.7", 0x1234)))
    assert bytes(endpoint.ip) == bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 7])
    assert endpoint.port == 0x1234
    assert endpoint.padding == 0


@given(ip=st.ip_addresses(), port=st.integers(0, 65535))
def test_any_endpoint_reads_as_it_was_written(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    address = Address(ip_text(ip), port)
    endpoint = abi.Endpoint.from_buffer_copy(abi.pack_endpoint(address))
    assert abi.unpack_endpoint(endpoint) == str(address)


def test_header_is_found_beside_the_package_or_in_it() -> None:
    assert (bpf_directory() / "redirect.c").is_file()
    assert Path(bpf_directory()).name == "bpf"
