"""The locks name every package that is installed, in one version, with the hashes of its files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "packaging" / "locks"
NAMES = ("build", "run", "test")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN = PROJECT["project"]["dependencies"]
BUILD = [*PROJECT["build-system"]["requires"], "editables~=0.3"]
EXTRAS = [word for extra in PROJECT["project"]["optional-dependencies"].values() for word in extra]
# What is asked for, for each of the locks.
WANTED = {"build": BUILD, "run": RUN, "test": [*BUILD, *RUN, *EXTRAS]}


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Of each package the line and its hashes."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    text = (LOCKS / f"{name}.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        parsed = Requirement(requirement)
        found[canonicalize_name(parsed.name)] = (parsed, hashes)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    for parsed, hashes in locked(name).values():
        (version,) = parsed.specifier
        assert version.operator == "==", parsed
        assert hashes, parsed
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), parsed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_what_the_project_asks_for_is_locked_for_each_python(name: str, python: str) -> None:
    """If not: scripts/lock."""
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    packages = locked(name)
    for wanted in map(Requirement, WANTED[name]):
        line, _ = packages[canonicalize_name(wanted.name)]
        assert line.marker is None or line.marker.evaluate(here), line
        (version,) = line.specifier
        assert wanted.specifier.contains(Version(version.version)), (wanted, line)


def test_what_runs_and_what_builds_is_tested_in_the_same_versions() -> None:
    tested = locked("test")
    for name in ("build", "run"):
        for package, line in locked(name).items():
            assert tested[package] == line


@pytest.mark.parametrize("name", NAMES)
def test_no_lock_says_where_packages_are(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    assert "://" not in text
