"""Files that answer when they are opened and obey when they are closed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder.supervisor.files import pseudo_files
from pyforwarder.supervisor.files.pseudo_files import PseudoFile, PseudoFiles
from tests.helpers.pseudo import loop_with_sigio, shell
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop


@dataclass
class Desk:
    """Three files: a number to read and write, orders to write, a clock to read."""

    directory: Path
    number: str = "1"
    orders: list[str] = field(default_factory=list)
    looks: int = 0
    files: PseudoFiles | None = None

    def look(self) -> str:
        self.looks += 1
        return f"look {self.looks}\n"

    def set_number(self, text: str) -> None:
        if text.strip().isdigit():
            self.number = text.strip()
            assert self.files is not None
            self.files.changed("number")

    def asked(self) -> None:
        if self.files is not None:
            self.files.asked()

    def make(self, loop: Loop) -> PseudoFiles:
        self.files = PseudoFiles(
            loop,
            self.directory,
            [
                PseudoFile("number", read=lambda: f"{self.number}\n", write=self.set_number),
                PseudoFile("orders", write=self.orders.append),
                PseudoFile("clock", read=self.look),
            ],
        )
        return self.files


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def loop(desk: Desk) -> Iterator[Loop]:
    with loop_with_sigio(desk.asked) as loop:
        files = desk.make(loop)
        try:
            yield loop
        finally:
            files.close()
            assert list(desk.directory.iterdir()) == []


def test_a_read_after_a_write_sees_what_came_of_it(desk: Desk, loop: Loop) -> None:
    assert shell(loop, desk.directory, "echo 23 > number; cat number") == "23\n"
    assert desk.number == "23"


def test_the_order_holds_however_quick_the_commands_are(desk: Desk, loop: Loop) -> None:
    numbers = range(100, 160)
    commands = "; ".join(f"echo {n} > number; cat number" for n in numbers)
    assert shell(loop, desk.directory, commands).split() == [str(n) for n in numbers]


def test_a_refused_write_leaves_what_is_in_force(desk: Desk, loop: Loop) -> None:
    assert shell(loop, desk.directory, "echo banana > number; cat number") == "1\n"


def test_quick_writes_are_all_obeyed_in_order(desk: Desk, loop: Loop) -> None:
    shell(loop, desk.directory, "for n in 1 2 3 4 5 6 7 8 9; do echo $n > orders; done; : < orders")
    assert desk.orders == [f"{n}\n" for n in range(1, 10)]


def test_appended_words_are_an_order_like_others(desk: Desk, loop: Loop) -> None:
    assert shell(loop, desk.directory, "echo a >> orders; echo 7 >> number; cat number") == "7\n"
    assert desk.orders == ["a\n"]


def test_what_has_been_obeyed_is_not_there_to_be_read(desk: Desk, loop: Loop) -> None:
    assert shell(loop, desk.directory, "echo a > orders; cat orders") == ""


def test_no_newline_is_needed(desk: Desk, loop: Loop) -> None:
    shell(loop, desk.directory, "printf all > orders; : < orders")
    assert desk.orders == ["all"]


def test_an_empty_write_is_no_order(desk: Desk, loop: Loop) -> None:
    shell(loop, desk.directory, ": > orders; : < orders")
    assert desk.orders == []


def test_a_long_write_is_cut_at_a_bound(desk: Desk, loop: Loop) -> None:
    shell(loop, desk.directory, "head -c 100000 /dev/zero > orders; : < orders")
    assert [len(order) for order in desk.orders] == [pseudo_files.MOST_WRITTEN_BYTES + 1]


def test_each_reader_gets_a_text_of_its_own_moment(desk: Desk, loop: Loop) -> None:
    before = desk.looks
    said = shell(loop, desk.directory, "cat clock clock; cat clock").splitlines()
    numbers = [int(line.split()[1]) for line in said]
    assert numbers == sorted(set(numbers))
    assert min(numbers) > before


def test_two_readers_at_once_are_both_served(desk: Desk, loop: Loop) -> None:
    said = shell(loop, desk.directory, "cat number & cat number & wait")
    assert said == "1\n1\n"


def test_a_process_that_holds_a_file_open_delays_others_only_for_a_moment(
    desk: Desk, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pseudo_files, "PATIENCE_S", 0.1)
    # The number is still being written when it is read: the reader gets the old one, in time.
    said = shell(loop, desk.directory, "exec 5> number; echo 23 >&5; cat number; exec 5>&-")
    assert said == "1\n"
    assert shell(loop, desk.directory, "cat number") == "23\n"


def test_only_the_owner_may_use_them(desk: Desk, loop: Loop) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in desk.directory.iterdir()}
    assert modes == {"number": 0o600, "orders": 0o600, "clock": 0o400}


def test_a_change_is_in_the_file_for_readers_after_us(desk: Desk, loop: Loop) -> None:
    del loop
    assert desk.files is not None
    desk.number = "42"
    desk.files.changed("number")
    # From this very process an open would wait for ourselves, so look at the file by its size.
    assert (desk.directory / "number").stat().st_size == len("42\n")


def test_descriptors_do_not_pile_up(desk: Desk, loop: Loop) -> None:
    shell(loop, desk.directory, "echo 1 > orders; cat number clock")
    before = len(os.listdir("/proc/self/fd"))
    shell(
        loop,
        desk.directory,
        "for n in 1 2 3 4 5 6 7 8 9 10; do echo 1 > orders; cat number clock; done; : < orders",
    )
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_leases_writes_are_obeyed_and_texts_are_made_anew(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_leases(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("pyforwarder.supervisor.files.pseudo_files.fcntl.fcntl", no_leases)
    monkeypatch.setattr(pseudo_files, "_REFRESH_S", 0.05)
    with loop_with_sigio(desk.asked) as loop:
        files = desk.make(loop)
        try:
            shell(loop, tmp_path, "echo 23 > number; echo a > orders")
            loop_until(loop, lambda: desk.number == "23" and desk.orders == ["a\n"])
            assert shell(loop, tmp_path, "cat number") == "23\n"
            shell(loop, tmp_path, "echo 24 > number")
            loop_until(loop, lambda: desk.number == "24")
            seen = desk.looks
            loop_until(loop, lambda: desk.looks >= seen + 2)
            assert shell(loop, tmp_path, "cat clock").startswith("look ")
        finally:
            files.close()


def loop_until(loop: Loop, done: Callable[[], bool]) -> None:
    """Run the loop until `done` says so."""

    def look() -> bool:
        loop.run_once(0.01)
        return done()

    wait_for(look, "the loop", deadline_s=DEADLINE_S)
