"""Metrics of FFmpeg's filters: VMAF by the program that comes with imageio-ffmpeg, XPSNR by PyAV's own FFmpeg.

Both see 8-bit 4:2:0 BT.709 of limited range, which the filters and the models of VMAF are made for.
"""

import json
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.error import BlockingIOError as NoFrameYet
from av.error import EOFError as EndOfGraph
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame

from ..video_io.pixels import unit_to_pixels


VMAF_MODEL = "vmaf_v0.6.1"
_TIME_BASE = Fraction(1, 25)  # what it is makes no difference
_SCALE, _FORMAT = "out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic", "yuv420p"
_TO_YUV = f"scale={_SCALE},format={_FORMAT}"


def find_vmaf() -> str:
    """Return the path of an FFmpeg with the filter `libvmaf`.

    Raises:
        ImportError: If imageio-ffmpeg is not installed.
        ValueError: If its FFmpeg cannot be run, or has no such filter.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('VMAF needs imageio-ffmpeg: pip install "diffusers-leanvae[vmaf]".') from error
    try:
        program = get_ffmpeg_exe()
        listed = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"VMAF needs the FFmpeg of imageio-ffmpeg 0.6 or later, which does not run: {error}"
        ) from error
    if " libvmaf " not in listed.stdout:
        raise ValueError(f"VMAF needs an FFmpeg with the filter libvmaf, got {program!r} without it.")
    return program


class VmafStream:
    """VMAF of a video that comes in pieces, computed while it comes, in another process.

    Original and reconstruction go side by side through one pipe, so that nothing waits for the other.

    Args:
        program: FFmpeg with `libvmaf`.
        height: Of the frames.
        width: Of the frames.
    """

    def __init__(self, program: str, height: int, width: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="leanvae-vmaf-")
        self._errors = open(Path(self._folder.name, "errors.txt"), "w+b")
        crop = f"crop={width}:{height}"
        graph = (
            f"[0:v]split[a][b];[a]{crop}:0:0,{_TO_YUV}[decoded];[b]{crop}:{width}:0,{_TO_YUV}[original];"
            f"[decoded][original]libvmaf=model=version={VMAF_MODEL}:log_fmt=json:log_path=vmaf.json:n_threads=1"
        )
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{2 * width}x{height}", "-framerate", "25"]
        self._process = subprocess.Popen(
            [program, "-hide_banner", "-loglevel", "error", *raw, "-i", "-", "-lavfi", graph, "-f", "null", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            cwd=self._folder.name,  # a path inside the graph would have to be quoted for it
        )

    def write(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Add frames `(num_frames, 3, height, width)` in `[0, 1]`."""
        pixels = unit_to_pixels(torch.cat((decoded, original), dim=3)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(pixels.tobytes())
        except BrokenPipeError:
            pass  # `finish` says why

    def finish(self) -> list[float]:
        """Return VMAF of each frame."""
        try:
            assert self._process.stdin is not None
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
            code = self._process.wait()
            self._errors.seek(0)
            report = Path(self._folder.name, "vmaf.json")
            if code or not report.is_file():
                reason = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or [
                    f"exit code {code}"
                ]
                raise ValueError(f"VMAF failed in FFmpeg: {reason[0]}")
            frames = json.loads(report.read_text(encoding="utf-8"))["frames"]
            return [frame["metrics"]["vmaf"] for frame in frames]
        finally:
            self.close()

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        self._folder.cleanup()


class XpsnrStream:
    """XPSNR of the luma of a video that comes in pieces.

    Args:
        height: Of the frames.
        width: Of the frames.
    """

    def __init__(self, height: int, width: int) -> None:
        self._graph = Graph()
        self._sources = [
            self._graph.add_buffer(
                width=width, height=height, format=VideoFormat("rgb24", width, height), time_base=_TIME_BASE
            )
            for _ in range(2)
        ]
        xpsnr, sink = self._graph.add("xpsnr", "shortest=1"), self._graph.add("buffersink")
        for number, source in enumerate(self._sources):
            scale = self._graph.add("scale", _SCALE)
            to_format = self._graph.add("format", _FORMAT)
            source.link_to(scale)
            scale.link_to(to_format)
            to_format.link_to(xpsnr, 0, number)
        xpsnr.link_to(sink)
        self._graph.configure()
        self._sink: Any = sink
        self._values: list[float] = []
        self._num_frames = 0

    def write(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Add frames `(num_frames, 3, height, width)` in `[0, 1]`."""
        pairs = [unit_to_pixels(x).permute(0, 2, 3, 1).contiguous().cpu().numpy() for x in (decoded, original)]
        for pair in zip(*pairs, strict=True):
            for source, pixels in zip(self._sources, pair, strict=True):
                source.push(self._frame(pixels))
            self._num_frames += 1
            self._pull()

    def _frame(self, pixels: np.ndarray) -> VideoFrame:
        frame = VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = self._num_frames, _TIME_BASE
        return frame

    def _pull(self) -> None:
        while True:
            try:
                frame = self._sink.pull()
            except (NoFrameYet, EndOfGraph):
                return
            self._values.append(float(frame.metadata["lavfi.xpsnr.xpsnr.y"]))

    def finish(self) -> list[float]:
        """Return XPSNR of each frame in dB, infinite for equal frames."""
        for source in self._sources:
            source.push(None)
        self._pull()
        return self._values

    def close(self) -> None:
        """Nothing is left open."""
