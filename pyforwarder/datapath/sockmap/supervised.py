"""The sockmap datapath, as the supervisor has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.datapath import supervised
from pyforwarder.datapath.sockmap.maps import KernelMaps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class SupervisedSockmap(supervised.KernelDatapath):
    """The sockmap datapath as the supervisor has it."""

    def __init__(self, maps: KernelMaps) -> None:
        self.maps = maps

    @classmethod
    def make(cls, given: supervised.Given) -> SupervisedSockmap | None:
        """Wherever pairs may leave userspace: for what is not spliced it is the next best."""
        if not given.choices:
            return None
        maps = KernelMaps.create(
            workers=given.workers, slots=given.slots, pairs_fd=given.arrays().pairs_fd
        )
        return cls(maps)

    def load(self, prove: Callable[[str], str]) -> supervised.LoadedPrograms:
        """A program for each worker."""
        proof = prove("sockmap")
        return supervised.LoadedPrograms(self.maps.load_programs(), proof, {})

    def attach(self, descriptors: Sequence[int]) -> None:
        """To each worker's sockhash."""
        self.maps.attach(descriptors)

    def forget_worker(self, worker: int) -> None:
        """Its sockets left the map by themselves."""
        self.maps.forget_worker(worker)

    def close(self) -> None:
        """Close the maps, which detaches the programs."""
        self.maps.close()
