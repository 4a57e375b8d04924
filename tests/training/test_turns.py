"""Turns: a fixed order whatever the timing, and nobody waits for ever."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import pytest

from hsplitlora_flwr.training.turns import Turns


def train(turns: Turns, client: str, steps: int, seconds: float, log: list[tuple[str, int]]) -> None:
    """A client that computes before every step, and notes when it holds the turn."""
    for step in range(steps):
        time.sleep(random.random() * seconds)
        turns.take(client)
        log.append((client, step))
        time.sleep(random.random() * seconds / 4)
        assert log[-1] == (client, step), "two clients held the turn at once"
        turns.done(client)
    turns.leave(client)


@pytest.mark.parametrize("seed", range(3))
def test_the_fixed_order_is_by_step_and_then_by_client_whatever_the_timing(seed: int) -> None:
    random.seed(seed)
    log: list[tuple[str, int]] = []
    turns = Turns("abc", patience=60)
    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(train, turns, name, 4, 0.01, log) for name in "cba"]:
            future.result(300)
    assert log == [(name, step) for step in range(4) for name in "abc"]


def test_by_arrival_nobody_waits_for_anybody() -> None:
    turns = Turns("abc", "arrival", patience=60)
    for name in "cab":
        turns.take(name)
        turns.done(name)
    assert turns.try_take("c")
    assert not turns.try_take("b") and not turns.try_take("a"), "one at a time"
    turns.done("c")
    assert not turns.try_take("a"), "b asked first"
    assert turns.try_take("b")


def test_a_client_that_does_not_come_is_passed_over_and_waited_for_again_once_it_has_caught_up() -> None:
    late: list[str] = []
    turns = Turns("abc", patience=0.05, passed_over=late.append)
    turns.take("c")  # neither a nor b came
    assert late == ["a", "b"]
    turns.done("c")
    turns.take("c")
    turns.done("c")
    assert late == ["a", "b"], "nobody waits for them any more"
    for _ in range(2):
        assert turns.try_take("b"), "what comes late is served at once"
        turns.done("b")
    turns.take("a")
    turns.done("a")
    assert not turns.try_take("c"), "b has caught up, so c waits for it; a has not"
    assert turns.try_take("b")


def test_those_that_wait_do_not_wake_each_other() -> None:
    looked: list[str] = []

    class Watched(Turns):
        def try_take(self, client: str) -> bool:
            looked.append(client)
            return super().try_take(client)

    turns = Watched("abc", patience=0.3)
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(train, turns, name, 1, 0.0, []) for name in "bc"]:
            future.result(300)
    assert len(looked) < 20, "a came nowhere near, and they look when its time is up, not all the time"


def test_who_leaves_is_not_waited_for_and_gives_its_turn_back() -> None:
    turns = Turns("ab", patience=60)
    turns.take("a")
    entered = Event()

    def second() -> None:
        entered.set()
        turns.take("b")

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(second)
        entered.wait(300)
        time.sleep(0.02)
        assert not waiting.done()
        turns.leave("a")
        waiting.result(300)
    turns.done("b")
    turns.take("b")
    with pytest.raises(LookupError, match="client a has no turn"):
        turns.take("a")
    turns.leave("a")  # twice does no harm


def test_the_holder_may_ask_again_within_its_step() -> None:
    turns = Turns("ab")
    turns.take("a")
    turns.take("a")
    turns.done("a")
    assert turns.try_take("b")


def test_many_threads_that_come_and_go_never_hang() -> None:
    names, lock, seen = [f"{i:02d}" for i in range(12)], Lock(), set[str]()
    turns = Turns(names, patience=0.02)

    def unsteady(name: str) -> None:
        chance = random.Random(name)
        for _ in range(5):
            time.sleep(chance.random() * 0.05)
            turns.take(name)
            with lock:
                seen.add(name)
            if chance.random() < 0.1:
                turns.leave(name)  # in the middle of its step
                return
            turns.done(name)
        turns.leave(name)

    with ThreadPoolExecutor(len(names)) as threads:
        for future in [threads.submit(unsteady, name) for name in names]:
            future.result(300)
    assert seen == set(names)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order='random' is unknown; choose one of fixed, arrival"):
        Turns("a", "random")
