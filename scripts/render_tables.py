"""Write the tables of README.md, model_card.md, docs/ and results/README.md, and the picture of README.md.

    python scripts/render_tables.py            # rewrite the tables (`make tables`)
    python scripts/render_tables.py --check    # change nothing, exit 1 if a table is not what results/ says
    python scripts/render_tables.py --picture outputs/demo/frames.png    # docs/images/demo.jpg, after `leanvae demo`

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. NAME is a key of `TABLES`, or the stem of a
results file with a list of flat `rows`, such as `bench_memory`; without its file such a table is empty.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "model_card.md",
    "results/README.md",
    "docs/benchmarks.md",
    "docs/diffusers_pipelines.md",
    "docs/install.md",
    "docs/siblings.md",
    "docs/speed.md",
)
REGION = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
# The same in the YAML at the head of a card.
METADATA = re.compile(r"(^# data: (\w+)\n)(.*?)(^# end data$)", re.DOTALL | re.MULTILINE)
PICTURE, PICTURE_BYTES = "docs/images/demo.jpg", 250_000
PSNR, SSIM = "psnr_frame_mean_rgb", "ssim_frame_mean_rgb"
BUNDLED = ("compact-16ch", "compact-4ch")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table; columns that hold only numbers are aligned to the right."""

    def is_number(column: int) -> bool:
        return bool(rows) and all(
            re.fullmatch(r"[-+]?[\d,.]*( [a-zA-Z]+)?|\*\*[\d.]+\*\*", row[column]) for row in rows
        )

    rule = ["---:" if is_number(column) else "---" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def source_line(path: Path, result: dict[str, Any]) -> str:
    """Origin of a number: the file, the machine and the command."""
    where = result.get("provenance")
    if not where:
        return f"From `results/{path.name}`.\n"
    device = where.get("gpu") or f"{where['processor']}, threads: {where['num_threads']}"
    torch = where["packages"].get("torch", "?")
    return f"From `results/{path.name}`: `{where['command']}`, {device}, torch {torch}, {where['date']}.\n"


def validation_results(results: Path) -> dict[Path, dict[str, Any]]:
    """Every result of the protocol; the bundled models first."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("val-17x256_*.json"))}
    if not found:
        raise FileNotFoundError(f"`results` must hold a file val-17x256_*.json, got none in {results}.")
    order = {model: number for number, model in enumerate(BUNDLED)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[1]["model"], len(order))))


def validation(results: Path) -> str:
    found = validation_results(results)
    first = next(iter(found.values()))
    names = [f"{result['model']}, " if len(found) > 1 else "" for result in found.values()]
    header = ["clip", *(f"{name}{metric}" for name in names for metric in ("PSNR (dB)", "SSIM"))]
    rows = [
        [f"`{clip}`", *(cell for result in found.values() for cell in scores(result["clips"][clip]))]
        for clip in first["clips"]
    ]
    rows.append(["**mean**", *(f"**{cell}**" for result in found.values() for cell in scores(result))])
    protocol = (
        f"{first['num_videos']} clips, first {first['num_frames']} frames, short side resized to "
        f"{first['resolution']}, centre crop; posterior means, {first['dtype']}; per frame over RGB, then the mean "
        "over frames and clips.\n"
    )
    for result in found.values():
        protocol += (
            f"`{result['model']}`: {millions(result)} M parameters, {result['latent_channels']} latent channels.\n"
        )
    sources = "".join(source_line(path, result) for path, result in found.items())
    return f"{markdown_table(header, rows)}\n{protocol}\n{sources}"


def model_index(results: Path) -> str:
    """The figures of the bundled models as the Hub takes them from a card: YAML."""
    lines = ["model-index:"]
    for path, result in validation_results(results).items():
        if result["model"] not in BUNDLED:
            continue
        name = path.stem.split("_")[0]
        lines += [
            f"- name: {result['model']}",
            "  results:",
            "  - task:",
            "      type: video-reconstruction",
            "      name: Video reconstruction",
            "    dataset:",
            f"      type: {name}",
            f"      name: {result['num_videos']} clips, {name}",
            "    metrics:",
        ]
        for metric, label in ((PSNR, "PSNR (dB)"), (SSIM, "SSIM")):
            lines += [f"    - type: {metric}", f"      name: {label}", f"      value: {result[metric]}"]
    return "\n".join(lines) + "\n"


def millions(result: dict[str, Any]) -> str:
    return f"{result['num_parameters'] / 1e6:.1f}"


def scores(result: dict[str, Any]) -> list[str]:
    return [f"{result[PSNR]:.2f}", f"{result[SSIM]:.4f}"]


def weights(results: Path) -> str:
    found = [result for result in validation_results(results).values() if result["model"] in BUNDLED]
    rows = [
        ["parameters", *(f"{millions(result)} M" for result in found)],
        ["latent channels", *(str(result["latent_channels"]) for result in found)],
        ["SHA-256 of the weights", *(f"`{result['weights_sha256'][:16]}...`" for result in found)],
    ]
    for number, (name, _) in enumerate(STAGES):
        cost = [training_cost(training_log(results, result["model"], number)) for result in found]
        if any(cost):
            rows.append([f"{name}: steps, hours of one process", *cost])
    return markdown_table(["bundled weights", *(result["model"] for result in found)], rows)


# Runs that made the bundled weights, one after another, and the endings of their logs.
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth"
).split()
STAGES = tuple((f"{name} run", f"_training_{i}.jsonl") for i, name in enumerate(ORDINALS, 1))


def training_cost(log: list[dict[str, Any]]) -> str:
    hours, last = 0.0, 0
    for record in log:
        if "seconds_per_step" in record:
            seconds = record.get("cpu_seconds_per_step", record["seconds_per_step"])  # older logs: of the clock
            hours += (record["step"] - last) * seconds / 3600
            last = record["step"]
    return f"{last:,}, {hours:.2f}" if last else ""


def training_log(results: Path, model: str, stage: int) -> list[dict[str, Any]]:
    path = results / f"{model}{STAGES[stage][1]}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return sorted((json.loads(line) for line in lines), key=lambda record: record["step"])


def training(results: Path) -> str:
    """The validation curves of the training runs; about eight columns each."""
    tables = []
    for model in BUNDLED:
        for number, (name, ending) in enumerate(STAGES):
            curve = [record for record in training_log(results, model, number) if PSNR in record]
            if curve:
                chosen = [curve[i] for i in sorted({round(i * (len(curve) - 1) / 7) for i in range(8)})]
                header = [f"{model}, {name}: step", *(f"{record['step']:,}" for record in chosen)]
                row = ["PSNR (dB)", *(f"{record[PSNR]:.2f}" for record in chosen)]
                tables.append(f"{markdown_table(header, [row])}\nFrom `results/{model}{ending}`.\n")
    return "\n".join(tables)


def rows_table(results: Path, name: str) -> str:
    """Any file that holds a list of flat dictionaries under `rows`, one column for each key."""
    path = results / f"{name}.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    keys = list(dict.fromkeys(key for row in result["rows"] for key in row))
    rows = [[cell(row.get(key)) for key in keys] for row in result["rows"]]
    about = [f"{key.replace('_', ' ')}: {value}. " for key, value in result.items() if isinstance(value, str)]
    table = markdown_table([key.replace("_", " ") for key in keys], rows)
    return f"{table}\n{''.join(about)}{source_line(path, result)}"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "x".join(map(cell, value))
    if isinstance(value, float):
        return f"{value + 0.0:.4g}" if abs(value) < 1000 else f"{value:,.0f}"  # no minus before zero
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


INFERENCE_SIZES = ([17, 256, 256], [17, 512, 512])
EFFICIENCY_SIZES = (*INFERENCE_SIZES, [17, 768, 768])  # those of the paper's Table 4


def subjects(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]]:
    """Rows of `bench_inference.json` by model, variant, dtype and threads, then by direction and size."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        subject = tuple(row[key] for key in ("model", "variant", "dtype", "num_threads"))
        found.setdefault(subject, {})[row["direction"], *row["video"]] = row
    return found


def inference(results: Path, name: str = "bench_inference", sizes: Sequence[list[int]] = INFERENCE_SIZES) -> str:
    """Every autoencoder at some of the paper's sizes, one line each."""
    path = results / f"{name}.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    header = ["model", "variant", "dtype", "threads", "parameters (M)"]
    for _, height, _ in sizes:
        header += [f"{height}: multiply-adds (T)", "encode (s)", "decode (s)", "encode (MiB)", "decode (MiB)"]
    lines, notes = [], []
    for subject, by_call in subjects(result["rows"]).items():
        calls = [[by_call.get((direction, *size), {}) for direction in ("encode", "decode")] for size in sizes]
        if not any(call for pair in calls for call in pair):
            continue
        known = next((call for pair in calls for call in pair if "num_parameters" in call), None)
        line = [*map(cell, subject), f"{known['num_parameters'] / 1e6:.1f}" if known else ""]
        for pair in calls:
            work = [call["giga_multiply_adds"] for call in pair if "giga_multiply_adds" in call]
            line.append(f"{sum(work) / 1e3:.3g}" if len(work) == 2 else "")
            line += [cell(call.get(key)) for key in ("seconds", "peak_mib") for call in pair]
        lines.append(line)
        notes += [
            f"{subject[0]}, {subject[1]}, {direction} of {cell(list(size))}: {call['note']}.\n"
            for (direction, *size), call in by_call.items()
            if "note" in call and size in sizes
        ]
    heights = ", ".join(f"{height}x{width}" for _, height, width in sizes)
    about = f"17 frames of {heights}; peak memory above weights and input, the result counted.\n"
    return f"{markdown_table(header, lines)}\n{about}{''.join(notes)}\n{source_line(path, result)}"


def inference_floor(results: Path, name: str = "bench_inference") -> str:
    """LeanVAE next to its matrix products, one line for each variant and size."""
    path = results / f"{name}.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    header = ["model", "variant", "dtype", "threads", "video"]
    for direction in ("encode", "decode"):
        header += [f"{direction} (s)", "floor (s)", "time / floor"]
    lines = []
    for subject, by_call in subjects(result["rows"]).items():
        for size in INFERENCE_SIZES:
            pair = [by_call.get((direction, *size), {}) for direction in ("encode", "decode")]
            if any("time_over_floor" in call for call in pair):
                keys = ("seconds", "floor_seconds", "time_over_floor")
                lines.append([*map(cell, (*subject, size)), *(cell(call.get(key)) for call in pair for key in keys)])
    return f"{markdown_table(header, lines)}\n{source_line(path, result)}"


def gpu(results: Path) -> str:
    """Every variant on a GPU, encoding and decoding in one line."""
    path = results / "bench_gpu.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = {
        "ms": "seconds",
        "share of peak": "share_of_peak",
        "MiB": "peak_mib",
        "over eager float32": "speed_up_over_eager_float32",
        "over eager bfloat16": "speed_up_over_eager_bfloat16",
    }
    header = ["video", "variant", "dtype", *(f"{way}: {name}" for way in ("encode", "decode") for name in columns)]
    calls: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        calls.setdefault((cell(row["video"]), row["variant"], row["dtype"]), {})[row["direction"]] = row
    lines = []
    for subject, pair in calls.items():
        line = list(subject)
        for row in (pair.get("encode", {}), pair.get("decode", {})):
            figures = row | ({"seconds": 1e3 * row["seconds"]} if "seconds" in row else {})
            line += [cell(figures.get(key)) for key in columns.values()]
        lines.append(line)
    peaks = ", ".join(f"{dtype} {cell(peak)}" for dtype, peak in result["peak_tflops"].items())
    about = f"Peak: the fastest square matrix product measured there, in TFLOP/s: {peaks}.\n"
    return f"{markdown_table(header, lines)}\n{about}\n{source_line(path, result)}"


def inference_linearity(results: Path) -> str:
    """Growth of cost, and the plots if there are any."""
    path = results / "bench_inference.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    fits = result["linearity"]
    keys = [key for key in (fits[0] if fits else {}) if key not in ("dtype", "num_threads")]
    table = markdown_table([key.replace("_", " ") for key in keys], [[cell(fit[key]) for key in keys] for fit in fits])
    images = [f"images/bench_{axis}.png" for axis in ("area", "length")]
    shown = [
        f"![Time and memory over {image[13:-4]}]({image})\n\n"
        for image in images
        if (results.parent / "docs" / image).is_file()
    ]
    return f"{''.join(shown)}{table}\n{source_line(path, result)}"


def memory_of_models(results: Path) -> str:
    """Predicted and measured memory of the models that have a file of their own, next to each other."""
    header = ["model", "case", "direction", "tile", "bound (MiB)", "predicted (MiB)", "measured (MiB)", "ratio"]
    lines, sources = [], ""
    for path in sorted(results.glob("bench_memory_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        model = result["model"].split(",")[0]
        for row in result["rows"]:
            figures = [cell(row.get(key)) for key in ("tile", "max_mib", "predicted_mib", "peak_mib")]
            ratio = f"{row['predicted_mib'] / row['peak_mib']:.2f}"
            lines.append([model, row["case"], row["direction"], *figures, ratio])
        sources += "\n" + (f"Peaks: {result['peaks']}. " if "peaks" in result else "") + source_line(path, result)
    return f"{markdown_table(header, lines)}{sources}" if lines else ""


ARTEFACTS = (
    "grid_ratio_window_mean_rgb",
    "flat_std_255_patch16",
    "flat_std_255_patch16_worst",
    "ghost_weight",
    "ghost_weight_worst",
)


def artefacts(results: Path) -> str:
    """Grids and ghosts of the bundled models, clip by clip; a clip without flat patches or jumps has none."""
    paths = [path for model in BUNDLED if (path := results / f"artefacts_{model}.json").is_file()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        return ""
    header = [f"{result['model']}, {result['metrics'][name]['label']}" for result in found for name in ARTEFACTS]

    def line(name: str, figures: list[dict[str, Any]]) -> list[str]:
        cells = [f"{part[key]:.3f}" if key in part else "" for part in figures for key in ARTEFACTS]
        return [name, *cells]

    rows = [line(f"`{clip}`", [result["clips"][clip] for result in found]) for clip in found[0]["clips"]]
    rows.append(line("mean", found))
    return f"{markdown_table(['clip', *header], rows)}\n{''.join(map(source_line, paths, found))}"


def families(results: Path) -> str:
    """LeanVAE and its siblings trained alike, also by the place of a frame in its group, and their curves."""
    path = results / "bench_families.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = {"PSNR (dB)": PSNR, "SSIM": SSIM, "first frame": f"{PSNR}_first"}
    columns |= {f"{place} of 4": f"{PSNR}_group_{place}" for place in range(1, 5)}
    header = ["model", "parameters (M)", "steps", "processor hours", *columns]
    rows = [
        [row["run"], f"{row['num_parameters'] / 1e6:.2f}", f"{row['num_steps']:,}", f"{row['cpu_hours']:.2f}"]
        + [f"{row[key]:.3f}" if key == SSIM else f"{row[key]:.2f}" for key in columns.values()]
        for row in result["rows"]
    ]
    image = "images/bench_families.png"
    shown = f"![PSNR over time and over steps]({image})\n\n" if (results.parent / "docs" / image).is_file() else ""
    return f"{markdown_table(header, rows)}\n{shown}{source_line(path, result)}"


def wheel_check(results: Path) -> str:
    """What was installed and run of the wheel, by Pythons, and its size."""
    path = results / "wheel_check.json"
    if not path.is_file():
        return ""
    num_bytes = json.loads(path.read_text(encoding="utf-8"))["num_bytes"]
    return f"The wheel has {num_bytes / 1e6:.1f} MB.\n\n{rows_table(results, path.stem)}"


TABLES = {
    "validation": validation,
    "weights": weights,
    "training": training,
    "inference": inference,
    "efficiency": partial(inference, name="bench_efficiency", sizes=EFFICIENCY_SIZES),
    "inference_floor": inference_floor,
    "inference_floor_amx": partial(inference_floor, name="bench_inference_amx"),
    "inference_floor_avx512": partial(inference_floor, name="bench_inference_avx512"),
    "inference_floor_avx512_fast": partial(inference_floor, name="bench_inference_avx512_fast"),
    "gpu": gpu,
    "inference_linearity": inference_linearity,
    "memory_of_models": memory_of_models,
    "artefacts": artefacts,
    "families": families,
    "wheel_check": wheel_check,
}


DATA = {"model_index": model_index}


def render(text: str, results: Path) -> str:
    """The page with every region rewritten."""

    def region(match: re.Match[str]) -> str:
        name = match[2]
        table = TABLES[name](results) if name in TABLES else rows_table(results, name)
        return match[1] + (f"\n{table}\n" if table else "") + match[4]

    text = METADATA.sub(lambda match: match[1] + DATA[match[2]](results) + match[4], text)
    return REGION.sub(region, text)


def write_picture(frames: Path, target: Path) -> None:
    """A JPEG of at most `PICTURE_BYTES`: the best quality that fits."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(frames).convert("RGB")
    for quality in range(95, 40, -5):
        picture.save(target, quality=quality, optimize=True, subsampling=0)
        if target.stat().st_size <= PICTURE_BYTES:
            print(f"{target}  {picture.width}x{picture.height}  {target.stat().st_size:,} bytes")
            return
    raise ValueError(f"`frames` must fit into {PICTURE_BYTES} bytes as a JPEG, got {target.stat().st_size}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a table would change")
    parser.add_argument("--picture", type=Path, metavar="FRAMES", help=f"write {PICTURE} from this picture, and stop")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages and of results/")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        write_picture(arguments.picture, arguments.root / PICTURE)
        return 0
    status = 0
    for page in PAGES:
        path = arguments.root / page
        text = path.read_text(encoding="utf-8")
        rendered = render(text, arguments.root / "results")
        if rendered == text:
            continue
        if arguments.check:
            sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), rendered.splitlines(True), page, page))
            status = 1
        else:
            path.write_text(rendered, encoding="utf-8")
            print(f"{page}: tables written")
    return status


if __name__ == "__main__":
    sys.exit(main())
