"""The parts of README and docs/ that come from the program are what the program says."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents.__main__ import ROOT, wanted
from documents.pages import PageError, made, missing
from documents.parts import PARTS
from documents.program import collected, first_paragraph
from pyforwarder.config import reference

DOCS = ROOT / "docs"


WANTED = wanted(ROOT)


@pytest.mark.parametrize("path", WANTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_made_is_up_to_date(path: Path) -> None:
    """`scripts/documents/run` writes it; scripts/check says so, too."""
    assert path.read_text() == WANTED[path]


def test_the_configuration_page_has_every_block() -> None:
    page = (DOCS / "configuration.md").read_text()
    for block in reference.blocks():
        assert any(f"<!-- made: keys {path or 'top'} -->" in page for path in block.paths)


def test_the_page_of_the_architecture_has_the_files_of_each_package() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    sources = ROOT / "pyforwarder"
    packages = {str(path.parent.relative_to(sources)) for path in sources.rglob("*.py")} - {"."}
    assert "<!-- made: files . -->" in page
    assert {one for one in packages if f"<!-- made: files {one} -->" not in page} == set()


def test_it_has_the_helpers_of_the_tests_and_the_scripts_too() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.is_file()]
    named = {str(path.parent.relative_to(ROOT)) for path in scripts if first_paragraph(path)}
    assert {
        one
        for one in named | {"tests/helpers", "status/page"}
        if f"<!-- made: files {one} -->" not in page
    } == set()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.py", '"""One\nline.\n\nMore."""\n', "One line."),
        ("a.c", "/*\n * One\n * line.\n *\n * More.\n */\nint a;\n", "One line."),
        ("a.c", "// SPDX-License-Identifier: MIT\n/*\n * Text.\n */\n", "Text."),
        ("a.js", "// One\n// line.\n\n// Not this.\n", "One line."),
        ("run", "#!/usr/bin/env bash\n# One\n# line.\n#\n# More.\n", "One line."),
        ("words", "# No script.\n", ""),
        ("a.json", "{}\n", ""),
    ],
)
def test_a_file_is_described_by_the_first_paragraph_at_its_top(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    assert first_paragraph(tmp_path / name) == said


def test_a_part_replaces_the_one_before_it_and_nothing_else() -> None:
    page = "a\n<!-- made: limits -->\nold\n<!-- /made -->\nb\n"
    assert made(made(page, "x"), "x") == made(page, "x")
    text = made(page, "x")
    assert text.startswith("a\n<!-- made: limits -->\n\n`pairs`")
    assert text.endswith("\n\n<!-- /made -->\nb\n")


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- made: limits -->\n", "has no <!-- /made -->"),
        ("<!-- made: limits -->\n<!-- made: kinds -->\n<!-- /made -->\n", "has no <!-- /made -->"),
        ("<!-- made: nothing -->\n<!-- /made -->\n", "no part is called 'nothing'"),
        ("<!-- made: keys nowhere -->\n<!-- /made -->\n", "keys has no 'nowhere'"),
    ],
)
def test_a_wrong_marker_is_named(page: str, complaint: str) -> None:
    with pytest.raises(PageError, match=f"^x.md: .*{complaint}"):
        made(page, "x.md")


def test_a_file_that_is_not_there_is_named() -> None:
    page = (
        "`core/reasons.py`, `scripts/documents/pages.py`, `core/nothing.py`, `/etc/nothing.yaml`, "
        "`scripts/check`, `sudo scripts/nothing --quick`, `worker/`, `worker/nothing/`, "
        "`ledger.py`, `nothing.h`, `10.0.0.0/8`, `BPFFS/NAME/splice`, `match/nothing`"
    )
    assert missing(page, ROOT) == [
        "core/nothing.py",
        "scripts/nothing",
        "worker/nothing/",
        "nothing.h",
    ]


def test_metrics_are_listed_with_their_labels() -> None:
    rows = PARTS["metrics"]("").splitlines()[2:]
    assert len(rows) == len(collected())
    assert (
        "| `pyforwarder_rule_taken_total` | counter | `listener`, `rule` | Connections that the "
        "rule gave a destination. |"
    ) in rows
