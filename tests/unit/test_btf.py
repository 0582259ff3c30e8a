"""Offsets of kernel structure fields, from BTF made here; the kernel's own is a kernel test."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from pyforwarder.datapath.ebpf.btf import defines, field_offsets
from pyforwarder.datapath.sockmap.maps import FIELDS
from pyforwarder.errors import LoadError

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = 12, 13, 14, 15, 16, 17, 18, 19


class Member(NamedTuple):
    """A field: its type by number, its place in bits."""

    name: str
    type: int
    bits: int


class Btf:
    """Writes BTF as Documentation/bpf/btf.rst describes it; types are numbered from 1."""

    def __init__(self) -> None:
        self._strings = bytearray(b"\0")
        self._types = bytearray()
        self._count = 0

    def _name(self, name: str) -> int:
        if not name:
            return 0
        at = len(self._strings)
        self._strings += name.encode() + b"\0"
        return at

    def add(
        self, kind: int, name: str = "", *, size: int = 0, count: int = 0, more: bytes = b""
    ) -> int:
        """One type of any kind, with what follows its 12 bytes; its number."""
        self._types += struct.pack("<III", self._name(name), kind << 24 | count, size) + more
        self._count += 1
        return self._count

    def structure(
        self, name: str, *members: Member, kind: int = STRUCT, with_bitfields: bool = False
    ) -> int:
        """A structure or union; its number."""
        info = kind << 24 | len(members) | (1 << 31 if with_bitfields else 0)
        self._types += struct.pack("<III", self._name(name), info, 64)
        for member in members:
            self._types += struct.pack("<III", self._name(member.name), member.type, member.bits)
        self._count += 1
        return self._count

    def write(self, path: Path, *, magic: int = 0xEB9F) -> Path:
        """The file, as in /sys/kernel/btf/vmlinux."""
        header = struct.pack(
            "<HBBIIIII",
            magic,
            *(1, 0, 24),
            *(0, len(self._types)),
            *(len(self._types), len(self._strings)),
        )
        path.write_bytes(header + self._types + self._strings)
        return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "btf"


def test_offset_of_a_field_is_in_bytes(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    btf.structure("thing", Member("first", number, 0), Member("second", number, 32))
    offsets = field_offsets({"thing": ["second", "first"]}, path=btf.write(path))
    assert offsets == {("thing", "second"): 4, ("thing", "first"): 0}


def test_field_of_an_anonymous_union_is_found_as_c_finds_it(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    pair = btf.structure("", Member("port", number, 0), Member("number", number, 32))
    union = btf.structure("", Member("both", number, 0), Member("", pair, 0), kind=UNION)
    btf.structure("sock", Member("head", number, 0), Member("", union, 64))
    offsets = field_offsets({"sock": ["both", "port", "number"]}, path=btf.write(path))
    assert offsets == {("sock", "both"): 8, ("sock", "port"): 8, ("sock", "number"): 12}


def test_anonymous_structure_may_stand_after_the_one_that_holds_it(path: Path) -> None:
    btf = Btf()
    btf.structure("sock", Member("", 2, 32))
    btf.structure("", Member("port", 3, 16), kind=UNION)
    btf.add(INT, "u16", size=2, more=bytes(4))
    assert field_offsets({"sock": ["port"]}, path=btf.write(path)) == {("sock", "port"): 6}


def test_field_of_a_tagged_structure_without_member_name_is_found(path: Path) -> None:
    # -fms-extensions: `struct outer { struct inner; };` with an inner that has a name.
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    inner = btf.structure("inner", Member("deep", number, 32))
    btf.structure("outer", Member("", inner, 64))
    assert field_offsets({"outer": ["deep"]}, path=btf.write(path)) == {("outer", "deep"): 12}


def test_field_of_a_member_structure_is_not_a_field(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    inner = btf.structure("inner", Member("deep", number, 0))
    btf.structure("outer", Member("named", inner, 0))
    with pytest.raises(LoadError, match=r"no outer\.deep"):
        field_offsets({"outer": ["deep"]}, path=btf.write(path))


def test_bitfields_do_not_disturb_the_offsets(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    # With the flag, the upper 8 bits of an offset are the field's width.
    btf.structure(
        "flags",
        Member("bit", number, 1 << 24 | 3),
        Member("plain", number, 32),
        with_bitfields=True,
    )
    assert field_offsets({"flags": ["plain"]}, path=btf.write(path)) == {("flags", "plain"): 4}


def test_kinds_of_every_length_are_stepped_over(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    btf.add(PTR, size=number)
    btf.add(ARRAY, more=struct.pack("<III", number, number, 4))
    btf.add(ENUM, "colour", size=4, count=3, more=bytes(3 * 8))
    btf.add(FWD, "later")
    btf.add(TYPEDEF, "alias", size=number)
    btf.add(FUNC_PROTO, count=2, size=number, more=bytes(2 * 8))
    btf.add(FUNC, "call", size=7, count=1)  # here the count is the linkage: nothing follows
    btf.add(VAR, "global", size=number, more=bytes(4))
    btf.add(DATASEC, ".data", size=4, count=2, more=bytes(2 * 12))
    btf.add(FLOAT, "double", size=8)
    btf.add(DECL_TAG, "tag", size=number, more=bytes(4))
    btf.add(TYPE_TAG, "user", size=number)
    btf.add(ENUM64, "wide", size=8, count=2, more=bytes(2 * 12))
    btf.structure("union_or_struct", Member("x", number, 0), kind=UNION)
    btf.structure("last", Member("field", number, 96))
    assert field_offsets({"last": ["field"]}, path=btf.write(path)) == {("last", "field"): 12}


def test_name_that_is_the_end_of_another_is_not_mistaken(path: Path) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    btf.structure("mptcp_sock", Member("field", number, 64), Member("subfield", number, 96))
    btf.structure("tcp_sock", Member("subfield", number, 0), Member("field", number, 32))
    offsets = field_offsets({"tcp_sock": ["field"]}, path=btf.write(path))
    assert offsets == {("tcp_sock", "field"): 4}


@pytest.mark.parametrize(
    ("structure", "field"), [("thing", "missing"), ("missing", "first"), ("u32", "first")]
)
def test_missing_field_is_a_load_error(path: Path, structure: str, field: str) -> None:
    btf = Btf()
    number = btf.add(INT, "u32", size=4, more=bytes(4))
    btf.structure("thing", Member("first", number, 0))
    with pytest.raises(LoadError, match=f"no {structure}.{field}"):
        field_offsets({structure: [field]}, path=btf.write(path))


def test_kernel_without_btf_is_a_load_error_with_advice(path: Path) -> None:
    with pytest.raises(LoadError, match="CONFIG_DEBUG_INFO_BTF"):
        field_offsets(FIELDS, path=path)


def test_file_of_the_other_byte_order_is_a_load_error(path: Path) -> None:
    with pytest.raises(LoadError, match="byte order"):
        field_offsets({"a": ["b"]}, path=Btf().write(path, magic=0x9FEB))


@pytest.mark.parametrize("size", [0, 1, 23])
def test_file_that_ends_in_its_header_is_a_load_error(path: Path, size: int) -> None:
    whole = Btf().write(path).read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(LoadError):
        field_offsets({"a": ["b"]}, path=path)


def test_offsets_become_macros() -> None:
    assert defines({("tcp_sock", "write_seq"): 1234}) == {"TCP_SOCK_WRITE_SEQ": "1234"}
