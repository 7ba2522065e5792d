"""Calls in threads begin before they are asked for, and their results come in the order of the calls."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpr_jax.runtime.threads import InBackground, ahead


def test_some_items_ahead():
    begun = []

    def items():
        for number in range(6):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = ahead(pool, lambda number: 10 // number, items(), 2)
        first, failed = next(results)
        assert (first, type(failed.exception())) == (0, ZeroDivisionError)
        assert begun == [0, 1, 2]
        assert [(item, future.result()) for item, future in results] == [(1, 10), (2, 5), (3, 3), (4, 2), (5, 2)]


def test_results_come_in_the_order_of_the_calls():
    handled, late = [], threading.Event()
    with ThreadPoolExecutor(2) as pool:
        calls = InBackground[int](pool, handled.append, 2)
        calls.submit(lambda: late.wait(5) and 1)
        calls.submit(int, 2)
        assert handled == []
        # A third one waits for the oldest.
        threading.Timer(0.01, late.set).start()
        calls.submit(int, 3)
        assert handled[0] == 1
        calls.finish()
    assert handled == [1, 2, 3]


def test_an_error_is_raised_where_the_results_are_handled():
    handled = []
    with ThreadPoolExecutor(1) as pool:
        calls = InBackground[int](pool, handled.append, 5)
        for number in (1, 0, 2):
            calls.submit(lambda number=number: 10 // number)
        with pytest.raises(ZeroDivisionError):
            calls.finish()
        calls.finish()
    assert handled == [10, 5]
