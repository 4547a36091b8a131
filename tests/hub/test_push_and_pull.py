"""What is pushed comes back the same, and what cannot be pushed is known before."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import constants
from local_hub import LocalHub
from tiny import make_tiny
from typer.testing import CliRunner

import diffusers_leanvae
from diffusers_leanvae import AutoencoderKLLeanVAE, AutoencoderKLWFVAE, hub
from diffusers_leanvae.cli import app
from diffusers_leanvae.description import describe
from diffusers_leanvae.generation.lora import save_lora
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.loading import load_autoencoder, load_diffusion_pipeline


def leanvae(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def assert_same(loaded: Any, model: Any) -> None:
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


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
    # What is no model is not replaced, and least of all the folder that one is in.
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    refused = {"work": "FOLDER must be new, empty or a model folder", "shot.png": "FOLDER must be a folder"}
    for name, message in refused.items():
        code, output = leanvae("pull", "someone/wf", name, "--overwrite")
        assert code == 1 and message in output, output
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "work" / "deep")
        for name in (".", "..", tmp_path / "work"):
            code, output = leanvae("pull", "someone/wf", name, "--overwrite")
            assert code == 1 and "FOLDER must not be the current folder, which would be replaced" in output
            with pytest.raises(ValueError, match="^`folder` must not be the current folder"):
                hub.pull("someone/wf", Path(name))
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert leanvae("pull", "someone/wf", "empty", "--overwrite")[0] == 0

    # A README stays, but for what is asked for.
    (tmp_path / "model" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Mine\n")
    options = ("--base-model", "someone/base", "--no-shim", "--message", "Again")
    code, output = leanvae("push", tmp_path / "model", "someone/wf", *options, "--picture", tmp_path / "shot.png")
    assert code == 1 and "picture` must be none for a folder with a README, got" in output
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


def test_former_weights_do_not_stay_in_force(server: LocalHub, tmp_path: Path):
    first, second = make_tiny("leanvae", seed=1), make_tiny("leanvae", seed=2)
    weights = "diffusion_pytorch_model"
    kept = {f"{weights}.fp16.safetensors", f"vae/{weights}-00001-of-00002.safetensors", "other.safetensors"}
    server.repositories["someone/vae"] = dict.fromkeys(kept | {f"{weights}.bin"}, b"mine")
    first.push_to_hub("someone/vae", max_shard_size="40KB")
    files = server.repositories["someone/vae"]
    assert f"{weights}.safetensors.index.json" in files and f"{weights}.bin" not in files and kept < files.keys()
    second.push_to_hub("someone/vae")
    assert files.keys() == kept | {f"{weights}.safetensors", "config.json", "README.md", "modeling_leanvae.py"}
    assert_same(AutoencoderKLLeanVAE.from_pretrained("someone/vae"), second)
    first.push_to_hub("someone/vae", max_shard_size="40KB", variant="fp16")
    assert f"{weights}.safetensors" in files and f"{weights}.fp16.safetensors" not in files
    assert_same(AutoencoderKLLeanVAE.from_pretrained("someone/vae", variant="fp16"), first)
    assert_same(AutoencoderKLLeanVAE.from_pretrained("someone/vae"), second)


def test_illegal_arguments_of_a_push(server: LocalHub, tmp_path: Path):
    model = make_tiny("leanvae")
    model.save_pretrained(tmp_path / "model")
    for name, values, legal in (
        ("variant", ("a/b", "", 7), "a part of the name of a file"),
        ("card", (7,), "the text of a README, `CardOptions` or None"),
        ("subfolder", ("../x", "a/../b"), "a folder in the repository such as 'vae'"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"^`{name}` must be {legal}.*, got {value!r}[.]$"):
                model.push_to_hub("someone/vae", **{name: value})
            if name != "variant":
                with pytest.raises(ValueError, match=f"^`{name}` must be {legal}.*, got {value!r}[.]$"):
                    hub.push_folder(tmp_path / "model", "someone/vae", **{name: value})
    with pytest.raises(ValueError, match="^`options` must be of max_shard_size, safe_serialization, .*, got foo[.]$"):
        model.push_to_hub("someone/vae", foo=7)
    assert server.repositories == {}
    for subfolder in ("", ".", "/"):
        model.push_to_hub("someone/vae", subfolder=subfolder)
        assert {"README.md", "config.json"} <= server.repositories.pop("someone/vae").keys()


def test_what_was_pulled_is_found_without_a_connection(
    server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_tiny("leanvae")
    model.push_to_hub("someone/vae", max_shard_size="40KB")
    hub.pull("someone/vae", tmp_path / "vae")
    assert_same(AutoencoderKLLeanVAE.from_pretrained(tmp_path / "vae"), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load_autoencoder("someone/vae"), model)


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
    assert 'load_diffusion_pipeline("someone/shapes")\npipeline.load_lora_weights("someone/style")' in card
    with pytest.raises(ValueError, match="`results` must be of these weights"):
        results = (Path(__file__).resolve().parents[2] / "results" / "val-17x256_compact-4ch.json",)
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
