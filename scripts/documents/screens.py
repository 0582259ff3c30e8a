"""Take the pictures of `demo` and `top` in docs/pictures/: real runs, as they come out.

    sudo scripts/documents/run --screens

What they show differs from run to run, so no check compares them.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from pyforwarder.cli import rates
from pyforwarder.cli.processes import LocalProcesses
from pyforwarder.cli.top_screen import Screen, look
from pyforwarder.client import ControlClient, connect
from pyforwarder.runtime.environment import Environment
from pyforwarder.runtime.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

_DEADLINE_S: Final = 120.0
_BLOCK: Final = bytes(1 << 16)
_CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: named, match: instruction, allow: [loopback]}]
"""


def take(directory: Path) -> list[Path]:
    """Write both pictures into `directory`; returns their paths.

    Raises:
        subprocess.CalledProcessError: `demo` has failed.
        ForwarderError: the daemon did not answer.
    """
    said = subprocess.run(
        [sys.executable, "-m", "pyforwarder", "demo"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_DEADLINE_S,
        text=True,
    ).stdout
    width = max(len(line) for line in said.splitlines())
    return [
        _picture(directory / "demo.svg", Text(said.strip()), "sudo pyforwarder demo", width),
        _picture(directory / "top.svg", _top(), "pyforwarder top", 100),
    ]


def _picture(path: Path, what: RenderableType, title: str, width: int) -> Path:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    text = console.export_svg(title=title)
    # Fonts from elsewhere are not fetched for a picture; the reader's own will do.
    path.write_text(re.sub(r"@font-face \{.*?\}", "", text, flags=re.DOTALL))
    return path


def _top() -> RenderableType:
    """The screen of `top` over a daemon with three busy pairs and an idle one."""
    with (
        tempfile.TemporaryDirectory(prefix="screens-") as directory,
        _daemon(Path(directory)) as (via, control),
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.ExitStack() as stack,
    ):
        threading.Thread(target=_discard_all, args=(listener,), daemon=True).start()
        destination = f"127.0.0.1:{listener.getsockname()[1]}"
        pairs = [stack.enter_context(connect(destination, via=via)) for _ in range(4)]
        for number, pair in enumerate(pairs[:3]):
            pause_s = 0.001 * 4**number
            threading.Thread(target=_send, args=(pair, pause_s), daemon=True).start()
        environment = Environment.of_process()
        screen = Screen("default", LocalProcesses(environment.monotonic_s))
        meter, totals = rates.Meter(), rates.TotalsMeter()
        for _ in range(4):
            look(screen, control, meter, totals, now_s=environment.monotonic_s())
            time.sleep(1)
        return screen.draw(100, 24)


@contextlib.contextmanager
def _daemon(directory: Path) -> Iterator[tuple[str, ControlClient]]:
    (directory / "screens.yaml").write_text(_CONFIG)
    environ = {"PYFORWARDER_RUN_DIR": str(directory), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyforwarder", "up", "-c", directory / "screens.yaml"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # listening on 127.0.0.1:40001 (main)
        yield line.split()[2], ControlClient(Instance.named("default", environ))
    finally:
        process.terminate()
        process.wait(timeout=_DEADLINE_S)


def _discard_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=_discard, args=listener.accept()[:1], daemon=True).start()


def _discard(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        while data := sock.recv(len(_BLOCK)):
            sock.sendall(data[: len(data) // 8])


def _send(sock: socket.socket, pause_s: float) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(_BLOCK)
            sock.recv(len(_BLOCK))
            time.sleep(pause_s)
