"""Reading ahead and writing behind lose nothing, keep the order, and pass errors on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from ernieq.convert.overlap import BackgroundQueue, ReadAhead
from ernieq.errors import StorageError


class Shelf:
    """Makes tasks that note their name, and one that fails."""

    def __init__(self, failing: str = "") -> None:
        self._failing = failing
        self.names: list[str] = []
        self.threads: set[str] = set()

    def put(self, name: str) -> Callable[[], None]:
        def task() -> None:
            if name == self._failing:
                raise StorageError("the test's disk is full")
            self.names.append(name)
            self.threads.add(threading.current_thread().name)

        return task


def test_everything_added_arrives_in_order_though_few_may_wait() -> None:
    shelf, names = Shelf(), [f"m{number}" for number in range(50)]
    with BackgroundQueue(capacity=2) as waiting:
        for name in names:
            waiting.submit(shelf.put(name))
    assert shelf.names == names
    assert shelf.threads == {"ernieq-writer"}


def test_waiting_returns_when_all_tasks_are_done() -> None:
    shelf = Shelf()
    with BackgroundQueue() as waiting:
        waiting.submit(shelf.put("m0"))
        waiting.wait()
        assert shelf.names == ["m0"]


@pytest.mark.parametrize("waits", [False, True])
def test_an_error_of_a_task_surfaces_when_the_last_one_caused_it(waits: bool) -> None:
    def work() -> None:
        with BackgroundQueue() as waiting:
            waiting.submit(Shelf("m0").put("m0"))
            if waits:
                waiting.wait()

    with pytest.raises(StorageError, match="disk is full"):
        work()


def test_an_error_of_a_task_surfaces_while_others_are_added_and_blocks_nobody() -> None:
    shelf = Shelf("m3")

    def add_many() -> None:
        with BackgroundQueue(capacity=1) as waiting:
            for number in range(1000):
                waiting.submit(shelf.put(f"m{number}"))

    with pytest.raises(StorageError, match="disk is full"):
        add_many()
    assert shelf.names == ["m0", "m1", "m2"]


def test_an_error_of_the_encoder_is_not_hidden_by_one_of_a_task() -> None:
    def fail() -> None:
        with BackgroundQueue() as waiting:
            waiting.submit(Shelf("m0").put("m0"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()


def test_what_waits_is_done_though_the_encoder_fails() -> None:
    shelf = Shelf()

    def fail() -> None:
        with BackgroundQueue() as waiting:
            for number in range(20):
                waiting.submit(shelf.put(f"m{number}"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(shelf.names) == 20


def test_layers_come_in_order_and_one_ahead() -> None:
    loaded: list[int] = []
    begun = [threading.Event() for _ in range(4)]

    def load(number: int) -> int:
        begun[number].set()
        loaded.append(number)
        return 10 * number

    ahead = ReadAhead(load, 4)
    assert next(ahead) == 0
    assert begun[1].wait(10)
    assert list(ahead) == [10, 20, 30]
    assert loaded == [0, 1, 2, 3]


def test_an_error_of_loading_is_raised_in_its_turn() -> None:
    def load(number: int) -> Any:
        if number == 1:
            raise ValueError("layer 1 is broken")
        return number

    ahead = ReadAhead(load, 3)
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="layer 1 is broken"):
        next(ahead)
    ahead.close()
