"""What is booted: a root for each suite of Debian, and for each kernel an initrd and its modules.

Both are kept in a cache outside of the checkout, under a key of all that they are made from, and
appear there whole or not at all. The checkout itself is in neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from kernels.guests import Guest

ROOT: Final = Path(__file__).resolve().parents[2]
INSIDE: Final = Path(__file__).resolve().parent / "guest"
# Of each kind so many are kept: those of a few branches, and of the kernels of some months.
KEPT_ROOTS: Final = 4
KEPT_KERNELS: Final = 8
ROOT_BYTES: Final = 6 << 30  # a sparse file; what the guest writes goes with it
# What a root is made from. (The version that the checkout has when the root is made is in it, too.)
_ROOT_SOURCES: Final = (
    "pyproject.toml",
    "packaging/locks/test.txt",
    "pyforwarder/__init__.py",
    "scripts/prepare",
    "scripts/container/build",
    "scripts/container/sources",
    "scripts/container/Containerfile",
    "scripts/kernels/images.py",
    "scripts/kernels/guest/init",
)
# The packages that hold a kernel, among those that an image package brings.
_KERNEL_PACKAGES: Final = ("linux-image-", "linux-modules-", "linux-binary-", "linux-base-")
# Modules that the initrd takes to find the root; where they are built in, modprobe lists nothing.
_MODULES: Final = ("virtio_pci", "virtio_blk", "ext4")
_UNPACK: Final = {".xz": ("xz", "-dc"), ".zst": ("zstd", "-dc"), ".gz": ("gzip", "-dc")}


class BuildError(Exception):
    """An image could not be made; the text ends with what the failing program said."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A directory with `vmlinuz`, `initrd` and `modules`, and what the kernel calls itself."""

    path: Path
    package: str  # with its version
    release: str


def cache_directory() -> Path:
    """Where images are kept; made if missing."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache")
    path = base / "pyforwarder" / "guests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(*words: str | Path, **options: object) -> str:
    """A program's output.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise BuildError(f"{' '.join(map(str, words))} failed:\n{said}")
    return str(done.stdout)


def key_of(*parts: bytes) -> str:
    """A short name for exactly these parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One builder at a time."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A directory to work in; what is made as `it / path.name` appears as `path`, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
    try:
        yield work
        (work / path.name).rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def keep_newest(directory: Path, count: int) -> None:
    """Remove what has not been used for longest, and what a killed builder left."""
    entries = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    finished = [path for path in entries if not path.name.startswith(".making-")]
    for path in [path for path in entries if path not in finished] + finished[count:]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def root_for(suite: str) -> Path:
    """The disk with that suite's userland and everything that scripts/test needs.

    Raises:
        BuildError: it could not be made.
    """
    key = key_of(*((ROOT / name).read_bytes() for name in _ROOT_SOURCES))
    path = cache_directory() / "roots" / f"{suite}-{key}.ext4"
    with locked(cache_directory()):
        if not path.exists():
            click.echo(f"making the root of {suite}", err=True)
            # The same image in which the tests run in a container.
            image = run(ROOT / "scripts/container/build", "--suite", suite, "guest").split()[-1]
            with appearing(path) as work:
                disk = work / path.name
                tree = run("podman", "image", "mount", image).strip()
                try:
                    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, disk,
                        f"{ROOT_BYTES >> 20}M")  # fmt: skip
                finally:
                    run("podman", "image", "unmount", image)
        os.utime(path)
        keep_newest(path.parent, KEPT_ROOTS)
    return path


def kernel_for(guest: Guest) -> Kernel:
    """The newest kernel of that name in its release, as the mirror has it now.

    Where the mirror does not answer it is the newest that the cache has.

    Raises:
        BuildError: there is none.
    """
    with locked(cache_directory()):
        home = cache_directory() / "kernels"
        home.mkdir(exist_ok=True)
        try:
            apt = _Apt(guest.suite, backports=guest.release.endswith("-backports"))
            packages = apt.kernel_packages(guest.release, guest.package)
        except BuildError as error:
            stem = _stem(guest)
            known = sorted(home.glob(f"{stem}@*"), key=lambda path: path.stat().st_mtime)
            if not known:
                raise
            click.echo(f"{guest.name}: taken from the cache, because {error}", err=True)
            return _kernel_at(known[-1])
        key = key_of(Path(__file__).read_bytes(), (INSIDE / "initrd").read_bytes())
        version = next(p for p in packages if p.startswith("linux-image-")).partition("=")[2]
        path = home / f"{_stem(guest)}@{version}@{key}"
        if not path.exists():
            click.echo(f"making the kernel {guest.release}/{guest.package} {version}", err=True)
            with appearing(path) as work:
                _lay_out_kernel(apt, packages, work, work / path.name)
        os.utime(path)
        keep_newest(home, KEPT_KERNELS)
        return _kernel_at(path)


def _stem(guest: Guest) -> str:
    return f"{guest.release}+{guest.package}".replace("/", "+")


def _kernel_at(path: Path) -> Kernel:
    package, release = (path / "names").read_text(encoding="utf-8").split()
    return Kernel(path, package, release)


class _Apt:
    """apt with this host's settings and keys, and the sources of another suite."""

    def __init__(self, suite: str, *, backports: bool) -> None:
        self.home = cache_directory() / f"apt-{suite}{'-backports' if backports else ''}"
        for name in ("lists/partial", "cache/archives/partial"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()  # nothing is installed
        # A release has no backports for as long as it has security fixes, so only who needs them.
        lines = run(ROOT / "scripts/container/sources", suite).splitlines(keepends=True)
        (self.home / "sources.list").write_text(
            "".join(line for line in lines if backports or "-backports" not in line),
            encoding="utf-8",
        )
        settings = {
            "Dir::Etc::sourcelist": self.home / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self.home / "lists",
            "Dir::State::status": self.home / "status",
            "Dir::Cache": self.home / "cache",
            "APT::Sandbox::User": "root",  # it may not enter a directory of root's
        }
        (self.home / "apt.conf").write_text(
            "".join(f'{name} "{value}";\n' for name, value in settings.items()), encoding="utf-8"
        )
        self._environ = {**os.environ, "APT_CONFIG": str(self.home / "apt.conf")}
        self._get("update")

    def _get(self, *words: str, cwd: Path | None = None) -> str:
        return run("apt-get", "-q", *words, env=self._environ, cwd=cwd)

    def kernel_packages(self, release: str, package: str) -> list[str]:
        """NAME=VERSION of the packages that hold the kernel, without what would install it."""
        target = ["-t", release] if release.endswith("-backports") else []
        plan = self._get("-s", "--no-install-recommends", *target, "install", package)
        found = [
            f"{words[1]}={words[2].removeprefix('(')}"
            for words in map(str.split, plan.splitlines())
            if words[:1] == ["Inst"]
            and any(
                words[1].startswith(stem) and words[1].removeprefix(stem)[:1].isdigit()
                for stem in _KERNEL_PACKAGES
            )
        ]
        if not any(name.startswith("linux-image-") for name in found):
            raise BuildError(f"{release} has no kernel {package}:\n{plan[-500:]}")
        return found

    def download(self, packages: Sequence[str], directory: Path) -> list[Path]:
        """The packages as files."""
        self._get("download", *packages, cwd=directory)
        return sorted(directory.glob("*.deb"))


def _lay_out_kernel(apt: _Apt, packages: Sequence[str], work: Path, path: Path) -> None:
    path.mkdir()
    tree = work / "tree"
    for file in apt.download(packages, work):
        run("dpkg-deb", "-x", file, tree)
    modules = next(p for p in (tree / "lib/modules", tree / "usr/lib/modules") if p.is_dir())
    (release,) = (entry.name for entry in modules.iterdir())
    # Newer packages have the kernel itself beside its modules.
    image = next(
        p for p in (tree / f"boot/vmlinuz-{release}", modules / release / "vmlinuz") if p.exists()
    )
    shutil.move(image, path / "vmlinuz")
    base = work / "base"
    (base / "lib").mkdir(parents=True)
    shutil.move(modules, base / "lib/modules")
    run("depmod", "-b", base, release)
    _make_initrd(base, release, work / "initrd", path / "initrd")
    size_mib = int(run("du", "-sm", base / "lib/modules").split()[0]) * 5 // 4 + 16
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0",
        "-d", base / "lib/modules", path / "modules", f"{size_mib}M")  # fmt: skip
    first = next(name for name in packages if name.startswith("linux-image-"))
    (path / "names").write_text(f"{first} {release}\n", encoding="utf-8")


def _make_initrd(base: Path, release: str, tree: Path, path: Path) -> None:
    """Busybox, and the modules that find the root, in the order in which they are loaded."""
    for name in ("bin", "dev", "new", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    shutil.copy(INSIDE / "initrd", tree / "init")
    order: dict[str, None] = {}
    for module in _MODULES:
        listed = run("modprobe", "-d", base, "-S", release, "--show-depends", module)
        for words in map(str.split, listed.splitlines()):
            if words[:1] != ["insmod"]:
                continue
            file = Path(words[1])
            unpack = _UNPACK.get(file.suffix, ("cat",))
            name = file.name.removesuffix(file.suffix) if file.suffix in _UNPACK else file.name
            with (tree / "modules" / name).open("wb") as output:
                subprocess.run([*unpack, str(file)], stdout=output, check=True)
            order[name] = None
    (tree / "order").write_text("".join(f"{name}\n" for name in order), encoding="utf-8")
    run("sh", "-c", 'find . | cpio -oH newc --quiet | gzip -1 >"$0"', path, cwd=tree)
