"""Copies of the program whose records in maps are others: the texts to be changed are there."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.helpers.other_version import CANNOT_KEEP, OTHER_RECORDS, other_version


def test_both_kinds_can_be_made_and_are_what_runs(tmp_path: Path) -> None:
    words = other_version(tmp_path / "other", (*OTHER_RECORDS, *CANNOT_KEEP))
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert "pyforwarder" in done.stdout
