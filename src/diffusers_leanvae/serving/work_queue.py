"""One model, one thread, and a bounded number of requests that wait for it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from .protocol import Refusal


Result = TypeVar("Result")


class WorkQueue:
    """Do one computation at a time, always in the same thread.

    A computation that runs is never interrupted, since PyTorch has no way to: the size of what it computes bounds it.

    Args:
        max_waiting: Requests that may be inside in addition to the one that is computed.
        timeout: Seconds that one of them waits.
    """

    def __init__(self, max_waiting: int, timeout: float) -> None:
        self._max_waiting, self._timeout = max_waiting, timeout
        self._num_inside = 0
        self._turn = asyncio.Lock()
        # Of its own, since each thread that computes would keep a team of threads and memory.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="leanvae-model")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place for a request, from before its body is read: so many bodies are in memory at most."""
        if self._num_inside > self._max_waiting:
            raise Refusal(503, "The server is busy, and no place to wait is free; try again.", {"Retry-After": "1"})
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    async def run(self, work: Callable[[], Result], is_abandoned: Callable[[], Awaitable[bool]]) -> Result:
        """Wait for the computations before this one, then do it.

        Args:
            work: The computation.
            is_abandoned: Tells whether nobody waits for the result any more, so that it is not computed.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._turn.acquire()
        except TimeoutError:
            sentence = f"The server is busy, and this request waited for {self._timeout:g} s; try again."
            raise Refusal(503, sentence, {"Retry-After": "1"}) from None
        try:
            if await is_abandoned():
                raise Refusal(400, "The client went away before its turn came.")
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._turn.release()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False)
