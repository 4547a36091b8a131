"""Repositories that are not there, damaged or hostile: one sentence each, and nothing of theirs is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from tiny import make_tiny

import diffusers_leanvae
from diffusers_leanvae import AutoencoderKLLeanVAE, hub
from diffusers_leanvae.loading import load_autoencoder, load_diffusion_pipeline, load_transformer


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


def test_a_hub_that_cannot_be_reached_is_waited_for_once(server: LocalHub, monkeypatch: pytest.MonkeyPatch):
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"  # nobody listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(ValueError, match="got 'someone/vae': the Hub cannot be reached, and it is not in its cache"):
        load_autoencoder("someone/vae")
    assert len(pauses) == 5  # of the client, for the first file that is asked for


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


def test_what_is_incomplete_is_said_in_a_sentence(
    server: LocalHub, tmp_path: Path, vae_files: dict[str, bytes], pull: Any
):
    make_tiny("leanvae").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    index, shard = f"{WEIGHTS}.index.json", next(name for name in files if "-00002-of-" in name)
    tensors = load_file(tmp_path / "shards" / shard)
    save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "renamed")
    renamed = (tmp_path / "renamed").read_bytes()
    tensors = {key: tensor for key, tensor in load_file(tmp_path / "shards" / shard).items()}
    tensors.pop(lost := min(tensors))
    save_file(tensors, tmp_path / "less")
    server.repositories = {
        "someone/shard": {name: content for name, content in files.items() if name != shard},
        "someone/renamed": files | {shard: renamed},
        "someone/less": files | {shard: (tmp_path / "less").read_bytes()},
        "someone/cut": files | {index: b"{"},
        "someone/empty": files | {index: b"{}"},
        "someone/list": files | {index: b"[]"},
        "someone/class": vae_files | {"config.json": b'{"_class_name": ["a"]}'},
    }
    loaders = (AutoencoderKLLeanVAE.from_pretrained, load_autoencoder)
    fails(
        f"must have all files that its '{index}' names, got 'someone/shard' without 1 .*'{shard}'",
        "someone/shard",
        pull,
    )
    assert server.sent == [index] and not (tmp_path / "pulled").exists()
    fails("got 'someone/shard': .*does not appear to have a file named", "someone/shard", *loaders)
    fails(rf"shards` of 'someone/renamed' .* without {len(tensors) + 1} of them", "someone/renamed", *loaders)
    fails(rf"shards` of 'someone/less' .* without 1 of them, for instance '{lost}'[.]", "someone/less", *loaders)
    for name in ("cut", "empty", "list"):
        fails(f"got 'someone/{name}': its index of shards is damaged", f"someone/{name}", *loaders)
        fails(f"must have sound files, got 'someone/{name}' with a damaged '{index}'[.]$", f"someone/{name}", pull)
    fails(r"must .*, got .*\['a'\]", "someone/class", *loaders)


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
