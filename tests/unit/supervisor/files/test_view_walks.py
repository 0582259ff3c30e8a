"""Which ways of making a view are tried, and whether a walk over symbols is long enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyforwarder.datapath.ebpf.arrays import LISTENER_LINES
from pyforwarder.errors import LoadError, UsageError
from pyforwarder.supervisor.files.view_walks import KSYM, MAP, Walk, pairs_per_visit, walks_of


@pytest.mark.parametrize(
    ("said", "walks"),
    [(None, (MAP, KSYM)), ("", (MAP, KSYM)), ("map", (MAP,)), ("ksym", (KSYM,)), ("daemon", ())],
)
def test_environment_names_the_only_way(said: str | None, walks: tuple[Walk, ...]) -> None:
    assert walks_of({} if said is None else {"PYFORWARDER_VIEW": said}) == walks


def test_way_that_is_none_is_an_error() -> None:
    with pytest.raises(UsageError, match="PYFORWARDER_VIEW=maps: map, ksym or daemon wanted"):
        walks_of({"PYFORWARDER_VIEW": "maps"})


def symbols(directory: Path, *, kernel: int, modules: int = 0) -> Path:
    """A /proc/kallsyms: the kernel's own symbols come first."""
    path = directory / "kallsyms"
    path.write_text(
        "".join(f"0000000000000000 T function_{n}\n" for n in range(kernel))
        + "".join(f"0000000000000000 t function_{n}\t[module]\n" for n in range(modules))
    )
    return path


@pytest.mark.parametrize(
    ("pairs", "per_visit"),
    [(1, 1), (2998, 1), (2999, 2), (2 * 2998, 2), (2 * 2998 + 1, 3), (8 * 2998, 8)],
)
def test_each_visit_prints_as_many_pairs_as_it_must(
    tmp_path: Path, pairs: int, per_visit: int
) -> None:
    # Two visits are spare: one for the end of `stats`, and the last may be made twice.
    assert pairs_per_visit(pairs, symbols=symbols(tmp_path, kernel=3000)) == per_visit


def test_symbols_of_modules_do_not_count(tmp_path: Path) -> None:
    path = symbols(tmp_path, kernel=3000, modules=9000)
    assert pairs_per_visit(2999, symbols=path) == 2


@pytest.mark.parametrize(
    ("pairs", "kernel"), [(8 * 2998 + 1, 3000), (1, LISTENER_LINES + 1), (1, 0)]
)
def test_too_few_symbols_are_told_of(tmp_path: Path, pairs: int, kernel: int) -> None:
    with pytest.raises(LoadError, match=f"too many for {kernel} kernel symbols"):
        pairs_per_visit(pairs, symbols=symbols(tmp_path, kernel=kernel))


def test_symbols_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no-such: No such file or directory"):
        pairs_per_visit(1, symbols=tmp_path / "no-such")
