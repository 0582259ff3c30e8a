"""A Debian package of a wheel, with the Python packages that it needs, by dpkg-deb alone."""

from __future__ import annotations

import gzip
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

import pyforwarder

ROOT: Final = Path(__file__).parents[2]
PACKAGING: Final = ROOT / "packaging"
# Below the root of the installed system.
HOME: Final = Path("usr/lib/pyforwarder")
_PYTHON: Final = "/usr/bin/python3"
_PROGRAM: Final = f"""\
#!/{HOME}/bin/python
import sys
from pyforwarder.cli import main
sys.exit(main())
"""
_MAINTAINER: Final = "The pyforwarder maintainers"
_SCRIPTS: Final = ("postinst", "prerm", "postrm")


def build(wheel: Path, directory: Path) -> Path:
    """Make the package of `wheel` in `directory`; returns its path.

    Raises:
        subprocess.CalledProcessError: dpkg-deb, pip or venv has failed.
        importlib.metadata.PackageNotFoundError: a package that the wheel needs is not installed.
    """
    machine = _said_by("dpkg", "--print-architecture")
    path = directory / f"pyforwarder_{pyforwarder.__version__}_{machine}.deb"
    with tempfile.TemporaryDirectory(prefix="pyforwarder-deb-") as work:
        tree = Path(work) / "tree"
        from_distribution = _put_program(wheel, tree)
        _put_files(tree)
        _put_control(tree, machine, from_distribution)
        subprocess.run(
            ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z6", tree, path],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path


def needed(name: str) -> list[importlib.metadata.Distribution]:
    """The packages that this one needs here, and those that they need, without itself."""
    found: dict[str, importlib.metadata.Distribution] = {}
    asked = [name]
    while asked:
        for text in importlib.metadata.requires(asked.pop()) or ():
            wanted = Requirement(text)
            key = wanted.name.lower()
            if key in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            found[key] = importlib.metadata.distribution(wanted.name)
            asked.append(wanted.name)
    return [found[key] for key in sorted(found)]


def _put_program(wheel: Path, tree: Path) -> list[str]:
    """A virtual environment with the wheel and what it needs, and the program.

    Returns the packages of the distribution that have the rest of what it needs.
    """
    others = []
    home = tree / HOME
    subprocess.run(
        [_PYTHON, "-I", "-m", "venv", "--without-pip", "--system-site-packages", home], check=True
    )
    for path in (home / "bin").glob("[aA]ctivate*"):  # they name the directory they were made in
        path.unlink()
    settings = home / "pyvenv.cfg"
    kept = [line for line in settings.read_text().splitlines() if not line.startswith("command")]
    settings.write_text("\n".join(kept) + "\n")
    (site,) = home.glob("lib/python3*/site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"),
            *("--no-index", "--no-deps", "--no-compile", "--target", site, wheel.absolute()),
        ],
        check=True,
    )
    shutil.rmtree(site / "bin", ignore_errors=True)
    ours = Path(sysconfig.get_path("purelib"))
    for package in needed("pyforwarder"):
        metadata = Path(str(package.locate_file(f"{_info(package)}/METADATA")))
        if metadata.is_relative_to(ours):
            _copy(package, site)
        else:
            others.append(_said_by("dpkg-query", "--search", metadata).partition(":")[0])
    program = tree / "usr" / "bin" / "pyforwarder"
    program.parent.mkdir(parents=True)
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    return others


def _info(package: importlib.metadata.Distribution) -> str:
    """The name of the directory with its metadata."""
    names = {name.parts[0] for name in package.files or () if name.name == "METADATA"}
    return next(name for name in names if name.endswith(".dist-info"))


def _copy(package: importlib.metadata.Distribution, site: Path) -> None:
    """The files of an installed package, without its commands."""
    for name in package.files or ():
        source = Path(str(package.locate_file(name)))
        if ".." in name.parts or name.suffix == ".pyc" or not source.is_file():
            continue
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _put_files(tree: Path) -> None:
    """Units, manual pages, completions, configuration and documents."""
    units = tree / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for path in (PACKAGING / "systemd").glob("pyforwarder@.*"):
        text = path.read_text().replace("/usr/local/bin/pyforwarder", "/usr/bin/pyforwarder")
        (units / path.name).write_text(text)
    _put(
        PACKAGING / "systemd/pyforwarder.sysusers.conf",
        tree / "usr/lib/sysusers.d/pyforwarder.conf",
    )
    _put(PACKAGING / "default.yaml", tree / "etc/pyforwarder/default.yaml")
    subprocess.run(
        [sys.executable, "-m", "pyforwarder.cli.manual", tree / "usr/share"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for page in (tree / "usr/share/man").rglob("*.[15]"):
        _compress(page.read_text(), page.with_name(f"{page.name}.gz"))
        page.unlink()
    documents = tree / "usr/share/doc/pyforwarder"
    _put(ROOT / "LICENSE", documents / "copyright")
    _put(ROOT / "README.md", documents / "README.md")
    shutil.copytree(ROOT / "docs", documents / "docs")
    shutil.copytree(ROOT / "examples", documents / "examples")
    _compress((ROOT / "CHANGELOG.md").read_text(), documents / "changelog.gz")


def _put_control(tree: Path, machine: str, from_distribution: list[str]) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    following = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
    depends = [f"python3 (>= {version})", f"python3 (<< {following})", *from_distribution]
    kilobytes = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file()) >> 10
    control = tree / "DEBIAN"
    control.mkdir()
    summary = importlib.metadata.metadata("pyforwarder")["Summary"]
    (control / "control").write_text(
        f"Package: pyforwarder\nVersion: {pyforwarder.__version__}\nArchitecture: {machine}\n"
        f"Maintainer: {_MAINTAINER}\nSection: net\nPriority: optional\n"
        f"Installed-Size: {kilobytes}\n"
        f"Depends: {', '.join(depends)}\n"
        "Recommends: python3-bpfcc\n"
        f"Description: {summary}\n"
        " Clients are told apart by the first bytes that they send; the kernel moves the rest,\n"
        " by eBPF. Without bcc (python3-bpfcc) bytes are copied in userspace.\n"
    )
    (control / "conffiles").write_text("/etc/pyforwarder/default.yaml\n")
    for name in _SCRIPTS:
        _put(PACKAGING / "debian" / name, control / name)
        (control / name).chmod(0o755)


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _compress(text: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without the time of day: the same sources make the same bytes.
    target.write_bytes(gzip.compress(text.encode(), mtime=0))


def _said_by(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
