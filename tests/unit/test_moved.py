"""Modules that moved are still found by the names that they had in version 0.1."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from pyforwarder._moved import MOVES


@pytest.mark.parametrize("old", [*MOVES, "pyforwarder.core.first_packet.tls"])
def test_both_names_lead_to_one_module(old: str) -> None:
    new = MOVES.get(old, old)
    if old not in MOVES:
        old = old.replace(".core", "")
    program = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        f"assert old is new and new.__spec__.name == {new!r}\n"
        f"assert str(told[-1].message) == {f'{old} is {new} now'!r}, told\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pyforwarder.nothing")


def test_the_splice_datapath_is_found_where_its_module_was() -> None:
    splice = importlib.import_module("pyforwarder.datapath.splice")
    module = importlib.import_module("pyforwarder.datapath.splice.datapath")
    assert splice.SpliceDatapath is module.SpliceDatapath
