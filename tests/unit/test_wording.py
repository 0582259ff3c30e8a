"""Counts in sentences, and that no message for people has one with a plural at 1."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyforwarder
from pyforwarder.core.wording import counted

# A count that is put in front of a fixed plural, which may stand so if it is never 1.
COUNT = re.compile(
    r"""\{(?:len\(\w+\)|(?:\w+\.)?(?:count|left|stay|pairs|sessions)\w*)\} [a-z ]*[a-z]s\b"""
)
NEVER_ONE = {
    "{count} addresses": "said where they are more than a bound",
    "{len(taken)} addresses": "likewise",
    "{count} ports": "a block of them",
    "{pairs} slots for pairs": "a table of them",
    "{len(NAMES)} daemons before this one have pins": "a constant",
    "{len(data)} bytes": "a self-test's own",
    "{len(got)} bytes": "likewise",
    "{len(sent)} bytes": "likewise",
}


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 pairs"), (1, "1 pair"), (2, "2 pairs"), (1_000, "1000 pairs")]
)
def test_a_count_of_one_has_no_plural(count: int, said: str) -> None:
    assert counted(count, "pair") == said


def test_no_count_stands_before_a_fixed_plural() -> None:
    found = {
        match[0]
        for path in Path(pyforwarder.__file__).parent.rglob("*.py")
        for match in COUNT.finditer(path.read_text())
    }
    assert found == set(NEVER_ONE)
