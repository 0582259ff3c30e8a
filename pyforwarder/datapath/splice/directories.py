"""Whose directory of splice's pins is which: two daemons of an instance that live never share one.

BPFFS/NAME/splice, splice-2, ... splice-8

There is more than one while a daemon keeps its spliced pairs that its successor cannot take over,
because their records are of another version (supervisor/takeover/messages.py): each removes its own
pins by their paths at its end. A daemon has a shared lock (flock(2)) on its directory as long as it
lives. So a directory without one was left by a daemon that was killed, and the one that serves
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Final, NamedTuple

from pyforwarder.datapath.attach import clsact, unix_names
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice.pins import has_pins, must_fit, pins_in, unpin
from pyforwarder.errors import LoadError
from pyforwarder.runtime.slowness import scaled_s

# The first is the usual one. Each daemon that is still ending has one of the others.
NAMES: Final = ("splice", *(f"splice-{number}" for number in range(2, 9)))
# Another process has the lock for itself only while it looks, or removes what is there.
_CLAIM_WITHIN_S: Final = 5.0
_PAUSE_S: Final = 0.01
# A process that is killed closes its descriptors one after the other; and one whose successor was
# killed releases its spliced pairs in that time.
_DYING_S: Final = 3.0


class Before(NamedTuple):
    """What a living daemon, whose place this one takes, has of splice."""

    directory: str  # the name of its directory of pins
    splices: bool  # whether it may have spliced pairs
    can_keep: bool  # whether these can stay with it


class Chosen(NamedTuple):
    """Where a daemon has its pins."""

    directory: Path
    keeps: bool = False  # the daemon before has spliced pairs of another version, and keeps them


class Claim:
    """A directory is in use as long as this is open and this process lives.

    Children that are forked from it do not hold it.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            OSError: there is no such directory, or another process has it for itself.
        """
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        until_s = time.monotonic() + _CLAIM_WITHIN_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError) or time.monotonic() > until_s:
                    self.close()
                    raise
                time.sleep(_PAUSE_S)
            else:
                break
        _claims.add(self)

    def close(self) -> None:
        """Give it up; nothing happens if that was done."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _close_in_child() -> None:
    for claim in list(_claims):
        claim.close()


os.register_at_fork(after_in_child=_close_in_child)


def choose_alone(root: Path) -> Path:
    """For a daemon that takes nobody's place; `root` has the instance's pins.

    What a daemon that was killed has left is preferred, if this version can go on with it; of
    several the one that was used last. A daemon that has just been killed is waited for: it gives
    up its directory some time after the lock of the instance.

    Raises:
        LoadError: daemons that live have all of them.
    """
    until_s = time.monotonic() + scaled_s(_DYING_S)
    while True:
        used = [one for one in _all_of(root) if _is_in_use(one)]
        free = [one for one in _all_of(root) if one not in used]
        left = [one for one in free if has_pins(one)]
        best = max(left, key=lambda one: (_fits(one), _used_ns(one)), default=None)
        if best is not None and _fits(best):
            return best
        if not any(map(_fits, used)) or time.monotonic() >= until_s:
            break
        time.sleep(_PAUSE_S)
    if not free:
        raise _too_many(root)
    return best or free[0]


def choose_beside(root: Path, before: Before) -> Chosen:
    """For a daemon that takes the place of one that lives.

    Raises:
        LoadError: its spliced pairs can neither go on here nor stay; nothing has changed.
    """
    if before.directory not in NAMES:
        raise LoadError(
            f"the running daemon has its pins in {before.directory!r}, which is no name"
        )
    if not before.splices:
        return Chosen(_unused(root))
    its = root / before.directory
    if not has_pins(its):
        return Chosen(its)
    try:
        must_fit(its)
    except LoadError:
        if not before.can_keep:
            raise
        return Chosen(_unused(root), keeps=True)
    return Chosen(its)


def remove_left(root: Path, own: Path | None, *, of_filters: bool = True) -> list[Path]:
    """Remove what daemons that were killed have left, except in `own`; the directories.

    Peers of pairs that were spliced there get a RST. For the daemon that serves. Never raises.

    `of_filters`: also filters of clsact without a directory, which takes long where there are many
    interfaces.
    """
    named = clsact.names() if of_filters else set()
    return [one for one in _all_of(root) if one != own and _remove_left(one, named)]


def _remove_left(directory: Path, named: Set[str]) -> bool:
    """Remove it if something was left there, or in a filter that is `named` so.

    False also where it cannot be looked at, as no descriptor is left: the next look comes soon.
    """
    try:
        is_left = _is_empty(directory) or pins_in(directory) or clsact.name_of(directory) in named
        return bool(is_left) and _remove(directory)
    except OSError:
        return False


def splice_maps(directory: Path) -> set[int]:
    """The kernel's numbers of the maps with records of pairs that are pinned there, of any version.

    None without permission to look.
    """
    found = set()
    for pin in pins_in(directory):
        if pin.name.startswith("splices_"):
            with contextlib.suppress(OSError):
                fd = bpf.open_pin(pin)
                try:
                    found.add(bpf.map_id(fd))
                finally:
                    os.close(fd)
    return found


def _all_of(root: Path) -> list[Path]:
    return [root / name for name in NAMES]


def _unused(root: Path) -> Path:
    for one in _all_of(root):
        if not has_pins(one) and not _is_in_use(one):
            return one
    raise _too_many(root)


def _too_many(root: Path) -> LoadError:
    return LoadError(
        f"{len(NAMES)} daemons before this one have pins in {root}",
        advice="wait until the spliced pairs of the oldest have ended",
    )


def _fits(directory: Path) -> bool:
    try:
        must_fit(directory)
    except LoadError:
        return False
    return True


def _used_ns(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0


def _is_empty(directory: Path) -> bool:
    """Whether it is there, with nothing in it."""
    try:
        return not os.listdir(directory)
    except OSError:
        return False


def _is_in_use(directory: Path) -> bool:
    if not has_pins(directory):
        return False
    with _alone(directory) as is_alone:
        return not is_alone


def _remove(directory: Path) -> bool:
    with _alone(directory) as is_alone:
        if is_alone:
            unpin(directory)
        return is_alone


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether no daemon that lives uses the directory; none begins to meanwhile."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        fd = -1  # there is none, or none that is ours; filters of clsact need none
    except OSError:  # no descriptor is left: nobody knows
        yield False
        return
    try:
        is_free = True
        if fd >= 0:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                is_free = False
        # A version without locks has this mark, where it has filters.
        yield is_free and not unix_names.is_in_use(clsact.name_of(directory))
    finally:
        if fd >= 0:
            os.close(fd)
