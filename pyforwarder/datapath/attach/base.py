"""The packet programs at both sides of an interface, by clsact or by tcx.

There are two implementations: tcx.py and clsact.py; choice.py chooses.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal, Protocol

from pyforwarder.errors import DatapathError

Kind = Literal["tcx", "clsact"]
Side = Literal["in", "out"]
SIDES: Final[tuple[Side, ...]] = ("in", "out")


class InterfaceTakenError(DatapathError):
    """What another program has set up on an interface leaves no place for ours."""

    def __init__(self, reason: str, errno: int) -> None:
        super().__init__(reason, errno)
        self.reason = reason


class Attacher(Protocol):
    """The programs of one instance on the interfaces of this network namespace.

    It may be used by the process that made it and by children of that, not by two at once for the
    same interface.
    """

    kind: Kind

    def has(self, interface: int, side: Side) -> bool:
        """Whether this process has attached a program there."""

    def attach(self, program_fd: int, interface: int, side: Side) -> None:
        """Put the program there, where this process has none.

        One that a daemon of this instance has left there is replaced, between two packets.

        Raises:
            InterfaceTakenError: there is no place for it on this interface.
            OSError: the kernel refuses.
        """

    def verify(self, interface: int, side: Side) -> None:
        """Look whether it is still there; if not, `has` says so from here on.

        The interface may have gone, and another may have got its number.
        """

    def interfaces(self) -> set[int]:
        """Where this process has attached a program, as far as it knows."""

    def detach(self, interface: int, side: Side) -> None:
        """Take the program away, also if others have it open. Never raises."""

    def clear(self) -> None:
        """Take away what a daemon that died has left attached, and nobody can use any more."""

    def keep(self) -> Collection[str]:
        """Let what is attached, and will be, outlive us; the names of the pins made for it.

        Raises:
            OSError: bpffs refuses.
        """

    def close(self) -> None:
        """Release it; in the process that made it what is attached goes, unless it was kept.

        What a daemon that died had left stays, too, until it is kept by this one. Never raises.
        """
