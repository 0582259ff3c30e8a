"""A guest in qemu: it gets a checkout and a job, and leaves its output and files."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from kernels.images import ROOT, Kernel

MEMORY: Final = "2G"
OUT_BYTES: Final = 64 << 20
_BLOCK: Final = 512
# What git does not know about a checkout that is none (a copy without .git).
_NOT_SOURCES: Final = {
    *(".git", ".venv", ".container", ".fuzz", "build", "dist", "__pycache__", ".hypothesis"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache"),
}


_running: set[subprocess.Popen[bytes]] = set()


def end_all() -> None:
    """End every guest that runs; a caller of `boot` that waits for one sees it end."""
    for process in tuple(_running):
        process.kill()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a guest ended: the job's exit code, or None if it did not come to its end."""

    code: int | None
    why: str
    out: Path  # what the job left in /out


def sources() -> list[str]:
    """The files of this checkout as they are now, committed or not."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    else:
        names = []
        for directory, folders, files in os.walk(ROOT):
            folders[:] = [folder for folder in folders if folder not in _NOT_SOURCES]
            names += [str((Path(directory) / file).relative_to(ROOT)) for file in files]
    return sorted(name for name in names if (ROOT / name).is_file())


def pack(job: str, path: Path) -> None:
    """Write the tar that a guest lays out: the checkout as src/, and the job."""
    with tarfile.open(path, "w") as archive:
        for name in sources():
            archive.add(ROOT / name, f"src/{name}")
        entry = tarfile.TarInfo("job")
        entry.size = len(job.encode())
        archive.addfile(entry, io.BytesIO(job.encode()))
    os.truncate(path, -(-path.stat().st_size // _BLOCK) * _BLOCK)  # a disk has whole blocks


def unpack(tar: Path, out: Path) -> bool:
    """Lay out what a guest left; False if it wrote nothing, or no tar."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(  # Debian 12's tarfile cannot refuse what points out of `out`
        ["tar", "-xf", str(tar), "-C", str(out), "--no-same-owner"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0 and (out / "status").exists()


def boot(
    kernel: Kernel,
    root: Path,
    job: str,
    *,
    command_line: str,
    console: IO[bytes] | None,
    out: Path,
    timeout_s: float,
) -> Ended:
    """Boot, run the job, wait for its end; the guest's writes to its root are forgotten.

    `console` gets what the guest says; None: it is this process's terminal.
    """
    with tempfile.TemporaryDirectory(prefix="pyforwarder-guest-") as scratch:
        given, left = Path(scratch) / "given.tar", Path(scratch) / "left.tar"
        pack(job, given)
        with left.open("wb") as file:
            file.truncate(OUT_BYTES)
        process = subprocess.Popen(
            _command(kernel, root, given, left, command_line),
            stdin=None if console is None else subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env={**os.environ, "TMPDIR": scratch},  # where qemu keeps what is forgotten
        )
        _running.add(process)
        why = "the guest ended before its job (a panic?)"
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            why = f"not done after {timeout_s:.0f} s"
        finally:
            process.kill()
            process.wait()
            _running.discard(process)
        if not unpack(left, out):
            return Ended(None, why, out)
    status = out / "status"
    if not status.exists():
        return Ended(None, why, out)
    code = int(status.read_text(encoding="utf-8"))
    return Ended(code, f"the job ended with {code}", out)


def _command(kernel: Kernel, root: Path, given: Path, left: Path, more: str) -> list[str]:
    drives = (
        f"file={root},snapshot=on",
        f"file={kernel.path / 'modules'},readonly=on",
        f"file={given},readonly=on",
        f"file={left}",
    )
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi"),
        # cx16: with QEMU 7.2's emulation of cmpxchg16b, Linux 6.12 panics.
        *("-cpu", "max,-cx16", "-m", MEMORY, "-smp", "1"),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel.path / "vmlinuz"), "-initrd", str(kernel.path / "initrd")),
        *(word for drive in drives for word in ("-drive", f"if=virtio,format=raw,{drive}")),
        *("-append", f"console=ttyS0 quiet panic=-1 {more}".strip()),
    ]
