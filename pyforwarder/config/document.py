"""A YAML text as plain values that remember their lines.

Built from parser events instead of PyYAML's constructors, for three reasons: no tag can make an
object, every value keeps its line for error messages, and depth and total size are checked while
reading, so that neither `[[[[...` nor a chain of aliases can exhaust the process.

Plain scalars follow YAML 1.2's core schema without floats: `off`, `12:30:00`, `0016` and `1.2`
stay the text they look like, where YAML 1.1 would make False, 45000, 14 and a float of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import yaml

from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BYTES: Final = 1 << 20  # a thousand rules are 100 KiB
MAX_DEPTH: Final = 32  # the deepest sensible config, nested matches included, has about 15
MAX_VALUES: Final = 200_000  # after aliases are expanded; 1 MiB of text holds about as many

# libyaml's parser when PyYAML was built with it: a file of 1 MiB in 0.3 s instead of 10 s.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNQUOTED_IPV6: Final = re.compile(
    r"""(?<!["'])(\[[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\](?::[0-9]+)?)"""
)
# What is an alias to YAML, and a name with a wildcard to us.
_UNQUOTED_STAR: Final = re.compile(r"""(?:^|[\s,\[{:])(\*(?:\.[A-Za-z0-9._*-]+|(?=[\s,\]}]|$)))""")
_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Plain = str | int | bool | None | list["Plain"] | dict[str, "Plain"]


@dataclass(slots=True)
class Node:
    """A value and where it stands; exactly one of `items` and `entries` is set for a collection."""

    line: int  # from 1
    scalar: str | int | bool | None = None
    items: list[Node] | None = None
    entries: dict[str, Node] | None = None
    key_lines: dict[str, int] = field(default_factory=dict)
    file: str = ""  # from which it was included; empty: that of the node that it stands in
    number: int | None = None  # its index in that file's list; None: that in its node
    included: tuple[str, ...] = ()  # of the whole: the directories and files that were read for it
    values: int = 1  # how many values this stands for, itself included, aliases expanded
    depth: int = 1

    def plain(self) -> Plain:
        """The value as lists, dicts and scalars."""
        if self.items is not None:
            return [item.plain() for item in self.items]
        if self.entries is not None:
            return {key: value.plain() for key, value in self.entries.items()}
        return self.scalar

    def locate(self, path: Sequence[str | int]) -> tuple[str, int]:
        """The path as a user writes it (`listeners[0].bind`) and the line where it stands.

        A key that is missing stands where its mapping begins.  Parts that name no key of this
        document (a validator's own) are left out, except a last one: that is a missing key.
        """
        return self.place(path)[1:]

    def place(self, path: Sequence[str | int]) -> tuple[str, str, int]:
        """The file (empty: the document's own) besides what `locate` says."""
        node, line, text, file = self, self.line, "", ""
        for position, part in enumerate(path):
            if isinstance(part, int):
                if node.items is None or part >= len(node.items):
                    continue
                node = node.items[part]
                line = node.line
                file = node.file or file
                text += f"[{part if node.number is None else node.number}]"
                continue
            if node.entries is not None and part in node.entries:
                line = node.key_lines[part]
                node = node.entries[part]
                file = node.file or file
            elif position != len(path) - 1 or node.entries is None:
                continue
            text += f".{part}" if text else part
        return file, text, line


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read yet."""

    node: Node
    anchor: str | None
    key: str | None = None
    key_line: int = 0


def read_document(text: str, *, source: str) -> Node:
    """The one document in a YAML text; an empty one is an empty mapping.

    Raises:
        ConfigError: not YAML, a duplicate key, a tag, a second document, or too large.
    """
    if len(text) > MAX_BYTES or len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB", source=source)
    reader = _Reader(source)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        if mark:
            reason += _hint(text, mark.line, is_alias="an alias" in reason)
        raise ConfigError(
            f"not YAML: {reason}", line=mark.line + 1 if mark else None, source=source
        ) from error
    except (yaml.YAMLError, UnicodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"not YAML: {reason}", source=source) from error
    return reader.root or Node(line=1, entries={})


def _hint(text: str, line: int, *, is_alias: bool) -> str:
    """What is most often behind a syntax error in that line (from 0)."""
    lines = text.splitlines()
    if is_alias and line < len(lines) and (alias := _UNQUOTED_STAR.search(lines[line])):
        return f'; write "{alias[1]}" in quotes'
    # A block that was never closed is noticed in the line behind it.
    for near in lines[max(0, line - 1) : line + 1][::-1]:
        unquoted = _UNQUOTED_IPV6.search(near)
        if unquoted:
            return f'; write "{unquoted[1]}" in quotes'
        if "\t" in near[: len(near) - len(near.lstrip())]:
            return "; indent with blanks, not tabs"
    return ""


class _Reader:
    def __init__(self, source: str) -> None:
        self.root: Node | None = None
        self._source = source
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0  # both parsers set it
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self._error("a second document begins here: one file, one document", line)
            case yaml.ScalarEvent():
                self._scalar(event, line)
            case yaml.AliasEvent():
                anchored = self._anchors.get(event.anchor or "")
                if anchored is None:
                    raise self._error(
                        f"*{event.anchor} names nothing before it; "
                        "text that begins with * needs quotes",
                        line,
                    )
                self._place(anchored, line)
            case yaml.SequenceStartEvent():
                self._begin(Node(line=line, items=[]), event, line)
            case yaml.MappingStartEvent():
                self._begin(Node(line=line, entries={}), event, line)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                ended = self._open.pop()
                if ended.anchor:
                    self._anchors[ended.anchor] = ended.node
                self._place(ended.node, ended.node.line)
            case _:
                pass  # stream and document ends

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        self._refuse_tag(event.tag, line)
        top = self._open[-1] if self._open else None
        if top is not None and top.node.entries is not None and top.key is None:
            if event.value in top.node.entries:
                first = top.node.key_lines[event.value]
                raise self._error(
                    f"{event.value!r} stands here a second time, first in line {first}",
                    line,
                    key=event.value,
                )
            top.key, top.key_line = event.value, line
            return
        is_plain = event.implicit[0] and not event.tag
        node = Node(line=line, scalar=_resolve(event.value) if is_plain else event.value)
        if event.anchor:
            self._anchors[event.anchor] = node
        self._place(node, line)

    def _begin(self, node: Node, event: yaml.CollectionStartEvent, line: int) -> None:
        self._refuse_tag(event.tag, line)
        self._refuse_as_key(line)
        if len(self._open) >= MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} deep", line)
        self._open.append(_Open(node, event.anchor))

    def _place(self, node: Node, line: int) -> None:
        """Hang a finished value into the collection it stands in."""
        if not self._open:
            self.root = node
            return
        self._refuse_as_key(line)
        top = self._open[-1]
        parent = top.node
        parent.values += node.values
        parent.depth = max(parent.depth, node.depth + 1)
        # Aliases multiply both: a document may stay small on paper and be huge when expanded.
        if parent.values > MAX_VALUES:
            raise self._error(f"more than {MAX_VALUES} values, aliases included", line)
        if parent.depth + len(self._open) - 1 > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} deep, aliases included", line)
        if parent.items is not None:
            parent.items.append(node)
        elif parent.entries is not None and top.key is not None:
            parent.entries[top.key] = node
            parent.key_lines[top.key] = top.key_line
            top.key = None

    def _refuse_as_key(self, line: int) -> None:
        if self._open and self._open[-1].node.entries is not None and self._open[-1].key is None:
            raise self._error("a key must be a word ([ip6]:port needs quotes)", line)

    def _refuse_tag(self, tag: str | None, line: int) -> None:
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise self._error(f"tags ({tag}) have no meaning here", line)

    def _error(self, reason: str, line: int, *, key: str = "") -> ConfigError:
        path = ""
        for opened in self._open:
            if opened.node.items is not None:
                path += f"[{len(opened.node.items)}]"
            elif opened.key or key:
                part = opened.key or key
                path += f".{part}" if path else part
        return ConfigError(reason, path=path, line=line, source=self._source)


def _resolve(text: str) -> str | int | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _INTEGER.fullmatch(text) else text
