"""README says what the program does: the picture, the configuration, the names of the commands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from pyforwarder.cli.command import root
from pyforwarder.config import parse_config
from pyforwarder.connection import diagram
from pyforwarder.reasons import CloseReason

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks() -> list[str]:
    """Every indented block, without its indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found]


def test_the_life_of_a_connection_is_the_table() -> None:
    shown = README.partition("<!-- life -->\n")[2].partition("<!-- /life -->")[0]
    assert textwrap.dedent(shown).strip() == diagram()


def test_the_configuration_reference_is_a_configuration() -> None:
    (reference,) = [block for block in blocks() if "handover: {" in block]
    config = parse_config(
        reference.replace("tokens: {keys: {ops: /etc/pyforwarder/ops.key}}", ""),
        source="README.md",
    )
    assert [listener.name for listener in config.listeners] == ["main"]
    assert set(config.upstreams) == {"web"}


def test_the_example_of_upstreams_is_a_configuration() -> None:
    (example,) = [block for block in blocks() if "slow_start" in block]
    assert len(parse_config(example, source="README.md").upstreams["web"].servers) == 3


@pytest.mark.parametrize("reason", CloseReason)
def test_every_reason_of_an_end_is_named(reason: CloseReason) -> None:
    listed = README.partition("Reasons of an end")[2].partition("`.")[0]
    assert re.search(rf"\b{reason.value}\b", listed)


@pytest.mark.parametrize(
    "word", sorted(set(re.findall(r"pyforwarder ([a-z]+)(?= |$)", README, re.MULTILINE)))
)
def test_commands_in_examples_exist(word: str) -> None:
    assert word in root.commands or word == "default"  # the name of an instance, in `top`
