"""What the unprivileged processes may say to the supervisor: one table, and nothing else.

They read what strangers send, so they may be taken over, and then their messages are a stranger's.
Each is compared with this table before anything is done with it. One that is not in the table is
its sender's fault in every case, and never ours: see `FaultyMessageError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pyforwarder.core.wording import counted

# The longest message is the answer to `flush --all`: the ids of all pairs of a worker.
MOST_BYTES: Final = 16 << 20
_MOST_PAIRS: Final = 1 << 20
_MOST_FLUSHED: Final = 10_000
_MOST_CLAIMED: Final = 256
_MOST_SHOWN: Final = 200

Number = Annotated[int, Field(ge=0, lt=1 << 64)]
Name = Annotated[str, Field(max_length=1024)]
Words = Annotated[str, Field(max_length=64 * 1024)]


class FaultyMessageError(Exception):
    """What another process said is not in the table."""


class _Message(BaseModel):
    """A record without conversion of types (1 is no True, "1" no number) and with no field too
    many.
    """

    # Made ready when one is first heard, which most never are: 10 ms less of a start.
    model_config = ConfigDict(defer_build=True, strict=True, extra="forbid", frozen=True)


class Ask(_Message):
    """A worker wants something done to the one socket that comes with it; see `workers.grant`."""

    ask: Literal["enlarge", "transparent"]
    number: Number  # enlarge: by how many bytes; transparent: comes back with the answer


class Answer(_Message):
    """A worker's result for request `n`; what it may be depends on the request."""

    n: Number
    result: Any


class RefusalMessage(_Message):
    """Why a worker did not do what request `n` said."""

    n: Number
    error: Words


class TokenClaim(_Message):
    """A worker wants a token used up in the fleet; its digest, and until when it may be good."""

    claim: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    until: Annotated[int, Field(ge=0, lt=10**13)]
    number: Number  # comes back with the answer


class TokensClaimed(_Message):
    """The numbers of claims that were the first ones, of those that were not, and of others."""

    claimed: Annotated[list[Number], Field(max_length=_MOST_CLAIMED)]
    used: Annotated[list[Number], Field(max_length=_MOST_CLAIMED)]
    unknown: Annotated[list[Number], Field(max_length=_MOST_CLAIMED)]


class HealthMessage(_Message):
    """A server went up or down (`health_checker.HealthResult`)."""

    upstream: Name
    server: Name
    up: bool
    why: Words


class ChecksDone(_Message):
    """All servers that are to be checked have been checked once more; counted from the process's
    start.
    """

    rounds: Number


class FleetView(_Message):
    """What is in a fleet's store (`fleet.layout`): an edition, and servers' weights."""

    serial: Annotated[int, Field(ge=0, lt=100_000_000)]
    text: Annotated[str, Field(max_length=1 << 20)]
    servers: dict[Name, dict[Name, Annotated[int, Field(ge=0, le=256)]]]
    faults: Annotated[list[Words], Field(max_length=16)]


class FleetInstance(_Message):
    """A machine of the fleet, by what it says of itself (`fleet.layout.instances_in`)."""

    instance: Annotated[str, Field(max_length=128)]
    version: Annotated[str, Field(max_length=64)]
    serial: Number
    refused: Number
    pairs: Number
    accepted: Number
    datapaths: Annotated[list[Annotated[str, Field(max_length=32)]], Field(max_length=16)]
    unavailable: Annotated[
        dict[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=128)]],
        Field(max_length=16),
    ]
    started: Annotated[str, Field(max_length=64)]
    why: Annotated[str, Field(max_length=256)]


class FleetInstances(_Message):
    """All machines of the fleet."""

    instances: Annotated[list[FleetInstance], Field(max_length=256)]


class FleetStore(_Message):
    """Whether a fleet's store can be reached, and where, or why not."""

    store: Literal["connected", "lost"]
    endpoint: Words


class StoreAnswered(_Message):
    """A fleet's store has answered, so long ago; how many values there were of no use so far."""

    answered_ago_ms: Annotated[int, Field(ge=0, lt=10**9)]
    unusable: Number


class FleetStates(_Message):
    """What a fleet says of servers (`fleet.health`): "up" or "down" and why; whom we check."""

    states: dict[Name, dict[Name, Annotated[str, Field(max_length=512, pattern=r"^(up|down) .*$")]]]
    check: dict[Name, list[Name]]
    # Servers that this machine does not check, with the machine that does.
    others: dict[Name, dict[Name, Annotated[str, Field(max_length=64)]]] = {}
    turn: Number  # comes back with what is found by these checks


class Overwritten(_Message):
    """Another machine writes at our key in a fleet's store."""

    overwritten: Words


class FleetFaults(_Message):
    """What stands at keys of a fleet's store that does not belong there."""

    faults: Annotated[list[Words], Field(max_length=16)]


class Taken(_Message):
    """Pairs of another machine are these workers' now, which are to adopt them."""

    waiting: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], Field(max_length=256)]
    taken: Number  # pairs, since the keeper has begun


class Replicas(_Message):
    """How the pairs in a fleet's store fare."""

    replicas: Literal["connected", "lost"]
    error: Words
    own: Number
    held: Number


class MoveAsked(_Message):
    """Another machine wants this one to take the fleet's addresses (`mover: command`)."""

    move_from: Annotated[str, Field(max_length=128)]


class ServerReport(_Message):
    """What one worker knows of one server."""

    state: Annotated[str, Field(max_length=32, pattern=r"^[a-z_ -]+$")]
    pairs: Number
    connects: Number
    failures: Number


class Flush(_Message):
    """A viewer of the status page wants pairs to be reset; `user` is who it says that it is."""

    n: Number
    flush: Annotated[list[Number], Field(min_length=1, max_length=_MOST_FLUSHED)]
    user: Annotated[str, Field(max_length=63)]


class SetServer(_Message):
    """A viewer of the status page wants a server to get no new pairs, or some again."""

    n: Number
    server: Name  # UPSTREAM/ADDRESS
    state: Literal["drain", "ready"]
    user: Annotated[str, Field(max_length=63)]


# What comes from where, by the field that only this kind has; how many descriptors go with it.
Messages = dict[str, tuple[type[_Message], int]]

FROM_WORKER: Final[Messages] = {
    "ask": (Ask, 1),
    "result": (Answer, 0),
    "error": (RefusalMessage, 0),
    "claim": (TokenClaim, 0),
}
FROM_PAGE: Final[Messages] = {
    "flush": (Flush, 0),
    "state": (SetServer, 0),
}
FROM_CHECKER: Final[Messages] = {
    "why": (HealthMessage, 0),
    "rounds": (ChecksDone, 0),
}
FROM_FLEET: Final[Messages] = {
    "servers": (FleetView, 0),
    "store": (FleetStore, 0),
    "instances": (FleetInstances, 0),
    "overwritten": (Overwritten, 0),
    "answered_ago_ms": (StoreAnswered, 0),
}
FROM_FAILOVER: Final[Messages] = {
    "waiting": (Taken, 0),
    "replicas": (Replicas, 0),
    "move_from": (MoveAsked, 0),
    "answered_ago_ms": (StoreAnswered, 0),
}

FROM_TOKENS: Final[Messages] = {
    "claimed": (TokensClaimed, 0),
    "store": (FleetStore, 0),
    "answered_ago_ms": (StoreAnswered, 0),
}

FROM_HEALTH: Final[Messages] = {
    "states": (FleetStates, 0),
    "overwritten": (Overwritten, 0),
    "store": (FleetStore, 0),
    "answered_ago_ms": (StoreAnswered, 0),
}

FROM_LIMITS: Final[Messages] = {
    "faults": (FleetFaults, 0),
    "overwritten": (Overwritten, 0),
    "store": (FleetStore, 0),
    "answered_ago_ms": (StoreAnswered, 0),
}

# The result of each request.
_NOTHING: Final[TypeAdapter[Any]] = TypeAdapter(None)
RESULTS: Final[dict[str, TypeAdapter[Any]]] = {
    **dict.fromkeys(
        (
            *("sockets", "settings", "drain", "stop", "health", "datapaths", "retire"),
            *("take_over", "adopt"),
        ),
        _NOTHING,
    ),
    "spliced_left": TypeAdapter(Number),
    "flush": TypeAdapter(Annotated[list[Number], Field(max_length=_MOST_PAIRS)]),
    "pair_with": TypeAdapter(Number | None),
    "join": TypeAdapter(Number),
    "upstreams": TypeAdapter(dict[Name, dict[Name, ServerReport]]),
}


def understand(message: object, fds: Sequence[int], table: Messages) -> _Message:
    """The message as the table has it.

    Raises:
        FaultyMessageError: it is not there.
    """
    if not isinstance(message, dict):
        raise FaultyMessageError("a message is an object")
    kinds = [kind for kind in table if kind in message]
    if len(kinds) != 1:
        raise FaultyMessageError("a message of no kind")
    model, descriptors = table[kinds[0]]
    if len(fds) != descriptors:
        raise FaultyMessageError(f"{counted(len(fds), 'descriptor')} with {kinds[0]!r}")
    try:
        return model.model_validate(message)
    except (ValidationError, RecursionError) as error:
        raise FaultyMessageError(_short(error)) from None


def understand_result(do: str, result: object) -> Any:
    """The result of a request in plain values.

    Raises:
        FaultyMessageError: it is none for this request.
    """
    try:
        return RESULTS[do].dump_python(RESULTS[do].validate_python(result, strict=True))
    except (ValidationError, RecursionError) as error:
        raise FaultyMessageError(f"the result of {do}: {_short(error)}") from None


def _short(error: Exception) -> str:
    """What a log may say of it: nothing that the sender could make long or write itself."""
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:32] for part in first["loc"][:4])
    return f"{where}: {first['msg']}"[:_MOST_SHOWN]
