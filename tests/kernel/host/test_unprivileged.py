"""A user who may not look into bpffs: nothing there is his, and nothing of that is an error."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice.pins import has_pins, pins_in, pins_of, unpin
from pyforwarder.supervisor.files import bpffs
from pyforwarder.supervisor.files.views import remove_stale

if TYPE_CHECKING:
    from tests.helpers.daemon import Place


def as_nobody(action: Callable[[], object]) -> int:
    """0 if `action` ends well and says something false in a child without any privilege."""
    nobody = pwd.getpwnam("nobody")
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            os.setgroups([])
            os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
            os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)
            code = 1 if action() else 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pinned(place: Place) -> Path:
    """An instance's directory, in which a daemon of root's has left pins of splice."""
    place.bpffs.chmod(0o700)  # as systemd mounts it
    instance = place.bpffs / "default"
    directory = pins_of(instance)
    directory.mkdir(parents=True)
    fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=4, entries=1)
    try:
        bpf.pin(fd, directory / "flows_1")
    finally:
        os.close(fd)
    return instance


def test_pins_of_root_are_seen_by_root_alone(place: Place) -> None:
    instance = pinned(place)
    assert has_pins(pins_of(instance))
    assert [path.name for path in pins_in(pins_of(instance))] == ["flows_1"]
    assert as_nobody(lambda: has_pins(pins_of(instance))) == 0
    assert as_nobody(lambda: pins_in(pins_of(instance))) == 0


def test_user_that_cleans_up_changes_nothing_there(place: Place) -> None:
    instance = pinned(place)

    def clean_up() -> bool:
        found = remove_stale(instance)
        unpin(pins_of(instance))
        bpffs.leave(place.bpffs)
        return bool(found.ours or found.foreign)

    assert as_nobody(clean_up) == 0
    assert [path.name for path in pins_in(pins_of(instance))] == ["flows_1"]
