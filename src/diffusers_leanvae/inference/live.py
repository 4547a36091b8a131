"""Raw frames in, raw frames out, as they come: a camera or an ffmpeg pipe through an autoencoder.

    ffmpeg -i in.mp4 -f rawvideo -pix_fmt rgb24 - | leanvae live --width 640 --height 360 | ffplay -f rawvideo \
        -pixel_format rgb24 -video_size 640x360 -
"""

from collections.abc import Iterator
from typing import BinaryIO

import torch

from ..models.video_autoencoder import VideoAutoencoder
from .files import picture, reconstruct_frames
from .streaming import StreamingDecoder, StreamingEncoder


@torch.inference_mode()
def reconstruct_stream(
    vae: VideoAutoencoder,
    source: BinaryIO,
    target: BinaryIO,
    width: int,
    height: int,
    *,
    num_frames_per_step: int | None = None,
    side_by_side: bool = False,
    source_name: str = "`source`",
) -> int:
    """Reconstruct raw RGB24 frames (`height * width * 3` bytes each, rows from the top) until `source` ends.

    Any size, any number of frames, constant memory; the frames equal those of the whole clip at once. A frame is
    written, and `target` flushed, when at most `num_frames_per_step` more have been read. It is a normal end if the
    reader of `target` closes it.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        source: Binary stream of raw frames, such as `sys.stdin.buffer`.
        target: Binary stream for raw frames, of the same size and number.
        width: Width of a frame in pixels.
        height: Height of a frame in pixels.
        num_frames_per_step: Frames that pass the network at once, a multiple of the temporal ratio: fewer come out
            earlier, more are faster. `None` is as few as can be.
        side_by_side: Write frames of twice the width, the original to the left.
        source_name: Where `source` was given, for the message.

    Returns:
        How many frames were written.

    Raises:
        ValueError: If a size is not legal, or `source` ends within a frame; the frames before it are written then.
    """
    if width < 1 or height < 1:
        raise ValueError(f"`width` and `height` must be positive, got {width} and {height}.")
    step = vae.temporal_compression_ratio if num_frames_per_step is None else num_frames_per_step
    encoder = StreamingEncoder(vae, step)
    decoder = StreamingDecoder(vae, step // vae.temporal_compression_ratio)
    frames, num_written = _RawFrames(source, height, width), 0
    try:
        for unit, original in reconstruct_frames(frames, encoder, decoder, keeps_originals=side_by_side):
            _write(target, picture(unit, original))
            target.flush()
            num_written += 1
    except BrokenPipeError:
        return num_written
    if frames.num_bytes_left:
        raise ValueError(
            f"{source_name} must hold whole frames of {width}x{height} RGB24, {frames.num_bytes} bytes each, got "
            f"{frames.num_bytes_left} bytes after {num_written} whole frames."
        )
    return num_written


class _RawFrames:
    """The frames of a raw stream, uint8 `(1, height, width, 3)`.

    Attributes:
        num_bytes: Bytes of a frame.
        num_bytes_left: Bytes of an incomplete frame at the end, known when all frames have been taken.
    """

    def __init__(self, source: BinaryIO, height: int, width: int) -> None:
        self.source, self.height, self.width = source, height, width
        self.num_bytes, self.num_bytes_left = height * width * 3, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while len(data := _read(self.source, self.num_bytes)) == self.num_bytes:
            yield torch.frombuffer(data, dtype=torch.uint8).view(1, self.height, self.width, 3)
        self.num_bytes_left = len(data)


def _read(source: BinaryIO, num_bytes: int) -> bytearray:
    """Read the next `num_bytes`, fewer at the end; a pipe gives what it has, not what was asked for."""
    data = bytearray()
    while len(data) < num_bytes and (piece := source.read(num_bytes - len(data))):
        data += piece
    return data


def _write(target: BinaryIO, pixels: torch.Tensor) -> None:
    data = memoryview(pixels.numpy().tobytes())
    while data:  # an unbuffered stream takes what fits
        data = data[target.write(data) :]
