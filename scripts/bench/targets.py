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

from bench.measures import DIRECT, OURS
from bench.topology import FORWARDER_PORT, INSTRUCTION_PORT, SERVER_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.topology import Site

START_TIMEOUT_S: Final = 60.0  # pyforwarder compiles and tests its datapaths first
STOP_TIMEOUT_S: Final = 20.0
CPUS: Final = len(os.sched_getaffinity(0))
# Descriptors of a forwarder besides two per pair: listeners, logs, epoll.
SPARE_FILES: Final = 200
# HAProxy reserves two descriptors for each pipe it may splice with, by default for a quarter of
# all connections: enough for the streams that are measured leaves more of them for idle pairs.
HAPROXY_PIPES: Final = 128

# One process per connection: ten thousand of them measure the scheduler, not the forwarder.
FORKING_MAX_PAIRS: Final = 1_000
SELECT_MAX_PAIRS: Final = 500  # FD_SETSIZE is 1024 and a pair takes two descriptors


class TargetError(Exception):
    """A target that does not start; the text holds its last words."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running target: where clients connect to, and the process to look at (None: direct)."""

    name: str
    pid: int | None
    max_pairs: int
    takes_instructions: bool


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
}}
"""


def pyforwarder_config(site: Site, datapath: str) -> str:
    """Two listeners: one that forwards anything, as the peers do, and one for instructions."""
    servers = ", ".join(f'"{ip}:{SERVER_PORT}"' for ip in site.servers.addresses())
    allowed = ", ".join(f'"{ip}/32:{SERVER_PORT}"' for ip in site.servers.addresses())
    return f"""\
datapath: {datapath}
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
upstreams:
  servers: {{balance: round_robin, servers: [{servers}]}}
limits: {{pairs: {most_pairs()}}}
log: {{level: warning}}
"""


def _haproxy(site: Site, directory: Path, _name: str) -> _Recipe:
    config = directory / "haproxy.cfg"
    config.write_text(haproxy_config(site), encoding="ascii")
    command = ["haproxy", "-db", "-f", str(config)]
    return _Recipe(command, {}, max_pairs=most_pairs() - HAPROXY_PIPES)


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
    # fmt: off
    command = [
        "socat", "-t", "30", "-b", "65536", listen,
        f"TCP:{site.servers.first}:{SERVER_PORT},nodelay",
    ]
    # fmt: on
    return _Recipe(command, {}, max_pairs=FORKING_MAX_PAIRS)


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
        ports=(FORWARDER_PORT, INSTRUCTION_PORT),
    )


_RECIPES: Final[Mapping[str, Callable[[Site, Path, str], _Recipe]]] = {
    "haproxy": _haproxy,
    "nginx": _nginx,
    "sslh": _sslh,
    "sslh-select": _sslh,
    "socat": _socat,
    **dict.fromkeys(OURS, _pyforwarder),
}


def listening_ports(table: str) -> set[int]:
    """The listening ports in the text of a /proc/PID/net/tcp."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def _await_ports(process: subprocess.Popen[bytes], ports: tuple[int, ...], log: Path) -> None:
    """Wait until the process's namespace listens on all ports.

    By the kernel's table, not by connecting: a probe would be the target's first connection.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    table = Path(f"/proc/{process.pid}/net/tcp")
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # it ended meanwhile
            if set(ports) <= listening_ports(table.read_text(encoding="ascii")):
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
        yield Target(name, None, most_pairs(), takes_instructions=False)
        return
    recipe = _RECIPES[name](site, directory, name)
    environment = {**os.environ, **recipe.environment}
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
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(str(error)) from error

    def stop() -> None:
        assert recipe.stop_command is not None
        subprocess.run(
            recipe.stop_command,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=STOP_TIMEOUT_S,
        )

    try:
        _await_ports(process, recipe.ports, log)
        yield Target(name, process.pid, recipe.max_pairs or most_pairs(), name in OURS)
    finally:
        _end(process, stop=stop if recipe.stop_command else None)
        bpffs = recipe.environment.get("PYFORWARDER_BPFFS")
        if bpffs:
            with contextlib.suppress(OSError):  # it holds something: leave it to be looked at
                Path(bpffs).rmdir()
