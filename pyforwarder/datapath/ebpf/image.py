"""Compiled programs that are not loaded yet: instructions, with holes for what a load fills in.

The compiler is given a number for each map, and for each value that differs from load to load; it
leaves it in an instruction of its own (BPF_LD | BPF_IMM | BPF_DW). A load puts the descriptor or
the value in its place. So what was compiled once can be loaded with other maps, later.

Pure: bytes and numbers.
Source: include/uapi/linux/bpf.h (struct bpf_insn, BPF_PSEUDO_MAP_FD),
Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_INSTRUCTION: Final = struct.Struct("=BBhi")
_LOAD_64: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW; takes the place of two
_PLAIN, _MAP_FD = 0, 1  # src_reg: the number itself; BPF_PSEUDO_MAP_FD
# No constant of the programs, no descriptor, and positive as 32 bits.
_FIRST_HOLE: Final = 0x5F0C_A500


class ImageError(ValueError):
    """These are not instructions that can be loaded."""


def holes(names: Iterable[str]) -> dict[str, int]:
    """The number that the compiler is given for each of the names."""
    return {name: _FIRST_HOLE + index for index, name in enumerate(sorted(names))}


@dataclass(frozen=True, slots=True)
class Compiled:
    """The programs of one C file."""

    licence: str
    programs: Mapping[str, bytes]  # by function

    def to_bytes(self) -> bytes:
        """For a file or another process."""
        programs = {name: base64.b64encode(code).decode() for name, code in self.programs.items()}
        return json.dumps({"licence": self.licence, "programs": programs}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Compiled:
        """The other end of `to_bytes`.

        Raises:
            ImageError: it is something else.
        """
        try:
            content = json.loads(data)
            licence = content["licence"]
            programs = {n: base64.b64decode(code) for n, code in content["programs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError("not what a compiler has written") from error
        if type(licence) is not str or not all(programs.values()):
            raise ImageError("a program without instructions")
        return cls(licence, programs)


def filled(
    code: bytes, *, maps: Mapping[str, int] | None = None, values: Mapping[str, int] | None = None
) -> bytes:
    """The instructions with the descriptors of `maps` and the `values` in their holes.

    `values` are 32 bits. The names are all those that the compiler was given numbers for.

    Raises:
        ImageError: a map that is none of these, or no instructions at all.
    """
    maps, values = maps or {}, values or {}
    numbers = holes([*maps, *values])
    descriptors = {numbers[name]: fd for name, fd in maps.items()}
    constants = {numbers[name]: value for name, value in values.items()}
    if not code or len(code) % _INSTRUCTION.size:
        raise ImageError("not whole instructions")
    result = bytearray(code)
    at = 0
    while at < len(code):
        operation, registers, offset, number = _INSTRUCTION.unpack_from(code, at)
        if operation == _LOAD_64:
            _fill(result, at, registers, offset, number, descriptors, constants)
            at += _INSTRUCTION.size  # its second half
        at += _INSTRUCTION.size
    return bytes(result)


def _fill(
    code: bytearray,
    at: int,
    registers: int,
    offset: int,
    number: int,
    descriptors: Mapping[int, int],
    constants: Mapping[int, int],
) -> None:
    second = at + _INSTRUCTION.size
    if second >= len(code):
        raise ImageError("half an instruction")
    _, _, _, high = _INSTRUCTION.unpack_from(code, second)
    source = registers >> 4 if sys.byteorder == "little" else registers & 15
    if source == _MAP_FD:
        if number not in descriptors or high:
            raise ImageError("a map that nobody has named")
        filling = descriptors[number]
    elif source != _PLAIN:
        raise ImageError(f"a reference of kind {source}")
    elif number in constants and not high:
        filling = constants[number]
        filling -= (filling >> 31) << 32  # as the signed number that the field is
    else:
        return
    _INSTRUCTION.pack_into(code, at, _LOAD_64, registers, offset, filling)
