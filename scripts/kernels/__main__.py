"""The command line: boot guests, side by side, and report what each can do."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from kernels import guests, images, machine, report

if TYPE_CHECKING:
    from kernels.guests import Guest

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = images.ROOT / "docs" / "datapaths.md"
# Of all tests, and of those that failed and were run once more.
_RESULTS: Final = ("tests.xml", "tests.xml.again")
_SAYING = threading.Lock()


def _say(*lines: str) -> None:
    with _SAYING:
        click.echo("\n".join(lines))


def _end(*_: object) -> None:
    machine.end_all()
    sys.exit(143)


def _arguments(guest: Guest, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """What pytest gets."""
    if chosen:
        return chosen
    left_out = (word for name in guest.left_out for word in ("--deselect", name))
    return (*guest.tests, *guests.NO_KERNEL, *left_out)


def _examine(
    guest: Guest, chosen: tuple[str, ...], output: Path, timeout_s: float, slowness: str
) -> report.Outcome:
    begun_s = time.monotonic()
    home = output / guest.name.replace("/", "+")
    home.mkdir(parents=True, exist_ok=True)
    for name in ("facts", "doctor.json", "status", "kernel.log", *_RESULTS):
        (home / name).unlink(missing_ok=True)
    package, code, ended = guest.package, None, ""
    try:
        kernel, root = images.kernel_for(guest), images.root_for(guest.suite)
        package = kernel.package
        begun_s = time.monotonic()
        job = (
            f"export PYFORWARDER_SLOWNESS={shlex.quote(slowness)}\n"
            f"exec bash scripts/kernels/guest/job {shlex.join(_arguments(guest, chosen))}\n"
        )
        with (home / "console.log").open("wb") as console:
            done = machine.boot(
                kernel,
                root,
                job,
                command_line=guest.command_line,
                console=console,
                out=home,
                timeout_s=timeout_s,
            )
        code, ended = done.code, done.why
    except images.BuildError as error:
        ended = str(error)
    facts = dict(
        line.split(" ", 1) for line in (_text(home / "facts") or "").splitlines() if " " in line
    )
    doctor_said = _text(home / "doctor.json")
    outcome = report.judge(
        guest,
        package=package,
        facts=facts,
        said=json.loads(doctor_said) if doctor_said else None,
        tests_xml=[text for name in _RESULTS if (text := _text(home / name))],
        kernel_log=_text(home / "kernel.log"),
        ended=ended,
        code=code,
        seconds=time.monotonic() - begun_s,
    )
    said = (_text(home / "console.log") or "").replace("\r", "").splitlines()
    shown = said[-80:] if not outcome.is_good else [x for x in said if x.startswith("FLAKY: ")]
    _say(f"== {guest.name}", *shown, outcome.line())
    return outcome


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _shell(guest: Guest) -> int:
    """A shell in the guest, on this terminal."""
    kernel, root = images.kernel_for(guest), images.root_for(guest.suite)
    done = machine.boot(
        kernel,
        root,
        "exec bash -i\n",
        command_line=guest.command_line,
        console=None,
        out=images.ROOT / "build/kernels/shell",
        timeout_s=24 * 3600.0,
    )
    return 1 if done.code is None else 0


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n"
    "  sudo scripts/kernels/run\n"
    "  sudo scripts/kernels/run 6.1 -- tests/kernel/daemon/test_pins.py -x\n"
    "  sudo scripts/kernels/run --shell bookworm-backports/linux-image-cloud-amd64",
)
@click.argument("names", nargs=-1, metavar="[NAME ...] [-- PYTEST ARGUMENT ...]")
@click.option("--shell", is_flag=True, help="A shell in the guest instead of tests.")
@click.option("--images", "only_images", is_flag=True, help="Only build what would be booted.")
@click.option(
    "--record", is_flag=True, help="Keep the results, and renew the table in docs/datapaths.md."
)
@click.option(
    "--lanes",
    type=click.IntRange(1),
    default=max(1, min(2, os.cpu_count() or 1)),
    show_default=True,
    help="So many guests run side by side; each takes one processor.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=1500.0,
    show_default=True,
    help="Seconds after which a guest is ended.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=images.ROOT / "build/kernels",
    help="Directory for consoles and results.  [default: build/kernels]",
)
@click.option("--slowness", default="6", show_default=True, help="PYFORWARDER_SLOWNESS inside.")
def main(
    names: tuple[str, ...],
    shell: bool,
    only_images: bool,
    record: bool,
    lanes: int,
    timeout_s: float,
    output: Path,
    slowness: str,
) -> None:
    """Boot kernels in qemu (no KVM needed) and run this checkout's tests inside.

    NAME is one of 6.1, 6.12, backports, lockdown, or RELEASE/PACKAGE[=VERSION], such as
    bookworm/linux-image-amd64; without one it is all four. Behind -- come arguments for pytest
    instead of the tests that a guest has by default. Exits with 1 if a guest is not as expected.
    """
    if os.geteuid() != 0:
        raise click.ClickException("needs root: it makes images of whole systems")
    # A run that is told to end still ends its guests and removes what it has not finished.
    signal.signal(signal.SIGTERM, _end)
    split = next((n for n, word in enumerate(names) if word.startswith(("-", "tests/"))), None)
    asked, chosen = (names, ()) if split is None else (names[:split], names[split:])
    try:
        wanted = [guests.named(name) for name in asked] or list(guests.ALL)
    except guests.UnknownGuestError as error:
        raise click.BadParameter(str(error)) from error
    if record and (asked or chosen):
        raise click.UsageError("--record is for a run of all guests with their own tests")
    try:
        if shell:
            sys.exit(_shell(wanted[0]))
        if only_images:
            for guest in wanted:
                images.kernel_for(guest)
                images.root_for(guest.suite)
            return
    except images.BuildError as error:
        raise click.ClickException(str(error)) from error
    pool = ThreadPoolExecutor(lanes)
    try:
        outcomes = list(
            pool.map(lambda guest: _examine(guest, chosen, output, timeout_s, slowness), wanted)
        )
    finally:  # where it is told to end, those that have not begun must not
        pool.shutdown(cancel_futures=True)
    (output / "results.json").write_text(report.to_json(outcomes), encoding="utf-8")
    _say("", *(outcome.line() for outcome in outcomes))
    if not all(outcome.is_good for outcome in outcomes):
        sys.exit(1)
    if record:
        RESULTS.write_text(report.to_json(outcomes), encoding="utf-8")
        made = report.table(outcomes)
        PAGE.write_text(report.put_table(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
