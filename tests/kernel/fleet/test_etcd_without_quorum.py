"""What a watch tells at a member of etcd that is cut off from the others."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.store import Store, StoreError
from tests.helpers.peers import unused_port
from tests.helpers.waiting import DEADLINE_S, wait_for

KEYS: Final = Keys("edge")


def test_a_watch_at_a_member_without_a_quorum_is_an_error(tmp_path: Path) -> None:
    names = ("a", "b")
    peers = {name: f"http://127.0.0.1:{unused_port()}" for name in names}
    clients = {name: f"http://127.0.0.1:{unused_port()}" for name in names}
    members = []
    store: Store | None = None
    try:
        for name in names:
            words = [
                *("--name", name, "--data-dir", str(tmp_path / name), "--logger", "zap"),
                *("--listen-client-urls", clients[name], "--log-level", "error"),
                *("--advertise-client-urls", clients[name]),
                *("--listen-peer-urls", peers[name]),
                *("--initial-advertise-peer-urls", peers[name]),
                *("--initial-cluster", ",".join(f"{one}={url}" for one, url in peers.items())),
            ]
            with (tmp_path / f"{name}.log").open("wb") as log:
                members.append(subprocess.Popen(["etcd", *words], stdout=log, stderr=log))
        fleet = Fleet.model_validate({"endpoints": [clients["a"]], "name": "edge"})
        store = open_store(fleet)

        def is_written(store: Store) -> bool:
            try:
                store.put(f"{KEYS.health}a", "x")
            except StoreError:
                return False
            return True

        wait_for(lambda: is_written(store), "both are there", deadline_s=4 * DEADLINE_S)
        revision = store.list(KEYS.health).revision
        members[1].kill()
        members[1].wait()
        until_s = time.monotonic() + 4 * DEADLINE_S

        def watch(store: Store) -> None:
            # It ends without a word when nothing has come for some seconds.
            while time.monotonic() < until_s:
                assert not list(store.events(KEYS.health, after=revision, until_s=until_s))

        with pytest.raises(StoreError, match="no leader"):
            watch(store)
    finally:
        for member in members:
            member.kill()
            member.wait()
        if store is not None:
            store.close()
