"""How each target is configured, started and stopped.

Peers get what a careful administrator gives them (threads for every CPU, several server addresses,
no logging), and else their defaults.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.measures import DIRECT, EXPRESS, OURS
from bench.topology import (
    DATAGRAM_PORT,
    FORWARDER_PORT,
    HOST_PORT,
    INSTRUCTION_PORT,
    SERVER_PORT,
    SNI_PORT,
)
from pyforwarder.client import ControlClient
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.children import ENVIRONMENT, surroundings
from pyforwarder.runtime.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.topology import Site
    from pyforwarder.client import Json

START_TIMEOUT_S: Final = 60.0  # pyforwarder compiles and tests its datapaths first
STOP_TIMEOUT_S: Final = 20.0
CPUS: Final = len(os.sched_getaffinity(0))
# Descriptors of a forwarder besides two per pair: listeners, logs, epoll.
SPARE_FILES: Final = 200
# HAProxy reserves two descriptors for each pipe it may splice with, by default for a quarter of
# all connections: enough for the streams that are measured leaves more of them for idle pairs.
HAPROXY_PIPES: Final = 128
KERNEL_DATAPATHS: Final = ("sockmap", "splice", EXPRESS)
# The most there may be: one that has ended keeps its port for a second.
EXPRESS_PORTS: Final = 16_384
# What clients ask for where rules read it.
SERVER_NAME: Final = "www.example.com"
TAKE_NAMES: Final = (DIRECT, "haproxy", *OURS)
# Nobody tells a forwarder that a run is over: its sessions are gone before they are too many.
SESSION_IDLE_S: Final = 30
# sockmap has none, and would be a second row `copy`.
TAKE_DATAGRAMS: Final = (DIRECT, "nginx", "socat", "copy", "splice", "auto")

# One process per connection: ten thousand of them measure the scheduler, not the forwarder.
FORKING_MAX_PAIRS: Final = 1_000
FORKING: Final = ("sslh", "socat")
SELECT_MAX_PAIRS: Final = 500  # FD_SETSIZE is 1024 and a pair takes two descriptors


class TargetError(Exception):
    """A target that does not start, or is not what its name says; the text tells why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running target: the process to look at (None: direct), and a pyforwarder's instance."""

    name: str
    pid: int | None
    max_pairs: int
    instance: Instance | None = None

    @property
    def takes_instructions(self) -> bool:
        """Whether it has a listener for them."""
        return self.instance is not None

    @property
    def max_sessions(self) -> int:
        """How many sessions of UDP it can have; 0: it does not forward UDP."""
        if self.name not in TAKE_DATAGRAMS:
            return 0
        return FORKING_MAX_PAIRS if self.name in FORKING else most_sessions()

    def datapaths(self) -> str:
        """What a pyforwarder says of its datapaths, `auto` for example by which it stands for.

        Raises:
            TargetError: it does not answer.
        """
        if self.instance is None:
            return ""
        known = _stats(self.instance).get("datapaths")
        items = known.items() if isinstance(known, dict) else ()
        return ", ".join(f"{name} {state}" for name, state in items)

    def joined(self) -> int | None:
        """How many pairs its own datapath has had so far; None where that needs no proof.

        A datapath that fails its self-test is replaced, and pairs may be refused one by one:
        without this the row `sockmap` could be a second row `copy`.

        Raises:
            TargetError: pyforwarder does not answer.
        """
        if self.instance is None or self.name not in KERNEL_DATAPATHS:
            return None
        return _count(_stats(self.instance), "joined", self.name)

    def opened(self) -> int:
        """How many pairs a pyforwarder has had so far; 0 of another.

        Raises:
            TargetError: it does not answer.
        """
        if self.instance is None:
            return 0
        value = _stats(self.instance).get("pairs_opened", 0)
        return value if isinstance(value, int) else 0

    def left(self) -> dict[str, int]:
        """Why the kernel has left packets of clients to a worker, and how often, so far.

        Raises:
            TargetError: it does not answer.
        """
        if self.instance is None:
            return {}
        known = _stats(self.instance).get("express_left")
        items = known.items() if isinstance(known, dict) else ()
        return {reason: number for reason, number in items if isinstance(number, int)}

    def spliced(self) -> int | None:
        """How many pairs and sessions the kernel has been given; None where it gets no sessions.

        Raises:
            TargetError: pyforwarder does not answer.
        """
        if self.instance is None or self.name not in ("splice", "auto"):
            return None
        return _count(_stats(self.instance), "joined", "splice")

    def end_sessions(self) -> None:
        """End what a pyforwarder still has: a client's port that comes again begins a session anew.

        Of the others nobody can ask that: there a session ends when it was idle.

        Raises:
            TargetError: pyforwarder does not answer.
        """
        if self.instance is None:
            return
        try:
            ControlClient(self.instance).flush_all()
        except ForwarderError as error:
            raise TargetError(f"does not answer: {error}") from error


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A command in the forwarder's namespace, and how to end it before signals are used."""

    command: list[str]
    environment: dict[str, str]
    stop_command: list[str] | None = None
    ports: tuple[int, ...] = (FORWARDER_PORT,)
    max_pairs: int | None = None


def most_pairs() -> int:
    """How many pairs one process may hold, by its limit of open files."""
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES) // 2


def most_sessions() -> int:
    """How many sessions of UDP one process may hold, each a socket."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES


def haproxy_config(site: Site) -> str:
    """HAProxy in TCP mode with kernel splicing, a thread per CPU."""
    servers = "\n".join(
        f"    server s{n} {ip}:{SERVER_PORT}" for n, ip in enumerate(site.servers.addresses())
    )
    return f"""\
global
    maxconn {most_pairs() - HAPROXY_PIPES}
    maxpipes {HAPROXY_PIPES}
    nbthread {CPUS}
defaults
    mode tcp
    option splice-auto
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend clients
    bind {site.listen_ip}:{FORWARDER_PORT}
    default_backend servers
frontend tls
    bind {site.listen_ip}:{SNI_PORT}
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend servers if {{ req.ssl_sni -i {SERVER_NAME} }}
frontend http
    bind {site.listen_ip}:{HOST_PORT}
    tcp-request inspect-delay 5s
    tcp-request content accept if HTTP
    use_backend servers if {{ req.hdr(host) -i {SERVER_NAME} }}
backend servers
    balance roundrobin
{servers}
"""


def nginx_config(site: Site, directory: Path) -> str:
    """nginx's stream module, a worker per CPU with a listener of its own."""
    servers = "\n".join(f"        server {ip}:{SERVER_PORT};" for ip in site.servers.addresses())
    return f"""\
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
pid {directory}/nginx.pid;
error_log stderr warn;
worker_processes {CPUS};
events {{
    worker_connections {2 * most_pairs()};
}}
stream {{
    upstream servers {{
{servers}
    }}
    server {{
        listen {site.listen_ip}:{FORWARDER_PORT} reuseport backlog=4096;
        proxy_pass servers;
        proxy_timeout 1h;
    }}
    server {{
        listen {site.listen_ip}:{DATAGRAM_PORT} udp reuseport;
        proxy_pass {site.servers.first}:{SERVER_PORT};
        proxy_timeout {SESSION_IDLE_S}s;
    }}
}}
"""


def pyforwarder_config(site: Site, datapath: str) -> str:
    """Listeners: one that forwards anything, as the peers do, and others for what is said first.

    `express` has ports of its own.
    """
    servers = ", ".join(f'"{ip}:{SERVER_PORT}"' for ip in site.servers.addresses())
    allowed = ", ".join(f'"{ip}/32:{SERVER_PORT}"' for ip in site.servers.addresses())
    ports = f"\nexpress: {{ports: {EXPRESS_PORTS}}}" if datapath == EXPRESS else ""
    return f"""\
datapath: {datapath}{ports}
listeners:
  - name: anything
    bind: {site.listen_ip}:{FORWARDER_PORT}
    datapath: {datapath}
    rules:
      - {{name: all, match: any, to: servers}}
  - name: named
    bind: {site.listen_ip}:{INSTRUCTION_PORT}
    datapath: {datapath}
    rules:
      - {{name: instruction, match: instruction, allow: [{allowed}]}}
  - name: sni
    bind: {site.listen_ip}:{SNI_PORT}
    datapath: {datapath}
    rules:
      - {{name: sni, match: {{tls: {{sni: {SERVER_NAME}}}}}, to: servers}}
  - name: host
    bind: {site.listen_ip}:{HOST_PORT}
    datapath: {datapath}
    rules:
      - {{name: host, match: {{http: {{host: {SERVER_NAME}}}}}, to: servers}}
  - name: datagrams
    bind: {site.listen_ip}:{DATAGRAM_PORT}
    protocol: udp
    idle: {SESSION_IDLE_S}s
    datapath: {datapath if datapath in TAKE_DATAGRAMS else "copy"}
    rules:
      - {{name: datagrams, match: any, to: "{site.servers.first}:{SERVER_PORT}"}}
upstreams:
  servers: {{balance: round_robin, servers: [{servers}]}}
limits: {{pairs: {most_pairs()}, sessions: {most_sessions()}}}
log: {{level: warning}}
"""


def _haproxy(site: Site, directory: Path, _name: str) -> _Recipe:
    config = directory / "haproxy.cfg"
    config.write_text(haproxy_config(site), encoding="ascii")
    command = ["haproxy", "-db", "-f", str(config)]
    return _Recipe(
        command,
        {},
        ports=(FORWARDER_PORT, SNI_PORT, HOST_PORT),
        max_pairs=most_pairs() - HAPROXY_PIPES,
    )


def _nginx(site: Site, directory: Path, _name: str) -> _Recipe:
    config = directory / "nginx.conf"
    config.write_text(nginx_config(site, directory), encoding="ascii")
    return _Recipe(["nginx", "-e", "stderr", "-p", str(directory), "-c", str(config)], {})


def _sslh(site: Site, directory: Path, name: str) -> _Recipe:
    # fmt: off
    command = [
        name, "-f", "-n", "-u", "nobody", "-P", str(directory / "sslh.pid"),
        "-p", f"{site.listen_ip}:{FORWARDER_PORT}",
        "--anyprot", f"{site.servers.first}:{SERVER_PORT}",
    ]
    # fmt: on
    max_pairs = SELECT_MAX_PAIRS if name == "sslh-select" else FORKING_MAX_PAIRS
    return _Recipe(command, {}, max_pairs=max_pairs)


def _socat(site: Site, _directory: Path, _name: str) -> _Recipe:
    listen = (
        f"TCP-LISTEN:{FORWARDER_PORT},bind={site.listen_ip},reuseaddr,fork,backlog=4096,nodelay"
    )
    # -t: how long the other direction may still flow after one ended; the default of half a
    # second would cut slow ones
    to = f"{site.servers.first}:{SERVER_PORT}"
    datagrams = f"UDP-LISTEN:{DATAGRAM_PORT},bind={site.listen_ip},reuseaddr,fork"
    # Two of them, each a child of the shell, which is the process to look at.
    streams = f"socat -t 30 -b 65536 {listen} TCP:{to},nodelay"
    script = f"socat -T {SESSION_IDLE_S} {datagrams} UDP:{to} & {streams} & wait"
    return _Recipe(["sh", "-c", script], {}, max_pairs=FORKING_MAX_PAIRS)


def _pyforwarder(site: Site, directory: Path, name: str) -> _Recipe:
    config = directory / "pyforwarder.yaml"
    config.write_text(pyforwarder_config(site, name), encoding="ascii")
    program = str(Path(sys.executable).with_name("pyforwarder"))
    return _Recipe(
        [program, "up", "-c", str(config)],
        {
            "PYFORWARDER_RUN_DIR": str(directory / "run"),
            # pins have to live on a bpffs, and this is where pyforwarder mounts one if need be
            "PYFORWARDER_BPFFS": f"/sys/fs/bpf/pyforwarder-bench-{os.getpid()}-{name}",
        },
        stop_command=[program, "down", "--now"],
        ports=(FORWARDER_PORT, INSTRUCTION_PORT, DATAGRAM_PORT, SNI_PORT, HOST_PORT),
    )


_RECIPES: Final[Mapping[str, Callable[[Site, Path, str], _Recipe]]] = {
    "haproxy": _haproxy,
    "nginx": _nginx,
    "sslh": _sslh,
    "sslh-select": _sslh,
    "socat": _socat,
    **dict.fromkeys(OURS, _pyforwarder),
}


def _stats(instance: Instance) -> dict[str, Json]:
    try:
        return ControlClient(instance).stats()
    except ForwarderError as error:
        raise TargetError(f"does not answer: {error}") from error


def _count(stats: dict[str, Json], group: str, name: str) -> int:
    values = stats.get(group)
    value = values.get(name, 0) if isinstance(values, dict) else 0
    return value if isinstance(value, int) else 0


def _prove_datapath(instance: Instance, name: str) -> None:
    """Raise TargetError where pyforwarder runs, but without the datapath asked for."""
    datapaths = _stats(instance).get("datapaths")
    state = datapaths.get(name) if isinstance(datapaths, dict) else None
    if name in KERNEL_DATAPATHS and state != "available":
        raise TargetError(f"runs without this datapath: {state or 'not known to it'}")


def listening_ports(table: str) -> set[int]:
    """The listening ports in the text of a /proc/PID/net/tcp."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def _is_ready(process: subprocess.Popen[bytes], name: str, recipe: _Recipe, log: Path) -> bool:
    """Whether the target accepts: pyforwarder says so itself, of the others the kernel knows.

    Nobody connects to find out: a probe would be the target's first connection.
    """
    if name in OURS:  # it listens long before: its datapaths are tested in between
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(line.startswith("listening on ") for line in lines) == len(recipe.ports)
    try:
        table = Path(f"/proc/{process.pid}/net/tcp").read_text(encoding="ascii")
    except OSError:  # it ended meanwhile
        return False
    return set(recipe.ports) <= listening_ports(table)


def _await_ready(process: subprocess.Popen[bytes], name: str, recipe: _Recipe, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _is_ready(process, name, recipe, log):
            return
        time.sleep(0.05)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
    why = "does not listen" if process.poll() is None else f"ended ({process.returncode})"
    raise TargetError(f"{why}; its last words:\n{tail}")


def _end(process: subprocess.Popen[bytes], *, stop: Callable[[], object] | None) -> None:
    if stop is not None and process.poll() is None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            stop()
    try:
        if process.poll() is None:
            process.terminate()
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    # What is left of its session: children of forking targets, workers of a hanging one.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(name: str, site: Site, directory: Path) -> Iterator[Target]:
    """The target, listening; it and all its processes are gone after the block.

    Raises:
        TargetError: it did not start.
    """
    if name == DIRECT:
        yield Target(name, None, most_pairs())
        return
    recipe = _RECIPES[name](site, directory, name)
    environment = {**ENVIRONMENT, **recipe.environment}
    # It ends with us even if we are killed; and only its network is another, because
    # `ip netns exec` would also hide the bpffs.
    command = ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net={site.forwarder_ns}", "--"]
    command += recipe.command
    log = directory / "log"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **surroundings(recipe.environment),
            )
        except OSError as error:
            raise TargetError(str(error)) from error

    def stop() -> None:
        assert recipe.stop_command is not None
        subprocess.run(
            recipe.stop_command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=STOP_TIMEOUT_S,
            **surroundings(recipe.environment),
        )

    try:
        _await_ready(process, name, recipe, log)
        instance = Instance.named("default", environment) if name in OURS else None
        if instance is not None:
            _prove_datapath(instance, name)
        yield Target(name, process.pid, recipe.max_pairs or most_pairs(), instance)
    finally:
        _end(process, stop=stop if recipe.stop_command else None)
        bpffs = recipe.environment.get("PYFORWARDER_BPFFS")
        if bpffs:
            with contextlib.suppress(OSError):  # it holds something: leave it to be looked at
                Path(bpffs).rmdir()
