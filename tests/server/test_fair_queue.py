"""Flows take turns by cost, however much each of them has queued."""

from collections import Counter

import pytest

from server.fair_queue import FairQueue


def take(queue: FairQueue[str], count: int) -> list[str]:
    return [queue.pop() for _ in range(count)]


def test_a_flow_with_much_queued_does_not_delay_the_others() -> None:
    queue = FairQueue[str]()
    for _ in range(90):
        queue.push(("large", "a"), 1, "large")
    for _ in range(10):
        queue.push(("small", "b"), 1, "small")
    assert Counter(take(queue, 20)) == {"large": 10, "small": 10}
    assert len(queue) == 80


def test_shares_are_of_cost_and_not_of_items() -> None:
    queue = FairQueue[str]()
    for _ in range(60):
        queue.push(("costly", ""), 13, "costly")
        queue.push(("cheap", ""), 1, "cheap")
    taken = Counter(take(queue, 28))
    assert taken["costly"] == 2
    assert taken["cheap"] == 26


def test_requests_of_one_caller_take_turns() -> None:
    queue = FairQueue[str]()
    for number in range(12):
        queue.push(("caller", "large"), 13, f"large {number}")
    queue.push(("caller", "small"), 1, "small")
    assert "small" in take(queue, 2)


def test_a_flow_that_comes_later_gets_its_share_and_no_more() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push(("first", ""), 1, "first")
    take(queue, 50)
    for _ in range(100):
        queue.push(("second", ""), 1, "second")
    assert 9 <= Counter(take(queue, 20))["second"] <= 11


def test_a_flow_that_queues_one_item_at_a_time_does_not_go_first_each_time() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push(("many", ""), 1, "many")
    order = []
    for _ in range(20):
        queue.push(("single", ""), 5, "single")
        while (taken := queue.pop()) != "single":
            order.append(taken)
        order.append(taken)
    assert 70 <= order.count("many") <= 100, "each costs five times as much"


def test_items_of_one_flow_keep_their_order() -> None:
    queue = FairQueue[int]()
    for number in range(10):
        queue.push(("a", "b"), 3 - number % 3, number)
    assert [queue.pop() for _ in range(10)] == list(range(10))


def test_peek_returns_what_pop_removes() -> None:
    queue = FairQueue[str]()
    for flow in "abc":
        queue.push((flow, ""), 2, flow)
    while queue:
        assert queue.peek() == queue.pop()


def test_discarded_items_leave_and_the_rest_stays() -> None:
    queue = FairQueue[str]()
    for name in ("x", "y", "z"):
        queue.push(("a", "1"), 1, name)
    queue.push(("b", "1"), 1, "other")
    queue.discard(("a", "1"), lambda item: item == "y")
    queue.discard(("b", "1"), lambda _: True)
    queue.discard(("unknown", "1"), lambda _: True)
    assert len(queue) == 2
    assert take(queue, 2) == ["x", "z"]
    assert not queue
    with pytest.raises(LookupError):
        queue.pop()
    with pytest.raises(LookupError):
        queue.peek()


def test_an_empty_queue_remembers_no_flow() -> None:
    queue = FairQueue[str]()
    for number in range(1000):
        queue.push((f"caller {number}", "request"), 1, "item")
        queue.pop()
    assert not queue._root._flows
    assert not queue._root._ends
