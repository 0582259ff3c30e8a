"""Workers that cannot be started: what their predecessor had is never nobody's."""

from __future__ import annotations

import errno
from unittest import mock

from pyforwarder.supervisor.worker_pool import WorkerPool


def test_a_start_that_fails_is_buried_before_the_next() -> None:
    """It may have been given pairs, whose owner it was then."""
    done = mock.Mock()
    done.datapaths.accused.return_value = set()
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
    pool._workers = [mock.Mock()]
    starts = mock.Mock(side_effect=[OSError(errno.EMFILE, "no descriptor"), mock.sentinel.worker])
    done.attach_mock(starts, "start")
    with mock.patch.object(pool, "_start_worker", starts):
        pool._replace(0)
        (later,) = done.loop.after.call_args_list
        assert done.datapaths.bury.call_count == 0
        later.args[1]()
    names = [call[0] for call in done.mock_calls]
    assert names.index("datapaths.bury") > names.index("start")
    assert names.index("memory.clear_window") > names.index("datapaths.bury")
    assert names[-1] == "start"
    assert pool._workers == [mock.sentinel.worker]
