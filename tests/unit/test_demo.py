"""What `demo` makes of the pairs that it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pyforwarder.cli import demo
from pyforwarder.errors import ForwarderError
from tests.helpers.fake_control import PAIR

if TYPE_CHECKING:
    from pyforwarder.client import PairRow


def looks(*datapaths: str) -> Callable[[], list[PairRow]]:
    """What is seen by one look after the other, and by all after the last."""
    left = list(datapaths)

    def look() -> list[PairRow]:
        seen = left.pop(0) if len(left) > 1 else left[0]
        return [{**PAIR, "datapath": word, "reason": "because"} for word in seen.split()]  # type: ignore[typeddict-item]

    return look


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_LOOK_AGAIN_S", 0.0)


def test_pairs_that_are_being_handed_over_are_waited_for() -> None:
    rows = demo._once_they_are_on("splice", looks("- - -", "splice copy -", "splice splice splice"))
    assert [row["datapath"] for row in rows] == ["splice"] * 3
    demo._check_datapath(rows, "splice")


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ("splice copy", "pairs went by copy: because"),
        ("splice -", "a pair was on no datapath after 0 s"),
    ],
)
def test_pairs_that_never_get_there_are_told_of(
    monkeypatch: pytest.MonkeyPatch, seen: str, words: str
) -> None:
    monkeypatch.setattr(demo, "_HANDOVER_S", 0.0)
    rows = demo._once_they_are_on("splice", looks(seen))
    with pytest.raises(ForwarderError, match=words):
        demo._check_datapath(rows, "splice")
