"""Programs that are compiled once: loaded again without the compiler, and never the wrong ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pyforwarder.datapath.ebpf import loading
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import children, store
from pyforwarder.runtime.slowness import scaled_s

SOURCE = """
#include <linux/bpf.h>
#include "maps.h"

int stores(struct __sk_buff *skb)
{
	__u32 key = 0;
	__u32 value = SECRET;

	map_update(MAP_OURS_FD, &key, &value);
	return ANSWER;
}
"""
PACKET = bytes(64)


class Compiler:
    """How often it ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        run = children.run

        def counted(*arguments: object, **named: object) -> object:
            self.runs += 1
            return run(*arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(children, "run", counted)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """With an empty place for what it makes."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "programs"))
    return Compiler(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "stores.c"
    path.write_text(SOURCE)
    return path


@contextlib.contextmanager
def loaded(source: Path, *, secret: int, answer: int = 5) -> Iterator[tuple[int, bpf.Map]]:
    """The program, with a map of its own."""
    fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=4, entries=1)
    programs = []
    try:
        programs = load_programs(
            str(source),
            [("stores", "sched_cls")],
            defines={"ANSWER": answer},
            maps={"MAP_OURS_FD": fd},
            values={"SECRET": secret},
        )
        yield programs[0], bpf.Map(fd, key_bytes=4, value_bytes=4)
    finally:
        for one in (fd, *programs):
            os.close(one)


def stored(ours: bpf.Map) -> int:
    return int.from_bytes(ours.lookup(bytes(4)), "little")


def test_each_load_of_one_compilation_has_its_own_maps_and_values(
    compiler: Compiler, source: Path
) -> None:
    with (
        loaded(source, secret=0x80000001) as (first, maps_of_first),
        loaded(source, secret=7) as (second, maps_of_second),
    ):
        assert bpf.run_program(second, PACKET) == 5
        assert stored(maps_of_second) == 7
        assert stored(maps_of_first) == 0
        assert bpf.run_program(first, PACKET) == 5
        assert stored(maps_of_first) == 0x80000001
        assert stored(maps_of_second) == 7
    assert compiler.runs == 1


def test_other_macros_and_other_text_are_compiled_anew(compiler: Compiler, source: Path) -> None:
    with loaded(source, secret=1, answer=5) as (program, _):
        assert bpf.run_program(program, PACKET) == 5
    with loaded(source, secret=1, answer=6) as (program, _):
        assert bpf.run_program(program, PACKET) == 6
    source.write_text(SOURCE.replace("return ANSWER", "return ANSWER + 20"))
    with loaded(source, secret=1, answer=6) as (program, _):
        assert bpf.run_program(program, PACKET) == 26
    assert compiler.runs == 3


def test_another_compiler_or_kernel_compiles_anew(
    compiler: Compiler, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_twice() -> int:
        for _ in range(2):
            with loaded(source, secret=1):
                pass
        return compiler.runs

    assert load_twice() == 1
    monkeypatch.setattr(loading, "_compiler", lambda: ["another"])
    assert load_twice() == 2
    another = os.uname_result(("Linux", "here", "99.1", "#1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: another)
    assert load_twice() == 3


def test_another_checkout_of_the_same_sources_compiles_nothing(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = loading.bpf_directory()
    for name in ("here", "there"):
        checkout = tmp_path / name
        shutil.copytree(sources, checkout)
        (checkout / "stores.c").write_text(SOURCE)
        monkeypatch.setattr(loading, "bpf_directory", lambda at=checkout: at)
        with loaded(Path("stores.c"), secret=3) as (program, ours):
            assert bpf.run_program(program, PACKET) == 5
            assert stored(ours) == 3
    assert compiler.runs == 1
    (checkout / "abi.h").write_text("\n" + (checkout / "abi.h").read_text())
    with loaded(Path("stores.c"), secret=3):
        pass
    assert compiler.runs == 2


_LOADS: Final = """
import sys
from pyforwarder.datapath.ebpf.loading import compile_programs
from pyforwarder.runtime import children

run = children.run

def counted(*arguments, **named):
    print("compiled", flush=True)
    return run(*arguments, **named)

children.run = counted
compile_programs(
    sys.argv[1], ["stores"], defines={"ANSWER": 5}, maps={"MAP_OURS_FD"}, values={"SECRET"}
)
"""


def test_processes_that_begin_at_once_compile_once(compiler: Compiler, source: Path) -> None:
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", _LOADS, str(source)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = [process.communicate(timeout=scaled_s(50.0))[0] for process in begun]
    assert [process.returncode for process in begun] == [0] * 4
    assert "".join(said) == "compiled\n"


def test_damaged_files_are_compiled_anew(compiler: Compiler, source: Path, tmp_path: Path) -> None:
    with loaded(source, secret=1):
        pass
    for path in (tmp_path / "programs").glob("[0-9a-f]*"):
        data = bytearray(path.read_bytes())
        data[-20] ^= 4
        path.write_bytes(data)
    with loaded(source, secret=9) as (program, ours):
        assert bpf.run_program(program, PACKET) == 5
        assert stored(ours) == 9
    assert compiler.runs == 2


def test_directory_that_anybody_may_write_to_is_not_read(
    compiler: Compiler, source: Path, tmp_path: Path
) -> None:
    with loaded(source, secret=1):
        pass
    (tmp_path / "programs").chmod(0o777)
    with loaded(source, secret=1):
        pass
    assert compiler.runs == 2


def test_refusal_of_the_kernel_is_told_with_its_log_each_time(
    compiler: Compiler, tmp_path: Path
) -> None:
    source = tmp_path / "wrong.c"
    source.write_text(
        "#include <linux/bpf.h>\n"
        "int wrong(struct __sk_buff *skb) { return *(int *)(long)skb->len; }\n"
    )
    for _ in range(2):
        with pytest.raises(LoadError) as caught:
            load_programs(str(source), [("wrong", "sched_cls")], defines={})
        assert caught.value.cause is Refusal.VERIFIER
        assert "invalid mem access" in caught.value.log
    assert compiler.runs == 1


def test_function_that_is_not_in_the_file_is_named(compiler: Compiler, source: Path) -> None:
    with pytest.raises(LoadError, match="no function absent"):
        load_programs(
            str(source),
            [("absent", "sched_cls")],
            defines={"ANSWER": 1, "SECRET": 1},
            maps={"MAP_OURS_FD": 0},
        )
