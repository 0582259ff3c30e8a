"""The alert rules: judged by Prometheus's own tool, and of metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.forwarder_memory import Forwarder

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
RULES = ROOT / "packaging/prometheus/pyforwarder.rules.yml"
CASES = ROOT / "tests/data/alerts.yml"


def promtool(words: Sequence[str], where: Path) -> str:
    """What it says; it must be content."""
    done = subprocess.run(
        ["promtool", *words],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_are_rules() -> None:
    assert "14 rules found" in promtool(["check", "rules", str(RULES)], ROOT)


def test_alerts_come_when_they_should_and_only_then(tmp_path: Path) -> None:
    for path in (RULES, CASES):
        shutil.copy(path, tmp_path)
    assert "SUCCESS" in promtool(["test", "rules", CASES.name], tmp_path)


def test_every_alert_has_a_case_and_a_silent_one() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    silent, wrong = yaml.safe_load(CASES.read_text())["tests"]
    names = [rule["alert"] for rule in rules]
    assert [case["alertname"] for case in silent["alert_rule_test"]] == names
    assert [case["alertname"] for case in wrong["alert_rule_test"]] == names
    assert all(case["exp_alerts"] for case in wrong["alert_rule_test"])


@pytest.mark.parametrize("path", [RULES, CASES], ids=["rules", "cases"])
def test_rules_ask_for_metrics_and_labels_that_there_are(path: Path) -> None:
    known = Forwarder().labels()
    for line in path.read_text().splitlines():
        names = re.findall(r"pyforwarder_\w+", line)
        assert set(names) <= set(known), line
        labels = set(re.findall(r'(\w+)(?:=~?|!=)"', line))
        for name in names:
            assert labels <= known[name] | {"le"}, line
