"""`bytes`: fixed bytes at a fixed place.

bytes: {prefix: "hex:0016"}              hexadecimal digits, blanks allowed between bytes
bytes: {prefix: ["GET ", "PUT "]}        text, as UTF-8; a list holds alternatives
bytes: {prefix: "hex:ff", offset: 4}     the first four bytes may be anything
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.express.conditions import BytesAt
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.matcher import ListenerFacts
    from pyforwarder.core.first_packet.outcome import End

# Far above any magic number, far below the largest first_packet.max_bytes.
MAX_OFFSET = 65535


class Literal(Matcher):
    """Matches when one of `alternatives` stands at `offset`."""

    def __init__(self, alternatives: tuple[bytes, ...], offset: int = 0) -> None:
        self._alternatives = alternatives
        self._offset = offset

    @classmethod
    def from_options(cls, options: Options) -> Literal:
        """The matcher for what stands after `bytes:`.

        Raises:
            OptionError: an unknown option, no prefix, or hexadecimal that is none.
        """
        prefixes = tuple(parse_bytes(text) for text in options.texts("prefix"))
        offset = options.number("offset", default=0, at_most=MAX_OFFSET)
        options.finish()  # first: a misspelt `prefix` is that, not a missing one
        if not prefixes:
            raise OptionError("says no prefix", "prefix")
        return cls(prefixes, offset)

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        offset = self._offset
        if data.startswith(self._alternatives, offset):
            return MATCH
        here = data[offset:] if offset else data
        for wanted in self._alternatives:
            if wanted.startswith(here):
                return NEED_MORE
        return NO_MATCH

    def never(self, listener: ListenerFacts) -> str:
        needed = self._offset + min(map(len, self._alternatives))
        if needed <= listener.max_bytes:
            return ""
        return f"it needs {needed} bytes, and first_packet.max_bytes is {listener.max_bytes}"

    def in_kernel(self, local_port: int) -> Condition:
        return BytesAt(self._offset, self._alternatives)


def parse_bytes(text: str) -> bytes:
    """The bytes a user wrote as `hex:0016` or as plain text.

    Raises:
        OptionError: `hex:` is not followed by pairs of hexadecimal digits, or nothing is left.
    """
    if text.startswith("hex:"):
        try:
            wanted = bytes.fromhex(text.removeprefix("hex:"))
        except ValueError:
            raise OptionError(f"{text!r} is not hex: and pairs of hexadecimal digits") from None
    else:
        wanted = text.encode()
    if not wanted:
        raise OptionError("empty bytes would match everything; write `match: any`")
    return wanted
