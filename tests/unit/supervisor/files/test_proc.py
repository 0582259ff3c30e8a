"""The pseudo-/proc: what a write asks the daemon for, and what a bad one leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.errors import ControlError
from pyforwarder.supervisor.files.proc import ProcDirectory
from tests.helpers.pseudo import loop_with_sigio, shell

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

UNIX_TIME_S = 1_700_000_000.5
WHEN = "2023-11-14T22:13:20Z"


@dataclass
class FakeDaemon:
    """Remembers what it was asked; pairs 1, 2 and 3 are there."""

    directory: Path
    port: int = 9999
    requests: list[dict[str, Any]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    proc: ProcDirectory | None = None

    def obey(self, request: dict[str, Any], fds: list[int]) -> object:
        assert fds == []
        if request == {"do": "listen_port"}:
            return {"port": self.port}
        self.requests.append(request)
        match request["do"]:
            case "listen_port":
                if request["port"] == "80":
                    raise ControlError("cannot listen on 127.0.0.1:80: Address already in use")
                self.port = int(request["port"])
                assert self.proc is not None
                self.proc.port_changed()
                return {"port": self.port}
            case "flush":
                unknown = [n for n in request.get("ids", []) if n > 3]
                return {"flushed": [], "unknown": unknown}
            case _:
                return {"id": 4}

    def asked(self) -> None:
        if self.proc is not None:
            self.proc.asked()

    def open(self, loop: Loop, pins: Path | None) -> ProcDirectory:
        self.proc = ProcDirectory(
            loop,
            self.directory,
            obey=self.obey,
            unix_time_s=lambda: UNIX_TIME_S,
            refused=lambda name, reason: self.refused.append((name, reason)),
            pins=pins,
            render={name: lambda name=name: f"{name}\n" for name in ("show", "stats", "listeners")},  # type: ignore[misc]
        )
        return self.proc


@pytest.fixture
def daemon(tmp_path: Path) -> FakeDaemon:
    return FakeDaemon(tmp_path / "proc")


@pytest.fixture
def loop(daemon: FakeDaemon) -> Iterator[Loop]:
    with loop_with_sigio(daemon.asked) as loop:
        proc = daemon.open(loop, None)
        yield loop
        proc.close()
        assert not daemon.directory.exists()


def test_listen_port_moves_the_listener(daemon: FakeDaemon, loop: Loop) -> None:
    said = shell(
        loop, daemon.directory, "cat listen_port; echo 9000 > listen_port; cat listen_port errors"
    )
    assert said == "9999\n9000\n"
    assert daemon.requests == [{"do": "listen_port", "port": "9000"}]


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("all", {"do": "flush", "all": True}),
        ("1", {"do": "flush", "ids": [1]}),
        ("1 2\\n3", {"do": "flush", "ids": [1, 2, 3]}),
    ],
)
def test_flush_asks_for_ids_or_all(
    daemon: FakeDaemon, loop: Loop, text: str, request_: dict[str, Any]
) -> None:
    assert shell(loop, daemon.directory, f"printf '{text}\\n' > flush; cat errors") == ""
    assert daemon.requests == [request_]


def test_forward_asks_for_two_descriptors(daemon: FakeDaemon, loop: Loop) -> None:
    assert shell(loop, daemon.directory, "echo 4242 7 9 > forward; cat errors") == ""
    assert daemon.requests == [{"do": "forward", "pid": 4242, "fds": [7, 9]}]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("flush", "banana", "'banana': ids wanted, or all"),
        ("flush", "1 banana", "'1 banana': ids wanted, or all"),
        ("flush", "all 1", "'all 1': ids wanted, or all"),
        ("flush", "-1", "'-1': ids wanted, or all"),
        ("flush", "99999999999999999999", "'99999999999999999999': ids wanted, or all"),
        ("flush", " ", "'': ids wanted, or all"),
        ("forward", "1 2", "'1 2': PID FD FD wanted"),
        ("forward", "1 2 2", "'1 2 2': PID FD FD wanted"),
        ("forward", "1 2 3 4", "'1 2 3 4': PID FD FD wanted"),
        ("forward", "1 2 99999999999", "'1 2 99999999999': PID FD FD wanted"),
        ("forward", "1 2 3\\n4 5 6", "one line PID FD FD wanted"),
        ("listen_port", "1 2", "'1 2': one port wanted"),
        # What a terminal would obey is not in the file.
        ("listen_port", "\\033[2J 1", "'\\x1b[2J 1': one port wanted"),
    ],
)
def test_a_bad_write_asks_for_nothing_and_is_explained(
    daemon: FakeDaemon, loop: Loop, name: str, text: str, reason: str
) -> None:
    said = shell(loop, daemon.directory, f"printf -- '{text}\\n' > {name}; cat errors listen_port")
    assert said == f"{WHEN} {name}: {reason}\n9999\n"
    assert daemon.requests == []
    assert daemon.refused == [(name, reason)]


def test_what_the_daemon_refuses_is_explained_too(daemon: FakeDaemon, loop: Loop) -> None:
    said = shell(loop, daemon.directory, "echo 80 > listen_port; cat listen_port errors")
    assert said == (
        f"9999\n{WHEN} listen_port: cannot listen on 127.0.0.1:80: Address already in use\n"
    )


def test_unknown_pairs_are_named(daemon: FakeDaemon, loop: Loop) -> None:
    said = shell(loop, daemon.directory, "echo 2 7 8 > flush; cat errors")
    assert said == f"{WHEN} flush: no such pair: 7 8\n"
    assert daemon.requests == [{"do": "flush", "ids": [2, 7, 8]}]


def test_a_very_long_write_is_refused(daemon: FakeDaemon, loop: Loop) -> None:
    said = shell(loop, daemon.directory, "yes 1 | head -n 5000 > flush; cat errors")
    assert said == f"{WHEN} flush: more than 4096 bytes at once\n"
    assert daemon.requests == []


def test_errors_keep_the_last_ones_newest_last(daemon: FakeDaemon, loop: Loop) -> None:
    shell(loop, daemon.directory, "for n in $(seq 70); do echo 1$n > flush; done")
    lines = shell(loop, daemon.directory, "cat errors").splitlines()
    assert lines == [f"{WHEN} flush: no such pair: 1{n}" for n in range(7, 71)]


def test_without_bpf_the_daemon_fills_the_files(daemon: FakeDaemon, loop: Loop) -> None:
    assert shell(loop, daemon.directory, "cat show stats listeners") == "show\nstats\nlisteners\n"


def test_with_bpf_they_are_links_and_what_a_dead_daemon_left_is_replaced(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.directory.mkdir()
    (daemon.directory / "show").write_text("old")
    (daemon.directory / "strange").write_text("old")
    with loop_with_sigio(daemon.asked) as loop:
        proc = daemon.open(loop, tmp_path / "pins")
        links = {
            path.name: path.readlink() for path in daemon.directory.iterdir() if path.is_symlink()
        }
        assert links == {name: tmp_path / "pins" / name for name in ("show", "stats", "listeners")}
        assert not (daemon.directory / "strange").exists()
        proc.close()
    assert not daemon.directory.exists()
