"""Reading ahead and writing behind lose nothing, keep the order, and pass errors on."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from ernieq.convert.overlap import BackgroundSink, ReadAhead
from ernieq.errors import StorageError
from ernieq.trellis import EncodedMatrix, TrellisCode

MATRIX = EncodedMatrix(
    np.zeros((1, 1, 32), np.int16), np.ones(16, np.float16), np.ones(16, np.int8), 16, TrellisCode(2, 10)
)


class Shelf:
    """A sink that notes what it is given and fails at one name."""

    def __init__(self, failing: str = "") -> None:
        self._failing = failing
        self.names: list[str] = []
        self.threads: set[str] = set()

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        if module_name == self._failing:
            raise StorageError("the test's disk is full")
        self.names.append(module_name)
        self.threads.add(threading.current_thread().name)


def test_everything_added_arrives_in_order_though_few_may_wait() -> None:
    shelf, names = Shelf(), [f"m{number}" for number in range(50)]
    with BackgroundSink(shelf, capacity=2) as sink:
        for name in names:
            sink.add_encoded(name, MATRIX)
    assert shelf.names == names
    assert shelf.threads == {"ernieq-writer"}


def test_an_error_of_the_sink_surfaces_when_the_last_matrix_caused_it() -> None:
    with pytest.raises(StorageError, match="disk is full"), BackgroundSink(Shelf("m0")) as sink:
        sink.add_encoded("m0", MATRIX)


def test_an_error_of_the_sink_surfaces_while_matrices_are_added_and_blocks_nobody() -> None:
    shelf = Shelf("m3")

    def add_many() -> None:
        with BackgroundSink(shelf, capacity=1) as sink:
            for number in range(1000):
                sink.add_encoded(f"m{number}", MATRIX)

    with pytest.raises(StorageError, match="disk is full"):
        add_many()
    assert shelf.names == ["m0", "m1", "m2"]


def test_an_error_of_the_encoder_is_not_hidden_by_one_of_the_sink() -> None:
    def fail() -> None:
        with BackgroundSink(Shelf("m0")) as sink:
            sink.add_encoded("m0", MATRIX)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()


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
