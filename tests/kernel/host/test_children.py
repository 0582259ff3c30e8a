"""A daemon that is started from a directory, and with an environment, of somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil
import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND, START_DEADLINE_S, Daemon, Place
from tests.helpers.peers import EchoServer, dial_through, read_exactly
from tests.helpers.waiting import wait_for

CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: named, match: instruction, allow: [loopback]}]
upstreams:
  checked: {servers: [127.0.0.1:9], health: {interval: 60s}}
metrics: {bind: 127.0.0.1:0}
"""


@pytest.mark.parametrize("command", [COMMAND, (sys.executable, "-m", "pyforwarder")])
def test_root_runs_nothing_from_the_directory_that_it_happens_to_be_in(
    place: Place, tmp_path: Path, command: tuple[str, ...]
) -> None:
    mark = tmp_path / "MARK"
    for name in ("bcc", "json", "socket", "prometheus_client", "sitecustomize"):
        if name == "json" and len(command) > 1:
            continue  # `python -m` itself has imported it before any of our code runs
        if name == "socket" and len(command) > 1:
            continue
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    done = subprocess.run(
        [*command, "doctor"],
        cwd=tmp_path,
        env={**place.environ(), "TMPDIR": str(tmp_path)},
        capture_output=True,
        timeout=scaled_s(50),  # it proves every datapath
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"sockmap" in done.stdout
    assert not mark.exists()
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "__pycache__"] == [".py"] * (
        len([*tmp_path.glob("*.py")])
    )


def is_away(child: psutil.Process) -> bool:
    """Whether it has left the caller's directory and umask; one that has ended has."""
    try:
        status = Path(f"/proc/{child.pid}/status").read_text()
        return child.cwd() == "/" and "\nUmask:\t0077\n" in status
    except (FileNotFoundError, psutil.NoSuchProcess):
        return True


def test_relative_paths_mean_the_caller_s_directory_and_no_process_stays_there(
    place: Place,
) -> None:
    home = place.run_dir.parent
    (home / "my.yaml").write_text(CONFIG)
    environ = {
        **place.environ(),
        "PYFORWARDER_RUN_DIR": place.run_dir.name,
        "PYFORWARDER_BPFFS": place.bpffs.name,
        "TMPDIR": str(home),
    }
    process = subprocess.Popen(
        [*COMMAND, "up", "-c", "my.yaml"],
        cwd=home,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    daemon = Daemon(place, process, "default", home / "my.yaml")
    daemon.collect()
    try:
        daemon.wait_for_line("listening on", deadline_s=START_DEADLINE_S)
        up = psutil.Process(process.pid)
        # Those without privilege: the workers, metrics and health. Each begins as root.
        wanted = (os.cpu_count() or 1) + 2
        wait_for(lambda: len(daemon.workers()) == wanted, f"{wanted} processes without privilege")
        # One that serves the page is replaced about now: it leaves the caller's as it begins.
        wait_for(lambda: all(map(is_away, up.children())), "all are away")
        assert up.cwd() == "/"
        daemon.reconfigure(CONFIG.replace("name: named", "name: renamed"))
        assert daemon.command("reload").returncode == 0
        assert [rule["rule"] for rule in daemon.show("rules")] == ["renamed"]
        with EchoServer() as server:
            sock = dial_through(daemon.address, server.address)
            with sock:
                sock.sendall(b"hello")
                assert read_exactly(sock, 5) == b"hello"
        # An error names the file as its user did.
        daemon.reconfigure("listeners: 5")
        assert daemon.command("reload").stderr.startswith("pyforwarder: my.yaml, line 1, ")
        assert daemon.stop() == 0
    finally:
        process.kill()  # its workers, keeper and others end with it
        daemon.close()
