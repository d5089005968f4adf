"""Images of many callers, embedded together: while one batch runs, the next collects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from nformer_edge.core.errors import Error
from nformer_edge.core.features import Features


class Batcher:
    """Embeds single images in batches. What fails is embedded alone, so that one caller's image harms no other's.

    Args:
        embed: images to features, in their order.
        batch: images at once.
        observe: is told the size of each batch.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Image.Image]], Features],
        batch: int,
        observe: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._embed, self._batch, self._observe = embed, batch, observe
        self._waiting: asyncio.Queue[tuple[Image.Image, asyncio.Future[Features]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "embed")
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether images are taken."""
        return self._task is not None and not self._task.done()

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def embed(self, image: Image.Image) -> Features:
        """One image's features, of one row. A caller who stops waiting leaves the queue."""
        future: asyncio.Future[Features] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((image, future))
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < self._batch and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            wanted = [(image, future) for image, future in taken if not future.done()]
            if not wanted:
                continue
            self._observe(len(wanted))
            images = [image for image, _ in wanted]
            results = await loop.run_in_executor(self._thread, self._each, images)
            for (_, future), result in zip(wanted, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _each(self, images: Sequence[Image.Image]) -> list[Features | Exception]:
        """Features or an error for each image."""
        try:
            found = self._embed(images)
            return [found.take(np.array([i])) for i in range(len(images))]
        except Exception as e:
            if len(images) == 1 or not isinstance(e, Error):
                return [e] * len(images)
            return [result for image in images for result in self._each([image])]
