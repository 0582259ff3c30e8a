"""The files that show and steer an instance: the view in bpffs, and the pseudo-/proc.

Either may be missing where the host does not let us: without the view, the pseudo-/proc has files
that say the same, made by the daemon.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.runtime import tables
from pyforwarder.supervisor.files import bpffs, view_walks
from pyforwarder.supervisor.files.proc import Obey, ProcDirectory
from pyforwarder.supervisor.files.view_selftest import WITHOUT_VIEW
from pyforwarder.supervisor.files.view_walks import WALKS, Links
from pyforwarder.supervisor.files.views import View, remove_stale
from pyforwarder.supervisor.processes.loader import Loaded
from pyforwarder.supervisor.requests import report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.runtime.instance import Instance
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.files.view_walks import Walk
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.processes.loader import Part
    from pyforwarder.worker.log import Log

# The view's files and what `show` calls them.
_RENDERED: Final = (("show", "pairs"), ("stats", "stats"), ("listeners", "listeners"))


class Files:
    """Both, from `open` to `close`; the caller holds the instance's lock."""

    def __init__(
        self,
        instance: Instance,
        in_force: ConfigInForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        *,
        loop: Loop,
        log: Log,
        unix_time_s: Callable[[], float],
        walks: Sequence[Walk] = WALKS,
    ) -> None:
        """Make no files yet: the view comes from another process (`parts`, `take`).

        It is made by the first of the `walks` that works.
        """
        self._instance = instance
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._loop = loop
        self._log = log
        self._unix_time_s = unix_time_s
        self._proc: ProcDirectory | None = None
        self._walks = walks
        self._view: View | None = None

    def parts(self) -> dict[str, Part]:
        """What another process has to load, which has inherited the maps, by name."""
        maps = self._datapaths.sockmap

        def load_view() -> Loaded:
            links = view_walks.link(
                self._memory.arrays(),
                maps,
                self._walks,
                workers=self._memory.workers,
                slots=self._memory.slots,
            )
            return Loaded(*links.for_another_process())

        return {"view": load_view}

    def take(self, loaded: Loaded | LoadError) -> None:
        """The iterators have come, not yet pinned; or (why is in the log) they will not."""
        if isinstance(loaded, LoadError):
            self._log_no_view(loaded)
        else:
            links = Links.of_another_process(loaded.descriptors, loaded.said)
            self._view = View(self._memory.arrays(), links)

    def _log_no_view(self, error: ForwarderError) -> None:
        self._log.load_error("no_view", error, consequence=WITHOUT_VIEW)

    def open(self, obey: Obey, show: Callable[[str], object]) -> None:
        """Make the files, now that there is something to show.

        What is written to them is asked of `obey`, what they say of `show` where there is no view.

        Raises:
            ForwarderError: the pseudo-/proc cannot be made.
        """
        pins = None
        if self._view is not None:
            self._view.set_stats(report.stats_lines(self._datapaths.states))
            self.describe_listeners()
            try:
                self._view.pin(self._instance.bpffs_dir)
                pins = self._instance.bpffs_dir
            except ForwarderError as error:
                self._log_no_view(error)
        self._proc = ProcDirectory(
            self._loop,
            self._instance.proc_dir,
            obey=obey,
            unix_time_s=self._unix_time_s,
            refused=lambda name, reason: self._log.write(
                "warning", "write_refused", file=name, reason=reason
            ),
            pins=pins,
            render={
                name: lambda what=what: self._render(what, show(what))  # type: ignore[misc]
                for name, what in _RENDERED
            },
        )

    def _render(self, what: str, rows: Any) -> str:
        """What the view would say, made by us; the remark goes where the kernel puts its own."""
        text = tables.render(what, list(tables.stats_rows(rows)) if what == "stats" else rows)
        header, _, rest = text.partition("\n")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._unix_time_s()))
        remark = f"# as of {when}, said by the daemon (pid {os.getpid()}): no BPF view here"
        return f"{header}  {remark}\n{rest}"

    def describe_listeners(self) -> None:
        """Tell the view which listeners are in force."""
        if self._view is not None:
            lines = report.listener_lines(
                self._in_force.config, self._in_force.listeners.binds(), self._memory.directory
            )
            told = self._view.set_listeners(lines)
            if told < len(lines):
                self._log.write("warning", "view_is_full", listeners=len(lines), shown=told)

    def port_changed(self) -> None:
        """Another port may be in force."""
        if self._proc is not None:
            self._proc.port_changed()

    def asked(self) -> None:
        """SIGIO has come: a process wants to open one of the files."""
        if self._proc is not None:
            self._proc.asked()

    def backlogs(self) -> report.Backlogs:
        """What waits in the kernel now; nothing is known of it where the view cannot tell.

        Raises:
            ControlError: the kernel could not be asked just now.
        """
        if self._view is not None:
            return self._view.backlogs()
        return report.Backlogs({}, is_complete=self._datapaths.sockmap is None)

    def close_in_child(self) -> None:
        """Close the descriptors, in another process; the files stay."""
        for fd in self._proc.fds() if self._proc is not None else ():
            os.close(fd)
        if self._view is not None:
            self._view.close()

    def close_proc(self) -> None:
        """Remove the pseudo-/proc; nothing happens if there is none (any more)."""
        if self._proc is not None:
            self._proc.close()
            self._proc = None

    def release(self) -> None:
        """Remove the view's pins, and no directory: another daemon makes its own there."""
        if self._view is not None:
            self._view.unpin()
            self._view.close()
            self._view = None

    def close_view(self) -> None:
        """Remove the view's pins, and the directory of all pins if they were the last."""
        if self._view is not None:
            self._view.unpin()
            self._view.close()
        # Splice may have made it, where there is no view.
        with contextlib.suppress(OSError):
            self._instance.bpffs_dir.rmdir()
        bpffs.leave(self._instance.bpffs_dir.parent)

    def leave(self) -> None:
        """Remove the directory of all pins if they were the last: ours of splice, which the daemon
        after us has outlived or not.
        """
        with contextlib.suppress(OSError):
            self._instance.bpffs_dir.rmdir()
            bpffs.leave(self._instance.bpffs_dir.parent)


def remove_stale_pins(instance: Instance, log: Log) -> None:
    """Clean up after a daemon that was killed, and tell of what is not simply our own."""
    found = remove_stale(instance.bpffs_dir)
    where = found.directory
    if found.is_of_another_version:
        version = found.stamp.version if found.stamp else "unknown"
        log.write("info", "pins_replaced", directory=where, version=version)
    if found.foreign:
        names = ",".join(found.foreign)
        log.write("warning", "pins_left_alone", directory=where, names=names)
