"""Workers that die, also while their daemon ends: what they had is never nobody's."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from pyforwarder.config.model import Config
from pyforwarder.datapath.splice.keeper_client import KeeperError
from pyforwarder.errors import ControlError
from pyforwarder.runtime.counters import BLOCK_BYTES
from pyforwarder.supervisor.workers.pool import WorkerPool


def a_pool() -> tuple[mock.Mock, WorkerPool]:
    """And all that it does."""
    done = mock.Mock()
    done.datapaths.accused.return_value = set()
    done.memory.counters.block.return_value = [0] * (BLOCK_BYTES // 8)
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
    replacements = pool._replacements
    pool._workers[:] = [mock.Mock()]
    replacements._due = {0}
    starts = mock.Mock(side_effect=[OSError(errno.EMFILE, "no descriptor"), mock.sentinel.worker])
    done.attach_mock(starts, "start")
    with mock.patch.object(pool._starter, "start", starts):
        replacements._replace(0)
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
    in_force: Any = pool._starter._in_force
    in_force.config = Config.model_validate({"listeners": listeners})
    in_force.listeners.bound = dict.fromkeys(("copy", "sockmap", "splice"), ())
    assert set(pool._starter.served()) == {"copy"}
    with mock.patch.object(pool, "start"):
        pool.start_beside(1, {}, [])
    assert set(pool._starter.served()) == {"copy", "sockmap", "splice"}
    pool._workers[:] = [mock.Mock(exit_code=None)]
    with (
        mock.patch.object(pool._starter, "configure") as configured,
        mock.patch.object(pool, "_decisions"),
    ):
        pool.datapaths_are_settled()
    assert not configured.called


def worker(exit_code: int | None = None) -> mock.Mock:
    """One that lives, or has ended so, a while after its start."""
    one = mock.Mock(exit_code=exit_code, started_s=-1e9)
    one.has_ended.side_effect = one.is_ending.side_effect = lambda: one.exit_code is not None
    return one


def told(one: mock.Mock) -> list[tuple[object, object]]:
    """What a worker was asked to do about the end, and whether more may come."""
    return [(call.args[0], call.kwargs.get("more")) for call in one.ask.call_args_list]


@contextlib.contextmanager
def serving(
    *workers: mock.Mock, successors: tuple[object, ...] = (), has_stopped: bool = True
) -> Iterator[tuple[mock.Mock, WorkerPool, mock.Mock]]:
    """A pool of these, what it does, and the call that starts the next of `successors`."""
    done, pool = a_pool()
    pool._workers[:] = workers
    starts = mock.Mock(side_effect=list(successors))
    with (
        mock.patch.object(pool._starter, "start", starts),
        mock.patch.object(pool, "_decisions", has_stopped=has_stopped),
    ):
        yield done, pool, starts


def later(done: mock.Mock) -> Callable[[], None]:
    """What the loop was told last to do after a while."""
    action: Callable[[], None] = done.loop.after.call_args.args[1]
    return action


def test_who_dies_in_a_drain_is_replaced_by_one_that_drains() -> None:
    lost, other, successor = worker(), worker(), worker()
    with serving(lost, other, successors=(successor,)) as (done, pool, _):
        pool.drain()
        assert told(lost) == told(other) == [("drain", False)]
        lost.exit_code = -9
        pool.reap()
        assert done.datapaths.worker_died.call_args_list == [mock.call(0)]
        assert pool._workers == [successor, other]
        assert told(successor) == [("drain", False)]
        assert told(other) == [("drain", False)]


def test_who_has_nothing_left_in_a_drain_is_not_replaced() -> None:
    """But its word is not taken for it."""
    ended, liar, successor = worker(), worker(), worker()
    with serving(ended, liar, successors=(successor,)) as (done, pool, starts):
        pool.drain()
        ended.exit_code = 0
        pool.reap()
        assert not starts.called
        assert not pool.have_ended
        liar.exit_code = 0
        done.memory.counters.block.return_value = [1] * (BLOCK_BYTES // 8)
        pool.reap()
        assert pool._workers == [ended, successor]
        successor.exit_code = 0
        done.memory.counters.block.return_value = [0] * (BLOCK_BYTES // 8)
        pool.reap()
        assert pool.have_ended


def test_a_drain_is_not_over_before_another_has_come_in_the_place_of_one_that_died() -> None:
    """Also where no process can be made just now, or the keeper is away, too."""
    lost, successor = worker(-9), worker()
    out_of_processes = OSError(errno.EAGAIN, "no process")
    with serving(lost, successors=(out_of_processes, successor)) as (done, pool, starts):
        pool.drain()
        away = KeeperError("ask the splice keeper", errno.ETIMEDOUT)
        done.datapaths.worker_died.side_effect = [away, None, None]
        pool.reap()
        assert not done.memory.clear_window.called  # it says which they are
        for _ in range(2):
            assert pool._workers == [lost]
            assert not pool.have_ended
            later(done)()
        assert pool._workers == [successor]
        assert starts.call_count == 2


def test_a_drain_is_not_over_when_one_that_has_just_come_dies_before_it_hears_of_it() -> None:
    """The pairs that outlived the first have outlived it, too. Its SIGCHLD is still to come."""
    lost, dying, successor = worker(), worker(), worker()

    def die(*_: object, **__: object) -> None:
        dying.exit_code = -9
        raise ControlError("it has died")

    dying.ask.side_effect = die
    with serving(lost, successors=(dying, successor)) as (_, pool, _starts):
        pool.drain()
        lost.exit_code = -9
        pool.reap()
        assert pool._workers == [dying]
        assert not pool.have_ended
        pool.reap()
        assert pool._workers == [successor]
        assert told(successor) == [("drain", False)]


def test_who_lived_too_short_in_a_drain_is_replaced_after_a_pause() -> None:
    lost, successor = worker(), worker()
    with serving(lost, successors=(successor,)) as (done, pool, starts):
        pool.drain()
        lost.exit_code, lost.started_s = -9, 1e12
        pool.reap()
        assert not starts.called
        later(done)()
        assert pool._workers == [successor]


@pytest.mark.parametrize("what", ["clean up", "replace"])
def test_what_was_put_off_is_not_done_once_another_daemon_has_the_place(what: str) -> None:
    """It reads in the table what `show` has said of pairs that it takes over."""
    lost = worker()
    with serving(lost, successors=()) as (done, pool, starts):
        pool.drain()
        lost.exit_code = -9
        if what == "clean up":
            away = KeeperError("ask the splice keeper", errno.ETIMEDOUT)
            done.datapaths.worker_died.side_effect = away
        else:
            lost.started_s = 1e12
        pool.reap()
        put_off = later(done)
        pool.retire([], keeps_spliced=False)
        done.memory.reset_mock()
        put_off()
        assert done.memory.mock_calls == []
        assert not starts.called
        assert pool.have_ended


def test_a_worker_that_has_died_is_not_replaced_where_a_daemon_takes_the_place() -> None:
    """It would have the channels to that daemon's workers. Its pairs come by way of the keeper."""
    lost, other = worker(), worker()
    with serving(lost, other) as (done, pool, starts):
        pool.drain()
        lost.exit_code, lost.started_s = -9, 1e12
        pool.reap()
        put_off = later(done)
        pool.retire([7, 8], keeps_spliced=False)
        assert other.ask.call_args_list[-1] == mock.call("retire", [8], keeps=False, more=False)
        put_off()
        assert not starts.called


def test_a_worker_that_has_died_is_replaced_where_spliced_pairs_stay() -> None:
    """It goes on with these, and has no heir: the channels are closed by then."""
    lost, other, successor = worker(), worker(), worker()
    with serving(lost, other, successors=(successor,)) as (_, pool, starts):
        lost.exit_code = -9
        pool.retire([7, 8], keeps_spliced=True)
        assert other.ask.call_args_list[-1] == mock.call("retire", [8], keeps=True, more=False)
        pool.reap()
        assert starts.call_count == 1
        assert successor.ask.call_args_list[-1] == mock.call("retire", (), keeps=True, more=False)
        assert not pool.have_ended


def test_workers_that_keep_spliced_pairs_wait_for_what_the_kernel_has_opened() -> None:
    only = worker()
    with serving(only, has_stopped=False) as (done, pool, _):
        pool.retire([7], keeps_spliced=True)
        assert only.ask.call_args_list[-1] == mock.call("retire", [7], keeps=True, more=True)
        pool._decisions.has_stopped = True  # type: ignore[misc]
        later(done)()
        assert only.ask.call_args_list[-1] == mock.call("retire", (), keeps=True, more=False)


def test_what_has_outlived_a_worker_is_reset_by_another_when_the_drain_is_over() -> None:
    lost, other, successor = worker(), worker(), worker()
    with serving(lost, other, successors=(successor,)) as (done, pool, starts):
        pool.drain()
        lost.exit_code, lost.started_s = -9, 1e12
        pool.reap()
        put_off = later(done)
        pool.replace_now()
        pool.stop()
        assert pool._workers == [successor, other]
        assert told(successor) == [("drain", False), ("stop", None)]
        assert told(other)[-1] == ("stop", None)
        put_off()
        assert starts.call_count == 1


def test_who_does_not_even_stop_is_replaced_once() -> None:
    stuck, successor = worker(), worker()

    def ask(do: str, *_: object, **__: object) -> None:
        if do == "stop":
            raise ControlError("it does not answer")

    stuck.ask.side_effect = ask
    stuck.kill.side_effect = lambda: setattr(stuck, "exit_code", -9)
    with serving(stuck, successors=(successor,)) as (_, pool, starts):
        pool.drain()
        pool.stop()
        pool.reap()
        assert pool._workers == [successor]
        assert told(successor) == [("stop", None)]
        successor.exit_code = -9
        pool.reap()
        assert starts.call_count == 1
        assert pool.have_ended


def test_who_may_get_pairs_of_the_keeper_still_is_told_when_there_are_no_more() -> None:
    """As the keeper, or the worker of a pair, was killed right before the drain."""
    lost, other, successor = worker(), worker(), worker()
    with serving(lost, other, successors=(successor,), has_stopped=False) as (done, pool, _):
        pool.drain()
        assert told(other) == [("drain", True)]
        look = later(done)
        lost.exit_code = -9
        pool.reap()
        assert told(successor) == [("drain", True)]
        look()
        assert told(other) == [("drain", True)]
        pool._decisions.has_stopped = True  # type: ignore[misc]
        later(done)()
        assert told(successor) == told(other) == [("drain", True), ("drain", False)]


def test_pairs_that_come_from_another_machine_in_a_drain_have_a_worker_though_it_ended() -> None:
    """The keeper gives each to a worker by its number."""
    ended, other, successor = worker(), worker(), worker()
    with serving(ended, other, successors=(successor,)) as (done, pool, starts):
        pool.drain()
        ended.exit_code = 0
        pool.reap()
        pool.adopt(1)
        assert other.ask.call_args_list[-1] == mock.call("adopt")
        assert not starts.called
        pool.adopt(0)
        assert pool._workers == [successor, other]
        assert told(successor) == [("drain", False)]
        assert not pool.have_ended
        names = [call[0] for call in done.mock_calls]
        assert names[-3:] == [
            "datapaths.accused",
            "memory.clear_window",
            "datapaths.forget_worker",
        ]
        # It has them now, and hears of others as any.
        pool.adopt(0)
        assert successor.ask.call_args_list[-1] == mock.call("adopt")
        assert starts.call_count == 1


@pytest.mark.parametrize("end", ["drain", "stop"])
def test_a_worker_that_ends_before_it_hears_of_pairs_is_replaced(end: str) -> None:
    ended, other, successor = worker(), worker(), worker()

    def ask(do: str, *_: object, **__: object) -> None:
        if do == "adopt":
            ended.exit_code = 0
            raise ControlError("it has ended")

    ended.ask.side_effect = ask
    with serving(ended, other, successors=(successor,)) as (_, pool, starts):
        getattr(pool, end)()
        pool.adopt(0)
        assert not starts.called
        pool.reap()
        assert pool._workers == [successor, other]
        assert told(successor)[-1][0] == end
        successor.exit_code = 0
        pool.reap()
        assert starts.call_count == 1
        other.exit_code = 0
        pool.reap()
        assert pool.have_ended


def test_pairs_that_come_from_another_machine_while_all_are_reset_are_reset_once_at_most() -> None:
    ended, other, successor = worker(), worker(), worker()
    with serving(ended, other, successors=(successor,)) as (_, pool, starts):
        pool.drain()
        ended.exit_code = 0
        pool.reap()
        pool.stop()
        pool.adopt(0)
        assert pool._workers == [successor, other]
        assert told(successor) == [("stop", None)]
        successor.exit_code = 0
        pool.reap()
        pool.adopt(0)
        assert starts.call_count == 1


def test_pairs_that_come_from_another_machine_once_another_daemon_has_the_place_are_its() -> None:
    ended, other = worker(), worker()
    with serving(ended, other) as (_, pool, starts):
        pool.drain()
        ended.exit_code = 0
        pool.reap()
        pool.retire([], keeps_spliced=False)
        pool.adopt(0)
        assert not starts.called
