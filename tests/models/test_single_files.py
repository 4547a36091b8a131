"""`from_single_file` takes the weights that `save_pretrained` writes, and the arguments that diffusers' takes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from diffusers_leanvae.conversion.headers import WEIGHTS_NAME
from diffusers_leanvae.loading import MODEL_CLASSES, load_model


FAMILIES = ("leanvae", "wfvae", "ivvae", "latte")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return make_tiny(request.param).eval()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(loaded: Any, model: Any, dtype: torch.dtype = torch.float32) -> None:
    assert type(loaded) is type(model) and not loaded.training and loaded.dtype == dtype
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key].to(dtype)) for key in theirs)
    configs = [{k: v for k, v in dict(m.config).items() if not k.startswith("_")} for m in (loaded, model)]
    assert json.dumps(configs[0], default=list) == json.dumps(configs[1], default=list)


def test_every_class_is_covered(model: Any):
    assert len(FAMILIES) == len(MODEL_CLASSES) and type(model) in MODEL_CLASSES


def test_weights_with_their_config_beside(model: Any, saved: Path):
    load = type(model).from_single_file
    assert_same(load(saved / WEIGHTS_NAME), model)
    assert_same(load(str(saved)), model)
    assert_same(load(saved / WEIGHTS_NAME, torch_dtype=torch.bfloat16), model, torch.bfloat16)
    assert_same(load_model(saved / WEIGHTS_NAME), model)
    (saved / WEIGHTS_NAME).rename(saved / "of another name.safetensors")
    assert_same(load(saved / "of another name.safetensors"), model)


def test_weights_with_a_given_config(model: Any, saved: Path, tmp_path: Path):
    load, weights = type(model).from_single_file, tmp_path / WEIGHTS_NAME
    shutil.move(saved / WEIGHTS_NAME, weights)
    values = json.loads((saved / "config.json").read_text())
    for config in (saved, str(saved), saved / "config.json", values):
        assert_same(load(weights, config=config), model)
    assert_same(load(weights, config=tmp_path, subfolder="saved"), model)
    for name in (weights, saved / "pytorch.bin"):
        torch.save(model.state_dict(), saved / "pytorch.bin")
        assert_same(load(name, config=saved), model)
    with pytest.raises(ValueError, match=r"`config` must be given for weights of `save_pretrained` without a `config"):
        load(weights)
    for config, reason in (
        (tmp_path / "nowhere", "which does not exist"),
        ("nowhere", "which does not exist"),
        (tmp_path, "without a `config.json`"),
    ):
        with pytest.raises(ValueError, match=rf"`config` must be a folder or Hub repository .*, {reason}\.$"):
            load(weights, config=config)
    with pytest.raises(ValueError, match="`config` must be .* got 'someone/nothing'"):
        load(weights, config="someone/nothing", local_files_only=True)


def test_arguments_of_diffusers(model: Any, saved: Path):
    load = type(model).from_single_file
    everything = {
        "subfolder": None,
        "config": None,
        "revision": "main",
        "token": None,
        "local_files_only": True,
        "cache_dir": None,
        "force_download": False,
        "proxies": None,
        "low_cpu_mem_usage": True,
        "disable_mmap": True,
        "device": "cpu",
        "original_config": None,
        "quantization_config": None,
        "device_map": None,
    }
    assert_same(load(saved / WEIGHTS_NAME, dtype=torch.float16, **everything), model, torch.float16)
    assert_same(load(saved.parent, subfolder="saved"), model)
    assert load(saved / WEIGHTS_NAME, device="meta").device.type == "meta"
    for name, value in {"proxies": {"https": "x"}, "quantization_config": {}, "original_config": "x.yaml"}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be None for a model of this package, got "):
            load(saved / WEIGHTS_NAME, **{name: value})
    for name, value in {"torch_dtype": "half", "dtype": torch.int8}.items():
        with pytest.raises(ValueError, match=f"`torch_dtype` must be a floating-point .* got {value!r}"):
            load(saved / WEIGHTS_NAME, **{name: value})
    for device in ("nonsense", [1]):
        with pytest.raises(ValueError, match=f"^`device` must be one of torch .*, got {re.escape(repr(device))}[.]$"):
            load(saved / WEIGHTS_NAME, device=device)
    if "latent_channels" in model.config:
        with pytest.raises(ValueError, match="^`(config|latent_channels)` must .*"):
            load(saved / WEIGHTS_NAME, latent_channels="x")
    for reference in (None, 7):
        with pytest.raises(
            ValueError, match=f"^`pretrained_model_link_or_path` must be a path, .*, got {reference}[.]$"
        ):
            load(reference)
    with pytest.raises(ValueError, match="arguments, got colour"):
        load(saved / WEIGHTS_NAME, colour=1)


def test_a_folder_of_shards(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    num_shards = len(list(tmp_path.glob("*.safetensors")))
    with pytest.raises(
        ValueError, match=rf"must name one checkpoint, got .*00003-of-\d+.safetensors, {num_shards - 3} more[.]$"
    ):
        type(model).from_single_file(tmp_path)


def test_a_config_replaces_what_an_original_checkpoint_tells(model: Any, tmp_path: Path):
    path = tmp_path / "original.safetensors"
    type(model).conversion.write_original_checkpoint(path, dict(model.config), model.state_dict())
    heads = (
        {"num_attention_heads": model.config["num_attention_heads"]} if "num_attention_heads" in model.config else {}
    )
    assert_same(type(model).from_single_file(path, config=dict(model.config), **heads), model)
    make_tiny("wfvae" if "latent_channels" not in model.config else "latte").save_config(tmp_path)
    for _ in range(2):  # a config of ours beside it, of another or of this class, does not make it one of ours
        loaded = type(model).from_single_file(path, **heads).state_dict()
        assert all(torch.equal(loaded[key], weight) for key, weight in model.state_dict().items())
        model.save_config(tmp_path)


def test_weights_that_do_not_fit(model: Any, saved: Path, tmp_path: Path):
    load = type(model).from_single_file
    tensors = load_file(saved / WEIGHTS_NAME)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, saved / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"must hold the weights of the `{type(model).__name__}` .*{name}"):
        load(saved / WEIGHTS_NAME)
    other = next(cls for cls in MODEL_CLASSES if cls is not type(model))
    with pytest.raises(ValueError, match=f"must be given an `{other.__name__}`"):
        other.from_single_file(saved / WEIGHTS_NAME)
    (saved / WEIGHTS_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a valid safetensors file"):
        load(saved / WEIGHTS_NAME)


def test_weights_on_the_hub(model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = type(model).from_single_file
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with LocalHub() as server:
        server.connect(monkeypatch)
        server.repositories["someone/whole"] = files
        server.repositories["someone/inside"] = {f"vae/{name}": content for name, content in files.items()}
        server.repositories["someone/weights"] = {"model.safetensors": files[WEIGHTS_NAME]}
        options = {"cache_dir": tmp_path / "cache"}
        assert_same(load(f"someone/whole/{WEIGHTS_NAME}", **options), model)
        assert_same(load("someone/whole", **options), model)
        assert_same(load("someone/inside", subfolder="vae", **options), model)
        assert_same(load("someone/weights/model.safetensors", config="someone/whole", **options), model)
        assert_same(
            load("someone/weights/model.safetensors", config="someone/inside", subfolder="vae", **options), model
        )
    assert_same(load(f"someone/whole/{WEIGHTS_NAME}", local_files_only=True, **options), model)
