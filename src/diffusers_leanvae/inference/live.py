"""Raw frames in, raw frames out, as they come: a camera or an ffmpeg pipe through an autoencoder.

    ffmpeg -i in.mp4 -f rawvideo -pix_fmt rgb24 - | leanvae live --width 640 --height 360 | ffplay -f rawvideo \
        -pixel_format rgb24 -video_size 640x360 -
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

from ..video_io.pixels import unit_to_pixels
from .files import reconstruct_frames
from .streaming import StreamingDecoder, StreamingEncoder


@torch.inference_mode()
def reconstruct_stream(
    vae: Any,
    source: BinaryIO,
    target: BinaryIO,
    width: int,
    height: int,
    *,
    num_frames_per_step: int = 4,
    side_by_side: bool = False,
) -> int:
    r"""Reconstruct raw RGB24 frames (`height * width * 3` bytes each, rows from the top) until `source` ends.

    Any size, any number of frames, constant memory; the frames equal those of the whole clip at once. A frame is
    written, and `target` flushed, when at most `num_frames_per_step` more have been read. That `target` is closed by
    its reader is a normal end.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        source: Binary stream of raw frames, such as `sys.stdin.buffer`.
        target: Binary stream for raw frames, of the same size and number.
        width: Width of a frame in pixels.
        height: Height of a frame in pixels.
        num_frames_per_step: Frames that pass the network at once, a multiple of the temporal ratio: fewer come out
            earlier, more are faster.
        side_by_side: Write frames of twice the width, the original to the left.

    Returns:
        How many frames were written.

    Raises:
        ValueError: If a size is not legal, or `source` ends within a frame; the frames before it are written then.
    """
    if width < 1 or height < 1:
        raise ValueError(f"`width` and `height` must be positive, got {width} and {height}.")
    encoder = StreamingEncoder(vae, num_frames_per_step)
    decoder = StreamingDecoder(vae, num_frames_per_step // vae.temporal_compression_ratio)
    originals: deque[torch.Tensor] = deque()  # read, not yet reconstructed
    num_bytes, rest = height * width * 3, b""
    num_written = 0

    def read() -> Iterator[torch.Tensor]:
        nonlocal rest
        while len(data := _read(source, num_bytes)) == num_bytes:
            frame = torch.frombuffer(data, dtype=torch.uint8).view(1, height, width, 3)
            if side_by_side:
                originals.append(frame)
            yield frame
        rest = bytes(data)

    try:
        for unit in reconstruct_frames(read(), encoder, decoder):
            pixels = unit_to_pixels(unit).permute(0, 2, 3, 1).cpu()
            _write(target, torch.cat((originals.popleft(), pixels), dim=2) if side_by_side else pixels)
            target.flush()
            num_written += 1
    except BrokenPipeError:
        return num_written
    if rest:
        raise ValueError(
            f"`source` must hold whole frames of {width}x{height} RGB24, {num_bytes} bytes each, got {len(rest)} "
            f"bytes after {num_written} whole frames."
        )
    return num_written


def _read(source: BinaryIO, num_bytes: int) -> bytearray:
    r"""The next `num_bytes`, fewer at the end; a pipe gives what it has, not what was asked for."""
    data = bytearray()
    while len(data) < num_bytes and (piece := source.read(num_bytes - len(data))):
        data += piece
    return data


def _write(target: BinaryIO, pixels: torch.Tensor) -> None:
    data = memoryview(pixels.numpy().tobytes())
    while data:  # an unbuffered stream takes what fits
        data = data[target.write(data) :]
