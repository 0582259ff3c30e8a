"""What a worker that was taken over may say without sense: bytes, and how many descriptors."""

from __future__ import annotations

from typing import Final

MALFORMED: Final[dict[str, tuple[bytes, int]]] = {
    "no JSON": (b"x", 0),
    "a number": (b"5", 0),
    "a list": (b'["ask"]', 0),
    "no kind": (b"{}", 0),
    "unknown kind": (b'{"do":"stop"}', 0),
    "a field is missing": (b'{"ask":"enlarge"}', 1),
    "infinite": (b'{"ask":"enlarge","number":Infinity}', 1),
    "not a number": (b'{"ask":"transparent","number":NaN}', 1),
    "a huge number": (b'{"ask":"enlarge","number":' + b"9" * 5000 + b"}", 1),
    "nested": (b"[" * 100_000, 0),
    "nested result": (b'{"n":1,"result":' + b"[" * 900 + b"]" * 900 + b"}", 0),
    "nested fields": (b'{"a":' * 20_000, 0),
    "not UTF-8": (b'{"ask":"\xff\xfe"}', 1),
    "a lone surrogate": (b'{"n":0,"error":"\\ud800"}', 5),
    "too long": (b" " * (200 << 10), 0),
    "descriptors without use": (b'{"n":0,"result":null}', 3),
    "as many descriptors as go": (b'{"ask":"enlarge","number":1}', 253),
    "an answer to nothing": (b'{"n":7,"result":null}', 0),
    "empty, with a descriptor": (b"", 1),
    "a text that is a pipe": (b'"in the last descriptor"', 1),
}
