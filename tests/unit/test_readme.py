"""README and the pages in docs/ say what the program does: configurations, commands, names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import pyforwarder
from pyforwarder.cli.command import Call, root
from pyforwarder.config import load_config, parse_config
from pyforwarder.config.warnings import config_warnings
from pyforwarder.core.reasons import CloseReason, RefusalCode
from pyforwarder.runtime.environment import Environment
from tests.helpers.documents import (
    EXAMPLES,
    PAGES,
    PLAYED,
    ROOT,
    TESTED_ELSEWHERE,
    Block,
    blocks,
    commands,
    with_files,
)

README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()


def anchors(page: Path) -> set[str]:
    """What a link to a page may name behind `#`, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_configuration_is_one(block: Block, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    file = tmp_path / "main.yaml"
    file.write_text(with_files(block.text, tmp_path))
    config = load_config(file)
    assert config.listeners or config.fleet  # whose listeners are in its store


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.parent.name))
def test_every_example_is_a_configuration_without_a_warning(path: Path, tmp_path: Path) -> None:
    text = with_files(path.read_text(), tmp_path)
    config = parse_config(text, source=str(path))
    assert config_warnings(config, text, source=str(path)) == []


@pytest.mark.parametrize(
    "rule",
    sorted(
        {
            rule
            for page in PAGES
            for rule in re.findall(r"`(\{match: [^`]*\})`", page.read_text())
            if "..." not in rule and "HOST" not in rule
        }
    ),
)
def test_every_rule_in_a_sentence_is_one(rule: str) -> None:
    upstreams = ", ".join(f"{name}: {{servers: [10.0.0.1:1]}}" for name in ("web", "ssh", "http"))
    text = f"listeners: [{{bind: 127.0.0.1:1, rules: [{rule}]}}]\nupstreams: {{{upstreams}}}\n"
    assert len(parse_config(text, source=rule).listeners[0].rules) == 1


def test_each_recipe_of_readme_has_an_example() -> None:
    recipes = README.partition("## Five recipes")[2].partition("\n## ")[0]
    assert recipes.count("```yaml") == len(EXAMPLES) == 5


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("line", commands())
def test_every_command_is_played_or_tested_elsewhere(line: str) -> None:
    """A new one needs a line in tests/helpers/documents.py."""
    assert (line in PLAYED) != (line in TESTED_ELSEWHERE)
    if line in TESTED_ELSEWHERE:
        text = (ROOT / TESTED_ELSEWHERE[line]).read_text()
        said = re.search(r"(?:pyforwarder|scripts/run) ([a-z]+)", line)
        assert said is None or said[1] in text


def test_every_line_of_the_tables_of_commands_is_in_a_page() -> None:
    assert {*PLAYED, *TESTED_ELSEWHERE} == set(commands())


@pytest.mark.parametrize(
    "line", [line for line in commands() if re.search(r"\b(pyforwarder|scripts/run) [a-z]", line)]
)
def test_options_of_commands_are_those_of_the_program(line: str) -> None:
    if "ProxyCommand='" in line:
        line = line.partition("ProxyCommand='")[2].partition("'")[0]
    said = re.search(r"(?:pyforwarder|scripts/run) ([a-z].*)", line)
    assert said is not None
    name, *words = shlex.split(said[1])
    command = root.commands[name]
    with click.Context(root, obj=Call(Environment.of_process())) as parent:
        try:
            command.make_context(name, words, parent=parent)
        except click.BadParameter as error:
            assert "does not exist" in error.message  # noqa: PT017 - a file of the reader's


@pytest.mark.parametrize("line", [line for line in commands() if "scripts/" in line])
def test_scripts_exist(line: str) -> None:
    said = re.search(r"(?<!/)\bscripts/[\w/]+", line)
    assert said is not None
    path = ROOT / said[0]
    assert path.is_file()
    assert path.stat().st_mode & 0o111


# ---------------------------------------------------------------------- names


def test_every_reason_has_a_row_of_what_to_do() -> None:
    table = OPERATING.partition("## Troubleshooting by reason")[2].partition("\nOther lines")[0]
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", table, re.MULTILINE)
    assert rows == [reason.value for reason in CloseReason]


def test_every_code_of_a_refusal_is_explained() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text().partition("## The instruction")[2]
    table = page.partition("| Code | Why |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == [code.value for code in RefusalCode]


def test_every_variable_of_the_environment_is_explained() -> None:
    package = Path(pyforwarder.__file__).parent
    texts = [path.read_text() for path in package.rglob("*.py")]
    used = {name for text in texts for name in re.findall(r'"(PYFORWARDER_[A-Z_]+[A-Z])"', text)}
    rows = set(re.findall(r"^\| `(PYFORWARDER_\w+)` \|", OPERATING, re.MULTILINE))
    assert rows == used - {"PYFORWARDER_COMPLETE"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("word", sorted(set(re.findall(r"`pyforwarder ([a-z]+)[` ]", README))))
def test_commands_in_sentences_exist(word: str) -> None:
    assert word in root.commands


def test_readme_leads_to_every_page() -> None:
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md", "SECURITY.md"}
    pages.remove("examples/README.md")  # by its directory
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_readme_s_client_of_the_bastion_fits_the_example() -> None:
    """The file and the command go together: both name the same gateway."""
    example = (ROOT / "examples" / "bastion" / "pyforwarder.yaml").read_text()
    audience = re.search(r"^  audience: (\S+)$", example, re.MULTILINE)
    assert audience is not None
    (recipe,) = [
        block
        for block in blocks("yaml")
        if "token: required" in block.text and block.page == "README.md"
    ]
    assert f"audience: {audience[1]}}}" in recipe.text
    (command,) = [line for line in commands() if line.startswith("ssh ") and "--key" in line]
    assert f"--aud {audience[1]}'" in command
    assert command in (ROOT / "examples" / "README.md").read_text()
