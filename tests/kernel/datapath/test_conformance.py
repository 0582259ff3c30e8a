"""One suite for every datapath: what the server relies on.

Each play runs over the datapaths and the fake that other tests use in their place, and each is
followed by a look at what it left behind. Of express, whose pairs have no socket of ours so far,
the client has said something before a play begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from tests.helpers.express_rig import express_stage, expressing
from tests.helpers.plays import ALL, at_random
from tests.helpers.stage import SLOTS, stage

if TYPE_CHECKING:
    from pyforwarder.datapath.proof.rig import Rig
    from pyforwarder.datapath.sockmap.maps import KernelMaps
    from tests.helpers.express_rig import Expressing

BY_CLSACT: Final = "splice by clsact"
LASTING: Final = "express, adopted"
DATAPATHS: Final = (
    *("copy", "sockmap", "splice", "express", LASTING, "fake"),
    # Where there is no tcx, splice is by clsact anyway.
    pytest.param(BY_CLSACT, marks=pytest.mark.needs("tcx")),
)
SEEDS: Final = tuple(range(1000, 1012))


@pytest.fixture(scope="module")
def splicing(maps: KernelMaps) -> Iterator[Splicing]:
    """Splice's maps, programs and keeper, over the same pair table."""
    yield from _splicing(maps)


@pytest.fixture(scope="module")
def splicing_by_clsact(maps: KernelMaps) -> Iterator[Splicing]:
    """The same, attached as before Linux 6.6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attaching.FORCED, "clsact")
        yield from _splicing(maps)


def _splicing(maps: KernelMaps) -> Iterator[Splicing]:
    loaded = SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd)
    with contextlib.closing(Splicing(loaded, workers=1)) as splicing:
        yield splicing


@pytest.fixture(scope="module")
def opening(network: None) -> Iterator[Expressing]:
    """The same, with the programs that open connections."""
    del network
    with expressing(lasts=False) as made:
        yield made


@pytest.fixture(scope="module")
def opening_for_long(network: None) -> Iterator[Expressing]:
    """And with a keeper that gives all of them to the worker at once."""
    del network
    with expressing(lasts=True) as made:
        yield made


@pytest.fixture
def rig(datapath: str, request: pytest.FixtureRequest, maps: KernelMaps) -> Iterator[Rig]:
    """A stage for the datapath of the test; splice is loaded for its own tests alone."""
    opened = {"express": "opening", LASTING: "opening_for_long"}.get(datapath)
    if opened:
        with express_stage(request.getfixturevalue(opened)) as rig:
            yield rig
        return
    fixture = {"splice": "splicing", BY_CLSACT: "splicing_by_clsact"}.get(datapath)
    splicing = request.getfixturevalue(fixture) if fixture else None
    with stage("splice" if splicing else datapath, maps, splicing) as rig:
        yield rig


@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("name", ALL)
def test_datapath_does_what_the_server_relies_on(name: str, rig: Rig) -> None:
    ALL[name](rig)


@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_datapath_does_so_at_random(seed: int, rig: Rig) -> None:
    at_random(rig, seed=seed)
