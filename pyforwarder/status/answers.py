"""How the page's site answers: JSON, events, refusals, and headers that keep a browser careful."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

from pyforwarder.status.http import Answer

# Nothing but our own files is loaded, no script stands in a document, and no text becomes markup.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS: Final = (
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)
_JSON: Final = ("Content-Type", "application/json")


def secured(answer: Answer) -> Answer:
    """The answer, with the headers of all that the site says."""
    return Answer(answer.status, (*answer.headers, *SECURITY_HEADERS), answer.body)


def not_allowed(methods: str) -> Answer:
    """There is such a path, for these methods alone."""
    return Answer.words(HTTPStatus.METHOD_NOT_ALLOWED, "Not so.", ("Allow", methods))


def ok(value: object) -> Answer:
    """This, as JSON."""
    return Answer(HTTPStatus.OK, (_JSON,), json.dumps(value, separators=(",", ":")).encode())


def failed(status: HTTPStatus, words: str, *headers: tuple[str, str]) -> Answer:
    """What was wrong, in words for the viewer."""
    return Answer(status, (_JSON, *headers), json.dumps({"error": words}).encode())


SOON: Final = ("Retry-After", "3")
BUSY: Final = failed(HTTPStatus.SERVICE_UNAVAILABLE, "the forwarder is busy: try again", SOON)


def event(name: str, value: object) -> bytes:
    """An event of a stream (server-sent events)."""
    # JSON has no line break of its own, so an event is always three lines.
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def is_number(text: str) -> bool:
    """Whether this is a plain decimal number that is not too large."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def texts_in(body: bytes, names: set[str]) -> dict[str, str] | None:
    """An object of texts with no other names; None if it is none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict) or not asked.keys() <= names:
        return None
    return asked if all(isinstance(value, str) for value in asked.values()) else None
