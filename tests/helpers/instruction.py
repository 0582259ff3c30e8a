"""The instruction as design text describes it, written again so that the tests check the product.

LEN(2) DEST CHECK(2)      LEN counts everything, CHECK is the sum of all bytes before it mod 100
"""

from __future__ import annotations

from typing import Final

ACK: Final = b"06OK56"


def framed(body: bytes) -> bytes:
    """`body` with its length in front and its sum behind; may exceed 99 bytes if asked to."""
    head = b"%02d" % (len(body) + 4) + body
    return head + b"%02d" % (sum(head) % 100)


def instruction(destination: str, *, checked: bool = True) -> bytes:
    """What a client sends to be connected to `destination`; unchecked ones end with `00`."""
    text = framed(destination.encode())
    return text if checked else text[:-2] + b"00"


def refusal(code: str) -> bytes:
    """What a refused client reads before the close."""
    return framed(b"ERR " + code.encode())
