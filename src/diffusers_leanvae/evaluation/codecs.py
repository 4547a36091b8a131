"""Codecs as anchors: what x264, x265 and AV1 make of the same clips in as many bits as the latents take."""

import tempfile
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch

from ..checks import check_choice
from ..clock import timed
from ..video_io import read_video, write_video
from ..video_io.containers import find_video_stream, named_errors, open_input
from ..video_io.pixels import pixels_to_unit, sample_to_pixels, sample_to_unit
from .reconstructors import Reconstruction


class Encoder(NamedTuple):
    """An encoder of `VideoWriter`.

    Attributes:
        codec: FFmpeg's name.
        pixel_format: How pixels are stored: 4:2:0 is what players expect, 4:4:4 keeps every sample of colour.
        best_crf: Constant rate factor of the best quality that is tried.
        step: From one quality to the next.
        num_qualities: How many are tried.
    """

    codec: str
    pixel_format: str
    best_crf: int = 0
    step: float = 0.25
    num_qualities: int = 205

    def crf(self, quality: int) -> float:
        """Return the constant rate factor of a quality, which count from 0, the best."""
        return self.best_crf + quality * self.step


CODECS = {
    "x264": Encoder("libx264", "yuv420p"),
    "x264-444": Encoder("libx264", "yuv444p"),
    "x265": Encoder("libx265", "yuv420p"),
    "x265-444": Encoder("libx265", "yuv444p"),
    # Of noise, SVT-AV1 writes streams at 0 and 1 that no decoder takes.
    "av1": Encoder("libsvtav1", "yuv420p", best_crf=4, step=1.0, num_qualities=60),
}
_FPS = Fraction(25)  # qualities do not depend on it, and so neither do the packets
_CPU = torch.device("cpu")


class CodecReconstructor:
    """A codec at a rate: each clip in the best quality that takes no more bits than the rate allows.

    The quality is found by bisection. Only packets count, without what stands once in the header of a file and without
    the encoder's signature: of an autoencoder the config is not counted either. A clip that is too large even in the
    worst quality is taken in that.

    Args:
        codec: A key of `CODECS`.
        bits_per_pixel: Bits for each pixel of each frame, such as those of an autoencoder's latents.
        preset: Speed preset, see `VideoWriter`.

    Raises:
        ValueError: If there is no such codec, or PyAV was built without its encoder.
    """

    def __init__(self, codec: str, bits_per_pixel: float, preset: str = "medium") -> None:
        check_choice("codec", codec, CODECS)
        check_choice("codec", codec, encodable(), "with this build of PyAV")
        if not bits_per_pixel > 0:
            raise ValueError(f"`bits_per_pixel` must be more than 0, got {bits_per_pixel}.")
        self._encoder, self._preset = CODECS[codec], preset
        self.bits_per_pixel = bits_per_pixel
        self.name = f"{codec} at {bits_per_pixel:.3g} bit/px"
        self.about: dict[str, Any] = {
            "codec": self._encoder.codec,
            "pixel_format": self._encoder.pixel_format,
            "preset": preset,
            "bits_per_pixel_allowed": bits_per_pixel,
            "dtype": "uint8",
        }

    def checksum(self) -> str:
        """A codec has no weights."""
        return ""

    def check_size(self, height: int, width: int) -> None:
        """Refuse clips of a size that the encoder does not take.

        Raises:
            ValueError: If it does not; it is asked with one frame.
        """
        with tempfile.TemporaryDirectory() as folder:
            frame = torch.zeros(1, height, width, 3, dtype=torch.uint8)
            self._write(Path(folder, "frame.mkv"), frame, self._encoder.num_qualities - 1)

    def reconstruct(self, clip: torch.Tensor) -> Reconstruction:
        """Encode and decode; see [`reconstructors.Reconstructor.reconstruct`]. Pixels are rounded to 8 bits first."""
        pixels = sample_to_pixels(clip).permute(1, 2, 3, 0).cpu()
        num_bits: dict[int, int] = {}
        seconds: dict[int, float] = {}
        # In memory, where the system has such a folder: flushing files to a disk would be timed as encoding.
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

            def size(quality: int) -> int:
                path = Path(folder, f"{quality}.mkv")
                seconds[quality] = timed(lambda: self._write(path, pixels, quality), _CPU)[1]
                num_bits[quality] = 8 * count_bytes(path)
                return num_bits[quality]

            allowed = self.bits_per_pixel * pixels[..., 0].numel()
            chosen = find_quality(size, self._encoder.num_qualities, allowed)
            (frames, _), decode_seconds = timed(lambda: read_video(Path(folder, f"{chosen}.mkv")), _CPU)
        decoded = pixels_to_unit(frames).permute(0, 3, 1, 2)
        original = sample_to_unit(clip.transpose(0, 1)).cpu()
        return Reconstruction(original, decoded, num_bits[chosen], seconds[chosen], decode_seconds, None)

    def _write(self, path: Path, pixels: torch.Tensor, quality: int) -> None:
        encoder = self._encoder
        settings: dict[str, Any] = {"codec": encoder.codec, "pixel_format": encoder.pixel_format}
        write_video(path, pixels, _FPS, crf=encoder.crf(quality), preset=self._preset, **settings)


def encodable() -> tuple[str, ...]:
    """List the codecs that this build of PyAV has encoders of."""
    return tuple(name for name, encoder in CODECS.items() if encoder.codec in av.codecs_available)


def find_quality(size: Callable[[int], float], num_qualities: int, max_size: float) -> int:
    """Find the best quality that is small enough, by bisection; the worst if none is.

    Args:
        size: Size in a quality, asked for the one that is returned too; about falling from the first on.
        num_qualities: They count from 0, the best.
        max_size: The largest legal size.
    """
    # The search asks for the place that it finds, or, if that is past the end, for the last.
    found = bisect_left(range(num_qualities), True, key=lambda quality: size(quality) <= max_size)
    return min(found, num_qualities - 1)


def count_bytes(path: Path) -> int:
    """Count the bytes of a video's packets."""
    with open_input(path) as container, named_errors(path):
        stream = find_video_stream(container, path)
        packets = [packet for packet in container.demux(stream) if packet.size]
        # x264 signs the first packet, others the file's header.
        if stream.codec_context.codec.canonical_name == "h264":
            unsigned = av.BitStreamFilterContext("filter_units=remove_types=6", stream)
            packets = [part for packet in packets for part in unsigned.filter(packet)]
        return sum(packet.size for packet in packets)
