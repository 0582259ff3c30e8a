"""Compiled programs: what a load fills in, and what is refused before the kernel sees it."""

from __future__ import annotations

import contextlib
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf.image import Compiled, ImageError, filled, holes

MAPS = {"MAP_B_FD": 7, "MAP_A_FD": 300}
VALUES = {"SECRET": 0xFEDCBA98}
NUMBERS = holes([*MAPS, *VALUES])
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def registers(target: int, source: int) -> int:
    return target | source << 4 if sys.byteorder == "little" else target << 4 | source


def load_64(source: int, number: int, high: int = 0) -> bytes:
    return struct.pack("=BBhi", 0x18, registers(3, source), 0, number) + struct.pack(
        "=BBhi", 0, 0, 0, high
    )


def test_descriptors_and_values_are_put_where_the_compiler_left_their_numbers() -> None:
    code = load_64(1, NUMBERS["MAP_A_FD"]) + load_64(0, NUMBERS["SECRET"])
    code += load_64(1, NUMBERS["MAP_B_FD"]) + EXIT
    expected = load_64(1, 300) + load_64(0, 0xFEDCBA98 - (1 << 32)) + load_64(1, 7) + EXIT
    assert filled(code, maps=MAPS, values=VALUES) == expected


def test_every_other_instruction_stays_as_it_is() -> None:
    number = NUMBERS["MAP_A_FD"]
    code = struct.pack("=BBhi", 0xB7, 1, 0, number)  # BPF_MOV64_IMM
    code += load_64(0, number, high=1)  # a longer constant
    code += load_64(0, 5) + EXIT
    assert filled(code, maps={}, values={"SECRET": 1}) == code


def test_second_half_of_a_constant_is_no_instruction() -> None:
    # Its bits may be those of a load of a map.
    half = struct.pack("=BBhi", 0x18, registers(3, 1), 0, 99)
    code = struct.pack("=BBhi", 0x18, registers(3, 0), 0, 5) + half + EXIT
    assert filled(code, maps=MAPS, values=VALUES) == code


@pytest.mark.parametrize(
    "code",
    [
        b"",
        EXIT[:-1],
        load_64(1, 12) + EXIT,  # a descriptor of the compiler's
        load_64(1, NUMBERS["MAP_A_FD"], high=1) + EXIT,
        load_64(2, NUMBERS["MAP_A_FD"]) + EXIT,  # BPF_PSEUDO_MAP_VALUE
        load_64(4, 1) + EXIT,  # BPF_PSEUDO_FUNC
        load_64(1, NUMBERS["MAP_A_FD"])[:8],
    ],
)
def test_what_refers_to_anything_else_is_refused(code: bytes) -> None:
    with pytest.raises(ImageError):
        filled(code, maps=MAPS, values=VALUES)


def test_numbers_do_not_depend_on_the_order_of_the_names() -> None:
    assert holes(["a", "b"]) == holes(["b", "a"])
    assert len(set(holes(map(str, range(100))).values())) == 100


@given(st.binary())
def test_no_bytes_do_more_than_be_refused(code: bytes) -> None:
    with contextlib.suppress(ImageError):
        assert len(filled(code, maps=MAPS, values=VALUES)) == len(code)


@given(st.dictionaries(st.text(), st.binary(min_size=1)), st.text())
def test_written_and_read_again_it_is_the_same(programs: dict[str, bytes], licence: str) -> None:
    compiled = Compiled(licence, programs)
    assert Compiled.from_bytes(compiled.to_bytes()) == compiled


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"licence": "GPL", "programs": []}',
        b'{"licence": "GPL", "programs": {"a": 1}}',
        b'{"licence": "GPL", "programs": {"a": ""}}',
        b'{"licence": 1, "programs": {}}',
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        Compiled.from_bytes(data)
