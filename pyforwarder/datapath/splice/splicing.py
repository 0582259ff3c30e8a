"""Splice in the supervisor, which the workers inherit: maps, programs, and the keeper."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
from pyforwarder.datapath.splice.keeper_client import KeeperClient
from pyforwarder.datapath.splice.keeper_process import KeeperProcess
from pyforwarder.datapath.splice.pins import unpin

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express
    from pyforwarder.datapath.splice.maps import Programs, SpliceMaps
    from pyforwarder.runtime.loop import Loop


class Splicing:
    """Maps, programs and keeper, as the supervisor has them and its workers inherit them."""

    def __init__(
        self,
        maps: SpliceMaps,
        *,
        workers: int,
        close_in_child: Callable[[], None] = lambda: None,
        express: Express | None = None,
    ) -> None:
        """`close` closes the maps. If programs are attached, the keeper starts here.

        Otherwise it starts with `begin`. Workers can inherit what they need before.
        """
        self.maps = maps
        self.express = express
        self.keeper = KeeperProcess(
            maps, workers=workers, close_in_child=close_in_child, express=express
        )
        self.has_begun = maps.is_attached
        if self.has_begun:
            self.keeper.start()

    def begin(self, programs: Programs) -> None:
        """Attach the programs, whose descriptors belong to this object from here on, and start the
        keeper.

        Raises:
            LoadError: they cannot be attached.
        """
        self.maps.attach(programs)
        self.keeper.start()
        self.has_begun = True

    def asker(self, worker: int, loop: Loop, *, is_patient: bool = False) -> KeeperAsker:
        """A worker's requests to the keeper; `is_patient`: no other request waits meanwhile."""
        return KeeperAsker(loop, self.keeper.clients[worker], is_patient=is_patient)

    def client(self, worker: int) -> KeeperClient:
        """Requests to the keeper in the name of a worker that does not run."""
        return KeeperClient(self.keeper.clients[worker])

    def patient_client(self, worker: int) -> KeeperClient:
        """The same, where no other request waits meanwhile."""
        return KeeperClient(self.keeper.clients[worker], is_patient=True)

    def keep_only(self, worker: int) -> None:
        """In a worker, which has its datapath: close everything that could be used against other
        pairs.
        """
        self.keeper.keep_only(worker)
        self.maps.keep_only(worker)
        if self.express is not None:
            self.express.keep_only(worker)

    def clear(self, worker: int) -> None:
        """Forget all pairs that a worker has spliced.

        Raises:
            KeeperError: the keeper does not answer.
        """
        self.patient_client(worker).ask("clear")

    def worker_died(self, worker: int) -> None:
        """A worker has died: its pairs wait for its successor. Call it before the worker's slots
        are changed.

        Raises:
            KeeperError: the keeper does not answer.
        """
        if not self.has_begun:
            self.keeper.renew_unread(worker)
            return
        self.keeper.renew(worker)
        self.client(worker).ask("worker_died")
        self.keeper.renewed(worker)

    def hand_over(self) -> None:
        """End the keeper, and leave everything else to the next daemon."""
        self.keeper.close()
        self.maps.close()
        if self.express is not None:
            self.express.close()

    def close(self) -> None:
        """End the keeper, and detach the programs; the remaining pairs get a RST."""
        self.keeper.close()
        if (
            self.maps.is_attached
            and self.maps.links.is_pinned
            and self.maps.links.directory is not None
        ):
            unpin(self.maps.links.directory)
        self.maps.close()
        if self.express is not None:
            self.express.close()
