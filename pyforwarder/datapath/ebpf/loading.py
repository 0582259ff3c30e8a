"""Compile BPF C files, and load what came of it into plain file descriptors.

The compiler is a child process, _bcc.py; this end never imports bcc, so `pyforwarder copy`-only
hosts need none. What it made is kept (runtime/store.py), so it runs once for each version of the
programs, and of all else that the instructions depend on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pyforwarder.datapath.ebpf import btf, probing, refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.image import Compiled, ImageError, filled, holes
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import children, slowness
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.store import Store
from pyforwarder.runtime.tables import single_line

ProgramKind = Literal[
    "sk_skb", "sched_cls", "map_iterator", "socket_iterator", "ksym_iterator", "tcp_iterator"
]
# The largest source takes four seconds of a processor; a loaded machine may take many times that.
LOAD_TIMEOUT_S: Final = 60.0


def bpf_directory() -> Path:
    """Where bpf/ is: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        LoadError: neither is there; the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "abi.h").is_file():
            return candidate
    raise LoadError("find bpf/abi.h", advice="the installation is incomplete: install it again")


# Causes that other programs need not share; the rest is the host's or the process's.
_OF_A_PROGRAM: Final = frozenset(
    {Refusal.PROGRAM_TYPE, Refusal.TOO_OLD, Refusal.VERIFIER, Refusal.OTHER}
)


class RefusedProgram(NamedTuple):
    """A program that the kernel did not take, where another alternative went on."""

    source: str
    said: dict[str, Any]
    log: str

    @property
    def kind(self) -> ProgramKind:
        """What it would have been."""
        kind: ProgramKind = self.said["kind"]
        return kind

    def error(self) -> LoadError:
        """Why; the kernel is asked again."""
        return _explained(self.source, {"step": "load", **self.said}, self.log)


class Loaded(NamedTuple):
    """What `load_first` could have."""

    alternative: int  # index
    descriptors: list[int]  # in the order of the alternative; the caller closes them
    refused: list[RefusedProgram]  # of the alternatives that come before


def load_programs(
    source: str,
    programs: Sequence[tuple[str, ProgramKind]],
    *,
    defines: Mapping[str, str | int],
    maps: Mapping[str, int] | None = None,
    values: Mapping[str, int] | None = None,
) -> list[int]:
    """Descriptors of the named functions of `source`, loaded, in order; the caller closes them.

    `maps` are the macros that stand for maps, with their descriptors; `values` macros for numbers
    of 32 bits that differ from load to load. Neither is seen by the compiler.

    Raises:
        LoadError: no bcc, or the compiler or the kernel refused; `cause` is why, and the text
            says what to do.
    """
    return load_first(source, [programs], defines=defines, maps=maps, values=values).descriptors


class Copy(NamedTuple):
    """What one copy of a program has for `maps` and `values`, see `load_programs`."""

    maps: Mapping[str, int]
    values: Mapping[str, int]


def load_copies(
    source: str,
    program: tuple[str, ProgramKind],
    copies: Sequence[Copy],
    *,
    defines: Mapping[str, str | int],
) -> list[int]:
    """Descriptors of one function, loaded once for each of `copies`; the caller closes them.

    All copies name the same maps and values. Otherwise as `load_programs`.
    """
    name, kind = program
    first = copies[0]
    compiled = compile_programs(
        source, [name], defines=defines, maps=first.maps, values=first.values
    )
    with contextlib.ExitStack() as opened:
        descriptors: list[int] = []
        for copy in copies:
            try:
                code = filled(compiled.programs[name], maps=copy.maps, values=copy.values)
                descriptors.append(_load(name, kind, code, compiled.licence))
            except (ImageError, OSError, LoadError) as error:
                raise _refused(source, name, kind, error).error() from error
            opened.callback(os.close, descriptors[-1])
        opened.pop_all()
    return descriptors


def load_first(
    source: str,
    alternatives: Sequence[Sequence[tuple[str, ProgramKind]]],
    *,
    defines: Mapping[str, str | int],
    maps: Mapping[str, int] | None = None,
    values: Mapping[str, int] | None = None,
) -> Loaded:
    """The first alternative of which the kernel takes every program; `source` is compiled once.

    Otherwise as `load_programs`.
    """
    maps, values = maps or {}, values or {}
    functions = list(dict.fromkeys(name for alternative in alternatives for name, _ in alternative))
    compiled = compile_programs(source, functions, defines=defines, maps=maps, values=values)
    refused: dict[str, RefusedProgram] = {}
    taken: dict[tuple[str, ProgramKind], int] = {}  # for this alternative or another
    try:
        for index, alternative in enumerate(alternatives):
            for name, kind in alternative:
                # Nothing is tried twice: the verifier may take a quarter of a second.
                if name in refused:
                    break
                if (name, kind) in taken:
                    continue
                try:
                    code = filled(compiled.programs[name], maps=maps, values=values)
                    taken[name, kind] = _load(name, kind, code, compiled.licence)
                except (ImageError, OSError, LoadError) as error:
                    refused[name] = _refused(source, name, kind, error)
                    break
            else:
                descriptors = [taken.pop(program) for program in alternative]
                return Loaded(index, descriptors, list(refused.values()))
    finally:
        for descriptor in taken.values():
            os.close(descriptor)
    raise _none_of(list(refused.values()))


def compile_programs(
    source: str,
    functions: Sequence[str],
    *,
    defines: Mapping[str, str | int],
    maps: Collection[str] = (),
    values: Collection[str] = (),
) -> Compiled:
    """The functions of `source` as instructions: those that are kept, or else compiled now.

    Raises:
        LoadError: no bcc, or the compiler refused.
    """
    directory = bpf_directory()
    numbers = holes([*maps, *values])
    macros = {
        **defines,
        **{name: numbers[name] for name in maps},
        # Of kind 0: a number like any other, but in an instruction of its own.
        **{name: f"((__u32)bpf_pseudo_fd(0, {numbers[name]}))" for name in values},
    }
    flags = [
        # bcc's own prelude is full of warnings; ours are checked by scripts/check.
        "-Wno-everything",
        "-g0",  # a third of its time went into what only a debugger reads
        *(f"-D{name}={value}" for name, value in macros.items()),
    ]
    request: dict[str, Any] = {
        "kernel_source": str(directory),
        "source": str(directory / source),
        "cflags": [f"-I{directory}", *flags],
        "functions": list(functions),
    }
    key = _key(directory, source, {"flags": flags, "functions": list(functions)})
    if key is None:
        return _compile(source, request)
    store = Store.usual()
    if (kept := _kept(store, key, functions)) is not None:
        return kept
    # Seconds of a processor: several processes that begin at once do not all spend them.
    with store.making(key, within_s=scaled_s(LOAD_TIMEOUT_S)):
        if (kept := _kept(store, key, functions)) is not None:
            return kept
        compiled = _compile(source, request)
        store.put(key, compiled.to_bytes())
    return compiled


def _kept(store: Store, key: str, functions: Sequence[str]) -> Compiled | None:
    kept = store.get(key)
    if kept is not None:
        with contextlib.suppress(ImageError):
            found = Compiled.from_bytes(kept)
            if found.programs.keys() == set(functions):
                return found
    return None


def _key(directory: Path, source: str, request: Mapping[str, Any]) -> str | None:
    """All that the instructions depend on, in words; None: that is not known.

    Not where the sources are: another checkout of the same has the same programs.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    digest = hashlib.sha256()
    try:
        texts = {source: directory / source}
        texts |= {str(path.relative_to(directory)): path for path in directory.rglob("*.[ch]")}
        for name, path in sorted(texts.items()):
            text = path.read_bytes()
            digest.update(f"{name} {len(text)}\n".encode() + text)
    except OSError:
        return None
    kernel = os.uname()
    return json.dumps(
        {
            "source": source,
            "sources": digest.hexdigest(),
            "request": request,
            "kernel": [kernel.release, kernel.version, kernel.machine],
            "compiler": compiler,
            "python": platform.python_version(),  # it is the compiler's, too
        },
        sort_keys=True,
    )


def _compiler() -> list[str | int] | None:
    """Which bcc it would be, without importing it: where it is, its version, its age; or None."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        found = importlib.util.find_spec("bcc")
        if found is not None and found.origin is not None:
            module = Path(found.origin)
            status = module.stat()
            version = module.with_name("version.py").read_text()
            return [str(module), version, status.st_size, status.st_mtime_ns]
    return None


def _compile(source: str, request: Mapping[str, Any]) -> Compiled:
    timeout_s = scaled_s(LOAD_TIMEOUT_S)
    try:
        child = children.run(
            children.python("pyforwarder.datapath.ebpf._bcc"),
            input=json.dumps(request).encode(),
            timeout_s=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(
            f"compile {source}: no answer within {timeout_s:.0f} s",
            cause=Refusal.TIMEOUT,
            advice=slowness.advice(),
        ) from error
    log = child.stderr.decode(errors="replace")
    if not child.stdout:
        raise _died(source, child.returncode, log)
    answer = json.loads(child.stdout)
    if not answer["ok"]:
        raise _explained(source, answer, log)
    return Compiled.from_bytes(child.stdout)


def _load(name: str, kind: ProgramKind, code: bytes, licence: str) -> int:
    """One program's descriptor.

    Raises:
        OSError: the kernel refuses it.
        LoadError: the kernel's BTF has no such place for it, or there is none.
    """
    wanted = probing.KINDS[kind]
    return bpf.load_program(
        wanted.type,
        code,
        attach_type=wanted.attach_type,
        attach_btf_id=btf.function_id(wanted.function) if wanted.function else 0,
        licence=licence,
        name=name,
    )


def _refused(source: str, name: str, kind: str, error: Exception) -> RefusedProgram:
    facts: dict[str, Any] = {"program": name, "kind": kind, "errno": 0, "reason": str(error)}
    log = ""
    if isinstance(error, bpf.VerifierError):
        log = error.log
    if isinstance(error, OSError):
        facts["errno"] = error.errno or 0
    if isinstance(error, LoadError):  # as the kernel says it of what its BTF has not
        facts["errno"] = errno.ENOENT
    return RefusedProgram(source, facts, log)


def _none_of(refused: Sequence[RefusedProgram]) -> LoadError:
    """The error of several alternatives of which the kernel takes none."""
    errors = []
    for one in refused:
        errors.append(one.error())
        if errors[0].cause not in _OF_A_PROGRAM:
            return errors[0]  # and of all others
    if len(errors) == 1:
        return errors[0]
    return LoadError(
        "; ".join(error.operation for error in errors),
        cause=errors[0].cause,
        advice=errors[0].advice,
        log="".join(error.log for error in errors),
    )


def _died(source: str, code: int, log: str) -> LoadError:
    """The compiler ended without an answer: it has crashed, or the host has no memory for it."""
    if code == -signal.SIGKILL:
        return LoadError(
            f"compile {source}: the compiler was killed",
            cause=Refusal.MEMORY,
            advice="it needs 200 MB for a second",
            log=log,
        )
    return LoadError(
        f"compile {source}: the compiler ended with code {code}",
        cause=Refusal.COMPILER,
        advice="-v shows what it says",
        log=log,
    )


def _explained(source: str, answer: dict[str, Any], log: str) -> LoadError:
    reason = single_line(answer["reason"])
    match answer["step"]:
        case "missing":
            return _without_bcc(reason)
        case "foreign":
            return LoadError(
                f"the module bcc at {reason} is another project of that name",
                cause=Refusal.BCC,
                advice="pip uninstall bcc, then install your system's python3-bpfcc or python3-bcc",
            )
        case "compile":
            return LoadError(
                f"compile {source}: {reason}",
                cause=Refusal.COMPILER,
                advice="-v shows what the compiler says",
                log=log,
            )
    operation = f"load {answer['program']}() of {source}"
    if not answer["errno"]:  # it did not come to the kernel
        return LoadError(f"{operation}: {reason}", cause=Refusal.OTHER, log=log)
    return refusal.explain(operation, answer["errno"], kind=answer["kind"], log=log)


def _without_bcc(reason: str) -> LoadError:
    settings = Path(sys.prefix, "pyvenv.cfg")
    if _hides_the_host(settings) and (elsewhere := _bcc_of_the_host()):
        return LoadError(
            f"bcc is installed at {elsewhere}, which this virtual environment cannot see",
            cause=Refusal.BCC,
            advice="make the environment with `python3 -m venv --system-site-packages`, or write "
            f"`include-system-site-packages = true` to {settings}",
        )
    return LoadError(
        f"bcc is not installed ({reason})",
        cause=Refusal.BCC,
        advice="install Debian/Ubuntu: python3-bpfcc, Fedora: python3-bcc, Arch: python-bcc "
        "(PyPI's package `bcc` is another project), or use --datapath copy",
    )


def _hides_the_host(settings: Path) -> bool:
    """Whether these are the settings of a virtual environment without the host's packages."""
    with contextlib.suppress(OSError):
        pairs = (line.partition("=") for line in settings.read_text().splitlines())
        found = {key.strip().lower(): value.strip().lower() for key, _, value in pairs}
        return found.get("include-system-site-packages") != "true"
    return False


def _bcc_of_the_host() -> str:
    """Where the Python that this virtual environment was made of finds bcc; empty if nowhere."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    program = "from importlib.util import find_spec as f; print(getattr(f('bcc'), 'origin', ''))"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        # -I: not the environment's variables, which may name the environment's packages.
        return children.run([base, "-I", "-c", program], timeout_s=10).stdout.decode().strip()
    return ""
