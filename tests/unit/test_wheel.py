"""The wheel, built and installed somewhere else, is a whole pyforwarder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

import pyforwarder

ROOT: Final = Path(__file__).parents[2]


def _run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist, made without a network."""
    directory = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-d", directory, cwd=ROOT)
    return directory


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, in a fresh virtual environment that sees the distribution's packages.

    The other packages are borrowed from the environment that runs the tests, because there may be
    no network; pyforwarder itself comes from the wheel.
    """
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    base = Path(sys.base_prefix) / "bin" / "python3"
    _run(
        *(base, "-m", "venv", "--system-site-packages", "--without-pip", home),
        cwd=home.parent,
    )
    (wheel,) = built.glob("*.whl")
    _run(
        *(sys.executable, "-m", "pip", "--python", home / "bin" / "python"),
        *("--disable-pip-version-check", "install", "--no-index", "--no-deps", wheel),
        cwd=home.parent,
    )
    (site,) = home.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "pyforwarder"


def test_the_program_of_the_wheel_runs_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    where = _run(
        *(installed.parent / "python", "-c", "import pyforwarder; print(pyforwarder.__file__)"),
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert _run(installed, "--version", cwd=tmp_path) == f"pyforwarder {pyforwarder.__version__}\n"
    assert "Usage: pyforwarder" in _run(installed, "--help", cwd=tmp_path)


def test_the_wheel_brings_every_bpf_source(installed: Path, tmp_path: Path) -> None:
    found = _run(
        *(installed.parent / "python", "-c"),
        "from pyforwarder.datapath.loading import bpf_directory; print(bpf_directory())",
        cwd=tmp_path,
    )
    directory = Path(found.strip())
    assert directory.is_relative_to(installed.parents[1])
    assert _digests(directory) == _digests(ROOT / "bpf")


def test_the_wheel_makes_its_manual(installed: Path, tmp_path: Path) -> None:
    _run(installed.parent / "python", "-m", "pyforwarder.manual", tmp_path, cwd=tmp_path)
    assert (tmp_path / "man" / "man1" / "pyforwarder.1").is_file()


def test_the_wheel_holds_the_license_and_nothing_but_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"pyforwarder-{pyforwarder.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"pyforwarder", info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_sdist_can_be_built_and_tested(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "CHANGELOG.md", "bpf/abi.h", "scripts/test"} <= names
    assert {"pyforwarder/__init__.py", "tests/conftest.py", "packaging/default.yaml"} <= names
