"""What the keeper of spliced pairs understands, and that anything else is its sender's fault."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.splice.keeper_client import MOST_MESSAGE_BYTES
from pyforwarder.datapath.splice.keeper_requests import REQUESTS, FaultyRequestError, understand

GOOD: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "clear": ({}, 0),
    "worker_died": ({}, 0),
    "adopt": ({}, 0),
    "join": (
        {"id": 1, "slot": 0, "pending": [0, 5], "any_interface": 0, "keepalive": [60, 10, 3]},
        2,
    ),
    "learn": ({"has_source": 1}, 2),
    "here": ({}, 0),
    "adopted": ({"index": 0, "id": 5, "slot": 7}, 0),
    "mute": ({"index": 3, "id": 5}, 2),
    "narrow": ({"index": 3, "id": 5}, 0),
    "abort": ({"index": 3, "id": 5}, 0),
    "leave": ({"index": 3, "id": 5}, 2),
    "reset": ({"index": 3, "id": 5}, 2),
    "open_session": (
        {
            "id": 1,
            "slot": 0,
            "client": "2001:db8::1",
            "client_port": 53,
            "local": "192.0.2.1",
            "any_interface": 0,
            "idle_s": 120.0,
        },
        2,
    ),
    "close_sessions": ({"places": [[3, 1], [0, 7], [9, 1 << 40]]}, 0),
    "take_over": ({"index": 3}, 2),
    "adopt_session": ({}, 0),
    "session_adopted": ({"index": 3, "id": 5, "slot": 7, "idle_s": 1}, 0),
}
WRONG: Final[tuple[object, ...]] = (
    *(None, True, -1, 1.5, 1 << 64, "1", [], {}, [1, 2, 3, 4], [-1, 0], "\ud800"),
)
ALWAYS: Final = {"n": 1, "until": 0.5}


def words(**fields: object) -> bytes:
    return json.dumps({**ALWAYS, **fields}).encode()


def test_every_request_is_understood() -> None:
    assert GOOD.keys() == REQUESTS.keys()
    for do, (fields, sockets) in GOOD.items():
        assert understand(words(do=do, **fields), sockets) == {"do": do, **ALWAYS, **fields}


@pytest.mark.parametrize("do", GOOD)
def test_no_field_may_be_missing_or_more_or_of_another_kind(do: str) -> None:
    fields, sockets = GOOD[do]
    whole = {"do": do, **ALWAYS, **fields}
    bad: list[tuple[object, int]] = [(whole | {"more": 1}, sockets), (whole, sockets + 1)]
    if sockets:
        bad.append((whole, 0))
    for name in whole:
        bad.append(({key: value for key, value in whole.items() if key != name}, sockets))
        bad += [
            (whole | {name: value}, sockets)
            for value in WRONG
            if not (name == "until" and value in (1.5, 1 << 64))
            and not (name == "keepalive" and value == [1, 2, 3])
            and not (name == "idle_s" and value == 1.5)
        ]
    for request, count in bad:
        with pytest.raises(FaultyRequestError):
            understand(json.dumps(request).encode(), count)


@pytest.mark.parametrize(
    "wrong", [[60, 0, 3], [60, 10, 0], [0, 10, 3], [60, 10, 128], [40_000, 10, 3], [1, 1], [1] * 4]
)
def test_a_keepalive_that_would_keep_the_keeper_busy_is_a_fault(wrong: list[int]) -> None:
    fields, sockets = GOOD["join"]
    assert understand(words(do="join", **(fields | {"keepalive": [0, 0, 0]})), sockets)
    with pytest.raises(FaultyRequestError):
        understand(words(do="join", **(fields | {"keepalive": wrong})), sockets)


@pytest.mark.parametrize(
    "wrong",
    [
        *([], [1, 1], 3, [None], [[1]], [[1, 0]], [[-1, 1]], [[1, 2, 3]], [[1, True]]),
        *([[1, 7], [1, 8]], [[n, 1] for n in range(65)]),
    ],
)
def test_so_many_sessions_are_ended_at_once_and_each_of_them_once(wrong: object) -> None:
    longest = [[(1 << 32) - 2 - n, (1 << 63) - 1] for n in range(64)]
    request = words(do="close_sessions", places=longest)
    assert understand(request, 0)
    assert len(request) < MOST_MESSAGE_BYTES // 2
    with pytest.raises(FaultyRequestError):
        understand(words(do="close_sessions", places=wrong), 0)


@pytest.mark.parametrize("do", ["open_session", "session_adopted"])
@pytest.mark.parametrize("wrong", [0, -1, 366 * 86400 + 1, float("nan"), float("inf"), True, "60"])
def test_a_session_that_would_never_end_is_a_fault(do: str, wrong: object) -> None:
    fields, sockets = GOOD[do]
    assert understand(words(do=do, **(fields | {"idle_s": 0.25})), sockets)
    with pytest.raises(FaultyRequestError):
        understand(words(do=do, **(fields | {"idle_s": wrong})), sockets)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"5",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 8000,
        b'{"a":' * 1600,
        b'{"do":"mute","n":1,"until":1,"index":Infinity}',
        b'{"do":"mute","n":1,"until":NaN,"index":1}',
        b'{"do":"mute","n":1,"until":Infinity,"index":1}',
        b'{"do":"mute","n":1,"until":1,"index":' + b"9" * 8000 + b"}",
        b'{"do":["mute"],"n":1,"until":1,"index":1}',
    ],
)
def test_what_is_no_request_is_a_fault(data: bytes) -> None:
    for sockets in (0, 2):
        with pytest.raises(FaultyRequestError):
            understand(data, sockets)


@given(
    st.binary(max_size=64)
    | st.dictionaries(
        st.sampled_from(["do", "n", "until", "index", "slot", "pending", "id", "x"]),
        st.sampled_from([*GOOD, 0, 1, -1, 1 << 70, 0.5, None, True, [0, 0], {}]),
    ).map(lambda request: json.dumps(request).encode()),
    st.integers(0, 4),
)
def test_anything_is_understood_or_a_fault(data: bytes, sockets: int) -> None:
    with contextlib.suppress(FaultyRequestError):
        assert understand(data, sockets)["do"] in REQUESTS


@pytest.mark.parametrize("do", ["join", "open_session"])
def test_a_pair_has_a_number_that_others_can_be_counted_from(do: str) -> None:
    fields, sockets = GOOD[do]
    for number in (0, 1 << 63):
        with pytest.raises(FaultyRequestError):
            understand(words(do=do, **{**fields, "id": number}), sockets)
