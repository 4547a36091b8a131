"""What is known of a video or image before its frames are read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .color import color_of
from .containers import codec_name
from .decoding import Matrix
from .stills import ImageFrames
from .timing import frame_rate, is_variable


# Degrees of a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y with y pointing down. Others mirror.
CLOCKWISE = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a file, from its header, its first packets and its first decoded frame.

    Attributes:
        path: The file, as given.
        width: Pixels as displayed, after rotation, and after pixels were made square if that was asked for.
        height: Pixels as displayed, likewise.
        fps: Average frame rate in frames per second, exact (`Fraction(30000, 1001)`); 25 for a still image.
        num_frames: Frame count of the header, `None` where it has none. A header can be wrong: count what is read.
        duration: Seconds as in the header, `None` where it has none and for still images.
        rotation: Degrees clockwise (0, 90, 180, 270) by which stored frames are turned; already applied to `width`,
            `height` and to every frame read.
        audio_codecs: Name of the codec of each audio stream.
        codec: Name of the video codec, such as `"h264"`.
        pixel_format: FFmpeg's name of the stored pixel format, such as `"yuv420p10le"`.
        is_image: Whether the file is an image (still or animated) and not a video.
        pixel_aspect_ratio: Width of a pixel by its height, as displayed.
        matrix: Colour matrix as stored: `"bt709"`, `"bt601"`, `"bt2020"`, `"rgb"`, `"grey"`, ...; by the rule where
            there is no tag.
        primaries: FFmpeg's name of the stored colour primaries, `"bt709"` where there is no tag.
        transfer: FFmpeg's name of the stored transfer curve, such as `"smpte2084"`; `"bt709"` where there is no tag.
        color_range: `"limited"` or `"full"`.
        is_variable_rate: Whether frames come at unequal times, as far as the table of samples (MP4, MOV) or the first
            packets tell.
    """

    path: str
    width: int
    height: int
    fps: Fraction
    num_frames: int | None
    duration: float | None
    rotation: int
    audio_codecs: tuple[str, ...]
    codec: str
    pixel_format: str
    is_image: bool
    pixel_aspect_ratio: Fraction = Fraction(1)
    matrix: str = "bt709"
    primaries: str = "bt709"
    transfer: str = "bt709"
    color_range: str = "limited"
    is_variable_rate: bool = False

    @property
    def has_audio(self) -> bool:
        """Tell whether there is an audio stream."""
        return bool(self.audio_codecs)

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height with square pixels: one of them is enlarged, and stays even if it was."""
        ratio = self.pixel_aspect_ratio
        if ratio >= 1:
            return _enlarged(self.width, ratio), self.height
        return self.width, _enlarged(self.height, 1 / ratio)


def _enlarged(edge: int, ratio: Fraction) -> int:
    return 2 * round(edge * ratio / 2) if edge % 2 == 0 else round(edge * ratio)


def has_sample_table(container: InputContainer) -> bool:
    """Tell whether the container has a table of all its samples, as MP4 and MOV have."""
    return "mp4" in container.format.name.split(",")


def describe_images(name: str, images: ImageFrames) -> VideoInfo:
    """Describe a picture, an animation or a sequence of pictures."""
    steps = {after - before for before, after in itertools.pairwise(images.times)}
    return VideoInfo(
        path=name,
        width=images.width,
        height=images.height,
        fps=Fraction(25) if not images.duration else images.num_frames / Fraction(images.duration),
        num_frames=images.num_frames,
        duration=None if images.duration is None else float(images.duration),
        rotation=images.rotation,
        audio_codecs=(),
        codec=images.codec,
        pixel_format=images.pixel_format,
        is_image=images.num_frames == 1 or images.is_animated,
        matrix="grey" if images.pixel_format.startswith(("gray", "ya")) else "rgb",
        color_range="full",
        is_variable_rate=len(steps) > 1,
    )


def describe_video(
    name: str, container: InputContainer, stream: VideoStream, frame: VideoFrame, matrix: Matrix, stamps: list[int]
) -> VideoInfo:
    """Describe a video.

    Args:
        name: What to call it.
        container: The open file.
        stream: Its pictures.
        frame: The first of them.
        matrix: The display matrix of that one.
        stamps: Ordered time stamps, all or the first ones.
    """
    is_avif = container.metadata.get("major_brand") in ("avif", "avis")
    is_still = container.format.name.endswith("_pipe") or container.format.name == "image2"
    is_still = is_still or (is_avif and stream.frames == 1)
    duration: float | None = None
    if not is_still and stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    elif not is_still and container.duration is not None:
        duration = container.duration / av.time_base
    num_frames = stream.frames or None
    if num_frames and has_sample_table(container):
        num_frames = len(stamps) or num_frames  # without those that an edit list leaves out
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    ratio = Fraction(ratio) if Fraction(1, 16) <= ratio <= 16 else Fraction(1)  # others are no pixels
    is_upright = bool(matrix[0])
    color = color_of(frame)
    return VideoInfo(
        path=name,
        width=frame.width if is_upright else frame.height,
        height=frame.height if is_upright else frame.width,
        fps=Fraction(25) if is_still else frame_rate(stream, stamps),
        num_frames=1 if is_still else num_frames,
        duration=duration,
        rotation=CLOCKWISE.get(matrix, 0),
        audio_codecs=tuple(codec_name(sound) for sound in container.streams.audio),
        codec=codec_name(stream),
        pixel_format=frame.format.name,
        is_image=is_still or is_avif or container.format.name in ("gif", "apng", "webp", "webp_anim"),
        pixel_aspect_ratio=ratio if is_upright else 1 / ratio,
        matrix=color.matrix,
        primaries=color.primaries,
        transfer=color.transfer,
        color_range="full" if color.is_full else "limited",
        is_variable_rate=not is_still and is_variable(stream, stamps),
    )
