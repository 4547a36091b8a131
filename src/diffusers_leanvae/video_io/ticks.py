"""Time stamps of frames that are written, in the ticks of their container."""

from fractions import Fraction
from math import ceil
from typing import Self

from av.video.frame import VideoFrame

from .containers import VideoError


# Players show a GIF's frame of less than two ticks for ten ticks.
_MIN_GIF_TICKS = 2
_MAX_ROUNDING = Fraction(6, 10000)  # seconds by which containers with a tick of 1 ms round times


class Ticks:
    """Time stamps of frames, in ticks; one frame is held back where its duration must be known.

    Attributes:
        time_base: Seconds per tick.
        lead: Ticks before the first frame.
        num_left_out: Frames that were left out since they came too soon for the format.
        ended: Seconds from the first frame to the end of the last one.
        end_tick: Tick at which the last frame ends, once it is known.
    """

    def __init__(self, fps: Fraction, time_base: Fraction, mode: str, min_ticks: int = 1) -> None:
        self.time_base = time_base
        self.lead = 0
        self.num_left_out = 0
        self.ended = Fraction(0)
        self.end_tick = 0
        self._fps, self._mode, self._min_ticks = fps, mode, min_ticks
        self._count = 0
        self._last_time = self._last_given = Fraction(0)  # the latter before it is made regular
        self._is_regular = True  # so far
        self._held: tuple[int, VideoFrame] | None = None  # with its tick

    @property
    def is_variable(self) -> bool:
        """Whether packets say how long a frame lasts."""
        return self._mode == "variable"

    @classmethod
    def choose(cls, fps: Fraction, muxer: str | None, has_times: bool) -> Self:
        """Choose the ticks for a format."""
        if muxer is None:
            return cls(fps, 1 / fps, "images")
        if muxer == "gif":
            return cls(fps, Fraction(1, 100), "variable", _MIN_GIF_TICKS)
        if muxer == "webp":
            return cls(fps, Fraction(1, 1000), "variable")
        if muxer == "yuv4mpegpipe":
            return cls(fps, 1 / fps, "repeated")
        if has_times:  # multiples of 1 / fps are exact, and nothing is off by more than 0.05 ms
            return cls(fps, Fraction(1, fps.numerator * ceil(Fraction(10000, fps.numerator))), "variable")
        return cls(fps, 1 / fps, "constant")

    def push(self, frame: VideoFrame, time: Fraction | None) -> list[tuple[int, VideoFrame, int | None]]:
        """Take a frame, and return those that are ready, with time stamp and duration."""
        if time is None and self._mode == "variable" and self.time_base.denominator > 1000:
            raise VideoError("`times` must come with every call or with none, got None after others.")
        if time is not None and self._mode == "constant":
            raise VideoError("`times` must come with every call or with none, got some after none.")
        if time is None or self._mode == "images":
            time = self._count / self._fps
        elif time < 0 or (self._count and time <= self._last_time):
            raise VideoError(f"`times` must ascend from 0, got {float(time):g} s.")
        # Containers with a tick of 1 ms round the times of a constant rate, which is that rate again here.
        self._last_given = time
        regular = self._count / self._fps
        self._is_regular = self._is_regular and abs(time - regular) <= _MAX_ROUNDING
        time = regular if self._is_regular else time
        self._last_time = time
        self.ended = time + 1 / self._fps
        self._count += 1
        if self._mode in ("constant", "images"):
            return [(self._count - 1 + self.lead, frame, None)]
        tick = round(time / self.time_base)
        if self._mode == "repeated":
            ready = self._repeated(tick)
            self._held = (ready[-1][0] + 1 if ready else self._held[0] if self._held else 0, frame)
            return ready
        if self._held is None:
            self._held = (tick, frame)
            return []
        before, held = self._held
        if tick < before + self._min_ticks:
            if self._min_ticks > 1:
                self.num_left_out += 1
                return []
            tick = before + 1
        self._held = (tick, frame)
        return [(before + self.lead, held, tick - before)]

    def end_at(self, end: Fraction) -> Fraction:
        """Return when the last frame ends that is to end at `end`, in seconds: after it has begun."""
        if self._mode == "images":
            return self.ended
        if self._mode == "constant":
            raise VideoError(f"`end` must be None where no `times` are given, got {float(end):g} s.")
        if end <= self._last_given:
            raise VideoError(
                f"`end` must be more than the time of the last frame, {float(self._last_given):g} s, "
                f"got {float(end):g} s."
            )
        regular = self._count / self._fps
        if self._is_regular and abs(end - regular) <= _MAX_ROUNDING:
            return regular
        return end if end > self._last_time else self.ended

    def finish(self, end: Fraction) -> list[tuple[int, VideoFrame, int | None]]:
        """Return the frames held back, where all end after `end` seconds."""
        if self._held is None:
            return []
        tick, frame = self._held
        last = max(round(end / self.time_base), tick + self._min_ticks)
        if self._mode == "repeated":
            return self._repeated(last)
        self.end_tick = last + self.lead
        return [(tick + self.lead, frame, last - tick)]

    def _repeated(self, until: int) -> list[tuple[int, VideoFrame, int | None]]:
        """Return the frame held back as often as it is seen before tick `until`."""
        if self._held is None:
            return []
        tick, frame = self._held
        return [(number, frame, None) for number in range(tick, until)]
