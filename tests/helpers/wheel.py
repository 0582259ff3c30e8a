"""The wheel, built from the checkout and installed somewhere else, without a network."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

from pyforwarder.runtime.slowness import scaled_s

ROOT: Final = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=scaled_s(120), check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build(directory: Path) -> Path:
    """Make wheel and sdist in `directory`; returns the wheel."""
    run(sys.executable, "-m", "hatchling", "build", "-d", directory, cwd=ROOT)
    (wheel,) = directory.glob("*.whl")
    return wheel


def install(wheel: Path, home: Path, *, bcc: bool = True, plain: bool = False) -> Path:
    """Install it into a fresh virtual environment at `home`; returns its `bin`.

    The environment sees the distribution's packages (without bcc, if asked; not as a `plain` one,
    which is what `python3 -m venv` makes by default). The other packages
    are borrowed from the environment that runs the tests, because there may be no network;
    pyforwarder itself comes from the wheel.
    """
    base = Path(sys.base_prefix) / "bin" / "python3"
    options = ["--without-pip"] if plain else ["--without-pip", "--system-site-packages"]
    run(base, "-m", "venv", *options, home, cwd=wheel.parent)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"),
        *("install", "--no-index", "--no-deps", wheel),
        cwd=wheel.parent,
    )
    (site,) = home.glob("lib/python3*/site-packages")
    # A line that begins with `import` is executed at start: None makes every import of it fail.
    hide = "" if bcc else "import sys; sys.modules['bcc'] = None\n"
    (site / "borrowed.pth").write_text(f"{hide}{sysconfig.get_path('purelib')}\n")
    return home / "bin"
