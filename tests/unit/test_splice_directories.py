"""Which directory of splice's pins a daemon gets, and which are removed."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyforwarder.datapath.attach import clsact
from pyforwarder.datapath.splice import directories
from pyforwarder.datapath.splice.directories import (
    NAMES,
    Before,
    Chosen,
    Claim,
    choose_alone,
    choose_beside,
    remove_left,
)
from pyforwarder.errors import LoadError

PIN = "flows_9"


@pytest.fixture(autouse=True)
def no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clsact, "names", lambda: set())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pins fit in a directory with a file of that name."""

    def must_fit(directory: Path) -> None:
        if not (directory / "fits").exists():
            raise LoadError("records of another version")

    monkeypatch.setattr(directories, "must_fit", must_fit)
    return tmp_path


def left(root: Path, name: str, *, fits: bool = False, used_ns: int = 1) -> Path:
    """As a daemon leaves it that was killed."""
    directory = root / name
    directory.mkdir()
    (directory / PIN).touch()
    if fits:
        (directory / "fits").touch()
    os.utime(directory, ns=(used_ns, used_ns))
    return directory


def test_the_usual_one_where_nothing_is(root: Path) -> None:
    assert choose_alone(root) == root / "splice"
    assert choose_alone(root / "there is none") == root / "there is none" / "splice"


def test_one_that_is_in_use_is_left_to_its_daemon(root: Path) -> None:
    claim = Claim(left(root, "splice", fits=True))
    second = Claim(root / "splice")  # of one that takes its place
    assert choose_alone(root) == root / "splice-2"
    claim.close()
    assert choose_alone(root) == root / "splice-2"
    second.close()
    second.close()
    assert choose_alone(root) == root / "splice"


def test_a_child_does_not_hold_what_its_parent_uses(root: Path) -> None:
    claim = Claim(left(root, "splice"))
    began, begins = os.pipe()
    child = os.fork()
    if not child:
        os.write(begins, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(began, 1)
        os.close(began)
        os.close(begins)
        assert choose_alone(root) == root / "splice-2"
        claim.close()
        assert choose_alone(root) == root / "splice"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_of_what_is_left_that_is_taken_which_fits_and_was_used_last(root: Path) -> None:
    left(root, "splice", used_ns=9)
    assert choose_alone(root) == root / "splice"
    left(root, "splice-2", fits=True, used_ns=1)
    assert choose_alone(root) == root / "splice-2"
    left(root, "splice-3", fits=True, used_ns=2)
    assert choose_alone(root) == root / "splice-3"


def test_daemons_that_live_may_have_all_of_them(root: Path) -> None:
    claims = [Claim(left(root, name)) for name in NAMES]
    with pytest.raises(LoadError, match="8 daemons before this one"):
        choose_alone(root)
    with pytest.raises(LoadError, match="8 daemons before this one"):
        choose_beside(root, Before("splice", splices=True, can_keep=True))
    for claim in claims:
        claim.close()


@pytest.mark.parametrize(
    ("splices", "is_there", "fits", "chosen"),
    [
        (False, True, False, Chosen(Path("splice-2"))),
        (True, False, False, Chosen(Path("splice"))),
        (True, True, True, Chosen(Path("splice"))),
        (True, True, False, Chosen(Path("splice-2"), keeps=True)),
    ],
)
def test_beside_a_daemon_whose_pairs_fit_or_stay(
    root: Path, *, splices: bool, is_there: bool, fits: bool, chosen: Chosen
) -> None:
    if is_there:
        left(root, "splice", fits=fits)
    found = choose_beside(root, Before("splice", splices=splices, can_keep=True))
    assert found == Chosen(root / chosen.directory, chosen.keeps)


def test_a_daemon_that_cannot_keep_pairs_that_do_not_fit(root: Path) -> None:
    left(root, "splice")
    with pytest.raises(LoadError, match="records of another version"):
        choose_beside(root, Before("splice", splices=True, can_keep=False))


@pytest.mark.parametrize("name", ["", "..", "splice/..", "/", "splice-9", "show"])
def test_a_directory_that_is_none_of_them_is_refused(root: Path, name: str) -> None:
    with pytest.raises(LoadError, match="which is no name"):
        choose_beside(root, Before(name, splices=True, can_keep=True))


def test_what_nobody_uses_is_removed_and_nothing_else(root: Path) -> None:
    own, used = left(root, "splice-2"), left(root, "splice-3")
    claim = Claim(used)
    strange = root / "splice-4"
    strange.mkdir()
    (strange / "theirs").touch()
    gone = left(root, "splice")
    empty = root / "splice-5"
    empty.mkdir()
    assert remove_left(root, own) == [gone, empty]
    assert sorted(path.name for path in root.iterdir()) == ["splice-2", "splice-3", "splice-4"]
    claim.close()
    assert remove_left(root, own) == [used]
    assert remove_left(root, own) == []
    assert (own / PIN).exists()


def test_filters_without_a_directory_are_removed_by_its_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clsact, "names", lambda: {clsact.name_of(root / "splice-7")})
    removed: list[Path] = []
    monkeypatch.setattr(directories, "unpin", removed.append)
    assert remove_left(root, root / "splice", of_filters=False) == []
    assert remove_left(root, root / "splice") == [root / "splice-7"]
    assert removed == [root / "splice-7"]
    assert remove_left(root, root / "splice-7") == []


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened in this block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_cannot_be_looked_at_is_left_for_the_next_look(root: Path) -> None:
    """A daemon looks now and then, also when it has no descriptor for that."""
    directory = left(root, "splice-2")
    with no_descriptors():
        assert remove_left(root, None) == []
    assert remove_left(root, None) == [directory]


def test_where_nobody_can_know_a_directory_is_nobodys_to_remove(root: Path) -> None:
    claim = Claim(left(root, "splice"))
    with no_descriptors():
        assert not directories._remove(root / "splice")
    claim.close()
    assert directories._remove(root / "splice")
