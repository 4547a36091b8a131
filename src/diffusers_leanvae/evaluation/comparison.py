"""Autoencoders and codecs compared on the same clips, with example pictures of each."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..video_io import read_video, write_video
from ..video_io.pixels import unit_to_pixels
from .autoencoders import open_autoencoder
from .clips import list_clips, read_clip
from .codecs import CodecReconstructor
from .journal import Journal
from .measures import MetricOptions
from .protocols import Protocol
from .reconstruction import evaluate_reconstruction
from .reconstructors import BITS_PER_PIXEL, AutoencoderReconstructor, Reconstruction, Reconstructor
from .records import Evaluation


class Example(NamedTuple):
    """One clip as it was and as each subject gave it back.

    Attributes:
        clip: Its name.
        fps: Its frame rate.
        original: `uint8` `(num_frames, height, width, 3)`.
        reconstructions: The same of each subject, by its name; one that could not be made is absent.
    """

    clip: str
    fps: Fraction
    original: torch.Tensor
    reconstructions: dict[str, torch.Tensor]


class Comparison(NamedTuple):
    """The evaluations of all subjects on the same clips, in the order they were named, and some examples."""

    evaluations: list[Evaluation]
    examples: list[Example]


def compare(
    models: Sequence[str] | Mapping[str, str],
    source: str | Path,
    protocol: Protocol,
    folder: str | Path,
    *,
    codecs: Sequence[str] = (),
    options: MetricOptions | None = None,
    num_examples: int = 3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Measure several autoencoders, and codecs at the rates of their latents.

    Subjects come one after the other, so that one is in memory. A comparison that was ended goes on from its last clip
    when it is started again with the same folder. Codecs get the rates of the trained models, or if there is none
    those of all.

    Args:
        models: As of [`autoencoders.open_autoencoder`]; a mapping gives each the name that tables call it.
        source: The clips, as of [`clips.list_clips`].
        protocol: Which frames of which clips at what size, and the metrics.
        folder: Where finished clips and examples are kept; see [`forget_progress`].
        codecs: Names of [`codecs.CODECS`].
        options: Where weights of metrics come from.
        num_examples: Clips that pictures are kept of.
        device: Where autoencoders and metrics are computed.
        dtype: Dtype of the autoencoders.
        progress: Called with a line per subject and clip.

    Raises:
        ValueError: If a model cannot be opened, a name comes twice, or there is no clip.
    """
    names = list(models.values() if isinstance(models, Mapping) else models)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"`models` must be names that differ, at least one, got {', '.join(names) or 'none'}.")
    for codec in codecs:
        CodecReconstructor(codec, 1.0)  # refused before anything is measured
    keeper = _Keeper(Path(folder), source, protocol, num_examples)

    def judge(subject: Reconstructor) -> Evaluation:
        if progress is not None:
            progress(f"--- {subject.name}")
        kept = keeper.folder_of(subject.name)
        evaluation = evaluate_reconstruction(
            subject,
            source,
            protocol,
            options,
            device=device,
            resume=kept / "clips",
            progress=progress,
            on_clip=lambda clip, result, figures: keeper.offer(subject.name, clip, result),
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            keeper.complete(subject, list(evaluation.clips))
        return evaluation

    evaluations = []
    for place, name in zip(models, names, strict=True):
        vae, about = open_autoencoder(place, device, dtype)
        evaluations.append(judge(AutoencoderReconstructor(vae, name, about)))
        del vae
        gc.collect()
    trained = [evaluation for evaluation in evaluations if evaluation.about.get("weights") != "random"]
    rates = sorted(evaluation.totals[BITS_PER_PIXEL] for evaluation in trained or evaluations)
    anchors = [CodecReconstructor(codec, rate) for rate in rates for codec in codecs]
    evaluations += [judge(anchor) for anchor in {anchor.name: anchor for anchor in anchors}.values()]
    return Comparison(evaluations, keeper.examples(evaluations))


def forget_progress(folder: str | Path, evaluations: Sequence[Evaluation]) -> None:
    """Remove what a comparison kept to go on from."""
    for evaluation in evaluations:
        kept = Path(folder) / _slug(evaluation.model)
        Journal.remove(kept / "clips")
        for path in kept.glob("*.mkv"):
            path.unlink()
        kept.rmdir()
    Path(folder).rmdir()


class _Keeper:
    """Keeps the reconstructions of the first clips of each subject as files without loss."""

    def __init__(self, folder: Path, source: str | Path, protocol: Protocol, num_examples: int) -> None:
        self.folder, self.source, self.protocol, self.num_examples = folder, source, protocol, num_examples

    def folder_of(self, name: str) -> Path:
        path = self.folder / _slug(name)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def offer(self, name: str, clip: str, result: Reconstruction) -> None:
        """Keep a reconstruction while there are too few."""
        folder = self.folder_of(name)
        if len(list(folder.glob("*.mkv"))) < self.num_examples:
            self._write(folder / f"{_slug(clip)}.mkv", result.pixels)

    def complete(self, subject: Reconstructor, clips: list[str]) -> None:
        """Make what is missing of the first clips: the process was ended before it was kept, or others were."""
        wanted = {f"{_slug(clip)}.mkv": clip for clip in clips[: self.num_examples]}
        folder = self.folder_of(subject.name)
        missing = {clip for file, clip in wanted.items() if not (folder / file).is_file()}
        for clip, sample, _ in self._read(missing):
            self._write(folder / f"{_slug(clip)}.mkv", subject.reconstruct(sample).pixels)

    def examples(self, evaluations: list[Evaluation]) -> list[Example]:
        """Read what was kept, next to the originals."""
        examples = []
        for clip, sample, fps in self._read(set(list(evaluations[0].clips)[: self.num_examples])):
            original = unit_to_pixels(sample.permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1))
            files = {e.model: self.folder_of(e.model) / f"{_slug(clip)}.mkv" for e in evaluations}
            found = {name: read_video(file)[0] for name, file in files.items() if file.is_file()}
            examples.append(Example(clip, fps, original, found))
        return examples

    def _read(self, names: set[str]) -> list[tuple[str, torch.Tensor, Fraction]]:
        found = []
        if names:
            for clip in list_clips(self.source, self.protocol):
                if clip.name in names:
                    with clip.open() as video:
                        found.append((clip.name, read_clip(video, self.protocol, clip.name), video.info.fps))
                if len(found) == len(names):
                    break
        return found

    @staticmethod
    def _write(path: Path, pixels: torch.Tensor) -> None:
        write_video(path, unit_to_pixels(pixels.float().cpu()).permute(0, 2, 3, 1), 25, codec="ffv1")


def _slug(name: str) -> str:
    """Turn a name into one of a file, which no other name gives."""
    return "".join(char if re.fullmatch(r"[\w.-]", char, re.ASCII) else f"={ord(char):x}=" for char in name)[-200:]
