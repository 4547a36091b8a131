"""Training on texts by train_lvdm.py: it resumes, is shared by processes, goes on from others, leaves a pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from processes import Piped
from runs import (
    Script,
    assert_same_run,
    assert_same_training,
    changed,
    launch,
    optimizer_at,
    read_log,
    weights_at,
)
from safetensors.torch import load_file
from tiny import make_tiny, seeded

from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.text_encoders import make_text_encoder
from diffusers_leanvae.video_io import write_video


transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")

SMALL = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
PLAIN = ("num_steps=2", "batch_size=2", "validation.data=null", "validation.num_samples=0")
NEW = (
    "text.encoder=new",
    f"text.config={json.dumps(SMALL)}",
    "text.train_text_encoder=true",
    "optimizer.learning_rate=1e-2",
    "optimizer.num_warmup_steps=0",
)
# What could disturb resuming, with each way that texts go: everything that is random, has a state, or changes.
RANDOM = (
    "save_every=2",
    "validation.every=2",
    "batch_size=4",
    "text.caption_dropout=0.5",
    "given_frames.share=0.5",
    "objective.sampling=logit_normal",
    "objective.is_stratified=true",
    "optimizer.schedule=cosine",
    "ema_decay=0.9",
)
RUNS = {
    "new": (
        *RANDOM,
        *NEW,
        "num_steps=6",
        "num_accumulation_steps=2",
        "objective.name=epsilon",
        "latent_statistics=data",
        "num_statistics_items=4",
        "gradient_checkpointing=true",
        "validation.guidance_scale=2",
    ),
    "frozen": (*RANDOM, "num_steps=4", "text.encoder={t5}", "text.dtype=bfloat16", "optimizer.name=muon"),
    "cached": (*RANDOM, "num_steps=4", "data={{kind: latents, path: {cache}}}", "validation.data=null"),
}
# Recipes whose steps do not depend on how they are shared. BERT has a pooler, which gets no gradient.
BERT = ("text.encoder={bert}", "text.train_text_encoder=true", "num_steps=3", "batch_size=4", *PLAIN[2:])
SHARED = {
    "new": (6, (*RUNS["new"], "num_accumulation_steps=1", "validation.num_samples=0", "optimizer.learning_rate=1e-3")),
    "bert": (3, (*BERT, "given_frames.share=0.5")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of text encoders, of an autoencoder, and of latents with cached embeddings."""
    folder = tmp_path_factory.mktemp("sources")
    scenes = MovingScenes(5, 48, 48, num_clips=60)
    with seeded(0):
        t5 = make_text_encoder((text for index in range(60) for text in scenes.captions(index)), SMALL, max_length=40)
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(t5.tokenizer), **size))
    for name, model in (("t5", t5.model), ("bert", bert)):
        model.save_pretrained(folder / name)
        t5.tokenizer.save_pretrained(folder / name)
    vae = make_tiny("leanvae", scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    clips = {"clip_size": (5, 48, 48), "num_clips": 6, "num_captions": 3}
    encode_dataset(vae, "scenes", folder / "cache", text_encoder=folder / "t5", **clips)
    return {name: folder / name for name in ("t5", "bert", "vae", "cache")}


@pytest.fixture(scope="module")
def script(sources: dict[str, Path]) -> Script:
    data = "{kind: scenes, clip_size: [5, 48, 48], num_clips: 6, num_captions: 3}"
    held_out = "{kind: scenes, clip_size: [5, 48, 48], num_clips: 4, seed: 1}"
    settings = (f"data={data}", f"validation.data={held_out}", "num_classes=null")
    return Script("train_lvdm", "lvdm_smoke.yaml", f"vae={sources['vae']}", *settings)


def filled(overrides: tuple[str, ...], sources: dict[str, Path]) -> tuple[str, ...]:
    """Settings with the folders of sources in place of their names."""
    return tuple(one.format(**sources) if one.startswith(("text.encoder=", "data=")) else one for one in overrides)


@pytest.fixture(scope="module")
def straight(script: Script, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("straight")
    return {name: script.train(folder / name, *filled(settings, sources)) for name, settings in RUNS.items()}


@pytest.fixture(scope="module")
def launched(script: Script, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("launched")
    launch(folder, *(script.job(folder / name, *filled(one, sources)) for name, (_, one) in SHARED.items()))
    return folder


def transformer_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def text_encoder_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/text_encoder/model.safetensors")


def generate(pipeline: Any, prompt: str = "a red circle moves left", **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"} | options
    return pipeline(prompt, generator=torch.manual_seed(0), **settings).frames


# --- It resumes, and it does not matter how the work is shared -------------------------------------------------------


@pytest.mark.parametrize(("name", "moment"), [("new", 6), ("frozen", 4), ("cached", 4)])
def test_an_interrupted_run_resumes_to_the_same_numbers(
    name: str,
    moment: int,
    script: Script,
    sources: dict[str, Path],
    straight: dict[str, Path],
    tmp_path: Path,
):
    settings = filled(RUNS[name], sources)
    assert script.interrupt(tmp_path, *settings, update=moment) == list(range(1, moment))
    assert_same_run(script.train(tmp_path, *settings), straight[name])
    before, after = (weights_at(straight[name], step) for step in (moment - 2, moment))
    moved = {name.split(".")[0] for name in changed(before, after)}
    assert moved == {"transformer", "text_encoder"} if name == "new" else {"transformer"}


@pytest.mark.parametrize("name", SHARED)
def test_processes_and_accumulation_give_the_same_model(
    name: str, script: Script, sources: dict[str, Path], launched: Path, tmp_path: Path
):
    step, settings = SHARED[name]
    whole, parts = (
        script.train(tmp_path / f"parts-{n}", *filled(settings, sources), f"num_accumulation_steps={n}")
        for n in (1, 2)
    )
    for run in (parts, launched / name):
        # Biases of keys, which attention takes no notice of, have gradients that are nothing but rounding.
        assert_same_training(run, whole, step, floor=1e-4)
        if name == "new":
            ours, theirs = (read_log(one, "validation")[-1]["loss"] for one in (run, whole))
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_pooler_is_left_as_it_was(launched: Path, sources: dict[str, Path]):
    moved = changed(load_file(sources["bert"] / "model.safetensors"), text_encoder_of(launched / "bert"))
    assert len(moved) > 10 and not any("pooler" in name for name in moved)


def test_muon_moves_an_encoder_in_mixed_precision(script: Script, sources: dict[str, Path], tmp_path: Path):
    settings = ("optimizer.name=muon", "mixed_precision=bf16", "num_steps=6", "save_every=3", "keep_checkpoints=2")
    run = script.train(tmp_path / "run", *filled(BERT, sources), *settings)
    # Linear maps stand still until Muon has seen enough of their inputs.
    assert "text_encoder.encoder.layer.0.attention.self.value.weight" in changed(
        weights_at(run, 3), weights_at(run, 6)
    )
    assert all(
        state["covariance"].dtype == torch.float32 for state in optimizer_at(run, 6).values() if "root" in state
    )


def test_captions_are_tokenized_in_workers_alike(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the script sets it
    runs = [script.train(tmp_path / f"{n}", *NEW, *PLAIN, f"data.num_workers={n}") for n in (0, 1)]
    assert [record["loss"] for record in read_log(runs[0])] == [record["loss"] for record in read_log(runs[1])]
    assert not changed(transformer_of(runs[0]), transformer_of(runs[1]))


# --- It leaves a pipeline --------------------------------------------------------------------------------------------


def test_the_pipeline_is_what_was_trained(straight: dict[str, Path]):
    pipeline = DiffusionPipeline.from_pretrained(straight["new"] / "pipeline")
    assert type(pipeline).__name__ == "LeanVAELatteTextToVideoPipeline"
    assert pipeline.config["clean_given_frames"] and type(pipeline.scheduler).__name__ == "DDPMScheduler"
    ema = torch.load(straight["new"] / "checkpoints/step-0000006/custom_checkpoint_0.pkl", weights_only=True)
    averaged = [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]
    torch.testing.assert_close(averaged, ema["shadow_params"], rtol=0, atol=0)
    assert pipeline.tokenizer.model_max_length == 48 and not pipeline.text_encoder.training
    frames = generate(pipeline)
    assert frames.shape == (1, 5, 48, 48, 3) and np.isfinite(frames).all() and frames.std() > 0
    assert np.abs(generate(pipeline, "a small green square moves up") - frames).max() > 1e-4


def test_a_frozen_encoder_stays_as_it_was(straight: dict[str, Path], sources: dict[str, Path]):
    stored = load_file(sources["t5"] / "model.safetensors")
    half = {name: weight.bfloat16() for name, weight in stored.items()}
    assert not changed(half, text_encoder_of(straight["frozen"]))
    assert not changed(stored, text_encoder_of(straight["cached"]))


def test_what_is_logged_and_shown(straight: dict[str, Path]):
    records = read_log(straight["new"], "validation")
    assert [record["step"] for record in records] == [2, 4, 6] and all(record["loss"] > 0 for record in records)
    assert len(list((straight["new"] / "validation").glob("*.mp4"))) == 3
    prompt = MovingScenes(5, 48, 48, seed=1, num_clips=4).captions(0)[0]
    card = (straight["new"] / "pipeline/README.md").read_text()
    assert f"prompt = {json.dumps(prompt)}\n" in card and "pipeline(prompt=prompt, num_inference_steps=2" in card
    assert "Generates videos of texts" in card and "trained from scratch" in card
    assert "Texts of up to 48 tokens go through a `T5EncoderModel` of" in card
    assert "M parameters, trained along. Up to 1 first latent frames can be given" in card
    assert "M parameters, frozen. Up to" in (straight["frozen"] / "pipeline/README.md").read_text()


def generate_in_half_precision(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    frames = pipeline("a red circle", num_inference_steps=2, output_type="pt").frames
    print(pipeline.text_encoder.dtype, tuple(frames.shape), bool(frames.isfinite().all()))


def test_half_precision_loads_in_a_new_process_and_generates(script: Script, tmp_path: Path):
    settings = ("save_dtype=float16", "mixed_precision=bf16", "validation.prompts=[a blue square]", "max_minutes=0")
    run = script.train(tmp_path / "run", *NEW, *PLAIN, "validation.num_samples=1", "validation.every=1", *settings)
    assert {weight.dtype for weight in (transformer_of(run) | text_encoder_of(run)).values()} == {torch.float16}
    assert 'prompt = "a blue square"\n' in (run / "pipeline/README.md").read_text()
    assert not DiffusionPipeline.from_pretrained(run / "pipeline").config["clean_given_frames"]
    code, out, err = Piped(generate_in_half_precision, run / "pipeline").communicate()
    assert code == 0 and out.splitlines()[-1] == b"torch.float16 (1, 5, 3, 48, 48) True", err


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
def test_any_autoencoder_makes_the_latents(family: str, script: Script, tmp_path: Path):
    make_tiny(family).save_pretrained(tmp_path / "vae")
    settings = (f"vae={tmp_path / 'vae'}", "latent_statistics=data", "num_statistics_items=2", "given_frames.share=1")
    run = script.train(tmp_path / "run", *NEW, *PLAIN, *settings)
    assert all(np.isfinite(record["loss"]) for record in read_log(run))
    frames = generate(DiffusionPipeline.from_pretrained(run / "pipeline"))
    assert frames.shape == (1, 5, 48, 48, 3) and np.isfinite(frames).all() and frames.std() > 0


# --- It starts from another ------------------------------------------------------------------------------------------


def test_a_trained_pipeline_goes_on(script: Script, straight: dict[str, Path], tmp_path: Path):
    base = straight["new"]
    still = ("objective.name=epsilon", "optimizer.learning_rate=0", *PLAIN)
    run = script.train(tmp_path / "same", f"init={base / 'pipeline'}", "text.caption_dropout=0.1", *still)
    assert not changed(transformer_of(base), transformer_of(run)) and not changed(
        text_encoder_of(base), text_encoder_of(run)
    )
    assert f"fine-tuned from `{base / 'pipeline'}`" in (run / "pipeline/README.md").read_text()
    assert DiffusionPipeline.from_pretrained(run / "pipeline").tokenizer.model_max_length == 48
    # Its encoder trained on, its latents another model's: out of them come half as many channels.
    flow = ("text.train_text_encoder=true", "objective.name=flow", "optimizer.learning_rate=1e-2", *PLAIN)
    run = script.train(tmp_path / "flow", f"init={base / 'pipeline'}", *flow)
    assert transformer_of(run)["proj_out.bias"].shape != transformer_of(base)["proj_out.bias"].shape
    assert changed(text_encoder_of(base), text_encoder_of(run))
    with pytest.raises(
        ValueError, match="`variant` must be null or that of `init`, which has `num_layers` 4, got 'S/2"
    ):
        script.train(tmp_path / "x", f"init={base / 'pipeline'}", *flow, "variant=S/2", "model={}")


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("num_classes=36",), "`num_classes` must be null with `text`, got 36"),
        (("num_images=1",), "`num_images` must be 0 with `text`, got 1"),
        (("representation.weight=0.5",), "`representation.weight` must be 0.0 with `text`, got 0.5"),
        (("text.encoder=null", "text.config={}"), "`text.encoder` must be given where neither the latents nor `init`"),
        (("text.train_text_encoder=false",), "`text.train_text_encoder` must be true with `text.encoder: new`, got"),
        (("text.encoder=x",), "`text.config` must be empty but for `text.encoder: new`, got {"),
        (("text.encoder=/nowhere", "text.config={}"), "`text.encoder` cannot be loaded: `source` must be the folder"),
        (("text.dtype=float16",), "`text.dtype` must be float32 or null with `text.train_text_encoder`, got float16"),
        (("text.caption_dropout=1.5",), "`text.caption_dropout` must be from 0 to 1, got 1.5"),
        (("given_frames.share=-1",), "`given_frames.share` must be from 0 to 1, got -1.0"),
        (("given_frames.max_frames=0",), "`given_frames.max_frames` must be at least 1, got 0"),
        (
            ("given_frames.share=1", "given_frames.max_frames=2"),
            "`given_frames.max_frames` must be less than the 2 latent frames, got 2",
        ),
        (("init=/nowhere",), "`init` must be a LatteTransformer3DModel or a pipeline with one, .* got '/nowhere'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    overrides: tuple[str, ...], message: str, script: Script, tmp_path: Path
):
    with pytest.raises(ValueError, match=message) as caught:
        script.train(tmp_path, *NEW, *PLAIN, *overrides)
    assert "\n" not in str(caught.value)


def test_videos_need_captions_and_an_encoder_that_knows_their_words(
    script: Script, sources: dict[str, Path], tmp_path: Path
):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(2):
        write_video(videos / f"{number}.mkv", torch.full((5, 48, 48, 3), 90 * number, dtype=torch.uint8), fps=8)
    data = f"data={{kind: videos, path: {videos}, clip_size: [5, 48, 48], stride: 1}}"
    with pytest.raises(ValueError, match="`text.encoder` must not be 'new' for `data.kind: videos`"):
        script.train(tmp_path / "new", *NEW, *PLAIN, data)
    frozen = (f"text.encoder={sources['t5']}", *PLAIN, data)
    with pytest.raises(ValueError, match="`captions` must be known of every item, got none for item"):
        script.train(tmp_path / "bare", *frozen)
    for number in range(2):
        (videos / f"{number}.txt").write_text("a red circle\na blue square\n")
    run = script.train(tmp_path / "run", *frozen)
    assert all(np.isfinite(record["loss"]) for record in read_log(run))
