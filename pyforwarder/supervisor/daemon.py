"""The daemon: starts everything in the right order, and ends it in the reverse order.

What each part does is in a module of its own, and wiring.py makes them; here is only what comes
before what.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.core.address import Address, UnixAddress, bind_entries
from pyforwarder.core.datapaths import SESSIONS
from pyforwarder.datapath.attach import unix_names
from pyforwarder.datapath.ebpf.pair_table import slots_for
from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.runtime import collecting
from pyforwarder.runtime.instance import Instance, InstanceLock, acquire
from pyforwarder.runtime.loop import Loop
from pyforwarder.supervisor.configuration.in_force import ConfigSource
from pyforwarder.supervisor.daemon_state import DaemonState
from pyforwarder.supervisor.files.view_and_proc import remove_stale_pins
from pyforwarder.supervisor.files.view_walks import walks_of
from pyforwarder.supervisor.fleet.last_good import LastGood, read_first
from pyforwarder.supervisor.listeners import stored_sockets
from pyforwarder.supervisor.listeners.activation import Activation
from pyforwarder.supervisor.log_file import begin_log
from pyforwarder.supervisor.processes.loader import Loaders
from pyforwarder.supervisor.processes.web_process import wanted_of
from pyforwarder.supervisor.requests.control_socket import ControlServer
from pyforwarder.supervisor.service_manager import ServiceManager
from pyforwarder.supervisor.signals import Signals
from pyforwarder.supervisor.sizing import count_workers, raise_limits
from pyforwarder.supervisor.takeover.takeover import SucceedingDaemon, Takeover
from pyforwarder.supervisor.wiring import Basis, DaemonParts
from pyforwarder.supervisor.workers.process import check_user
from pyforwarder.worker.room import slots_of

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.processes.loader import Loaded
    from pyforwarder.supervisor.takeover.predecessor import Predecessor

_SESSIONS: Final = frozenset(row.name for row in SESSIONS)


class Daemon:
    """One instance, from its lock to its last file."""

    def __init__(
        self, env: Environment, options: UpOptions, predecessor: Predecessor | None = None
    ) -> None:
        """`predecessor`: the running daemon, whose place this one takes; ours to close."""
        self._env = env
        self._options = options
        self._source = ConfigSource(options)
        self._takeover = Takeover(predecessor)
        if predecessor is not None and not predecessor.offer.is_draining:
            self._source.overrides = dict(predecessor.offer.overrides)
        self._instance = Instance.named(options.instance, env.environ)
        self._loop = Loop()
        self._control: ControlServer | None = None
        self._loaders = Loaders(self._loop, self._take, self._close_in_child)
        self._is_settled = False
        self._walks = walks_of(env.environ)
        self._activation = Activation(env.environ)
        self._last_good = LastGood(self._instance.fleet_file)

    def run(self, on_ready: Callable[[str], None] | None = None) -> int:
        """Serve until told to end; `on_ready` is called once connections are accepted.

        It gets what an operator is to know of the daemon before; empty: nothing.

        Raises:
            ForwarderError: it cannot start; nothing is left behind then.
        """
        with self._hold() as lock:
            # No descriptor of ours may outlive us in a child: a worker would hold the lock.
            self._lock = lock
            # No directory of a caller's stays in use by us, and none of its files is taken.
            os.chdir("/")
            text, config, self._not_kept = read_first(self._source, self._last_good)
            self._prepare(config)
            collecting.settle()
            try:
                self._bind(text, config)
                self._start_loading()
                if self._predecessor is not None:
                    self._takeover.take_place(self._predecessor, self._as_successor())
                self._start(config)
                self._control = ControlServer(
                    self._loop,
                    self._instance.control,
                    self._requests.obey,
                    socket.socket(fileno=self._predecessor.control_fd)
                    if self._predecessor
                    else None,
                )
                self._instance.pid_file.write_text(f"{os.getpid()}\n")
                self._service_manager.keep_watchdog_away()
                self._workers.watch_pulses()
                self._serve_until_settled()
                if not self._ending.has_begun:
                    self._settled()
                    if on_ready is not None:
                        on_ready(self._takeover.remark)
                self._serve()
            finally:
                self._clean_up()
            self._log.write("info", "stopped", version=__version__)
            if not self._retirement.is_retired:
                lock.remove()
        return 0

    # Starting

    def _hold(self) -> InstanceLock:
        """The instance's lock: ours, or the one that we share with the daemon before."""
        if self._predecessor is not None:
            return InstanceLock(self._instance, self._predecessor.lock_fd)
        return acquire(self._instance)

    def _prepare(self, config: Config) -> None:
        """Make what stays for the daemon's life; nobody is served yet."""
        self._log = begin_log(self._env, self._instance, config.log, self._loop, self._options)
        self._service_manager = ServiceManager(self._loop, self._log, self._env.environ)
        # A fault of ours over one event must not end every pair.
        self._loop.on_error = lambda _, error: self._log.fault("supervisor_fault", error)
        user = config.user if os.geteuid() == 0 else None
        if user is not None:
            check_user(user)
        workers = count_workers(config, self._predecessor, self._log)
        if self._predecessor is not None:
            for name, fd in self._predecessor.marks.items():
                unix_names.inherit(name, fd)
        raise_limits(config, workers, self._log)
        if self._predecessor is None:
            remove_stale_pins(self._instance, self._log)
        self._memory = self._takeover.make_memory(
            slots=slots_for(slots_of(config, workers)), workers=workers
        )
        parts = DaemonParts(self._basis(), config, workers=workers, user=user)
        unix_names.drop_inherited()
        self._datapaths, self._in_force = parts.datapaths, parts.in_force
        self._workers, self._helpers = parts.workers, parts.helpers
        self._files, self._requests = parts.files, parts.requests
        self._ending, self._retirement = parts.ending, parts.retirement

    def _basis(self) -> Basis:
        return Basis(
            env=self._env,
            options=self._options,
            instance=self._instance,
            source=self._source,
            takeover=self._takeover,
            last_good=self._last_good,
            activation=self._activation,
            walks=self._walks,
            loaders=self._loaders,
            lock=self._lock,
            memory=self._memory,
            loop=self._loop,
            log=self._log,
            service_manager=self._service_manager,
            control=self._its_control,
            close_in_child=self._close_in_child,
            changed=self._changed,
            end_if_done=self._reap_children,
            why_no_successor=self._why_no_successor,
        )

    def _its_control(self) -> ControlServer:
        assert self._control is not None
        return self._control

    @property
    def _predecessor(self) -> Predecessor | None:
        """The daemon whose place we take, until it has ended."""
        return self._takeover.predecessor

    def _why_no_successor(self) -> str:
        """Why no successor can take our place now; empty: one can."""
        if self._ending.state in (DaemonState.CLOSING, DaemonState.ENDING):
            return "the daemon is ending"
        if not self._is_settled or self._control is None:
            return "the daemon is still starting"
        return ""

    def _bind(self, text: str, config: Config) -> None:
        """Bind the listeners of a configuration: from here on connections wait in the kernel."""
        if self._predecessor is not None:
            self._takeover.inherit_listeners(
                self._predecessor, self._in_force, self._activation, self._helpers.web
            )
        else:
            self._in_force.listeners.restored = stored_sockets.restored(
                self._activation.take(stored_sockets.NAME), self._memory.workers
            )
        change = self._in_force.change_to(text, config)
        self._in_force.take(change)
        if self._predecessor is None:
            self._in_force.commit(change)
        else:
            self._takeover.put_off(change)
        for warning in self._source.warnings(text, config):
            self._log.write("warning", "config", reason=warning)
        # Known before any worker is forked, so that none keeps the socket.
        self._helpers.web.listen(wanted_of(config))
        self._signals = Signals(self._loop, self._signalled)

    def _as_successor(self) -> SucceedingDaemon:
        return SucceedingDaemon(
            in_force=self._in_force,
            memory=self._memory,
            datapaths=self._datapaths,
            workers=self._workers,
            loaders=self._loaders,
            pins=self._instance.bpffs_dir,
            lock=self._lock,
            loop=self._loop,
            log=self._log,
            notify=self._service_manager.notify,
            take=self._take,
            take_spliced=self._take_spliced,
            is_ending=lambda: self._ending.has_begun,
            end_if_done=self._reap_children,
        )

    def _take_spliced(self, loaded: Loaded | LoadError) -> None:
        """Go on with what the daemon before has spliced."""
        self._datapaths.take("splice", loaded)
        self._workers.take_over_spliced()
        if self._is_settled:
            self._datapaths.pin()
            self._helpers.failover.begin()
        self._workers.datapaths_are_settled()
        self._prove_sessions()
        self._loop.stop()

    def _start_loading(self) -> None:
        """Have the kernel's programs loaded and proven beside us: that takes seconds.

        Where an earlier daemon's pairs go on, and their ports are not ours to use, before all else.
        """
        parts = self._datapaths.parts()
        predecessor = self._predecessor
        # One for each processor of a small machine: two compilers want memory enough.
        for some in (parts, self._files.parts()):
            if some:
                self._loaders.start(
                    some,
                    # The predecessor serves meanwhile, unless it drains.
                    is_in_no_hurry=predecessor is not None and not predecessor.offer.is_draining,
                )
        if self._datapaths.must_come_first:
            self._log.write("info", "taking_over", datapaths=",".join(parts))
            for name, loaded in self._loaders.wait_for_first():
                self._take(name, loaded)
        self._loaders.watch()

    def _prove_sessions(self) -> None:
        """Have the kernel's sessions proven beside us, once a listener may use them."""
        if not self._is_settled or self._ending.has_begun or self._retirement.is_retired:
            return
        parts = self._datapaths.parts_of_sessions(self._in_force.config)
        if parts:
            self._loaders.watch_more(parts)

    def _take(self, name: str, loaded: Loaded | LoadError) -> None:
        if name in _SESSIONS:
            self._datapaths.take_sessions(name, loaded)
            self._workers.send_datapaths()
            self._helpers.web.renew()
            return
        if name == "view":
            self._files.take(loaded)
        else:
            self._datapaths.take(name, loaded)
            if not self._datapaths.in_preparation and self._workers.living:
                self._workers.datapaths_are_settled()
        if self._loaders.is_over and not self._ending.has_begun and self._predecessor is None:
            self._loop.stop()

    def _serve_until_settled(self) -> None:
        """Serve; connections are copied as long as it is not known what else there is."""
        self._log.write(
            "info",
            "accepting",
            listeners=len(self._in_force.listeners.bound),
            datapath="copy" if self._datapaths.in_preparation else "",
            in_preparation=",".join([*self._datapaths.in_preparation, "view"]),
        )
        if self._predecessor is None or self._takeover.waits_for_spliced:
            self._loop.run()
        self._loop.running = not self._ending.stops

    def _settled(self) -> None:
        """All is there that will be: tell everybody."""
        self._is_settled = True
        if not self._datapaths.in_preparation:
            self._datapaths.pin()
        self._files.open(self._requests.obey, self._requests.show)
        # First: a reader that waits for the words on standard output may look into the log then.
        self._log.write(
            "info",
            "started",
            version=__version__,
            config=self._source.name,
            listeners=len(self._in_force.listeners.bound),
            workers=self._memory.workers,
            **{f"datapath_{name}": state for name, state in self._datapaths.states.items()},
        )
        # The web process was told of datapaths that were in preparation.
        self._helpers.web.renew()
        self._announce()
        self._datapaths.watch()
        self._datapaths.look_for_left(looks=True)
        self._helpers.failover.begin()
        # A reload that came meanwhile may have sessions to prove.
        self._prove_sessions()

    def _start(self, config: Config) -> None:
        if self._predecessor is None:
            if not self._datapaths.in_preparation:
                self._workers.datapaths_are_settled()
            self._workers.start()
        if self._not_kept:
            self._log.write("warning", "fleet_not_kept", error=self._not_kept)
        self._helpers.start(config)

    def _close_in_child(self, *, is_web: bool = False) -> None:
        """Close what is the supervisor's alone, in a new child."""
        # With `--detach` the command's own output is inherited too, and its reader (a shell's
        # `$(...)`, an installer) waits for an end of file that only the last holder brings.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        self._signals.close_in_child()
        self._lock.close()
        self._workers.close_in_child()
        self._loaders.close_in_child()
        self._in_force.listeners.close_in_child()
        self._helpers.close_in_child(is_web=is_web)
        for fd in self._control.fds() if self._control is not None else ():
            os.close(fd)
        for fd in self._retirement.fds():
            os.close(fd)
        self._takeover.close_in_child(has_control=self._control is None)
        self._files.close_in_child()
        self._loop.dispose()

    def _announce(self) -> None:
        # The reader of the earlier daemon's output may have gone, and that is no reason to end.
        unheard = (OSError,) if self._takeover.has_taken else ()
        with contextlib.suppress(*unheard):
            for name, binds in self._in_force.listeners.binds().items():
                self._print_addresses(name, binds)
            self._env.stdout.flush()
        self._keep_sockets()
        self._service_manager.notify("READY=1")

    def _keep_sockets(self) -> None:
        self._service_manager.keep_sockets(self._in_force.listeners.sockets())

    def _print_addresses(self, name: str, binds: Sequence[Address | UnixAddress]) -> None:
        for entry in bind_entries(binds):
            self._env.stdout.write(f"listening on {entry} ({name})\n")

    # Serving

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            if self._ending.has_begun:
                self._ending.stop()
            else:
                self._ending.begin()
        elif number == signal.SIGHUP:
            self._reload_on_signal()
        elif number == signal.SIGCHLD:
            self._reap_children()
        elif number == signal.SIGIO:
            self._files.asked()

    def _serve(self) -> None:
        self._loop.run()
        # While SIGIO, which ends a process that does not expect it, is ours.
        self._files.close_proc()
        self._signals.restore()

    def _reap_children(self) -> None:
        self._helpers.reap()
        self._workers.reap()
        # The daemon before may have pairs still, which would not outlive a service's main process;
        # and who gets ready to take our place wants to be told what we have.
        is_last = self._predecessor is None and not self._retirement.is_under_way
        if self._ending.has_begun and self._workers.have_ended and is_last:
            self._loop.stop()

    # Changing

    def _reload_on_signal(self) -> None:
        self._service_manager.notify("RELOADING=1")
        # What went wrong is in the log by then.
        with contextlib.suppress(ForwarderError):
            self._requests.obey({"do": "reload"}, [])
        self._service_manager.notify("READY=1")

    def _changed(self, before: Mapping[str, Sequence[Address | UnixAddress]]) -> None:
        """Another configuration is in force; `before` is where listeners were."""
        self._prove_sessions()
        if self._is_settled:
            self._keep_sockets()
        for name, binds in self._in_force.listeners.binds().items():
            # Before, `_announce` tells of all.
            if self._is_settled and before.get(name) != binds:
                self._print_addresses(name, binds)
        self._env.stdout.flush()

    # Ending

    def _clean_up(self) -> None:
        """End every process and leave nothing behind, however far the start has come."""
        self._service_manager.finish()
        self._loaders.close()
        self._helpers.close()
        self._workers.close()
        self._in_force.listeners.close()
        if self._control is not None:
            self._control.close()
        self._retirement.close()
        self._takeover.close()
        is_ours = self._predecessor is None or self._takeover.has_taken
        is_ours = is_ours and not self._retirement.is_retired
        if is_ours:
            self._instance.pid_file.unlink(missing_ok=True)
            self._files.close_proc()
        # The pins of splice are in a directory of the view's, which goes once nothing is in it.
        self._datapaths.close()
        if is_ours:
            self._files.close_view()
        elif self._retirement.is_retired:
            self._files.leave()
        self._memory.close()
