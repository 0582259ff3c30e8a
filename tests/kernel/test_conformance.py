"""One suite for every datapath: what the server relies on, whoever moves the bytes.

Each play runs over copy, sockmap and the fake that other tests use in their place, and each is
followed by a look at what it left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from pyforwarder.datapath.kernel import KernelMaps
from pyforwarder.datapath.scenarios import ALL, at_random
from pyforwarder.datapath.splice_keeper import Splicing
from pyforwarder.datapath.splice_maps import SpliceMaps
from tests.helpers.stage import SLOTS, stage

DATAPATHS: Final = ("copy", "sockmap", "splice", "fake")
SEEDS: Final = tuple(range(1000, 1012))


@pytest.fixture(scope="module")
def maps(network: None) -> Iterator[KernelMaps]:
    """The maps and the program, loaded once; each test leaves them empty."""
    del network
    loaded = KernelMaps.load(workers=1, slots=SLOTS)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def splicing(maps: KernelMaps) -> Iterator[Splicing]:
    """Splice's maps, programs and keeper, over the same pair table."""
    loaded = SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd)
    splicing = Splicing(loaded, workers=1)
    yield splicing
    splicing.close()


@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("name", ALL)
def test_datapath_does_what_the_server_relies_on(
    name: str, datapath: str, maps: KernelMaps, splicing: Splicing
) -> None:
    with stage(datapath, maps, splicing) as rig:
        ALL[name](rig)


@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_datapath_does_so_at_random(
    seed: int, datapath: str, maps: KernelMaps, splicing: Splicing
) -> None:
    with stage(datapath, maps, splicing) as rig:
        at_random(rig, seed=seed)
