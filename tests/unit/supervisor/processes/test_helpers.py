"""Processes beside the workers that die: which of them come again while the daemon ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any
from unittest import mock

from pyforwarder.supervisor.processes.helpers import Helpers


def helpers(
    *, is_ending: bool = False, is_over: bool = False, resets: bool = False
) -> tuple[Any, mock.Mock]:
    """Whose keeper and one other process have died, and what they do."""
    done = mock.Mock()
    done.datapaths.keeper_has_died.side_effect = [True, False, False]
    made: Any = object.__new__(Helpers)
    made._datapaths, made._loop, made._log = done.datapaths, done.loop, done.log
    made._lacks_keeper = made._replaced_in_the_end = False
    made._is_ending = lambda: is_ending
    made._is_over = lambda: is_over
    made._resets = lambda: resets
    made.failover = done.failover
    made._all = {"web": done.web}
    done.web.rest_s = 1.0
    return made, done


def put_off(done: mock.Mock) -> list[Callable[[], None]]:
    return [call.args[1] for call in done.loop.after.call_args_list]


def test_in_a_drain_the_keeper_comes_again_and_nothing_else_does() -> None:
    """Pairs end only with its help; nobody is served any more."""
    made, done = helpers(is_ending=True)
    made.reap()
    (again,) = put_off(done)
    again()
    assert done.datapaths.restart_keeper.call_count == 1
    assert done.failover.renew.call_count == 1
    assert not done.web.start.called


def test_no_keeper_comes_again_after_a_pause_once_its_pairs_are_anothers_or_are_reset() -> None:
    made, done = helpers(is_ending=True, is_over=True)
    made.reap()
    assert put_off(done) == []
    made, done = helpers(is_ending=True)
    made.reap()
    (again,) = put_off(done)
    made._is_over = lambda: True
    again()
    assert not done.datapaths.restart_keeper.called


def test_a_keeper_that_has_died_is_replaced_at_once_if_pairs_are_to_be_reset() -> None:
    made, done = helpers(is_ending=True)
    made.reap()
    made._is_over = lambda: True
    done.datapaths.restart_keeper.side_effect = [OSError(errno.EAGAIN, "no process"), None]
    made.replace_keeper()
    assert done.datapaths.restart_keeper.call_count == 1
    for again in put_off(done):
        again()
    assert done.datapaths.restart_keeper.call_count == 1
    made.replace_keeper()  # there is none to be replaced
    assert done.datapaths.restart_keeper.call_count == 1


def test_what_the_store_is_asked_for_is_told_when_all_that_ask_have_changed() -> None:
    done = mock.Mock()
    made: Any = object.__new__(Helpers)
    made._source, made._in_force, made.web = done.source, done.in_force, done.web
    made.fleet, made.tokens, made.limits = done.fleet, done.tokens, done.limits
    made.failover = done.failover
    made._of_store = (made.failover,)
    done.failover.exchange.return_value = None
    asked = {"part": "failover", "answered_s": 1.0, "unusable": 0}

    def change(_fleet: object) -> None:
        done.failover.exchange.return_value = asked

    done.failover.change_to.side_effect = change
    made.change_fleet(mock.Mock())
    assert done.web.send_exchanges.call_args_list[-1] == mock.call([asked])


def test_a_keeper_that_dies_right_before_pairs_are_reset_is_replaced_unseen() -> None:
    made, done = helpers(is_ending=True, is_over=True)
    made.replace_keeper()
    assert done.datapaths.restart_keeper.call_count == 1


def test_a_keeper_that_dies_while_pairs_are_reset_is_replaced_once_and_without_a_pause() -> None:
    """Its workers have asked it to reset them; they wait for a second or two."""
    made, done = helpers(is_ending=True, is_over=True, resets=True)
    done.datapaths.keeper_has_died.side_effect = [True, True]
    for _ in range(2):
        made.reap()
        assert done.datapaths.restart_keeper.call_count == 1
    assert put_off(done) == []


def test_who_knows_of_other_machines_pairs_comes_again_in_a_drain_and_not_later() -> None:
    """Nobody else tells others of the pairs that go on here, or workers of those that come."""
    for is_over in (False, True):
        made, done = helpers(is_ending=True, is_over=is_over)
        done.datapaths.keeper_has_died.side_effect = [False]
        made._all = {"web": done.web, "failover": done.failover}
        done.failover.rest_s = 1.0
        made.reap()
        for again in put_off(done):
            again()
        assert not done.web.start.called
        assert done.failover.start.called is not is_over
