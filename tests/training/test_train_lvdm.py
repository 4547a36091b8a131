"""The training script of latent diffusion: it runs, it resumes to the same numbers, and leaves a whole pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_leanvae.training.train_lvdm as train_lvdm
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from local_hub import LocalHub
from runs import (
    DISTURBING,
    Script,
    assert_same_run,
    assert_same_training,
    changed,
    launch,
    read_log,
    weights_at,
)
from safetensors.torch import load_file
from tiny import make_tiny

from diffusers_leanvae import LeanVAELatteTransformer3DModel
from diffusers_leanvae.conversion.latte import write_original_checkpoint
from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.shapes import CLASS_NAMES, NUM_CLASSES, MovingShapes
from diffusers_leanvae.generation.videos import choose_scheduler
from diffusers_leanvae.latents import encode_batch
from diffusers_leanvae.losses.representation import ImageFeatures
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.trainer.draws import draw_given_frames, draw_step, drop_labels
from diffusers_leanvae.trainer.recipe import load_recipe
from diffusers_leanvae.video_io import probe_video


CONFIGS = sorted(Path(train_lvdm.__file__).resolve().parent.glob("configs/lvdm_*.yaml"))
PLAIN = ("num_steps=3", "batch_size=4", "validation.num_samples=0")
FULL = (
    *DISTURBING,
    "num_images=1",
    "class_dropout=0.5",
    "given_frames.share=0.5",
    "objective.name=epsilon",
    "objective.sampling=logit_normal",
    "objective.is_stratified=true",
    "objective.min_snr_gamma=5",
    "representation.weight=0.5",
    "representation.after_block=2",
    "representation.hidden_dim=8",
    "latent_statistics=data",
    "num_statistics_items=4",
    "optimizer.schedule=cosine",
    "ema_decay=0.9",
    "ema_min_decay=0.5",
    "clip_start_step=6",
    "data.num_clips=6",  # less than two steps: several epochs
)
# Recipes whose steps do not depend on how they are shared: the last step, and the settings.
SHARED = {
    "plain": (3, PLAIN),
    "full": (8, (*FULL, "num_accumulation_steps=1", "validation.num_samples=0")),
    "muon": (6, ("optimizer.name=muon", "num_steps=6", "batch_size=4", "validation.num_samples=0")),
}


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., AutoencoderKLLeanVAE]) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_model(scaling_factor=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script(vae_folder: Path) -> Script:
    return Script("train_lvdm", "lvdm_smoke.yaml", f"vae={vae_folder}")


@pytest.fixture(scope="module")
def straight(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.train(tmp_path_factory.mktemp("straight"), *FULL)


@pytest.fixture(scope="module")
def launched(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs processes of its own: a folder of runs."""
    folder = tmp_path_factory.mktemp("launched")
    launch(
        folder,
        script.job(folder / "straight", *FULL),
        script.job(folder / "killed", *FULL, kill=["update", 6]),
        script.job(folder / "killed", *FULL),
        *(script.job(folder / name, *overrides) for name, (_, overrides) in SHARED.items()),
    )
    return folder


# --- It runs, and leaves a pipeline ----------------------------------------------------------------------------------


def generate(pipeline: DiffusionPipeline) -> np.ndarray:
    """One video of a class that is called by its name, in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(CLASS_NAMES[5], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").frames


def test_the_pipeline_loads_and_generates(straight: Path):
    pipeline = DiffusionPipeline.from_pretrained(straight / "pipeline")
    assert (type(pipeline).__name__, type(pipeline.scheduler).__name__) == ("LeanVAELattePipeline", "DDPMScheduler")
    frames = generate(pipeline)
    assert frames.shape == (1, 5, 32, 32, 3) and np.isfinite(frames).all() and frames.std() > 0


def test_the_pipeline_is_what_was_trained(straight: Path, vae_folder: Path):
    pipeline = DiffusionPipeline.from_pretrained(straight / "pipeline")
    ema = torch.load(straight / "checkpoints/step-0000008/custom_checkpoint_0.pkl", weights_only=True)
    averaged = list(pipeline.transformer.parameters())
    torch.testing.assert_close(averaged, ema["shadow_params"], rtol=0, atol=0)
    assert pipeline.transformer.config.num_classes == NUM_CLASSES and pipeline.transformer.config.out_channels == 8
    # Statistics of the data, in place of the factor.
    vae = AutoencoderKLLeanVAE.from_pretrained(vae_folder)
    clips = torch.stack([MovingShapes(5, 32, 32, num_clips=6)[index].pixels for index in range(4)])
    latents = encode_batch(vae, clips).transpose(0, 1).flatten(1).double()
    config = pipeline.vae.config
    torch.testing.assert_close(torch.tensor(config.latents_mean).double(), latents.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(config.latents_std).double(), latents.std(1, correction=0), rtol=1e-5, atol=0
    )
    assert config.scaling_factor == 1.0


@pytest.mark.slow  # three interpreters; both scripts start in trainer/loop.py, and test_train_vae.py runs torchrun
def test_the_script_runs_under_torchrun_as_one_job(script: Script, tmp_path: Path):
    said = script.torchrun(tmp_path / "run", "num_steps=1", "batch_size=2", "validation.num_samples=0")
    assert said.count("data: ") == 1  # of which the first process speaks
    states = sorted(path.name for path in (tmp_path / "run/checkpoints/step-0000001").glob("random_states_*"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]


def _exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def _head(step: int, run: Path) -> dict[str, torch.Tensor]:
    return {key: x for key, x in weights_at(run, step).items() if key.startswith("representation.")}


def test_what_is_logged_and_shown(straight: Path):
    log = read_log(straight)
    assert [record["step"] for record in log] == list(range(1, 9))
    terms = {"loss", "mse", "vb", "representation", "grad_norm"}
    times = {"seconds_per_step", "data_seconds_per_step", "cpu_seconds_per_step"}
    assert set(log[0]) == {"step", "lr", "num_skipped", "num_bad_videos"} | terms | times
    records = read_log(straight, "validation")
    assert [record["step"] for record in records] == [4, 8]
    assert list(records[-1]["levels"]) == ["0.3", "0.7"] and records[-1]["num_failed"] == 0
    assert records[-1]["loss"] == pytest.approx(sum(records[-1]["levels"].values()) / 2)
    video = probe_video(straight / "validation/step-0000008.mp4")
    assert (video.num_frames, video.height, video.width, video.fps) == (5, 32, 64, 8)
    card = (straight / "pipeline/README.md").read_text()
    assert f"| 0.3 | {records[-1]['levels']['0.3']:.4f} |" in card and "8 steps of 4 clips" in card
    assert "is_stratified: true\n" in card and f'class_labels="{CLASS_NAMES[0]}"' in card


def test_validation_is_of_the_averaged_model_at_fixed_noise(straight: Path):
    pipeline = DiffusionPipeline.from_pretrained(straight / "pipeline")
    recipe = load_recipe(train_lvdm.Recipe, straight / "recipe.yaml")
    objective = train_lvdm.build_objective(recipe.objective)
    items = [MovingShapes(5, 32, 32, seed=1, num_clips=36)[index] for index in range(4)]
    latents = encode_batch(pipeline.vae, torch.stack([item.pixels for item in items]))
    latents = train_lvdm.normalize_latents(latents, pipeline.vae.config)
    noise = torch.stack([_validation_noise(index, latents.shape[1:]) for index in range(4)])
    timesteps = torch.full((4,), 700)
    labels = torch.tensor([item.class_label for item in items])
    with torch.no_grad():
        noisy = objective.add_noise(latents, noise, timesteps)
        output = pipeline.transformer(noisy, timesteps, labels).sample
    expected = objective.loss(output, latents, noise, timesteps)["loss"].mean().item()
    (record,) = (record for record in read_log(straight, "validation") if record["step"] == 8)
    assert record["levels"]["0.7"] == pytest.approx(expected, rel=1e-5)


def _validation_noise(index: int, shape: torch.Size) -> torch.Tensor:
    rng = np.random.default_rng([0, 11, index])
    rng.random(2)
    return torch.from_numpy(rng.standard_normal(tuple(shape), np.float32))


def test_the_pipeline_and_its_card_go_to_the_hub(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with LocalHub() as server:
        server.connect(monkeypatch)
        run = script.train(tmp_path / "run", *PLAIN, "push_to_hub=someone/tiny")
    files = server.repositories["someone/tiny"]
    folder = run / "pipeline"
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == saved | {f"{place}modeling_leanvae.py" for place in ("", "transformer/", "vae/")}
    assert bytes(files["README.md"]) == (folder / "README.md").read_bytes()
    assert b'from_pretrained("someone/tiny")' in files["README.md"]


def test_a_push_that_would_fail_is_refused_before_training(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with LocalHub() as server, pytest.raises(ValueError, match="`push_to_hub` must begin with one of 'someone'"):
        server.connect(monkeypatch)
        script.train(tmp_path / "run", *PLAIN, "push_to_hub=other/tiny")
    assert not (tmp_path / "run").exists()


# --- It resumes, and it does not matter how the work is shared -------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_numbers(script: Script, straight: Path, tmp_path: Path):
    assert script.interrupt(tmp_path, *FULL, update=7) == [1, 2, 3, 4, 5, 6]
    assert_same_run(script.train(tmp_path, *FULL), straight)
    assert changed(weights_at(straight, 4), weights_at(straight, 8))


def test_a_validation_that_fails_loses_no_step_and_is_made_up_for(
    script: Script, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lvdm, "write_samples", fail)  # when the figures are written already
        script.train(tmp_path, *FULL)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000004"]
    script.train(tmp_path, *FULL)
    assert_same_run(tmp_path, straight)


def test_two_processes_resume_to_the_same_numbers(launched: Path):
    assert_same_run(launched / "killed", launched / "straight")


@pytest.mark.parametrize("name", SHARED)
def test_processes_and_accumulation_give_the_same_model(name: str, script: Script, launched: Path, tmp_path: Path):
    """A step's samples, noise and gradient do not depend on how they are shared; only the order of sums does."""
    step, overrides = SHARED[name]
    whole, parts = (script.train(tmp_path / f"parts-{n}", *overrides, f"num_accumulation_steps={n}") for n in (1, 2))
    for run in (parts, launched / name):
        assert_same_training(run, whole, step, weights=4e-5 if name == "muon" else 4e-6)
        ours, theirs = (read_log(run, "validation")[-1]["loss"] for run in (run, whole))
        assert ours == pytest.approx(theirs, abs=1e-4)


# --- What a step is made of ------------------------------------------------------------------------------------------


def test_draws_follow_from_seed_and_index_alone():
    together = draw_step([8, 9, 10, 11], (4, 2, 2, 2), seed=3, dropout=0.5)
    apart = [draw_step([index], (4, 2, 2, 2), seed=3, dropout=0.5) for index in range(8, 12)]
    for name in ("uniform", "drop", "noise"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(draw, name) for draw in apart]))
    other = draw_step([8, 9, 10, 11], (4, 2, 2, 2), seed=4, dropout=0.5)
    assert not torch.equal(other.noise, together.noise)


def test_the_dropout_rate_and_the_stratification_are_as_asked():
    draws = draw_step(range(1000), (1,), seed=0, dropout=0.1, batch_size=8)
    assert 80 <= int(draws.drop.sum()) <= 120
    assert ((draws.uniform * 8).long() == torch.arange(1000) % 8).all()
    labels = torch.tensor([[3, 4], [5, 6]])
    assert drop_labels(labels, torch.tensor([True, False]), 36).tolist() == [[36, 36], [5, 6]]
    assert drop_labels(labels[:, 0], torch.tensor([False, True]), 36).tolist() == [3, 36]


def test_the_number_of_given_frames_follows_from_seed_and_index_alone():
    together = draw_given_frames(range(2000), seed=3, share=0.4, max_frames=3)
    apart = torch.cat([draw_given_frames([index], seed=3, share=0.4, max_frames=3) for index in range(2000)])
    assert torch.equal(together, apart) and together.dtype == torch.int64
    counts = together.bincount()
    assert len(counts) == 4 and counts[0].item() == pytest.approx(1200, abs=90)  # four deviations
    assert all(count.item() == pytest.approx(800 / 3, abs=60) for count in counts[1:])
    assert not torch.equal(draw_given_frames(range(2000), seed=4, share=0.4, max_frames=3), together)
    assert not draw_given_frames(range(50), 0, share=0.0, max_frames=3).any()
    assert (draw_given_frames(range(50), 0, share=1.0, max_frames=1) == 1).all()


def test_every_epoch_has_each_item_once_and_images_are_first_latent_frames(vae_folder: Path):
    data = LatentData(MovingShapes(5, 16, 16, num_clips=7), has_latents=False, has_labels=True, num_images=2)
    orders = [[data.order(index) for index in range(7 * epoch, 7 * epoch + 7)] for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1]
    batch = data.__getitems__([3, 4])
    assert batch.class_labels is not None and batch.class_labels.shape == (2, 3) and batch.images is not None
    vae = AutoencoderKLLeanVAE.from_pretrained(vae_folder)
    others = [item for index in (3, 4) for item in data._images_of(index)]
    whole = encode_batch(vae, torch.stack([data.items[item].pixels for item in others]))
    torch.testing.assert_close(encode_batch(vae, batch.images), whole[:, :, :1], rtol=0, atol=1e-6)
    joined = train_lvdm.join_images(encode_batch(vae, batch.videos), encode_batch(vae, batch.images))
    torch.testing.assert_close(joined[1, :, -1], whole[3, :, 0], rtol=0, atol=1e-6)
    assert batch.class_labels[:, 1:].flatten().tolist() == [data.items.label(item) for item in others]


@pytest.fixture(scope="module")
def cache(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vae = AutoencoderKLLeanVAE.from_pretrained(vae_folder)
    folder = tmp_path_factory.mktemp("cache") / "latents"
    encode_dataset(vae, "shapes", folder, clip_size=(5, 32, 32), num_clips=10, batch_size=5, shard_size=4)
    return folder


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "from disk"])
def test_cached_latents_train_like_those_encoded_on_the_way(
    in_memory: bool, cache: Path, script: Script, tmp_path: Path
):
    settings = ("num_images=1", "latent_statistics=data", "num_statistics_items=10", *PLAIN)
    cached = ("data.kind=latents", f"data.path={cache}", f"data.cache_gib={4 * in_memory}")
    runs = [
        script.train(tmp_path / "cached", *cached, *settings),
        script.train(tmp_path / "encoded", "data.num_clips=10", *settings),
    ]
    assert_same_training(*runs, 3)
    losses = [[record["loss"] for record in read_log(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    configs = [json.loads((run / "pipeline/vae/config.json").read_text()) for run in runs]
    for name in ("latents_mean", "latents_std"):
        assert configs[0][name] == pytest.approx(configs[1][name], abs=1e-5)


def test_a_named_data_set_trains_like_its_cache(clips: Path, script: Script, vae_folder: Path, tmp_path: Path):
    for name, label in (("a.mp4", "jump"), ("b.mp4", "run")):
        (tmp_path / "ucf" / label).mkdir(parents=True)
        (tmp_path / "ucf" / label / name).write_bytes((clips / name).read_bytes())
    vae = AutoencoderKLLeanVAE.from_pretrained(vae_folder)
    source, options = f"ucf101:{tmp_path / 'ucf'}", {"clip_size": (5, 32, 32), "num_crops": 3, "stride": 2}
    encode_dataset(vae, source, tmp_path / "latents", batch_size=3, **options)
    settings = ("num_classes=2", "validation.data=null", *PLAIN)
    named = ("data.kind=ucf101", f"data.path={tmp_path / 'ucf'}", "data.num_draws=3", "data.stride=2")
    runs = [
        script.train(tmp_path / "cached", "data.kind=latents", f"data.path={tmp_path / 'latents'}", *settings),
        script.train(tmp_path / "encoded", *named, *settings),
    ]
    assert_same_training(*runs, 3)
    assert DiffusionPipeline.from_pretrained(runs[0] / "pipeline").labels == {"jump": 0, "run": 1}


def test_representation_head_reaches_the_first_blocks_alone():
    torch.manual_seed(0)
    transformer = LeanVAELatteTransformer3DModel(2, 8, num_layers=4, sample_size=4, num_latent_frames=2)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    head = train_lvdm.RepresentationHead(16, 6, after_block=2, hidden_dim=8, weight=0.5)
    module = train_lvdm.LatentDiffusionTrainingModule(transformer, train_lvdm.EpsilonObjective(), head)
    latents, noise = torch.randn(2, 2, 4, 2, 4, 4)
    timesteps, features = torch.tensor([10, 700]), torch.randn(2, 2, 2, 2, 6)
    plain = module(latents, noise, timesteps)
    loss, terms = module(latents, noise, timesteps, features=features)
    assert loss.item() == pytest.approx(plain.loss.item() + 0.5 * terms["representation"].item(), rel=1e-5)
    assert 0 < terms["representation"] < 2
    grads = torch.autograd.grad(loss - plain.loss, list(transformer.parameters()), allow_unused=True)
    sizes = dict(zip(dict(transformer.named_parameters()), grads, strict=True))
    for name, grad in sizes.items():
        if name.startswith(("transformer_blocks.1", "temporal_transformer_blocks.1", "proj_out")):
            assert grad is None or grad.abs().max() < 1e-6, name
    assert sizes["temporal_transformer_blocks.0.ff.net.2.weight"].abs().max() > 1e-6


def test_features_of_a_vision_transformer_lie_on_the_tokens(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    encoder = ImageFeatures.from_pretrained(str(tmp_path), stride=4)
    sample = torch.zeros(2, 3, 9, 32, 64)
    sample[1, :, 4, :16, 32:48] = 1.0  # frame 4, upper row, third column of 2 x 4
    features = encoder(torch.empty(0), sample, (2, 4))
    assert features.shape == (2, 3, 2, 4, 8) and encoder.dim == 8
    pixels = torch.zeros(1, 3, 28, 56)  # mean and deviation of 0.5 leave [-1, 1] as it is
    with torch.no_grad():
        expected = encoder.model(pixel_values=pixels).last_hidden_state[0, 1:].unflatten(0, (2, 4))
    torch.testing.assert_close(features[0, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features[1, [0, 2]], features[0, [0, 2]], rtol=0, atol=1e-6)
    assert (features[1, 1] - features[0, 1]).abs().amax(-1).argmax() == 2


def test_a_vision_transformer_takes_part_in_training(script: Script, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    settings = ("representation.weight=0.5", "representation.after_block=2", "representation.hidden_dim=8")
    run = script.train(tmp_path / "run", f"representation.encoder={tmp_path / 'encoder'}", *settings, *PLAIN)
    log = read_log(run)
    assert all(0 < record["representation"] < 2 for record in log)
    assert changed(_head(2, run), _head(3, run))


# --- What goes wrong, and what is skipped ----------------------------------------------------------------------------


def test_other_averages_are_exported(script: Script, tmp_path: Path):
    """That of a schedule-free optimizer, and one that is put together from the checkpoints afterwards."""
    common = (*PLAIN, "num_steps=6", "save_every=1", "keep_checkpoints=6", "validation.num_samples=0")
    settings = ("optimizer.name=schedule_free", "optimizer.schedule=constant", "optimizer.learning_rate=1e-2")
    free = script.train(tmp_path / "free", *common, *settings)
    script.train(tmp_path / "power", *common, "ema_power=2")
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    before = load_file(tmp_path / "power" / file)
    power = script.train(tmp_path / "power", *common, "ema_power=2", "post_hoc_power=8")
    for run, name in ((free, "that of the optimizer"), (power, "exponent 8.0, from those in the checkpoints")):
        exported, last = load_file(run / file), weights_at(run, 6)
        last = {key.removeprefix("transformer."): weight for key, weight in last.items()}
        assert changed(exported, last) and name in (run / "pipeline/README.md").read_text()
    ours, theirs = (sum((w[key] - last[key]).abs().sum() for key in w) for w in (exported, before))
    assert 0 < ours < 0.3 * theirs  # measured: 0.23


def test_steps_that_are_not_finite_are_skipped(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward, count = train_lvdm.LatentDiffusionTrainingModule.forward, iter(range(1000))

    def poisoned(self, *args):
        output = forward(self, *args)
        return output._replace(loss=output.loss * float("inf")) if next(count) == 1 else output

    monkeypatch.setattr(train_lvdm.LatentDiffusionTrainingModule, "forward", poisoned)
    script.train(tmp_path, *PLAIN, "save_every=1", "keep_checkpoints=3")
    log = read_log(tmp_path)
    assert [record["num_skipped"] for record in log] == [0, 1, 1]
    assert "loss" in log[0] and "loss" not in log[1]
    assert not changed(weights_at(tmp_path, 1), weights_at(tmp_path, 2))
    assert changed(weights_at(tmp_path, 2), weights_at(tmp_path, 3))


def test_gradients_are_clipped_from_a_step_on(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    script.train(tmp_path, *PLAIN, "clip_start_step=2", "optimizer.max_grad_norm=1e-3")
    log = read_log(tmp_path)
    assert norms[:2] == pytest.approx([record["grad_norm"] for record in log[:2]], rel=1e-4)
    assert min(norms[:2]) > 1e-2 and norms[2] == pytest.approx(1e-3, rel=1e-2)


def test_a_trained_transformer_goes_on(script: Script, straight: Path, tmp_path: Path):
    epsilon = ("objective.name=epsilon", "optimizer.learning_rate=0")
    script.train(tmp_path, f"init={straight / 'pipeline'}", *epsilon, *PLAIN)
    assert not changed(_exported(straight), _exported(tmp_path))
    assert "fine-tuned from" in (tmp_path / "pipeline/README.md").read_text()
    config = LeanVAELatteTransformer3DModel.load_config(straight / "pipeline/transformer")
    write_original_checkpoint(tmp_path / "original.pt", config, _exported(straight))
    script.train(tmp_path / "original", f"init={tmp_path / 'original.pt'}", *epsilon, *PLAIN)
    assert not changed(_exported(straight), _exported(tmp_path / "original"))
    with pytest.raises(ValueError, match="`init` must have `out_channels` 4 for this recipe, got 8"):
        script.train(tmp_path / "x", f"init={straight / 'pipeline'}")
    with pytest.raises(ValueError, match=r"`model\.num_layers` must agree with `init`, which has 2, got 4"):
        script.train(tmp_path / "x", f"init={straight / 'pipeline'}", *epsilon, "model.num_layers=4")
    with pytest.raises(
        ValueError, match="`variant` must be null or that of `init`, which has `num_layers` 2, got 'S/2"
    ):
        script.train(tmp_path / "x", f"init={straight / 'pipeline'}", *epsilon, "variant=S/2", "model={}")


def test_a_new_transformer_is_of_its_variant():
    smoke = next(path for path in CONFIGS if path.stem == "lvdm_smoke")
    for overrides, size in (
        ((), (28, 16)),
        (("variant=S/4",), (12, 6)),
        (("variant=S/4", "model.num_layers=2"), (2, 6)),
    ):
        recipe = load_recipe(train_lvdm.Recipe, smoke, ["model={}", *overrides])
        with torch.device("meta"):
            config = train_lvdm.build_transformer(recipe, (4, 2, 8, 8)).config
        assert (config["num_layers"], config["num_attention_heads"]) == size


def test_videos_are_encoded_on_the_way_and_time_can_run_out(clips: Path, script: Script, tmp_path: Path):
    settings = ("data.kind=videos", f"data.path={clips}", "num_classes=null", "data.stride=1", "validation.data=null")
    script.train(tmp_path, *settings, "max_minutes=0", "mixed_precision=bf16", "save_dtype=float16")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    assert {x.dtype for x in _exported(tmp_path).values()} == {torch.float16}
    assert DiffusionPipeline.from_pretrained(tmp_path / "pipeline").transformer.config.num_classes is None


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
def test_any_autoencoder_makes_the_latents(family: str, script: Script, tmp_path: Path):
    vae = make_tiny(family)
    vae.save_pretrained(tmp_path / "vae")
    given = f"vae={tmp_path / 'vae'}"
    run = script.train(tmp_path / "run", given, "num_steps=2", "batch_size=2", "latent_statistics=data")
    assert all(np.isfinite(record["loss"]) for record in read_log(run))
    assert probe_video(next((run / "validation").glob("*.mp4"))).num_frames == 5
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(pipeline.vae) is type(vae)
    assert not changed(vae.state_dict(), pipeline.vae.state_dict())
    assert len(pipeline.vae.config["latents_mean"]) == 4 and pipeline.vae.config["scaling_factor"] == 1
    frames = generate(pipeline)
    assert frames.shape == (1, 5, 32, 32, 3) and np.isfinite(frames).all() and frames.std() > 0
    with pytest.raises(ValueError, match=f"needs an AutoencoderKLLeanVAE, .* got an {type(vae).__name__}"):
        script.train(tmp_path / "other", given, "representation.weight=1", "representation.after_block=2")


def test_the_shift_of_training_is_that_of_sampling(script: Script, tmp_path: Path):
    run = script.train(tmp_path / "run", "objective.shift=3", "num_steps=1", "validation.num_samples=0")
    pipeline: Any = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config["shift"] == 3.0
    assert choose_scheduler(pipeline, "flow", 4) == {"num_inference_steps": 4}
    assert pipeline.scheduler.config["shift"] == 3.0


def test_the_card_tells_sizes_that_are_not_square(script: Script, tmp_path: Path):
    settings = ("data.clip_size=[5,32,48]", "validation.data=null", "validation.num_samples=0", "num_steps=1")
    card = (script.train(tmp_path, *settings) / "pipeline/README.md").read_text()
    assert "height=32, width=48," in card and "5 frames of 32x48 from latents of 4x2x4x6;" in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("num_classes=7",), "`num_classes` must be the 36 classes of the data, got 7"),
        (("model.width=7",), r"Unknown recipe key `model\.width`: legal keys here are num_attention_heads, "),
        (("class_dropout=2",), "`class_dropout` must be from 0 to 1, got 2.0"),
        (
            ("objective.min_snr_gamma=5",),
            "`objective.min_snr_gamma` must be null with `objective.name: flow`, got 5.0",
        ),
        (
            ("objective.name=epsilon", "objective.shift=2"),
            "`objective.shift` must be 1.0 with `objective.name: epsilon`, got 2.0",
        ),
        (("representation.weight=1", "representation.after_block=3"), "must be a positive even number, got 3"),
        (
            ("representation.weight=1", "representation.after_block=4"),
            "`representation.after_block` must be at most 2",
        ),
        (("data.kind=latents",), "`data.path` must be given for `data.kind: latents`, got null"),
        (("data.kind=videos", "data.path=x"), "`num_classes` must be null for `data.kind: videos`, got 36"),
        (
            ("validation.data.clip_size=[9,32,32]",),
            r"`validation\.data` must hold latents of the shape \(4, 2, 4, 4\) of those of `data`, got \(4, 3, 4, 4\)",
        ),
        (("batch_size=3", "num_accumulation_steps=2"), "`batch_size` must be a multiple of 2 accumulation steps"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    overrides: tuple[str, ...], message: str, script: Script, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        script.train(tmp_path, *overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_recipes_load_build_and_say_how_to_run(path: Path):
    recipe = load_recipe(train_lvdm.Recipe, path)
    text = path.read_text()
    for word in ("# Expected:", "# Cost:", "# Command:", f"training/configs/{path.name}"):
        assert word in text
    assert not any(Path(entry).is_absolute() for entry in (recipe.data.path or "x", recipe.output))
    train_lvdm.build_objective(recipe.objective)
    with torch.device("meta"):
        transformer = train_lvdm.build_transformer(recipe, (4, 5, 32, 32), 128 if recipe.text else None)
    if not recipe.variant:
        assert transformer.num_parameters() <= (12_000_000 if recipe.text else 8_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["plain", "representation"])
def test_a_compiled_transformer_trains_alike(weight: float, script: Script, tmp_path: Path):
    settings = (*PLAIN, f"representation.weight={weight}", "representation.after_block=2")
    runs = [script.train(tmp_path / flag, f"compile={flag}", *settings) for flag in ("false", "true")]
    assert_same_training(*runs, 3)
