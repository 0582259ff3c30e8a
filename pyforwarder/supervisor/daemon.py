"""The daemon: starts everything in the right order, and ends it in the reverse order.

What each part does is in a module of its own; here is only what comes before what, and who is
told of whom.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.kernel import slots_for
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.instance import Instance, acquire
from pyforwarder.loop import Loop
from pyforwarder.supervisor.checking import CheckerProcess
from pyforwarder.supervisor.configuration import ConfigSource, InForce
from pyforwarder.supervisor.control import ControlServer
from pyforwarder.supervisor.datapaths import Datapaths
from pyforwarder.supervisor.files import Files, remove_stale_pins
from pyforwarder.supervisor.log_file import LOOK_S, keep_small, open_log
from pyforwarder.supervisor.memory import SharedMemory
from pyforwarder.supervisor.requests import Requests
from pyforwarder.supervisor.scraping import MetricsProcess, source_in_child
from pyforwarder.supervisor.signals import Signals
from pyforwarder.supervisor.worker_pool import WorkerPool
from pyforwarder.supervisor.workers import check_user
from pyforwarder.worker.log import Log, impatient
from pyforwarder.worker.process import most_clients

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.environment import Environment
    from pyforwarder.supervisor import UpOptions

# A helper process that has died is replaced after this long.
_PAUSE_S: Final = 1.0
# How long workers have to reset and close what is left, once they are told to stop.
_STOP_S: Final = 5.0


class Daemon:
    """One instance, from its lock to its last file."""

    def __init__(self, env: Environment, options: UpOptions) -> None:
        self._env = env
        self._options = options
        self._source = ConfigSource(options)
        self._instance = Instance.named(options.instance, env.environ)
        self._loop = Loop()
        self._control: ControlServer | None = None
        self._has_children = False
        self._ending = False
        self._stop_asked = False
        self._started_unix_s = env.unix_time_s()

    def run(self, on_ready: Callable[[], None] | None = None) -> int:
        """Serve until told to end; `on_ready` is called once connections are accepted.

        Raises:
            ForwarderError: it cannot start; nothing is left behind then.
        """
        with acquire(self._instance) as lock:
            # No descriptor of ours may outlive us in a child: a worker would hold the lock.
            self._lock = lock
            text, config = self._source.read()
            self._prepare(config)
            try:
                self._bind_and_start(text, config)
                self._control = ControlServer(
                    self._loop, self._instance.control, self._requests.obey
                )
                self._instance.pid_file.write_text(f"{os.getpid()}\n")
                self._datapaths.pin()
                self._files.open(self._requests.obey, self._requests.show)
                self._announce()
                self._datapaths.look_at_keeper()
                if on_ready is not None:
                    on_ready()
                self._serve()
            finally:
                self._clean_up()
            lock.remove()
        return 0

    # Starting

    def _prepare(self, config: Config) -> None:
        """Make what stays for the daemon's life; nobody is served yet."""
        self._log = Log(
            level=config.log.level,
            form=config.log.format,
            fd=impatient(self._log_fd()),
            is_timed="JOURNAL_STREAM" not in self._env.environ,  # journald adds its own
        )
        user = config.user if os.geteuid() == 0 else None
        if user is not None:
            check_user(user)
        workers = (os.cpu_count() or 1) if config.workers == "auto" else int(config.workers)
        workers = min(workers, 255)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        clients = most_clients(config.limits.pairs)
        if clients * workers < config.limits.pairs:
            self._log.write(
                "warning",
                "few_descriptors",
                limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                pairs_per_worker=clients,
                configured=config.limits.pairs,
            )
        remove_stale_pins(self._instance, self._log)
        self._memory = SharedMemory(workers=workers, slots=slots_for(clients))
        self._datapaths = Datapaths(
            config,
            self._memory,
            pins=self._instance.bpffs_dir,
            user=user,
            loop=self._loop,
            log=self._log,
            close_in_child=self._close_in_keeper,
        )
        self._in_force = InForce(
            self._source,
            workers=workers,
            directory=self._memory.directory,
            mtu=self._datapaths.mtu,
        )
        self._workers = WorkerPool(
            self._in_force,
            self._memory,
            self._datapaths,
            user=user,
            loop=self._loop,
            log=self._log,
            close_in_child=self._close_in_child,
            down=lambda: self._checks.down,
        )
        self._files = Files(
            self._instance,
            self._in_force,
            self._memory,
            self._datapaths,
            loop=self._loop,
            log=self._log,
            unix_time_s=self._env.unix_time_s,
        )
        self._metrics = MetricsProcess(
            lambda: source_in_child(
                self._in_force,
                self._memory,
                self._datapaths.states,
                started_unix_s=self._started_unix_s,
            ),
            user=user,
            close_in_child=lambda: self._close_in_child(is_metrics=True),
        )
        self._checks = CheckerProcess(
            self._loop,
            user=user,
            close_in_child=self._close_in_child,
            tell=self._workers.tell_of_health,
        )
        self._requests = Requests(
            self._source,
            self._in_force,
            self._memory,
            self._datapaths,
            self._workers,
            self._files,
            loop=self._loop,
            log=self._log,
            change_to=self._change_to,
            drain=self._end,
            stop=self._stop,
        )

    def _log_fd(self) -> int:
        """Standard error, or in the background the instance's log file."""
        if self._options.detach:
            fd = open_log(self._instance.log_file)
            os.dup2(fd, 2)
            os.close(fd)
            self._keep_log_small()
        return 2

    def _keep_log_small(self) -> None:
        keep_small(self._instance.log_file)
        self._loop.after(LOOK_S, self._keep_log_small)

    def _bind_and_start(self, text: str, config: Config) -> None:
        change = self._in_force.change_to(text, config)
        self._in_force.take(change)
        self._in_force.commit(change)
        # Known before any worker is forked, so that none keeps the socket.
        wanted = config.metrics.bind if config.metrics else None
        self._metrics.listener = self._metrics.change_to(wanted)
        self._signals = Signals(self._loop, self._signalled)
        # From here on another keeper, too, inherits more than the lock.
        self._has_children = True
        self._workers.start()
        self._checks.change_to(config.upstreams)
        self._metrics.start()
        if self._metrics.listener is not None:
            self._log.write("info", "metrics", bind=str(self._metrics.listener.bind))

    def _close_in_keeper(self) -> None:
        """In a new keeper of spliced pairs; the first is forked before there is anything else."""
        if self._has_children:
            self._close_in_child()
        else:
            self._lock.close()

    def _close_in_child(self, *, is_metrics: bool = False) -> None:
        """In a new child: close what is the supervisor's alone."""
        # With `--detach` the command's own output is inherited too, and whoever reads it (a shell's
        # `$(...)`, an installer) waits for an end of file that only the last holder brings.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        self._signals.restore()
        self._lock.close()
        self._workers.close_in_child()
        self._in_force.listeners.close_in_child()
        if not is_metrics:
            self._metrics.close_socket()
        self._checks.close_channel()
        for fd in self._control.fds() if self._control is not None else ():
            os.close(fd)
        self._files.close_in_child()
        self._signals.close()
        self._loop.dispose()

    def _announce(self) -> None:
        for name, listener in self._in_force.listeners.bound.items():
            self._env.stdout.write(f"listening on {listener.bind} ({name})\n")
        self._env.stdout.flush()
        self._notify("READY=1")

    def _notify(self, state: str) -> None:
        """Tell systemd, if it asked to be told (sd_notify(3))."""
        path = self._env.environ.get("NOTIFY_SOCKET")
        if not path:
            return
        address = "\0" + path[1:] if path.startswith("@") else path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(state.encode(), address)
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror)

    # Serving

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            if self._ending:
                self._stop()
            else:
                self._end()
        elif number == signal.SIGHUP:
            self._reload_on_signal()
        elif number == signal.SIGCHLD:
            self._look_after_children()
        elif number == signal.SIGIO:
            self._files.asked()

    def _serve(self) -> None:
        self._loop.run()
        # While SIGIO, which ends a process that does not expect it, is ours.
        self._files.close_proc()
        self._signals.restore()

    def _look_after_children(self) -> None:
        if self._metrics.has_died() and not self._ending:
            self._log.write("error", "metrics_died")
            self._restart_later("metrics", self._metrics.start)
        if self._checks.has_died() and not self._ending:
            self._log.write("error", "health_checks_died")
            self._restart_later("health_checks", self._checks.start)
        if self._datapaths.keeper_has_died() and not self._ending:
            # Pairs that are spliced go on meanwhile.
            self._log.write("error", "splice_keeper_died")
            self._restart_later("splice_keeper", self._datapaths.restart_keeper)
        self._workers.look_after()
        if self._ending and not self._workers.living:
            self._loop.stop()

    def _restart_later(self, name: str, start: Callable[[], None]) -> None:
        """After a pause, and not if we are ending by then."""

        def restart() -> None:
            if self._ending:
                return
            try:
                start()
            except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
                self._log.write("error", "restart", process=name, error=str(error))
                self._restart_later(name, start)

        self._loop.after(_PAUSE_S, restart)

    # Changing

    def _reload_on_signal(self) -> None:
        self._notify("RELOADING=1")
        # What went wrong is in the log by then.
        with contextlib.suppress(ForwarderError):
            self._requests.obey({"do": "reload"}, [])
        self._notify("READY=1")

    def _change_to(self, text: str, config: Config) -> None:
        """Put a configuration in force.

        Everything that can fail comes before the first change, so an error changes nothing.
        """
        if self._ending:
            raise ControlError("the daemon is ending")
        change = self._in_force.change_to(text, config)
        try:
            metrics = self._metrics.change_to(config.metrics.bind if config.metrics else None)
        except ForwarderError:
            self._in_force.abandon(change)
            raise
        before = self._in_force.listeners.binds()
        self._in_force.take(change)
        self._log.change(level=config.log.level, form=config.log.format)
        self._workers.configure()
        self._in_force.commit(change)
        self._files.describe_listeners()
        self._metrics.commit(metrics)
        self._checks.change_to(config.upstreams)
        self._files.port_changed()
        for name, listener in change.following.items():
            if before.get(name) != str(listener.bind):
                self._env.stdout.write(f"listening on {listener.bind} ({name})\n")
        self._env.stdout.flush()

    # Ending

    def _end(self) -> None:
        """Accept no more, let pairs finish until the drain deadline, then stop."""
        if self._ending:
            return
        self._ending = True
        self._notify("STOPPING=1")
        self._in_force.listeners.close()
        self._workers.end("drain")
        self._loop.after(self._in_force.config.timeouts.drain_s, self._stop)
        self._look_after_children()

    def _stop(self) -> None:
        """Reset what is left and end."""
        if self._stop_asked:
            return
        self._stop_asked = True
        self._ending = True
        self._in_force.listeners.close()
        self._workers.end("stop")
        self._loop.after(_STOP_S, self._loop.stop)
        self._look_after_children()

    def _clean_up(self) -> None:
        """End every process and leave nothing behind, however far the start has come."""
        self._metrics.close()
        self._checks.close()
        self._workers.close()
        self._in_force.listeners.close()
        if self._control is not None:
            self._control.close()
        self._instance.pid_file.unlink(missing_ok=True)
        self._files.close_proc()
        # The pins of splice are in a directory of the view's, which goes once nothing is in it.
        self._datapaths.close()
        self._files.close_view()
        self._memory.close()
