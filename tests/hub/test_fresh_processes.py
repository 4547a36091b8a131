"""Pipelines and models of the package on disk, in fresh processes, and through the real Hub client.

The Hub here is that of `local_hub.py`, so nothing of this needs the network. A fresh process takes seconds to start:
one does everything that needs one, and reports.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard, constants
from local_hub import LocalHub
from processes import run_python
from safetensors.torch import load_file
from tiny import make_tiny
from typer.testing import CliRunner

import diffusers_leanvae
from diffusers_leanvae import AutoencoderKLLeanVAE, AutoencoderKLWFVAE, hub
from diffusers_leanvae.checks import sha256
from diffusers_leanvae.cli import app
from diffusers_leanvae.conversion import wfvae
from diffusers_leanvae.description import describe, list_files
from diffusers_leanvae.generation.lora import save_lora
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.loading import load_autoencoder, load_diffusion_pipeline, load_transformer


needs_transformers = pytest.mark.skipif(
    not diffusers.utils.is_transformers_available(), reason="diffusers' Wan pipelines need transformers"
)
# Of the package only its name is imported: that must be enough. Weights and frames go to files, the rest is printed.
FRESH = """
import json
import sys
import torch
import diffusers_leanvae

from diffusers import AutoModel, DiffusionPipeline
from diffusers_leanvae import hub
from diffusers_leanvae.conversion.leanvae import write_original_checkpoint
from diffusers_leanvae.loading import load_autoencoder
from huggingface_hub import HfApi, create_repo
from safetensors.torch import save_file

torch.set_num_threads(1)
shapes_folder, wan_folder, original_folder, output = sys.argv[1:]
classes, configs, errors = {}, {}, {}

def keep(name, model):
    classes[name], configs[name] = type(model).__name__, dict(model.config)
    assert type(model) is getattr(diffusers_leanvae, type(model).__name__)
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, f"{output}/{name}.safetensors")

def generate(name, pipeline, *arguments, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(*arguments, generator=generator, output_type="pt", **options).frames
    save_file({"frames": frames.contiguous()}, f"{output}/frames_{name}.safetensors")

for name, source in (("folder", shapes_folder), ("card", "someone/shapes"), ("plain", "someone/plain")):
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=name == "card")
    if name == "folder":
        hub.push_to_hub(pipeline, "someone/shapes")
        hub.push_to_hub(pipeline.vae, "someone/vae", card="# Ours")
        pipeline.push_to_hub("someone/plain", shim=False)
    classes[f"pipeline_{name}"] = type(pipeline).__name__
    keep(f"transformer_{name}", pipeline.transformer)
    keep(f"vae_{name}", pipeline.vae)
generate("shapes", pipeline, "square", num_inference_steps=2)
keep("transformer_auto", AutoModel.from_pretrained(f"{shapes_folder}/transformer"))
keep("vae_auto", AutoModel.from_pretrained("someone/vae", trust_remote_code=True))

if wan_folder:
    without = {"tokenizer": None, "text_encoder": None}
    pipeline = DiffusionPipeline.from_pretrained(wan_folder, **without)
    classes["pipeline_wan"] = type(pipeline).__name__
    keep("wan_folder", pipeline.vae)
    size = {"height": 32, "width": 48, "num_frames": 9}
    generate("wan", pipeline, prompt_embeds=torch.ones(1, 3, 16), num_inference_steps=1, guidance_scale=1.0, **size)
    pipeline.push_to_hub("someone/tiny-wan")
    pipeline.vae.push_to_hub("someone/tiny-leanvae")
    write_original_checkpoint(f"{output}/model.ckpt", dict(pipeline.vae.config), pipeline.vae.state_dict())
    place = {"path_in_repo": "original/model.ckpt", "repo_id": "someone/tiny-leanvae"}
    HfApi().upload_file(path_or_fileobj=f"{output}/model.ckpt", **place)
    leanvae = diffusers_leanvae.AutoencoderKLLeanVAE
    keep("wan_auto", AutoModel.from_pretrained(f"{wan_folder}/vae"))
    keep("wan_hub_class", leanvae.from_pretrained("someone/tiny-leanvae"))
    keep("wan_hub_auto", AutoModel.from_pretrained("someone/tiny-leanvae", trust_remote_code=True))
    keep("wan_hub_original", leanvae.from_single_file("someone/tiny-leanvae/original/model.ckpt"))
    keep("wan_hub_pipeline", DiffusionPipeline.from_pretrained("someone/tiny-wan", **without).vae)
    keep("wan_hub_subfolder", leanvae.from_pretrained("someone/tiny-wan", subfolder="vae"))

wfvae = diffusers_leanvae.AutoencoderKLWFVAE
for repo, place in (("someone/wf", "."), ("someone/videos", "vae")):
    create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=original_folder, path_in_repo=place)
wfvae.from_single_file("someone/wf/merged.ckpt").push_to_hub("someone/saved")
keep("wf_file", wfvae.from_single_file("someone/wf/merged.ckpt"))
for offline in (False, True):
    options = {"local_files_only": offline}
    keep(f"wf_class_{offline}", wfvae.from_single_file("someone/wf", **options))
    keep(f"wf_class_inside_{offline}", wfvae.from_single_file("someone/videos/vae", **options))
    for number, source in enumerate(("someone/wf", "someone/videos", "someone/videos/vae", "someone/saved")):
        keep(f"wf_any_{number}_{offline}", load_autoencoder(source, **options))
for name, load in (("original", wfvae.from_pretrained), ("nothing", load_autoencoder)):
    try:
        load({"original": "someone/wf", "nothing": "someone/nothing"}[name])
    except ValueError as error:
        errors[name] = str(error)
print(json.dumps({"classes": classes, "configs": configs, "errors": errors}))
"""


# --- What a fresh process finds, pushes and pulls --------------------------------------------------------------------


@pytest.fixture(scope="module")
def latte_pipeline() -> diffusers.DiffusionPipeline:
    transformer = make_tiny("latte", num_latent_frames=2, num_classes=2)
    pipeline = diffusers_leanvae.LeanVAELattePipeline(
        make_tiny("leanvae"), transformer, make_scheduler("ddpm"), id2label={0: "circle", 1: "square"}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def wan_pipeline() -> diffusers.DiffusionPipeline:
    """A stock pipeline with our autoencoder, tiny, random; without text encoder: prompts come as embeddings."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = make_tiny("leanvae", latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 3.0, 0.25])
    return diffusers.WanPipeline(None, None, vae, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), transformer)


@pytest.fixture(scope="module")
def wf_model() -> AutoencoderKLWFVAE:
    return make_tiny("wfvae", temporal_interpolation="nearest")


class Found(NamedTuple):
    """The folders that were saved, the repositories that were pushed, and what a fresh process says of both."""

    folders: dict[str, Path]
    repositories: dict[str, dict[str, bytes]]
    report: dict[str, Any]
    output: Path

    def assert_same(self, name: str, model: Any) -> None:
        assert self.report["classes"][name] == type(model).__name__
        config = json.loads(json.dumps(dict(model.config)))
        assert {k: v for k, v in self.report["configs"][name].items() if k[0] != "_"} == {
            k: v for k, v in config.items() if k[0] != "_"
        }
        weights, expected = load_file(self.output / f"{name}.safetensors"), model.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items()), name

    def frames(self, name: str) -> torch.Tensor:
        return load_file(self.output / f"frames_{name}.safetensors")["frames"]


@pytest.fixture(scope="module")
def found(
    latte_pipeline: diffusers.DiffusionPipeline,
    wf_model: AutoencoderKLWFVAE,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    folder = tmp_path_factory.mktemp("hub")
    folders, output = {name: folder / name for name in ("shapes", "wan", "original")}, folder / "output"
    output.mkdir()
    folders["original"].mkdir()
    # A config.json of the original next to its weights.
    torch.save(wfvae.to_original(wf_model.state_dict(), dict(wf_model.config)), folders["original"] / "merged.ckpt")
    config = {"_class_name": "WFVAEModel", "encoder_energy_flow_hidden_size": 3, "t_interpolation": "nearest"}
    (folders["original"] / "config.json").write_text(json.dumps(config))
    latte_pipeline.save_pretrained(folders["shapes"])
    if diffusers.utils.is_transformers_available():
        request.getfixturevalue("wan_pipeline").save_pretrained(folders["wan"])
    else:
        del folders["wan"]
    with LocalHub() as server:
        arguments = (folders["shapes"], folders.get("wan", ""), folders["original"], output)
        report = json.loads(run_python(FRESH, *arguments, **server.environment(folder)).splitlines()[-1])
    assert [path for path in server.unknown if "someone/nothing" not in path] == []
    return Found(folders, server.repositories, report, output)


# --- Cards -----------------------------------------------------------------------------------------------------------


RESULT = {"dataset": "val", "psnr_frame_mean_rgb": 26.3, "ssim_frame_mean_rgb": 0.786, "num_videos": 7} | {
    "num_frames": 17,
    "resolution": 256,
}


def test_cards_say_how_to_load(latte_pipeline: diffusers.DiffusionPipeline, tmp_path: Path):
    latte_pipeline.save_pretrained(tmp_path)
    card = hub.render_hub_card(tmp_path, "someone/shapes")
    assert card.startswith("---\nlibrary_name: diffusers\n") and "# shapes\n" in card
    assert 'diffusers_leanvae.LeanVAELattePipeline.from_pretrained("someone/shapes")' in card
    assert 'DiffusionPipeline.from_pretrained("someone/shapes", trust_remote_code=True)' in card
    assert "Classes: circle, square." in card and "| vae | `AutoencoderKLLeanVAE` |" in card
    count = sum(p.numel() for p in latte_pipeline.transformer.parameters()) / 1e6
    assert f"| transformer | `LeanVAELatteTransformer3DModel` | {count:.2f} M parameters |" in card
    assert "pip install diffusers-leanvae" not in card  # no registry has it
    with pytest.raises(ValueError, match="`repo_id` must be `user/name`, got 'vae'"):
        hub.push_to_hub(make_tiny("leanvae"), "vae")
    for folder in (tmp_path / "scheduler", tmp_path / "nothing", "-"):
        with pytest.raises(ValueError, match="`folder` must be that of a saved model, pipeline or adapter, got"):
            hub.push_folder(folder, "someone/vae")


def test_cards_carry_what_the_hub_reads(tmp_path: Path):
    make_tiny("leanvae").save_pretrained(tmp_path)
    weights = sha256(tmp_path / "diffusion_pytorch_model.safetensors")
    result = tmp_path / "val.json"
    result.write_text(json.dumps(RESULT | {"weights_sha256": weights}))
    picture = tmp_path / "sample.PNG"
    options = hub.CardOptions("apache-2.0", "someone/base", ("someone/clips",), (result,), picture)
    with pytest.raises(ValueError, match="`picture` must be an image file, got .*sample.PNG', which is no file"):
        hub.render_hub_card(tmp_path, "someone/vae", options)
    picture.write_bytes(b"picture")
    card = hub.render_hub_card(tmp_path, "someone/vae", options)
    data: Any = ModelCard(card).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "someone/base", ["someone/clips"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("diffusers", "video-to-video", "vae")
    found = {(each.metric_type, each.metric_name, each.metric_value) for each in data.eval_results}
    assert found == {("psnr", "psnr_frame_mean_rgb", 26.3), ("ssim", "ssim_frame_mean_rgb", 0.786)}
    assert "![A sample](picture.png)" in card and "4 latent channels, 4x8x8 compression" in card
    result.write_text(json.dumps(RESULT | {"weights_sha256": None}))
    with pytest.raises(ValueError, match="`results` must be of these weights, got .*val.json', measured with others"):
        hub.render_hub_card(tmp_path, "someone/vae", options)
    for text in ("[]", json.dumps(RESULT), "no JSON"):
        result.write_text(text)
        with pytest.raises(ValueError, match="`results` must be files of `leanvae eval`, got .*val.json"):
            hub.render_hub_card(tmp_path, "someone/vae", options)
    # Our own figures are of our own weights.
    published = Path(__file__).resolve().parent.parent / "results" / "val-17x256_compact-4ch.json"
    bundled_card = hub.render_hub_card("compact-4ch", "someone/vae", hub.CardOptions(results=(published,)))
    assert "| val: 7 videos, 17 frames, 256 pixels | psnr_frame_mean_rgb | 26.29" in bundled_card


# --- Push and pull ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub of this process, with a cache of its own."""
    with LocalHub() as server:
        server.connect(monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def leanvae(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_a_folder_is_pushed_and_pulled(server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_tiny("wfvae")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "shot.png").write_bytes(b"picture")
    options = ("--license", "apache-2.0", "--dataset", "someone/clips", "--picture", tmp_path / "shot.png")
    code, output = leanvae("push", tmp_path / "model", "someone/wf", "--private", *options)
    assert server.private == {"someone/wf"}
    assert code == 0 and f"{server.url}/someone/wf/commit/" in output, output
    files = server.repositories["someone/wf"]
    saved = {"config.json", "diffusion_pytorch_model.safetensors"}
    names = saved | {"README.md", "modeling_leanvae.py", "picture.png"}
    assert set(files) == names and b"license: apache-2.0" in files["README.md"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == saved  # as it was
    monkeypatch.chdir(tmp_path)
    code, output = leanvae("pull", "someone/wf")
    assert code == 0 and output.endswith("wf\n"), output
    assert {path.name for path in (tmp_path / "wf").iterdir()} == names
    for loaded in (AutoencoderKLWFVAE.from_pretrained("wf"), AutoencoderKLWFVAE.from_pretrained("someone/wf")):
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    code, output = leanvae("pull", "someone/wf")
    assert code == 1 and "FOLDER must not exist without `--overwrite`, got 'wf'" in output
    assert leanvae("pull", "someone/wf", "--overwrite")[0] == 0

    # A README stays, but for what is asked for.
    (tmp_path / "model" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Mine\n")
    options = ("--base-model", "someone/base", "--no-shim", "--message", "Again")
    code, output = leanvae("push", tmp_path / "model", "someone/wf", *options, "--picture", tmp_path / "shot.png")
    assert code == 1 and "`picture` must be none for a folder with a README, got" in output
    server.repositories["someone/wf"] = {}
    assert leanvae("push", tmp_path / "model", "someone/wf", *options)[0] == 0
    assert set(server.repositories["someone/wf"]) == saved | {"README.md"} and server.messages[-1] == "Again"
    card = server.repositories["someone/wf"]["README.md"].decode()
    assert "base_model: someone/base" in card and "license" not in card and card.rstrip().endswith("# Mine")


def test_branches_variants_and_pull_requests(server: LocalHub, tmp_path: Path):
    model = make_tiny("leanvae")
    assert "/commit/" in model.push_to_hub("someone/vae", variant="fp16", revision="half", private=True)
    assert server.branches == {"someone/vae": {"half"}}
    assert "diffusion_pytorch_model.fp16.safetensors" in server.repositories["someone/vae"]
    assert model.push_to_hub("someone/vae", create_pr=True).endswith("/someone/vae/discussions/1")
    hub.pull("someone/vae", tmp_path / "plain")
    hub.pull("someone/vae", tmp_path / "half", variant="fp16", revision="half")
    for name, weights in (("plain", "diffusion_pytorch_model"), ("half", "diffusion_pytorch_model.fp16")):
        assert [path.name for path in (tmp_path / name).glob("*.safetensors")] == [f"{weights}.safetensors"]
    with pytest.raises(ValueError, match="`variant` must be one of 'someone/vae', which has 'fp16', got 'fp1'"):
        hub.pull("someone/vae", tmp_path / "x", variant="fp1")
    model.push_to_hub("someone/more", subfolder="vae")
    assert {name.split("/")[0] for name in server.repositories["someone/more"]} == {"vae"}
    assert "vae/README.md" not in server.repositories["someone/more"]


@pytest.mark.parametrize("family", ["leanvae", "wfvae", "ivvae"])
def test_autoencoders_come_back_the_same(family: str, server: LocalHub, tmp_path: Path):
    model = make_tiny(family)
    model.push_to_hub("someone/vae")
    hub.pull("someone/vae", tmp_path / "vae")
    for source in ("someone/vae", tmp_path / "vae"):
        loaded = type(model).from_pretrained(source)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
        assert "auto_map" not in loaded.config


def test_pipelines_come_back_the_same(server: LocalHub, tmp_path: Path, latte_pipeline: diffusers.DiffusionPipeline):
    latte_pipeline.push_to_hub("someone/shapes")
    files = dict(server.repositories["someone/shapes"])
    hub.pull("someone/shapes", tmp_path / "shapes")
    assert describe(str(tmp_path / "shapes"))["class"] == "LeanVAELattePipeline"
    for source in ("someone/shapes", tmp_path / "shapes"):
        for load in (diffusers_leanvae.LeanVAELattePipeline.from_pretrained, load_diffusion_pipeline):
            loaded = load(source)
            assert type(loaded) is diffusers_leanvae.LeanVAELattePipeline and loaded.labels == latte_pipeline.labels
            for name in ("vae", "transformer"):
                expected = getattr(latte_pipeline, name).state_dict()
                found = getattr(loaded, name).state_dict()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    hub.push_folder(tmp_path / "shapes", "someone/again")  # a folder that has the shims already
    assert server.repositories["someone/again"] == files


def test_adapters_come_back_the_same(server: LocalHub, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    transformer = make_tiny("latte", num_latent_frames=2, num_classes=2)
    pipeline = diffusers_leanvae.LeanVAELattePipeline(make_tiny("leanvae"), transformer, make_scheduler("ddpm"))
    transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    save_lora(transformer, tmp_path / "style")
    described = describe(str(tmp_path / "style"))
    assert described == describe(str(tmp_path / "style" / "pytorch_lora_weights.safetensors"))
    assert {"kind": "adapter", "components": ["transformer"], "rank": 3, "alpha": 6}.items() <= described.items()
    assert leanvae("push", tmp_path / "style", "someone/style", "--base-model", "someone/shapes")[0] == 0
    assert set(server.repositories["someone/style"]) == {"README.md", "pytorch_lora_weights.safetensors"}
    card = server.repositories["someone/style"]["README.md"].decode()
    assert "base_model: someone/shapes\n" in card and "- lora\n" in card and "of rank 3 of the transformer" in card
    assert 'from_pretrained("someone/shapes")\npipeline.load_lora_weights("someone/style")' in card
    with pytest.raises(ValueError, match="`results` must be of these weights"):
        results = (Path(__file__).resolve().parent.parent / "results" / "val-17x256_compact-4ch.json",)
        hub.push_folder(tmp_path / "style", "someone/style", card=hub.CardOptions(results=results))
    hub.pull("someone/style", tmp_path / "pulled")
    expected = {name: tensor.clone() for name, tensor in transformer.state_dict().items() if "lora" in name}
    pipeline.unload_lora_weights()
    for source in ("someone/style", tmp_path / "pulled"):  # these tests start offline: diffusers does not look for it
        pipeline.load_lora_weights(source, adapter_name="default", weight_name="pytorch_lora_weights.safetensors")
        found = {name: tensor for name, tensor in transformer.state_dict().items() if "lora" in name}
        assert found.keys() == expected.keys() and len(expected) > 2
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        pipeline.unload_lora_weights()


def test_bundled_names(server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = AutoencoderKLLeanVAE.from_pretrained("compact-4ch", dtype=torch.float16)
    assert model.config["latent_channels"] == 4 and model.dtype == torch.float16
    with pytest.raises(ValueError, match="must be given an `AutoencoderKLWFVAE`"):
        AutoencoderKLWFVAE.from_pretrained("compact-4ch")
    load = diffusers_leanvae.LeanVAELattePipeline.from_pretrained
    pipeline = load("mini-shapes", torch_dtype=torch.bfloat16)
    assert pipeline.vae.dtype == pipeline.transformer.dtype == torch.bfloat16 and len(pipeline.labels) > 1
    dtypes = {"vae": torch.float16, "default": torch.float32}
    pipeline = load("mini-shapes", dtype=dtypes)
    assert pipeline.vae.dtype == torch.float16 and pipeline.transformer.dtype == torch.float32
    assert load("mini-shapes", vae=model).vae is model

    assert leanvae("push", "mini-shapes", "someone/shapes")[0] == 0
    pushed = load("someone/shapes")
    assert pushed.vae.config["latent_channels"] == 4 and pushed.labels == pipeline.labels
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    make_tiny("leanvae").save_pretrained("compact-4ch")
    weights = Path("compact-4ch", "diffusion_pytorch_model.safetensors").read_bytes()
    assert leanvae("push", "compact-4ch", "someone/tiny")[0] == 0
    assert server.repositories["someone/tiny"]["diffusion_pytorch_model.safetensors"] == weights
    assert AutoencoderKLLeanVAE.from_pretrained("compact-4ch").config["low_freq_dim"] != model.config["low_freq_dim"]


# --- What goes wrong -------------------------------------------------------------------------------------------------


WEIGHTS = "diffusion_pytorch_model.safetensors"


class Evil:
    def __reduce__(self):
        return print, ("run",)


def fails(message: str, repo_id: str, *calls: Any, **options: Any) -> None:
    """Check that each call ends in one sentence."""
    for call in calls:
        with pytest.raises((OSError, ValueError), match=message) as found:
            call(repo_id, **options)
        assert "\n" not in str(found.value) and len(str(found.value)) < 400, str(found.value)


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("vae")
    make_tiny("leanvae").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pull(tmp_path: Path) -> Any:
    def pull(repo_id: str, **options: Any) -> None:
        hub.pull(repo_id, tmp_path / "pulled", **options)

    return pull


LOADERS = (
    AutoencoderKLLeanVAE.from_pretrained,
    diffusers_leanvae.LeanVAELatteTransformer3DModel.from_pretrained,
    diffusers_leanvae.LeanVAELattePipeline.from_pretrained,
    load_autoencoder,
    load_transformer,
    load_diffusion_pipeline,
)


def test_what_is_not_there_is_said_in_a_sentence(
    server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae_files: dict[str, bytes], pull: Any
):
    pipeline = {"model_index.json": b'{"_class_name": "LeanVAELattePipeline"}'}
    server.repositories = {"someone/vae": vae_files | pipeline, "someone/private": vae_files}
    fails("there is no model 'someone/nothing' on the Hub, or it is private and", "someone/nothing", *LOADERS, pull)
    fails("the model 'someone/vae' has no revision 'v9'", "someone/vae", *LOADERS, pull, revision="v9")
    server.private = {"someone/private"}
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        fails("there is no model 'someone/private' on the Hub, or it is private", "someone/private", *LOADERS, pull)
    assert load_autoencoder("someone/private").config["latent_channels"] == 4
    server.user = None
    fails("the Hub does not know the token: run `hf auth login` again, or", "someone/vae", *LOADERS, pull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "the Hub cannot be reached, and it is not in its cache|HF_HUB_OFFLINE forbids to ask the Hub"
    fails(message, "someone/vae", *LOADERS, pull)


def test_what_is_damaged_is_said_in_a_sentence(
    server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae_files: dict[str, bytes], pull: Any
):
    server.repositories = {"someone/vae": vae_files}
    loaders = (AutoencoderKLLeanVAE.from_pretrained, load_autoencoder)
    server.cut = {WEIGHTS}
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)  # the client tries five times
        fails(r"the download failed \(.*closed connection", "someone/vae", *loaders, pull)
    assert not (tmp_path / "pulled").exists()
    server.cut = set()
    server.damaged = {WEIGHTS: vae_files[WEIGHTS][:-4] + b"\0\0\0\1"}
    fails(f"must have sound files, got 'someone/vae' with a damaged '{WEIGHTS}': pull it again", "someone/vae", pull)
    server.damaged, server.sent = {}, []
    pull("someone/vae")
    assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == vae_files[WEIGHTS]
    assert server.sent == [WEIGHTS]  # what was complete and sound is not fetched again

    server.repositories = {
        "someone/config": vae_files | {"config.json": b"{"},
        "someone/header": vae_files | {WEIGHTS: b"\xff" * 99},
        "someone/part": vae_files | {WEIGHTS: vae_files[WEIGHTS][:-99]},
    }
    fails("config.json", "someone/config", *loaders)
    for name in ("header", "part"):
        fails(f"got 'someone/{name}'.* its weights are damaged", f"someone/{name}", *loaders)


def test_nothing_of_a_repository_is_run_or_leaves_the_folder(
    server: LocalHub, tmp_path: Path, vae_files: dict[str, bytes], pull: Any, capsys: pytest.CaptureFixture
):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    evil = (tmp_path / "evil.ckpt").read_bytes()
    server.repositories = {
        f"someone/climbs{number}": vae_files | {name: b"climbed"}
        for number, name in enumerate(("../../climbed.txt", "/climbed.txt", "a/../../climbed.txt", "..\\climbed.txt"))
    }
    for number, repo_id in enumerate(list(server.repositories)):
        fails(f"must have files inside its folder, got 'someone/climbs{number}' with '.*climbed.txt'", repo_id, pull)
    server.repositories = {
        "someone/original": {"evil.ckpt": evil},
        "someone/saved": {"config.json": vae_files["config.json"], "diffusion_pytorch_model.bin": evil},
    }
    load = AutoencoderKLLeanVAE.from_pretrained
    fails("it wants to import '.*print'", "someone/original", load_autoencoder)
    fails("got 'someone/original' with evil.ckpt and no `config.json`: for an original", "someone/original", load)
    fails("got 'someone/saved'.*it wants to import '.*print'", "someone/saved", load, load_autoencoder)
    pull("someone/saved")
    shim = server.repositories["someone/shim"] = dict(vae_files)
    config = json.loads(shim["config.json"]) | {"auto_map": {"AutoModel": "modeling_leanvae.AutoencoderKLLeanVAE"}}
    shim |= {"config.json": json.dumps(config).encode(), "modeling_leanvae.py": b"print('run')"}
    for loader in (load, load_autoencoder):
        assert loader("someone/shim").config["latent_channels"] == 4
    assert "run" not in capsys.readouterr().out and not list(tmp_path.rglob("climbed.txt"))


# --- With and without the import of the package ----------------------------------------------------------------------


@pytest.fixture
def loading_routes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/loading_routes.py`, which measures the table of the documentation."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import loading_routes  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "loading_routes", loading_routes)
    return loading_routes


def test_the_table_of_routes_says_what_is_expected(loading_routes: Any):
    path = Path(__file__).resolve().parent.parent / "results" / "loading_routes.json"
    rows = json.loads(path.read_text())["rows"]  # from folders, by every supported release of diffusers
    versions = {key for row in rows for key in row} - {"model", "call", "package"}
    assert {version.rsplit(".", 1)[0] for version in versions} == {"diffusers 0.41", "diffusers 0.42"}
    for row, expected in zip(rows, loading_routes.EXPECTED.values(), strict=True):
        assert {row[version] for version in versions} == {expected}


@pytest.mark.slow  # an interpreter, and a process for each of 14 ways
@needs_transformers
def test_routes_with_and_without_the_import(
    latte_pipeline: diffusers.DiffusionPipeline,
    wan_pipeline: diffusers.DiffusionPipeline,
    loading_routes: Any,
    tmp_path: Path,
):
    with LocalHub() as server:
        for name, model in {"vae": latte_pipeline.vae, "shapes": latte_pipeline, "wan": wan_pipeline}.items():
            model.save_pretrained(tmp_path / name)
            files = list_files(tmp_path / name)
            saved = {file: path.read_bytes() for file, path in files.items()}
            server.repositories[f"someone/{name}"] = saved | hub.make_shims(files)
        sources = {name: f"someone/{name}" for name in ("vae", "shapes", "wan")}
        report = loading_routes.measure(sources, server.environment(tmp_path))
    assert report == loading_routes.EXPECTED


# --- Whether a push would succeed ------------------------------------------------------------------------------------


def token(role: str, **scopes: list[str]) -> dict:
    scoped = [{"entity": {"type": "user", "name": name}, "permissions": rights} for name, rights in scopes.items()]
    return {"accessToken": {"role": role, "fineGrained": {"scoped": scoped}}}


def test_a_push_that_would_succeed_passes_the_check(monkeypatch: pytest.MonkeyPatch):
    with LocalHub() as server:
        server.connect(monkeypatch)
        server.repositories = {"other/shared": {}}
        server.user = {"name": "Someone", "orgs": [{"name": "team", "roleInOrg": "write"}], "auth": token("write")}
        for repo_id in ("someone/new", "team/new", "other/shared"):
            hub.check_push(repo_id)
        server.user["auth"] = token("fineGrained", team=["repo.write"], Someone=["repo.content.read"])
        hub.check_push("team/new")
        with pytest.raises(
            ValueError, match="`push_to_hub` needs a token that may write for 'someone', got 'someone/new'"
        ):
            hub.check_push("someone/new")
    assert list(server.repositories) == ["other/shared"] and server.unknown == []  # nothing was created


def test_a_push_that_would_fail_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def check(repo_id: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as found:
            hub.check_push(repo_id)
        assert "\n" not in str(found.value)

    with LocalHub() as server:
        server.connect(monkeypatch)
        server.repositories, server.protected = {"other/theirs": {}}, {"other/theirs"}
        server.user = {"name": "someone", "orgs": [{"name": "team", "roleInOrg": "read"}], "auth": token("write")}
        for repo_id in ("vae", "a/b/c", "some one/vae"):
            check(repo_id, f"`push_to_hub` must be `user/name`, got '{repo_id}'")
        for repo_id in ("other/new", "team/new"):
            check(repo_id, f"`push_to_hub` must begin with one of 'someone', .* got '{repo_id}'")
        check("other/theirs", "`push_to_hub` needs the permission to write there, got 'other/theirs': .*403")
        server.user["auth"] = token("read")
        check("someone/new", "`push_to_hub` needs a token that may write for 'someone'")
        server.user = None
        check("someone/new", "`push_to_hub` needs a valid login: .*Invalid user token")
        with monkeypatch.context() as patch:
            patch.delenv("HF_TOKEN")
            patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
            check("someone/new", "`push_to_hub` needs a login: run `hf auth login` or set HF_TOKEN, got 'someone/new'")
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            check("someone/new", "`push_to_hub` needs the Hub, which HF_HUB_OFFLINE forbids to ask, got 'someone/new'")
    check("someone/new", "`push_to_hub` needs a connection to the Hub, got 'someone/new' and none to http://127.0.0.1")


# --- A stock pipeline with our autoencoder ---------------------------------------------------------------------------


@needs_transformers
def test_a_stock_pipeline_loads_and_runs(found: Found, wan_pipeline: diffusers.DiffusionPipeline):
    index = json.loads((found.folders["wan"] / "model_index.json").read_text())
    assert index["_class_name"] == found.report["classes"]["pipeline_wan"] == "WanPipeline"
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]
    for name in ("wan_folder", "wan_auto"):
        found.assert_same(name, wan_pipeline.vae)
    frames = found.frames("wan")
    assert frames.shape == (1, 9, 3, 32, 48)
    assert frames.isfinite().all() and frames.std() > 0.01


@needs_transformers
def test_a_stock_pipeline_and_its_autoencoder_are_pushed_and_pulled(
    found: Found, wan_pipeline: diffusers.DiffusionPipeline
):
    vae_files = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "modeling_leanvae.py"}
    vae_files |= {"original/model.ckpt"}
    assert set(found.repositories["someone/tiny-leanvae"]) == vae_files
    index = json.loads(found.repositories["someone/tiny-wan"]["model_index.json"])
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]
    for source in ("class", "auto", "original", "pipeline", "subfolder"):
        found.assert_same(f"wan_hub_{source}", wan_pipeline.vae)


# --- Our pipelines ---------------------------------------------------------------------------------------------------


def test_our_pipeline_comes_from_a_folder_and_from_the_hub(found: Found, latte_pipeline: diffusers.DiffusionPipeline):
    index = json.loads((found.folders["shapes"] / "model_index.json").read_text())
    assert index["_class_name"] == "LeanVAELattePipeline"
    assert index["transformer"] == ["diffusers_leanvae", "LeanVAELatteTransformer3DModel"]
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]
    for source in ("folder", "card", "plain"):
        assert found.report["classes"][f"pipeline_{source}"] == "LeanVAELattePipeline"
        found.assert_same(f"transformer_{source}", latte_pipeline.transformer)
        found.assert_same(f"vae_{source}", latte_pipeline.vae)
    found.assert_same("transformer_auto", latte_pipeline.transformer)
    found.assert_same("vae_auto", latte_pipeline.vae)
    generator = torch.Generator().manual_seed(0)
    expected = latte_pipeline(1, num_inference_steps=2, generator=generator, output_type="pt").frames
    assert expected.std() > 0.01
    torch.testing.assert_close(found.frames("shapes"), expected, rtol=0, atol=1e-4)


def test_cards_are_pushed_with_models(found: Found):
    repositories = found.repositories
    card = repositories["someone/shapes"]["README.md"]
    assert b'LeanVAELattePipeline.from_pretrained("someone/shapes")' in card
    assert repositories["someone/vae"]["README.md"] == b"# Ours"


# --- Original folders ------------------------------------------------------------------------------------------------


def test_original_folders_on_the_hub(found: Found, wf_model: AutoencoderKLWFVAE):
    # In a repository of its own and in a folder of another.
    names = [name for name in found.report["classes"] if name.startswith("wf_")]
    assert len(names) == 1 + 2 * (2 + 4)
    for name in names:
        found.assert_same(name, wf_model)
    errors = found.report["errors"]
    assert "call `AutoencoderKLWFVAE.from_single_file('someone/wf')`" in errors["original"]
    assert "must be there and readable, got 'someone/nothing'" in errors["nothing"] and "\n" not in errors["nothing"]
