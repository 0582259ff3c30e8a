"""What stands under a rule's `match`: checked by compiling it, kept as it was written.

Which words there are and what each may say is known to `pyforwarder.first_packet.table` alone;
routing compiles the same value again with the rule's terms and keys.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import PlainValidator

from pyforwarder.config.problems import problem
from pyforwarder.first_packet.options import OptionError
from pyforwarder.first_packet.table import COMBINATORS, CONDITIONS, Terms, build

if TYPE_CHECKING:
    from collections.abc import Iterator

# These wait for a client that stays silent, or hold a dialogue with it; a datagram offers neither.
STREAM_ONLY: Final = frozenset({"silence", "mysql", "smtp", "socks", "http_connect"})

_PLACE: Final = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


class Naming(enum.Enum):
    """Whether the client of a matching connection has named its destination."""

    ALWAYS = "always"
    NEVER = "never"
    SOMETIMES = "sometimes"


def parse_match(value: object) -> object:
    """The value itself, once it is known to compile.

    Raises:
        PydanticCustomError: it cannot be used; it says where and why.
    """
    try:
        build(value, Terms())
    except OptionError as error:
        place = _PLACE.findall(error.key)
        at = [int(index) if index else key for index, key in place]
        raise problem(error.reason, *at) from error
    return value


MatchField = Annotated[object, PlainValidator(parse_match)]


def naming(match: object) -> Naming:
    """Whether connections that this match takes have a destination named by their client."""
    if build(match, Terms()).names_destination:
        return Naming.ALWAYS
    if any(build(part, Terms()).names_destination for _, part in _protocols(match)):
        return Naming.SOMETIMES
    return Naming.NEVER


def protocols(match: object) -> list[str]:
    """The protocols a match may take, in the order written; what stands under `not` is left out."""
    return [name for name, _ in _protocols(match)]


def _protocols(match: object) -> Iterator[tuple[str, object]]:
    match match:
        case str():
            yield match, match
        case list():
            for part in match:
                yield from _protocols(part)
        case dict():
            for word, value in match.items():
                if word in ("all", "any_of"):
                    yield from _protocols(value)
                elif word not in CONDITIONS and word not in COMBINATORS:
                    yield word, {word: value}


def first_word(match: object) -> str:
    """What an unnamed rule is called after: its first protocol, else its first condition."""
    found = protocols(match)
    return found[0] if found else next(_conditions(match), "not")


def _conditions(match: object) -> Iterator[str]:
    match match:
        case list():
            for part in match:
                yield from _conditions(part)
        case dict():
            for word, value in match.items():
                if word in CONDITIONS:
                    yield word
                elif word in ("all", "any_of"):
                    yield from _conditions(value)
