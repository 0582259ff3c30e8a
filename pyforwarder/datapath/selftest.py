from __future__ import annotations

from typing import NamedTuple


class Proof(NamedTuple):
    passed: bool
    reason: str


def prove(maps: object, user: str | None) -> Proof:
    return Proof(True, "")
