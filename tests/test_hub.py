"""Pipelines and models of the package on disk, in fresh processes, and through the real Hub client.

The Hub here is a few routes on 127.0.0.1, so nothing of this needs the network.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import diffusers
import pytest
import torch

import diffusers_leanvae
from diffusers_leanvae import AutoencoderKLLeanVAE, hub
from diffusers_leanvae.generation.schedulers import make_scheduler


# What every fresh process starts with. Only the package is imported: that must be enough.
PREAMBLE = """
import sys
import torch
import diffusers_leanvae
torch.set_num_threads(1)
"""


def run_python(code: str, *arguments: object, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- Cards -----------------------------------------------------------------------------------------------------------


def test_cards_say_how_to_load(make_model: Callable, latte_pipeline: diffusers.DiffusionPipeline):
    card = hub.render_hub_card(latte_pipeline, "someone/shapes")
    assert card.startswith("---\nlibrary_name: diffusers\n") and "# shapes\n" in card
    assert "import diffusers_leanvae" in card and 'DiffusionPipeline.from_pretrained("someone/shapes")' in card
    assert "Classes: circle, square." in card and "| vae | `AutoencoderKLLeanVAE` |" in card
    count = sum(p.numel() for p in latte_pipeline.transformer.parameters()) / 1e6
    assert f"| transformer | `LeanVAELatteTransformer3DModel` | {count:.2f} M parameters |" in card
    card = hub.render_hub_card(make_model(), "someone/vae")
    assert 'AutoModel.from_pretrained("someone/vae")' in card and "4 latent channels, 4x8x8 compression" in card
    with pytest.raises(ValueError, match="`repo_id` must be `user/name`, got 'vae'"):
        hub.push_to_hub(make_model(), "vae")


# --- A stock pipeline with our autoencoder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(make_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""A stock `WanPipeline`, tiny, random, with our autoencoder; without text encoder: prompts come as embeddings."""
    if not diffusers.utils.is_transformers_available():
        pytest.skip("diffusers' Wan pipelines need transformers, which is not installed in this environment")
    torch.manual_seed(0)
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
    vae = make_model(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 3.0, 0.25])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipeline = diffusers.WanPipeline(None, None, vae, scheduler, transformer)
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def test_index_names_the_package(pipeline_folder: Path):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]


def test_pipeline_loads_and_runs_in_a_fresh_process(pipeline_folder: Path, tmp_path: Path):
    code = """
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import save_file

folder, target = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
vae = AutoModel.from_pretrained(f"{folder}/vae")
assert type(pipeline).__name__ == "WanPipeline"
assert type(pipeline.vae) is type(vae) is diffusers_leanvae.AutoencoderKLLeanVAE
embeds = torch.ones(1, 3, 16)
options = dict(height=32, width=48, num_frames=9, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
pipeline.set_progress_bar_config(disable=True)
frames = pipeline(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **options).frames
save_file({"frames": frames.contiguous(), **vae.state_dict()}, target)
"""
    run_python(code, pipeline_folder, tmp_path / "result.safetensors", HF_HUB_OFFLINE="1")
    from safetensors.torch import load_file

    result = load_file(tmp_path / "result.safetensors")
    frames = result.pop("frames")
    assert frames.shape == (1, 9, 3, 32, 48)
    assert frames.isfinite().all() and frames.std() > 0.01
    assert_same_weights(result, AutoencoderKLLeanVAE.from_pretrained(pipeline_folder / "vae").state_dict())


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


# --- Push and pull ---------------------------------------------------------------------------------------------------


class LocalHub(ThreadingHTTPServer):
    r"""Repositories of models in memory: the routes of the Hub that pushing and pulling use."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []  # requests that no route answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_id(self, repo: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.repositories[repo].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, repositories = unquote(urlsplit(self.path).path), self.server.repositories
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            status = 409 if repo in repositories else 200
            repositories.setdefault(repo, {})
            self.answer({"url": f"{self.server.url}/{repo}"}, status)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "file":
                    value = operation["value"]
                    repositories[repo][value["path"]] = base64.b64decode(value["content"])
            commit = self.server.commit_id(repo)
            url = f"{self.server.url}/{repo}/commit/{commit}"
            self.answer({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self.not_found(path)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for repo, files in self.server.repositories.items():
            commit = self.server.commit_id(repo)
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
                return
            if path.startswith(f"/api/models/{repo}/tree/"):
                sizes = {name: len(content) for name, content in files.items()}
                self.answer([{"type": "file", "path": p, "size": n, "oid": commit} for p, n in sizes.items()])
                return
            if path.startswith(f"/{repo}/resolve/"):
                name = path.removeprefix(f"/{repo}/resolve/").split("/", 1)[1]
                if name in files:
                    etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                    self.answer(files[name], X_Repo_Commit=commit, ETag=etag)
                else:
                    self.answer(b"", 404, X_Repo_Commit=commit, X_Error_Code="EntryNotFound")
                return
        self.not_found(path)

    do_HEAD = do_GET

    def not_found(self, path: str) -> None:
        self.server.unknown.append(f"{self.command} {path}")
        self.answer(b"", 404, X_Error_Code="RepoNotFound")


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub_environment(local_hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": local_hub.url,
        "HF_HOME": str(tmp_path / "hf"),  # nothing is found in, or left in, the user's cache
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_the_test",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def latte_pipeline(make_model: Callable) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers_leanvae.LeanVAELatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        sample_size=4,
        num_latent_frames=2,
        num_classes=2,
    )
    for parameter in transformer.parameters():  # a fresh model gives zero
        torch.nn.init.normal_(parameter, std=0.1)
    return diffusers_leanvae.LeanVAELattePipeline(
        make_model(), transformer, make_scheduler("ddpm"), id2label={0: "circle", 1: "square"}
    )


def test_our_pipeline_in_fresh_processes_from_a_folder_and_from_the_hub(
    local_hub: LocalHub,
    hub_environment: dict[str, str],
    latte_pipeline: diffusers.DiffusionPipeline,
    tmp_path: Path,
):
    folder = tmp_path / "pipeline"
    latte_pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LeanVAELattePipeline"
    assert index["transformer"] == ["diffusers_leanvae", "LeanVAELatteTransformer3DModel"]
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]
    push = """
from diffusers import AutoModel, DiffusionPipeline
from diffusers_leanvae import hub

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(AutoModel.from_pretrained(f"{sys.argv[1]}/transformer")) is type(pipeline.transformer)
hub.push_to_hub(pipeline, "someone/shapes")
hub.push_to_hub(pipeline.vae, "someone/vae", card="# Ours")
pipeline.push_to_hub("someone/plain")
"""
    run_python(push, folder, **hub_environment)
    pull = """
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import save_file

for repo in ("someone/shapes", "someone/plain"):
    pipeline = DiffusionPipeline.from_pretrained(repo)
assert type(AutoModel.from_pretrained("someone/vae")) is diffusers_leanvae.AutoencoderKLLeanVAE
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
frames = pipeline("square", num_inference_steps=2, generator=generator, output_type="pt").frames
save_file({"frames": frames.contiguous()}, sys.argv[1])
"""
    run_python(pull, tmp_path / "frames.safetensors", **hub_environment)
    from safetensors.torch import load_file

    latte_pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = latte_pipeline(1, num_inference_steps=2, generator=generator, output_type="pt").frames
    torch.testing.assert_close(load_file(tmp_path / "frames.safetensors")["frames"], expected, rtol=0, atol=1e-4)
    files = local_hub.repositories
    assert b'DiffusionPipeline.from_pretrained("someone/shapes")' in files["someone/shapes"]["README.md"]
    assert files["someone/vae"]["README.md"] == b"# Ours"
    assert local_hub.unknown == []


def test_push_and_pull(local_hub: LocalHub, hub_environment: dict[str, str], pipeline_folder: Path, tmp_path: Path):
    code = """
from pathlib import Path
from diffusers import AutoModel, DiffusionPipeline
from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.conversion.leanvae import write_original_checkpoint
from huggingface_hub import HfApi

folder, scratch = map(Path, sys.argv[1:])
vae = AutoencoderKLLeanVAE.from_pretrained(folder / "vae")
vae.push_to_hub("someone/tiny-leanvae")

original = scratch / "model.ckpt"
write_original_checkpoint(original, dict(vae.config), vae.state_dict())
HfApi().upload_file(path_or_fileobj=original, path_in_repo="original/model.ckpt", repo_id="someone/tiny-leanvae")

pipeline = DiffusionPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
pipeline.push_to_hub("someone/tiny-wan")

def check(pulled):
    assert type(pulled) is AutoencoderKLLeanVAE
    for key, tensor in vae.state_dict().items():
        assert torch.equal(pulled.state_dict()[key], tensor), key
    for key in ("latent_channels", "low_freq_dim", "pixel_factor", "scaling_factor", "latents_mean", "latents_std"):
        assert pulled.config[key] == vae.config[key], key

check(AutoencoderKLLeanVAE.from_pretrained("someone/tiny-leanvae"))
check(AutoModel.from_pretrained("someone/tiny-leanvae"))
check(AutoencoderKLLeanVAE.from_single_file("someone/tiny-leanvae/original/model.ckpt"))
check(DiffusionPipeline.from_pretrained("someone/tiny-wan", tokenizer=None, text_encoder=None).vae)
check(AutoencoderKLLeanVAE.from_pretrained("someone/tiny-wan", subfolder="vae"))
"""
    run_python(code, pipeline_folder, tmp_path, **hub_environment)
    vae_files = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "original/model.ckpt"}
    assert set(local_hub.repositories["someone/tiny-leanvae"]) == vae_files
    index = json.loads(local_hub.repositories["someone/tiny-wan"]["model_index.json"])
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]
    assert local_hub.unknown == []


def test_original_folders_on_the_hub(local_hub: LocalHub, hub_environment: dict[str, str], tmp_path: Path):
    # A config.json of the original next to its weights, in a repository of its own and in a folder of another.
    code = """
import json
from pathlib import Path
from diffusers_leanvae import AutoencoderKLWFVAE
from diffusers_leanvae.conversion import wfvae
from diffusers_leanvae.loading import load_autoencoder
from huggingface_hub import HfApi, create_repo

folder, = map(Path, sys.argv[1:])
sizes = dict(latent_channels=4, base_channels=4, encoder_flow_channels=3, decoder_flow_channels=2)
vae = AutoencoderKLWFVAE(**sizes, temporal_interpolation="nearest").eval()
torch.save(wfvae.to_original(vae.state_dict(), dict(vae.config)), folder / "merged.ckpt")
config = {"_class_name": "WFVAEModel", "encoder_energy_flow_hidden_size": 3, "t_interpolation": "nearest"}
(folder / "config.json").write_text(json.dumps(config))
for repo, place in (("someone/wf", "."), ("someone/videos", "vae")):
    create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder, path_in_repo=place)
vae.push_to_hub("someone/saved")

def check(loaded):
    assert type(loaded) is AutoencoderKLWFVAE and loaded.config["temporal_interpolation"] == "nearest"
    for key, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key

check(AutoencoderKLWFVAE.from_single_file("someone/wf/merged.ckpt"))
for offline in (False, True):
    check(AutoencoderKLWFVAE.from_single_file("someone/wf", local_files_only=offline))
    check(AutoencoderKLWFVAE.from_single_file("someone/videos/vae", local_files_only=offline))
    check(load_autoencoder("someone/wf", local_files_only=offline))
    check(load_autoencoder("someone/videos", local_files_only=offline))
    check(load_autoencoder("someone/videos/vae", local_files_only=offline))
    check(load_autoencoder("someone/saved", local_files_only=offline))
try:
    AutoencoderKLWFVAE.from_pretrained("someone/wf")
except ValueError as error:
    assert "call `AutoencoderKLWFVAE.from_single_file('someone/wf')`" in str(error), error
else:
    raise AssertionError("an original folder was loaded as a saved one")
try:
    load_autoencoder("someone/nothing")
except ValueError as error:
    assert "must be there and readable, got 'someone/nothing'" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("a repository was found that does not exist")
"""
    run_python(code, tmp_path, **hub_environment)
    assert {path for path in local_hub.unknown if "someone/nothing" not in path} == set()
