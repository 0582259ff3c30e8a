"""The log of a daemon in the background does not fill the memory that /run is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pyforwarder.supervisor.log_file import keep_small, open_log


def test_log_that_has_grown_too_large_begins_anew_for_all_its_writers(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = open_log(path)
    os.write(fd, b"first\n" * 100)
    keep_small(path, most_bytes=600)
    assert not (tmp_path / "log.1").exists()
    os.write(fd, b"second\n")
    keep_small(path, most_bytes=600)
    assert path.read_bytes() == b""
    assert (tmp_path / "log.1").read_bytes() == b"first\n" * 100 + b"second\n"
    os.write(fd, b"third\n")  # a worker, which knows of nothing
    assert path.read_bytes() == b"third\n"
    os.write(fd, b"fourth\n" * 100)
    keep_small(path, most_bytes=600)
    assert (tmp_path / "log.1").read_bytes() == b"third\n" + b"fourth\n" * 100
    for name in ("log", "log.1"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    os.close(fd)


def test_log_that_somebody_removed_stops_nothing(tmp_path: Path) -> None:
    keep_small(tmp_path / "log", most_bytes=0)
    path = tmp_path / "log"
    os.close(open_log(path))
    path.write_bytes(b"x" * 10)
    (tmp_path / "log.1").mkdir()
    keep_small(path, most_bytes=5)
    assert path.read_bytes() == b"x" * 10
