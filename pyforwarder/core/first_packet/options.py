"""Reads what stands after a protocol's name in a rule, and complains in the user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping


class OptionError(ValueError):
    """A match says something that cannot be used; `key` is where, below the match."""

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


class Options:
    """The options of one protocol; each is asked for once, then `finish` names what is unknown.

    Nothing, `true` and an empty mapping all mean "no options".  A protocol with a main option
    may be written short: with `shorthand="prefix"`, `bytes: "GET "` means
    `bytes: {prefix: "GET "}`.
    """

    def __init__(self, value: object, *, shorthand: str | None = None) -> None:
        if value is None or value is True:
            value = {}
        if not isinstance(value, Mapping):
            if shorthand is None:
                raise OptionError(f"wants options in braces, not {value!r}")
            value = {shorthand: value}
        self._values: dict[str, object] = {str(key): inner for key, inner in value.items()}
        self._known: list[str] = []

    def take(self, key: str) -> object:
        """The value as it is written, or None."""
        self._known.append(key)
        return self._values.get(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """One text or a list of them; an absent key gives an empty tuple."""
        value = self.take(key)
        if value is None:
            return ()
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise OptionError("is an empty list: nothing could match", key)
        for item in items:
            # A bool is what YAML makes of a bare `on` or `no`: the user has to quote it.
            if isinstance(item, bool) or not isinstance(item, str | int | float):
                raise OptionError(f"wants text or a list of texts, not {item!r}", key)
        return tuple(str(item) for item in items)

    def number(self, key: str, *, default: int, at_most: int) -> int:
        """A number from 0 to `at_most`."""
        texts = self.texts(key)
        if not texts:
            return default
        if len(texts) > 1 or not re.fullmatch("[0-9]{1,9}", texts[0]) or int(texts[0]) > at_most:
            raise OptionError(f"wants a number from 0 to {at_most}", key)
        return int(texts[0])

    def finish(self) -> None:
        """Complain about the first key that nobody asked for.

        Raises:
            OptionError: with a suggestion when a known key is close.
        """
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                known = ", ".join(self._known) or "none"
                hint = f"did you mean {near[0]}?" if near else f"known options: {known}"
                raise OptionError(f"unknown option {key!r}; {hint}", key)
