"""Text embeddings that lie with the latents train a model as the text encoder does on the fly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from runs import Script, assert_same_training, read_log
from safetensors.torch import load_file
from tiny import make_tiny

from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.text_encoders import make_text_encoder


CLIPS = {"clip_size": (5, 48, 48), "num_clips": 6, "num_captions": 2, "batch_size": 6}
TEXT = ("num_classes=null", "num_steps=3", "batch_size=4", "optimizer.learning_rate=3e-2", "validation.num_samples=0")


def save_encoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    scenes = MovingScenes(5, 48, 48, num_clips=60)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    made = make_text_encoder((text for index in range(60) for text in scenes.captions(index)), small)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


@pytest.fixture(scope="module")
def cache(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    encode_dataset(make_tiny("leanvae"), "scenes", folder, text_encoder=encoder, **CLIPS)
    return folder


def test_cached_text_trains_like_text_encoded_on_the_way(script: Script, encoder: Path, cache: Path, tmp_path: Path):
    latents = f"{{kind: latents, path: {cache}}}"
    drawn = "{kind: scenes, clip_size: [5, 48, 48], num_clips: 6, num_captions: 2}"
    dropout = "text.caption_dropout=0.3"
    runs = [
        script.train(tmp_path / "cached", f"data={latents}", f"validation.data={latents}", dropout, *TEXT),
        script.train(
            tmp_path / "encoded",
            f"data={drawn}",
            f"validation.data={drawn}",
            f"text.encoder={encoder}",
            "text.max_length=48",
            dropout,
            *TEXT,
        ),
    ]
    assert_same_training(*runs, 3)
    losses = [[record["loss"] for record in read_log(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    held_out = [[record["loss"] for record in read_log(run, "validation")] for run in runs]
    assert held_out[0] and held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    never = script.train(
        tmp_path / "never", f"data={latents}", "validation.data=null", "text.caption_dropout=0.0", *TEXT
    )
    assert [record["loss"] for record in read_log(never)] != pytest.approx(losses[0], abs=1e-4)
    # The text encoder of the cache is that of the pipeline.
    stored, exported = (
        load_file(folder / "model.safetensors") for folder in (encoder, runs[0] / "pipeline/text_encoder")
    )
    assert all(torch.equal(exported[name], weight) for name, weight in stored.items())
    assert DiffusionPipeline.from_pretrained(runs[0] / "pipeline").tokenizer.model_max_length == 48


def test_cached_text_is_not_read_where_the_encoder_is_trained(
    script: Script, encoder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LatentFolder, "text", None)  # which may not be called
    latents = f"{{kind: latents, path: {cache}}}"
    data = (f"data={latents}", f"validation.data={latents}", f"text.encoder={encoder}")
    run = script.train(tmp_path / "run", *data, "text.train_text_encoder=true", *TEXT)
    assert len(read_log(run)) == 3


def test_what_does_not_fit_the_cached_text_is_refused(script: Script, encoder: Path, cache: Path, tmp_path: Path):
    encode_dataset(make_tiny("leanvae"), "scenes", tmp_path / "plain", **CLIPS)
    data, plain = f"data={{kind: latents, path: {cache}}}", f"{{kind: latents, path: {tmp_path / 'plain'}}}"
    other = save_encoder(tmp_path / "other", seed=1)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(other, tmp_path / "pipeline" / part)
    index = {"_class_name": "LeanVAELatteTextToVideoPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    for settings, message in (
        ((f"text.encoder={other}",), "`text.encoder` must be the one of the stored .*, whose `weights_sha256` is"),
        (
            (f"init={tmp_path / 'pipeline'}", "text.encoder=null", "text.caption_dropout=0.1"),
            "`text.encoder` must be the one of the stored .*, whose `weights_sha256`",
        ),
        (("text.max_length=30",), "`text.encoder` must be the one of the stored .*, whose `max_length` is 48, got 30"),
        ((f"text.encoder={encoder}", f"validation.data={plain}"), "`validation.data` must hold text embeddings as"),
    ):
        with pytest.raises(ValueError, match=message):
            script.train(tmp_path / "run", data, "validation.data=null", *TEXT, *settings)
