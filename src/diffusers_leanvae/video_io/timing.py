"""Time: the frame rate of a file, the time of each frame, and a constant rate made of any."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from av.video.stream import VideoStream

from ..checks import is_number


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch

_NO_CLAIM = Fraction(25)  # where nothing tells the rate
_MAX_RATE = 1000  # frames per second that a header may claim without time stamps that say so
_USUAL_RATES = [Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120)]
_USUAL_RATES += [Fraction(rate) for rate in (12, 15, 24, 25, 30, 48, 50, 60, 100, 120, 240)]


def frame_rate(stream: VideoStream, stamps: list[int]) -> Fraction:
    """Return the average frame rate of a stream.

    A header is believed unless its rate is more than 1.5 times, or less than two thirds of, what `stamps` say, the
    ordered time stamps of the first frames: raw DV claims 60000 frames per second.
    """
    claims = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
    tick = stream.time_base
    if tick is None or len(stamps) < 2:
        return next((rate for rate in claims if rate <= _MAX_RATE), _NO_CLAIM)
    measured = 1 / ((stamps[-1] - stamps[0]) * Fraction(tick) / (len(stamps) - 1))
    error = Fraction(2, stamps[-1] - stamps[0])  # of the measurement, relative
    for claim in claims:
        if measured * 2 / 3 <= claim <= measured * 3 / 2:
            # Where ticks are milliseconds, FFmpeg has measured the rate as well: 24 and 24000/1001 are 0.1 % apart.
            is_rounded = tick >= Fraction(1, 2000)
            return _usual_rate(Fraction(claim), min(error, Fraction(1, 2500))) if is_rounded else Fraction(claim)
    return _usual_rate(measured, max(error, Fraction(1, 1000)))


def _usual_rate(rate: Fraction, error: Fraction) -> Fraction:
    """Return the usual rate that is meant, or `rate` if there is none within a relative `error`."""
    usual = min(_USUAL_RATES, key=lambda candidate: abs(candidate - rate))
    return usual if abs(usual - rate) <= error * rate else rate


def is_variable(stream: VideoStream, stamps: list[int]) -> bool:
    """Return whether frames come at unequal times, as far as their ordered time stamps tell.

    Two ticks or a millisecond, but not half a frame, are taken for rounding.
    """
    tick = stream.time_base
    if tick is None or len(stamps) < 3:
        return False
    span, count = stamps[-1] - stamps[0], len(stamps) - 1
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    usual = sorted(steps)[count // 2]
    bound = min(max(2, Fraction(1, 1000) / tick), Fraction(span, 2 * count))
    limit, limit_of_sum = int(bound), int(bound * count)  # comparing fractions would take seconds
    return any(
        abs(step - usual) > limit or abs((stamp - stamps[0]) * count - index * span) > limit_of_sum
        for index, (stamp, step) in enumerate(zip(stamps, steps, strict=False))
    )


class Clock:
    """Times of frames in seconds from the first frame of the file on, strictly increasing.

    Containers round time stamps to their ticks, Matroska to milliseconds. A time that is within a tick of a multiple
    of `1 / fps` is taken for that multiple, unless the rate is variable. Frames without a time stamp, or with that of
    the frame before, follow the frame before at the average rate.

    Args:
        fps: Average rate.
        tick: Seconds per unit of time stamps.
        first: Time stamp of the first frame of the file.
        is_variable: Whether times are kept as they are.
    """

    def __init__(self, fps: Fraction, tick: Fraction | None, first: int | None, is_variable: bool) -> None:
        self._fps, self._tick, self._first, self._is_variable = fps, tick, first, is_variable
        self._last: Fraction | None = None

    def time(self, index: int, stamp: int | None) -> Fraction:
        """Return the time of a frame; within one range, frames must come in their order."""
        if stamp is None or self._first is None or self._tick is None:
            time = index / self._fps if self._last is None else self._last + 1 / self._fps
        else:
            time = (stamp - self._first) * self._tick
            if not self._is_variable:
                exact = round(time * self._fps) / self._fps
                if abs(exact - time) <= self._tick and (self._last is None or exact > self._last):
                    time = exact
            if self._last is not None and time <= self._last:
                time = self._last + 1 / self._fps
        self._last = time
        return time


class LastEnd:
    """Where the last frame of a video ends, as far as its container tells.

    Args:
        fps: Average rate.
        tick: Seconds per unit of time stamps.
        is_variable: Whether times are kept as they are.
        total: Units from the first frame to the end, where a table of samples tells; else durations of frames do.
    """

    def __init__(self, fps: Fraction, tick: Fraction | None, is_variable: bool, total: int | None) -> None:
        self._fps, self._tick, self._is_variable, self._total = fps, tick, is_variable, total
        self._last: Fraction | None = None
        self._shortest: Fraction | None = None  # time between two frames
        self._end = Fraction(0)

    def push(self, time: Fraction, duration: int | None) -> None:
        """Take the time of the next frame, and for how many units the container says that it is shown."""
        if self._last is not None:
            step = time - self._last
            self._shortest = step if self._shortest is None else min(step, self._shortest)
        self._last = time
        if self._tick is not None and duration:
            self._end = max(self._end, time + duration * self._tick)

    def find(self) -> Fraction | None:
        """Return the seconds from the first frame of the file to the end; `None` for `1 / fps` after the last frame.

        That is also what is taken where the container says next to nothing: less than half of the shortest time
        between two frames, as muxers write that do not know, and FFmpeg guesses.
        """
        if self._last is None or self._tick is None:
            return None
        end = self._end if self._total is None else self._total * self._tick
        duration = end - self._last
        if duration <= 0 or (self._shortest is not None and 2 * duration < self._shortest):
            return None
        if self._is_variable:
            return end
        if duration * self._fps < 2:  # an edit list may end anywhere within the last frame
            return None
        exact = round(end * self._fps) / self._fps
        return exact if abs(exact - end) <= self._tick else end


def at_constant_rate(
    frames: Iterable[tuple[torch.Tensor, Fraction]],
    fps: Fraction | int,
    last_duration: Fraction | Callable[[], Fraction | None] | None = None,
) -> Iterator[torch.Tensor]:
    """Repeat and drop frames to make their rate constant, as FFmpeg's `fps` filter does with `round=near`.

    Args:
        frames: Frames and their times in seconds, in their order; the frames may be of any kind.
        fps: Frames per second to come out.
        last_duration: Seconds for which the last frame is shown, or a function that tells them once that frame has
            come; the time between the last two by default, also where the function gives `None`.

    Yields:
        The frame of each multiple of `1 / fps`, the first at the time of the first frame. Frames too short for any
        give the last of them.

    Raises:
        ValueError: If `fps` is not positive, a time or `last_duration` is no number, or times run backwards.
    """
    if not (is_number(fps) and fps > 0):
        raise ValueError(f"`fps` must be more than 0, got {fps!r}.")
    held: torch.Tensor | None = None
    time = step = Fraction(0)
    first = place = 0  # of the first frame, and of the next one, to come out
    for frame, start in frames:
        if not is_number(start) or (held is not None and start < time):
            raise ValueError(f"`frames` must come with ascending times in seconds, got {start} after {time}.")
        begin = _nearest(start * fps)
        if held is None:
            first = place = begin
        else:
            step = start - time
            for _ in range(place, begin):
                yield held
            place = max(place, begin)
        held, time = frame, start
    if held is None:
        return
    duration = last_duration() if callable(last_duration) else last_duration
    if duration is None:
        duration = step or 1 / Fraction(fps)
    elif not is_number(duration):
        raise ValueError(f"`last_duration` must be a number of seconds, got {duration!r}.")
    end = _nearest((time + duration) * fps)
    for _ in range(place, end if place > first else max(end, place + 1)):  # of a short clip one frame stays
        yield held


def _nearest(value: Fraction) -> int:
    """Round to the nearest integer, halves away from zero."""
    whole = int(abs(value) + Fraction(1, 2))
    return whole if value >= 0 else -whole
