"""Published numbers are those of results/: tables regenerate without a difference, for the weights shipped."""

import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusers_leanvae import bundled
from diffusers_leanvae.checks import sha256


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "render_tables.py"
VALIDATION = "results/val-17x256_compact-16ch.json"


def render_tables(*arguments: object) -> tuple[int, str]:
    result = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    for page in ("README.md", "model_card.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    for folder in ("docs", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_pages_say_what_the_results_say():
    code, difference = render_tables("--check")
    assert code == 0, f"run `make tables`:\n{difference}"


def test_a_changed_number_is_found(pages: Path):
    assert render_tables("--check", "--root", pages) == (0, "")
    before = {page: (pages / page).read_text() for page in ("README.md", "model_card.md")}
    change(pages / VALIDATION, psnr_frame_mean_rgb=12.345)
    code, difference = render_tables("--check", "--root", pages)
    assert code == 1
    assert all(re.search(rf"^\+\+\+ {page}$", difference, re.MULTILINE) for page in before)
    assert all((pages / page).read_text() == text for page, text in before.items())  # checking writes nothing
    assert render_tables("--root", pages)[0] == 0
    assert all("**12.3" in (pages / page).read_text() for page in before)
    assert render_tables("--check", "--root", pages) == (0, "")


def test_the_hub_reads_the_figures_from_the_card(pages: Path):
    """The pair of models is in one card, which `huggingface_hub` takes for one model at a time."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results

    change(pages / VALIDATION, psnr_frame_mean_rgb=12.345)
    assert render_tables("--root", pages)[0] == 0
    text = (pages / "model_card.md").read_text()
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    assert [model["name"] for model in index] == list(bundled.MODELS)
    for model in index:
        written = json.loads((pages / "results" / f"val-17x256_{model['name']}.json").read_text())
        _, found = model_index_to_eval_results([model])
        assert {result.metric_type: result.metric_value for result in found} == {
            name: written[name] for name in ("psnr_frame_mean_rgb", "ssim_frame_mean_rgb")
        }
    assert ModelCard(text).data.license == "apache-2.0"


def test_a_number_typed_by_hand_is_found(pages: Path):
    text = (pages / "README.md").read_text()
    mean = re.search(r"\| \*\*mean\*\* \| \*\*([\d.]+)\*\*", text)
    assert mean is not None
    (pages / "README.md").write_text(text[: mean.start(1)] + "99.99" + text[mean.end(1) :])
    assert render_tables("--check", "--root", pages)[0] == 1


def test_other_models_become_columns_and_rows_become_tables(pages: Path):
    other = pages / "results" / "val-17x256_other.json"
    shutil.copy(pages / VALIDATION, other)
    change(other, model="other-4ch", psnr_frame_mean_rgb=23.456)
    rows = [
        {"clip": "17x256x256", "tiled": False, "tile": [64, 32], "peak_mb": 1234.5},
        {"clip": "17x512x512", "tiled": True},
    ]
    (pages / "results" / "bench_memory.json").write_text(json.dumps({"rows": rows}))
    page = pages / "README.md"
    names = ("validation", "bench_memory", "no_such_file")
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end table -->\n" for name in names))
    assert render_tables("--root", pages)[0] == 0
    text = page.read_text()
    models = ("compact-16ch", "compact-4ch", "other-4ch")
    assert f"| clip | {' | '.join(f'{model}, PSNR (dB) | {model}, SSIM' for model in models)} |" in text
    assert "**23.46**" in text
    assert "| clip | tiled | tile | peak mb |" in text
    assert "| 17x256x256 | no | 64x32 | 1,234 |" in text and "| 17x512x512 | yes |  |  |" in text
    assert text.endswith("<!-- table: no_such_file -->\n<!-- end table -->\n")


def test_inference_tables_put_sizes_side_by_side_and_say_what_failed(pages: Path):
    rows = []
    for size, factor in ((256, 1.0), (512, 4.0)):
        for direction in ("encode", "decode"):
            common = {"dtype": "float32", "num_threads": 2, "video": [17, size, size], "direction": direction}
            rows.append({"model": "LeanVAE-16ch", "variant": "fused"} | common)
            rows[-1] |= {"seconds": factor, "peak_mib": 30.5, "giga_multiply_adds": 100 * factor}
            rows[-1] |= {"num_parameters": 39_800_000, "floor_seconds": factor / 2, "time_over_floor": 2.0}
            rows.append({"model": "AutoencoderKLWan", "variant": "eager"} | common)
            rows[-1] |= {"note": "does not fit"} if size == 512 else {"seconds": 9.0, "peak_mib": 2000.0}
    linearity = [{"model": "LeanVAE-16ch", "dtype": "float32", "axis": "area", "exponent": 1.02}]
    path = pages / "results" / "bench_inference.json"
    path.write_text(json.dumps({"rows": rows, "linearity": linearity}))
    for name in ("area", "length"):
        (pages / "docs" / "images" / f"bench_{name}.png").unlink(missing_ok=True)
    (pages / "docs" / "images" / "bench_area.png").touch()
    assert render_tables("--root", pages)[0] == 0
    text = (pages / "docs" / "benchmarks.md").read_text()
    assert (
        "| LeanVAE-16ch | fused | float32 | 2 | 39.8 | 0.2 | 1 | 1 | 30.5 | 30.5 | 0.8 | 4 | 4 | 30.5 | 30.5 |" in text
    )
    assert "| AutoencoderKLWan | eager | float32 | 2 |  |  | 9 | 9 | 2,000 | 2,000 |  |  |  |  |  |" in text
    assert "AutoencoderKLWan, eager, decode of 17x512x512: does not fit." in text
    assert "| LeanVAE-16ch | fused | float32 | 2 | 17x512x512 | 4 | 2 | 2 | 4 | 2 | 2 |" in text
    assert "| LeanVAE-16ch | area | 1.02 |" in text
    assert "](images/bench_area.png)" in text and "bench_length.png)" not in text.split("Cost over length")[1]


@pytest.mark.parametrize("model", bundled.MODELS)
def test_measured_are_the_weights_that_are_shipped(model: str):
    path = ROOT / f"results/val-17x256_{model}.json"
    weights = bundled.model_path(model) / "diffusion_pytorch_model.safetensors"
    measured = json.loads(path.read_text())["weights_sha256"]
    assert measured == sha256(weights), f"measure again: see results/README.md ({path})"


def test_bundled_weights_are_small_and_as_good_as_published():
    sizes = [path.stat().st_size for model in bundled.MODELS for path in bundled.model_path(model).iterdir()]
    assert sum(sizes) <= 25e6
    for model, least in (("compact-16ch", 32.0), ("compact-4ch", 24.8)):
        result = json.loads((ROOT / f"results/val-17x256_{model}.json").read_text())
        assert result["psnr_frame_mean_rgb"] >= least


@pytest.mark.parametrize("dtype, limit", [("float32", 1.2), ("bfloat16", 1.3)])
def test_fused_is_near_the_matrix_product_floor(dtype: str, limit: float):
    rows = json.loads((ROOT / "results/bench_inference.json").read_text())["rows"]
    wanted = {"model": "LeanVAE-16ch", "variant": "fused", "dtype": dtype, "num_threads": 2}
    for size in (256, 512):
        ours = [row for row in rows if row.items() >= wanted.items() and row["video"] == [17, size, size]]
        assert sorted(row["direction"] for row in ours) == ["decode", "encode"]
        for row in ours:
            assert row["time_over_floor"] <= limit and row["repeats"] >= 8
            assert row["peak_mib"] <= 150 * 1e6 / 2**20 or size == 512


def test_leanvae_is_first_on_time_and_memory():
    rows = json.loads((ROOT / "results/bench_inference.json").read_text())["rows"]
    for size in (256, 512):
        for direction in ("encode", "decode"):
            here = [row for row in rows if row["video"] == [17, size, size] and row["direction"] == direction]
            ours = next(row for row in here if row["model"] == "LeanVAE-16ch" and row["variant"] == "fused")
            peers = [row for row in here if row["model"].startswith("Autoencoder")]
            assert len(peers) == 6  # each measured, or its row says that the machine's memory was not enough
            for row in peers:
                if "needs more than" not in row.get("note", ""):
                    assert row["seconds"] > ours["seconds"] and row["peak_mib"] > ours["peak_mib"]


def test_picture_is_small():
    assert 10_000 < (ROOT / "docs" / "images" / "demo.jpg").stat().st_size <= 250_000


SIBLINGS = ("wf_vae_compact", "wf_vae_s_8ch", "iv_vae_compact", "iv_vae_4ch")


@pytest.fixture(scope="module")
def memory_rows() -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((ROOT / "results" / "bench_memory.json").read_text())["rows"]
    return {(row["case"], row["direction"]): row for row in rows}


def test_memory_is_as_the_planner_predicts(memory_rows):
    ratios = {
        key: row["predicted_mib"] / row["peak_mib"] for key, row in memory_rows.items() if "predicted_mib" in row
    }
    assert len(ratios) >= 25
    assert all(0.8 <= ratio <= 1.2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("model", SIBLINGS)
def test_memory_of_siblings_is_as_the_planner_predicts(model):
    rows = json.loads((ROOT / f"results/bench_memory_{model}.json").read_text())["rows"]
    found = {(row["case"], row["direction"]): (row["predicted_mib"], row["peak_mib"]) for row in rows}
    assert len(found) >= 2
    for (case, _), (predicted, peak) in found.items():
        limit = 0.2 if case.startswith(("tiled", "stream")) else 0.1
        assert abs(predicted - peak) <= limit * peak, found
    bounds = [(row["peak_mib"], row["max_mib"]) for row in rows if row["direction"] == "reconstruct"]
    assert bool(bounds) == model.endswith("compact") and all(peak < bound for peak, bound in bounds)


@pytest.mark.parametrize(
    "name",
    [
        "bench_memory",
        "bench_memory_leanvae_compact",
        *(pytest.param(f"bench_memory_{model}", marks=pytest.mark.slow) for model in SIBLINGS),
    ],
)
def test_predictions_are_those_of_the_planner_of_today(name):
    result = json.loads((ROOT / f"results/{name}.json").read_text())
    again = copy.deepcopy(result["rows"])
    for row in again:
        row.pop("predicted_mib", None)
    model = result["model"].split(",")[0]
    runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))["predict"](again, model, result["num_threads"])
    assert again == result["rows"], f"run `python benchmarks/memory.py --model {model} --cases`"


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_of_a_stream_does_not_grow_with_its_length(memory_rows, direction):
    peaks = [memory_rows[f"stream-{n}", direction]["peak_mib"] for n in (17, 121, 1001)]
    assert max(peaks) < 1.1 * min(peaks), peaks
    assert all(memory_rows[f"stream-{n}", direction]["difference"] <= 1e-5 for n in (1, 5, 17, 121))


def test_large_videos_stay_within_their_bounds(memory_rows):
    for case, video, bound in (
        ("reconstruct-17x1080p", [17, 1080, 1920], 2048),
        ("reconstruct-17x2160p", [17, 2160, 3840], 3072),
        ("reconstruct-33x512-parked", [33, 512, 512], 400),
    ):
        row = memory_rows[case, "reconstruct"]
        assert row["video"] == video and row["max_mib"] == bound and row["parked"] == case.endswith("parked")
        assert row["peak_mib"] < bound


def test_tiling_costs_about_the_halos(memory_rows):
    rows = [row for row in memory_rows.values() if row["case"].startswith("tiled-5x1080p")]
    assert len({tuple(row["tile"]) for row in rows}) == 3 and len(rows) == 6
    for row in rows:
        assert 0.8 * row["work"] < row["time_ratio"] < 1.25 * row["work"], row
