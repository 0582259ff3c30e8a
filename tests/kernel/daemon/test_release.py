"""The Debian package is installed into a root of its own, works there, and goes without a trace."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from pyforwarder import __version__
from pyforwarder.runtime.slowness import scaled_s
from release import debian
from release.__main__ import main
from tests.helpers.wheel import run


def dpkg(root: Path, *words: str | Path) -> None:
    """dpkg, with the scripts of the package on this host but told of the root (DPKG_ROOT)."""
    subprocess.run(
        ["dpkg", f"--root={root}", "--force-script-chrootless", "--force-depends", *words],
        check=True,
        capture_output=True,
        timeout=scaled_s(50),
    )


def files(root: Path) -> set[str]:
    """Every file and link, but for dpkg's own."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not path.is_relative_to(root / "var/lib/dpkg")
    }


@pytest.mark.timeout(180)  # it builds all that is released
def test_the_package_installs_runs_and_goes(tmp_path: Path) -> None:
    dist, root = tmp_path / "dist", tmp_path / "root"
    assert main([str(dist)]) == 0
    assert {path.suffix for path in dist.iterdir()} == {".whl", ".gz", ".deb"}
    (package,) = dist.glob("*.deb")
    (root / "var/lib/dpkg/updates").mkdir(parents=True)
    (root / "var/lib/dpkg/info").mkdir()
    (root / "var/lib/dpkg/status").touch()

    dpkg(root, "--install", package)
    assert {
        *("usr/bin/pyforwarder", "etc/pyforwarder/default.yaml"),
        *("usr/lib/systemd/system/pyforwarder@.service", "usr/lib/sysusers.d/pyforwarder.conf"),
        *("usr/share/man/man1/pyforwarder.1.gz", "usr/share/man/man5/pyforwarder.yaml.5.gz"),
        "usr/share/doc/pyforwarder/copyright",
    } <= files(root)
    unit = (root / "usr/lib/systemd/system/pyforwarder@.service").read_text()
    assert "ExecStart=/usr/bin/pyforwarder up" in unit
    assert (
        (root / "usr/bin/pyforwarder").read_text().startswith("#!/usr/lib/pyforwarder/bin/python\n")
    )
    python = root / debian.HOME / "bin/python"
    where = run(python, "-c", "import pyforwarder, pydantic; print(pydantic.__file__)", cwd=root)
    assert Path(where.strip()).is_relative_to(root)
    said = run(python, root / "usr/bin/pyforwarder", "--version", cwd=root)
    assert said == f"pyforwarder {__version__}\n"
    config = root / "etc/pyforwarder/default.yaml"
    assert ": ok, 1 listener" in run(
        python, root / "usr/bin/pyforwarder", "check", config, cwd=root
    )

    dpkg(root, "--purge", "pyforwarder")
    assert files(root) == set()


def test_a_package_has_what_its_program_needs_and_no_linters() -> None:
    names = {package.metadata["Name"].lower() for package in debian.needed("pyforwarder")}
    direct = {"click", "google-re2", "pydantic", "pyyaml", "rich"}
    below = {"pydantic-core", "pydantic_core", "pygments"}
    assert direct <= names
    assert names & below
    assert not names & {"ruff", "mypy", "pytest", "pyforwarder"}
    assert all(importlib.metadata.version(name) for name in names)
