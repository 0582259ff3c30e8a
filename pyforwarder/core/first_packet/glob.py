"""Names with `*` in them, as rules write server names, hosts, paths and users."""

from __future__ import annotations

from collections.abc import Iterable


class Globs:
    """Alternatives, each a text in which `*` stands for any run of characters, an empty one too.

    Looks at every character a bounded number of times, with any pattern: no backtracking.
    """

    def __init__(self, patterns: Iterable[str], *, ignore_case: bool) -> None:
        folded = [pattern.lower() if ignore_case else pattern for pattern in patterns]
        self._ignore_case = ignore_case
        self._exact = frozenset(pattern for pattern in folded if "*" not in pattern)
        self._globs = tuple(tuple(pattern.split("*")) for pattern in folded if "*" in pattern)

    def include(self, text: str) -> bool:
        """Whether `text` is one of them."""
        if self._ignore_case:
            text = text.lower()
        if text in self._exact:
            return True
        # Not any(): a generator costs more than most names do.
        for parts in self._globs:  # noqa: SIM110
            if _fits(text, parts):
                return True
        return False

    @property
    def exact(self) -> frozenset[str]:
        """Those without a `*`."""
        return self._exact

    @property
    def endings(self) -> tuple[str, ...] | None:
        """What follows the `*` of the others; None: one has a `*` elsewhere than in front."""
        if any(len(parts) != 2 or parts[0] for parts in self._globs):
            return None
        return tuple(parts[1] for parts in self._globs)


def _fits(text: str, parts: tuple[str, ...]) -> bool:
    first, last = parts[0], parts[-1]
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    stop = len(text) - len(last)
    at = len(first)
    for part in parts[1:-1]:
        # The leftmost place leaves the most room for the parts that follow.
        at = text.find(part, at, stop)
        if at < 0:
            return False
        at += len(part)
    return True
