"""The requests to the keeper about other machines' pairs: one table, and nothing else.

They come from a process without privileges that reads a fleet's store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

from pyforwarder.fleet.failover import stays

# Entries in one request, which is one message.
MOST_AT_ONCE: Final = 16
_KEY_BYTES: Final = 20


class FaultyStandbyError(Exception):
    """A request is not in the table."""


_TABLE: Final[dict[str, str]] = {
    "begin": "",
    "hold": "pairs",
    "release": "keys",
    "let_go": "pairs",
    "stay": "group",
    "look": "",
}


def understand(data: bytes) -> dict[str, Any]:
    """Parse a request, and check it against the table.

    Raises:
        FaultyStandbyError: it is not in the table.
    """
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FaultyStandbyError("no JSON") from error
    if type(request) is not dict or type(request.get("do")) is not str:
        raise FaultyStandbyError("a request is an object")
    if request["do"] not in _TABLE:
        raise FaultyStandbyError("a request of no kind")
    more = _TABLE[request["do"]]
    if request.keys() != {"do", "n", "until", *([more] if more else [])}:
        raise FaultyStandbyError("a field too many, or one is missing")
    n, until = request["n"], request["until"]
    if type(n) is not int or not 0 <= n < 1 << 64:
        raise FaultyStandbyError("n")
    if type(until) not in (int, float) or not 0 <= until < math.inf:
        raise FaultyStandbyError("until")
    if more == "group":
        _check_group(request[more])
    elif more:
        _check_list(request["do"], request[more])
    return request


def _check_list(do: str, value: object) -> None:
    if type(value) is not list or len(value) > MOST_AT_ONCE:
        raise FaultyStandbyError("a list")
    is_text: Callable[[object], bool] = lambda one: type(one) is str and one.isascii()  # noqa: E731
    for one in value:
        if do == "hold":
            fits = type(one) is list and len(one) == 2 and all(map(is_text, one))
        elif do == "release":
            fits = is_text(one) and len(one) == _KEY_BYTES
        else:
            fits = is_text(one)
        if not fits:
            raise FaultyStandbyError(do)


def _check_group(value: object) -> None:
    if type(value) is not list or len(value) != 2 or not all(type(one) is str for one in value):
        raise FaultyStandbyError("a group")
    key, text = value
    if not stays.is_key(key) or not text.isascii():
        raise FaultyStandbyError("a group")
