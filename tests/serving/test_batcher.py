"""Which items are computed together, with computations that remember what they were given."""

import asyncio
import threading

import pytest

from hpr_jax.serving.batcher import Batcher


class Compute:
    """Doubles numbers. It refuses 13, and lists of more than `room` items."""

    def __init__(self, room=100):
        self.batches: list[list[int]] = []
        self.room, self.open = room, threading.Event()
        self.open.set()

    def __call__(self, items):
        self.open.wait()
        self.batches.append(items)
        if 13 in items or len(items) > self.room:
            raise ValueError(f"not {items}")
        return [2 * item for item in items]


def results(compute, items, *, most, fewest=1, key=lambda item: 0):
    """What comes of items that are submitted at once: results and sizes of their batches, or errors."""

    async def main():
        batcher = Batcher(compute, most=most, fewest=fewest, patience=0.001)
        work = asyncio.create_task(batcher.work())
        found = await asyncio.gather(*(batcher.submit(item, key(item)) for item in items), return_exceptions=True)
        work.cancel()
        return found, batcher

    return asyncio.run(main())


def test_full_batches_come_first_and_what_is_left_is_one():
    compute = Compute()
    found, batcher = results(compute, range(10), most=4)
    assert compute.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found == [(2 * item, 4) for item in range(8)] + [(16, 2), (18, 2)]
    assert batcher.sizes == {4: 2, 2: 1}
    assert batcher.seconds > 0


def test_what_is_not_worth_a_batch_is_computed_one_by_one():
    compute = Compute()
    assert results(compute, range(6), most=4, fewest=3)[0][-2:] == [(8, 1), (10, 1)]
    assert compute.batches == [[0, 1, 2, 3], [4], [5]]


def test_only_items_with_the_same_key_share_a_batch_and_the_oldest_is_first():
    compute = Compute()
    results(compute, [0, 1, 2, 3, 4, 5], most=2, key=lambda item: item % 3)
    assert compute.batches == [[0, 3], [1, 4], [2, 5]]


def test_one_bad_item_does_not_harm_those_beside_it():
    compute = Compute()
    found, _ = results(compute, [1, 13, 2], most=3)
    assert (found[0], found[2]) == ((2, 1), (4, 1))
    assert isinstance(found[1], ValueError)
    assert compute.batches == [[1, 13, 2], [1], [13], [2]]


def test_a_batch_that_has_no_room_is_divided():
    assert results(Compute(room=1), [1, 2], most=2)[0] == [(2, 1), (4, 1)]


def test_items_that_nobody_waits_for_are_not_computed():
    compute = Compute()

    async def main():
        batcher = Batcher(compute, most=1, patience=0.0)
        work = asyncio.create_task(batcher.work())
        compute.open.clear()
        first, second, third = (asyncio.create_task(batcher.submit(item, 0)) for item in (1, 2, 3))
        await asyncio.sleep(0.02)
        second.cancel()
        compute.open.set()
        assert await first == (2, 1)
        assert await third == (6, 1)
        work.cancel()

    asyncio.run(main())
    assert compute.batches == [[1], [3]]


def test_something_else_is_computed_between_batches():
    async def main():
        batcher = Batcher(Compute(), most=2, patience=0.0)
        with pytest.raises(ZeroDivisionError):
            await batcher.alone(lambda: 1 // 0)
        return await batcher.alone(lambda: threading.current_thread().name)

    assert asyncio.run(main()) == "computes"
