"""The only place where processes are made: forked, or run anew.

Most of what we start runs as root, often from a directory and with an environment of somebody
else. So no child has any of that: it works in `/`, sees the few variables below, makes files that
are its user's alone, and has no descriptor beside those that are named. Paths that a child is to
open are absolute.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from pyforwarder.runtime import slowness, store
from pyforwarder.runtime.tables import visible

# What a child sees: root's usual PATH, not the caller's; no PYTHON*, LD_*, TMPDIR.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
_UMASK: Final = 0o077
# A terminal's Ctrl-C reaches the whole group, and a service manager may signal the group, too.
TOLD_TO_GROUPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Run by `python -I`, which looks neither at the working directory nor at PYTHON*.
_BOOT: Final = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python_path() -> list[str]:
    """Return the directories from which a child imports: ours, except the working directory.

    `python -m` puts that first, and an empty element of PYTHONPATH means it. Only where our own
    package lies in it is it needed.
    """
    home = str(Path(__file__).resolve().parents[2])
    try:
        present = os.getcwd()
    except FileNotFoundError:
        present = ""
    found = [path for path in sys.path if os.path.isabs(path) and path != present]
    return found if home in found else [home, *found]


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as a program, in the interpreter that runs us."""
    return [sys.executable, "-I", "-c", _BOOT, json.dumps(python_path()), module, *arguments]


def run(
    command: Sequence[str],
    *,
    input: bytes | None = None,
    pass_fds: Sequence[int] = (),
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, with any exit code; without `input` it reads nothing.

    Raises:
        OSError: it does not start.
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    return subprocess.run(
        list(command),
        capture_output=True,
        check=False,
        pass_fds=pass_fds,
        timeout=timeout_s,
        **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        **surroundings(variables),
    )


def start(
    command: Sequence[str],
    *,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.DEVNULL,
    stderr: int | IO[Any] | None = None,
    variables: Mapping[str, str] | None = None,
    start_new_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program; the caller waits for its end.

    Raises:
        OSError: it does not start.
    """
    return subprocess.Popen(
        list(command),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=start_new_session,
        **surroundings(variables),
    )


def surroundings(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What subprocess must be told for every child; `variables` come on top of `ENVIRONMENT`."""
    environment = {**_environment(), **(variables or {})}
    return {"env": environment, "cwd": "/", "umask": _UMASK, "close_fds": True}


def fork(child: Callable[[], int]) -> int:
    """The new process's id; there `child` runs, and its result is the exit code.

    Nothing of the caller's is cleaned up there, and no buffered output written twice. It ignores
    what is sent to the whole group: only its parent decides when it ends.

    Raises:
        OSError: of processes or memory none is left.
    """
    # Until the child ignores them they would do there what the parent has said for itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD_TO_GROUPS)
    try:
        pid = os.fork()
        if pid == 0:
            for number in TOLD_TO_GROUPS:
                signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if pid:
        return pid
    code = 1
    try:
        leave_caller()
        code = child()
    except BaseException:
        sys.stderr.write(visible(traceback.format_exc()))
    finally:
        os._exit(code)


def leave_caller() -> None:
    """Leave the caller's directory, environment and umask behind; called in a forked child."""
    os.chdir("/")
    os.umask(_UMASK)
    environment = _environment()
    os.environ.clear()
    os.environ.update(environment)


def _environment() -> dict[str, str]:
    """What a child sees.

    Its deadlines are as long as ours, and it keeps its programs where we do, so it sees both, too.
    """
    factor = slowness.factor()
    return {
        **ENVIRONMENT,
        **({slowness.VARIABLE: f"{factor:g}"} if factor > 1 else {}),
        **store.told_to_children(),
    }


def keep_only(fds: Iterable[int]) -> None:
    """Close every descriptor but the standard ones and `fds`; called in a forked child.

    A stranger that takes it over can use no descriptor that the caller has forgotten to close.
    """
    # What nobody refers to any more closes its own now, not later, when the number is another's.
    gc.collect()
    kept = {0, 1, 2, *fds}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in kept:
            with contextlib.suppress(OSError):  # the one that lists them
                os.close(fd)


def detach(child: Callable[[], int]) -> None:
    """Run `child` in a session of its own; its parent is gone at once.

    It is a daemon that goes on as its caller has begun: directory, environment and umask stay.
    """
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    code = 1
    try:
        os.setsid()
        # A second fork: a session leader could get a controlling terminal back.
        code = 0 if os.fork() else child()
    finally:
        os._exit(code)
