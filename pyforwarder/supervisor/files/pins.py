"""Whose pins a directory in bpffs holds.

Beside a set of pins stands their stamp, which tells which version made them and what they are:

    BPFFS/NAME/version -> pyforwarder/0.1.0 layout 1-5c2a9d1e0b7f4a36: listeners show stats

A symbolic link that leads nowhere, its text being the message: bpffs knows no ordinary files, and
this one is made and replaced at once, read by `ls -l`, and needs no BPF. (The slash is for programs
that follow the link: bpffs answers EPERM for a name with a dot, ENOENT for a missing directory.)

The next `up` knows by it what it may remove, also of another daemon, and what it may go on using:
only what has its own layout. A subdirectory is a set of its own, with a stamp of its own; its maker
looks after it.

What stands under one of our names and is not ours is foreign, as is everything that no stamp
names. It is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pyforwarder import __version__
from pyforwarder.datapath.ebpf.abi import ABI_VERSION
from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.errors import LoadError

STAMP: Final = "version"
_NEW_STAMP: Final = "~version"  # no dot: bpffs refuses those
_TEXT: Final = re.compile(
    r"pyforwarder/(?P<version>\S+) layout (?P<layout>\S+):(?P<names>(?: [^/\s]+)*)"
)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who made a set of pins, and what is in it."""

    version: str  # of pyforwarder
    layout: str  # of the records in its maps
    names: tuple[str, ...]

    def __str__(self) -> str:
        names = "".join(f" {name}" for name in self.names)
        return f"pyforwarder/{self.version} layout {self.layout}:{names}"


@dataclass(slots=True)
class Found:
    """What is in a directory of pins."""

    directory: Path
    stamp: Stamp | None = None
    ours: list[str] = field(default_factory=list)  # of any version
    foreign: list[str] = field(default_factory=list)

    @property
    def is_of_another_version(self) -> bool:
        """Whether the pins are ours, but not this version's."""
        if self.stamp is None:
            return bool(self.ours)
        try:
            return (self.stamp.version, self.stamp.layout) != (__version__, layout())
        except LoadError:  # there is no bpf/ here: nothing will be pinned
            return True


def layout(*sources: str) -> str:
    """What must be equal for one version's maps to be of use to another.

    Taken from the sources that describe them (bpf/abi.h and bpf/maps.h, and any others named here),
    so that nobody can forget to change it.

    Raises:
        LoadError: bpf/ is not there.
    """
    digest = hashlib.sha256()
    for source in ("abi.h", "maps.h", *sources):
        digest.update((bpf_directory() / source).read_bytes())
    return f"{ABI_VERSION}-{digest.hexdigest()[:16]}"


def stamp_of(names: Collection[str], *sources: str) -> Stamp:
    """The stamp of a set that this version makes; `sources` as for `layout`."""
    return Stamp(__version__, layout(*sources), tuple(sorted(names)))


def read_stamp(directory: Path) -> Stamp | None:
    """The stamp there; None if there is none of ours."""
    try:
        match = _TEXT.fullmatch(os.readlink(directory / STAMP))
    except OSError:
        return None
    if match is None:
        return None
    return Stamp(match["version"], match["layout"], tuple(match["names"].split()))


def write_stamp(directory: Path, stamp: Stamp) -> None:
    """Put the stamp there, or another one in its place.

    Before the pins that it names, so that none is ever without. Raises OSError.
    """
    new = directory / _NEW_STAMP
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(str(stamp))
    new.rename(directory / STAMP)


def survey(directory: Path, names: Collection[str], is_ours: Callable[[Path], bool]) -> Found:
    """Return what is in a directory of pins; nothing is changed.

    `names` are those that this version would make, and `is_ours` tells whether what stands under
    one of them is a pin of the kind. Sets in subdirectories are not looked into.
    """
    found = Found(directory, read_stamp(directory))
    stamped = found.stamp.names if found.stamp is not None else ()
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                continue
            if entry.name in (STAMP, _NEW_STAMP):
                # A link is what we make of these names; ours if it reads like it.
                if not entry.is_symlink() or (entry.name == STAMP and found.stamp is None):
                    found.foreign.append(entry.name)
                continue
            known = entry.name in names
            # Another version's names are not known here: for those its stamp has to do.
            if is_ours(Path(entry.path)) if known else entry.name in stamped:
                found.ours.append(entry.name)
            else:
                found.foreign.append(entry.name)
    return found


def remove(found: Found) -> None:
    """Remove what is ours, its stamp last, and the directory if nothing else is in it.

    Never raises.
    """
    names = [*found.ours, _NEW_STAMP, *([STAMP] if found.stamp is not None else [])]
    for name in names:
        if name not in found.foreign:
            with contextlib.suppress(OSError):
                (found.directory / name).unlink()
    with contextlib.suppress(OSError):
        found.directory.rmdir()
