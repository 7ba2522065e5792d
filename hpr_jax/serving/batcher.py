"""Requests that come at about the same time are computed together."""

import asyncio
import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(eq=False)
class _Waiting(Generic[Item]):
    item: Item
    key: Hashable
    done: "asyncio.Future[tuple[Any, int]]"


class Batcher(Generic[Item, Result]):
    """Computes items in batches, in a thread that does nothing else, while the event loop goes on.

    Args:
      compute: from items to their results, in the same order.
      most: items of a batch.
      fewest: items that are worth a batch. Where a batch that is not full is filled up, it takes as long as a full one, and
        fewer items are computed one by one.
      patience: seconds for which an item waits for others, if a batch is not full.

    Attributes:
      sizes: how many batches of each size have been computed.
      seconds: of an item, a running mean; 0 before the first.
    """

    def __init__(self, compute: Callable[[list[Item]], Sequence[Result]], *, most: int, fewest: int = 1, patience: float):
        self.sizes: collections.Counter[int] = collections.Counter()
        self.seconds = 0.0
        self._compute, self._most, self._fewest, self._patience = compute, most, fewest, patience
        self._waiting: list[_Waiting[Item]] = []
        self._arrived = asyncio.Event()
        self._thread = _Thread()

    async def submit(self, item: Item, key: Hashable) -> tuple[Result, int]:
        """The result of an item, and how many items were computed together; raises what its computation raises.

        Args:
          key: items that share it can be computed together.
        """
        waiting = _Waiting(item, key, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.done

    async def alone(self, compute: Callable[[], Any]) -> Any:
        """What something computes in the thread of the batches, between two of them."""
        return await asyncio.wrap_future(self._thread.run(compute))

    async def work(self) -> None:
        """Computes batches until it is cancelled."""
        while True:
            await self._arrived.wait()
            if len(self._next()) < self._most:
                await asyncio.sleep(self._patience)
            batch = self._next()
            if not batch:
                self._arrived.clear()
                continue
            if len(batch) < self._fewest:
                batch = batch[:1]
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            await self._run(batch)

    @property
    def busy(self) -> bool:
        """Whether the thread computes."""
        return self._thread.busy

    def _next(self) -> list[_Waiting[Item]]:
        """The oldest item and those that can be computed together with it. Nobody waits for some: they are forgotten."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.done.done()]
        return [waiting for waiting in self._waiting if waiting.key == self._waiting[0].key][: self._most]

    async def _run(self, batch: Sequence[_Waiting[Item]]) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            results = await self.alone(lambda: self._compute([waiting.item for waiting in batch]))
        except Exception as error:
            if len(batch) > 1:
                # There may be no memory for all at once, or one of them may be the cause.
                for waiting in batch:
                    await self._run([waiting])
            elif not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        self.sizes[len(batch)] += 1
        seconds = (loop.time() - start) / len(batch)
        self.seconds = 0.8 * self.seconds + 0.2 * seconds if self.seconds else seconds
        for waiting, result in zip(batch, results):
            if not waiting.done.done():
                waiting.done.set_result((result, len(batch)))


class _Thread:
    """Calls functions, one after the other. It ends with the process, which need not wait for it as for those of a pool."""

    def __init__(self) -> None:
        self.busy = False
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="computes").start()

    def run(self, call: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            self.busy = True
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self.busy = False
