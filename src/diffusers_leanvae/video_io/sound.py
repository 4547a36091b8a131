"""Sound, subtitles, chapters and metadata of a file, on their way into another file.

Everything keeps its place in time relative to the first video frame of its file. Sound is copied packet by packet
where the container holds its codec, and else encoded again.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Discard, Disposition, Stream
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import SubtitleSet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..atomic import replace_file
from .containers import PathLike, codec_name, find_pictures, named_errors, open_input
from .formats import CONTAINERS, Container
from .inputs import local_file


# Sound that begins earlier before the first frame than this is kept, and the picture begins later for it.
_MIN_LEAD = Fraction(1, 10)
# More is a wrong time stamp.
_MAX_LEAD = 60
_MAX_JUMP = 600
# Decoded sound this far from where its time stamp says is moved there: silence is put in, or samples are dropped.
_MAX_DRIFT = Fraction(15, 1000)
# Sound that a decoder needs before the first that is heard; an edit list hides it.
_PREROLL = Fraction(5, 100)
# Sound before a cut that is decoded all the same, since a decoder remembers some.
_WARM_UP = 1
# Silence between two pieces of sound after the last frame that still belongs to the file.
_MAX_TAIL_GAP = 10

_TEXT_CODECS = ("mov_text", "subrip", "webvtt", "ass", "ssa", "text")
# Needed by encoders of subtitles; decoders that have been opened give one of their own.
_ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+
PlayResX: 384
PlayResY: 288

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,0

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
_BIT_RATES = {
    "aac": {1: 96000, 2: 192000, 6: 384000, 8: 512000},
    "libopus": {1: 96000, 2: 160000, 6: 320000, 8: 448000},
}
# Metadata that describe the file and not what is in it.
_FILE_KEYS = re.compile(
    r"encoder|software|major_brand|minor_version|compatible_brands|duration(-\w+)?|timecode|rotate|vendor_id|creation_time-\w+"
    r"|bps(-\w+)?|number_of_(frames|bytes)(-\w+)?|_statistics_.*",
    re.IGNORECASE,
)
# QuickTime files name some languages by their other code.
_MACINTOSH_LANGUAGES = {"deu": "ger", "nld": "dut", "zho": "chi", "ell": "gre", "isl": "ice"}
_DEFAULT_NAMES = {"SoundHandler", "SubtitleHandler", "VideoHandler", "Core Media Audio", ""}
# What FFmpeg writes where players look for it, in MP4 and in QuickTime files. Either may have a list of its own keys
# instead, as phones write it, which holds any key, but in MP4 most players do not read it.
_MP4_KEYS = frozenset(
    "title artist album_artist composer album date comment genre copyright grouping lyrics description synopsis show "
    "episode_id network keywords episode_sort season_number media_type hd_video gapless_playback compilation track "
    "disc creation_time location location-eng".split()
)
_MOV_KEYS = frozenset("title artist album comment genre copyright date creation_time location make model".split())
_TECHNICAL_KEYS = frozenset(("creation_time", "location", "location-eng", "date"))


class _Track(ABC):
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


class Accompaniment:
    """What a file holds besides its pictures, in time relative to a frame of it.

    Attributes:
        lead: Seconds of sound before that frame that are to be kept; 0 after a cut.
        delay: Seconds from the start of the output to that frame, `lead` or somewhat more; known after `attach`.
        damage: What went wrong with sound that could not be read or stored.
        overhangs: Whether subtitles or chapters go on after the end; known after `rest`.
    """

    def __init__(self, container: InputContainer, path: PathLike, file: Path, start: Fraction) -> None:
        self.path, self._container = path, container
        self._start = start
        self._video = find_pictures(container)
        self._sounds = list(container.streams.audio)
        self._first_frame = _first_frame_time(file, self._video, self._sounds)
        self.zero = self._first_frame + start
        self.lead = self.delay = Fraction(0)
        if start == 0 and self._video is not None:
            times = [_start_time(stream) for stream in self._sounds]
            lead = max((self.zero - time for time in times if time is not None), default=Fraction(0))
            self.lead = lead if _MIN_LEAD <= lead <= _MAX_LEAD else Fraction(0)
        self.overhangs = False
        self._tracks: dict[int, _Track] = {}
        self._packets: Iterator[Packet] = iter(())
        self._waiting: deque[Packet] = deque()
        self._last_video = Fraction(-1)  # of the source, in seconds after `zero`
        self._latest = Fraction(0)  # of all packets so far
        self._left_out: Counter[str] = Counter()
        self._encoded: Counter[str] = Counter()
        self.damage: str | None = None

    @classmethod
    @contextmanager
    def open(cls, path: PathLike, start: Fraction) -> Iterator[Self]:
        """Open a file, or whatever `local_file` takes; `start` is the time after its first frame that becomes 0."""
        with local_file(path) as file, open_input(file) as container:
            yield cls(container, path, file, start)

    def muxer_options(self, held: Container) -> dict[str, str]:
        """Return options for the container that `attach` gets."""
        # Tracks without a packet for a second, such as subtitles, hold back the others no longer.
        return {"max_interleave_delta": "1000000"} | metadata_options(self._container, held)

    @property
    def is_cut(self) -> bool:
        """Whether something before the first frame is left out on purpose."""
        return self._start > 0

    @property
    def has_any(self) -> bool:
        """Whether there is anything to write."""
        streams = self._container.streams
        return bool(self._sounds or streams.subtitles or self._container.chapters() or _kept_metadata(self._container))

    def attach(self, output: OutputContainer, held: Container, tick: Fraction) -> None:
        """Add tracks, chapters and metadata to `output`, which must not have begun, and settle `delay`.

        Args:
            output: Where the pictures already have a stream.
            held: Its kind.
            tick: Seconds of which the delay of the first frame is a multiple.
        """
        self.delay = ceil(self.lead / tick) * tick
        used: list[Stream] = [] if self._video is None else [self._video]
        for stream in self._container.streams:
            if stream is self._video:
                continue
            track = self._add_track(stream, output, held)
            if track is not None:
                self._tracks[stream.index] = track
                used.append(stream)
        for stream in self._container.streams:
            if stream not in used:
                stream.discard = Discard.all
        if self._tracks:
            self._packets = self._demux(used)
        self._copy_metadata(output, held)
        if held.sound_encoder is not None:
            self._set_chapters(output)

    def _add_track(self, stream: Stream, output: OutputContainer, held: Container) -> _Track | None:
        codec = codec_name(stream)
        track: _Track | None = None
        target: Stream | None = None
        if isinstance(stream, AudioStream):
            target, track = self._add_sound(stream, codec, output, held)
            if track is None:
                self._left_out[f"sound track ({codec})"] += 1
        elif isinstance(stream, SubtitleStream):
            if codec in held.subtitles:
                target = output.add_stream_from_template(stream)
                track = _SubtitleTrack(self, target)
            elif held.subtitle_encoder is not None and codec in _TEXT_CODECS:
                text = output.add_stream(held.subtitle_encoder)
                assert isinstance(text, SubtitleStream)
                text.codec_context.subtitle_header = stream.codec_context.subtitle_header or _ASS_HEADER
                text.time_base = Fraction(1, 1000)
                target, track = text, _SubtitleTrack(self, text, stream)
            else:
                self._left_out[f"subtitle track ({codec})"] += 1
        elif stream.type == "attachment" and held.muxer == "matroska":
            output.add_stream_from_template(stream)
        elif stream.type == "video":
            is_cover = bool(stream.disposition & Disposition.attached_pic)
            self._left_out["cover picture" if is_cover else "video track"] += 1
        elif not (stream.type == "data" and self._container.chapters()):
            self._left_out["attachment" if stream.type == "attachment" else f"{stream.type} track"] += 1
        if target is not None:
            _copy_tags(stream, target, held)
        return track

    def _add_sound(
        self, stream: AudioStream, codec: str, output: OutputContainer, held: Container
    ) -> tuple[Stream | None, _Track | None]:
        """Add a sound track as it is or encoded again; `None` where there is no room or nothing sensible to hear."""
        if (
            held.sound_encoder is None
            or stream.codec_context is None
            or not (stream.rate and stream.layout.nb_channels)
        ):
            return None, None
        # What is without loss can be cut at the sample, whatever the size of its packets.
        is_exact = codec.startswith("pcm_") or (codec == "flac" and self.is_cut)
        if held.holds_sound(codec) and not is_exact:
            copy = output.add_stream_from_template(stream)
            return copy, _CopiedTrack(self, copy, hides_preroll=held.muxer in ("mp4", "mov"))
        encoder = codec if is_exact and held.holds_sound(codec) else held.sound_encoder
        target = _add_encoder(output, encoder, stream)
        if target is None:
            return None, None
        if encoder != codec:
            self._encoded[f"sound track ({codec} to {encoder.removeprefix('lib')})"] += 1
        return target, _EncodedTrack(self, stream, target)

    def _copy_metadata(self, output: OutputContainer, held: Container) -> None:
        metadata = _kept_metadata(self._container)
        lost: list[str] = []
        if held.sound_encoder is None:
            lost = list(metadata)
        elif held.muxer == "mp4" and not metadata_options(self._container, held):
            lost = [key for key in metadata if key.lower() not in _MP4_KEYS]
        if lost:
            self._left_out[f"metadata ({', '.join(lost)})"] += 1
        output.metadata.update({key: value for key, value in metadata.items() if key not in lost})

    def _chapter_times(self) -> Iterator[tuple[Fraction, Fraction, dict[str, str]]]:
        """Yield begin and end, in seconds after `zero`, and metadata of the chapters that end after it."""
        for chapter in self._container.chapters():
            unit = chapter["time_base"] or Fraction(1, 1000)
            begin, end = chapter["start"] * unit - self.zero, chapter["end"] * unit - self.zero
            if end > 0:
                yield max(begin, Fraction(0)), end, chapter["metadata"]

    def _set_chapters(self, output: OutputContainer) -> None:
        chapters: list[Any] = []
        for number, (begin, end, metadata) in enumerate(self._chapter_times(), 1):
            start, stop = (round((time + self.delay) * 1000) for time in (begin, end))
            times = {"id": number, "start": start, "end": stop, "time_base": Fraction(1, 1000)}
            chapters.append(times | {"metadata": metadata})
        output.set_chapters(chapters)

    def _demux(self, streams: list[Stream]) -> Iterator[Packet]:
        try:
            for packet in self._container.demux(*streams):
                if not packet.size:  # as those at the end are
                    continue
                time = self.time_of(packet)
                if time is not None and time > self._latest + _MAX_JUMP:
                    self.damage = "a time stamp is wrong"
                    continue
                self._latest = max(self._latest, time or Fraction(0))
                yield packet
        except FFmpegError as error:
            self.damage = error.strerror or str(error)

    def time_of(self, packet: Packet) -> Fraction | None:
        """Return the time of a packet of the source, in seconds after the frame that counts."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        return None if stamp is None else stamp * packet.time_base - self.zero

    def packets_before(self, until: Fraction) -> Iterator[Packet]:
        """Yield the packets not yet yielded that begin before `until` seconds of the output."""
        until -= self.delay
        while True:
            packet = self._waiting.popleft() if self._waiting else next(self._packets, None)
            if packet is None:
                break
            if self._video is not None and packet.stream_index == self._video.index:
                self._last_video = max(self._last_video, self.time_of(packet) or Fraction(-1))
                continue
            time = self.time_of(packet)
            if time is not None and time >= until:
                self._waiting.appendleft(packet)
                break
            yield from self._tracks[packet.stream_index].push(packet)
        for track in self._tracks.values():
            yield from track.before(until)

    def rest(self, end: Fraction, frame_duration: Fraction) -> Iterator[Packet]:
        """Yield all that is left for a video of `end` seconds.

        That is what begins before `end`; or everything, where no frame of the source comes after those written.
        """
        yield from self.packets_before(end + self.delay)
        is_whole = self._video is not None and self._is_at_end(end - frame_duration / 2)
        if not is_whole:
            last_chapter = max((stop for _, stop, _ in self._chapter_times()), default=Fraction(0))
            shown = [track.shown_until for track in self._tracks.values() if isinstance(track, _SubtitleTrack)]
            self.overhangs = max([last_chapter, *shown]) > end + Fraction(1, 1000)
        if is_whole:
            heard = end
            for packet in self._waiting:
                time = self.time_of(packet) or Fraction(0)
                if time <= heard + _MAX_TAIL_GAP:
                    heard = max(heard, time)
                    yield from self._tracks[packet.stream_index].push(packet)
        for track in self._tracks.values():
            yield from track.finish(None if is_whole else end)

    def everything(self) -> Iterator[Packet]:
        """Yield all that is left, however long it is."""
        for packet in self._packets:
            if self._video is None or packet.stream_index != self._video.index:
                yield from self._tracks[packet.stream_index].push(packet)
        for track in self._tracks.values():
            yield from track.finish(None)

    def _is_at_end(self, time: Fraction) -> bool:
        """Tell whether the source has no frame after `time`; its other packets wait then."""
        assert self._video is not None
        if self._last_video >= time:
            return False
        for packet in self._packets:
            if packet.stream_index != self._video.index:
                self._waiting.append(packet)
            elif (shown := self.time_of(packet)) is not None and shown >= time:
                return False
        return True

    def mux(self, output: OutputContainer, packets: Iterable[Packet]) -> None:
        """Write packets of sound; damaged ones are left out, and are no reason to lose the rest."""
        for packet in packets:
            try:
                output.mux(packet)
            except InvalidDataError as error:
                self.damage = error.strerror

    def notes(self) -> list[str]:
        """Return what is not as in the source, for a warning."""
        notes = []
        for verb, things in (("re-encoded", self._encoded), ("left out", self._left_out)):
            if things:
                notes.append(f"{verb}: {', '.join(_counted(thing, number) for thing, number in things.items())}")
        if self.damage is not None:
            notes.append(f"the sound of {str(self.path)!r} is damaged ({self.damage})")
        return notes


class _CopiedTrack(_Track):
    """Packets as they are, at other times."""

    def __init__(self, source: Accompaniment, target: Stream, hides_preroll: bool) -> None:
        self._source, self._target = source, target
        self._hides_preroll = hides_preroll
        self._last_dts: int | None = None

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._source.time_of(packet)
        if time is None:
            return
        begin = -self._source.lead
        duration = Fraction(packet.duration or 0) * packet.time_base
        if self._source.is_cut:
            begin -= _PREROLL if self._hides_preroll else 0
            if time + duration <= begin:
                return
        elif time + duration < begin - _MIN_LEAD:
            return
        shift = round((self._source.zero - self._source.delay) / packet.time_base)
        stamp = packet.pts if packet.pts is not None else packet.dts
        assert stamp is not None
        packet.pts = packet.dts = stamp - shift
        if self._last_dts is not None and packet.dts <= self._last_dts:
            packet.pts = packet.dts = self._last_dts + 1
        self._last_dts = packet.dts
        packet.stream = self._target
        yield packet


class _EncodedTrack(_Track):
    """Sound that is decoded, put where its time stamps say, cut at the sample and encoded."""

    def __init__(self, source: Accompaniment, stream: AudioStream, target: AudioStream) -> None:
        self._source, self._stream, self._target = source, stream, target
        self._form: _Form | None = None  # of the first frame, to which others are converted
        self._convert: tuple[tuple[_Form, str], AudioResampler] | None = None
        self._pieces: deque[tuple[int, np.ndarray]] = deque()  # first sample after `zero`, samples (n, channels)
        self._position: int | None = None  # after the last sample of the pieces
        self._written: int | None = None  # after the last sample encoded

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._source.time_of(packet)
        if self._source.is_cut and time is not None and time < -_WARM_UP:
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
        time = frame.pts * frame.time_base - self._source.zero
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
        floor = round(-self._source.lead * rate) if self._position is None else self._position
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
            if limit is None and stop == first and stop - begin > _MAX_TAIL_GAP * rate:
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
            frame.pts = begin + round(self._source.delay * rate)
            self._written = stop
            yield from self._target.encode(frame)


class _Form(NamedTuple):
    """How samples of decoded sound are stored, one after the other for all channels."""

    format: str
    layout: str
    rate: int

    @classmethod
    def of(cls, frame: AudioFrame) -> Self:
        return cls(frame.format.packed.name, _plain_layout(frame.layout), frame.sample_rate)

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


class _SubtitleTrack(_Track):
    """Subtitles, as they are or, with `decoder`, as another kind of text.

    Attributes:
        shown_until: Seconds after `zero` to the end of the last one.
    """

    def __init__(self, source: Accompaniment, target: Stream, decoder: SubtitleStream | None = None) -> None:
        self._source, self._target, self._decoder = source, target, decoder
        self.shown_until = Fraction(0)

    def push(self, packet: Packet) -> Iterator[Packet]:
        time = self._source.time_of(packet)
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
        packet.pts = packet.dts = round((begin + self._source.delay) / packet.time_base)
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


def cut_end(path: Path, target: Path, held: Container, end: Fraction) -> None:
    """Write a file once more with subtitles and chapters cut at `end` seconds, which was not known when they came."""
    with ExitStack() as files:
        source = files.enter_context(open_input(path))
        options = metadata_options(source, held)
        output = files.enter_context(
            av.open(str(target.absolute()), "w", format=held.muxer, container_options=options)
        )
        copies: dict[int, Stream] = {}
        for stream in source.streams:
            if stream.type not in ("video", "audio", "subtitle", "attachment"):
                continue  # the track of chapters, which comes again by itself
            copy = copies[stream.index] = output.add_stream_from_template(stream, opaque=True)
            copy.metadata.update({key: value for key, value in stream.metadata.items() if key != "DURATION"})
            copy.disposition = stream.disposition
            if isinstance(stream, VideoStream) and isinstance(copy, VideoStream):
                copy.codec_context.framerate = stream.average_rate or Fraction(25)
                if stream.codec_context.name == "hevc" and held.muxer != "matroska":
                    copy.codec_context.codec_tag = "hvc1"
        output.metadata.update(_kept_metadata(source))
        chapters: list[Any] = []
        for chapter in source.chapters():
            unit = chapter["time_base"] or Fraction(1, 1000)
            if chapter["start"] * unit < end:
                chapters.append(chapter | {"end": min(chapter["end"], round(end / unit))})
        output.set_chapters(chapters)
        streams = [stream for stream in source.streams if stream.index in copies and stream.type != "attachment"]
        for packet in source.demux(*streams):
            if not packet.size:
                continue
            if packet.stream.type == "subtitle" and packet.pts is not None and packet.duration:
                room = round(end / packet.time_base) - packet.pts
                if room <= 0:
                    continue
                packet.duration = min(packet.duration, room)
            packet.stream = copies[packet.stream_index]
            output.mux(packet)


def copy_streams(source: PathLike, target: PathLike, start: Fraction, end: Fraction | None) -> bool:
    """Copy sound, subtitles, chapters and metadata of a video into a Matroska file of their own.

    The file has one black picture at the time of the first frame, by which `VideoWriter(audio_from=target)` finds the
    place of everything else.

    Args:
        source: The video.
        target: The file to write; replaced if it exists.
        start: Seconds from the first frame of `source` to the frame that counts as the first.
        end: Seconds from the first frame of `source` to the end; `None` takes everything.

    Returns:
        Whether there was anything to copy; if not, nothing is written.

    Raises:
        VideoError: If `source` cannot be read or `target` cannot be written.
    """
    held = CONTAINERS[".mkv"]
    with Accompaniment.open(source, start) as streams:
        if not streams.has_any:
            return False
        with replace_file(Path(target)) as partial, named_errors(source):
            with av.open(str(partial.absolute()), "w", format=held.muxer) as output:
                marker = output.add_stream("ffv1", rate=1000)
                assert isinstance(marker, VideoStream)
                marker.width = marker.height = 16
                marker.pix_fmt, marker.time_base = "gray", Fraction(1, 1000)
                streams.attach(output, held, Fraction(1, 1000))
                frame = VideoFrame.from_ndarray(np.zeros((16, 16), np.uint8), format="gray")
                frame.pts, frame.time_base = round(streams.delay * 1000), Fraction(1, 1000)
                output.mux(marker.encode(frame))
                output.mux(marker.encode(None))
                packets = streams.everything() if end is None else streams.rest(end - start, Fraction(1, 100))
                streams.mux(output, packets)
            if streams.overhangs and end is not None:
                with replace_file(partial) as cut:
                    cut_end(partial, cut, held, end - start + streams.delay)
        if notes := streams.notes():
            warnings.warn(f"{str(source)!r}: {'; '.join(notes)}.", stacklevel=2)
    return True


# --- Streams of the source -------------------------------------------------------------------------------------------


def _first_frame_time(path: PathLike, video: VideoStream | None, sounds: list[AudioStream]) -> Fraction:
    """Return the time that the container gives to the first frame, or where there is none, to the first sound."""
    if video is None:
        return next((time for sound in sounds if (time := _start_time(sound)) is not None), Fraction(0))
    header = _start_time(video) or Fraction(0)
    with open_input(path) as container:  # once more, so that the first is read from its start
        stream = cast(VideoStream, container.streams[video.index])
        try:
            for frame in container.decode(stream):
                if frame.pts is not None and frame.time_base is not None:
                    return frame.pts * frame.time_base
                return header
        except FFmpegError:
            pass
    return header


def _kept_metadata(container: InputContainer) -> dict[str, str]:
    return {key: value for key, value in container.metadata.items() if not _FILE_KEYS.fullmatch(key)}


def metadata_options(container: InputContainer, held: Container) -> dict[str, str]:
    """Return the muxer's options by which the metadata of a file are kept best."""
    keys = {key.lower() for key in _kept_metadata(container)}
    has_list = held.muxer == "mov" and keys - _MOV_KEYS
    if held.muxer == "mp4":
        has_list = keys - _MP4_KEYS and not (keys & _MP4_KEYS) - _TECHNICAL_KEYS
    return {"movflags": "use_metadata_tags"} if has_list else {}


def _start_time(stream: Stream) -> Fraction | None:
    if stream.start_time is None or stream.time_base is None:
        return None
    return stream.start_time * stream.time_base


def _plain_layout(layout: AudioLayout) -> str:
    """Return the name of a layout; one that names no speakers, as AVI files have it, gets the usual ones."""
    if "channels" in layout.name and layout.nb_channels in _LAYOUTS:
        return _LAYOUTS[layout.nb_channels]
    return layout.name


def _add_encoder(output: OutputContainer, name: str, stream: AudioStream) -> AudioStream | None:
    """Add a sound stream with the nearest layout and rate that an encoder takes; `None` if it takes none."""
    codec = av.Codec(name, "w")
    rates, formats = codec.audio_rates, [audio_format.name for audio_format in codec.audio_formats or []]
    rate = stream.rate if not rates or stream.rate in rates else 48000
    count = stream.layout.nb_channels
    for layout in dict.fromkeys([_plain_layout(stream.layout), _LAYOUTS.get(count, "stereo"), "stereo"]):
        trial = av.CodecContext.create(name, "w")
        assert isinstance(trial, AudioCodecContext)
        sample_format = stream.format.name if stream.format and stream.format.name in formats else formats[0]
        if name == "flac" and stream.format and stream.format.name not in ("u8", "u8p", "s16", "s16p"):
            sample_format = "s32"
        trial.layout, trial.rate, trial.format, trial.time_base = layout, rate, sample_format, Fraction(1, rate)
        try:
            trial.open()
        except (FFmpegError, ValueError):
            continue
        target = output.add_stream(name, rate=rate)
        assert isinstance(target, AudioStream)
        target.layout, target.format, target.time_base = layout, sample_format, Fraction(1, rate)
        if name in _BIT_RATES:
            channels = target.layout.nb_channels
            target.bit_rate = _BIT_RATES[name].get(channels, 64000 * channels)
        return target
    return None


def _copy_tags(stream: Stream, target: Stream, held: Container) -> None:
    """Copy language, title and the like, and the disposition."""
    tags = {key: value for key, value in stream.metadata.items() if not _FILE_KEYS.fullmatch(key)}
    if tags.get("handler_name", "").strip() in _DEFAULT_NAMES:
        tags.pop("handler_name", None)
    if held.muxer in ("mp4", "mov"):
        if "title" in tags:
            tags.setdefault("handler_name", tags["title"])
        if held.muxer == "mov" and tags.get("language") in _MACINTOSH_LANGUAGES:
            tags["language"] = _MACINTOSH_LANGUAGES[tags["language"]]
    target.metadata.update(tags)
    target.disposition = stream.disposition


def _counted(thing: str, number: int) -> str:
    if thing.startswith("metadata"):
        return thing
    noun, _, detail = thing.partition(" (")
    return f"{number} {noun}{'s' if number > 1 else ''}" + (f" ({detail}" if detail else "")
