"""`demo` as a newcomer runs it: it ends well and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from pyforwarder.runtime.slowness import scaled_s


def processes_below(directory: Path) -> list[str]:
    """Command lines of the processes that work with files below `directory`."""
    return [
        " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in word for word in process.info["cmdline"] or [])
    ]


def test_demo_shows_every_datapath_and_leaves_nothing_behind(tmp_path: Path) -> None:
    bpffs = Path("/sys/fs/bpf")
    pins_before = sorted(bpffs.rglob("demo-*"))
    done = subprocess.run(
        [sys.executable, "-m", "pyforwarder", "demo"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=scaled_s(50),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = done.stdout.rpartition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in summary] == [
        "DATAPATH",
        "direct",
        "copy",
        "sockmap",
        "splice",
    ]
    # direct and copy work wherever there is TCP
    for line in summary[1:3]:
        assert int(line.split()[1]) > 0
        assert "8 MiB verified" in line
    assert list(tmp_path.iterdir()) == []
    assert processes_below(tmp_path) == []
    assert sorted(bpffs.rglob("demo-*")) == pins_before
