"""A reading position in bytes that may still be incomplete.

Every length that a client sends goes through here, so that no parser compares offsets itself.
Two things can go wrong, and they are different: the bytes end before the packet does
(`Truncated`, more of them may help), or a length contradicts the block it stands in
(`ParseError`, nothing will help).
"""

from __future__ import annotations

from types import TracebackType
from typing import Final


class ParseError(ValueError):
    """The bytes are not what the protocol says; the client is at fault."""


class Truncated(Exception):
    """The bytes end before the packet does."""


class Cursor:
    """Reads forward through `data`, from `position` to `end`.

    Reading past the end of `data` raises Truncated; reading past `end`, or past the end of a block
    that `restrict_to` opened, raises ParseError.
    """

    __slots__ = ("_available", "_data", "_end", "position")

    def __init__(self, data: bytes, position: int = 0, end: int | None = None) -> None:
        self._data: Final = data
        self._available: Final = len(data)
        self._end = end  # of the innermost block; None: where the packet ends is not known
        self.position = position

    @property
    def remaining(self) -> int:
        """Bytes left in the innermost block, or in what has been received."""
        return (self._available if self._end is None else self._end) - self.position

    def _advance(self, count: int) -> int:
        start = self.position
        stop = start + count
        if self._end is not None and stop > self._end:
            raise ParseError("a length reaches beyond the block it stands in")
        if stop > self._available:
            raise Truncated
        self.position = stop
        return start

    def get_bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self._advance(count)
        return self._data[start : start + count]

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        self._advance(count)

    def get_uint8(self) -> int:
        """The next byte as a number."""
        return self._data[self._advance(1)]

    def get_uint16(self) -> int:
        """The next two bytes as a number in network order."""
        start = self._advance(2)
        data = self._data
        return data[start] << 8 | data[start + 1]

    def get_uint24(self) -> int:
        """The next three bytes as a number in network order."""
        start = self._advance(3)
        return int.from_bytes(self._data[start : start + 3], "big")

    def get_uint32(self) -> int:
        """The next four bytes as a number in network order."""
        start = self._advance(4)
        return int.from_bytes(self._data[start : start + 4], "big")

    def get_until(self, stop: bytes, *, at_most: int) -> bytes:
        """The bytes before the next `stop`, which is passed over too.

        Raises:
            ParseError: there is none within `at_most` bytes, or none in the block.
        """
        limit = self._available if self._end is None else min(self._end, self._available)
        found = self._data.find(
            stop, self.position, min(limit, self.position + at_most + len(stop))
        )
        if found >= 0:
            text = self._data[self.position : found]
            self.position = found + len(stop)
            return text
        if limit - self.position >= at_most + len(stop):
            raise ParseError(f"longer than {at_most} bytes")
        if self._end is not None and self._available >= self._end:
            raise ParseError("the block ends before its text does")
        raise Truncated

    def restrict_to(self, count: int) -> _Block:
        """Open the block of the next `count` bytes; leaving it demands that all were read.

        Raises:
            ParseError: the block reaches beyond the one it stands in, or (when it is left) has
                bytes nobody read.
        """
        end = self.position + count
        if self._end is not None and end > self._end:
            raise ParseError("a block reaches beyond the one it stands in")
        return _Block(self, end)


class _Block:
    """What `Cursor.restrict_to` returns.  A class: a generator would cost three times as much."""

    __slots__ = ("_cursor", "_end", "_outer_end")

    def __init__(self, cursor: Cursor, end: int) -> None:
        self._cursor = cursor
        self._end = end
        self._outer_end = cursor._end

    def __enter__(self) -> None:
        self._cursor._end = self._end

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cursor._end = self._outer_end
        if kind is None and self._cursor.position != self._end:
            raise ParseError("bytes are left over at the end of a block")
