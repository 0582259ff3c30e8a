"""Build all of it into one directory."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from release import debian

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/release/run", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "dist")
    directory: Path = parser.parse_args(arguments).directory
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        print(f"scripts/release/run: {directory} is not empty", file=sys.stderr)
        return 1
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", directory.absolute()],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = directory.glob("*.whl")
    debian.build(wheel, directory)
    for path in sorted(directory.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
