"""Byte offsets of kernel structure fields, from the running kernel's BTF.

bcc knows no CO-RE, so programs get these offsets as -D; the verifier checks each access again.

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime.store import Store

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
_NOTES: Final = Path("/sys/kernel/notes")

_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_MEMBER: Final = struct.Struct("<III")
_STRUCT, _UNION, _FUNC = 4, 5, 12
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
    names = [(structure, field) for structure, fields in wanted.items() for field in fields]
    offsets = _kept(path, "offsets", names, lambda: list(_search(wanted, path).values()))
    return dict(zip(names, offsets, strict=True))


def _search(wanted: Mapping[str, Iterable[str]], path: Path) -> dict[tuple[str, str], int]:
    data, strings, types = _read(path)
    places = {name: strings.find(b"\0" + name.encode() + b"\0") + 1 for name in wanted}
    name_of = {place: name for name, place in places.items() if place}  # 0: no such string
    by_id: dict[int, _Struct] = {}
    by_name: dict[str, _Struct] = {}
    for type_id, name, info, at in types:
        kind, count = info >> 24 & 31, info & 0xFFFF
        if kind in (_STRUCT, _UNION):
            found = _Struct(data, at, count, bitfields=bool(info >> 31))
            # Also those with a tag: -fms-extensions lets `struct tag;` be an anonymous member.
            by_id[type_id] = found
            if kind == _STRUCT and name in name_of:
                by_name.setdefault(name_of[name], found)

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


def function_id(name: str, *, path: Path = VMLINUX) -> int:
    """The number of a kernel function in BTF, which a tracing program is loaded for.

    Raises:
        LoadError: the kernel has no BTF, or the function is not in it.
    """
    return _kept(path, "function", [name], lambda: [_function_id(name, path)])[0]


def _kept(
    path: Path, kind: str, names: Sequence[object], find: Callable[[], list[int]]
) -> list[int]:
    """One number for each name: those that were found before in this very kernel, or else now.

    To look through some 100,000 types takes 50 ms.
    """
    kernel = _build() if path == VMLINUX else None
    if kernel is None:
        return find()
    store, key = Store.usual(), json.dumps(["btf", kernel, kind, names])
    if (kept := store.get(key)) is not None:
        with contextlib.suppress(ValueError):
            numbers = json.loads(kept)
            if len(numbers) == len(names) and all(type(number) is int for number in numbers):
                return list(numbers)
    found = find()
    store.put(key, json.dumps(found).encode())
    return found


def _build() -> str | None:
    """Which build of which kernel this is: its notes have an id that no other build has.

    None: it does not say.
    """
    try:
        return hashlib.sha256(_NOTES.read_bytes()).hexdigest() + " ".join(os.uname()[2:])
    except OSError:
        return None


def _function_id(name: str, path: Path) -> int:
    _, strings, types = _read(path)
    place = strings.find(b"\0" + name.encode() + b"\0") + 1
    for type_id, named, info, _ in types:
        if place and named == place and info >> 24 & 31 == _FUNC:
            return type_id
    raise LoadError(f"this kernel's BTF has no function {name}")


def _read(path: Path) -> tuple[bytes, bytes, Iterator[tuple[int, int, int, int]]]:
    """The file, its strings, and its types as (number, name offset, info, where the rest is).

    Raises:
        LoadError: there is no such file, or it is not BTF.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(
            f"read {path}: {error.strerror}",
            cause=Refusal.TOO_OLD if isinstance(error, FileNotFoundError) else Refusal.OTHER,
            advice="the kernel needs CONFIG_DEBUG_INFO_BTF=y",
        ) from error
    if len(data) < _HEADER.size:
        raise LoadError(f"{path} is not BTF")
    magic, _, _, header_bytes, type_at, type_bytes, string_at, string_bytes = _HEADER.unpack_from(
        data
    )
    if magic != _MAGIC:
        raise LoadError(f"{path} is not BTF of this byte order")
    strings = data[header_bytes + string_at : header_bytes + string_at + string_bytes]
    return data, strings, _types(data, header_bytes + type_at, type_bytes)


def _types(data: bytes, at: int, length_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    end = at + length_bytes
    type_id = 0
    while at < end:
        type_id += 1
        name, info, _ = _TYPE.unpack_from(data, at)
        at += _TYPE.size
        yield type_id, name, info, at
        at += _FIXED.get(info >> 24 & 31, 0) + _PER_ELEMENT.get(info >> 24 & 31, 0) * (
            info & 0xFFFF
        )


def defines(offsets: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """The offsets as macros: ("tcp_sock", "write_seq") becomes TCP_SOCK_WRITE_SEQ."""
    return {f"{s}_{f}".upper(): str(offset) for (s, f), offset in offsets.items()}
