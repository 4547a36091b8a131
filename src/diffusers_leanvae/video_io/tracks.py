"""Streams of sound and subtitles on their way from one file into another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Self, cast

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import SubtitleSet


# Sound that begins earlier before the first frame than this is kept, and the picture begins later for it.
MIN_LEAD = Fraction(1, 10)
# Decoded sound this far from where its time stamp says is moved there: silence is put in, or samples are dropped.
_MAX_DRIFT = Fraction(15, 1000)
# Sound that a decoder needs before the first that is heard; an edit list hides it.
_PREROLL = Fraction(5, 100)
# Sound before a cut that is decoded all the same, since a decoder remembers some.
_WARM_UP = 1
# Silence between two pieces of sound after the last frame that still belongs to the file.
MAX_TAIL_GAP = 10
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


@dataclass
class Timeline:
    """Where the time of a source lies in the output.

    Attributes:
        zero: Time in the source of the frame that counts as the first, in seconds.
        is_cut: Whether something before that frame is left out on purpose.
        lead: Seconds of sound before that frame that are to be kept; 0 after a cut.
        delay: Seconds from the start of the output to that frame, `lead` or somewhat more.
    """

    zero: Fraction
    is_cut: bool
    lead: Fraction = Fraction(0)
    delay: Fraction = Fraction(0)

    def time_of(self, packet: Packet) -> Fraction | None:
        """Return the time of a packet of the source, in seconds after the frame that counts."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        return None if stamp is None else stamp * packet.time_base - self.zero


class Track(ABC):
    """One stream of the source on its way into the output."""

    @abstractmethod
    def push(self, packet: Packet) -> Iterator[Packet]:
        """Take a packet of the source, and yield what is ready for the output."""

    def before(self, until: Fraction) -> Iterator[Packet]:
        """Yield what was held back and begins before `until` seconds: nothing, where packets pass at once."""
        del until
        yield from ()

    def finish(self, until: Fraction | None) -> Iterator[Packet]:
        """Yield all that was held back and begins before `until`, and end."""
        del until
        yield from ()


class CopiedTrack(Track):
    """Packets as they are, at other times."""

    def __init__(self, line: Timeline, target: Stream, hides_preroll: bool) -> None:
        self._line, self._target = line, target
        self._hides_preroll = hides_preroll
        self._last_dts: int | None = None

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._line.time_of(packet)
        if time is None:
            return
        begin = -self._line.lead
        duration = Fraction(packet.duration or 0) * packet.time_base
        if self._line.is_cut:
            begin -= _PREROLL if self._hides_preroll else 0
            if time + duration <= begin:
                return
        elif time + duration < begin - MIN_LEAD:
            return
        shift = round((self._line.zero - self._line.delay) / packet.time_base)
        stamp = packet.pts if packet.pts is not None else packet.dts
        assert stamp is not None
        packet.pts = packet.dts = stamp - shift
        if self._last_dts is not None and packet.dts <= self._last_dts:
            packet.pts = packet.dts = self._last_dts + 1
        self._last_dts = packet.dts
        packet.stream = self._target
        yield packet


class EncodedTrack(Track):
    """Sound that is decoded, put where its time stamps say, cut at the sample and encoded."""

    def __init__(self, line: Timeline, stream: AudioStream, target: AudioStream) -> None:
        self._line, self._stream, self._target = line, stream, target
        self._form: _Form | None = None  # of the first frame, to which others are converted
        self._convert: tuple[tuple[_Form, str], AudioResampler] | None = None
        self._pieces: deque[tuple[int, np.ndarray]] = deque()  # first sample after `zero`, samples (n, channels)
        self._position: int | None = None  # after the last sample of the pieces
        self._written: int | None = None  # after the last sample encoded

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._line.time_of(packet)
        if self._line.is_cut and time is not None and time < -_WARM_UP:
            return
        try:
            frames = cast("list[AudioFrame]", packet.decode())
        except FFmpegError:
            frames = []  # what is damaged is silent
        for frame in frames:
            self._take(frame)
        yield from ()

    def before(self, until: Fraction) -> Iterator[Packet]:
        yield from self._encode(until)

    def finish(self, until: Fraction | None) -> Iterator[Packet]:
        if until is None:
            with suppress(FFmpegError):  # what is damaged is silent
                for frame in self._stream.decode(None):
                    self._take(frame)
        yield from self._encode(until)
        yield from self._target.encode(None)

    def _take(self, frame: AudioFrame) -> None:
        if frame.pts is None or frame.time_base is None or not frame.samples:
            return
        time = frame.pts * frame.time_base - self._line.zero
        form = _Form.of(frame)
        self._form = self._form or form
        # PyAV miscounts the planes of 8 channels, so those are interleaved by the resampler.
        if form == self._form and not (frame.format.is_planar and frame.layout.nb_channels >= 8):
            self._add(time, [frame])
            return
        key = (form, frame.format.name)
        if self._convert is None or self._convert[0] != key:
            self._convert = key, AudioResampler(self._form.format, self._form.layout, self._form.rate)
        self._add(time, self._convert[1].resample(frame))

    def _add(self, time: Fraction, frames: list[AudioFrame]) -> None:
        assert self._form is not None
        rate = self._form.rate
        first = round(time * rate)
        floor = round(-self._line.lead * rate) if self._position is None else self._position
        if self._position is not None and abs(first - floor) <= _MAX_DRIFT * rate:
            first = floor
        for frame in frames:
            samples = self._form.samples(frame)
            skipped = min(max(floor - first, 0), len(samples))
            first += skipped
            if skipped < len(samples):
                self._pieces.append((first, samples[skipped:]))
                first += len(samples) - skipped
                self._position = first

    def _encode(self, until: Fraction | None) -> Iterator[Packet]:
        if self._form is None:
            return
        rate = self._form.rate
        limit = None if until is None else round(until * rate)
        while self._pieces:
            first, samples = self._pieces[0]
            begin = first if self._written is None else self._written
            stop = first if begin < first else first + len(samples)
            if limit is None and stop == first and stop - begin > MAX_TAIL_GAP * rate:
                break
            stop = min(stop, begin + rate, stop if limit is None else limit)
            if stop <= begin:
                break
            if begin < first:
                samples = np.full((stop - begin, samples.shape[1]), self._form.silence, samples.dtype)
            else:
                self._pieces.popleft()
                samples, left = samples[: stop - begin], samples[stop - begin :]
                if len(left):
                    self._pieces.appendleft((stop, left))
            frame = self._form.frame(samples)
            frame.pts = begin + round(self._line.delay * rate)
            self._written = stop
            yield from self._target.encode(frame)


class _Form(NamedTuple):
    """How samples of decoded sound are stored, one after the other for all channels."""

    format: str
    layout: str
    rate: int

    @classmethod
    def of(cls, frame: AudioFrame) -> Self:
        return cls(frame.format.packed.name, plain_layout(frame.layout), frame.sample_rate)

    @property
    def silence(self) -> int:
        return 128 if self.format == "u8" else 0

    def samples(self, frame: AudioFrame) -> np.ndarray:
        """Return the samples of a frame, `(n, channels)`."""
        array = frame.to_ndarray()
        return array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)

    def frame(self, samples: np.ndarray) -> AudioFrame:
        """Make a frame of samples `(n, channels)`."""
        array = cast(Any, np.ascontiguousarray(samples).reshape(1, -1))
        frame = AudioFrame.from_ndarray(array, format=self.format, layout=self.layout)
        frame.sample_rate, frame.time_base = self.rate, Fraction(1, self.rate)
        return frame


class SubtitleTrack(Track):
    """Subtitles, as they are or, with `decoder`, as another kind of text.

    Attributes:
        shown_until: Seconds after `zero` to the end of the last one.
    """

    def __init__(self, line: Timeline, target: Stream, decoder: SubtitleStream | None = None) -> None:
        self._line, self._target, self._decoder = line, target, decoder
        self.shown_until = Fraction(0)

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._line.time_of(packet)
        duration = Fraction(packet.duration or 0) * packet.time_base
        if time is None or (time < 0 and time + duration <= 0):
            return
        begin = max(time, Fraction(0))
        shown = time + duration - begin
        self.shown_until = max(self.shown_until, begin + shown)
        if self._decoder is not None:
            text = _as_text(packet, self._decoder, cast(SubtitleStream, self._target), shown)
            if text is None:
                return
            packet = text
            packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = round((begin + self._line.delay) / packet.time_base)
        packet.duration = round(shown / packet.time_base)
        packet.stream = self._target
        yield packet


def _as_text(packet: Packet, decoder: SubtitleStream, encoder: SubtitleStream, shown: Fraction) -> Packet | None:
    """Encode the text of a packet again; `None` where it holds none."""
    try:
        subtitle = decoder.decode2(packet)
    except FFmpegError:
        return None
    rects: Any = () if subtitle is None else subtitle.rects
    text = next((rect.ass for rect in rects if hasattr(rect, "ass")), None)
    if not text:
        return None
    return encoder.codec_context.encode_subtitle(SubtitleSet.create(text, 0, round(shown * 1000)))


def plain_layout(layout: AudioLayout) -> str:
    """Return the name of a layout; one that names no speakers, as AVI files have it, gets the usual ones."""
    if "channels" in layout.name and layout.nb_channels in LAYOUTS:
        return LAYOUTS[layout.nb_channels]
    return layout.name
