"""The requests that a worker may send to the keeper of spliced pairs: one table, and nothing else.

A worker parses bytes of strangers and may be compromised, so each of its messages is checked
against the table before anything is done with it. A message that is not in the table is always the
worker's fault.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyforwarder.core.wording import counted

_LONGEST_S: Final = 366 * 86400.0  # config/values.py has no longer duration
# Each takes the keeper some 50 us, while others wait; and their counts must fit one message.
MOST_CLOSED_AT_ONCE: Final = 64


class FaultyRequestError(Exception):
    """A worker has sent a request that is not in the table."""


def _whole(most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value <= most


def _from_one(most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 1 <= value <= most


def _is_moment(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _is_a_silence(value: object) -> bool:
    """Seconds, as long as a configuration may say."""
    return type(value) in (int, float) and 0 < value <= _LONGEST_S  # type: ignore[operator]


def _are_places(value: object) -> bool:
    """Sessions, each as [index, number], as many as one request may end."""
    if type(value) is not list or not 0 < len(value) <= MOST_CLOSED_AT_ONCE:
        return False
    if not all(type(place) is list and len(place) == 2 for place in value):
        return False
    if not all(_INDEX(index) and _NUMBER(number) for index, number in value):
        return False
    return len({index for index, _ in value}) == len(value)


def _is_host(value: object) -> bool:
    """An IP address, without a scope."""
    if type(value) is not str or "%" in value:
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _are_counts(value: object) -> bool:
    """Bytes that wait to be written in each direction."""
    return type(value) is list and len(value) == 2 and all(map(_whole((1 << 31) - 1), value))


def _are_a_keepalive(value: object) -> bool:
    """Seconds of silence, seconds between two probes, and their number: as tcp(7) accepts them.

    None of them is 0, or the keeper would do nothing else; or all are 0: no probes.
    """
    if type(value) is not list or len(value) != 3 or not all(map(_whole(32767), value)):
        return False
    return value == [0, 0, 0] or (0 not in value and value[2] <= 127)


# The id of a pair or session: 0 is none, and the next daemon continues from the highest that it
# finds.
_NUMBER: Final = _from_one((1 << 63) - 1)
_INDEX: Final = _whole((1 << 32) - 2)
_SLOT: Final = _whole((1 << 32) - 2)
_ALWAYS: Final[Mapping[str, Callable[[object], bool]]] = {
    "do": lambda value: type(value) is str,
    "n": _whole((1 << 64) - 1),
    "until": _is_moment,
}


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of one kind of request, and the number of its sockets."""

    fields: Mapping[str, Callable[[object], bool]]
    sockets: int  # 0, or 2: the client's and the server's


REQUESTS: Final[Mapping[str, Request]] = {
    "clear": Request({}, 0),
    "worker_died": Request({}, 0),
    "adopt": Request({}, 0),
    "take_over": Request({"index": _INDEX}, 2),
    "join": Request(
        {
            "id": _NUMBER,
            "slot": _SLOT,
            "pending": _are_counts,
            "any_interface": _whole(1),
            "keepalive": _are_a_keepalive,
        },
        2,
    ),
    # For express: how the server of a pair that is copied is reached; and whether its upstream
    # names the address from which the worker has connected.
    "learn": Request({"has_source": _whole(1)}, 2),
    # Another pair may have the record by the time that the request is read: so it names the pair.
    "adopted": Request({"index": _INDEX, "id": _NUMBER, "slot": _SLOT}, 0),
    "mute": Request({"index": _INDEX, "id": _NUMBER}, 2),
    "narrow": Request({"index": _INDEX, "id": _NUMBER}, 0),
    "abort": Request({"index": _INDEX, "id": _NUMBER}, 0),
    "leave": Request({"index": _INDEX, "id": _NUMBER}, 2),
    "reset": Request({"index": _INDEX, "id": _NUMBER}, 2),
    # No operation: its answer tells about the requests before it (keeper_asker.py).
    "here": Request({}, 0),
    # UDP sessions; the sockets are the listener's and the one to the server.
    "open_session": Request(
        {
            "id": _NUMBER,
            "slot": _SLOT,
            "client": _is_host,
            "client_port": _whole(65535),
            "local": _is_host,
            "any_interface": _whole(1),
            "idle_s": _is_a_silence,
        },
        2,
    ),
    "close_sessions": Request({"places": _are_places}, 0),
    "adopt_session": Request({}, 0),
    "session_adopted": Request(
        {"index": _INDEX, "id": _NUMBER, "slot": _SLOT, "idle_s": _is_a_silence}, 0
    ),
}


def understand(data: bytes, sockets: int) -> dict[str, Any]:
    """Parse a request, with all of its fields and no others, each of its type and within its
    bounds.

    Raises:
        FaultyRequestError: it is not in the table.
    """
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise FaultyRequestError("no JSON") from error
    if type(request) is not dict:
        raise FaultyRequestError("a request is an object")
    do = request.get("do")
    kind = REQUESTS.get(do) if type(do) is str else None
    if kind is None:
        raise FaultyRequestError("a request of no kind")
    fields = {**_ALWAYS, **kind.fields}
    if request.keys() != fields.keys():
        raise FaultyRequestError(f"{do}: a field too many, or one is missing")
    for name, fits in fields.items():
        if not fits(request[name]):
            raise FaultyRequestError(f"{do}: {name}")
    if sockets != kind.sockets:
        raise FaultyRequestError(f"{do} with {counted(sockets, 'descriptor')}")
    return request
