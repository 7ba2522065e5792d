"""Calls in threads, whose results come in the order of the calls."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Calls a function with each item, in the threads of a pool, some items before their results are asked for.

    Args:
      count: how many calls are begun, or done, beyond the one whose result is being used. They bound the memory, too.

    Yields:
      Each item with its result, in the order of the items.
    """
    waiting = collections.deque[tuple[Item, Future[Result]]]()
    items = iter(items)
    while True:
        for item in itertools.islice(items, count + 1 - len(waiting)):
            waiting.append((item, pool.submit(function, item)))
        if not waiting:
            return
        yield waiting.popleft()


class InBackground(Generic[Result]):
    """Calls in the threads of a pool; what they return is handled in this thread, in the order of the calls.

    Args:
      handle: is given what each call returned.
      most: so many calls may be unfinished; another one waits for the oldest.
    """

    def __init__(self, pool: Executor, handle: Callable[[Result], None], most: int):
        self._pool, self._handle, self._most = pool, handle, most
        self._waiting = collections.deque[Future[Result]]()

    def submit(self, function: Callable[..., Result], *arguments: object) -> None:
        """Calls a function in a thread. Handles what has been finished, and raises what an earlier call has raised."""
        self._waiting.append(self._pool.submit(function, *arguments))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0].done()):
            self._handle(self._waiting.popleft().result())

    def finish(self) -> None:
        """Waits for all calls, and handles what they return; raises what one has raised."""
        while self._waiting:
            self._handle(self._waiting.popleft().result())
