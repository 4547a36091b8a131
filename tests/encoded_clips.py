"""Clips encoded with PyAV alone, so that the reader is not tested against the writer, and what was opened to read."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
import torch

from diffusers_leanvae.video_io import read_video


def moving_picture(num_frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Smooth colours that drift, with a bright square at a place that tells the frames apart."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        for channel in range(3):
            phase = 0.3 * t + 2 * channel
            frames[t, :, :, channel] = 120 + 60 * np.sin(x / 9 + phase) + 40 * np.cos(y / 7 - phase)
        row, column = 4 * (t % (height // 4 - 1)), 4 * (t // (height // 4 - 1))
        frames[t, row : row + 4, column : column + 4] = 250
    return torch.from_numpy(frames)


def encode(
    path: Path,
    frames: torch.Tensor,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction = Fraction(25),
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    tags: tuple[int, int] | None = None,
    audio_codec: str | None = None,
    sample_aspect_ratio: Fraction | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `frames`. `tags`: colour space, range."""
    if options is None:
        options = {"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if sample_aspect_ratio is not None:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if tags is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        sound = container.add_stream(audio_codec, rate=44100) if audio_codec else None
        for index, image in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.shape[2] == 3 else "rgba")
            if tags is not None:
                matrix = {1: "ITU709", 5: "ITU601"}[tags[0]]
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=tags[1])
                frame.colorspace, frame.color_range = tags
            else:
                frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = pts[index] if pts else index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            seconds = len(frames) / rate
            wave = np.sin(np.arange(int(seconds * 44100)) / 20).astype(np.float32)[None]
            audio = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            audio.sample_rate, audio.pts = 44100, 0
            container.mux(sound.encode(audio))
            container.mux(sound.encode(None))
    return path


def reference(path: Path) -> torch.Tensor:
    """All frames of an untagged small clip in order, as PyAV's plain loop and FFmpeg's exact conversion give them."""
    exact = "flags=accurate_rnd+full_chroma_int+neighbor:in_color_matrix=bt601:in_range=tv"
    with av.open(str(path)) as container:
        images = []
        for frame in container.decode(video=0):
            graph = av.filter.Graph()
            source = graph.add_buffer(template=container.streams.video[0])
            nodes = [graph.add("scale", exact), graph.add("format", "gbrp"), graph.add("buffersink")]
            graph.link_nodes(source, *nodes).configure()
            graph.vpush(frame)
            images.append(torch.from_numpy(graph.vpull().to_ndarray()))
    return torch.stack(images)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean().clamp_min(1e-10)))


def count_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every file that FFmpeg opens for reading is added from now on."""
    opened: list[str] = []
    open_file = av.open

    def counting(file: str, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "r":
            opened.append(Path(file).name)
        return open_file(file, mode, *arguments, **options)

    monkeypatch.setattr(av, "open", counting)
    return opened


def read(path: Path, start: int = 0, num_frames: int | None = None) -> torch.Tensor:
    """The frames of a file, as the package reads them."""
    return read_video(path, start, num_frames)[0]
