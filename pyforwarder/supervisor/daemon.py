"""The daemon: starts everything in the right order, and ends it in the reverse order.

What each part does is in a module of its own; here is only what comes before what, and who is
told of whom.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.core.address import Address, SystemdSockets, UnixAddress, bind_entries
from pyforwarder.core.datapaths import SESSIONS
from pyforwarder.datapath.attach import unix_names
from pyforwarder.datapath.kernel import slots_for
from pyforwarder.errors import ConfigError, ControlError, ForwarderError, LoadError
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.instance import Instance, InstanceLock, acquire
from pyforwarder.runtime.loop import EPOLLIN, Loop
from pyforwarder.runtime.shared_memory import SharedBlocks
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor import stored_sockets
from pyforwarder.supervisor.activation import Activation
from pyforwarder.supervisor.checking import CheckerProcess
from pyforwarder.supervisor.configuration import ConfigInForce, ConfigSource, Shared
from pyforwarder.supervisor.control import ControlServer
from pyforwarder.supervisor.datapaths import Datapaths
from pyforwarder.supervisor.deciding import SILENT_S
from pyforwarder.supervisor.failover import FailoverProcess
from pyforwarder.supervisor.files import Files, remove_stale_pins
from pyforwarder.supervisor.fleet import FleetProcess, LastGood, check_files
from pyforwarder.supervisor.fleet_tokens import TokenProcess
from pyforwarder.supervisor.health import Verdict
from pyforwarder.supervisor.listeners import BoundSocket
from pyforwarder.supervisor.log_file import LOOK_S, keep_small, open_log
from pyforwarder.supervisor.memory import SharedMemory
from pyforwarder.supervisor.preparing import Preparation
from pyforwarder.supervisor.requests import Requests
from pyforwarder.supervisor.retiring import Belongings, Retirement
from pyforwarder.supervisor.scraping import (
    WebListener,
    WebProcess,
    page_source_in_child,
    source_in_child,
    wanted_of,
)
from pyforwarder.supervisor.signals import Signals
from pyforwarder.supervisor.succession import NoAnswerError, Predecessor, bind_of
from pyforwarder.supervisor.view_ways import ways_of
from pyforwarder.supervisor.worker_pool import WorkerPool
from pyforwarder.supervisor.workers import check_user
from pyforwarder.worker.log import Log, not_blocking
from pyforwarder.worker.process import room_for, slots_of
from pyforwarder.worker.used_tokens import SHARES, SPENDS_FOR_S, TABLE_BYTES

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.status.metrics import Source
    from pyforwarder.status.process import PageSource
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.preparing import Loaded

# A helper process that has died is replaced after this long.
_PAUSE_S: Final = 1.0
# How long the daemon before may take to let go of what it has spliced.
_RELEASE_S: Final = 8.0
# How long workers have to reset and close what is left, once they are told to stop.
_STOP_S: Final = 5.0
# So many connections at most come to a daemon between the moment at which its successor learns the
# highest number of a pair and the one at which it accepts no more: no number is given twice.
_MEANWHILE: Final = 100_000
# The same for as long as its successor may take to get ready.
_MEANWHILE_PREPARING: Final = 100_000_000
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
        self._elder = predecessor
        self._has_taken = False  # its place
        self._spliced: Loaded | LoadError | None = None  # programs that wait for its pairs
        self._obsolete_paths: list[str] = []
        if predecessor is not None:
            self._source.overrides = dict(predecessor.offer.overrides)
        self._instance = Instance.named(options.instance, env.environ)
        self._loop = Loop()
        self._control: ControlServer | None = None
        self._preparations: list[Preparation] = []
        self._is_settled = False
        self._ending = False
        self._stop_asked = False
        self._started_unix_s = env.unix_time_s()
        self._ways = ways_of(env.environ)
        self._activation = Activation(env.environ)
        self._last_good = LastGood(self._instance.fleet_file)

    def run(self, on_ready: Callable[[], None] | None = None) -> int:
        """Serve until told to end; `on_ready` is called once connections are accepted.

        Raises:
            ForwarderError: it cannot start; nothing is left behind then.
        """
        with self._hold() as lock:
            # No descriptor of ours may outlive us in a child: a worker would hold the lock.
            self._lock = lock
            # No directory of a caller's stays in use by us, and none of its files is taken.
            os.chdir("/")
            text, config = self._read_first()
            self._prepare(config)
            # Children share the memory of what there is by now as long as nobody writes to it, and
            # a collection would: megabytes for each.
            gc.collect()
            gc.freeze()
            try:
                self._bind(text, config)
                self._start_preparing()
                if self._elder is not None:
                    self._take_place(self._elder)
                self._start(config)
                self._control = ControlServer(
                    self._loop,
                    self._instance.control,
                    self._requests.obey,
                    socket.socket(fileno=self._elder.control_fd) if self._elder else None,
                )
                self._instance.pid_file.write_text(f"{os.getpid()}\n")
                self._keep_watchdog_away()
                self._workers.look_at_pulses()
                self._serve_until_settled()
                if not self._ending:
                    self._settled()
                    if on_ready is not None:
                        on_ready()
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
        if self._elder is not None:
            return InstanceLock(self._instance, self._elder.lock_fd)
        return acquire(self._instance)

    def _read_first(self) -> tuple[str, Config]:
        """The configuration to begin with: of what a fleet shares, what was in force last."""
        own = self._source.read_own()
        config = self._source.parse(own)
        self._source.own = own
        check_files(config)
        self._not_kept = ""
        if config.fleet is not None:
            self._source.shared = self._last_good.read(config.fleet.name)
            try:
                return self._source.joined(own, self._source.shared)
            except ConfigError as error:
                # The machine's own configuration has changed since.
                self._not_kept = str(error)
                self._source.shared = Shared()
        return self._source.joined(own, self._source.shared)

    def _prepare(self, config: Config) -> None:
        """Make what stays for the daemon's life; nobody is served yet."""
        self._log = Log(
            level=config.log.level,
            form=config.log.format,
            fd=not_blocking(self._log_fd()),
            is_timed="JOURNAL_STREAM" not in self._env.environ,  # journald adds its own
            instance=self._instance.name,
        )
        # A fault of ours over one event must not end every pair.
        self._loop.on_error = lambda _, error: self._log.fault("supervisor_fault", error)
        user = config.user if os.geteuid() == 0 else None
        if user is not None:
            check_user(user)
        workers = (os.cpu_count() or 1) if config.workers == "auto" else int(config.workers)
        workers = min(workers, 255)
        elder = self._elder
        if elder is not None:
            # As many as there are sockets for, of each of which somebody must accept.
            workers = elder.offer.workers
            for name, fd in elder.marks.items():
                unix_names.inherit(name, fd)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        clients = room_for(config).clients
        if clients * workers < config.limits.pairs:
            self._log.write(
                "warning",
                "few_descriptors",
                limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                pairs_per_worker=clients,
                configured=config.limits.pairs,
            )
        if elder is None:
            remove_stale_pins(self._instance, self._log)
        slots = slots_for(slots_of(config, workers))
        self._tokens_free_at_s = [0.0] * SHARES
        if elder is None or elder.offer.used_tokens is None:
            self._memory = SharedMemory(workers=workers, slots=slots)
        else:
            self._memory = SharedMemory(
                workers=workers,
                slots=slots,
                used_tokens=SharedBlocks.inherited(elder.used_tokens_fds, TABLE_BYTES),
                share=(elder.offer.used_tokens.share + 1) % SHARES,
            )
            self._tokens_free_at_s = list(elder.offer.used_tokens.free_at_s)
        self._datapaths = Datapaths(
            config,
            self._memory,
            pins=self._instance.bpffs_dir,
            user=user,
            loop=self._loop,
            log=self._log,
            close_in_child=self._close_in_child,
            prove_anew=self._options.prove,
            is_successor=elder is not None,
            handshakes_fd=elder.handshakes_fd if elder is not None else -1,
        )
        self._in_force = ConfigInForce(
            self._source,
            workers=workers,
            directory=self._memory.directory,
            mtu=self._datapaths.mtu,
            activation=self._activation,
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
            claim=lambda asked, answer: self._tokens.claim(asked, answer),
        )
        self._files = Files(
            self._instance,
            self._in_force,
            self._memory,
            self._datapaths,
            loop=self._loop,
            log=self._log,
            unix_time_s=self._env.unix_time_s,
            ways=self._ways,
        )
        self._web = WebProcess(
            self._web_sources,
            user=user,
            loop=self._loop,
            log=self._log,
            close_in_child=lambda: self._close_in_child(is_web=True),
            obey=lambda request, fds: self._requests.obey(request, fds),
            may_order=self._may_viewers_order,
            unix_time_s=self._env.unix_time_s,
        )
        self._checks = CheckerProcess(
            self._loop,
            self._log,
            user=user,
            close_in_child=self._close_in_child,
            tell=self._tell_of_health,
        )
        if elder is not None:
            self._checks.inherit(
                [
                    Verdict(one.upstream, one.server, up=False, why=one.why)
                    for one in elder.offer.down
                ]
            )
        self._fleet = FleetProcess(
            self._loop,
            self._log,
            user=user,
            close_in_child=self._close_in_child,
            shared=lambda: self._source.shared,
            put_in_force=self._put_in_force,
            started_unix_s=self._started_unix_s,
            facts=self._facts_for_fleet,
            tell=self._web.tell_of_fleet,
        )
        self._tokens = TokenProcess(
            self._loop, self._log, user=user, close_in_child=self._close_in_child
        )
        self._failover = FailoverProcess(
            self._loop,
            self._log,
            user=user,
            close_in_child=self._close_in_child,
            splicing=lambda: self._datapaths.splicing,
            adopt=self._workers.adopt,
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
            fleet_rows=self._fleet.rows,
            change_to=self._change_own,
            drain=self._down,
            stop=self._stop,
            succeed=lambda fds: self._retirement.admit(fds),
            failover=lambda: self._failover,
            elder=lambda: self._elder,
        )
        self._retirement = Retirement(
            Belongings(
                options=self._options,
                source=self._source,
                in_force=self._in_force,
                activation=self._activation,
                memory=self._memory,
                datapaths=self._datapaths,
                workers=self._workers,
                files=self._files,
                web=self._web,
                end_helpers=self._end_helpers,
                elder=lambda: self._elder,
                tokens_free_at_s=lambda: self._tokens_free_at_s,
                down=lambda: self._checks.down,
                lock=self._lock,
                control=self._its_control,
                loop=self._loop,
                log=self._log,
                environ=self._env.environ,
                notify=self._notify,
                why_not=self._why_no_successor,
                retired=self._retired,
                stop=self._stop,
            )
        )

    def _its_control(self) -> ControlServer:
        assert self._control is not None
        return self._control

    def _why_no_successor(self) -> str:
        """Why nobody can take our place now; empty: somebody can."""
        if self._ending:
            return "the daemon is ending"
        if not self._is_settled or self._control is None:
            return "the daemon is still starting"
        return ""

    def _end_helpers(self) -> None:
        self._web.close()
        self._checks.close()
        self._fleet.close()
        self._failover.close()
        # Not that of the tokens: who has no server yet may have one to be claimed.

    def _retired(self) -> None:
        self._ending = True
        self._stop_preparing()

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

    def _bind(self, text: str, config: Config) -> None:
        """From here on connections wait in the kernel."""
        if self._elder is not None:
            self._inherit(self._elder)
        else:
            self._in_force.listeners.restored = stored_sockets.restored(
                self._activation.take(stored_sockets.NAME), self._memory.workers
            )
        change = self._in_force.change_to(text, config)
        self._in_force.take(change)
        if self._elder is None:
            self._in_force.commit(change)
        else:
            # What only the daemon before serves: no worker of ours may keep it open.
            for old in change.obsolete:
                if isinstance(old.wanted, UnixAddress) and old.is_ours:
                    self._obsolete_paths.append(old.wanted.path)
                old.close()
            self._change = replace(change, obsolete=[])
        for warning in self._source.warnings(text, config):
            self._log.write("warning", "config", reason=warning)
        # Known before any worker is forked, so that none keeps the socket.
        before = self._web.listening
        self._web.listening = self._web.change_to(wanted_of(config))
        for listener in before.values():
            if listener not in self._web.listening.values():
                listener.close()
        self._signals = Signals(self._loop, self._signalled)

    def _inherit(self, elder: Predecessor) -> None:
        """Begin with what the daemon before has bound, and still has."""
        for name, fd in elder.activation:
            self._activation.inherit(name, socket.socket(fileno=fd))
        bound: dict[str, tuple[BoundSocket, ...]] = {}
        for said, fds in elder.places:
            bind = bind_of(said.bind)
            if isinstance(bind, SystemdSockets):
                raise ControlError("the running daemon says where no socket can be")
            one = BoundSocket.inherited(
                bind_of(said.wanted),
                bind,
                [socket.socket(fileno=fd) for fd in fds],
                protocol=said.protocol,
                is_ours=said.is_ours,
                mode=said.mode,
                freebind=said.freebind,
            )
            bound[said.listener] = (*bound.get(said.listener, ()), one)
        self._in_force.listeners.inherit(bound)
        for web, fd in elder.web:
            wanted = bind_of(web.wanted)
            if isinstance(wanted, Address):
                self._web.listening[web.key] = WebListener.inherited(wanted, fd)
        self._in_force.drained = {(upstream, server) for upstream, server in elder.offer.drained}

    def _take_place(self, elder: Predecessor) -> None:
        """Serve beside the daemon before, and have it stop: until it says so nothing has changed.

        Raises:
            ForwarderError: it goes on as before.
        """
        for one in self._preparations:
            for name, loaded in one.wait():
                if name == "splice":
                    self._spliced = loaded
                else:
                    self._take(name, loaded)
            one.close()
        if elder.offer.splice == "passing":
            raise ControlError(
                "the running daemon's spliced pairs end with it, as they are not pinned"
            )
        why = self._datapaths.states["splice"]
        if isinstance(self._spliced, LoadError):
            why = str(self._spliced)
        if elder.offer.splice == "pinned" and (
            self._spliced is None or isinstance(self._spliced, LoadError)
        ):
            raise ControlError(f"spliced pairs could not go on: {why}")
        pinned = elder.offer.splice_map if elder.offer.splice == "pinned" else None
        if pinned not in (None, self._datapaths.splice_map_id):
            raise ControlError(
                "spliced pairs could not go on: what the running daemon has pinned in "
                f"{self._instance.bpffs_dir} is not what this process finds there; "
                f"`nsenter --all --target {elder.offer.pid}` runs a command beside it"
            )
        if self._spliced is None and not self._datapaths.in_preparation:
            self._workers.datapaths_are_settled()
        # A daemon before the one before may still write where our workers remember used tokens.
        free_at_s = self._tokens_free_at_s[self._memory.share]
        time.sleep(min(SPENDS_FOR_S, max(0.0, free_at_s - time.monotonic())))
        workers = range(self._memory.workers)
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in workers]
        try:
            self._workers.start_beside(
                self._elders_last_id(elder),
                {index: ours for index, (ours, _) in enumerate(ends)},
                [theirs for _, theirs in ends],
            )
            try:
                elder.take([theirs.fileno() for _, theirs in ends])
            except NoAnswerError as error:
                # It has ended, or has begun to retire: nobody would serve if we did not.
                self._log.write("error", "predecessor_silent", error=str(error))
                # But if it only stands still, it goes on one day, and so do its workers: two
                # daemons would write what each takes for its own. systemd must not end us with it.
                self._notify(f"MAINPID={os.getpid()}")
                if not elder.kill():
                    self._log.write("error", "predecessor_lives", pid=elder.offer.pid)
        finally:
            for _, theirs in ends:
                theirs.close()
        # From here on it is our turn, whatever comes.
        self._has_taken = True
        if elder.offer.used_tokens is not None:
            ends_s = time.monotonic() + SPENDS_FOR_S
            self._tokens_free_at_s[elder.offer.used_tokens.share] = ends_s
        self._in_force.listeners.share(shared=False)
        self._in_force.commit(self._change)
        for path in self._obsolete_paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._loop.watch(elder.fileno(), EPOLLIN, self._hear_elder, self)
        if self._spliced is not None:
            if elder.is_released:
                self._loop.defer(lambda _: self._go_on_with_spliced(), None)
            else:
                self._loop.after(scaled_s(_RELEASE_S), self._go_on_with_spliced)

    def _elders_last_id(self, elder: Predecessor) -> int:
        """As high as any number of its pairs will be.

        Raises:
            ForwarderError: it is there, and does not say.
        """
        try:
            return elder.last_id() + _MEANWHILE
        except NoAnswerError:
            if not elder.is_gone or not elder.has_died():
                raise
            # It was killed while this one got ready: nobody would serve if we did not.
            return elder.offer.last_id + _MEANWHILE_PREPARING

    def _hear_elder(self, _owner: object, fd: int, _mask: int) -> None:
        elder = self._elder
        assert elder is not None
        elder.heard()
        if elder.is_released:
            self._go_on_with_spliced()
        if elder.is_gone:
            self._loop.forget(fd)
            elder.close()
            self._elder = None
            self._log.write("info", "predecessor_ended", pid=elder.offer.pid)
            self._look_after_children()

    def _go_on_with_spliced(self) -> None:
        """What the daemon before had spliced is nobody's: it is ours from here on."""
        loaded, self._spliced = self._spliced, None
        if loaded is not None and not self._ending:
            # Of two keepers each would give a new pair the place of a pair of the other's.
            if self._elder is not None and not self._elder.end_keeper():
                self._log.write("error", "predecessors_keeper_lives", pid=self._elder.offer.pid)
            self._datapaths.take("splice", loaded)
            self._workers.take_over_spliced()
            if self._is_settled:
                self._datapaths.pin()
                self._failover.begin()
            self._workers.datapaths_are_settled()
            self._prove_sessions()
            self._loop.stop()

    def _start_preparing(self) -> None:
        """Have the kernel's programs loaded and proven beside us: that takes seconds.

        Where an earlier daemon's pairs go on, and their ports are not ours to use, before all else.
        """
        parts = self._datapaths.parts()
        # One for each processor of a small machine: two compilers want memory enough.
        for some in (parts, self._files.parts()):
            if some:
                one = Preparation(
                    some,
                    close_in_child=self._close_in_child,
                    is_in_no_hurry=self._elder is not None,
                )
                self._preparations.append(one)
        if self._datapaths.must_come_first:
            self._log.write("info", "taking_over", datapaths=",".join(parts))
            for name, loaded in self._preparations[0].wait():
                self._take(name, loaded)
            self._preparations[0].close()
        for one in self._preparations:
            if not one.is_over:
                self._watch_preparation(one)

    def _watch_preparation(self, one: Preparation) -> None:
        self._loop.watch(one.fileno(), EPOLLIN, self._prepared, one)
        self._loop.after(one.time_left_s, lambda: self._give_up(one))

    def _prove_sessions(self) -> None:
        """Have the kernel's sessions proven beside us, once a listener may use them."""
        if not self._is_settled or self._ending or self._retirement.is_retired:
            return
        parts = self._datapaths.parts_of_sessions(self._in_force.config)
        if parts:
            one = Preparation(parts, close_in_child=self._close_in_child)
            self._preparations.append(one)
            self._watch_preparation(one)

    def _prepared(self, one: Preparation, fd: int, _mask: int) -> None:
        found = list(one.next())
        if one.is_over:
            self._loop.forget(fd)
            one.close()
        for name, loaded in found:
            self._take(name, loaded)

    def _give_up(self, one: Preparation) -> None:
        if not one.is_over:
            self._loop.forget(one.fileno())
            found = list(one.give_up())
            one.close()
            for name, error in found:
                self._take(name, error)

    def _take(self, name: str, loaded: Loaded | LoadError) -> None:
        if name in _SESSIONS:
            self._datapaths.take_sessions(name, loaded)
            self._workers.say_datapaths()
            self._web.renew()
            return
        if name == "view":
            self._files.take(loaded)
        else:
            self._datapaths.take(name, loaded)
            if not self._datapaths.in_preparation and self._workers.living:
                self._workers.datapaths_are_settled()
        is_over = all(one.is_over for one in self._preparations)
        if not self._ending and is_over and self._elder is None:
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
        if self._elder is None or self._spliced is not None:
            self._loop.run()
        self._loop.running = not self._stop_asked

    def _settled(self) -> None:
        """All is there that will be: tell everybody."""
        self._is_settled = True
        if not self._datapaths.in_preparation:
            self._datapaths.pin()
        self._files.open(self._requests.obey, self._requests.show)
        # First: who waits for the words on standard output may look into the log then.
        self._log.write(
            "info",
            "started",
            version=__version__,
            config=self._source.name,
            listeners=len(self._in_force.listeners.bound),
            workers=self._memory.workers,
            **{f"datapath_{name}": said for name, said in self._datapaths.states.items()},
        )
        # It has been told of datapaths that were in preparation.
        self._web.renew()
        self._announce()
        self._datapaths.look_at_keeper()
        self._failover.begin()
        # Of a reload that came meanwhile.
        self._prove_sessions()

    def _start(self, config: Config) -> None:
        if self._elder is None:
            if not self._datapaths.in_preparation:
                self._workers.datapaths_are_settled()
            self._workers.start()
        self._checks.change_to(config.upstreams)
        if self._not_kept:
            self._log.write("warning", "fleet_not_kept", error=self._not_kept)
        self._fleet.change_to(config.fleet, serial=self._source.shared.serial)
        self._tokens.change_to(config)
        self._failover.change_to(config.fleet)
        self._web.start()
        for key, listener in self._web.listening.items():
            self._log.write("info", key, bind=str(listener.bind))

    def _web_sources(self) -> tuple[Source, PageSource | None]:
        """In the process that answers HTTP: what it may tell, from memory that it cannot write."""
        source = source_in_child(
            self._in_force,
            self._memory,
            self._datapaths.states,
            started_unix_s=self._started_unix_s,
            fleet=self._web.fleet,
        )
        page = page_source_in_child(
            self._in_force,
            source,
            self._memory,
            instance=self._instance.name,
            verdicts=self._web.verdicts,
            down=self._checks.down,
            unix_time_s=self._env.unix_time_s,
        )
        return source, page

    def _facts_for_fleet(self) -> dict[str, object]:
        counters = self._memory.counters
        return {
            "pairs": counters.total(Counter.PAIRS_OPEN),
            "accepted": counters.total(Counter.ACCEPTED),
            "datapaths": {name: said[:256] for name, said in self._datapaths.states.items()},
        }

    def _may_viewers_order(self) -> bool:
        status = self._in_force.config.status
        return status is not None and status.control

    def _tell_of_health(self, verdict: Verdict) -> None:
        self._workers.tell_of_health(verdict)
        self._web.tell_of_health(verdict)

    def _close_in_child(self, *, is_web: bool = False) -> None:
        """In a new child: close what is the supervisor's alone."""
        # With `--detach` the command's own output is inherited too, and its reader (a shell's
        # `$(...)`, an installer) waits for an end of file that only the last holder brings.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        self._signals.close_in_child()
        self._lock.close()
        self._workers.close_in_child()
        for one in self._preparations:
            one.close_in_child()
        self._in_force.listeners.close_in_child()
        if is_web:
            self._web.close_channel()
        else:
            self._web.close_in_other_child()
        self._checks.close_channel()
        self._fleet.close_channel()
        self._tokens.close_channel()
        self._failover.close_channel()
        for fd in self._control.fds() if self._control is not None else ():
            os.close(fd)
        for fd in self._retirement.fds():
            os.close(fd)
        if self._elder is not None:
            self._elder.close_in_child(has_control=self._control is None)
        self._files.close_in_child()
        self._loop.dispose()

    def _announce(self) -> None:
        # The reader of the earlier daemon's output may have gone, and that is no reason to end.
        unheard = (OSError,) if self._has_taken else ()
        with contextlib.suppress(*unheard):
            for name, binds in self._in_force.listeners.binds().items():
                self._tell_where(name, binds)
            self._env.stdout.flush()
        self._keep_sockets()
        self._notify("READY=1")

    def _keep_sockets(self) -> None:
        """Have systemd keep our listening sockets, if it does."""
        if stored_sockets.is_kept(self._env.environ):
            try:
                stored_sockets.store(
                    self._env.environ["NOTIFY_SOCKET"], self._in_force.listeners.sockets()
                )
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror)

    def _tell_where(self, name: str, binds: Sequence[Address | UnixAddress]) -> None:
        for entry in bind_entries(binds):
            self._env.stdout.write(f"listening on {entry} ({name})\n")

    def _keep_watchdog_away(self) -> None:
        """Tell systemd that this loop goes round, as often as it asked for (WatchdogSec=)."""
        environ = self._env.environ
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        with contextlib.suppress(ValueError):
            interval_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6
            if interval_s > 0:
                self._notify("WATCHDOG=1")
                # Twice in that time, says sd_watchdog_enabled(3); a turn of ours may take long.
                self._loop.after(interval_s / 4, self._keep_watchdog_away)

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
        if self._web.has_died() and not self._ending:
            self._log.write("error", "web_died")
            self._restart_later("web", self._web.start, self._web.rest_s)
        if self._checks.has_died() and not self._ending:
            self._log.write("error", "health_checks_died")
            self._restart_later("health_checks", self._checks.start, self._checks.rest_s)
        if self._fleet.has_died() and not self._ending:
            self._log.write("error", "fleet_died")
            self._restart_later("fleet", self._fleet.start, self._fleet.rest_s)
        if self._tokens.has_died() and not self._ending:
            self._log.write("error", "fleet_tokens_died")
            self._restart_later("fleet_tokens", self._tokens.start, self._tokens.rest_s)
        if self._failover.has_died() and not self._ending:
            self._log.write("error", "failover_died")
            self._restart_later("failover", self._failover.start, self._failover.rest_s)
        if self._datapaths.keeper_has_died() and not self._ending:
            # Pairs that are spliced go on meanwhile.
            self._log.write("error", "splice_keeper_died")
            self._restart_later("splice_keeper", self._restart_keeper)
        self._workers.look_after()
        # The daemon before may have pairs still, which would not outlive a service's main process.
        if self._ending and not self._workers.living and self._elder is None:
            self._loop.stop()

    def _restart_later(
        self, name: str, start: Callable[[], None], pause_s: float = _PAUSE_S
    ) -> None:
        """After a pause, and not if we are ending by then."""

        def restart() -> None:
            if self._ending:
                return
            try:
                start()
            except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
                self._log.write("error", "restart", process=name, error=str(error))
                self._restart_later(name, start)

        self._loop.after(pause_s, restart)

    def _restart_keeper(self) -> None:
        self._datapaths.restart_keeper()
        # It knows nothing of other machines' pairs.
        self._failover.renew()

    # Changing

    def _reload_on_signal(self) -> None:
        self._notify("RELOADING=1")
        # What went wrong is in the log by then.
        with contextlib.suppress(ForwarderError):
            self._requests.obey({"do": "reload"}, [])
        self._notify("READY=1")

    def _change_own(self, text: str, config: Config) -> None:
        """Put a configuration in force whose own part is new, so that the rest may fit it now."""
        check_files(config)
        self._change_to(text, config)
        self._fleet.change_to(config.fleet, serial=self._source.shared.serial)
        self._tokens.change_to(config)
        self._failover.change_to(config.fleet)
        # Once the request is answered, and what it has read is in force.
        self._loop.defer(lambda _: self._fleet.try_again(), None)

    def _put_in_force(self, shared: Shared) -> None:
        """What a fleet's store has: listeners, upstreams and servers, beside this machine's own.

        Raises:
            ForwarderError: it cannot be; what was in force still is.
        """
        if shared == self._source.shared:
            return
        text, config = self._source.joined(self._source.own, shared)
        self._change_to(text, config)
        self._source.shared = shared
        for warning in self._source.warnings(text, config):
            self._log.write("warning", "config", reason=warning)
        try:
            self._last_good.write(shared)
        except OSError as error:
            self._log.write("warning", "fleet_not_kept", error=str(error))

    def _change_to(self, text: str, config: Config) -> None:
        """Put a configuration in force.

        Everything that can fail comes before the first change, so an error changes nothing.
        """
        if self._ending:
            raise ControlError("the daemon is ending")
        change = self._in_force.change_to(text, config)
        try:
            web = self._web.change_to(wanted_of(config))
        except ForwarderError:
            self._in_force.abandon(change)
            raise
        before = self._in_force.listeners.binds()
        self._in_force.take(change)
        self._log.change(level=config.log.level, form=config.log.format)
        self._workers.configure()
        self._in_force.commit(change)
        self._files.describe_listeners()
        self._web.commit(web)
        self._checks.change_to(config.upstreams)
        self._files.port_changed()
        self._prove_sessions()
        if self._is_settled:
            self._keep_sockets()
        for name, binds in self._in_force.listeners.binds().items():
            # Before, `_announce` tells of all.
            if self._is_settled and before.get(name) != binds:
                self._tell_where(name, binds)
        self._env.stdout.flush()

    # Ending

    def _down(self) -> None:
        """The same when nobody is to come after us: systemd closes its sockets, too."""
        if not self._ending and stored_sockets.is_kept(self._env.environ):
            with contextlib.suppress(OSError):
                stored_sockets.store(self._env.environ["NOTIFY_SOCKET"], ())
        self._end()

    def _end(self) -> None:
        """Accept no more, let pairs finish until the drain deadline, then stop."""
        if self._ending:
            return
        self._ending = True
        self._notify("STOPPING=1")
        self._stop_preparing()
        if self._workers.stop_deciding():
            # Clients that have not spoken yet are not the listener's before that.
            self._loop.after(scaled_s(SILENT_S), self._drain)
        else:
            self._drain()

    def _drain(self) -> None:
        if self._stop_asked:
            return
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
        self._stop_preparing()
        if self._elder is not None and self._has_taken:
            self._elder.end(now=True)
        self._in_force.listeners.close()
        self._workers.end("stop")
        self._loop.after(scaled_s(_STOP_S), self._loop.stop)
        self._look_after_children()

    def _stop_preparing(self) -> None:
        for one in self._preparations:
            if not one.is_over:
                self._loop.forget(one.fileno())
            one.close()

    def _clean_up(self) -> None:
        """End every process and leave nothing behind, however far the start has come."""
        for one in self._preparations:
            one.close()
        self._web.close()
        self._checks.close()
        self._fleet.close()
        self._tokens.close()
        self._failover.close()
        self._workers.close()
        self._in_force.listeners.close()
        if self._control is not None:
            self._control.close()
        self._retirement.close()
        if self._elder is not None:
            self._elder.close()
        is_ours = self._elder is None or self._has_taken
        is_ours = is_ours and not self._retirement.is_retired
        if is_ours:
            self._instance.pid_file.unlink(missing_ok=True)
            self._files.close_proc()
        # The pins of splice are in a directory of the view's, which goes once nothing is in it.
        self._datapaths.close()
        if is_ours:
            self._files.close_view()
        self._memory.close()
