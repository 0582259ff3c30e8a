"""Builds and runs the load generator, `load.c` (its first lines say why it is C)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from pyforwarder.runtime.children import surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCE: Final = Path(__file__).with_name("load.c")
# Over every deadline inside the generator, which names what went wrong when it ends by itself.
PATIENCE_S: Final = 90.0

Numbers = dict[str, float]


class LoadError(Exception):
    """A run that gave no numbers: a connection broke, bytes were lost, nothing listened."""


def build(directory: Path) -> Path:
    """Compile the generator into `directory` and return the program's path.

    Raises:
        LoadError: no C compiler, or it failed.
    """
    program = directory / "load"
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise LoadError("no C compiler: install gcc and libc6-dev")
    done = subprocess.run(
        [compiler, "-O2", "-std=gnu11", "-Wall", "-pthread", "-o", str(program), str(SOURCE)],
        check=False,
        capture_output=True,
        text=True,
        **surroundings(),
    )
    if done.returncode:
        raise LoadError(f"{compiler} failed:\n{done.stderr.strip()}")
    return program


def _parse(line: str, errors: str) -> Numbers:
    if not line:
        raise LoadError(errors.strip().removeprefix("load: ") or "ended without a word")
    report = json.loads(line)
    return {str(key): float(value) for key, value in report.items()}


class Session:
    """A run that stops between its reports, so that the caller can look at the machine.

    Every report is followed by `go_on`, the last by `finish`.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._errors = errors

    def report(self) -> Numbers:
        """The next report, once it comes.

        Raises:
            LoadError: the generator gave up; the text says why.
        """
        line = self._stdout.readline()
        if line:
            return _parse(line, "")
        return _parse("", self._words())

    def _words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def go_on(self) -> None:
        """Let the run continue after a report."""
        # Past Python's buffer: what a broken pipe left there would be raised again at the end.
        with contextlib.suppress(BrokenPipeError):  # it gave up: the next `report` says why
            os.write(self._stdin.fileno(), b"\n")

    def finish(self) -> None:
        """Let the run close its connections, and wait for its end.

        Raises:
            LoadError: a connection did not end as it should, or the run does not end.
        """
        self.go_on()
        try:
            status = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise LoadError("the connections do not end") from error
        if status:
            _parse("", self._words())


class Load:
    """The generator, with what every run of one target has in common."""

    def __init__(self, program: Path, common: Mapping[str, object]) -> None:
        self._program = program
        self._common = dict(common)

    def _arguments(self, mode: str, options: Mapping[str, object]) -> list[str]:
        merged = {**self._common, **options}
        texts = (
            f"{key}={int(value) if isinstance(value, bool) else value}"
            for key, value in merged.items()
        )
        return [str(self._program), mode, *texts]

    def run(self, mode: str, **options: object) -> Numbers:
        """One run from begin to end, and its report.

        Raises:
            LoadError: it gave no numbers; the text says why.
        """
        try:
            done = subprocess.run(
                self._arguments(mode, options),
                check=False,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=PATIENCE_S,
                **surroundings(),
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{mode} did not end within {PATIENCE_S:.0f} s") from error
        # a report that was followed by a failure is none
        return _parse(done.stdout if done.returncode == 0 else "", done.stderr)

    @contextlib.contextmanager
    def session(self, directory: Path, mode: str, **options: object) -> Iterator[Session]:
        """A run in steps; ends with the block, killed if it has not ended by then."""
        with (
            (directory / "load.errors").open("w+", encoding="utf-8") as errors,
            subprocess.Popen(
                self._arguments(mode, options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                **surroundings(),
            ) as process,
        ):
            try:
                yield Session(process, errors)
            finally:
                process.kill()


@contextlib.contextmanager
def soakers(program: Path, directory: Path) -> Iterator[Path]:
    """Idle-priority loops on every CPU while the block runs; yields the file with their counts.

    What they do not get is what everything else used, interrupts included.
    """
    path = directory / "soakers"
    load = Load(program, {})
    with load.session(directory, "soak", soak_file=path) as session:
        session.report()
        yield path
