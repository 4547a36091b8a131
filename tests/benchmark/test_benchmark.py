"""Benchmarks measure what they say: work, floor, memory, turns, and runs that go on after they were stopped."""

import importlib
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from diffusers_leanvae import AutoencoderKLLeanVAE, bundled
from diffusers_leanvae.benchmark.linearity import linearity
from diffusers_leanvae.benchmark.rounds import KEYS, MeasurementError, Record, run_rounds, summarize
from diffusers_leanvae.benchmark.subjects import Subject, build_model
from diffusers_leanvae.benchmark.tiny_autoencoder import TinyVideoAutoencoder
from diffusers_leanvae.benchmark.work import DIRECTIONS, Layout, MatrixFloor, count_work
from diffusers_leanvae.cli import app
from diffusers_leanvae.clock import MIB, end_of_peak, start_of_peak
from diffusers_leanvae.evaluation.autoencoders import encode
from diffusers_leanvae.evaluation.report import read_report
from diffusers_leanvae.generation.schedulers import make_scheduler


ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_work_of_the_full_size_model_is_as_published():
    work = count_work(build_model("LeanVAE-16ch"), (17, 256, 256))
    assert work["encode"].output_shape == work["decode"].input_shape == (1, 16, 5, 32, 32)
    assert work["decode"].output_shape == (1, 3, 17, 256, 256)
    assert work["encode"].multiply_adds / 1e9 == pytest.approx(58, abs=0.5)
    assert work["decode"].multiply_adds / 1e9 == pytest.approx(145, abs=0.5)
    for part in work.values():  # all but the depthwise convolutions is matrix products
        in_products = sum(rows * inner * columns for rows, inner, columns in part.products)
        assert 0.96 < in_products / part.multiply_adds < 1
    assert (5120, 512, 2730) in work["encode"].products and (5120, 1365, 512) in work["decode"].products


@pytest.mark.parametrize("variant", ["eager", "fused"])
def test_what_is_counted_is_what_runs(make_model, make_video, variant):
    model = make_model().double()  # whose weights are never packed: PyTorch does not count the products of packed ones
    work = count_work(model, (9, 32, 48))
    subject = Subject(model, variant)
    x = make_video(1, 3, 9, 32, 48).double()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encode(subject.vae, x)
    ran = counter.get_total_flops() / 2
    if variant == "eager":
        assert ran == work["encode"].multiply_adds
    else:  # zeros beside inner widths of 85 and 21 and 64 are multiplied too, and folded maps are dense
        assert ran > work["encode"].multiply_adds


def test_floor_computes_each_product_in_its_layout():
    products = [(10, 21, 30), (10, 21, 30), (4, 30, 5)]
    for multiple_of, expected in ((1, 2 * 10 * 21 * 30 + 4 * 30 * 5), (32, 2 * 10 * 32 * 32 + 4 * 32 * 32)):
        layouts = {shape: Layout(multiple_of, False, 3) for shape in set(products)}
        floor = MatrixFloor(products, torch.float32, CPU, layouts)
        with FlopCounterMode(display=False) as counter:
            floor()
        assert counter.get_total_flops() / 2 == expected


def test_floor_finds_a_layout_for_every_shape_once():
    layouts: dict[tuple[int, ...], Layout] = {}
    MatrixFloor([(300, 21, 30), (5000, 21, 30)], torch.float32, CPU, layouts)()
    assert set(layouts) == {(300, 21, 30), (4096, 21, 30)}
    chosen = dict(layouts)
    MatrixFloor([(9000, 21, 30)], torch.float32, CPU, layouts)()  # more rows than are ever tried
    assert layouts == chosen


class RecordFactors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.dtypes += [args[0].dtype, args[1].dtype]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_wide, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_floor_of_16_bits_may_be_computed_in_float32(is_wide: bool, dtype: torch.dtype):
    layouts = {(4, 30, 5): Layout(1, False, 0, is_wide)}
    floor = MatrixFloor([(4, 30, 5)], torch.bfloat16, CPU, layouts)
    with RecordFactors() as record:
        floor()
    assert record.dtypes == [dtype, dtype]


def test_floor_of_float32_has_no_wider_layout():
    found: dict[tuple[int, ...], Layout] = {}
    MatrixFloor([(300, 64, 64)], torch.float32, CPU, found)
    assert len(found) == 1 and not any(layout.is_wide for layout in found.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_counts_what_is_freed_again():
    before = start_of_peak(CPU)
    torch.ones(256 * MIB // 4).sum()
    peak = end_of_peak(before, CPU)
    # Linux counts pages on each processor for itself, and is off by some MiB where there are many.
    assert peak is not None and 240 <= peak / MIB <= 272
    before = start_of_peak(CPU)
    peak = end_of_peak(before, CPU)
    assert peak is not None and peak / MIB <= 16


def make_records(*models: str) -> list[Record]:
    return [dict(zip(KEYS, (model, "eager", "float32", 1, [5, 32, 32], "encode"), strict=True)) for model in models]


FIRST = {"peak_mib": 10.0, "output_mib": 1.0, "giga_multiply_adds": 4.0, "num_parameters": 7, "latent": [2, 4, 4]}


def test_models_take_turns_within_their_budget_and_one_that_fails_stops_nobody():
    calls = []
    duration = {"fast": 1.0, "slow": 8.0, "broken": 1.0}

    def measure(record: Record, is_first: bool) -> dict[str, Any]:
        calls.append(record["model"])
        if record["model"] == "broken":
            raise MeasurementError("does not fit")
        times = {"seconds": duration[record["model"]]}
        return times | FIRST if is_first else times | {"floor_seconds": 0.8 * times["seconds"]}

    records, saved = make_records("fast", "slow", "broken"), []
    run_rounds(records, measure, 4, 30.0, lambda record: saved.append(record["model"]))
    assert saved == calls
    assert calls == ["fast", "slow", "broken", "slow", "fast", "fast", "fast", "fast"]
    fast, slow, broken = map(summarize, records)
    assert fast["repeats"] == 4 and slow["repeats"] == 1
    assert fast["seconds"] == 1 and fast["time_over_floor"] == 1.25 and fast["giga_multiply_adds_per_second"] == 4
    assert broken == {key: records[2][key] for key in KEYS} | {"note": "does not fit"}

    calls.clear()  # the same again, one call later than where it was stopped
    run_rounds(records, measure, 5, 30.0, lambda record: None)
    assert calls == ["fast"]


def test_rows_are_medians_and_ratios_of_neighbours():
    (record,) = make_records("x")
    record |= {"first": FIRST | {"seconds": 9.0}, "seconds": [1.0, 2.0, 6.0], "floor_seconds": [1.0, 1.0, 5.0]}
    row = summarize(record)
    assert (row["seconds_lower"], row["seconds"], row["seconds_upper"]) == (1.5, 2.0, 4.0)
    assert row["time_over_floor"] == 1.2 and row["floor_seconds"] == 1.0
    record["seconds"] = []
    assert summarize(record | {"floor_seconds": []})["seconds"] == 9.0  # the first alone, if nothing else


def test_linear_and_quadratic_cost_are_told_apart():
    rows = []
    for frames, size in ((5, 64), (9, 64), (17, 64), (9, 32), (9, 128)):
        latent = [(frames - 1) // 4 + 1, size // 8, size // 8]
        tokens = latent[0] * latent[1] * latent[2]
        key = dict(zip(KEYS, ("x", "eager", "float32", 1, [frames, size, size], "encode"), strict=True))
        rows.append(key | {"seconds": 3.0 * tokens, "peak_mib": 2.0 * tokens**2, "latent": latent})
    found = {(item["axis"], item["quantity"]): item for item in linearity(rows)}
    assert len(found) == 4
    for axis in ("length", "area"):
        time, memory = found[axis, "seconds"], found[axis, "peak_mib"]
        assert time["num_points"] == 3 and time["exponent"] == 1 and time["r_squared"] == 1
        assert time["max_deviation"] == 0 and memory["exponent"] == 2 and memory["max_deviation"] > 0.3
    assert found["area", "seconds"]["smallest"] == [9, 32, 32]
    assert found["length", "seconds"]["largest"] == [17, 64, 64]


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda vae: Subject(vae, "faster"), "`variant` must be one of 'eager', 'fused"),
        (lambda vae: build_model("AutoencoderKL"), "`name` must be one of 'LeanVAE-16ch"),
    ],
)
def test_bad_arguments(make_model, make, match):
    with pytest.raises(ValueError, match=match):
        make(make_model())


def test_command_prints_rows_as_a_table_or_as_json(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "vae")
    arguments = ["bench", "--model", str(tmp_path / "vae"), "--size", "5x32x32", "--repeats", "1", "--threads", "1"]
    arguments += ["--variant", "eager", "--variant", "fused", "--output", str(tmp_path / "bench.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head.split()[-4:] == ["MiB", "GMAC", "over", "floor"] and len(lines) == 4
    assert lines[0].split()[1:6] == ["eager", "float32", "1", "5x32x32", "encode"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["rows"] == json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {(row["variant"], row["direction"]) for row in printed["rows"]} == {
        (variant, direction) for variant in ("eager", "fused") for direction in ("encode", "decode")
    }
    for row in printed["rows"]:
        assert row["seconds"] > 0 and row["time_over_floor"] > 0 and row["repeats"] == 1
    result = CliRunner().invoke(app, [*arguments, "--size", "6x32x32"])
    assert (
        result.exit_code == 1
        and "`--size` must be one that the model takes, got '6x32x32': num_frames must" in result.output
    )


@pytest.mark.parametrize("sibling", ["wfvae", "ivvae"])
def test_command_measures_siblings_and_says_what_it_leaves_out(sibling, tmp_path):
    make_tiny(sibling).save_pretrained(tmp_path / "vae")
    arguments = ["bench", "--model", str(tmp_path / "vae"), "--size", "5x32x32", "--repeats", "1", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "bench.json"), "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("left out, because only LeanVAE has it: fused\n")
    rows = json.loads(result.stdout)["rows"]
    assert rows == json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["variant"], row["direction"]) for row in rows] == [("eager", "encode"), ("eager", "decode")]
    for row in rows:
        assert row["seconds"] > 0 and row["giga_multiply_adds"] > 0 and row["repeats"] == 1 and "note" not in row
        assert "time_over_floor" not in row  # convolutions, not matrix products, are what they spend time on
    result = CliRunner().invoke(app, [*arguments, "--variant", "fused"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: `--variant` must be one of 'eager', 'compiled' for an AutoencoderKL")


def test_command_measures_another_autoencoder_of_diffusers(tmp_path):
    path = tmp_path / "wan.json"
    path.write_text(json.dumps({"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}))
    peers = (f"AutoencoderKLWan:{path}", "TAEHV-16ch")
    arguments = ["bench", "--model", "LeanVAE-tiny", "--variant", "eager", "--size", "5x32x32", "--repeats", "0"]
    arguments += [part for peer in peers for part in ("--peer", peer)]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "fp32", "--json"])
    assert result.exit_code == 0, result.output
    rows = {(row["model"], row["direction"]): row for row in json.loads(result.stdout)["rows"]}
    assert len(rows) == 6 and all(row["seconds"] > 0 for row in rows.values())
    assert rows[peers[1], "encode"]["num_parameters"] == 11_315_539


# As published, less the wavelet kernels, which are no parameters here; Wan 2.2 as diffusers makes it.
@pytest.mark.parametrize(
    "name, num_parameters, latent_shape",
    [
        ("WF-VAE-S-4ch", 146_496_836 - 128, (4, 5, 8, 8)),
        ("WF-VAE-M-32ch", 227_035_816 - 192, (32, 3, 8, 8)),
        ("WF-VAE-L-16ch", 317_081_372 - 128, (16, 5, 8, 8)),
        ("IV-VAE-16ch", 107_798_550, (16, 5, 8, 8)),
        ("TAEHV-16ch", 11_315_539, (16, 5, 8, 8)),
        ("AutoencoderKLWan-2.2", 704_688_668, (48, 5, 4, 4)),
    ],
)
def test_peers_have_the_sizes_that_were_published(name, num_parameters, latent_shape):
    with torch.device("meta"):
        vae = build_model(name, "meta")
    assert sum(parameter.numel() for parameter in vae.parameters()) == num_parameters
    assert count_work(vae, (17, 64, 64))["encode"].output_shape[1:] == latent_shape


def test_a_peer_that_this_diffusers_lacks_is_named(monkeypatch):
    monkeypatch.setattr("diffusers.AutoencoderKLMochi", None)
    with pytest.raises(ValueError, match="`name` must be of a class of this version of diffusers"):
        build_model("AutoencoderKLMochi")


def test_processor_hours_of_a_run_count_parts_of_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cpu_hours = runpy.run_path(str(ROOT / "benchmarks" / "compare_families.py"))["cpu_hours"]
    records = [
        {"step": step, "cpu_seconds_per_step": seconds} for step, seconds in ((10, 36.0), (20, 72.0), (24, 36.0))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = {0: 0.0, 5: 0.05, 10: 0.1, 15: 0.2, 20: 0.3, 24: 0.34, math.inf: 0.34}
    assert {step: cpu_hours(tmp_path, step) for step in expected} == pytest.approx(expected)


def test_each_frame_of_the_tiny_autoencoder_follows_from_those_before_it():
    torch.manual_seed(0)
    vae = TinyVideoAutoencoder(4).double().eval()
    latents = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, first = vae.decode(latents).sample, vae.decode(latents[:, :, :2]).sample
    assert whole.shape == (1, 3, 9, 32, 32) and first.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(whole[:, :, :5], first, rtol=0, atol=1e-12)
    assert (whole[:, :, 5:] - whole[:, :, 4:5]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--size", "5x32x32", "--size", "6x32x32"),
            "`--size` must be one that the model takes, got '6x32x32': num_frames ",
        ),
        (("--size", "5x33x32"), "got '5x33x32': height and width must be positive multiples of 8, got 33 and 32."),
        (
            ("--variant", "graphs", "--device", "cpu"),
            "`--variant` must be one of 'eager', 'fused', 'fused-torch', 'compiled' on cpu, got 'graphs'",
        ),
        (("--size", "32x32"), "`--size` must be FRAMESxHEIGHTxWIDTH such as 17x256x256, got '32x32'"),
        (("--variant", "faster"), "`--variant` must be one of 'eager', 'fused'"),
        (("--peer", "AutoencoderKL"), "or a video autoencoder, got 'AutoencoderKL': it takes images"),
        (("--dtype", "int8"), "`--dtype` must be auto, float32 (fp32)"),
        (("--output", "."), "`--output` must be a file, got '.', which is a folder"),
        (("--output", f"{__file__}/b.json"), "`--output` must lead to a folder to write to, got"),
    ],
)
def test_command_refuses_before_it_measures(arguments, message):
    result = CliRunner().invoke(app, ["bench", "--model", "LeanVAE-tiny", *arguments])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_command_loses_nothing_that_was_measured(monkeypatch):
    def fuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(AutoencoderKLLeanVAE, "fuse", fuse)
    arguments = ["--model", "LeanVAE-tiny", "--size", "5x32x32", "--repeats", "0", "--dtype", "fp32"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--variant", "eager", "--variant", "fused", "--json"])
    assert result.exit_code == 1
    assert result.stderr.endswith("\nerror: 2 of 4 rows could not be measured: RuntimeError: the device is gone\n")
    rows = json.loads(result.stdout)["rows"]
    assert {row["variant"]: "seconds" in row for row in rows} == {"eager": True, "fused": False}
    assert all(row["dtype"] == "float32" for row in rows)


def test_command_measures_nothing_twice():
    arguments = ["--model", "LeanVAE-tiny", "--repeats", "0", "--json"]
    for option, values in {
        "--size": ("5x32x32", "05x32x32"),
        "--dtype": ("fp32", "float32"),
        "--variant": ("eager", "eager"),
        "--threads": ("1", "1"),
        "--peer": ("TAEHV-16ch", "TAEHV-16ch"),
    }.items():
        arguments += [part for value in values for part in (option, value)]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    rows = [(row["model"], row["direction"]) for row in json.loads(result.stdout)["rows"]]
    assert rows == [(name, way) for name in ("LeanVAE-tiny", "TAEHV-16ch") for way in ("encode", "decode")]


def test_command_prints_its_figures_before_it_writes_them(tmp_path, monkeypatch):
    def fail(path: Path, result: dict[str, Any]) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers_leanvae.evaluation.results.write_result", fail)
    arguments = ["--model", "LeanVAE-tiny", "--size", "5x32x32", "--repeats", "0", "--variant", "eager"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--output", str(tmp_path / "bench.json")])
    assert result.exit_code == 1 and result.stderr.endswith("\nerror: No space left on device\n")
    assert len(result.stdout.splitlines()) == 3


def test_figures_stay_in_a_row_whose_later_calls_fail():
    (record,) = make_records("x")
    row = summarize(record | {"first": FIRST | {"seconds": 9.0}, "seconds": [], "note": "out of memory"})
    assert row["seconds"] == 9.0 and row["peak_mib"] == 10.0 and row["note"] == "out of memory"


@pytest.fixture
def run_inference(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """`benchmarks/inference.py`; its subjects import it too, in processes of their own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # which it sets for itself
    script = importlib.import_module("inference")
    monkeypatch.setitem(sys.modules, "inference", script)  # and out of it again

    def run(*arguments: str) -> tuple[dict[str, Any], list[str]]:
        settings = ["--models", "LeanVAE-tiny", "--scaling", "--peer-scaling", "--threads", "1", "--repeats", "2"]
        files = ["--state", str(tmp_path / "state.json"), "--output", str(tmp_path / "bench.json")]
        monkeypatch.setattr("sys.argv", ["inference.py", *settings, *files, *arguments])
        script.main()
        *lines, last = capsys.readouterr().out.splitlines()
        return json.loads(last), lines

    return run


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_goes_on_where_it_was(tmp_path, run_inference):
    result, lines = run_inference("--variants", "fused", "--sizes", "5x32x48")
    rows = result["rows"]
    assert len(rows) == 2 and len(lines) == 2 * 3
    assert all(row["repeats"] == 2 and row["time_over_floor"] > 0 and row["peak_mib"] < 64 for row in rows)
    assert [line.split()[8] for line in lines[:2]] == ["encode", "decode"]

    state = json.loads((tmp_path / "state.json").read_text())
    last = next(record for key, record in state["records"].items() if "decode" in key)
    del last["seconds"][1], last["floor_seconds"][1]  # as if it had been killed before the last call
    (tmp_path / "state.json").write_text(json.dumps(state))
    again, lines = run_inference("--variants", "fused", "--sizes", "5x32x48")
    assert len(lines) == 1 and "decode" in lines[0]
    assert again["rows"][0] == rows[0] and again["rows"][1]["repeats"] == 2
    assert run_inference("--report")[0]["rows"] == again["rows"]


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_generation_recipes_are_compared_by_the_clean_latents_they_predict(kind: str):
    module = runpy.run_path(str(ROOT / "benchmarks" / "generation_recipes.py"))
    latents = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def answer(offset: float) -> Any:  # of a model that knows the latents, but for an offset
        def transformer(noisy: torch.Tensor, timesteps: torch.Tensor, labels: None) -> Any:
            target = noise - latents if kind == "flow" else torch.cat((noise, noise), dim=1)
            return SimpleNamespace(sample=target + offset)

        return transformer

    scheduler = make_scheduler(kind)
    errors = [module["denoising_errors"](answer(offset), scheduler, latents) for offset in (0.0, 0.1)]
    assert max(errors[0].values()) < 1e-5
    for level, error in errors[1].items():  # the offset, as it counts at this ratio of noise to signal
        ratio = float(level) / (1.0 if kind == "flow" else 1.0 - float(level))
        assert error == pytest.approx((0.1 * ratio) ** 2, rel=0.03, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_does_not_fit_is_a_row_that_says_so(run_inference):
    # With all memory held in reserve 64 MiB are left, which the small video fits into.
    result, _ = run_inference("--variants", "eager", "--sizes", "5x32x32", "65x512x512", "--reserve-gib", "100000")
    small, large = result["rows"][:2], result["rows"][2:]
    assert all("seconds" in row for row in small)
    assert all("needs more than the" in row["note"] and "seconds" not in row for row in large)


def test_gpu_benchmark_rehearsed_on_cpu(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU `make gpu` runs it in earnest")
    precision = torch.get_float32_matmul_precision()
    arguments = ["--rehearse", "--repeats", "1", "--variants", "eager", "fused", "graphs"]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments, "--output", str(tmp_path / "gpu.json")])
    try:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    finally:
        torch.set_float32_matmul_precision(precision)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["rows"] == json.loads((tmp_path / "gpu.json").read_text())["rows"]
    measured = [row for row in printed["rows"] if "seconds" in row]
    assert {row["variant"] for row in measured} == {"eager", "fused"}
    for row in measured:
        assert row["tflops"] > 0 and row["share_of_peak"] > 0 and row["speed_up_over_eager_bfloat16"] > 0
    (graphs,) = {row["note"] for row in printed["rows"] if row["variant"] == "graphs"}
    assert "`examples` must be tensors on a CUDA device" in graphs


def test_plots_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="drawing needs the extra `bench`")
    rows = []
    for model in ("LeanVAE-16ch", "AutoencoderKLWan"):
        for frames, size in ((17, 128), (17, 256), (9, 256)):
            for direction in DIRECTIONS:
                values = (model, "eager", "float32", 2, [frames, size, size], direction)
                row = dict(zip(KEYS, values, strict=True))
                rows.append(row | {"seconds": frames * size**2 / 1e6, "peak_mib": frames * size / 10})
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    curve = [{"step": 100 * i, "cpu_hours": 0.1 * i, "psnr_frame_mean_rgb": 20 + i} for i in range(4)]
    (tmp_path / "families.json").write_text(json.dumps({"curves": {"LeanVAE": curve, "WF-VAE": curve[:3]}}))
    arguments = ["plots.py", "--result", str(tmp_path / "bench.json"), "--folder", str(tmp_path)]
    arguments += ["--families", str(tmp_path / "families.json")]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(ROOT / "benchmarks" / "plots.py"), run_name="__main__")
    for name in ("bench_area.png", "bench_length.png", "bench_families.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 250_000


@pytest.mark.slow  # half a minute: seven subjects
def test_the_full_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "small.yaml").write_text("num_frames: 9\nresolution: 64\nmetrics: [psnr]\n")
    clips = str(bundled.clip_path().parent)
    options = ["--protocol", str(tmp_path / "small.yaml"), "--num-train-clips", "8", "--codecs", "x264"]
    arguments = ["--train", clips, "--held-out", clips, "--output", str(tmp_path / "report"), *options]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "report.py"), run_name="__main__")
    evaluations = {evaluation.model: evaluation for evaluation in read_report(tmp_path / "report" / "report.json")}
    psnr = {name: evaluation.totals["psnr_frame_mean_rgb"] for name, evaluation in evaluations.items()}
    assert len(psnr) == 8 and sum(name.endswith(", small") for name in psnr) == 3
    # On the clip that it was fitted to, the linear one is good; weights that nobody trained give no picture.
    assert psnr["linear-16ch"] > 20 > max(value for name, value in psnr.items() if name.endswith(", small"))
