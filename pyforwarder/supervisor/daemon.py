"""The daemon: starts everything in the right order, and ends it in the reverse order."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from pyforwarder import __version__, tables
from pyforwarder.address import Address, AddressError, parse_port
from pyforwarder.config import Config, parse_config, read_config_text
from pyforwarder.counters import Counters, Directory
from pyforwarder.datapath import bpf
from pyforwarder.datapath.abi import PAIR_BYTES
from pyforwarder.datapath.arrays import Arrays
from pyforwarder.datapath.kernel import KernelMaps, PairTable, slots_for
from pyforwarder.datapath.selftest import prove_sockmap, prove_splice
from pyforwarder.datapath.splice_keeper import KeeperError, Splicing, pins_of
from pyforwarder.datapath.splice_maps import SpliceMaps, smallest_mtu
from pyforwarder.descriptors import duplicate_socket
from pyforwarder.errors import (
    ConfigError,
    ControlError,
    ForwarderError,
    InternalError,
    LoadError,
    UsageError,
)
from pyforwarder.instance import Instance, acquire
from pyforwarder.key_files import read_keys, read_passwords
from pyforwarder.limits import new_secret, shared_memory
from pyforwarder.loop import EPOLLIN, Loop
from pyforwarder.routing import compile_rules
from pyforwarder.supervisor import bpffs, report
from pyforwarder.supervisor.checking import CheckerProcess
from pyforwarder.supervisor.control import ControlServer
from pyforwarder.supervisor.listeners import BoundListener, Listeners
from pyforwarder.supervisor.log_file import LOOK_S, keep_small, open_log
from pyforwarder.supervisor.proc import ProcDirectory
from pyforwarder.supervisor.scraping import MetricsProcess
from pyforwarder.supervisor.views import View, remove_stale
from pyforwarder.supervisor.workers import WorkerProcess, ask_all, check_user
from pyforwarder.worker.adopting import cookie_of
from pyforwarder.worker.channel import MOST_LISTENERS, Channel, text_to_fd
from pyforwarder.worker.generation import Settings, counter_indexes, with_overrides
from pyforwarder.worker.log import Log, impatient
from pyforwarder.worker.process import Inheritance, most_clients
from pyforwarder.worker.used_tokens import SharedUsedTokens

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.environment import Environment
    from pyforwarder.health import Verdict
    from pyforwarder.metrics import Source
    from pyforwarder.supervisor import UpOptions

# A worker that dies again this soon after its start is replaced only after a pause.
_SOON_S: Final = 1.0
_PAUSE_S: Final = 1.0
_LOOK_AT_KEEPER_S: Final = 2.0
# How often a keeper is asked for a dead worker's pairs, once a second, before another worker comes
# all the same: a keeper that hangs is replaced sooner.
_BURIALS: Final = 15
# How long workers have to reset and close what is left, once they are told to stop.
_STOP_S: Final = 5.0
# SIGIO: somebody wants to open a file of the pseudo-/proc.
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGIO)


_NOT_WANTED: Final = "not wanted by the configuration"
# What a running daemon cannot change any more.
_FIXED: Final = ("workers", "user")

# The view's files and what `show` calls them.
_RENDERED: Final = (("show", "pairs"), ("stats", "stats"), ("listeners", "listeners"))


class Daemon:
    """One instance, from its lock to its last file."""

    def __init__(self, env: Environment, options: UpOptions) -> None:
        self._env = env
        self._options = options
        self._overrides = {
            key: value
            for key, value in (("listen", options.listen), ("datapath", options.datapath))
            if value is not None
        }
        self._instance = Instance.named(options.instance, env.environ)
        self._loop = Loop()
        self._directory = Directory()
        self._workers: list[WorkerProcess] = []
        self._arrays: Arrays | None = None
        self._maps: KernelMaps | None = None
        self._splicing: Splicing | None = None
        self._view: View | None = None
        self._proc: ProcDirectory | None = None
        self._datapaths: dict[str, str] = {}
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
            settings, config = self._read_config()
            self._prepare(config)
            listeners = self._listeners = Listeners(self._count)
            control: ControlServer | None = None
            try:
                self._bind_and_start(settings, config)
                control = self._control = ControlServer(
                    self._loop, self._instance.control, self._obey
                )
                self._instance.pid_file.write_text(f"{os.getpid()}\n")
                self._pin_splice()
                self._open_view()
                self._announce()
                self._look_at_keeper()
                if on_ready is not None:
                    on_ready()
                self._serve()
            finally:
                self._metrics.close()
                self._checks.close()
                for worker in self._workers:
                    worker.kill()
                    worker.close()
                listeners.close()
                if control is not None:
                    control.close()
                self._clean_up()
            lock.remove()
        return 0

    # Starting

    def _read_config(self) -> tuple[str, Config]:
        path = self._options.config_path
        text = "" if path is None else read_config_text(path)
        return text, self._parse(text)

    def _parse(self, text: str) -> Config:
        path = self._options.config_path
        config = parse_config(text, source="built-in" if path is None else str(path))
        config = with_overrides(config, self._overrides)
        if len(config.listeners) > MOST_LISTENERS:
            raise ConfigError(f"more than {MOST_LISTENERS} listeners", path="listeners")
        return config

    def _prepare(self, config: Config) -> None:
        """What stays for the daemon's life: workers, tables, maps."""
        self._log = Log(
            level=config.log.level,
            form=config.log.format,
            fd=impatient(self._log_fd()),
            is_timed="JOURNAL_STREAM" not in self._env.environ,  # journald adds its own
        )
        self._user = config.user if os.geteuid() == 0 else None
        if self._user is not None:
            check_user(self._user)
        self._count = (os.cpu_count() or 1) if config.workers == "auto" else int(config.workers)
        self._count = min(self._count, 255)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        clients = most_clients(config.limits.pairs)
        if clients * self._count < config.limits.pairs:
            self._log.write(
                "warning",
                "few_descriptors",
                limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                pairs_per_worker=clients,
                configured=config.limits.pairs,
            )
        self._limits_memory = shared_memory(self._count)
        self._secret = new_secret()
        self._used_tokens = SharedUsedTokens()
        self._slots = slots_for(clients)
        self._remove_stale_pins()
        self._make_tables()
        self._maps = self._load(config)
        self._splicing = self._load_splice(config)
        self._view = self._load_view()
        self._metrics = MetricsProcess(
            self._metrics_source,
            user=self._user,
            close_in_child=lambda: self._close_in_child(is_metrics=True),
        )
        self._checks = CheckerProcess(
            self._loop,
            user=self._user,
            close_in_child=self._close_in_child,
            tell=self._tell_of_health,
        )

    def _remove_stale_pins(self) -> None:
        """Clean up after a daemon that was killed, and tell of what is not simply our own."""
        found = remove_stale(self._instance.bpffs_dir)
        where = found.directory
        if found.is_of_another_version:
            version = found.stamp.version if found.stamp else "unknown"
            self._log.write("info", "pins_replaced", directory=where, version=version)
        if found.foreign:
            names = ",".join(found.foreign)
            self._log.write("warning", "pins_left_alone", directory=where, names=names)

    def _make_tables(self) -> None:
        """The shared memory: BPF arrays for the kernel to read, or anonymous where it may not."""
        self._no_arrays: LoadError | None = None
        try:
            self._arrays = Arrays.create(workers=self._count, slots=self._slots)
        except LoadError as error:
            self._no_arrays = error
        self._counters_memory = (
            self._arrays.counters_memory(self._count)
            if self._arrays
            else Counters.memory(self._count)
        )
        self._counters = Counters(self._counters_memory, self._count)
        self._table = PairTable(
            workers=self._count,
            slots=self._slots,
            fd=self._arrays.pairs_fd if self._arrays else -1,
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

    def _load(self, config: Config) -> KernelMaps | None:
        """The kernel's part, proven to work; None with the reason in `datapaths`."""
        self._datapaths = {"copy": "available", "splice": _NOT_WANTED}
        if not _kernel_choices(config):
            self._datapaths["sockmap"] = _NOT_WANTED
            return None
        try:
            if self._arrays is None:
                raise self._no_arrays or LoadError("no BPF maps")
            maps = KernelMaps.load(
                workers=self._count, slots=self._slots, pairs_fd=self._arrays.pairs_fd
            )
        except LoadError as error:
            self._datapaths["sockmap"] = str(error)
            self._log.write("warning", "no_sockmap", reason=str(error))
            return None
        proof = prove_sockmap(maps, slots=self._slots, user=self._user)
        if not proof.passed:
            maps.close()
            self._datapaths["sockmap"] = f"failed its self-test: {proof.reason}"
            self._log.write("warning", "no_sockmap", reason=self._datapaths["sockmap"])
            return None
        self._datapaths["sockmap"] = "available"
        return maps

    def _load_splice(self, config: Config) -> Splicing | None:
        """The same for splice; also where it is not wanted, if there are pairs that go on."""
        pins = pins_of(self._instance.bpffs_dir)
        if "splice" not in _kernel_choices(config) and not pins.is_dir():
            return None
        try:
            splicing = self._proven_splice(pins)
        except LoadError as error:
            self._datapaths["splice"] = str(error)
            self._log.write("warning", "no_splice", reason=str(error))
            return None
        self._datapaths["splice"] = "available"
        return splicing

    def _pin_splice(self) -> None:
        """From here on spliced pairs outlive us.

        Not before we serve: if we cannot, what an earlier daemon left must stay as it was.
        """
        if self._splicing is None:
            return
        try:
            bpffs.enter(self._instance.bpffs_dir.parent)
            self._splicing.maps.pin()
        except ForwarderError as error:
            # It works, and ends with us.
            self._log.write("warning", "splice_not_pinned", reason=str(error))

    def _proven_splice(self, pins: Path) -> Splicing:
        if self._arrays is None:
            raise self._no_arrays or LoadError("no BPF maps")
        pairs_fd = self._arrays.pairs_fd
        maps = SpliceMaps.load(workers=self._count, slots=self._slots, pairs_fd=pairs_fd, pins=pins)
        if maps.has_replaced:
            self._log.write("warning", "splice_pins_replaced", directory=pins)
        splicing = Splicing(
            maps,
            workers=self._count,
            # One that is started later inherits more.
            close_in_child=lambda: self._close_in_child() if self._workers else self._lock.close(),
        )
        proof = prove_splice(splicing, pairs_fd=pairs_fd, slots=self._slots, user=self._user)
        if not proof.passed:
            splicing.close()
            raise LoadError(f"failed its self-test: {proof.reason}")
        return splicing

    def _load_view(self) -> View | None:
        """The iterators, not yet pinned; None (and why, in the log) where they cannot be."""
        try:
            if self._arrays is None:
                raise self._no_arrays or LoadError("no BPF maps")
            return View.load(self._arrays, self._maps, workers=self._count, slots=self._slots)
        except LoadError as error:
            self._log.write("warning", "no_view", reason=str(error))
            return None

    def _open_view(self) -> None:
        """Make the files that show and steer us, now that there is something to show.

        Raises:
            ForwarderError: the pseudo-/proc cannot be made.
        """
        pins = None
        if self._view is not None:
            self._view.set_stats(report.stats_lines(self._datapaths))
            self._describe_listeners()
            try:
                self._view.pin(self._instance.bpffs_dir)
                pins = self._instance.bpffs_dir
            except ForwarderError as error:
                self._log.write("warning", "no_view", reason=str(error))
        self._proc = ProcDirectory(
            self._loop,
            self._instance.proc_dir,
            obey=self._obey,
            unix_time_s=self._env.unix_time_s,
            refused=lambda name, reason: self._log.write(
                "warning", "write_refused", file=name, reason=reason
            ),
            pins=pins,
            render={name: lambda what=what: self._render(what) for name, what in _RENDERED},  # type: ignore[misc]
        )

    def _render(self, what: str) -> str:
        """What the view would say, made by us; the remark goes where the kernel puts its own."""
        rows: Any = self._show(what)
        text = tables.render(what, list(tables.stats_rows(rows)) if what == "stats" else rows)
        header, _, rest = text.partition("\n")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._env.unix_time_s()))
        remark = f"# as of {when}, said by the daemon (pid {os.getpid()}): no BPF view here"
        return f"{header}  {remark}\n{rest}"

    def _describe_listeners(self) -> None:
        """Tell the view which listeners there are."""
        if self._view is not None:
            lines = report.listener_lines(self._config, self._binds(), self._directory)
            told = self._view.set_listeners(lines)
            if told < len(lines):
                self._log.write("warning", "view_is_full", listeners=len(lines), shown=told)

    def _binds(self) -> dict[str, str]:
        return {name: str(listener.bind) for name, listener in self._listeners.bound.items()}

    def _bind_and_start(self, text: str, config: Config) -> None:
        following, obsolete = self._listeners.change_to(config)
        self._listeners.commit(config, following, obsolete)
        self._settings = self._make_settings(text, config, following)
        self._config = config
        self._limit_packets()
        # Known before any worker is forked, so that none keeps the socket.
        wanted = config.metrics.bind if config.metrics else None
        self._metrics.listener = self._metrics.change_to(wanted)
        self._watch_signals()
        found = self._splicing.maps.found if self._splicing is not None else ()
        # A new pair must not be given the number of one that goes on.
        self._last_id = max((one.id for one in found), default=0)
        for index in range(self._count):
            # While there are ports to be taken over, nobody may connect anywhere yet.
            self._workers.append(self._start_worker(index, listening=not found))
        for index in range(self._count) if found else ():
            self._configure(self._workers[index], index)
        self._checks.change_to(config.upstreams)
        self._metrics.start()
        if self._metrics.listener is not None:
            self._log.write("info", "metrics", bind=str(self._metrics.listener.bind))

    def _make_settings(
        self, text: str, config: Config, bound: dict[str, BoundListener]
    ) -> Settings:
        """What workers are told; compiles the rules once, so that they cannot fail over it.

        Raises:
            ConfigError: a rule or a key file cannot be used.
        """
        keys, passwords = read_keys(config), read_passwords(config)
        for index, listener in enumerate(config.listeners):
            compile_rules(listener, None, passwords=passwords, path=f"listeners[{index}]")
        path = self._options.config_path
        return Settings(
            config_text=text,
            source="built-in" if path is None else str(path),
            overrides=self._overrides,
            keys=keys,
            binds={name: str(listener.bind) for name, listener in bound.items()},
            indexes=counter_indexes(config, self._directory),
            passwords=passwords,
            mtus=self._mtus(config),
        )

    def _mtus(self, config: Config) -> dict[str, int]:
        """What packets may have where pairs can be spliced between interfaces."""
        mtu = smallest_mtu() if self._splicing is not None else 0
        return {
            listener.name: mtu
            for listener in config.listeners
            if mtu
            and listener.splice
            and isinstance(listener.bind, Address)
            and not ipaddress.ip_address(listener.bind.host).is_loopback
        }

    def _limit_packets(self) -> None:
        for name, listener in self._listeners.bound.items():
            listener.limit_packets(self._settings.mtus.get(name, 0))

    def _start_worker(self, index: int, *, listening: bool = True) -> WorkerProcess:
        def make(channel: Channel) -> Inheritance:
            return Inheritance(
                worker=index,
                workers=self._count,
                channel=channel,
                counters_memory=self._counters_memory,
                limits_memory=self._limits_memory,
                limits_secret=self._secret,
                table=self._table,
                maps=self._maps,
                used_tokens=self._used_tokens,
                user=self._user,
                splicing=self._splicing,
                log=self._log,
                last_id=self._last_id,
            )

        worker = WorkerProcess(make, self._close_in_child)
        try:
            self._configure(worker, index, listening=listening)
        except ForwarderError:
            worker.kill()
            worker.close()
            raise
        for verdict in self._checks.down:
            self._say_health(worker, verdict)
        self._loop.watch(worker.channel.fileno(), EPOLLIN, self._hear, worker)
        return worker

    def _hear(self, worker: WorkerProcess, fd: int, _mask: int) -> None:
        if not worker.hear():
            self._loop.forget(fd)  # SIGCHLD does the rest

    def _configure(self, worker: WorkerProcess, index: int, *, listening: bool = True) -> None:
        names = list(self._listeners.bound) if listening else []
        worker.may_be_transparent = any(u.transparent for u in self._config.upstreams.values())
        text_fd = text_to_fd(self._settings.to_json())
        try:
            fds = [self._listeners.bound[name].socket_of(index).fileno() for name in names]
            worker.ask("settings", [text_fd, *fds], listeners=names)
        finally:
            os.close(text_fd)

    def _close_in_child(self, *, is_metrics: bool = False) -> None:
        """In a new worker: close what is the supervisor's alone."""
        # With `--detach` the command's own output is inherited too, and whoever reads it (a shell's
        # `$(...)`, an installer) waits for an end of file that only the last holder brings.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._lock.close()
        for other in self._workers:
            other.close()
        for listener in self._listeners.bound.values():
            for sock in listener.sockets:
                sock.close()
        if not is_metrics:
            self._metrics.close_socket()
        self._checks.close_channel()
        control = getattr(self, "_control", None)
        for fd in control.fds() if control is not None else ():
            os.close(fd)
        for fd in self._proc.fds() if self._proc is not None else ():
            os.close(fd)
        if self._view is not None:
            self._view.close()
        self._wakeup_read.close()
        self._wakeup_write.close()
        self._loop.dispose()

    def _announce(self) -> None:
        for name, listener in self._listeners.bound.items():
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

    def _watch_signals(self) -> None:
        self._wakeup_read, self._wakeup_write = socket.socketpair()
        self._wakeup_read.setblocking(False)
        self._wakeup_write.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_write.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            # The handler does nothing; the wakeup descriptor carries the number to the loop.
            signal.signal(number, lambda *_: None)
        self._loop.watch(self._wakeup_read.fileno(), EPOLLIN, self._signalled, self)

    def _signalled(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            numbers = self._wakeup_read.recv(256)
        except BlockingIOError:
            return
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM):
                if self._ending:
                    self._stop()
                else:
                    self._end()
            elif number == signal.SIGHUP:
                self._reload_on_signal()
            elif number == signal.SIGCHLD:
                self._look_after_workers()
            elif number == signal.SIGIO and self._proc is not None:
                self._proc.asked()

    def _serve(self) -> None:
        self._loop.run()
        if self._proc is not None:
            self._proc.close()  # while SIGIO, which ends a process that does not expect it, is ours
            self._proc = None
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _metrics_source(self) -> Source:
        """In the metrics process: what it tells, from memory that it cannot write."""
        from pyforwarder.metrics import Source

        windows, counters = self._table.windows, self._counters
        if self._arrays is not None:
            length = self._slots * PAIR_BYTES
            windows = [
                bpf.map_memory(
                    self._arrays.pairs_fd, length, offset_bytes=worker * length, write=False
                )
                for worker in range(self._count)
            ]
            for window in self._table.windows:
                window.close()
            counters.close()
            self._counters_memory.close()
            self._limits_memory.close()
            self._used_tokens.close()
            counters = Counters(self._arrays.counters_memory(self._count, write=False), self._count)
        listeners = self._config.listeners
        return Source(
            version=__version__,
            started_unix_s=self._started_unix_s,
            workers=self._count,
            counters=counters,
            windows=windows,
            listeners={
                listener.name: self._directory.index(listener.name) for listener in listeners
            },
            rules={
                (listener.name, rule.name): self._directory.index(listener.name, rule.name)
                for listener in listeners
                for rule in listener.rules
            },
            datapaths=self._datapaths,
        )

    def _restart_keeper(self) -> None:
        if not self._ending and self._splicing is not None:
            self._splicing.keeper.restart()

    def _look_at_keeper(self) -> None:
        if self._splicing is not None:
            if self._splicing.keeper.hangs():
                self._log.write("error", "splice_keeper_hangs", pid=self._splicing.keeper.pid)
                self._splicing.keeper.kill()
            self._loop.after(_LOOK_AT_KEEPER_S, self._look_at_keeper)

    def _restart_metrics(self) -> None:
        if not self._ending:
            self._metrics.start()

    def _restart_checks(self) -> None:
        if not self._ending:
            self._checks.start()

    def _tell_of_health(self, verdict: Verdict) -> None:
        """Every worker learns that a server went up or down."""
        self._log.write(
            "info" if verdict.up else "warning",
            "server_up" if verdict.up else "server_down",
            upstream=verdict.upstream,
            server=verdict.server,
            why=verdict.why,
        )
        for worker in self._living():
            self._say_health(worker, verdict)

    def _say_health(self, worker: WorkerProcess, verdict: Verdict) -> None:
        try:
            worker.ask("health", upstream=verdict.upstream, server=verdict.server, up=verdict.up)
        except ControlError as error:
            # It dies or is stuck; whoever takes its place is told at the start.
            self._log.write("error", "worker_health", error=str(error))

    def _look_after_workers(self) -> None:
        if self._metrics.has_died() and not self._ending:
            self._log.write("error", "metrics_died")
            self._loop.after(_PAUSE_S, self._restart_metrics)
        if self._checks.has_died() and not self._ending:
            self._log.write("error", "health_checks_died")
            self._loop.after(_PAUSE_S, self._restart_checks)
        if self._splicing is not None and self._splicing.keeper.has_died() and not self._ending:
            # Pairs that are spliced go on meanwhile.
            self._log.write("error", "splice_keeper_died")
            self._loop.after(_PAUSE_S, self._restart_keeper)
        for index, worker in enumerate(self._workers):
            if worker.exit_code is not None or not worker.has_ended():
                continue
            self._loop.forget(worker.channel.fileno())
            worker.close()
            if not self._ending:
                self._log.write("error", "worker_died", pid=worker.pid, exit_code=worker.exit_code)
            self._bury(index, is_soon=time.monotonic() - worker.started_s < _SOON_S)
        if self._ending and all(worker.exit_code is not None for worker in self._workers):
            self._loop.stop()

    def _bury(self, index: int, *, is_soon: bool = False, tries: int = _BURIALS) -> None:
        """A worker is gone, and with it its sockets: clean up what it had in shared places.

        Then put another in its place, a while later if this one lived too short.
        """
        self._counters.forget_gauges(index, self._directory)
        if self._splicing is not None:
            # What it had spliced goes on: first, while the table says what that is.
            try:
                self._splicing.bury(index)
            except KeeperError as error:
                self._log.write("error", "splice_keeper", error=str(error))
                if not self._ending and tries > 1:
                    # Its successor would not get them: the next keeper knows of them, soon.
                    self._loop.after(_PAUSE_S, lambda: self._bury(index, tries=tries - 1))
                    return
        window = self._table.windows[index]
        window[:] = bytes(len(window))
        if self._maps is not None:
            self._maps.forget_worker(index, self._slots)
        if is_soon:
            self._loop.after(_PAUSE_S, lambda: self._replace(index))
        else:
            self._replace(index)

    def _replace(self, index: int) -> None:
        if self._ending:
            return
        try:
            self._workers[index] = self._start_worker(index)
        except ForwarderError as error:
            self._log.write("error", "worker_start", error=str(error))
            self._loop.after(_PAUSE_S, lambda: self._replace(index))

    # Ending

    def _end(self) -> None:
        """Accept no more, let pairs finish until the drain deadline, then stop."""
        self._ending = True
        self._notify("STOPPING=1")
        self._listeners.close()
        self._tell("drain")
        self._loop.after(self._config.timeouts.drain_s, self._stop)
        self._look_after_workers()

    def _stop(self) -> None:
        """Reset what is left and end."""
        if self._stop_asked:
            return
        self._stop_asked = True
        self._ending = True
        self._listeners.close()
        self._tell("stop")
        self._loop.after(_STOP_S, self._loop.stop)
        self._look_after_workers()

    def _tell(self, do: str) -> None:
        for worker in self._workers:
            if worker.exit_code is None:
                try:
                    worker.ask(do)
                except ControlError as error:
                    if not worker.has_ended():
                        self._log.write("error", "worker_stuck", error=str(error))
                        worker.kill()

    def _clean_up(self) -> None:
        self._instance.pid_file.unlink(missing_ok=True)
        if self._proc is not None:
            self._proc.close()
        if self._splicing is not None:
            self._splicing.close()
        if self._view is not None:
            self._view.unpin()
            self._view.close()
        bpffs.leave(self._instance.bpffs_dir.parent)
        if self._maps is not None:
            self._maps.close()
        if self._arrays is not None:
            self._arrays.close()

    # Requests

    def _obey(self, request: dict[str, Any], fds: list[int]) -> object:
        """Do what was asked; a fault of ours over it costs this request and no pair.

        Raises:
            ForwarderError: it cannot be done, or failed.
        """
        try:
            return self._do(request, fds)
        except ForwarderError:
            raise
        except Exception as error:
            self._log.fault("request_failed", error)
            raise InternalError(f"{type(error).__name__}: {error}") from error

    def _do(self, request: dict[str, Any], fds: list[int]) -> object:
        match request["do"]:
            case "ping":
                return {"pid": os.getpid(), "version": __version__, "datapaths": self._datapaths}
            case "show":
                return self._show(request.get("what", "pairs"))
            case "config":
                return {"text": self._settings.config_text, "source": self._settings.source}
            case "flush":
                return self._flush(request)
            case "reload":
                return self._reload()
            case "down":
                self._loop.defer(
                    lambda now: self._stop() if now else self._end() if not self._ending else None,
                    bool(request.get("now")),
                )
                return {"drain_s": self._config.timeouts.drain_s}
            case "forward":
                return self._forward(request)
            case "join":
                if len(fds) != 2:
                    raise UsageError("join wants two descriptors")
                return self._join(fds[0], fds[1])
            case "listen_port":
                return self._listen_port(request)
            case unknown:
                raise UsageError(f"unknown request {unknown!r}")

    def _show(self, what: object) -> object:
        match what:
            case "pairs":
                backlogs = self._view.backlogs() if self._view is not None else {}
                return report.pair_rows(self._table.windows, backlogs)
            case "listeners":
                return report.listener_rows(
                    self._config, self._binds(), self._counters, self._directory
                )
            case "rules":
                return report.rule_rows(self._config, self._counters, self._directory)
            case "upstreams":
                reports = ask_all(self._living(), "upstreams")
                return report.upstream_rows(self._config, reports)
            case "stats":
                return report.stats(self._counters, self._table.windows, self._datapaths)
            case _:
                raise UsageError(f"cannot show {what!r}")

    def _living(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.exit_code is None]

    def _flush(self, request: dict[str, Any]) -> object:
        ids = None
        if not request.get("all"):
            ids = request.get("ids")
            if not isinstance(ids, list) or not all(type(n) is int for n in ids):
                raise UsageError("flush wants a list of ids, or all")
        flushed = [n for found in ask_all(self._living(), "flush", ids=ids) for n in found]
        return {
            "flushed": sorted(flushed),
            "unknown": sorted(set(ids or ()) - set(flushed)),
        }

    def _forward(self, request: dict[str, Any]) -> object:
        """Take two sockets out of another process (pidfd_getfd(2)) and join them."""
        pid, numbers = request.get("pid"), request.get("fds")
        if (
            not _is_number(pid)
            or not isinstance(numbers, list)
            or len(numbers) != 2
            or not all(map(_is_number, numbers))
        ):
            raise UsageError("forward wants a process and two of its descriptors")
        from pyforwarder.supervisor.pidfd import fetch_descriptors

        fds = fetch_descriptors(pid, numbers)
        try:
            return self._join(fds[0], fds[1])
        finally:
            for fd in fds:
                os.close(fd)

    def _join(self, client_fd: int, server_fd: int) -> object:
        living = self._living()
        if not living:
            raise ControlError("no worker is running just now")
        # Two pairs on one socket would tear its bytes apart, and each worker knows only its own.
        cookies = []
        for fd in (client_fd, server_fd):
            try:
                with duplicate_socket(fd) as sock:
                    cookies.append(cookie_of(sock))
            except OSError as error:
                raise ControlError(f"cannot join: {error.strerror}") from error
        for owner in ask_all(living, "pair_with", cookies=cookies):
            if owner is not None:
                raise ControlError(f"cannot join: pair {owner} has that socket already")
        worker = living[client_fd % len(living)]
        return {"id": worker.ask("join", [client_fd, server_fd])}

    def _listen_port(self, request: dict[str, Any]) -> object:
        """Move the first TCP listener to another port; live pairs are not touched."""
        name, listener = next(
            (
                (name, bound)
                for name, bound in self._listeners.bound.items()
                if isinstance(bound.bind, Address) and bound.protocol == "tcp"
            ),
            ("", None),
        )
        if listener is None or not isinstance(listener.bind, Address):
            raise ControlError("there is no TCP listener")
        if "port" not in request:
            return {"port": listener.bind.port}
        try:
            port = parse_port(str(request["port"]))
        except AddressError as error:
            raise UsageError(str(error)) from error
        before = dict(self._overrides)
        self._overrides["moved"] = f"{name} {port}"
        try:
            # Nothing else changes: what is in the file by now waits for a `reload`.
            text = self._settings.config_text
            self._change_to(text, self._parse(text))
        except ForwarderError:
            self._overrides = before
            raise
        bound = self._listeners.bound[name].bind
        assert isinstance(bound, Address)
        self._log.write("info", "listener_moved", listener=name, bind=str(bound))
        return {"port": bound.port}

    def _reload_on_signal(self) -> None:
        self._notify("RELOADING=1")
        # What went wrong is in the log by then.
        with contextlib.suppress(ForwarderError):
            self._obey({"do": "reload"}, [])
        self._notify("READY=1")

    def _reload(self) -> object:
        """Read the configuration again and put it in force; an error changes nothing."""
        before = self._config
        try:
            self._change_to(*self._read_config())
        except ForwarderError as error:
            self._log.write("error", "reload_refused", error=str(error))
            raise
        waiting = [key for key in _FIXED if getattr(before, key) != getattr(self._config, key)]
        if any(
            self._datapaths.get(choice) == _NOT_WANTED for choice in _kernel_choices(self._config)
        ):
            waiting.append("datapath")
        count = len(self._config.listeners)
        self._log.write("info", "reloaded", listeners=count)
        if waiting:
            self._log.write("warning", "restart_needed", keys=",".join(waiting))
        return {"listeners": count, "waiting": waiting}

    def _change_to(self, text: str, config: Config) -> None:
        """Put a configuration in force.

        Everything that can fail comes before the first change, so an error changes nothing.
        """
        if self._ending:
            raise ControlError("the daemon is ending")
        following, obsolete = self._listeners.change_to(config)
        try:
            settings = self._make_settings(text, config, following)
            metrics = self._metrics.change_to(config.metrics.bind if config.metrics else None)
        except ForwarderError:
            self._listeners.abandon(following)
            raise
        self._settings, self._config = settings, config
        self._log.change(level=config.log.level, form=config.log.format)
        before = self._binds()
        self._listeners.bound = following
        for index, worker in enumerate(self._workers):
            if worker.exit_code is None:
                try:
                    self._configure(worker, index)
                except ControlError as error:
                    # It will be replaced by one that begins with the new settings.
                    self._log.write("error", "worker_reload", error=str(error))
                    worker.kill()
        self._listeners.commit(config, following, obsolete)
        self._limit_packets()
        self._describe_listeners()
        self._metrics.commit(metrics)
        self._checks.change_to(config.upstreams)
        if self._proc is not None:
            self._proc.port_changed()
        for name, listener in following.items():
            if before.get(name) != str(listener.bind):
                self._env.stdout.write(f"listening on {listener.bind} ({name})\n")
        self._env.stdout.flush()


def _is_number(value: object) -> TypeGuard[int]:
    """Of a process or a descriptor; True and False are instances of int, too."""
    return type(value) is int and 0 <= value < 2**31


def _kernel_choices(config: Config) -> set[str]:
    """The datapaths of the kernel that the configuration names or leaves open."""
    choices: set[str] = {config.datapath}
    for listener in config.listeners:
        choices.add(listener.datapath or config.datapath)
        choices |= {
            rule.datapath or listener.datapath or config.datapath for rule in listener.rules
        }
    if "auto" in choices:
        choices |= {"sockmap", "splice"}
    return choices - {"auto", "copy"}
