"""Pipelines and models of the package on disk, in fresh processes, and through the real Hub client.

The Hub here is that of `local_hub.py`, so nothing of this needs the network. A fresh process takes seconds to start:
one does everything that needs one, and reports.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from local_hub import LocalHub
from processes import run_python
from safetensors.torch import load_file
from tiny import make_tiny

from diffusers_leanvae import AutoencoderKLWFVAE, hub
from diffusers_leanvae.conversion import wfvae
from diffusers_leanvae.description import list_files


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


# --- With and without the import of the package ----------------------------------------------------------------------


@pytest.fixture
def loading_routes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/loading_routes.py`, which measures the table of the documentation."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import loading_routes  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "loading_routes", loading_routes)
    return loading_routes


def test_the_table_of_routes_says_what_is_expected(loading_routes: Any):
    path = Path(__file__).resolve().parents[2] / "results" / "loading_routes.json"
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
    assert b"trust_remote_code" in card and b"trust_remote_code" not in repositories["someone/plain"]["README.md"]


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
