"""Stages in threads: order, how far they are ahead, errors in their place, and no thread left behind."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import pytest

from diffusers_leanvae.stages import ahead, in_thread


def stage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("leanvae-stage")]


@pytest.mark.parametrize("num_ahead", [0, 1, 3, 50])
def test_items_come_in_order_and_so_many_ahead(num_ahead: int):
    made, places, has_made = [], set(), threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            places.add(threading.current_thread())
            has_made.release()
            yield number

    taken = []
    with ahead(items(), num_ahead) as read:
        num_made = 0
        for number in read:
            taken.append(number)
            expected = min(number + 1 + num_ahead, 20)
            while num_made < expected:  # it does read that far while its user works
                assert has_made.acquire(timeout=60)
                num_made += 1
            assert len(made) == expected  # and no further
    assert taken == list(range(20))
    assert (threading.main_thread() in places) == (num_ahead == 0) and len(places) == 1
    assert stage_threads() == []


@pytest.mark.parametrize("num_ahead", [0, 1, 4])
def test_calls_are_made_one_by_one_behind_the_caller(num_ahead: int):
    done, results = [], []

    def work(number: int) -> int:
        assert done == list(range(number))
        done.append(number)
        return -number

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(10):
            assert number - len(results) <= num_ahead
            yield partial(work, number)

    with closing(in_thread(calls(), num_ahead)) as worked:
        results.extend(worked)  # one by one: `calls` sees how many there are
    assert results == [-number for number in range(10)]


@pytest.mark.parametrize("num_ahead", [0, 1, 8])
def test_an_error_comes_in_its_place_and_ends_all(num_ahead: int):
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("`source` is damaged.")

    taken, done = [], []
    with pytest.raises(ValueError, match="`source` is damaged"), ahead(items(), num_ahead) as read:
        taken.extend(read)
    assert taken == [0, 1, 2] and stage_threads() == []

    def work(number: int) -> None:
        if number == 2:
            raise OSError("no space left")
        done.append(number)

    calls = [partial(work, number) for number in range(2)] + [partial(work, 2)] * 20
    with pytest.raises(OSError, match="no space left"), closing(in_thread(calls, num_ahead)) as worked:
        for _ in worked:
            pass
    assert done == [0, 1] and stage_threads() == []


def test_who_stops_early_leaves_no_thread():
    ended = []

    def items() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            ended.append(True)

    source = items()
    with ahead(source, 2) as read:
        assert next(read) == 1 and stage_threads()
    assert stage_threads() == []
    source.close()  # which Python would refuse while a thread were in it
    assert ended == [True]
    with pytest.raises(KeyError), ahead(items(), 2) as read:
        assert next(read) == 1
        raise KeyError
    assert stage_threads() == []


@pytest.mark.skipif(os.name != "posix", reason="the signal is sent to a thread, which is POSIX's")
def test_an_interrupt_ends_the_wait_for_a_result_after_the_call_that_is_made():
    is_caught, ended = threading.Event(), []

    def call() -> None:
        # A signal that comes just before the main thread begins to wait does not end its wait: the next one does.
        for _ in range(600):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if is_caught.wait(0.1):
                break
        assert is_caught.is_set()
        ended.append(True)

    def interrupt(*_: object) -> None:
        if not is_caught.is_set():
            is_caught.set()
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), closing(in_thread([call], 1)) as worked:
            next(worked)
    finally:
        signal.signal(signal.SIGINT, former)
    assert ended == [True] and stage_threads() == []
