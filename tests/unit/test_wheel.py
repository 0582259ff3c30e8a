"""The wheel, built and installed somewhere else, is a whole pyforwarder."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyforwarder
from tests.helpers.wheel import ROOT, build, install, run


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist."""
    return build(tmp_path_factory.mktemp("dist")).parent


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, installed outside the checkout."""
    (wheel,) = built.glob("*.whl")
    return install(wheel, tmp_path_factory.mktemp("elsewhere") / "venv") / "pyforwarder"


def test_the_program_of_the_wheel_runs_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    where = run(
        *(installed.parent / "python", "-c", "import pyforwarder; print(pyforwarder.__file__)"),
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert run(installed, "--version", cwd=tmp_path) == f"pyforwarder {pyforwarder.__version__}\n"
    assert "Usage: pyforwarder" in run(installed, "--help", cwd=tmp_path)


def test_the_wheel_brings_every_bpf_source(installed: Path, tmp_path: Path) -> None:
    found = run(
        *(installed.parent / "python", "-c"),
        "from pyforwarder.datapath.loading import bpf_directory; print(bpf_directory())",
        cwd=tmp_path,
    )
    directory = Path(found.strip())
    assert directory.is_relative_to(installed.parents[1])
    assert _digests(directory) == _digests(ROOT / "bpf")


def test_the_wheel_makes_its_manual(installed: Path, tmp_path: Path) -> None:
    run(installed.parent / "python", "-m", "pyforwarder.manual", tmp_path, cwd=tmp_path)
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
