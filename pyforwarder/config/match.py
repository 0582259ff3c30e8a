"""What stands under a rule's `match`: checked by compiling it, kept as it was written.

Which words there are and what each may say is known to `pyforwarder.core.first_packet.table` alone;
routing compiles the same value again with the rule's terms and keys.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import PlainValidator

from pyforwarder.config import values
from pyforwarder.config.problems import problem
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.table import COMBINATORS, CONDITIONS, PROTOCOLS, Terms, build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.core.first_packet.matcher import Matcher

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
    check_match(value, Terms())
    return value


def check_match(value: object, terms: Terms, *at: str | int) -> Matcher:
    """The matcher for what stands after `match`; `at` is where that is, for errors.

    Raises:
        PydanticCustomError: it cannot be used; it says where and why.
    """
    try:
        return build(value, terms)
    except OptionError as error:
        place = _PLACE.findall(error.key)
        below = [int(index) if index else key for index, key in place]
        raise problem(error.reason, *at, *below) from error


def place_of_option(match: object, key: object) -> str:
    """What to write if a rule's unknown key is an option of the protocol that it matches."""
    for word, options in _protocols(match):
        written = options.get(word) if isinstance(options, dict) else None
        others = written if isinstance(written, dict) else {}
        try:
            build({word: {**others, key: "x"}}, Terms())
        except OptionError as error:
            # Its value may be wrong, but the protocol must have such an option.
            if error.key != f"{word}.{key}" or error.reason.startswith("unknown option"):
                continue
        return f"write match: {{{word}: {{{key}: ...}}}}"
    return ""


MatchField = Annotated[object, PlainValidator(parse_match), values.Written("match")]


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


def bare_protocol(match: object) -> str:
    """The protocol that a match takes without a condition; empty: it is no such match."""
    if isinstance(match, list) and len(match) == 1:
        return bare_protocol(match[0])
    if isinstance(match, dict) and len(match) == 1:
        ((word, value),) = match.items()
        match = word if value is None or value is True or value == {} else ""
    return match if isinstance(match, str) and match in PROTOCOLS else ""


def required_protocols(match: object) -> frozenset[str]:
    """The protocols that every connection speaks which a match takes; two never hold at once."""
    match match:
        case str():
            return frozenset({match} & PROTOCOLS.keys())
        case list():
            return frozenset.intersection(*map(required_protocols, match))
        case dict():
            return frozenset().union(*(_required(word, value) for word, value in match.items()))
    return frozenset()


def _required(word: str, value: object) -> frozenset[str]:
    if word == "all":
        parts = value if isinstance(value, list) else [value]
        return frozenset().union(*map(required_protocols, parts))
    return required_protocols(value if word == "any_of" else word)


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
