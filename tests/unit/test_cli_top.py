"""`top`: what is drawn, single keys, processes, and the whole of it on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from rich.console import Console

from pyforwarder.cli import keyboard, rates, top_screen
from pyforwarder.cli.processes import LocalProcesses
from pyforwarder.cli.top_screen import Screen, Snapshot
from tests.helpers.fake_control import PAIR, FakeControl, Request, environ, make_instance
from tests.helpers.waiting import DEADLINE_S

if TYPE_CHECKING:
    from pyforwarder.client import PairRow

WIDEST = {"client": "203.113.100.200:65535", "server": "198.151.100.200:65535"}


def pair(**fields: Any) -> PairRow:
    return cast("PairRow", {**PAIR, **fields})


def drawn(screen: Screen, width: int = 80, height: int = 24) -> list[str]:
    """The screen as lines of text."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=False)
    console.print(screen.draw(width, height))
    return file.getvalue().splitlines()


def screen_of(*pairs: PairRow, **stats: object) -> Screen:
    screen = Screen("lab", LocalProcesses(lambda: 0.0))
    screen.snapshot = Snapshot(list(pairs), {}, dict(stats))
    screen.browser.arrange([rates.PairRate(row, 1536.0, 0.0) for row in pairs])
    return screen


# ---------------------------------------------------------------------- drawing


def test_eighty_columns_hold_whole_ipv4_addresses() -> None:
    lines = drawn(screen_of(pair(**WIDEST, id=123456, state="half-closed")))
    [line] = [line for line in lines if line.lstrip().startswith("123456 ")]
    assert line.split()[:3] == ["123456", WIDEST["client"], WIDEST["server"]]
    assert "1.5 KiB" in line


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 10), (200, 60)])
def test_screen_fits_the_terminal(width: int, height: int) -> None:
    pairs = [pair(**WIDEST, id=number, reason="x" * 300) for number in range(100)]
    screen = screen_of(*pairs, closed={f"reason{n}": n for n in range(50)})
    for view in rates.View:
        screen.browser.view = view
        lines = drawn(screen, width, height)
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)


def test_totals_and_refusals_are_shown() -> None:
    screen = screen_of(
        pair(), pair(id=8, state="sniffing"), accepted=1234, closed={"denied": 3, "finished": 17}
    )
    screen.totals_per_s = {"accepted": 5.0}
    text = "\n".join(drawn(screen))
    assert "lab  pairs 2 (joined 1)  accepted 1,234  5.0/s" in text
    assert "ended: finished 17, denied 3" in text
    assert "up 3.0 KiB/s" in text


def test_selected_pair_is_told_in_full() -> None:
    lines = drawn(screen_of(pair(reason="both ends are TCP")))
    text = "\n".join(lines)
    assert "127.0.0.1:40000 > 127.0.0.1:9999\n127.0.0.1:40001 > 127.0.0.1:9001\n" in text
    assert "joined, sockmap: both ends are TCP; rule named" in text
    assert "up 1,023 B, down 23 B, backlog 0 B, age 12s, idle 0s" in text


def test_backlog_that_is_not_known_is_no_number() -> None:
    screen = screen_of(pair(id=7, backlog_bytes=None), pair(id=8, backlog_bytes=1024))
    screen.browser.sort = rates.Sort.BACKLOG
    text = "\n".join(drawn(screen, 120, 24))
    assert "backlog 1.0 KiB" in text
    assert "down 23 B, backlog unknown, age 12s" in text
    assert len(re.findall(r"sockmap +- ", text)) == 1


def test_names_from_clients_cannot_write_to_the_terminal() -> None:
    text = "\n".join(drawn(screen_of(pair(server="\x1b[2Jevil"))))
    assert "\x1b" not in text
    assert "\\033[2Jevil" in text


def test_rules_have_a_table_of_their_own() -> None:
    screen = screen_of()
    screen.snapshot.rows["rules"] = [
        {
            "listener": "main",
            "rule": "named",
            "taken": 23,
            "refused": 3,
            "to": "-",
            "decided": "user",
            "why": "it is so",
        }
    ]
    screen.browser.view = rates.View.RULES
    lines = [line.split() for line in drawn(screen)]
    assert ["LISTENER", "RULE", "TAKEN", "REFUSED", "TO", "DECIDED", "WHY"] in lines
    assert ["main", "named", "23", "3", "-", "user", "it", "is", "so"] in lines


def test_help_names_every_key() -> None:
    screen = screen_of()
    screen.browser.press("h")
    text = "\n".join(drawn(screen))
    assert all(f"{key} " in text for key, _ in rates.HELP)


def test_question_names_the_pair() -> None:
    screen = screen_of(pair())
    screen.browser.press("x")
    assert "reset pair 7? y/n" in drawn(screen)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (123 << 20, "123 MiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert top_screen._size(count) == text
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0s"), (59, "59s"), (60, "1m00s"), (3600, "1h00m"), (90061, "1d01h")],
)
def test_age(seconds: float, text: str) -> None:
    assert top_screen._age(seconds) == text


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"\x1b[A", ["up"]),
        (b"\x1bOB", ["down"]),
        (b"\x1b[5~\x1b[6~", ["page-up", "page-down"]),
        (b"\x1b", ["escape"]),
        (b"/10.0\r", ["/", "1", "0", ".", "0", "enter"]),
        (b"\x7f\t\x03", ["backspace", "tab", "ctrl-c"]),
        (b"\x1b[1;5Cq", ["q"]),  # a sequence that means nothing here
        (b"j\x1b[Bk", ["j", "down", "k"]),
        ("é".encode(), ["é"]),
        (b"\x00\xff", []),
    ],
)
def test_bytes_of_a_terminal_are_keys(data: bytes, keys: list[str]) -> None:
    assert keyboard.decode(data) == keys


def test_terminal_that_is_gone_is_told_from_silence() -> None:
    main_fd, terminal_fd = os.openpty()
    assert keyboard.read_keys(terminal_fd, timeout_s=0) == []
    os.close(main_fd)
    assert keyboard.read_keys(terminal_fd, timeout_s=0) is None
    os.close(terminal_fd)


def test_terminal_is_as_before_also_after_an_error() -> None:
    main_fd, terminal_fd = os.openpty()
    before = termios.tcgetattr(terminal_fd)

    def fail() -> None:
        with keyboard.single_keys(terminal_fd):
            assert termios.tcgetattr(terminal_fd) != before
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised four lines above
        fail()
    assert termios.tcgetattr(terminal_fd) == before
    os.close(main_fd)
    os.close(terminal_fd)


# ---------------------------------------------------------------------- processes


def test_process_behind_a_loopback_end_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
        listener.accept()[0],
    ):
        own, peer = ("{}:{}".format(*near.getsockname()), "{}:{}".format(*near.getpeername()))
        name = LocalProcesses().name_of(own, peer)
    assert name.endswith(f"[{os.getpid()}]")


def test_ends_elsewhere_are_not_looked_for() -> None:
    processes = LocalProcesses(lambda: pytest.fail("looked"))
    assert processes.name_of("192.0.2.1:4000", "127.0.0.1:9999") == ""
    assert processes.name_of("-", "127.0.0.1:9999") == ""


def test_looking_is_not_repeated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def look(kind: str) -> list[object]:
        looks.append(kind)
        return []

    monkeypatch.setattr(psutil, "net_connections", look)
    now_s = iter([100.0, 100.5, 101.0, 109.9, 110.1, 110.2])
    names = LocalProcesses(lambda: next(now_s))
    # the first look takes half a second: a twentieth of the time is ten seconds
    for expected in (1, 1, 1, 2):
        names.name_of("127.0.0.1:1", "127.0.0.1:2")
        assert len(looks) == expected


# ---------------------------------------------------------------------- the command


class Terminal:
    """`pyforwarder top` on a pseudo-terminal of 80 by 24."""

    def __init__(self, root: Path) -> None:
        self.main_fd, self.terminal_fd = os.openpty()
        fcntl.ioctl(self.terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.terminal_fd)
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyforwarder", "top", "--interval", "0.1"],
            env={**os.environ, **environ(root), "TERM": "xterm"},
            stdin=self.terminal_fd,
            stdout=self.terminal_fd,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        """Until the text is drawn (anew, after what was waited for before)."""
        deadline_s = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            remaining_s = deadline_s - time.monotonic()
            assert remaining_s > 0, f"{text!r} was not drawn; last: {self.seen[-2000:]!r}"
            if select.select([self.main_fd], [], [], remaining_s)[0]:
                data = os.read(self.main_fd, 1 << 16).decode(errors="replace")
                self.seen += re.sub(r"\x1b\[[0-9;]*m", "", data)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.main_fd, keys)

    def end(self) -> int:
        """The exit code, once it has ended; the rest of what it drew is in `seen`."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, "still running"
            if select.select([self.main_fd], [], [], 0.01)[0]:
                self.seen += os.read(self.main_fd, 1 << 16).decode(errors="replace")
        while select.select([self.main_fd], [], [], 0)[0]:
            self.seen += os.read(self.main_fd, 1 << 16).decode(errors="replace")
        return self.process.returncode

    def close(self) -> None:
        """Make sure that it has ended."""
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)
        os.close(self.main_fd)
        os.close(self.terminal_fd)


class Daemon(FakeControl):
    """Answers what `top` asks; flushed pairs are gone."""

    def __init__(self, root: Path) -> None:
        self.pairs = [pair(id=7), pair(id=8, server="127.0.0.1:22")]
        super().__init__(make_instance(root), self.answer_top)

    def answer_top(self, request: Request, _fds: list[int]) -> object:
        if request["do"] == "flush":
            self.pairs = [row for row in self.pairs if row["id"] not in request["ids"]]
            return {"flushed": request["ids"], "unknown": []}
        return {"pairs": self.pairs, "stats": {"accepted": 23}}.get(request["what"], [])


@pytest.fixture
def top(tmp_path: Path) -> Iterator[tuple[Terminal, Daemon]]:
    with Daemon(tmp_path) as daemon:
        terminal = Terminal(tmp_path)
        yield terminal, daemon
        terminal.close()


def test_top_draws_flushes_and_puts_the_terminal_back(top: tuple[Terminal, Daemon]) -> None:
    terminal, daemon = top
    terminal.wait_for("\x1b[?1049h")  # the alternate screen
    terminal.wait_for("pairs 2 (joined 2)  accepted 23")
    terminal.type(b"\x1b[Bx")
    terminal.wait_for("reset pair 8? y/n")
    terminal.type(b"y")
    terminal.wait_for("pairs 1 (joined 1)")
    assert [request for request in daemon.requests if request["do"] == "flush"] == [
        {"do": "flush", "ids": [8]}
    ]
    terminal.type(b"q")
    assert terminal.end() == 0
    assert "\x1b[?1049l" in terminal.seen
    assert termios.tcgetattr(terminal.terminal_fd) == terminal.before


def test_top_filters_what_is_typed(top: tuple[Terminal, Daemon]) -> None:
    terminal, _ = top
    terminal.wait_for("shown 2, by rate")
    terminal.type(b"/:22\r")
    terminal.wait_for("shown 1, by rate, with ':22'")
    terminal.process.send_signal(signal.SIGINT)  # what Ctrl-C is in a terminal of one's own
    assert terminal.end() == 0


def test_top_that_is_terminated_puts_the_terminal_back(top: tuple[Terminal, Daemon]) -> None:
    terminal, _ = top
    terminal.wait_for("pairs 2")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert "\x1b[?1049l" in terminal.seen
    assert termios.tcgetattr(terminal.terminal_fd) == terminal.before


def test_top_goes_on_when_the_daemon_is_gone(top: tuple[Terminal, Daemon]) -> None:
    terminal, daemon = top
    terminal.wait_for("pairs 2")
    daemon.close()
    terminal.wait_for("instance 'default' is not running")
    terminal.type(b"q")
    assert terminal.end() == 0


def test_top_without_a_daemon_is_exit_code_3(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    assert terminal.end() == 3
    assert "\x1b[?1049h" not in terminal.seen
    terminal.close()
