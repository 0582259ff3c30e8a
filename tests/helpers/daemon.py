"""A running forwarder as its user sees it: command line, output, files, processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import yaml

from pyforwarder.client import ControlClient
from pyforwarder.runtime.instance import Instance
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.filters import all_filters
from tests.helpers.netns import entered
from tests.helpers.waiting import DEADLINE_S, PATIENCE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.client import What
    from pyforwarder.datapath.attach.traffic_control import Filter

LISTENING: Final = re.compile(r"listening on (?P<address>\S+) \((?P<name>[^)]+)\)")
COMMAND: Final = (str(Path(sys.executable).with_name("pyforwarder")),)
# Loading and proving the datapaths comes before the first line; compiling takes seconds when
# several do it at once.
START_DEADLINE_S: Final = scaled_s(100.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Two directories that stand for /run/pyforwarder and the pins' root."""

    run_dir: Path
    bpffs: Path

    def environ(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment that makes a command use this place."""
        return {
            **os.environ,
            "PYFORWARDER_RUN_DIR": str(self.run_dir),
            "PYFORWARDER_BPFFS": str(self.bpffs),
            **(extra or {}),
        }

    def processes(self) -> list[psutil.Process]:
        """Every process that was started with this place in its environment."""
        wanted = f"PYFORWARDER_RUN_DIR={self.run_dir}".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                environ = Path(f"/proc/{process.pid}/environ").read_bytes()
                if wanted in environ.split(b"\0") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def pins(self) -> list[Path]:
        """Every pinned object, of all instances.

        Not the two files with which the kernel furnishes every new mount (kernel/bpf/inode.c).
        """
        furniture = {self.bpffs / "maps.debug", self.bpffs / "progs.debug"}
        return [
            path for path in self.bpffs.rglob("*") if path not in furniture and not path.is_dir()
        ]

    def run_files(self) -> list[Path]:
        """Every file, socket and link of the run directory."""
        return [path for path in self.run_dir.rglob("*") if path.is_symlink() or not path.is_dir()]


def run_command(
    place: Place,
    *words: str,
    stdin: bytes | None = None,
    deadline_s: float = PATIENCE_S,
    build: Sequence[str] = COMMAND,
) -> subprocess.CompletedProcess[str]:
    """One `pyforwarder ...` command from start to end; `build` runs another version of it.

    Raises:
        subprocess.TimeoutExpired: it did not end in time (and was killed).
    """
    done = subprocess.run(
        [*build, *words],
        env=place.environ(),
        input=b"" if stdin is None else stdin,
        capture_output=True,
        timeout=deadline_s,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@dataclass(slots=True)
class Daemon:
    """One `pyforwarder up` in the foreground; `stop` or `kill` it, `close` in any case."""

    place: Place
    process: subprocess.Popen[bytes]
    instance: str
    config_path: Path | None
    lines: list[str] = field(default_factory=list)
    # Of the network namespace that it is in, which is that of the test that starts it.
    network_fd: int = field(
        default_factory=lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    )
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _readers: list[threading.Thread] = field(default_factory=list)

    # ------------------------------------------------------------------ what it said

    def collect(self) -> None:
        """Read both outputs in the background, so that it never blocks on a full pipe."""
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
            thread.start()
            self._readers.append(thread)

    def _read(self, stream: Any) -> None:
        for line in stream:
            with self._changed:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def output(self) -> str:
        """All lines so far, both streams."""
        with self._changed:
            return "\n".join(self.lines)

    def wait_for_line(self, pattern: str, *, count: int = 1, deadline_s: float = PATIENCE_S) -> str:
        """The last of the first `count` lines that the pattern is found in."""

        def look() -> str:
            with self._changed:
                matching = [line for line in self.lines if re.search(pattern, line)]
            return matching[count - 1] if len(matching) >= count else ""

        def look_or_fail() -> str:
            found = look()
            if not found and self.process.poll() is not None:
                for thread in self._readers:
                    thread.join(timeout=DEADLINE_S)
                found = look()
                assert found, f"ended with {self.process.returncode}:\n{self.output()}"
            return found

        try:
            return wait_for(look_or_fail, pattern, deadline_s=deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def listeners(self) -> dict[str, tuple[str, int]]:
        """Where it listens, by the listener's name, as its `listening on` lines say."""
        found = {}
        with self._changed:
            for line in self.lines:
                match = LISTENING.search(line)
                if match and not match["address"].startswith("unix:"):
                    host, _, port = match["address"].rpartition(":")
                    found[match["name"]] = (host.strip("[]"), int(port))
        return found

    @property
    def address(self) -> tuple[str, int]:
        """Where its first listener listens."""
        return next(iter(self.listeners().values()))

    # ------------------------------------------------------------------ asking it

    def command(
        self,
        *words: str,
        stdin: bytes | None = None,
        deadline_s: float = PATIENCE_S,
        build: Sequence[str] = COMMAND,
    ) -> subprocess.CompletedProcess[str]:
        """A command for this instance, from start to end; `build` runs another version of it."""
        verb, *rest = words
        return run_command(
            self.place,
            verb,
            "--instance",
            self.instance,
            *rest,
            stdin=stdin,
            deadline_s=deadline_s,
            build=build,
        )

    def control(self) -> ControlClient:
        """Its control socket: the answers of the commands, without starting one for each."""
        return ControlClient(
            Instance.named(self.instance, self.place.environ()), timeout_s=PATIENCE_S
        )

    def reconfigure(self, config: str) -> None:
        """Write another text to its configuration file; `reload` or SIGHUP makes it count."""
        assert self.config_path is not None
        self.config_path.write_text(config)

    def show(self, what: str = "pairs") -> Any:
        """What `show WHAT --json` prints."""
        done = self.command("show", what, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def look(self, what: What = "pairs") -> Any:
        """The same without starting a command, for tests that look again and again."""
        return self.control().show(what)

    def pairs(self) -> list[dict[str, Any]]:
        """The rows of `show --json`."""
        rows = self.show("pairs")
        assert isinstance(rows, list)
        return rows

    def wait_for_pair(
        self, wanted: Callable[[dict[str, Any]], bool], what: str = "a pair"
    ) -> dict[str, Any]:
        """The first row for which `wanted` is true."""
        return wait_for(lambda: next((row for row in self.look() if wanted(row)), None), what) or {}

    def wait_for_no_pairs(self) -> None:
        """Until the table is empty."""
        wait_for(lambda: not self.look(), "no pairs left")

    # ------------------------------------------------------------------ its processes

    def workers(self) -> list[psutil.Process]:
        """The processes that carry connections: the daemon's children without privilege."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                if child.is_running() and child.uids().real != 0:
                    found.append(child)
        return found

    def open_fds(self) -> dict[int, int]:
        """How many descriptors each process of the daemon has open."""
        daemon = psutil.Process(self.process.pid)
        processes = [daemon, *daemon.children(recursive=True)]
        return {process.pid: process.num_fds() for process in processes}

    def wait_for_no_more_fds(self, before: dict[int, int]) -> None:
        """Until no process has more open than `open_fds` said before.

        Not as many: then something of what had just ended may have been open still.
        """
        wait_for(
            lambda: all(now <= before.get(pid, 0) for pid, now in self.open_fds().items()),
            f"no more descriptors than before: {before}",
        )

    # ------------------------------------------------------------------ ending it

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon (not to its workers)."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of the daemon, not of its workers; it has ended when this returns."""
        self.process.kill()
        self.process.wait(timeout=DEADLINE_S)

    def wait(self, *, deadline_s: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended and everything it said was read."""
        try:
            code = self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s} s:\n{self.output()}") from None
        for thread in self._readers:
            thread.join(timeout=DEADLINE_S)
        return code

    def stop(self, *, deadline_s: float = PATIENCE_S) -> int:
        """What `down --now` asks for, then its exit code."""
        self.control().down(now=True)
        return self.wait(deadline_s=deadline_s)

    def filters(self) -> list[Filter]:
        """The tc filters of this place that are in its network namespace."""
        with entered(self.network_fd):
            return [
                one for one in all_filters() if f"{self.place.bpffs}/{self.instance}/" in one.name
            ]

    def close(self) -> None:
        """Make sure that nothing of it runs, also after a failure; closes the pipes."""
        if self.network_fd >= 0:
            os.close(self.network_fd)
            self.network_fd = -1
        for process in self.place.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(timeout=DEADLINE_S)
        for thread in self._readers:
            thread.join(timeout=DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def start(
    place: Place,
    config: str | None,
    *words: str,
    instance: str = "default",
    environ: Mapping[str, str] | None = None,
    wait: bool = True,
    prefix: Sequence[str] = (),
) -> Daemon:
    """Start `up` with this configuration text (None: the built-in one) and wait for its listeners.

    `words` are further arguments, `prefix` a program that runs it (`prlimit ...`).
    """
    config_path = None
    if config is not None:
        config_path = place.run_dir.parent / f"{instance}.yaml"
        config_path.write_text(config)
        words = ("-c", str(config_path), *words)
    process = subprocess.Popen(
        [*prefix, *COMMAND, "up", "--instance", instance, *words],
        env=place.environ(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    daemon = Daemon(place, process, instance, config_path)
    daemon.collect()
    if wait:
        try:
            daemon.wait_for_line(
                LISTENING.pattern, count=listener_count(config), deadline_s=START_DEADLINE_S
            )
        except BaseException:
            daemon.close()
            raise
    return daemon


def listener_count(config: str | None) -> int:
    """How many `listening on` lines this configuration leads to."""
    parsed = yaml.safe_load(config) if config else None
    return len((parsed or {}).get("listeners", [None]))


def leftovers(place: Place) -> list[str]:
    """What a daemon that has ended must not have left behind; [] if all is clean."""
    found = [f"process {process.pid}: {process.name()}" for process in place.processes()]
    found += [f"pin {path}" for path in place.pins()]
    found += [
        f"{path}: {stat.filemode(path.lstat().st_mode)}"
        for path in place.run_files()
        if path.name in {"control", "pid"} or "proc" in path.parts[len(place.run_dir.parts) :]
    ]
    return found


@contextlib.contextmanager
def mounted_bpffs(directory: Path) -> Iterator[Path]:
    """A bpffs of its own at `directory`; unmounting it drops every pin that is left."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
