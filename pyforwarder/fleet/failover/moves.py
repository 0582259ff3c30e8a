"""A planned move: one machine asks another to take the addresses, and gives them up once it has.

The question is a key in the store, named after the machine that is asked. That machine says there
that it begins before it does, and the one that asks takes its question back only if nobody has
begun: so it always knows whether the other may have the addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from pyforwarder.errors import ForwarderError
from pyforwarder.fleet.failover.record import tag_of
from pyforwarder.fleet.layout import Name, Value, ValueFault

if TYPE_CHECKING:
    from pyforwarder.fleet.layout import Keys
    from pyforwarder.fleet.store import Store

# A question that nobody takes back is gone after that; longer than anybody waits.
_LEASE_S: Final = 60
_LOOK_S: Final = 0.05


class Move(Value):
    """What stands at the key: which machine asks which one, and how far it is."""

    by: Name
    to: Name
    state: Literal["asked", "begun", "done", "failed"] = "asked"
    why: Annotated[str, Field(max_length=512)] = ""


class MoveError(ForwarderError):
    """The other machine has not taken the addresses, or perhaps it has; the text says which."""


def ask(
    store: Store,
    keys: Keys,
    by: str,
    to: str,
    *,
    answer_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Have `to` take the addresses; when this returns it has them, and has announced them.

    Raises:
        MoveError: it has not, or it may have.
        StoreError: the store does not answer; if it was asked before, that is a MoveError.
    """
    key = keys.move(tag_of(to))
    found = store.get(key)
    if found is not None and _state(found[0]) in ("asked", "begun"):
        raise MoveError(f"another move to {to!r} is under way; its question is gone in a minute")
    question = Move(by=by, to=to).encode()
    lease = store.grant(_LEASE_S)
    if not store.change(key, question, was=found[1] if found else 0, lease=lease):
        raise MoveError(f"another move to {to!r} has begun just now")
    until_s = clock() + answer_s
    while clock() < until_s:
        found = store.get(key)
        if found is None:
            break
        state = _state(found[0])
        if state == "done":
            store.revoke(lease)
            return
        if state == "failed":
            store.revoke(lease)
            raise MoveError(f"{to!r} cannot take them: {Move.decode(found[0]).why}")
        sleep(_LOOK_S)
    over = Move(by=by, to=to, state="failed", why="taken back").encode()
    found = store.get(key)
    if found is None or (
        _state(found[0]) == "asked" and store.change(key, over, was=found[1], lease=lease)
    ):
        store.revoke(lease)
        raise MoveError(
            f"{to!r} does not answer: does it run, with `mover: command` and this store?"
        )
    found = store.get(key)
    if found is not None and _state(found[0]) == "done":
        return
    raise MoveError(
        f"{to!r} has begun to take the addresses, and has not said that it has them: look there; "
        "this machine keeps them"
    )


def _state(value: bytes) -> str:
    try:
        return Move.decode(value).state
    except ValueFault:
        return ""


class Asked:
    """The side that is asked; used by the process that watches the store."""

    def __init__(self, store: Store, keys: Keys, tag: str, lease: Callable[[], int]) -> None:
        """`tag` is this machine's; `lease` is the one of its keys."""
        self._store = store
        self._key = keys.move(tag)
        self._lease = lease
        self._revision = 0
        self._move: Move | None = None

    def begin(self) -> str:
        """The machine that asks us, which is answered by `end`; empty: none.

        Raises:
            StoreError: it cannot be said that we begin; so we do not.
        """
        found = self._store.get(self._key)
        if found is None:
            return ""
        try:
            move = Move.decode(found[0])
        except ValueFault:
            return ""
        if move.state != "asked":
            return ""
        begun = move.model_copy(update={"state": "begun"})
        if not self._store.change(self._key, begun.encode(), was=found[1], lease=self._lease()):
            return ""  # it was taken back
        self._move = begun
        return move.by

    def end(self, why: str) -> None:
        """We have the addresses; or we do not, and why.

        Raises:
            StoreError: it could not be said; say it again.
        """
        if self._move is None:
            return
        state = "failed" if why else "done"
        answer = self._move.model_copy(update={"state": state, "why": why[:512]})
        self._store.put(self._key, answer.encode(), lease=self._lease())
        self._move = None
