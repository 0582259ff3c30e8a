"""Workers that cannot be started: what their predecessor had is never nobody's."""

from __future__ import annotations

import errno
from typing import Any
from unittest import mock

from pyforwarder.config.model import Config
from pyforwarder.supervisor.worker_pool import WorkerPool


def a_pool() -> tuple[mock.Mock, WorkerPool]:
    """And all that it does."""
    done = mock.Mock()
    pool = WorkerPool(
        mock.Mock(),
        done.memory,
        done.datapaths,
        user=None,
        loop=done.loop,
        log=mock.Mock(),
        close_in_child=lambda: None,
        down=lambda: (),
    )
    return done, pool


def test_verdicts_are_put_in_force_together() -> None:
    _, pool = a_pool()
    with mock.patch.object(pool, "_decisions") as decisions:
        pool.send_health(mock.Mock())
        assert decisions.method_calls == [mock.call.refresh_soon()]
        pool.configure()
        assert decisions.method_calls[1:] == [mock.call.refresh()]


def test_a_start_that_fails_is_cleaned_up_after_before_the_next() -> None:
    """It may have been given pairs, whose owner it was then."""
    done, pool = a_pool()
    done.datapaths.accused.return_value = set()
    pool._workers = [mock.Mock()]
    starts = mock.Mock(side_effect=[OSError(errno.EMFILE, "no descriptor"), mock.sentinel.worker])
    done.attach_mock(starts, "start")
    with mock.patch.object(pool, "_start_worker", starts):
        pool._replace(0)
        (later,) = done.loop.after.call_args_list
        assert done.datapaths.worker_died.call_count == 0
        later.args[1]()
    names = [call[0] for call in done.mock_calls]
    assert names.index("datapaths.worker_died") > names.index("start")
    assert names.index("memory.clear_window") > names.index("datapaths.worker_died")
    assert names[-1] == "start"
    assert pool._workers == [mock.sentinel.worker]


def test_beside_a_daemon_that_accepts_no_more_listeners_of_named_datapaths_are_served() -> None:
    """Else who connects to these would wait until that has released its spliced pairs."""
    _, pool = a_pool()
    rules = [{"match": "any", "to": "127.0.0.1:2"}]
    listeners = [
        {"name": name, "bind": f"127.0.0.1:{port}", "datapath": name, "rules": rules}
        for port, name in enumerate(("copy", "sockmap", "splice"), start=3)
    ]
    in_force: Any = pool._in_force
    in_force.config = Config.model_validate({"listeners": listeners})
    in_force.listeners.bound = dict.fromkeys(("copy", "sockmap", "splice"), ())
    assert set(pool._served()) == {"copy"}
    with mock.patch.object(pool, "start"):
        pool.start_beside(1, {}, [])
    assert set(pool._served()) == {"copy", "sockmap", "splice"}
    pool._workers = [mock.Mock(exit_code=None)]
    with mock.patch.object(pool, "_configure") as configured, mock.patch.object(pool, "_decisions"):
        pool.datapaths_are_settled()
    assert not configured.called
