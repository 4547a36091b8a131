"""A comparison as files: one HTML page that holds all it shows, JSON, and CSV."""

import base64
import csv
import io
import json
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..atomic import replace_file
from ..video_io import write_video
from ..video_io.pixels import video_grid
from .comparison import Comparison, Example
from .reconstructors import BITS_PER_PIXEL
from .records import Evaluation, Metric
from .results import provenance, write_result


PAGE, VIDEO, TABLE, DATA = "report.html", "side_by_side.mp4", "report.csv", "report.json"
_CROP = 96  # pixels
_LABEL = 18  # height of the names above the pictures of a video
_GAIN = 4.0  # of error maps: an error of a quarter of the range is the brightest
# Points of a map from black over purple and orange to light yellow, evenly spaced.
_HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=torch.float32)


def write_report(folder: str | Path, comparison: Comparison) -> list[Path]:
    """Write `report.html`, `report.json`, `report.csv` and, with examples, `side_by_side.mp4`.

    Args:
        folder: Made if it is not there; older files of these names are replaced.
        comparison: What was measured.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = [evaluation.rounded() for evaluation in comparison.evaluations]
    write_result(folder / DATA, {"evaluations": [evaluation.to_json() for evaluation in evaluations]})
    with replace_file(folder / TABLE) as partial:
        partial.write_text(render_table(evaluations), encoding="utf-8")
    with replace_file(folder / PAGE) as partial:
        partial.write_text(render_page(comparison), encoding="utf-8")
    paths = [folder / PAGE, folder / DATA, folder / TABLE]
    if comparison.examples:
        first = comparison.examples[0]
        write_video(folder / VIDEO, side_by_side(first), first.fps)
        paths.append(folder / VIDEO)
    return paths


def render_table(evaluations: Sequence[Evaluation]) -> str:
    """Write CSV: a line for each subject with its totals (`clip` is empty), then one for each of its clips."""
    names = list(_all_metrics(evaluations))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "clip", *names], lineterminator="\n")
    writer.writeheader()
    for evaluation in evaluations:
        for clip, figures in [("", evaluation.totals), *evaluation.clips.items()]:
            writer.writerow({"model": evaluation.model, "clip": clip, **figures})
    return text.getvalue()


def render_page(comparison: Comparison) -> str:
    """Write the page as HTML; it loads nothing from anywhere else."""
    evaluations = comparison.evaluations
    metrics = _all_metrics(evaluations)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    examples = [_show(example) for example in comparison.examples if example.reconstructions]
    template = files("diffusers_leanvae.evaluation") / "report.html.j2"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        dataset=evaluations[0].dataset,
        protocol=evaluations[0].protocol,
        provenance=provenance(),
        metrics=metrics,
        evaluations=evaluations,
        rows=[_describe(evaluation, metrics) for evaluation in evaluations],
        points=[_point(evaluation) for evaluation in evaluations],
        quality={name: vars(metric) for name, metric in metrics.items() if metric.better is not None},
        best=_best(evaluations, metrics),
        examples=examples,
        pictures=[
            [{"name": "original", "data": example["original"]}]
            + [{"name": model["model"], "data": model["frame"]} for model in example["models"]]
            for example in examples
        ],
        show=_print,
    )


def _all_metrics(evaluations: Sequence[Evaluation]) -> dict[str, Metric]:
    """All metrics that there are figures of, the rate first."""
    found = {name: metric for e in evaluations for name, metric in e.metrics.items() if name in e.totals}
    return {name: found[name] for name in sorted(found, key=lambda name: name != BITS_PER_PIXEL)}


def _print(value: Any, metric: Metric) -> str:
    return "" if value is None else f"{value:.{metric.digits}f}"


def _best(evaluations: Sequence[Evaluation], metrics: dict[str, Metric]) -> dict[str, str]:
    """The best figure of the trained models by metric, as it is printed; none where there is nothing to choose."""
    trained = [e.totals for e in evaluations if _kind(e) == "trained"]
    best = {}
    for name, metric in metrics.items():
        values = [totals[name] for totals in trained if name in totals]
        if metric.better is not None and len(values) > 1:
            best[name] = _print(max(values) if metric.better == "higher" else min(values), metric)
    return best


def _kind(evaluation: Evaluation) -> Literal["codec", "random", "trained"]:
    """Tell a codec from an autoencoder with random weights, and from one that was trained."""
    if "codec" in evaluation.about:
        return "codec"
    return "random" if evaluation.about.get("weights") == "random" else "trained"


def _describe(evaluation: Evaluation, metrics: dict[str, Metric]) -> dict[str, Any]:
    """Lay out a line of the table."""
    about, timing = evaluation.about, evaluation.timing or {}
    count = about.get("num_parameters")
    return {
        "model": evaluation.model,
        "kind": _kind(evaluation),
        "class": about.get("class", about.get("codec", "")),
        "parameters": None if count is None else count / 1e6,
        "latent_channels": about.get("latent_channels"),
        "figures": {name: evaluation.totals.get(name) for name in metrics},
        "encode": _speed(timing.get("encode_frames_per_second")),
        "decode": _speed(timing.get("decode_frames_per_second")),
    }


def short_name(model: str) -> str:
    """Shorten the name of a subject for a picture: without folders, and of a codec without its unit."""
    return model.removesuffix(" bit/px") if " at " in model else model.rstrip("/").split("/")[-1]


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _point(evaluation: Evaluation) -> dict[str, Any]:
    timing = evaluation.timing or {}
    rates = [timing.get(f"{way}_frames_per_second") or 0.0 for way in ("encode", "decode")]
    return {
        "model": evaluation.model,
        "label": short_name(evaluation.model),
        "kind": _kind(evaluation),
        "rate": evaluation.totals.get(BITS_PER_PIXEL),
        "seconds": sum(1 / rate for rate in rates) if all(rates) else None,
        "figures": evaluation.totals,
    }


# --- Pictures --------------------------------------------------------------------------------------------------------


def side_by_side(example: Example) -> torch.Tensor:
    """Lay out the original and all reconstructions in a grid, a name above each: uint8 `(T, height, width, 3)`."""
    videos = {"original": example.original} | example.reconstructions
    grid = video_grid(torch.stack([_with_label(video, short_name(name)) for name, video in videos.items()]))
    height, width = (size - size % 2 for size in grid.shape[1:3])  # for players that take even sizes only
    return grid[:, :height, :width]


def _with_label(video: torch.Tensor, text: str) -> torch.Tensor:
    picture = Image.new("RGB", (video.shape[2], _LABEL), "black")
    ImageDraw.Draw(picture).text((4, 3), text, fill="white", font=ImageFont.load_default(11))
    label = torch.tensor(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, _LABEL, -1, 3)
    return torch.cat((label.expand(len(video), -1, -1, -1), video), dim=1)


def error_map(decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Show the mean absolute error over RGB of uint8 frames `(height, width, 3)` as colours, black for none."""
    error = (decoded.float() - original.float()).abs().mean(dim=-1) / 255
    place = (error * _GAIN).clamp(0, 1) * (len(_HEAT) - 1)
    below = place.floor().clamp(max=len(_HEAT) - 2).long()
    return torch.lerp(_HEAT[below], _HEAT[below + 1], (place - below).unsqueeze(-1)).round().byte()


def find_crop(example: Example, size: int = _CROP) -> tuple[int, int, int]:
    """Find where most reconstructions err most: frame, top and left of a square. A few useless ones do not count."""
    frame = len(example.original) // 2
    height, width = example.original.shape[1:3]
    decoded = torch.stack([video[frame] for video in example.reconstructions.values()]).float()
    error = (decoded - example.original[frame].float()).abs().mean(dim=-1).median(dim=0).values
    sums = F.avg_pool2d(error[None, None], (min(size, height), min(size, width)), stride=8)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return frame, 8 * top, 8 * left


def _show(example: Example) -> dict[str, Any]:
    """Make the pictures and the video of an example, as addresses that hold their data."""
    frame, top, left = find_crop(example)

    def cut(picture: torch.Tensor) -> torch.Tensor:
        return picture[top : top + _CROP, left : left + _CROP]

    original = example.original[frame]
    models = [
        {
            "model": short_name(name),
            "frame": _picture(video[frame]),
            "crop": _picture(cut(video[frame])),
            "error": _picture(cut(error_map(video[frame], original))),
        }
        for name, video in example.reconstructions.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VIDEO)
        write_video(path, side_by_side(example), example.fps)
        video = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    return {
        "clip": example.clip,
        "frame": frame,
        "models": models,
        "original": _picture(original),
        "crop": _picture(cut(original)),
        "video": video,
    }


def _picture(pixels: torch.Tensor) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def read_report(path: str | Path) -> list[Evaluation]:
    """Read the evaluations of a `report.json`.

    Raises:
        ValueError: If it is none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return [Evaluation.from_json(evaluation) for evaluation in data["evaluations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`path` must be a report.json of `leanvae eval --report`, got {str(path)!r}.") from error
