"""The mailbox: bounded, in order, and closed for good."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hsplitlora_flwr.transport.mailbox import Closed, Mailbox


def test_everything_arrives_in_order_through_a_narrow_mailbox() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(list, mailbox)
        for number in range(500):
            mailbox.put(number)
        mailbox.close()
        assert received.result(timeout=300) == list(range(500))


def test_put_blocks_while_full() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    with ThreadPoolExecutor(1) as pool:
        mailbox.put(1)
        mailbox.put(2)
        third = pool.submit(mailbox.put, 3)
        with pytest.raises(TimeoutError):
            third.result(timeout=0.1)
        assert next(mailbox) == 1
        third.result(timeout=300)
        mailbox.close()
        assert list(mailbox) == [2, 3]


def test_closing_wakes_all_who_wait() -> None:
    full: Mailbox[int] = Mailbox(1)
    full.put(1)
    empty: Mailbox[int] = Mailbox(1)
    with ThreadPoolExecutor(4) as pool:
        putting = [pool.submit(full.put, 2) for _ in range(2)]
        taking = [pool.submit(next, empty, None) for _ in range(2)]
        full.close()
        empty.close()
        for waiting in putting:
            with pytest.raises(Closed):
                waiting.result(timeout=300)
        assert [waiting.result(timeout=300) for waiting in taking] == [None, None]


@pytest.mark.parametrize("discard", [False, True])
def test_what_waits_can_be_discarded(discard: bool) -> None:
    mailbox: Mailbox[int] = Mailbox(3)
    mailbox.put(1)
    mailbox.put(2)
    mailbox.close(discard=discard)
    assert list(mailbox) == ([] if discard else [1, 2])
    assert list(mailbox) == []
    for _ in range(2):
        with pytest.raises(Closed):
            mailbox.put(3)
