"""Sound, subtitles, chapters and metadata of a file, on their way into another file.

Everything keeps its place in time relative to the first video frame of its file. Sound is copied packet by packet
where the container holds its codec, and else encoded again.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Self, cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Discard, Disposition, Stream
from av.subtitles.stream import SubtitleStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..atomic import replace_file
from .containers import PathLike, codec_name, find_pictures, named_write_errors, open_input
from .formats import CONTAINERS, Container
from .inputs import local_file
from .tracks import (
    LAYOUTS,
    MAX_TAIL_GAP,
    MIN_LEAD,
    CopiedTrack,
    EncodedTrack,
    SubtitleTrack,
    Timeline,
    Track,
    plain_layout,
)


# More is a wrong time stamp.
_MAX_LEAD = 60
_MAX_JUMP = 600

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


class Accompaniment:
    """What a file holds besides its pictures, in time relative to a frame of it.

    Attributes:
        timeline: Where its time lies in the output; `delay` is known after `attach`.
        damage: What went wrong with sound that could not be read or stored.
        overhangs: Whether subtitles or chapters go on after the end; known after `rest`.
        is_heard: Whether any sound was written.
    """

    def __init__(self, container: InputContainer, path: PathLike, file: Path, start: Fraction) -> None:
        self.path, self._container = path, container
        self._video = find_pictures(container)
        self._sounds = list(container.streams.audio)
        zero = _first_frame_time(file, self._video, self._sounds) + start
        self.timeline = Timeline(zero, is_cut=start > 0)
        if start == 0 and self._video is not None:
            times = [_start_time(stream) for stream in self._sounds]
            lead = max((zero - time for time in times if time is not None), default=Fraction(0))
            if MIN_LEAD <= lead <= _MAX_LEAD:
                self.timeline.lead = lead
        self.overhangs = self.is_heard = False
        self._tracks: dict[int, Track] = {}
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
    def has_any(self) -> bool:
        """Whether there is anything to write."""
        streams = self._container.streams
        return bool(self._sounds or streams.subtitles or self._container.chapters() or _kept_metadata(self._container))

    def attach(self, output: OutputContainer, held: Container, tick: Fraction) -> None:
        """Add tracks, chapters and metadata to `output`, which must not have begun, and settle the delay.

        Args:
            output: Where the pictures already have a stream.
            held: Its kind.
            tick: Seconds of which the delay of the first frame is a multiple.
        """
        self.timeline.delay = ceil(self.timeline.lead / tick) * tick
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

    def _add_track(self, stream: Stream, output: OutputContainer, held: Container) -> Track | None:
        codec = codec_name(stream)
        track: Track | None = None
        target: Stream | None = None
        if isinstance(stream, AudioStream):
            target, track = self._add_sound(stream, codec, output, held)
            if track is None:
                self._left_out[f"sound track ({codec})"] += 1
        elif isinstance(stream, SubtitleStream):
            if codec in held.subtitles:
                target = output.add_stream_from_template(stream)
                track = SubtitleTrack(self.timeline, target)
            elif held.subtitle_encoder is not None and codec in _TEXT_CODECS:
                text = output.add_stream(held.subtitle_encoder)
                assert isinstance(text, SubtitleStream)
                text.codec_context.subtitle_header = stream.codec_context.subtitle_header or _ASS_HEADER
                text.time_base = Fraction(1, 1000)
                target, track = text, SubtitleTrack(self.timeline, text, stream)
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
    ) -> tuple[Stream | None, Track | None]:
        """Add a sound track as it is or encoded again; `None` where there is no room or nothing sensible to hear."""
        if (
            held.sound_encoder is None
            or stream.codec_context is None
            or not (stream.rate and stream.layout.nb_channels)
        ):
            return None, None
        # What is without loss can be cut at the sample, whatever the size of its packets.
        is_exact = codec.startswith("pcm_") or (codec == "flac" and self.timeline.is_cut)
        if held.holds_sound(codec) and not is_exact:
            copy = output.add_stream_from_template(stream)
            return copy, CopiedTrack(self.timeline, copy, hides_preroll=held.muxer in ("mp4", "mov"))
        encoder = codec if is_exact and held.holds_sound(codec) else held.sound_encoder
        target = _add_encoder(output, encoder, stream)
        if target is None:
            return None, None
        if encoder != codec:
            self._encoded[f"sound track ({codec} to {encoder.removeprefix('lib')})"] += 1
        return target, EncodedTrack(self.timeline, stream, target)

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
            begin, end = chapter["start"] * unit - self.timeline.zero, chapter["end"] * unit - self.timeline.zero
            if end > 0:
                yield max(begin, Fraction(0)), end, chapter["metadata"]

    def _set_chapters(self, output: OutputContainer) -> None:
        chapters: list[Any] = []
        for number, (begin, end, metadata) in enumerate(self._chapter_times(), 1):
            start, stop = (round((time + self.timeline.delay) * 1000) for time in (begin, end))
            times = {"id": number, "start": start, "end": stop, "time_base": Fraction(1, 1000)}
            chapters.append(times | {"metadata": metadata})
        output.set_chapters(chapters)

    def _demux(self, streams: list[Stream]) -> Iterator[Packet]:
        try:
            for packet in self._container.demux(*streams):
                if not packet.size:  # as those at the end are
                    continue
                time = self.timeline.time_of(packet)
                if time is not None and time > self._latest + _MAX_JUMP:
                    self.damage = "a time stamp is wrong"
                    continue
                self._latest = max(self._latest, time or Fraction(0))
                yield packet
        except FFmpegError as error:
            self.damage = error.strerror or str(error)

    def packets_before(self, until: Fraction) -> Iterator[Packet]:
        """Yield the packets not yet yielded that begin before `until` seconds of the output."""
        until -= self.timeline.delay
        while True:
            packet = self._waiting.popleft() if self._waiting else next(self._packets, None)
            if packet is None:
                break
            if self._video is not None and packet.stream_index == self._video.index:
                self._last_video = max(self._last_video, self.timeline.time_of(packet) or Fraction(-1))
                continue
            time = self.timeline.time_of(packet)
            if time is not None and time >= until:
                self._waiting.appendleft(packet)
                break
            yield from self._tracks[packet.stream_index].push(packet)
        for track in self._tracks.values():
            yield from track.before(until)

    def rest(self, end: Fraction, shown: Fraction) -> Iterator[Packet]:
        """Yield all that is left for a video of `end` seconds, of whose frames the last begins before `shown`.

        That is what begins before `end`; or everything, where no frame of the source comes after those written.
        """
        yield from self.packets_before(end + self.timeline.delay)
        is_whole = self._video is not None and self._is_at_end(shown)
        if not is_whole:
            last_chapter = max((stop for _, stop, _ in self._chapter_times()), default=Fraction(0))
            subtitles = [track.shown_until for track in self._tracks.values() if isinstance(track, SubtitleTrack)]
            self.overhangs = max([last_chapter, *subtitles]) > end + Fraction(1, 1000)
        if is_whole:
            heard = end
            for packet in self._waiting:
                time = self.timeline.time_of(packet) or Fraction(0)
                if time <= heard + MAX_TAIL_GAP:
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
            elif (shown := self.timeline.time_of(packet)) is not None and shown >= time:
                return False
        return True

    def mux(self, output: OutputContainer, packets: Iterable[Packet]) -> None:
        """Write packets of sound; damaged ones are left out, and are no reason to lose the rest."""
        for packet in packets:
            is_sound = packet.stream.type == "audio"
            try:
                output.mux(packet)
            except InvalidDataError as error:
                self.damage = error.strerror
            else:
                self.is_heard = self.is_heard or is_sound

    def notes(self) -> list[str]:
        """Return what is not as in the source, for a warning."""
        notes = []
        for verb, things in (("re-encoded", self._encoded), ("left out", self._left_out)):
            if things:
                notes.append(f"{verb}: {', '.join(_counted(thing, number) for thing, number in things.items())}")
        if self.damage is not None:
            notes.append(f"the sound of {str(self.path)!r} is damaged ({self.damage})")
        return notes


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


def copy_streams(
    source: PathLike, target: PathLike, start: Fraction, end: Fraction | None, shown: Fraction | None = None
) -> bool:
    """Copy sound, subtitles, chapters and metadata of a video into a Matroska file of their own.

    The file has one black picture at the time of the first frame, by which `VideoWriter(audio_from=target)` finds the
    place of everything else.

    Args:
        source: The video.
        target: The file to write; replaced if it exists.
        start: Seconds from the first frame of `source` to the frame that counts as the first.
        end: Seconds from the first frame of `source` to the end; `None` takes everything.
        shown: Seconds from the first frame of `source` to after the last one that counts has begun, by which it is
            told whether that is the last of all: then no sound is cut. By default just before `end`.

    Returns:
        Whether there was anything to copy; if not, nothing is written.

    Raises:
        VideoError: If `source` cannot be read or `target` cannot be written.
    """
    held = CONTAINERS[".mkv"]
    with Accompaniment.open(source, start) as streams:
        if not streams.has_any:
            return False
        with named_write_errors(target), replace_file(Path(target)) as partial:
            with av.open(str(partial.absolute()), "w", format=held.muxer) as output:
                marker = output.add_stream("ffv1", rate=1000)
                assert isinstance(marker, VideoStream)
                marker.width = marker.height = 16
                marker.pix_fmt, marker.time_base = "gray", Fraction(1, 1000)
                streams.attach(output, held, Fraction(1, 1000))
                frame = VideoFrame.from_ndarray(np.zeros((16, 16), np.uint8), format="gray")
                frame.pts, frame.time_base = round(streams.timeline.delay * 1000), Fraction(1, 1000)
                output.mux(marker.encode(frame))
                output.mux(marker.encode(None))
                if end is None:
                    packets = streams.everything()
                else:
                    before = end - Fraction(1, 200)
                    packets = streams.rest(end - start, (before if shown is None else max(before, shown)) - start)
                streams.mux(output, packets)
            if streams.overhangs and end is not None:
                with replace_file(partial) as cut:
                    cut_end(partial, cut, held, end - start + streams.timeline.delay)
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


def _add_encoder(output: OutputContainer, name: str, stream: AudioStream) -> AudioStream | None:
    """Add a sound stream with the nearest layout and rate that an encoder takes; `None` if it takes none."""
    codec = av.Codec(name, "w")
    rates, formats = codec.audio_rates, [audio_format.name for audio_format in codec.audio_formats or []]
    rate = stream.rate if not rates or stream.rate in rates else 48000
    count = stream.layout.nb_channels
    for layout in dict.fromkeys([plain_layout(stream.layout), LAYOUTS.get(count, "stereo"), "stereo"]):
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
