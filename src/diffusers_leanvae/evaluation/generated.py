"""Frechet video distance between generated and real videos, in any two folders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..checks import one_line
from ..video_io.pixels import sample_to_pixels
from .clips import list_clips, read_clip
from .features import VideoFeatures, distance_metric
from .frechet import frechet_distance
from .measures import MetricOptions, make_measures
from .protocols import PROTOCOLS, Protocol, first_frames
from .records import Evaluation


_DISTANCES = ("rfvd_i3d", "rfvd_features")


@torch.no_grad()
def evaluate_generated(
    generated: str | Path,
    real: str | Path,
    protocol: Protocol = PROTOCOLS["fvd2048_16f"],
    options: MetricOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure FVD between two sets of videos.

    Of real videos the clips are those of the protocol, of generated ones the first frames, at the same size. Each
    process that calls does all the work.

    Args:
        generated: As of [`clips.list_clips`].
        real: The same.
        protocol: Size and number of the clips; of its metrics those of features count.
        options: Where the networks come from; a `feature_model` is used whether the protocol names it or not.
        device: Where they compute.
        progress: Called with a line for each file that failed.

    Returns:
        The evaluation: `model` is the generated side, `dataset` the real one. The names of figures begin with `fvd_`;
        files that failed are named by side.

    Raises:
        ValueError: If no network can be had, or a side has fewer than two usable clips.
    """
    options = options or MetricOptions()
    wanted = [kind for kind in _DISTANCES if kind in protocol.metrics]
    if options.feature_model is not None and "rfvd_features" not in wanted:
        wanted.append("rfvd_features")
    if not wanted:
        raise ValueError(
            f"`protocol` must have a metric of {', '.join(_DISTANCES)}, got {', '.join(protocol.metrics)}."
        )
    measures = make_measures(wanted, options, device)
    networks = list(measures.features.values())
    for network in networks:
        protocol.check_features(network)
    if not networks:
        raise ValueError(" ".join(measures.missing.values()))
    failed: dict[str, str] = {}
    sides = {}
    for side, source, choices in (("generated", generated, first_frames(protocol)), ("real", real, protocol)):
        sides[side] = _features(side, source, choices, networks, failed, progress)
    metrics = {f"fvd_{network.name}": distance_metric(network, is_reconstruction=False) for network in networks}
    totals = {}
    for index, name in enumerate(metrics):
        features, others = (torch.stack([clip[index] for clip in side.values()]) for side in sides.values())
        totals[name] = frechet_distance(features, others)
    return Evaluation(
        model=Path(generated).name,
        dataset=Path(real).name,
        protocol=protocol.to_json(),
        metrics=metrics,
        totals=totals,
        clips={name: {} for name in sides["generated"]},
        about={"num_generated": len(sides["generated"]), "num_real": len(sides["real"])},
        failed=failed,
        missing=measures.missing,
    )


def _features(
    side: str,
    source: str | Path,
    protocol: Protocol,
    networks: Sequence[VideoFeatures],
    failed: dict[str, str],
    progress: Callable[[str], None] | None,
) -> dict[str, list[torch.Tensor]]:
    """Return the features of each clip, by each network."""
    features = {}
    for clip in list_clips(source, protocol):
        try:
            with clip.open() as video:
                sample = read_clip(video, protocol, clip.name)
        except Exception as error:  # whatever a foreign file does to the reader, the others are still to be measured
            failed[f"{side}: {clip.name}"] = one_line(error)
            if progress is not None:
                progress(f"{side}: {clip.name} failed: {one_line(error)}")
            continue
        pixels = sample_to_pixels(sample[:, : protocol.num_feature_frames]).transpose(0, 1)
        features[clip.name] = [network(pixels) for network in networks]
    if len(features) < 2:
        raise ValueError(f"`{side}` must hold at least two usable videos, got {len(features)} in {str(source)!r}.")
    return features
