"""Every key of the configuration, with what may be written, its default and its meaning.

Read from the models themselves: keys, types and defaults from their fields, meanings from the text
below each field. docs/configuration.md and pyforwarder.yaml(5) are made of it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Final, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import PlainSerializer
from pydantic_core import PydanticUndefined

from pyforwarder.config.model import Config
from pyforwarder.config.section import Section
from pyforwarder.config.values import Written

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# What the kinds of values mean; every other word of `Key.values` is written as it stands.
KINDS: Final = {
    "address": "`ip:port`, `[ip6]:port` (in quotes), `unix:/path`, and for servers `name:port`",
    "block": "keys and values, in a block of their own below",
    "blocks by name": "a mapping from names to blocks",
    "duration": "`250ms`, `5s`, `1h30m`, `2d`; 0 needs no unit",
    "file": "an absolute path",
    "file by name": "a mapping from names to absolute paths",
    "list of addresses": "such addresses; one needs no brackets",
    "list of IP addresses": "without ports; one needs no brackets",
    "list of blocks": "blocks in their order",
    "list of directories": "paths, absolute or beside this file; one needs no brackets",
    "list of names": "one name needs no brackets",
    "list of networks": "`10.0.0.0/8`, `192.0.2.7`, `loopback`; one needs no brackets",
    "list of URLs": "`http://HOST:PORT` or `https://HOST:PORT`; one needs no brackets",
    "match": "what a first packet must be",
    "name": "1 to 63 printable ASCII characters without blanks",
    "number": "a whole number, in the range that stands behind it",
    "permissions": "octal digits, such as `0660`",
    "size": "`16KiB`, `1MiB`, `2GiB`, or bytes without a unit",
    "upstream": "the name of an upstream",
}


class UndocumentedError(Exception):
    """A key has no meaning or no kind; the message says where to write it."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a block."""

    name: str
    values: str  # kinds of `KINDS` and words that are written as they stand, with commas
    default: str  # as YAML; empty: there is none
    is_required: bool
    meaning: str  # Markdown, one paragraph
    block: str  # the path of the block that stands under it; empty: a value

    def kinds(self) -> Iterator[tuple[str, bool]]:
        """Yield each way to write a value, and whether it is a kind (not a word as it stands)."""
        for part in filter(None, self.values.split(", ")):
            yield part, _is_kind(part)


@dataclass(frozen=True, slots=True)
class Block:
    """The keys that may stand together."""

    paths: tuple[str, ...]  # such as `listeners[].rules[]`; empty: the top level
    model: str  # the name of its class
    summary: str
    keys: tuple[Key, ...]


@functools.cache
def blocks() -> tuple[Block, ...]:
    """Return every block, the top level first, each one before those inside of it.

    Raises:
        UndocumentedError: a key without a text below its field, or a type without `Written`.
    """
    found: dict[str, Block] = {}
    for block in _blocks(Config, ""):
        before = found.get(block.model)
        paths = (*before.paths, *block.paths) if before else block.paths
        found[block.model] = replace(block, paths=paths)
    return tuple(found.values())


def _blocks(section: type[Section], path: str) -> Iterator[Block]:
    keys = []
    below: list[tuple[type[Section], str]] = []
    meanings = _meanings(section)
    for name, field in section.model_fields.items():
        key = field.alias or name
        if not meanings.get(name):
            raise UndocumentedError(
                f"{section.__module__}: {section.__name__}.{name}: "
                "write below the field what it means"
            )
        inner, here = _section_below(field.annotation, f"{path}.{key}" if path else key)
        if inner is not None:
            below.append((inner, here))
        keys.append(
            Key(
                name=key,
                values=_form(here) if inner else _values(section, name, field),
                default="" if inner else _default(field),
                is_required=field.is_required(),
                meaning=meanings[name],
                block=here if inner else "",
            )
        )
    summary = " ".join((section.__doc__ or "").split("\n\n")[0].split())
    yield Block((path,), section.__name__, summary, tuple(keys))
    for inner, here in below:
        yield from _blocks(inner, here)


def _meanings(section: type[Section]) -> dict[str, str]:
    """The text below each field, of the class itself or of the one that it extends."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not issubclass(kind, Section) or kind is Section:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for item, following in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[item.target.id] = " ".join(following.value.value.split())
    return found


def _section_below(annotation: object, path: str) -> tuple[type[Section] | None, str]:
    """The model of what stands under a key, and the path of its block."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, path
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _section_below(arguments[0], path)
    if origin in (Union, types.UnionType):  # `Health | None`
        return _section_below(arguments[0], path)
    if origin is tuple:
        return _section_below(arguments[0], path + "[]")
    if origin is Mapping:
        return _section_below(arguments[1], path + ".NAME")
    return None, path


def _is_kind(words: str) -> bool:
    return any(words == kind or words.startswith(f"{kind} ") for kind in KINDS)


def _form(path: str) -> str:
    if path.endswith("[]"):
        return "list of blocks"
    return "blocks by name" if path.endswith(".NAME") else "block"


def _values(section: type[Section], name: str, field: FieldInfo) -> str:
    words = _words(field.annotation, tuple(field.metadata))
    if not words:
        raise UndocumentedError(
            f"{section.__module__}: {section.__name__}.{name}: its type needs a `values.Written`"
        )
    for part in words.split(", "):
        if " " in part and not _is_kind(part):
            raise UndocumentedError(
                f"{section.__module__}: {section.__name__}.{name}: {part!r} is not in "
                f"{__name__}.KINDS"
            )
    return words


def _words(annotation: object, metadata: tuple[object, ...]) -> str:
    for said in metadata:
        if isinstance(said, Written):
            return said.kinds
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return ", ".join(
            words for part in arguments if part is not type(None) and (words := _words(part, ()))
        )
    if origin is Mapping:
        return " by ".join(_words(part, ()) for part in reversed(arguments))
    if annotation is int:
        return f"number{_range(metadata)}"
    return ""


def _range(metadata: tuple[object, ...]) -> str:
    low = high = None
    for part in metadata:
        for bound in getattr(part, "metadata", None) or [part]:
            if isinstance(bound, annotated_types.Ge):
                low = bound.ge
            elif isinstance(bound, annotated_types.Le):
                high = bound.le
    if low is None and high is None:
        return ""
    return f" {low} to {high:,}" if isinstance(high, int) and high < 1 << 40 else f" from {low}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None or value == "":
        return ""
    for part in field.metadata:
        if isinstance(part, PlainSerializer):
            value = part.func(value)  # type: ignore[call-arg]
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, Mapping):
        value = dict(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...").strip()
