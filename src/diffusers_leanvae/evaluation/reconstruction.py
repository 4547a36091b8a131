"""Reconstruction quality, clip by clip: the protocol of every published PSNR and SSIM, and all other metrics.

`evaluate_reconstruction` takes the share of a process in a `torch.distributed` job. What clips contribute is summed in
the order of the data whichever process computed it, so that any number of processes gives the same bits.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..checks import one_line, reason_of
from ..data.schedule import ALONE, Share
from ..data.streams import is_stream
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import sample_to_unit, unit_to_pixels
from .clips import ClipFile, list_clips, read_clip, read_pieces, whole_groups
from .features import distance_metric
from .frechet import frechet_distance
from .journal import ClipResult, Journal, pack_features, unpack_features
from .measures import Measure, Measures, MetricOptions, make_measures
from .metrics import frame_psnr, frame_ssim
from .protocols import PROTOCOLS, Protocol
from .reconstructors import BITS_PER_PIXEL, RATE, Reconstruction, Reconstructor
from .records import Evaluation, Metric, mean_over_clips
from .streaming import StreamingReconstructor


_DIRECTIONS = ("encode", "decode")


class ClipScore(NamedTuple):
    """Means over the frames of a clip, and what was compared: `(num_frames, 3, height, width)` in `[0, 1]`."""

    psnr: float  # in dB
    ssim: float
    original: torch.Tensor
    reconstruction: torch.Tensor


@torch.no_grad()
def score_clip(vae: VideoAutoencoder, clip: torch.Tensor) -> ClipScore:
    """Reconstruct a clip from the posterior mean, and compare by PSNR and SSIM, for validation during training.

    The output is clamped; PSNR and SSIM are those of each frame over its three channels with pixels in `[0, 1]`, and
    their mean over the frames. The original is what the model gets: in the model's dtype.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        clip: `(3, num_frames, height, width)` in `[-1, 1]`, of sizes that the model takes.
    """
    sample = clip[None].to(vae.device, vae.dtype)
    reconstruction = vae(sample, return_dict=False)[0]
    decoded, original = (sample_to_unit(x[0].transpose(0, 1)) for x in (reconstruction, sample))
    psnr, ssim = (metric(decoded, original).double().mean().item() for metric in (frame_psnr, frame_ssim))
    return ClipScore(psnr, ssim, original, decoded)


def evaluate_reconstruction(
    reconstructor: Reconstructor,
    source: str | Path,
    protocol: Protocol = PROTOCOLS["val-17x256"],
    options: MetricOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    resume: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    on_clip: Callable[[str, Reconstruction], None] | None = None,
) -> Evaluation:
    """Measure the reconstructions of the clips of a data set.

    Files that cannot be read, or are too short, are passed over and named, as are those of which the latents or the
    reconstruction are not finite. Metrics whose weights cannot be had are left out and named. In a job of several
    processes (`torch.distributed`), all call and all get the whole result.

    Args:
        reconstructor: What is judged. A [`StreamingReconstructor`] gets clips in pieces; of whole videos, others hold
            all frames in memory.
        source: The data, as of [`clips.list_clips`].
        protocol: Which frames of which clips at what size, and the metrics.
        options: Where weights of metrics come from.
        device: Where metrics are computed.
        resume: Folder for finished clips, on a disk that all processes see: a run that was ended goes on from there.
            [`Journal.remove`] removes it.
        progress: Called with a line per clip of this process.
        on_clip: Called with the name and the reconstruction of each clip that this process measured, but of none that
            is taken from `resume` or was given in pieces.

    Returns:
        The evaluation. Nothing is rounded.

    Raises:
        ValueError: If there is no clip, or none that can be read, or every metric lacks its weights or programs.
    """
    ratio, cell = _ratio(reconstructor), reconstructor.about.get("spatial_compression_ratio") or 8
    if isinstance(reconstructor, StreamingReconstructor) and (protocol.num_frames or 1) % ratio != 1 % ratio:
        raise ValueError(f"`num_frames` must be {ratio} * n + 1 for clips in pieces, got {protocol.num_frames}.")
    share = _share()
    measures = make_measures(protocol.metrics, options, device, ratio, cell)
    _check_measures(measures, protocol)
    names = [*measures.metrics, *(features.name for features in measures.features.values())]
    judged = {"name": reconstructor.name, "about": reconstructor.about}
    setting = {"judged": judged, "source": str(source), "protocol": protocol.to_json(), "metrics": names}
    if resume is not None:
        setting["weights"] = reconstructor.checksum()
    journal = None if resume is None else Journal(resume, setting, share.rank)
    finished = {} if journal is None else journal.read()
    if share.world_size > 1:
        dist.barrier()  # nobody writes before all have read
    results: list[ClipResult] = []
    failed: list[tuple[int, str, str]] = []
    clips = list_clips(source, protocol)
    total = ""
    if not is_stream(str(source)):  # of which nobody knows the length
        clips = list(clips)
        total = f"/{len(clips)}"
    for index, clip in enumerate(clips):
        if index % share.world_size != share.rank:
            continue
        known = finished.get(clip.name)
        if known is not None and (known.index, known.stamp) == (index, clip.stamp):
            results.append(known)
            continue
        try:
            result, whole = _measure_clip(reconstructor, index, clip, protocol, measures, device)
        except _Unusable as error:
            failed.append((index, clip.name, one_line(error)))
            line = f"{clip.name:<28} failed: {failed[-1][2]}"
        else:
            results.append(result)
            line = describe_figures(clip.name, result.figures, measures.metrics)
            if journal is not None:
                journal.add(result)
            if on_clip is not None and whole is not None:
                on_clip(clip.name, whole)
        if progress is not None:
            progress(f"[{index + 1}{total}] {line}")
    results = sorted(_gather(results, share), key=lambda result: result.index)
    failed = sorted(_gather(failed, share))
    if not results and not failed:
        raise ValueError(f"`source` must hold at least one video, got none in {str(source)!r}.")
    reasons = {name: reason for _, name, reason in failed}
    if not results:
        raise ValueError(f"`source` must hold at least one usable video, got {describe_failures(reasons)}")
    figures = _merge(measures, results)
    timing = _timing(results) | _peak_memory(torch.device(device), share)
    dataset = str(source) if is_stream(str(source)) else Path(source).name
    return Evaluation(
        model=reconstructor.name,
        dataset=dataset,
        protocol=protocol.to_json(),
        about=dict(reconstructor.about),
        failed=reasons,
        timing=timing,
        **figures,
    )


def describe_figures(name: str, figures: Mapping[str, float], metrics: Mapping[str, Metric]) -> str:
    """Put the first figures of a clip on a line."""
    shown = [
        f"{metrics[key].label} {value:.{metrics[key].digits}f}{f' {metrics[key].unit}' if metrics[key].unit else ''}"
        for key, value in figures.items()
        if key in metrics and key != BITS_PER_PIXEL and "_group_" not in key and not key.endswith("_first")
    ]
    return f"{name:<28} {'  '.join(shown)}".rstrip()


def describe_failures(failed: Mapping[str, str]) -> str:
    """Count files that failed, in words, with what was wrong with the first."""
    return f"{len(failed)} that failed, the first of them: {next(iter(failed.values()))}"


# --- One clip --------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """A file that cannot be read, or is too short, or that the model gives nothing finite back for."""


@torch.no_grad()
def _measure_clip(
    reconstructor: Reconstructor,
    index: int,
    clip: ClipFile,
    protocol: Protocol,
    measures: Measures,
    device: torch.device | str,
) -> tuple[ClipResult, Reconstruction | None]:
    pieces = _guarded(_read(reconstructor, clip, protocol))
    is_streamed = isinstance(reconstructor, StreamingReconstructor)
    reconstructions = reconstructor.stream(pieces) if is_streamed else map(reconstructor.reconstruct, pieces)
    figures: dict[str, float] = {}
    absent: dict[str, str] = {}
    active: list[tuple[str, Measure]] | None = None
    piece: Reconstruction | None = None
    latents, seen = _LatentSums(), _FirstFrames(protocol.num_feature_frames if measures.features else 0)
    num_frames, num_pixels, num_bits, encode_seconds, decode_seconds = 0, 0, 0, 0.0, 0.0
    try:
        for piece in reconstructions:
            encode_seconds += piece.encode_seconds
            decode_seconds += piece.decode_seconds
            num_bits += piece.num_bits
            latents.update(piece.latents)
            for kind, values in (("latents", piece.latents), ("pixels", piece.pixels)):
                if values is not None and not values.isfinite().all():
                    raise _Unusable(f"{reconstructor.name} made {kind} of it that are not finite numbers.")
            decoded, original = piece.pixels.to(device), piece.original.to(device)
            if not len(decoded):
                continue
            if active is None:
                active = _start(measures, decoded, absent)
            for _, measure in active:
                measure.update(decoded, original)
            seen.update(decoded, original)
            num_frames += len(decoded)
            num_pixels += decoded[:, 0].numel()
        for kind, measure in active or []:
            try:
                found = measure.finish()
                if not all(map(math.isfinite, found.values())):
                    raise ValueError("gave figures that are not finite")
                figures |= found
            except ValueError as error:
                absent[kind] = reason_of(error)
        figures[BITS_PER_PIXEL] = num_bits / num_pixels
    finally:
        for _, measure in active or []:
            measure.abandon()
    features = {}
    for kind, network in measures.features.items():
        if seen.num_frames < protocol.num_feature_frames:
            absent[kind] = f"needs {protocol.num_feature_frames} frames, got {seen.num_frames}"
        else:
            features[network.name] = [pack_features(network(pixels)) for pixels in seen.pixels()]
    result = ClipResult(
        index=index,
        name=clip.name,
        stamp=clip.stamp,
        figures=figures,
        absent=absent,
        features=features,
        latents=latents.to_json(),
        num_frames=num_frames,
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
    )
    return result, None if is_streamed else piece


def _start(measures: Measures, decoded: torch.Tensor, absent: dict[str, str]) -> list[tuple[str, Measure]]:
    """Begin a clip with the measures that take frames of its size; the others are named in `absent`."""
    active = []
    for kind, measure in measures.clips.items():
        try:
            measure.start(*decoded.shape[2:])
            active.append((kind, measure))
        except ValueError as error:
            absent[kind] = reason_of(error)
    return active


def _ratio(reconstructor: Reconstructor) -> int:
    """Frames that share a latent frame; 1 where none do."""
    return reconstructor.about.get("temporal_compression_ratio") or 1


def _read(reconstructor: Reconstructor, clip: ClipFile, protocol: Protocol) -> Iterator[torch.Tensor]:
    with clip.open() as video:
        if isinstance(reconstructor, StreamingReconstructor):
            yield from read_pieces(video, protocol, reconstructor.chunk, reconstructor.ratio)
        else:
            yield whole_groups(read_clip(video, protocol, clip.name), protocol, _ratio(reconstructor))


def _guarded(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tell what a foreign file does to the reader from errors of the model."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration:
            return
        except Exception as error:  # whatever it is, the other clips are still to be measured
            raise _Unusable(str(error)) from error
        yield piece


class _LatentSums:
    """Sums over the latents of a clip, for each channel, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] | None = None

    def update(self, latents: torch.Tensor | None) -> None:
        if latents is None:
            return
        values = latents.double().flatten(1)
        found = {
            "count": values.shape[1],
            "sum": values.sum(dim=1).cpu(),
            "squares": values.square().sum(dim=1).cpu(),
            "largest": values.abs().amax().item() if values.numel() else 0.0,
        }
        if self.sums is None:
            self.sums = found
            return
        for name in ("count", "sum", "squares"):
            self.sums[name] = self.sums[name] + found[name]
        self.sums["largest"] = max(self.sums["largest"], found["largest"])

    def to_json(self) -> dict[str, Any] | None:
        if self.sums is None:
            return None
        return self.sums | {name: self.sums[name].tolist() for name in ("sum", "squares")}


class _FirstFrames:
    """The first frames of a clip in 8 bits, which features are computed from."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_frames = limit, 0
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        count = min(self.limit - self.num_frames, len(decoded))
        if count > 0:
            self.parts.append((unit_to_pixels(original[:count]), unit_to_pixels(decoded[:count])))
            self.num_frames += count

    def pixels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return originals and reconstructions, `(num_frames, 3, height, width)`."""
        originals, decoded = zip(*self.parts, strict=True)
        return torch.cat(originals), torch.cat(decoded)


# --- All clips -------------------------------------------------------------------------------------------------------


def _share() -> Share:
    if dist.is_available() and dist.is_initialized():
        return Share(dist.get_rank(), dist.get_world_size())
    return ALONE


def _gather(items: list[Any], share: Share) -> list[Any]:
    if share.world_size == 1:
        return items
    parts: list[Any] = [None] * share.world_size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def _check_measures(measures: Measures, protocol: Protocol) -> None:
    """Leave out features that do not get the frames that they take; at least one metric must be left."""
    for kind, network in list(measures.features.items()):
        try:
            protocol.check_features(network)
        except ValueError as error:
            measures.missing[kind] = str(error)
            del measures.features[kind]
    if protocol.metrics and not (measures.clips or measures.features):
        reasons = " ".join(measures.missing.values())
        raise ValueError(f"`metrics` must have one that can be computed, got {', '.join(protocol.metrics)}: {reasons}")


def _merge(measures: Measures, results: Sequence[ClipResult]) -> dict[str, Any]:
    """Figures of all clips, as parts of an `Evaluation`."""
    clips = {result.name: result.figures for result in results}
    metrics, missing = measures.metrics | {BITS_PER_PIXEL: RATE}, dict(measures.missing)
    totals = mean_over_clips(clips)
    for kind in dict.fromkeys(kind for result in results for kind in result.absent):
        reasons = [result.absent[kind] for result in results if kind in result.absent]
        missing[kind] = f"{len(reasons)} of {len(results)} clips: {reasons[0]}."
    for kind, network in measures.features.items():
        pairs = [result.features[network.name] for result in results if network.name in result.features]
        if len(pairs) < 2:
            missing.setdefault(kind, f"It needs at least 2 clips, got {len(pairs)}.")
            continue
        originals, decoded = (
            torch.stack([unpack_features(text) for text in side]) for side in zip(*pairs, strict=True)
        )
        metrics[f"rfvd_{network.name}"] = distance_metric(network, is_reconstruction=True)
        totals[f"rfvd_{network.name}"] = frechet_distance(decoded, originals)
    metrics = {name: metric for name, metric in metrics.items() if name in totals}
    return {
        "metrics": metrics,
        "totals": {name: totals[name] for name in metrics},
        "clips": clips,
        "missing": missing,
        "latents": _latent_statistics([result.latents for result in results if result.latents is not None]),
    }


def _timing(results: Sequence[ClipResult]) -> dict[str, float]:
    num_frames = sum(result.num_frames for result in results)
    seconds = {name: math.fsum(getattr(result, f"{name}_seconds") for result in results) for name in _DIRECTIONS}
    return {f"{name}_frames_per_second": num_frames / value for name, value in seconds.items() if value > 0}


def _latent_statistics(sums: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not sums:
        return None
    count = sum(part["count"] for part in sums)
    means = [math.fsum(column) / count for column in zip(*(part["sum"] for part in sums), strict=True)]
    squares = [math.fsum(column) / count for column in zip(*(part["squares"] for part in sums), strict=True)]
    deviations = [math.sqrt(max(0.0, s - m * m)) for s, m in zip(squares, means, strict=True)]
    mean = math.fsum(means) / len(means)
    return {
        "channel_mean": means,
        "channel_std": deviations,
        "mean": mean,
        "std": math.sqrt(max(0.0, math.fsum(squares) / len(squares) - mean * mean)),
        "largest": max(part["largest"] for part in sums),
    }


def _peak_memory(device: torch.device, share: Share) -> dict[str, int]:
    """The highest memory of a process so far, on its device."""
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with suppress(ImportError):  # on Windows
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peaks = _gather([peak], share)
    return {"peak_memory_bytes": max(peaks)} if max(peaks) else {}
