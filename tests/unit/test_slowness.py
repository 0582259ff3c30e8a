"""One factor for the deadlines that stand for this host's speed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyforwarder.errors import ConfigError
from pyforwarder.runtime import slowness

COMMAND = str(Path(sys.executable).with_name("pyforwarder"))


@pytest.mark.parametrize(("text", "value"), [("", 1.0), ("1", 1.0), ("2.5", 2.5), ("100", 100.0)])
def test_the_factor_is_what_the_variable_says(text: str, value: float) -> None:
    assert slowness.factor({slowness.VARIABLE: text}) == value


def test_without_the_variable_the_factor_is_one() -> None:
    assert slowness.factor({}) == 1.0


@pytest.mark.parametrize("text", ["0", "0.9", "-4", "101", "inf", "nan", "four", "4x"])
def test_anything_else_is_an_error_that_names_the_variable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^PYFORWARDER_SLOWNESS: .* no number from 1 to 100$"):
        slowness.factor({slowness.VARIABLE: text})


def test_a_deadline_is_scaled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slowness.VARIABLE, "4")
    assert slowness.scaled_s(15.0) == 60.0


@pytest.mark.parametrize(("now", "advised"), [("1", "4"), ("4", "16"), ("50", "100")])
def test_the_advice_is_a_value_that_waits_longer(
    now: str, advised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(slowness.VARIABLE, now)
    assert f"PYFORWARDER_SLOWNESS={advised} " in slowness.advice()


def test_a_command_refuses_a_wrong_value_before_it_does_anything() -> None:
    done = subprocess.run(
        [COMMAND, "show"],
        capture_output=True,
        text=True,
        timeout=slowness.scaled_s(30),
        check=False,
        env={slowness.VARIABLE: "quick"},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "pyforwarder: PYFORWARDER_SLOWNESS: 'quick' is no number from 1 to 100\n"
    )
    assert done.stdout == ""
