"""`include:` of a configuration: the files of a directory, merged with the file that names it.

An included file has listeners, upstreams and users, and nothing else: what concerns the whole
daemon stands in one place. Names may not stand twice. Everything keeps its file and its line, so
errors and warnings name both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.config.document import Node, read_document
from pyforwarder.config.values import describe, suggestion
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

INCLUDE: Final = "include"
# What may stand in an included file: a list, and mappings by name.
MERGED: Final = ("listeners", "upstreams", "users")
SUFFIXES: Final = (".yaml", ".yml")
# Files of one configuration: a directory with more is not one of configuration files.
MOST_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration's text, and the document that knows where each part of it stands."""

    text: str  # of the whole: with included files it is JSON, and names none
    document: Node


def load(text: str, *, source: str, path: Path | None, read: Callable[[Path], str]) -> Loaded:
    """The whole that a text and the files that it includes make.

    `path` is that of the text's file, for a directory that is named relatively; None: it has none.
    `read` reads an included file.

    Raises:
        ConfigError: a file cannot be read, or is no document; one has a key that it may not have;
            a name stands twice (both files are named).
    """
    document = read_document(text, source=source)
    entries = document.entries
    if entries is None or INCLUDE not in entries:
        return Loaded(text, document)
    directories = _directories(document, source=source, path=path)
    files = [file for directory in directories for file in _files(directory, document, source)]
    for key in MERGED:
        _mark(entries.get(key), source)
    for file in files:
        _merge(document, read_document(read(file), source=str(file)), source, str(file))
    del entries[INCLUDE]
    document.included = tuple(map(str, (*directories, *files)))
    return Loaded(json.dumps(document.plain()), document)


def _directories(document: Node, *, source: str, path: Path | None) -> list[Path]:
    assert document.entries is not None
    node = document.entries[INCLUDE]
    named = node.items if node.items is not None else [node]
    found = []
    for item in named:
        if not isinstance(item.scalar, str) or not item.scalar:
            raise _wrong("write a directory, like /etc/pyforwarder/conf.d", item, source)
        directory = Path(item.scalar)
        if not directory.is_absolute():
            if path is None:
                raise _wrong(f"{item.scalar!r} is relative to no file: write /...", item, source)
            directory = path.absolute().parent / directory
        found.append(directory)
    return found


def _files(directory: Path, document: Node, source: str) -> list[Path]:
    """The configuration files of a directory, by name."""
    assert document.entries is not None
    node = document.entries[INCLUDE]
    try:
        files = sorted(
            file
            for file in directory.iterdir()
            if file.suffix in SUFFIXES and not file.name.startswith(".")
        )
    except NotADirectoryError as error:
        raise _wrong(f"{directory} is a file: name its directory", node, source) from error
    except OSError as error:
        raise _wrong(f"{directory}: {error.strerror}", node, source) from error
    if len(files) > MOST_FILES:
        raise _wrong(f"{directory} has more than {MOST_FILES} files", node, source)
    return files


def _wrong(reason: str, node: Node, source: str) -> ConfigError:
    return ConfigError(reason, path=INCLUDE, line=node.line, source=source)


def _mark(node: Node | None, file: str) -> None:
    """Note the file in each part of a list or a mapping."""
    if node is None:
        return
    for number, item in enumerate(node.items or ()):
        item.file, item.number = file, number
    for entry in (node.entries or {}).values():
        entry.file = file


def _merge(whole: Node, part: Node, main: str, file: str) -> None:
    """Add what an included file has."""
    if part.entries is None:
        if part.items is None and part.scalar is None:
            return  # empty, or all of it is a comment
        raise ConfigError(f"must be keys and values ({', '.join(MERGED)})", line=1, source=file)
    assert whole.entries is not None
    for key, node in part.entries.items():
        line = part.key_lines[key]
        if key not in MERGED:
            hint = suggestion(key, MERGED)
            reason = f"`{key}` cannot stand in an included file ({hint}): write it in {main}"
            raise ConfigError(reason, path=key, line=line, source=file)
        if node.items is None and node.entries is None and node.scalar is None:
            continue
        _mark(node, file)
        present = whole.entries.get(key)
        is_list = key == "listeners"
        if (node.items if is_list else node.entries) is None:
            what = "a list" if is_list else "keys and values"
            reason = f"must be {what}, not {describe(node.plain())}"
            raise ConfigError(reason, path=key, line=line, source=file)
        if present is None or (present.items is None and present.entries is None):
            whole.entries[key], whole.key_lines[key] = node, line
        elif is_list:
            _join_lists(present, node, file)
        else:
            _join_mappings(key, present, node, file)


def _join_lists(present: Node, more: Node, file: str) -> None:
    assert more.items is not None
    if present.items is None:
        return  # the model tells of it
    names = {name: item for item in present.items if (name := _name_of(item))}
    for item in more.items:
        other = names.get(_name_of(item))
        if other is not None:
            raise ConfigError(
                f"the listener {_name_of(item)!r} stands in {other.file}, line {other.line}, too",
                path=f"listeners[{item.number}].name",
                line=item.line,
                source=file,
            )
    present.items += more.items


def _join_mappings(key: str, present: Node, more: Node, file: str) -> None:
    assert more.entries is not None
    if present.entries is None:
        return  # the model tells of it
    for name, entry in more.entries.items():
        if name in present.entries:
            other = present.entries[name].file
            raise ConfigError(
                f"{name!r} stands in {other}, line {present.key_lines[name]}, too",
                path=f"{key}.{name}",
                line=more.key_lines[name],
                source=file,
            )
        present.entries[name] = entry
        present.key_lines[name] = more.key_lines[name]


def _name_of(item: Node) -> str:
    name = item.entries.get("name") if item.entries is not None else None
    return name.scalar if name is not None and isinstance(name.scalar, str) else ""
