"""What the supervisor has of a datapath of the kernel, from its maps to its end.

The maps are made at the start, so that workers inherit them. The programs are loaded and proven in
another process, which hands over their descriptors. A row of `core/datapaths.py` names the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing import Self

    from pyforwarder.config import Config
    from pyforwarder.datapath.ebpf.arrays import Arrays


class Warn(Protocol):
    """Write a line of level warning."""

    def __call__(self, event: str, /, **fields: object) -> None:
        """`event` is its name, the rest what it says."""


class Given(NamedTuple):
    """What a datapath is made of."""

    config: Config
    # Those of the kernel that the configuration names or leaves open.
    choices: frozenset[str]
    workers: int
    slots: int  # of the pair table, for each worker
    arrays: Callable[[], Arrays]  # raises LoadError
    pins: Path  # the instance's directory in bpffs; nothing is pinned before the daemon serves
    warn: Warn
    close_in_child: Callable[[], None]  # for processes that it starts
    # The daemon that has the pins lives: nothing of it is removed or changed before `attach`.
    is_successor: bool = False
    handshakes_fd: int = -1  # of that daemon, ours to close: see `SpliceMaps.create`
    places: int = 0  # of express, as many as there are descriptors for
    splice_pins: Path | None = None  # the directory of splice's pins; None: the usual one


class LoadedPrograms(NamedTuple):
    """What `load` has come to: it crosses from one process to another."""

    descriptors: Sequence[int]
    proof: str  # how it was proven, for the log
    # Rows of `core.datapaths.SESSIONS` and `EXPRESS` that come with it, by their names: empty, or
    # why they do not work.
    extras: Mapping[str, str]


class KernelDatapath(ABC):
    """One datapath; its maps are there, and its programs come with `attach`."""

    # An earlier daemon's pairs go on in it, and have ports: `attach` comes before any connect.
    takes_over: bool = False

    @property
    def can_pin(self) -> bool:
        """Whether `pin` has something to do."""
        return False

    @classmethod
    @abstractmethod
    def make(cls, given: Given) -> Self | None:
        """Make the maps; None: the configuration does not want it.

        Raises:
            LoadError: the kernel refuses.
        """

    @abstractmethod
    def load(self, prove: Callable[[str], str]) -> LoadedPrograms:
        """In another process: prove it, and load the programs over the maps.

        `prove` plays the self-test of the row of that name, if it has not passed since the host
        was booted, and says how it went; it raises LoadError.

        Raises:
            LoadError: it does not work here.
        """

    @abstractmethod
    def attach(self, descriptors: Sequence[int]) -> None:
        """Set the programs to work; the descriptors are the callee's from here on.

        Raises:
            LoadError: they cannot be attached.
        """

    def pin(self) -> None:  # noqa: B027 - most need not
        """From here on its pairs outlive the daemon.

        Raises:
            ForwarderError: bpffs refuses; then they end with us.
        """

    def release(self) -> None:
        """Another daemon goes on with what is pinned: leave it, and close our descriptors.

        Only where `can_pin`.
        """
        self.close()

    def worker_died(self, worker: int) -> None:  # noqa: B027 - most need not
        """A worker died: what goes on without it waits for its successor.

        Called before `forget_worker`, while the pair table says what that is.

        Raises:
            DatapathError: it could not be done.
        """

    def forget_worker(self, worker: int) -> None:  # noqa: B027 - most need not
        """A worker died: take its entries out of the maps.

        Raises:
            DatapathError: the kernel refuses.
        """

    @abstractmethod
    def close(self) -> None:
        """Detach the programs, remove pins and close the maps."""
