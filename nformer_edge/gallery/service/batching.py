"""Work of many callers, done together: while one batch runs, the next collects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from nformer_edge.core.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Does the work of single callers in batches. Bad data is tried alone, so that one caller's harms no other's.

    Args:
        work: items to as many results, in their order, or an error and nothing done; called in one thread.
        batch: items at once.
        observe: is told the size of each batch.
    """

    def __init__(
        self, work: Callable[[Sequence[T]], Sequence[R]], batch: int, observe: Callable[[int], object] = lambda _: None
    ) -> None:
        self._work, self._batch, self._observe = work, batch, observe
        self._waiting: asyncio.Queue[tuple[T, asyncio.Future[R]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "batch")
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether items are taken."""
        return self._task is not None and not self._task.done()

    async def __aenter__(self) -> Batcher[T, R]:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    def one(self, item: T) -> asyncio.Future[R]:
        """The result of one item. A caller who stops waiting leaves the queue."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((item, future))
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < self._batch and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            wanted = [(item, future) for item, future in taken if not future.done()]
            if not wanted:
                continue
            self._observe(len(wanted))
            results = await loop.run_in_executor(self._thread, self._each, [item for item, _ in wanted])
            for (_, future), result in zip(wanted, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _each(self, items: Sequence[T]) -> Sequence[R | Exception]:
        """A result or an error for each item."""
        try:
            return self._work(items)
        except Exception as e:
            if len(items) == 1 or not isinstance(e, DataError):
                return [e] * len(items)
            return [result for item in items for result in self._each([item])]
