"""Exported graphs are the model: as functions of PyTorch exactly, in onnxruntime up to float32 rounding."""

import copy
import errno
import json
import re
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models.tiny_autoencoders import CASES, make
from onnx import helper, numpy_helper
from tiny import SMALLEST, make_latents, make_tiny, make_video
from typer.testing import CliRunner

from diffusers_leanvae.cli import app, choices
from diffusers_leanvae.export import (
    FORMATS,
    PARTS,
    WEIGHTS,
    export_model,
    export_page,
    files,
    graphs_of,
    onnx_files,
    trace,
)


# Batch, groups of frames, latent height and width; none is that of the trace but for one size of the last.
CLIPS = [(1, 1, 2, 3), (3, 2, 1, 1), (1, 7, 5, 2)]
IMAGES = (2, 0, 4, 4)  # which only the graphs of LeanVAE take
AOTI_CLIPS = [(1, 4, 2, 3), (3, 6, 1, 1), (2, 5, 5, 7)]  # of at least four groups, as what they are compiled from
# Measured: at most 8e-6 for LeanVAE, 1.9e-5 for the decoder of IV-VAE; outputs are of order 1.
ATOL = 8e-5


class Runner:
    """The graphs of a folder in onnxruntime, by the names of their files; inputs and outputs by name."""

    def __init__(self, folder: Path):
        self.sessions = {path.stem: onnxruntime.InferenceSession(path) for path in folder.glob("*.onnx")}

    def __call__(self, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = self.sessions[name]
        arrays = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        return dict(zip([output.name for output in session.get_outputs()], map(torch.from_numpy, arrays), strict=True))


def videos(vae: Any, batch_size: int, num_groups: int, height: int, width: int) -> torch.Tensor:
    num_frames = num_groups * vae.temporal_compression_ratio + 1
    return make_video(batch_size, 3, num_frames, 8 * height, 8 * width, dtype=vae.dtype)


def latents(vae: Any, batch_size: int, num_groups: int, height: int, width: int) -> torch.Tensor:
    return make_latents(batch_size, vae.latent_channels, num_groups + 1, height, width, dtype=vae.dtype)


def stream(run: Any, part: str, x: torch.Tensor, sizes: list[int], has_last: bool) -> torch.Tensor:
    """Chunks of so many frames through the graphs of a stream; present of one is past of the next."""
    source, result = ("video", "mean") if part == "encoder" else ("latents", "video")
    outputs: list[torch.Tensor] = []
    state: dict[str, torch.Tensor] = {}
    for index, chunk in enumerate(x.split(sizes, dim=2)):
        role = "first" if index == 0 else "last" if has_last and index == len(sizes) - 1 else "next"
        got = run(f"{part}_{role}", {source: chunk.contiguous(), **state})
        outputs.append(got[result])
        state = {f"past.{name.removeprefix('present.')}": x for name, x in got.items() if name.startswith("present.")}
    return torch.cat(outputs, dim=2)


class TestGraphs:
    """The functions that are traced, in float64."""

    @pytest.mark.parametrize("case", CASES)
    @torch.no_grad()
    def test_they_are_the_model(self, case):
        vae = make(case)
        graphs = {graph.name: graph for graph in graphs_of(vae, is_streaming=True)}

        def run(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            graph = graphs[name]
            outputs = graph.module(*(inputs[port.name] for port in graph.inputs))
            for port, output in zip(graph.outputs, outputs, strict=True):
                assert [size for size in port.shape if isinstance(size, int)] == [
                    actual for size, actual in zip(port.shape, output.shape, strict=True) if isinstance(size, int)
                ]
            return {port.name: output for port, output in zip(graph.outputs, outputs, strict=True)}

        ratio = vae.temporal_compression_ratio
        video, z = videos(vae, 2, 4, 2, 3), latents(vae, 2, 4, 2, 3)
        posterior, sample = vae.encode(video).latent_dist, vae.decode(z).sample
        whole = run("encoder", {"video": video})
        expected = {"rtol": 0, "atol": 5e-13}  # measured 1e-14 to 1.1e-13, by the processor
        torch.testing.assert_close(whole["mean"], posterior.mean, **expected)
        torch.testing.assert_close(whole["logvar"], posterior.logvar, **expected)
        torch.testing.assert_close(run("decoder", {"latents": z})["video"], sample, **expected)
        has_last = vae.num_delayed_frames > 0
        assert ("decoder_last" in graphs) == has_last
        means = stream(run, "encoder", video, [ratio + 1, ratio, 2 * ratio], has_last=False)
        torch.testing.assert_close(means, posterior.mean, **expected)
        frames = stream(run, "decoder", z, [2, 1, 2], has_last)
        torch.testing.assert_close(frames, sample, **expected)

    def test_they_share_the_weights_and_leave_the_model_alone(self):
        vae = make("lean")
        kinds = [type(module) for module in vae.modules()]
        graph = graphs_of(vae, ("decoder",))[0]
        pointers = {weight.data_ptr() for weight in vae.parameters()}
        assert {weight.data_ptr() for weight in graph.module.parameters()} == pointers
        assert [type(module) for module in vae.modules()] == kinds

    @pytest.mark.parametrize("family", ["leanvae", "wfvae", "ivvae"])
    def test_weights_that_are_not_there_are_refused(self, family):
        cpu, moving = torch.device("cpu"), "must be exported before layers are offloaded or cast when called, got some"
        for switch, message in (
            (lambda vae: vae.enable_group_offload(cpu, offload_type="leaf_level"), moving),
            (lambda vae: vae.enable_layerwise_casting(torch.bfloat16, torch.float32), moving),
            (lambda vae: accelerate.cpu_offload(vae, cpu), moving),
            (lambda vae: vae.to("meta"), "must have its weights in memory, got some on the meta device"),
        ):
            vae = make_tiny(family)
            switch(vae)
            with pytest.raises(ValueError, match=rf"^`vae` {message}"):
                graphs_of(vae)

    @pytest.mark.parametrize(
        "vae, parts, message",
        [
            ("compact-16ch", PARTS, r"`vae` must be a model such as an `AutoencoderKLLeanVAE`, got 'compact-16ch'\."),
            (None, (), r"`parts` must be 'encoder', 'decoder' or both, got \(\)\."),
            (None, "encoder", r"`parts` must be one of 'encoder', 'decoder', got 'e'\."),
        ],
    )
    def test_other_arguments(self, vae, parts, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            graphs_of(vae or make_tiny("leanvae"), parts)

    def test_a_model_that_sees_the_whole_video_is_no_stream(self):
        widths = ("base_channels", "encoder_flow_channels", "decoder_flow_channels")
        vae = make_tiny("wfvae", **dict.fromkeys(widths, 32), norm_type="group_norm")
        assert [graph.name for graph in graphs_of(vae)] == ["encoder", "decoder"]
        with pytest.raises(ValueError, match="`streaming` needs `norm_type` 'layer_norm'"):
            graphs_of(vae, is_streaming=True)


class TestFiles:
    """ONNX files as such: a small graph by hand in place of a traced one."""

    @staticmethod
    def model(scale: float) -> onnx.ModelProto:
        weights = numpy_helper.from_array(np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64), "weights")
        bias = numpy_helper.from_array(np.full(64, scale, dtype=np.float32), "bias")
        nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"]), helper.make_node("Add", ["y", "bias"], ["z"])]
        ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in "xz"]
        graph = helper.make_graph(nodes, "small", ports[:1], ports[1:], [weights, bias])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def test_files_share_what_is_equal(self, tmp_path):
        x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
        expected = {}
        with onnx_files.SharedWeights(tmp_path / "all.weights") as shared:
            for scale in (0.5, 2.0):
                model = self.model(scale)
                expected[scale] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
                onnx_files.share_weights(model, shared)
                (tmp_path / f"{scale}.onnx").write_bytes(model.SerializeToString())
        assert (tmp_path / "all.weights").stat().st_size == 4096 * 4  # once
        for scale, wanted in expected.items():
            assert (tmp_path / f"{scale}.onnx").stat().st_size < 4096
            actual = onnxruntime.InferenceSession(tmp_path / f"{scale}.onnx").run(None, {"x": x})[0]
            np.testing.assert_array_equal(actual, wanted)

    def test_float16_weights_are_the_rounded_ones(self):
        model, x = self.model(0.5), np.eye(64, dtype=np.float32)
        size = len(model.SerializeToString())
        onnx_files.store_as_float16(model)
        assert len(model.SerializeToString()) < 0.6 * size
        actual = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
        rounded = np.linspace(-1, 1, 4096, dtype=np.float32).astype(np.float16).astype(np.float32).reshape(64, 64)
        np.testing.assert_array_equal(actual, rounded + 0.5)


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"to": "onyx"}, "`to` must be one of 'onnx', 'torch-export', 'aoti', got 'onyx'"),
            ({"parts": ("coder",)}, "`parts` must be one of 'encoder', 'decoder', got 'coder'"),
            ({"opset": 12}, "`opset` must be one of 18, 19, 20, 21, got 12"),
            (
                {"opset": 21, "to": "torch-export"},
                "`opset` must be None unless `to` is 'onnx', got 21 for",
            ),
            ({"weights": "int4"}, "`weights` must be one of 'same', 'float16', got 'int4'"),
            ({"weights": "float16", "to": "torch-export"}, "`weights` 'float16' needs an ONNX file of a float32"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            export_model(make_tiny("leanvae", **SMALLEST), tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    def test_other_dtypes(self, tmp_path):
        with pytest.raises(ValueError, match="needs a model of float32 or float16 on cpu, got torch.bfloat16"):
            export_model(make_tiny("leanvae", torch.bfloat16, **SMALLEST), tmp_path / "out")

    def test_a_folder_of_something_else_stays(self, tmp_path):
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(ValueError, match="`folder` must be new, empty or a former export"):
            export_model(make_tiny("leanvae", **SMALLEST), tmp_path, overwrite=True)
        (tmp_path / files.MANIFEST).write_text("{}")
        with pytest.raises(ValueError, match="without `overwrite`, got the export"):
            export_model(make_tiny("leanvae", **SMALLEST), tmp_path)
        assert (tmp_path / "letter.txt").read_text() == "dear"

    def test_the_command_says_it_in_one_sentence(self, tmp_path):
        result = CliRunner().invoke(app, ["export", "compact-4ch", str(tmp_path / "out"), "--to", "tflite"])
        assert result.exit_code == 1
        assert result.stderr == "error: `--to` must be one of 'onnx', 'torch-export', 'aoti', got 'tflite'.\n"

    @pytest.mark.parametrize("opset", [*files.OPSETS, files.OPSETS[0] - 1, files.OPSETS[-1] + 1])
    def test_the_command_names_its_own_arguments(self, tmp_path, opset):
        arguments = ["export", str(tmp_path / "none"), str(tmp_path), "--opset", str(opset)]
        result = CliRunner().invoke(app, arguments)
        if opset not in files.OPSETS:
            assert result.exit_code == 2 and "'--opset'" in result.stderr
            return
        assert result.exit_code == 1 and result.stderr.startswith(
            f"error: MODEL '{tmp_path / 'none'}' cannot be loaded"
        )
        (tmp_path / files.MANIFEST).write_text("{}")
        result = CliRunner().invoke(app, arguments)  # of which the folder is looked at first
        assert result.exit_code == 1
        assert result.stderr.startswith("error: OUT must be new or empty without `--overwrite`, got the export ")

    def test_operators_of_onnx_are_only_for_onnx(self, tmp_path):
        arguments = ["export", "compact-4ch", str(tmp_path / "out"), "--to", "torch-export", "--opset", "21"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert result.stderr == "error: `--opset` must not be given unless `--to` is onnx, got 21 with torch-export.\n"

    @pytest.mark.parametrize("name", [".", "../here", ".."])
    def test_the_current_folder_is_not_replaced(self, tmp_path, monkeypatch, name):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        result = CliRunner().invoke(app, ["export", "compact-4ch", name])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: OUT must not be the current folder, which would be replaced, got '")

    def test_a_full_disk_names_the_folder(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch.export, "save", full)
        with pytest.raises(ValueError, match="^Cannot write '.*out': .*No space left on device"):
            export_model(make_tiny("leanvae", **SMALLEST), tmp_path / "out", "torch-export", parts=("decoder",))
        monkeypatch.setattr(onnx_files, "write_onnx", full)
        folder = tmp_path / "page"  # around the folder of the model, which has another name until all is there
        with pytest.raises(
            ValueError, match=rf"^Cannot write {re.escape(repr(str(folder)))}: .*No space left on device"
        ):
            export_page(make_tiny("leanvae", **SMALLEST), folder, "tiny")
        assert list(tmp_path.iterdir()) == []

    def test_no_compiler(self, tmp_path):
        with torch._inductor.config.patch({"cpp.cxx": ("no-compiler-of-this-name",)}):
            with pytest.raises(ValueError, match=r"`to` 'aoti' needs a C\+\+ compiler .*, got none\."):
                export_model(make_tiny("leanvae", **SMALLEST), tmp_path / "out", "aoti")
        assert not (tmp_path / "out").exists()

    def test_the_command_knows_the_choices(self):
        assert choices.EXPORT_FORMATS == tuple(FORMATS) and choices.EXPORT_PARTS == (*PARTS, "both")
        assert choices.EXPORT_WEIGHTS == WEIGHTS


def check_clips(run: Runner, vae: Any, atol: float) -> None:
    for clip in [*CLIPS, IMAGES] if vae.is_local else CLIPS:
        video, z = videos(vae, *clip), latents(vae, *clip)
        if "encoder" in run.sessions:
            posterior, got = vae.encode(video).latent_dist, run("encoder", {"video": video})
            torch.testing.assert_close(got["mean"], posterior.mean, rtol=0, atol=atol)
            torch.testing.assert_close(got["logvar"], posterior.logvar, rtol=0, atol=atol)
        if "decoder" in run.sessions:
            sample = vae.decode(z).sample
            torch.testing.assert_close(run("decoder", {"latents": z})["video"], sample, rtol=0, atol=atol)


def grouped_ranks(model: onnx.ModelProto) -> list[int]:
    """Dimensions of the weights of grouped convolutions, of a model that is nothing but standard operators.

    WebGPU has no such convolutions of more than two dimensions, which are four of the weights.
    """
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    grouped = [node for node in convs if any(entry.name == "group" and entry.i > 1 for entry in node.attribute)]
    return [ranks[node.input[1]] for node in grouped]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Any, Path]:
    """The smallest model, exported by the command."""
    folder, vae = tmp_path_factory.mktemp("small"), make_tiny("leanvae", **SMALLEST)
    vae.save_pretrained(folder / "vae")
    arguments = [str(folder / "vae"), str(folder / "out"), "--part", "decoder", "--json"]
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["files"]) == {"decoder.onnx", "export.json"}
    return vae, folder / "out"


@pytest.mark.slow
class TestSmall:
    @torch.no_grad()
    def test_clips_of_any_size(self, small):
        vae, folder = small
        check_clips(Runner(folder), vae, ATOL)

    def test_a_file_explains_itself(self, small):
        vae, folder = small
        model = onnx.load(folder / "decoder.onnx")
        onnx.checker.check_model(model, full_check=True)
        (told,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "leanvae"]
        assert told == json.loads((folder / "export.json").read_text())
        assert told["class"] == "AutoencoderKLLeanVAE" and told["pixel_range"] == [-1.0, 1.0]
        again = type(vae).from_config(told["config"])
        assert again.state_dict().keys() == vae.state_dict().keys()
        assert [port["shape"] for port in told["graphs"]["decoder"]["inputs"]] == [
            ["batch", 4, "latent_frames", "latent_height", "latent_width"]
        ]
        dims = model.graph.output[0].type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "frames", "height", "width"]

    def test_it_is_plain_onnx_without_traces_of_this_machine(self, small):
        path = small[1] / "decoder.onnx"
        model = onnx.load(path)
        assert b".py" not in path.read_bytes() and str(Path.home()).encode() not in path.read_bytes()
        assert grouped_ranks(model) == [4, 4, 4]  # the three steps of time of its one convolution

    @pytest.mark.parametrize("opset", [19, 20, 21])  # all but the default
    def test_other_versions_of_the_operators(self, small, tmp_path, opset):
        vae, path = small[0], tmp_path / "decoder.onnx"
        (graph,) = graphs_of(vae, ("decoder",))
        onnx_files.write_onnx(trace(graph), graph, path, opset, "{}")
        assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", opset)]
        check_clips(Runner(tmp_path), vae, ATOL)


# With one layer of each kind where there may be several.
FAMILIES = {
    "lean": {},
    "wf_one_layer": {"decoder_flow_channels": 8},  # LayerNorm over two is a sign: any rounding may flip it
    "iv_one_layer": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[Any, Path]:
    """A model of each family with its streams; tracing takes minutes."""
    vae = make(request.param, torch.float32, **FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export_model(vae, folder, streaming=True)
    return vae, folder


@pytest.mark.slow
class TestFamilies:
    @torch.no_grad()
    def test_clips_of_any_size(self, family):
        vae, folder = family
        check_clips(Runner(folder), vae, ATOL)

    @torch.no_grad()
    def test_streams(self, family):
        vae, folder = family
        run, has_last = Runner(folder), vae.num_delayed_frames > 0
        assert {path.name for path in folder.glob("*.weights")} == {"encoder.weights", "decoder.weights"}
        for batch_size, height, width in ((1, 2, 3), (3, 5, 4)):
            video, z = videos(vae, batch_size, 6, height, width), latents(vae, batch_size, 6, height, width)
            means = stream(run, "encoder", video, [5, 4, 12, 4], has_last=False)
            torch.testing.assert_close(means, vae.encode(video).latent_dist.mean, rtol=0, atol=ATOL)
            frames, expected = stream(run, "decoder", z, [2, 1, 3, 1], has_last), vae.decode(z).sample
            # A norm of next to nothing may enlarge any rounding: measured 5.7e-4 of IV-VAE, 2e-4 of the model itself.
            rounding = (copy.deepcopy(vae).double().decode(z.double()).sample - expected).abs().max().item()
            torch.testing.assert_close(frames, expected, rtol=0, atol=max(ATOL, 4 * rounding))

    def test_it_is_plain_onnx(self, family):
        for path in family[1].glob("*.onnx"):
            assert 5 not in grouped_ranks(onnx.load(path, load_external_data=False))


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = make_tiny("leanvae", latent_channels=16)  # as many as those of the page
    export_model(vae, "exported")
    export_model(vae, "streams", parts=("encoder",), streaming=True)
    page = Path(__file__).parents[2] / "docs" / "export.md"
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


def export_decoder(folder: Path, to: str) -> tuple[Any, str]:
    """Export the decoder of a model by the command, to `folder / "out"`; return the model, and `export.json`."""
    vae = make_tiny("leanvae", **SMALLEST)
    vae.save_pretrained(folder / "vae")
    arguments = [str(folder / "vae"), str(folder / "out"), "--to", to, "--part", "decoder", "--json"]
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["files"]) == {"decoder.pt2", "export.json"}
    return vae, (folder / "out" / files.MANIFEST).read_text()


def assert_decodes(program: Any, vae: Any, clips: list[tuple[int, int, int, int]]) -> None:
    for clip in clips:
        z = latents(vae, *clip)
        torch.testing.assert_close(program(z)[0], vae.decode(z).sample, rtol=0, atol=ATOL)


@torch.no_grad()
def test_a_program_of_torch_export_is_the_model(tmp_path):
    """What all graphs go through first; this much of an export takes seconds."""
    vae, manifest = export_decoder(tmp_path, "torch-export")
    told = {"leanvae.json": ""}
    program = torch.export.load(tmp_path / "out" / "decoder.pt2", extra_files=told).module()
    assert json.loads(told["leanvae.json"]) == json.loads(manifest)
    assert_decodes(program, vae, [(1, 4, 2, 3), (3, 6, 1, 1)])
    assert json.loads(manifest)["graphs"]["decoder"]["min_latent_side"] == 1


@torch.no_grad()
def test_a_program_of_an_encoder_says_the_least_side(tmp_path):
    vae = make_tiny("leanvae", **SMALLEST)
    (path,) = export_model(vae, tmp_path / "out", "torch-export", parts=("encoder",))
    side = json.loads((tmp_path / "out" / files.MANIFEST).read_text())["graphs"]["encoder"]["min_latent_side"]
    program = torch.export.load(path).module()
    video = videos(vae, 1, 5, side, side)
    torch.testing.assert_close(program(video)[0], vae.encode(video).latent_dist.mean, rtol=0, atol=ATOL)
    for sides in [(side - 1, side), (side, side - 1)]:
        with pytest.raises(AssertionError, match="Guard failed"):
            program(videos(vae, 1, 5, *sides))


@pytest.mark.slow
@torch.no_grad()
def test_a_package_of_aotinductor_explains_itself(tmp_path):
    vae, manifest = export_decoder(tmp_path, "aoti")
    program = torch._inductor.aoti_load_package(str(tmp_path / "out" / "decoder.pt2"))
    told = json.loads(program.get_metadata()["leanvae"])
    assert told == json.loads(manifest) and told["format"] == "aoti"
    assert_decodes(program, vae, AOTI_CLIPS)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lean", "iv_one_layer"])
@torch.no_grad()
def test_packages_of_aotinductor_are_the_model(case, tmp_path):
    vae = make(case, torch.float32, **FAMILIES[case])
    paths = export_model(vae, tmp_path / "out", "aoti")
    encoder, decoder = (torch._inductor.aoti_load_package(str(path)) for path in paths)
    for clip in AOTI_CLIPS:
        video, z = videos(vae, *clip), latents(vae, *clip)
        posterior = vae.encode(video).latent_dist
        expected = posterior.mean, posterior.logvar, vae.decode(z).sample
        torch.testing.assert_close((*encoder(video), *decoder(z)), expected, rtol=0, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, reason", [("encoder", "compiler fails"), ("decoder", "program computes something else")]
)
def test_parts_that_aotinductor_cannot_compile(part, reason, tmp_path):
    vae = make("wf_one_layer", torch.float32, **FAMILIES["wf_one_layer"])
    with pytest.raises(ValueError, match=f"for the {part} of this model, got 'aoti', whose {reason}"):
        export_model(vae, tmp_path / "out", "aoti", parts=(part,))
    assert not (tmp_path / "out").exists()


def test_a_program_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    vae, shift = make_tiny("leanvae", **SMALLEST), [0.0]
    graph = graphs_of(vae, ("decoder",), is_streaming=False)[0]

    def load(path: str) -> Any:
        return lambda *inputs: [output + shift[0] for output in graph.module(*inputs)]

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    files._compile(None, graph, tmp_path / "decoder.pt2", "")  # type: ignore[arg-type]
    shift[0] = 1.0
    with pytest.raises(ValueError, match="the decoder of this model, got 'aoti', whose program computes something"):
        files._compile(None, graph, tmp_path / "decoder.pt2", "")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "aoti"])
@torch.no_grad()
def test_programs_stream(to, tmp_path):
    vae = make_tiny("leanvae", **SMALLEST)
    graphs = {graph.name: graph for graph in graphs_of(vae, ("decoder",), is_streaming=True)}
    paths = export_model(vae, tmp_path / "out", to, parts=("decoder",), streaming=True)
    loaders = {
        "torch-export": lambda path: torch.export.load(path).module(),
        "aoti": lambda path: torch._inductor.aoti_load_package(str(path)),
    }
    programs = {path.stem: loaders[to](path) for path in paths}

    def run(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = programs[name](*(inputs[port.name] for port in graphs[name].inputs))
        return {port.name: output for port, output in zip(graphs[name].outputs, outputs, strict=True)}

    z = latents(vae, 2, 13, 2, 3)
    frames = stream(run, "decoder", z, [5, 4, 5], has_last=False)
    torch.testing.assert_close(frames, vae.decode(z).sample, rtol=0, atol=ATOL)


@pytest.mark.slow
@torch.no_grad()
def test_float16_computes_in_float16(tmp_path):
    vae = make_tiny("leanvae", **SMALLEST)
    expected = vae.decode(latents(vae, 1, 2, 2, 3)).sample
    vae = vae.to(torch.float16)
    export_model(vae, tmp_path / "out", parts=("decoder",))
    got = Runner(tmp_path / "out")("decoder", {"latents": latents(vae, 1, 2, 2, 3)})["video"]
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.013)  # measured 0.0032
