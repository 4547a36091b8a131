"""Autoencoders and codecs compared on the same clips, with example pictures of each."""

import gc
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from ..launching import is_first_process
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import sample_to_pixels, unit_to_pixels
from .autoencoders import OpenedAutoencoder, open_for
from .clips import list_clips, read_clip, whole_groups
from .codecs import CodecReconstructor
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
    """The evaluations of all subjects on the same clips, in the order they were named, and some examples.

    In a job of several processes only the first has the examples.
    """

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
    argument: str = "models",
) -> Comparison:
    """Measure several autoencoders, and codecs at the rates of their latents.

    Subjects come one after the other, so that one is in memory. A comparison that was ended goes on from its last clip
    when it is started again with the same folder. Codecs get the rates of the trained models, or if there is none
    those of all.

    Args:
        models: As of [`autoencoders.open_autoencoder`]; a mapping gives each the name that tables call it.
        source: The clips, as of [`clips.list_clips`].
        protocol: Which frames of which clips at what size, and the metrics.
        folder: Where finished clips are kept. [`Journal.remove`] removes it.
        codecs: Names of [`codecs.CODECS`].
        options: Where weights of metrics come from.
        num_examples: Clips that pictures are kept of.
        device: Where autoencoders and metrics are computed.
        dtype: Dtype of the autoencoders.
        progress: Called with a line per subject and clip.
        argument: Where the caller takes `models` from, for messages.

    Raises:
        ValueError: If a name comes twice, a model cannot be opened or a subject does not take clips of this size, of
            which all are looked at before anything is measured; or if there is no clip.
    """
    names = list(models.values() if isinstance(models, Mapping) else models)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"`{argument}` must be names that differ, at least one, got {', '.join(names) or 'none'}.")
    _check_codecs(codecs, protocol)
    for place in list(models)[1:]:  # the first is opened before anything is measured in any case
        _open(argument, place, protocol, "cpu", dtype)
        gc.collect()
    pictures, is_first = _Pictures(source, protocol, num_examples), is_first_process()

    def judge(subject: Reconstructor) -> Evaluation:
        if progress is not None:
            progress(f"--- {subject.name}")
        evaluation = evaluate_reconstruction(
            subject,
            source,
            protocol,
            options,
            device=device,
            resume=folder,
            progress=progress,
            on_clip=(lambda clip, result: pictures.offer(subject.name, clip, result)) if is_first else None,
        )
        if is_first:
            pictures.complete(subject, list(evaluation.clips))
        return evaluation

    evaluations = []
    for place, name in zip(models, names, strict=True):
        vae, about = _open(argument, place, protocol, device, dtype)
        evaluations.append(judge(AutoencoderReconstructor(vae, name, about)))
        del vae
        gc.collect()
    trained = [evaluation for evaluation in evaluations if evaluation.about.get("weights") != "random"]
    rates = sorted(evaluation.totals[BITS_PER_PIXEL] for evaluation in trained or evaluations)
    anchors = [CodecReconstructor(codec, rate) for rate in rates for codec in codecs]
    evaluations += [judge(anchor) for anchor in {anchor.name: anchor for anchor in anchors}.values()]
    return Comparison(evaluations, pictures.examples(list(evaluations[0].clips)) if is_first else [])


def _check_codecs(codecs: Sequence[str], protocol: Protocol) -> None:
    for codec in codecs:
        reconstructor = CodecReconstructor(codec, 1.0)
        try:
            reconstructor.check_size(protocol.resolution, protocol.resolution)
        except ValueError as error:
            raise ValueError(f"`codec` {codec!r} does not take these clips: {error}") from None


def _open(
    argument: str, place: str, protocol: Protocol, device: torch.device | str, dtype: torch.dtype
) -> OpenedAutoencoder:
    """Open a model, which must take the clips of a protocol; `argument` is where it was named."""
    opened = open_for(argument, place, device, dtype)
    vae = opened.vae
    if isinstance(vae, VideoAutoencoder):
        shape = (1, vae.in_channels, protocol.num_frames or 1, protocol.resolution, protocol.resolution)
        try:
            vae.check_sample(torch.empty(shape, dtype=vae.dtype, device="meta"), "clip")
        except ValueError as error:
            raise ValueError(f"`{argument}` {place!r} does not take these clips: {error}") from None
    return opened


class _Pictures:
    """The first clips of a comparison, and what each subject made of them."""

    def __init__(self, source: str | Path, protocol: Protocol, num_examples: int) -> None:
        self.source, self.protocol, self.num_examples = source, protocol, num_examples
        self.kept: dict[str, dict[str, torch.Tensor]] = {}  # by subject and clip

    def offer(self, name: str, clip: str, result: Reconstruction) -> None:
        """Keep a reconstruction while there are too few."""
        kept = self.kept.setdefault(name, {})
        if len(kept) < self.num_examples:
            kept[clip] = _pixels_of(result)

    def complete(self, subject: Reconstructor, clips: list[str]) -> None:
        """Make what is missing of the first clips: another process judged them, or a run that was ended."""
        kept = self.kept.setdefault(subject.name, {})
        for clip, sample, _ in self._read(set(clips[: self.num_examples]) - kept.keys()):
            ratio = subject.about.get("temporal_compression_ratio") or 1
            kept[clip] = _pixels_of(subject.reconstruct(whole_groups(sample, self.protocol, ratio)))

    def examples(self, clips: list[str]) -> list[Example]:
        """Return what was kept of the first clips, next to the originals."""
        examples = []
        for clip, sample, fps in self._read(set(clips[: self.num_examples])):
            found = {name: kept[clip] for name, kept in self.kept.items() if clip in kept}
            original = sample_to_pixels(sample).permute(1, 2, 3, 0)
            length = min(len(original), *map(len, found.values()))  # not all subjects take the last frames of a video
            found = {name: pixels[:length] for name, pixels in found.items()}
            examples.append(Example(clip, fps, original[:length], found))
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


def _pixels_of(result: Reconstruction) -> torch.Tensor:
    return unit_to_pixels(result.pixels).permute(0, 2, 3, 1).cpu()
