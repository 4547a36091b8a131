"""Stages of a job side by side: a thread reads ahead, or writes behind, while the caller computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import repeat, takewhile
from typing import TypeVar


T = TypeVar("T")


def in_thread(calls: Iterable[Callable[[], T]], num_ahead: int) -> Generator[T, None, None]:
    """Make calls in another thread, one after the other, and yield their results in order.

    What a call raises is raised in its place, and ends all. When the generator ends, is closed, or an exception such
    as `KeyboardInterrupt` passes through it, it waits for the call that is being made and drops those that wait: wrap
    it in `contextlib.closing`, so that this happens before the files in use are closed.

    Args:
        calls: The calls, which come from the caller's thread.
        num_ahead: Calls that may wait, be made, or have results that wait, while the caller does something else: for
            a result it waits as soon as there is one call more. Without any the caller's thread makes the calls.
    """
    if num_ahead == 0:
        for call in calls:
            yield call()
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "leanvae-stage") as thread:
        thread.submit(int).result()  # nobody would wait for a call whose thread was starting when Ctrl-C came
        try:
            for call in calls:
                waiting.append(thread.submit(call))
                if len(waiting) > num_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # A second Ctrl-C may end this wait; that of the `with` block comes after it.
            thread.shutdown(cancel_futures=True)


@contextmanager
def ahead(items: Iterator[T], num_ahead: int) -> Iterator[Iterator[T]]:
    """Give `items` as another thread takes them, up to `num_ahead` of them before they are asked for.

    At the end of the `with` block the thread is gone, whether all items have been taken or not.
    """
    end = object()
    with closing(in_thread(repeat(partial(next, items, end)), num_ahead)) as results:
        yield takewhile(lambda item: item is not end, results)  # pyright: ignore[reportReturnType]
