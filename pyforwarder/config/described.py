"""Every word that `match` may begin with, with its options and what its own file says of it.

docs/protocols.md and pyforwarder.yaml(5) are made of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from typing import Final

from pyforwarder.core import first_packet
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.table import PROTOCOLS, Terms, build

# An option that no protocol has: the complaint names those that there are.
_NO_OPTION: Final = "?"


@dataclass(frozen=True, slots=True)
class Word:
    """A word of `match`."""

    name: str
    described_as: str  # the word whose file describes this one; mostly itself
    about: str  # Markdown: a sentence, then paragraphs and examples
    options: tuple[str, ...]
    in_datagrams: bool
    names_destination: bool

    @property
    def summary(self) -> str:
        """What it is, in one sentence."""
        if self.described_as != self.name:
            return f"The server speaks first: the same as `{self.described_as}`."
        return self.about.split("\n\n")[0].replace("\n", " ")


@functools.cache
def words() -> tuple[Word, ...]:
    """All of them, in the order of the registry."""
    texts = _texts()
    found = []
    for name, protocol in PROTOCOLS.items():
        owner = name if name in texts else _owner(name, texts)
        found.append(
            Word(
                name=name,
                described_as=owner,
                about=texts[owner],
                options=_options(name),
                in_datagrams=protocol.in_datagrams,
                names_destination=_names_destination(name),
            )
        )
    return tuple(found)


def _texts() -> dict[str, str]:
    """Return, by word, the text at the top of the file that begins with it: "`ssh`: SSH of ..."."""
    found = {}
    for info in pkgutil.iter_modules(first_packet.__path__):
        module = importlib.import_module(f"{first_packet.__name__}.{info.name}")
        begun = re.match(r"`(\w+)`: (.*)", inspect.getdoc(module) or "", re.DOTALL)
        if begun and begun[1] in PROTOCOLS:
            found[begun[1]] = begun[2][0].upper() + begun[2][1:]
    return found


def _owner(name: str, texts: dict[str, str]) -> str:
    """The word in whose file the matcher of this one stands."""
    module = inspect.getmodule(type(build(name, Terms())))
    about = (module.__doc__ or "") if module else ""
    return next(word for word in texts if about.startswith(f"`{word}`: "))


def _options(name: str) -> tuple[str, ...]:
    try:
        build({name: {_NO_OPTION: 1}}, Terms())
    except OptionError as error:
        known = error.reason.partition("known options: ")[2]
        return () if known == "none" else tuple(known.split(", "))
    raise AssertionError(f"{name} takes any option")


def _names_destination(name: str) -> bool:
    try:
        return build(name, Terms()).names_destination
    except OptionError:  # it must have options
        return False
