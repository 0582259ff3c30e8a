"""The manual page and the completions say what the command line has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from pyforwarder.cli import manual
from pyforwarder.cli.command import root
from pyforwarder.cli.roff import escape
from pyforwarder.runtime.slowness import scaled_s

# The requests that the page may use; any other line with a dot in front would be text gone astray.
_REQUESTS = {"TH", "SH", "SS", "PP", "TP", "B", "nf", "fi"}


def _plain(roff: str) -> str:
    return roff.replace(r"\-", "-").replace(r"\&", "").replace(r"\e", "\\")


def test_every_command_and_every_option_has_a_place_in_the_page() -> None:
    page = _plain(manual.manual_page(root))
    for name, command in root.commands.items():
        assert f'\n.SS "{name}"\n' in page
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[-1] in page


def test_examples_are_in_the_page() -> None:
    page = _plain(manual.manual_page(root))
    inner = [group.commands for group in root.commands.values() if isinstance(group, click.Group)]
    assert page.count("Example:") == len(root.commands) + sum(map(len, inner))
    assert r"pyforwarder fleet rollback" in page


def test_the_page_has_no_request_that_came_from_text() -> None:
    for line in manual.manual_page(root).splitlines():
        if line.startswith((".", "'")):
            request = re.match(r"\.([A-Za-z]+)", line)
            assert request is not None
            assert request[1] in _REQUESTS


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a-b", r"a\-b"),
        (".so /etc/passwd", r"\&.so /etc/passwd"),
        ("one\n'two", "one\n\\&'two"),
        (r"C:\n", r"C:\en"),
    ],
)
def test_text_is_escaped_for_roff(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_all_files_are_written_below_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manual.main([str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 5
    assert all(path.is_relative_to(tmp_path) and path.stat().st_size > 100 for path in written)


def test_bash_reads_its_completion(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(manual.completion(root, "bash"), encoding="utf-8")
    shell = subprocess.run(
        ["bash", "-ec", f"source {script}; complete -p pyforwarder"],
        capture_output=True,
        text=True,
        timeout=scaled_s(10),
        check=True,
    )
    assert shell.stdout.strip().endswith("pyforwarder")


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(ValueError, match="no completion for tcsh"):
        manual.completion(root, "tcsh")
