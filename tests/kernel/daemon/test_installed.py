"""The wheel forwards, outside the checkout, with bcc and where there is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.daemon import COMMAND
from tests.helpers.peers import pair_through, pattern, read_exactly
from tests.helpers.wheel import build, install, run

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

CONFIG = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
handover: {after_bytes: 0}
"""


# The first of its kind makes an environment, beside others on this host.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def without_bcc(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("without") / "venv", bcc=False)


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("plain") / "venv", plain=True)


def start_installed(start_forwarder: StartForwarder, programs: Path, *words: str) -> Daemon:
    """`up` by the installed program in place of ours, away from the checkout."""
    own = f'cd / && shift {len(COMMAND)} && exec "$0" "$@"'
    instead = ["bash", "-c", own, str(programs / "pyforwarder")]
    return start_forwarder(CONFIG, *words, prefix=instead)


def carry_by(forwarder: Daemon, datapath: str) -> None:
    """Bytes of a pair are moved, and it comes to be on that datapath."""
    with pair_through(forwarder.address) as (client, server):
        client.sendall(pattern(100_003))
        assert read_exactly(server, 100_003) == pattern(100_003)
        forwarder.wait_for_pair(
            lambda row: (row["state"], row["datapath"]) == ("joined", datapath),
            f"a pair on {datapath}",
        )


def program_file(forwarder: Daemon) -> Path:
    """Which Python runs it, by its first argument."""
    words = Path(f"/proc/{forwarder.process.pid}/cmdline").read_bytes().split(b"\0")
    return Path(os.fsdecode(words[0]))


def test_an_installed_wheel_forwards_in_the_kernel(
    wheel: Path, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    programs = install(wheel, tmp_path / "venv")
    forwarder = start_installed(start_forwarder, programs)
    assert program_file(forwarder) == programs / "python"
    carry_by(forwarder, "splice")


def test_without_bcc_it_forwards_in_userspace(
    without_bcc: Path, start_forwarder: StartForwarder
) -> None:
    forwarder = start_installed(start_forwarder, without_bcc, "--datapath", "copy")
    carry_by(forwarder, "copy")


def test_without_bcc_doctor_names_the_packages_and_warns_of_the_other_bcc(
    without_bcc: Path, tmp_path: Path
) -> None:
    said = run(without_bcc / "pyforwarder", "doctor", cwd=tmp_path)
    assert "bcc is not installed" in said
    assert "python3-bpfcc" in said
    assert "PyPI's package `bcc` is another project" in said
    assert "Traceback" not in said


def test_environment_that_cannot_see_the_hosts_bcc_is_told_so(plain: Path, tmp_path: Path) -> None:
    said = run(plain / "pyforwarder", "doctor", cwd=tmp_path)
    assert "bcc is installed at /usr/lib/python3/dist-packages/bcc" in said
    assert "--system-site-packages" in said
    assert str(plain.parent / "pyvenv.cfg") in said
    assert "Traceback" not in said


def test_environment_that_was_mended_as_told_sees_bcc(
    plain: Path, start_forwarder: StartForwarder
) -> None:
    settings = plain.parent / "pyvenv.cfg"
    before = settings.read_text()
    settings.write_text(
        before.replace(
            "include-system-site-packages = false", "include-system-site-packages = true"
        )
    )
    try:
        forwarder = start_installed(start_forwarder, plain)
        carry_by(forwarder, "splice")
    finally:
        settings.write_text(before)
