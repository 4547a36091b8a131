"""The clips of an evaluation: which files there are, and the frames that a protocol takes of each."""

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from typing import Protocol as Interface

import numpy as np
import torch

from ..data.sources import FileSource, TarSource, open_source
from ..data.streams import is_stream, open_stream, visual_column, without_decoding, write_example
from ..video_io import VideoError, VideoReader
from ..video_io.inputs import IMAGE_EXTENSIONS, list_files, list_frames
from ..video_io.pixels import center_crop, pixels_to_sample, resize_frames, short_side_size
from .protocols import Protocol


class ClipFile(Interface):
    """A video of a data set, not opened yet.

    Attributes:
        name: What it is called in results: its path below the folder, or its number in a stream.
        stamp: Size and time of change of a file, or of the tar file that it lies in; a changed file is another one.
    """

    @property
    def name(self) -> str: ...

    @property
    def stamp(self) -> list[int]: ...

    def open(self) -> AbstractContextManager[VideoReader]:
        """Open it for reading."""
        ...


def _stamp(paths: Sequence[Path]) -> list[int]:
    try:
        status = paths[0].stat()
    except OSError:
        return []
    return [len(paths), status.st_size, status.st_mtime_ns]


class LocalClip(NamedTuple):
    """A video file, or the pictures of one."""

    name: str
    paths: Sequence[Path]

    @property
    def stamp(self) -> list[int]:
        return _stamp(self.paths)

    def open(self) -> VideoReader:
        return VideoReader(self.paths[0] if len(self.paths) == 1 else list(self.paths))


class _SourceClip(NamedTuple):
    """A member of tar shards, or a file at a URL."""

    name: str
    source: object
    number: int
    stamp: list[int]

    @contextmanager
    def open(self) -> Iterator[VideoReader]:
        with self.source.open(self.number) as path, VideoReader(path) as reader:  # type: ignore[attr-defined]
            yield reader


class _Example(NamedTuple):
    """An example of a streamed data set."""

    name: str
    example: dict
    column: str
    stamp: list[int]

    @contextmanager
    def open(self) -> Iterator[VideoReader]:
        with tempfile.TemporaryDirectory(prefix="leanvae-eval-") as folder:
            row = write_example(dict(self.example), self.column, Path(folder), 0)
            with VideoReader(Path(folder, row["file_name"])) as reader:
                yield reader


def list_clips(source: str | Path, protocol: Protocol) -> Iterator[ClipFile]:
    """List the clips of a data set in an order that does not change.

    Args:
        source: A folder (with a metadata file in it, what that lists), a video, uncompressed tar shards, or a data set
            of the Hub as `hub:user/name[:config][:split]`, which is read from front to back.
        protocol: Its `layout` says whether folders of pictures are clips, its `max_clips` how many are taken.

    Raises:
        ValueError: If there are none.
    """
    found = _list_all(source, protocol)
    for number, clip in enumerate(found):
        if protocol.max_clips is not None and number >= protocol.max_clips:
            return
        yield clip


def _list_all(source: str | Path, protocol: Protocol) -> Iterator[ClipFile]:
    if is_stream(str(source)):
        stream = open_stream(str(source))
        column = visual_column(stream)
        for number, example in enumerate(without_decoding(stream)):
            yield _Example(f"{number:06d}", example, column, [])
        return
    if protocol.layout == "frames":
        root = Path(source)
        pictures = list_files(root, lambda path: path.suffix.lower() in IMAGE_EXTENSIONS)
        folders = sorted({path.parent for path in pictures})
        if not folders:
            raise ValueError(f"`folder` must hold folders of pictures, each a clip, got none in {str(source)!r}.")
        for folder in folders:
            yield LocalClip(folder.relative_to(root).as_posix(), list_frames(folder))
        return
    files = open_source(source)
    if not isinstance(files, FileSource):
        for number in range(len(files)):
            stamp = _stamp([files.shard(number)]) if isinstance(files, TarSource) else []
            yield _SourceClip(files.name(number), files, number, stamp)
        return
    for path in files.paths:
        yield LocalClip(path.relative_to(files.folder).as_posix(), [path])


def read_clip(video: VideoReader, protocol: Protocol, name: str) -> torch.Tensor:
    """Read the frames that a protocol takes of a video.

    Args:
        video: Open.
        protocol: The choices.
        name: Of the clip, which a random start depends on.

    Returns:
        Float32 clip in `[-1, 1]`, `(3, num_frames, resolution, resolution)`.

    Raises:
        VideoError: If it has too few frames, or cannot be decoded.
    """
    start, stop = 0, protocol.num_frames
    if protocol.start == "random":
        num_frames = video.count_frames()
        _check_length(video, num_frames, protocol)
        rng = np.random.default_rng([protocol.seed, zlib.crc32(name.encode())])
        start = int(rng.integers(num_frames - _covered(protocol) + 1))
    elif protocol.min_frames is not None:
        _check_length(video, video.count_frames(), protocol)
    if protocol.num_frames is not None:
        stop = start + _covered(protocol)
    frames = video.read(start, stop)[:: protocol.stride]
    if len(frames) < (protocol.num_frames or 1):
        _check_length(video, len(frames), protocol)
    return _to_sample(frames, protocol)


def whole_groups(clip: torch.Tensor, protocol: Protocol, ratio: int) -> torch.Tensor:
    """Leave out the last frames of a whole video `(3, num_frames, height, width)` that fill no group of `ratio`."""
    return clip[:, : (clip.shape[1] - 1) // ratio * ratio + 1] if protocol.num_frames is None else clip


def read_pieces(video: VideoReader, protocol: Protocol, chunk: int, ratio: int) -> Iterator[torch.Tensor]:
    """Read a clip in pieces of `chunk` frames first and `chunk - 1` later, holding two of them in memory.

    Args:
        video: Open.
        protocol: It must take frames from the first on, one after another. Without `num_frames`, the last frames that
            fill no group are left out.
        chunk: `ratio * n + 1` frames.
        ratio: Frames of a group after the first frame.

    Yields:
        Float32 pieces in `[-1, 1]`, `(3, num_frames, resolution, resolution)`.
    """
    if protocol.start != "first" or protocol.stride != 1:
        raise ValueError("`chunk` must be None for a protocol with random starts or a stride, got a number.")
    if protocol.min_frames is not None:
        _check_length(video, video.count_frames(), protocol)
    waiting, wanted, num_read = [], chunk, 0
    for frames in video.frames(0, protocol.num_frames, chunk_size=chunk - 1):
        num_read += len(frames)
        waiting.append(frames)
        while (num_waiting := sum(map(len, waiting))) >= wanted:
            joined = torch.cat(waiting)
            yield _to_sample(joined[:wanted], protocol)
            waiting, wanted = [joined[wanted:]], chunk - 1
    _check_length(video, num_read, protocol)
    num_waiting = sum(map(len, waiting))
    num_left = num_waiting // ratio * ratio if wanted < chunk else (num_waiting - 1) // ratio * ratio + 1
    if num_left:
        yield _to_sample(torch.cat(waiting)[:num_left], protocol)


def _covered(protocol: Protocol) -> int:
    assert protocol.num_frames is not None
    return (protocol.num_frames - 1) * protocol.stride + 1


def _check_length(video: VideoReader, num_frames: int, protocol: Protocol) -> None:
    if num_frames < protocol.span:
        raise VideoError(f"{video.info.path!r} must have at least {protocol.span} frames, got {num_frames}.")


def _to_sample(frames: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Resize, crop and convert `(num_frames, height, width, 3)` uint8 frames to `(3, num_frames, size, size)`."""
    size = protocol.resolution
    if protocol.resampling == "bicubic":
        height, width = short_side_size(frames.shape[1], frames.shape[2], size)
        frames = center_crop(resize_frames(frames.float(), height, width), size, size)
    else:
        frames = _lanczos(frames, size)
    if protocol.jpeg_quality is not None:
        frames = torch.stack([_through_jpeg(frame, protocol.jpeg_quality) for frame in frames.clamp(0, 255).round()])
    return pixels_to_sample(frames.permute(3, 0, 1, 2)).clamp_(-1.0, 1.0).contiguous()


def _lanczos(frames: torch.Tensor, size: int) -> torch.Tensor:
    from PIL import Image

    side = min(frames.shape[1:3])
    squares = center_crop(frames, side, side).contiguous().numpy()
    resized = [
        np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS)) for square in squares
    ]
    return torch.from_numpy(np.stack(resized))


def _through_jpeg(frame: torch.Tensor, quality: int) -> torch.Tensor:
    from PIL import Image

    encoded = BytesIO()
    Image.fromarray(frame.byte().contiguous().numpy()).save(encoded, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(encoded).convert("RGB")))
