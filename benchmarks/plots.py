"""Plots of the documentation, from the results of `benchmarks/inference.py` and `benchmarks/compare_families.py`.

    python benchmarks/plots.py        docs/images/bench_area.png, bench_length.png and bench_families.png

Needs matplotlib: `pip install ".[bench]"`.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any


DIRECTIONS = ("encode", "decode")
QUANTITIES = {"seconds": "seconds", "peak_mib": "peak memory (MiB)"}
AXES = {"area": "height x width (pixels), {} frames", "length": "frames of {}x{} pixels"}
# LeanVAE in front, peers thin behind it; colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = (
    "#000000",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#B2A800",
    "#8B4513",
)


def series(rows: list[dict[str, Any]], axis: str, fixed: list[int], direction: str, quantity: str) -> dict[str, list]:
    """The points of each line, at one length (`fixed` = frames) or one area (`fixed` = height and width)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        num_frames, *area = row["video"]
        matches = [num_frames] == fixed if axis == "area" else area == fixed
        if matches and row["direction"] == direction and row.get(quantity):
            name = row["model"] if row["variant"] == "eager" else f"{row['model']}, {row['variant']}"
            x = math.prod(area) if axis == "area" else num_frames
            lines.setdefault(name, []).append((x, row[quantity]))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def draw(rows: list[dict[str, Any]], axis: str, fixed: list[int], target: Path) -> None:
    """Four panels, double logarithmic: cost that is linear has the slope of the grey lines."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 8), sharex=True, layout="constrained")
    colours: dict[str, str] = {}
    for panel_row, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
        for panel, direction in zip(panel_row, DIRECTIONS, strict=True):
            lines = series(rows, axis, fixed, direction, quantity)
            for name, points in lines.items():
                colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
                is_ours = name.startswith("LeanVAE")
                panel.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker="o" if is_ours else ".",
                    linewidth=2 if is_ours else 1,
                    label=name,
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            guide(panel, lines)
            panel.set_title(f"{direction}: {label}")
            panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel(AXES[axis].format(*fixed))
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    print(target)


def draw_families(curves: dict[str, list[dict[str, float]]], target: Path) -> None:
    """Two panels, PSNR on small validation clips over processor time and over steps."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, {"cpu_hours": "processor hours", "step": "steps"}.items(), strict=True):
        for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
            drawn = [point for point in points if point[key] > 0]
            values = [point["psnr_frame_mean_rgb"] for point in drawn]
            panel.plot([point[key] for point in drawn], values, color=colour, marker="o", label=name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR (dB), 128x128")
    panels[1].set_xscale("log")
    panels[0].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    print(target)


def guide(panel: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Lines of slope 1 through the first point of the first line and ten times above."""
    if not lines:
        return
    xs = sorted({x for points in lines.values() for x, _ in points})
    x, y = next(iter(lines.values()))[0]
    for factor in (1, 10):
        panel.plot(xs, [factor * y * other / x for other in xs], color="0.75", linestyle=":", zorder=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=Path("results/bench_inference.json"))
    parser.add_argument("--families", type=Path, default=Path("results/bench_families.json"))
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--models", nargs="*", help="all by default, without LeanVAE-4ch, which costs as LeanVAE-16ch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-frames", type=int, default=17, help="length of the plot over area")
    parser.add_argument("--size", nargs=2, type=int, default=[256, 256], help="height and width of that over length")
    options = parser.parse_args()
    rows = json.loads(options.result.read_text(encoding="utf-8"))["rows"]
    num_threads = max(row["num_threads"] for row in rows)
    models = options.models or {row["model"] for row in rows} - {"LeanVAE-4ch"}
    rows = [row for row in rows if row["model"] in models and row["num_threads"] == num_threads]
    rows = [row for row in rows if row["dtype"] == options.dtype]
    draw(rows, "area", [options.num_frames], options.folder / "bench_area.png")
    draw(rows, "length", options.size, options.folder / "bench_length.png")
    if options.families.is_file():
        curves = json.loads(options.families.read_text(encoding="utf-8"))["curves"]
        draw_families(curves, options.folder / "bench_families.png")


if __name__ == "__main__":
    main()
