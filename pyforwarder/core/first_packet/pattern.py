r"""`regex`: a regular expression over the first bytes, in time linear to them.

    regex: "^EHLO "
    regex: ["(?i)^helo ", "^\\x00[\\x10-\\x20]"]      a list holds alternatives

The syntax is RE2's. A pattern is ASCII (`\xHH` for other bytes), matches bytes, sees the first
16 KiB and may stand anywhere in them, unless it begins with `^`.

* A first packet has no end, only bytes that have not come yet. So `$`, `\z`, `\b` and `\B`
  are refused: write the bytes that follow, for example `\r\n`.
* Begin with `^` where you can. Then it is known early that nothing can match any more, and a client
  of a later rule need not wait for the timeout.
* A pattern may have 1000 steps: for a repeat like `{0,900}` write `*`.
"""

# RE2 does the matching, so neither a pattern nor a client's bytes can stall the loop: Python's own
# `re` backtracks and is not used, not even when RE2 is missing (then a rule with a regex is a
# config error).
#
# Linear is not quick by itself: where a pattern has too many states to keep, RE2 goes through all
# of its steps for every byte, at some 5 ns each. So both are bounded, `MAX_STEPS` and `MAX_TEXT`:
# the worst look takes one or two tenths of a second, and the usual one some microseconds.
#
# "Can still match" has to be told from "cannot match any more". RE2 cannot say that, but the
# prefixes of a regular language are a regular language too: `_prefixes` writes its expression, for
# patterns anchored with `^`. What looks at bytes that have not come, such as `$`, is refused
# because its answer would depend on how the bytes were cut into segments.

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from pyforwarder.core.express.conditions import UserspaceOnly
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.outcome import End

# `_prefixes` nests one group per element, and RE2 parses at most 1000 levels.
MAX_PATTERN_LENGTH = 500
MAX_NESTING = 50  # the parser here calls itself four times for each
MAX_STEPS = 1000
# Those of the expression for the beginnings of a pattern's matches, which says "no match" early.
MAX_PREFIX_STEPS = 1500
MAX_TEXT = 16 << 10


class _Compiled(Protocol):
    @property
    def programsize(self) -> int: ...
    def search(self, text: bytes) -> object | None: ...
    def fullmatch(self, text: bytes) -> object | None: ...


class Pattern(Matcher):
    """Matches when one of `patterns` is found.

    Raises:
        OptionError: RE2 is not installed, the syntax is wrong, or it is not accepted here.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [(_compile(text), _compile_prefixes(text)) for text in patterns]

    @classmethod
    def from_options(cls, options: Options) -> Pattern:
        """The matcher for what stands after `regex:`."""
        patterns = options.texts("pattern")
        options.finish()
        if not patterns:
            raise OptionError("says no pattern")
        return cls(patterns)

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        outcome = NO_MATCH
        is_full = len(data) >= MAX_TEXT
        text = data[:MAX_TEXT] if is_full else data
        for whole, prefixes in self._patterns:
            if whole.search(text) is not None:
                return MATCH
            if not is_full and (prefixes is None or prefixes.fullmatch(text) is not None):
                outcome = NEED_MORE
        return outcome

    def in_kernel(self, local_port: int) -> Condition:
        raise UserspaceOnly("userspace alone matches a `regex`")


def _compile(text: str) -> _Compiled:
    try:
        import re2
    except ImportError:
        raise OptionError("regex needs RE2: install the Python package google-re2") from None
    if len(text) > MAX_PATTERN_LENGTH:
        raise OptionError(f"a pattern may have {MAX_PATTERN_LENGTH} characters, not {len(text)}")
    if not text.isascii():
        raise OptionError(f"{text!r}: write bytes above 127 as \\xHH")
    _, tree = _Parser(text).parse()
    # Before RE2 sees it, which would take seconds over the worst.
    _bound_steps(text, _steps(tree))
    compiled = _compile_re2(text, re2)
    _bound_steps(text, compiled.programsize)
    return compiled


def _bound_steps(text: str, steps: int) -> None:
    if steps > MAX_STEPS:
        raise OptionError(
            f"{text!r} has {steps} steps, and {MAX_STEPS} are allowed; a first packet is bounded "
            "anyway: write * for a repeat like {0,900}"
        )


def _compile_re2(text: str, re2: object) -> _Compiled:
    options = re2.Options()  # type: ignore[attr-defined]
    options.encoding = re2.Options.Encoding.LATIN1  # type: ignore[attr-defined]
    options.never_capture = True
    options.log_errors = False  # the exception says it; stderr is not ours here
    try:
        return cast("_Compiled", re2.compile(text.encode("ascii"), options))  # type: ignore[attr-defined]
    except re2.error as error:  # type: ignore[attr-defined]
        reason = error.args[0]
        reason = reason.decode("latin-1") if isinstance(reason, bytes) else str(reason)
        raise OptionError(f"{text!r}: {reason}") from None


def _compile_prefixes(text: str) -> _Compiled | None:
    """What matches exactly the beginnings of this pattern's matches; None: anything may be one."""
    import re2

    flags, tree = _Parser(text).parse()
    if not _is_anchored(tree):
        return None
    # Where it is too large the rule works, but says "no match" only when the bytes end.
    try:
        compiled = _compile_re2(flags + _prefixes(tree), re2)
    except OptionError:
        return None
    return compiled if compiled.programsize <= MAX_PREFIX_STEPS else None


@dataclass(frozen=True, slots=True)
class _Atom:
    """Takes one byte."""

    source: str


@dataclass(frozen=True, slots=True)
class _Begin:
    """`^` or `\\A`: takes nothing."""

    source: str


@dataclass(frozen=True, slots=True)
class _Group:
    source: str
    opening: str
    inner: _Node


@dataclass(frozen=True, slots=True)
class _Repeat:
    source: str
    inner: _Node
    at_least: int
    at_most: int | None


@dataclass(frozen=True, slots=True)
class _Sequence:
    source: str
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Alternatives:
    source: str
    items: tuple[_Node, ...]


_Node = _Atom | _Begin | _Group | _Repeat | _Sequence | _Alternatives


def _is_anchored(node: _Node) -> bool:
    """Whether every match begins at the first byte."""
    match node:
        case _Begin():
            return True
        case _Group(inner=inner):
            return _is_anchored(inner)
        case _Repeat(inner=inner, at_least=at_least):
            return at_least > 0 and _is_anchored(inner)
        case _Sequence(items=items):
            return bool(items) and _is_anchored(items[0])
        case _Alternatives(items=items):
            return all(_is_anchored(item) for item in items)
        case _Atom():
            return False


def _steps(node: _Node) -> int:
    """About how many steps RE2 makes of it; fewer than it does, by a factor."""
    match node:
        case _Atom() | _Begin():
            return 1
        case _Group(inner=inner):
            return _steps(inner)
        case _Repeat(inner=inner, at_least=at_least, at_most=at_most):
            return _steps(inner) * (max(at_least, 1) if at_most is None else at_most)
        case _Sequence(items=items) | _Alternatives(items=items):
            return sum(_steps(item) for item in items)
    raise AssertionError(node)


def _prefixes(node: _Node) -> str:
    """A pattern for every beginning of what `node` matches, from nothing up to the whole."""
    match node:
        case _Atom(source=source):
            return f"(?:{source})?"
        case _Begin(source=source):
            return source
        case _Group(opening=opening, inner=inner):
            return f"{opening}{_prefixes(inner)})"
        case _Repeat(inner=inner, at_most=None):
            return f"(?:{inner.source})*(?:{_prefixes(inner)})"
        case _Repeat(at_most=0):
            return "(?:)"
        case _Repeat(inner=inner, at_most=int(at_most)):
            return f"(?:{inner.source}){{0,{at_most - 1}}}(?:{_prefixes(inner)})"
        case _Sequence(items=items):
            rest = ""
            for item in reversed(items):
                if isinstance(item, _Begin):
                    rest = item.source + rest
                elif isinstance(item, _Atom):
                    rest = f"(?:{item.source}{rest})?"
                else:
                    rest = f"(?:{_prefixes(item)}|{item.source}{rest})"
            return rest or "(?:)"
        case _Alternatives(items=items):
            return "(?:" + "|".join(_prefixes(item) for item in items) + ")"
    raise AssertionError(node)


_FLAGS = re.compile(r"\(\?[is]+\)")
_OPENING = re.compile(r"\((?:\?:|\?[is]+:|\?P?<[A-Za-z_][A-Za-z0-9_]*>)?")
_ESCAPE = re.compile(r"\\(?:[dDwWsStnrfva]|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,2}\}|[^0-9A-Za-z])")
_CLASS = re.compile(
    r"\[\^?\]?(?:\[:\^?[a-z]+:\]|\\(?:x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,2}\}|[dDwWsStnrfva]|[^0-9A-Za-z])"
    r"|[^\]\\])*\]"
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{([0-9]{1,4})(,?)([0-9]{0,4})\})\??")
_LOOKS_AHEAD = ("$", "\\z", "\\Z", "\\b", "\\B")


class _Parser:
    """Reads the part of RE2's syntax that is accepted here into a tree."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> tuple[str, _Node]:
        """Leading flags such as `(?i)`, and the tree of the rest.

        Raises:
            OptionError: the syntax is wrong, or looks ahead.
        """
        flags = _FLAGS.match(self._text)
        if flags:
            self._at = flags.end()
        tree = self._alternatives()
        if self._at < len(self._text):
            raise self._error("has a ) too many")
        return (flags.group() if flags else ""), tree

    def _error(self, reason: str) -> OptionError:
        return OptionError(f"{self._text!r} {reason}")

    def _alternatives(self) -> _Node:
        start = self._at
        items = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            items.append(self._sequence())
        if len(items) == 1:
            return items[0]
        return _Alternatives(f"(?:{self._text[start : self._at]})", tuple(items))

    def _sequence(self) -> _Node:
        start = self._at
        items: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            item_start = self._at
            item = self._item()
            while quantifier := _QUANTIFIER.match(self._text, self._at):
                self._at = quantifier.end()
                item = self._repeat(item, quantifier, self._text[item_start : self._at])
            items.append(item)
        if len(items) == 1:
            return items[0]
        return _Sequence(f"(?:{self._text[start : self._at]})", tuple(items))

    def _repeat(self, inner: _Node, quantifier: re.Match[str], source: str) -> _Repeat:
        symbol = quantifier.group()[0]
        if symbol != "{":
            at_least = 1 if symbol == "+" else 0
            return _Repeat(source, inner, at_least, 1 if symbol == "?" else None)
        at_least = int(quantifier[1])
        if not quantifier[2]:
            return _Repeat(source, inner, at_least, at_least)
        return _Repeat(source, inner, at_least, int(quantifier[3]) if quantifier[3] else None)

    def _item(self) -> _Node:
        text, start = self._text, self._at
        for symbol in _LOOKS_AHEAD:
            if text.startswith(symbol, start):
                raise self._error(
                    f"uses {symbol}, which looks at what follows, but a first packet has no end; "
                    "write the bytes that come next, for example \\r\\n"
                )
        if text[start] == "^" or text.startswith("\\A", start):
            self._at += 1 if text[start] == "^" else 2
            return _Begin(text[start : self._at])
        if text[start] == "(":
            return self._group()
        if text[start] in "*+?":
            raise self._error(f"has nothing before {text[start]}")
        for shape, name in ((_ESCAPE, "\\"), (_CLASS, "[")):
            if text[start] == name:
                found = shape.match(text, start)
                if not found:
                    raise self._error(f"has a {name} that is not understood: {text[start:][:8]!r}")
                self._at = found.end()
                return _Atom(found.group())
        self._at += 1
        return _Atom(text[start : self._at])

    def _group(self) -> _Group:
        start = self._at
        opening = _OPENING.match(self._text, start)
        if not opening or (self._text.startswith("(?", start) and len(opening.group()) == 1):
            raise self._error(f"has a group that is not understood: {self._text[start:][:8]!r}")
        self._at = opening.end()
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._error(f"has groups nested more than {MAX_NESTING} deep")
        inner = self._alternatives()
        self._depth -= 1
        if not self._text.startswith(")", self._at):
            raise self._error("has a ( that is never closed")
        self._at += 1
        # Names may not occur twice in one pattern, and `_prefixes` repeats parts of it.
        flags = opening.group() if opening.group().endswith(":") else "(?:"
        return _Group(flags + inner.source + ")", flags, inner)
