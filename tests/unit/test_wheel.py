"""The wheel, built and installed somewhere else, is a whole pyforwarder."""

from __future__ import annotations

import email
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
        "from pyforwarder.datapath.ebpf.loading import bpf_directory; print(bpf_directory())",
        cwd=tmp_path,
    )
    directory = Path(found.strip())
    assert directory.is_relative_to(installed.parents[1])
    assert _digests(directory) == _digests(ROOT / "bpf")


def test_wheel_and_sdist_bring_the_page(installed: Path, built: Path, tmp_path: Path) -> None:
    found = run(
        *(installed.parent / "python", "-c"),
        "from pyforwarder.status.site import read_files; print(*sorted(read_files()))",
        cwd=tmp_path,
    )
    page = ROOT / "pyforwarder" / "status" / "page"
    names = {path.name for path in page.iterdir()}
    assert set(found.split()) == {"/", *(f"/{name}" for name in names - {"index.html"})}
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {f"pyforwarder/status/page/{name}" for name in names} <= packed


def test_the_wheel_makes_its_manual(installed: Path, tmp_path: Path) -> None:
    run(installed.parent / "python", "-m", "pyforwarder.cli.manual", tmp_path, cwd=tmp_path)
    assert (tmp_path / "man" / "man1" / "pyforwarder.1").is_file()


def test_the_wheel_holds_the_license_and_nothing_but_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"pyforwarder-{pyforwarder.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"pyforwarder", info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_metadata_is_what_an_index_shows(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Author"] == "The pyforwarder maintainers"
    assert metadata["License-Expression"] == "MIT AND (MIT OR GPL-2.0-only)"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).lstrip().startswith("# pyforwarder\n")
    versions = {line.rpartition(" ")[2] for line in metadata.get_all("Classifier", [])}
    assert {"3.11", "3.13", "3.14"} <= versions


def test_the_sdist_can_be_built_and_tested(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "CHANGELOG.md", "bpf/abi.h", "scripts/test"} <= names
    assert {"pyforwarder/__init__.py", "tests/conftest.py", "packaging/default.yaml"} <= names
