"""Byte offsets of kernel structure fields, from the running kernel's BTF.

bcc knows no CO-RE, so programs get these offsets as -D; the verifier checks each access again.

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pyforwarder.errors import LoadError

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")

_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_MEMBER: Final = struct.Struct("<III")
_STRUCT, _UNION = 4, 5
# Bytes that follow a type's 12, per kind: fixed, and per element (vlen).
_FIXED: Final = {1: 4, 3: 12, 14: 4, 17: 4}
_PER_ELEMENT: Final = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class _Struct:
    """One structure: name offset, members as (name offset, type id, bit offset)."""

    def __init__(self, data: bytes, at: int, members: int, *, bitfields: bool) -> None:
        self._span = (data, at, members)
        self._mask = 0xFFFFFF if bitfields else 0xFFFFFFFF

    def members(self) -> Iterator[tuple[int, int, int]]:
        data, at, count = self._span
        for index in range(count):
            name, kind, offset = _MEMBER.unpack_from(data, at + index * _MEMBER.size)
            yield name, kind, (offset & self._mask) // 8


def field_offsets(
    wanted: Mapping[str, Iterable[str]], *, path: Path = VMLINUX
) -> dict[tuple[str, str], int]:
    """Byte offset of each wanted field, keyed by (structure, field).

    A field inside an anonymous structure or union is found as C finds it.

    Raises:
        LoadError: the kernel has no BTF, or a structure or field is not in it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(
            f"read {path}: {error.strerror}", advice="the kernel needs CONFIG_DEBUG_INFO_BTF=y"
        ) from error
    if len(data) < _HEADER.size:
        raise LoadError(f"{path} is not BTF")
    magic, _, _, header_bytes, type_at, type_bytes, string_at, string_bytes = _HEADER.unpack_from(
        data
    )
    if magic != _MAGIC:
        raise LoadError(f"{path} is not BTF of this byte order")
    strings = data[header_bytes + string_at : header_bytes + string_at + string_bytes]
    places = {name: strings.find(b"\0" + name.encode() + b"\0") + 1 for name in wanted}
    name_of = {place: name for name, place in places.items() if place}  # 0: no such string
    by_id: dict[int, _Struct] = {}
    by_name: dict[str, _Struct] = {}
    at = header_bytes + type_at
    end = at + type_bytes
    type_id = 0
    while at < end:
        type_id += 1
        name, info, _ = _TYPE.unpack_from(data, at)
        at += _TYPE.size
        kind, count = info >> 24 & 31, info & 0xFFFF
        if kind in (_STRUCT, _UNION):
            found = _Struct(data, at, count, bitfields=bool(info >> 31))
            # Also those with a tag: -fms-extensions lets `struct tag;` be an anonymous member.
            by_id[type_id] = found
            if kind == _STRUCT and name in name_of:
                by_name.setdefault(name_of[name], found)
        at += _FIXED.get(kind, 0) + _PER_ELEMENT.get(kind, 0) * count

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    def search(structure: _Struct, field: str) -> int | None:
        for name, kind, offset in structure.members():
            if name and text(name) == field:
                return offset
            if not name and kind in by_id:
                inner = search(by_id[kind], field)
                if inner is not None:
                    return offset + inner
        return None

    offsets: dict[tuple[str, str], int] = {}
    for structure_name, fields in wanted.items():
        structure = by_name.get(structure_name)
        for field in fields:
            offset = search(structure, field) if structure else None
            if offset is None:
                raise LoadError(f"this kernel's BTF has no {structure_name}.{field}")
            offsets[structure_name, field] = offset
    return offsets


def defines(offsets: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """The offsets as macros: ("tcp_sock", "write_seq") becomes TCP_SOCK_WRITE_SEQ."""
    return {f"{s}_{f}".upper(): str(offset) for (s, f), offset in offsets.items()}
