"""The backlog: bounded, in order, closed for good, and taken again from wherever the other side lost it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from hsplitlora_flwr.transport.stream.backlog import Backlog, Closed


def filled(*items: str, size: int = 4, keep: bool = True) -> Backlog[str]:
    backlog: Backlog[str] = Backlog(size, keep=keep)
    for item in items:
        backlog.put(item)
    return backlog


def test_what_has_not_arrived_is_taken_again() -> None:
    backlog = filled("a", "b", "c")
    assert list(islice(backlog.since(0), 3)) == ["a", "b", "c"]
    backlog.arrived(1)
    again = backlog.since(1)
    assert next(again) == "b"
    backlog.put("d")
    assert list(islice(again, 2)) == ["c", "d"]


def test_there_is_room_as_items_arrive() -> None:
    backlog = filled("a", "b", size=2)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(backlog.put, "c")
        assert list(islice(backlog.since(0), 2)) == ["a", "b"]
        with pytest.raises(TimeoutError):
            third.result(timeout=0.1)
        backlog.arrived(1)
        third.result(timeout=300)
    assert list(islice(backlog.since(1), 2)) == ["b", "c"]


def test_nothing_arrives_that_was_never_taken() -> None:
    backlog = filled("a", "b")
    assert next(backlog.since(0)) == "a"
    backlog.arrived(2)
    assert next(backlog.since(1)) == "b"


def test_what_is_said_to_have_arrived_before_it_was_taken_leaves_room_once_it_is() -> None:
    backlog = filled("a", "b", size=2)
    taken = backlog.since(0)
    backlog.arrived(9)
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(lambda: [backlog.put(item) for item in "cd"])
        assert list(islice(taken, 4)) == ["a", "b", "c", "d"]
        putting.result(timeout=300)


@pytest.mark.parametrize("number", [0, 4])
def test_what_is_gone_or_not_yet_there_cannot_be_asked_for(number: int) -> None:
    backlog = filled("a", "b", "c")
    list(islice(backlog.since(0), 2))
    backlog.arrived(1)
    with pytest.raises(LookupError, match=f"number {number} is asked for, where those from 1 to 3 are kept"):
        backlog.since(number)


def test_the_next_who_takes_ends_the_one_before() -> None:
    backlog = filled("a")
    with ThreadPoolExecutor(1) as pool:
        before = backlog.since(0)
        assert next(before) == "a"
        waiting = pool.submit(list, before)
        after = backlog.since(0)
        assert waiting.result(timeout=300) == []
        assert next(after) == "a"
        waiting = pool.submit(list, after)
        backlog.hang_up()
        assert waiting.result(timeout=300) == []


def test_everything_arrives_in_order_through_a_narrow_one() -> None:
    backlog: Backlog[int] = Backlog(2, keep=False)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(list, backlog.since(0))
        for number in range(500):
            backlog.put(number)
        backlog.close()
        assert received.result(timeout=300) == list(range(500))


def test_what_is_not_kept_leaves_room_as_it_is_taken() -> None:
    backlog = filled("a", "b", size=2, keep=False)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(backlog.put, "c")
        with pytest.raises(TimeoutError):
            third.result(timeout=0.1)
        taken = backlog.since(0)
        assert next(taken) == "a"
        third.result(timeout=300)
        backlog.close()
        assert list(taken) == ["b", "c"]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("discard", [False, True])
def test_closing_ends_who_takes_and_who_puts(discard: bool, keep: bool) -> None:
    backlog, empty = filled("a", "b", size=2, keep=keep), filled(keep=keep)
    with ThreadPoolExecutor(3) as pool:
        putting = [pool.submit(backlog.put, "c") for _ in range(2)]
        waiting_for_more = pool.submit(list, empty.since(0))
        backlog.close(discard=discard)
        empty.close(discard=discard)
        for waiting in putting:
            with pytest.raises(Closed):
                waiting.result(timeout=300)
        assert waiting_for_more.result(timeout=300) == []
    assert list(backlog.since(2 if discard else 0)) == ([] if discard else ["a", "b"])
