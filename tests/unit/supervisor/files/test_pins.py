"""The stamp of a set of pins, and what of a directory is whose. On an ordinary file system."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyforwarder import __version__
from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.supervisor.files import pins
from pyforwarder.supervisor.files.pins import Stamp

NAMES = ("show", "stats")


def make(directory: Path, *names: str) -> None:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("ours" if name in NAMES else "")


def is_ours(path: Path) -> bool:
    return path.read_text() == "ours"


def names_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_stamp_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert pins.read_stamp(tmp_path) is None
    for stamp in (Stamp("0.0.9", "3-abc", ("a", "b")), Stamp("1.0", "4-x", ())):
        pins.write_stamp(tmp_path, stamp)
        assert pins.read_stamp(tmp_path) == stamp
    assert names_of(tmp_path) == ["version"]
    assert not (tmp_path / "version").exists()  # it leads nowhere


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "pyforwarder", "pyforwarder/1", "pyforwarder/1 layout 2: ../x", "a b"]
)
def test_link_that_reads_otherwise_is_no_stamp(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").symlink_to(text)
    assert pins.read_stamp(tmp_path) is None
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert (found.stamp, found.foreign) == (None, ["version"])
    pins.remove(found)
    assert names_of(tmp_path) == ["version"]


def test_own_set_is_ours_and_goes_with_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "default"
    make(directory, *NAMES)
    pins.write_stamp(directory, pins.stamp_of(NAMES))
    found = pins.survey(directory, NAMES, is_ours)
    assert (found.ours, found.foreign, found.is_of_another_version) == (
        ["show", "stats"],
        [],
        False,
    )
    pins.remove(found)
    assert not directory.exists()


@pytest.mark.parametrize(
    "stamp",
    [
        Stamp("0.0.9", pins.layout(), ("show", "old")),
        Stamp(__version__, "0-abc", ("show", "old")),
    ],
)
def test_other_versions_set_is_recognised_and_goes_with_the_names_it_had(
    tmp_path: Path, stamp: Stamp
) -> None:
    make(tmp_path, "show", "old", "strange")
    pins.write_stamp(tmp_path, stamp)
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert found.stamp == stamp
    assert found.is_of_another_version
    assert (found.ours, found.foreign) == (["old", "show"], ["strange"])
    pins.remove(found)
    assert names_of(tmp_path) == ["strange"]


def test_set_without_a_stamp_is_an_old_one(tmp_path: Path) -> None:
    make(tmp_path, "show")
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert (found.ours, found.is_of_another_version) == (["show"], True)


def test_strangers_under_our_names_stay(tmp_path: Path) -> None:
    (tmp_path / "show").write_text("theirs")
    (tmp_path / "version").write_text("theirs")
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert (found.ours, found.foreign) == ([], ["show", "version"])
    assert not found.is_of_another_version
    pins.remove(found)
    assert names_of(tmp_path) == ["show", "version"]


def test_subdirectory_is_another_set(tmp_path: Path) -> None:
    make(tmp_path, *NAMES)
    pins.write_stamp(tmp_path, pins.stamp_of(NAMES))
    rooms = tmp_path / "splice"
    make(rooms, "show")
    pins.write_stamp(rooms, pins.stamp_of(["show"], "splice.c"))
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert found.foreign == []
    pins.remove(found)
    assert names_of(tmp_path) == ["splice"]
    assert names_of(rooms) == ["show", "version"]


def test_there_may_be_nothing_at_all(tmp_path: Path) -> None:
    found = pins.survey(tmp_path / "none", NAMES, is_ours)
    assert (found.stamp, found.ours, found.foreign) == (None, [], [])
    assert not found.is_of_another_version
    pins.remove(found)


def test_what_an_interrupted_end_left_is_ours(tmp_path: Path) -> None:
    # The stamp goes last, and comes first.
    pins.write_stamp(tmp_path, pins.stamp_of(NAMES))
    (tmp_path / "~version").symlink_to("half made")
    found = pins.survey(tmp_path, NAMES, is_ours)
    assert found.foreign == []
    pins.remove(found)
    assert not tmp_path.exists()


def test_layout_changes_with_what_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pins.layout(), pins.layout("splice.c")
    assert before[0] != before[1]
    copy = tmp_path / "bpf"
    shutil.copytree(bpf_directory(), copy)
    monkeypatch.setattr(pins, "bpf_directory", lambda: copy)
    assert (pins.layout(), pins.layout("splice.c")) == before
    with (copy / "splice.c").open("a") as source:
        source.write("/* more */\n")
    assert (pins.layout(), pins.layout("splice.c") == before[1]) == (before[0], False)
    with (copy / "abi.h").open("a") as source:
        source.write("/* more */\n")
    assert pins.layout() != before[0]
