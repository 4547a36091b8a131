"""`train_vae.py` for WF-VAE and IV-VAE: it resumes, is shared by processes, validates, tunes and tells of itself."""

from pathlib import Path

import pytest
import torch
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

from diffusers_leanvae import AutoencoderKLIVVAE, AutoencoderKLWFVAE
from diffusers_leanvae.data import read_center_clip
from diffusers_leanvae.loading import load_autoencoder


CLASSES = {"wfvae": AutoencoderKLWFVAE, "ivvae": AutoencoderKLIVVAE}
MODELS = {
    "wfvae": "model={type: wfvae, latent_channels: 4, base_channels: 4, encoder_flow_channels: 3, "
    "decoder_flow_channels: 8, num_encoder_layers: 1, num_decoder_layers: 1, dropout: 0.1}",
    "ivvae": "model={type: ivvae, latent_channels: 4, base_channels: 4, channel_multipliers: [1, 2, 2, 2], "
    "num_layers: 1, dropout: 0.1}",
}
LOSSES = {"wfvae": "loss={ms_ssim: 0.1, wavelet: 0.2}", "ivvae": "loss={l1_pixel: 2.0, ms_ssim: 0.1}"}
# The adversary of WF-VAE, small.
GAN = (
    "adversarial={weight: 0.5, is_adaptive: true, kind: 3d, loss: hinge, generator_loss: hinge, num_layers: 1, "
    "num_filters: 4, lecam_weight: 0.0, update: alternate, start_step: 2, learning_rate: 1.0e-3, dropout: 0.3}",
)
FULL = (
    *DISTURBING,
    "data.image_ratio=0.3",
    "perceptual.frames=all",
    "freeze_encoder_step=6",
    *GAN,
)
# A step of each side, with nothing whose mean over clips depends on how they are shared. Later steps would say less:
# where a clip is flat, the norms of so small a model make something of the rounding of weights (measured: 4e-5).
SHARED = (
    "num_steps=2",
    "batch_size=4",
    "adversarial.start_step=0",
    "adversarial.norm=group",
    "adversarial.dropout=0",
    "model.dropout=0",
)


@pytest.fixture(scope="module", params=["wfvae", "ivvae"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def script(family: str, clips: Path) -> Script:
    return Script(
        "train_vae", "smoke.yaml", f"data.train={clips}", f"validation.folder={clips}", MODELS[family], LOSSES[family]
    )


@pytest.fixture(scope="module")
def straight(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.train(tmp_path_factory.mktemp("straight"), *FULL)


def test_an_interrupted_run_resumes_to_the_same_numbers(script: Script, straight: Path, tmp_path: Path):
    # Turns of the discriminator average nothing: the fifth update is that of the seventh step.
    assert script.interrupt(tmp_path, *FULL, update=5) == [1, 2, 3, 4, 5, 6]
    assert_same_run(script.train(tmp_path, *FULL), straight)


def test_both_sides_learn(straight: Path):
    log = read_log(straight)
    assert ["adversarial" in record for record in log] == [False, False, True, False, True, False, True, False]
    assert ["discriminator" in record for record in log] == [False, False, False, True, False, True, False, True]
    assert changed(weights_at(straight, 4), weights_at(straight, 8))
    assert changed(weights_at(straight, 4, "_1"), weights_at(straight, 8, "_1"))
    frozen = {name for name in weights_at(straight, 8) if name.startswith("vae.encoder.")}
    assert frozen and any(name.startswith("vae.decoder.") for name in weights_at(straight, 8))


def test_validation_is_that_of_the_averaged_model(family: str, clips: Path, straight: Path):
    vae = CLASSES[family].from_pretrained(straight / "vae")
    (record,) = (record for record in read_log(straight, "validation") if record["step"] == 8)
    clip = read_center_clip(clips / "b.mp4", num_frames=5, size=32)[None]
    with torch.no_grad():
        error = ((vae(clip).sample.clamp(-1, 1) - clip) / 2).square().mean(dim=(0, 1, 3, 4))
    assert record["clips"]["b.mp4"] == pytest.approx((-10 * error.log10()).mean().item(), abs=8e-6)  # measured: 6e-7
    assert len(vae.config["latents_mean"]) == len(vae.config["latents_std"]) == 4


def test_the_card_names_the_class_and_the_terms(family: str, straight: Path):
    card = (straight / "vae/README.md").read_text()
    name = CLASSES[family].__name__
    assert f'vae = diffusers_leanvae.{name}.from_pretrained("path/to/this/folder")' in card
    title = {
        "wfvae": "A [WF-VAE](https://arxiv.org/abs/2411.17459)",
        "ivvae": "An [IV-VAE](https://arxiv.org/abs/2411.",
    }
    assert title[family] in card and f"- {family}\n" in card and f"  type: {family}\n" in card
    # The weights that the recipe did not give are in the card, too.
    assert {"wfvae": "  l1: 1.0\n", "ivvae": "  kl: 1.0e-07\n"}[family] in card and "trained from scratch" in card


def test_two_processes_give_the_same_model(script: Script, tmp_path: Path):
    launch(tmp_path, script.job(tmp_path / "two", *GAN, *SHARED))
    whole = script.train(tmp_path / "whole", *GAN, *SHARED)
    for number in ("", "_1"):
        # The keys of attention have no bias but by rounding.
        assert_same_training(tmp_path / "two", whole, 2, number, floor=1e-5)


def test_decoder_tuning_leaves_the_latents_as_they_are(family: str, script: Script, straight: Path, tmp_path: Path):
    tuned = script.train(tmp_path, f"init={straight / 'vae'}", "model={}", "tune=decoder", "num_steps=2")
    before = {f"vae.{key}": x for key, x in load_file(straight / "vae/diffusion_pytorch_model.safetensors").items()}
    moved = changed(before, weights_at(tuned, 2))
    assert moved == {name for name in before if name.startswith("vae.decoder.")}
    assert type(load_autoencoder(tuned / "vae")) is CLASSES[family]
    assert "fine-tuned from" in (tuned / "vae/README.md").read_text()


def test_adapters_fit_linear_layers_alone(family: str, script: Script, straight: Path, tmp_path: Path):
    start = (f"init={straight / 'vae'}", "model={}", "tune=lora", "lora.rank=2", "num_steps=1")
    if family == "ivvae":  # all of its layers are convolutions
        with pytest.raises(ValueError, match="`lora` must fit the model"):
            script.train(tmp_path, *start)
        return
    tuned = script.train(tmp_path, *start, "lora.targets=[to_q,to_k,to_v,to_out]", "optimizer.learning_rate=1e-2")
    before, after = (load_file(run / "vae/diffusion_pytorch_model.safetensors") for run in (straight, tuned))
    moved = changed(before, after)
    assert moved and all(".to_" in name for name in moved) and (tuned / "adapter/adapter_config.json").is_file()


def test_what_only_leanvae_can_is_refused(family: str, script: Script, straight: Path, tmp_path: Path):
    make_tiny("leanvae").save_pretrained(tmp_path / "lean")
    with pytest.raises(ValueError, match=f"`teacher.path` must be null for an {CLASSES[family].__name__}, got"):
        script.train(tmp_path / "x", f"teacher.path={tmp_path / 'lean'}")
    with pytest.raises(ValueError, match=f"`init` must be an {CLASSES[family].__name__} by `model.type`, got .*Lean"):
        script.train(tmp_path / "x", f"init={tmp_path / 'lean'}")
    with pytest.raises(ValueError, match=r"Unknown recipe key `loss\.l1_low`: legal keys here are l1"):
        script.train(tmp_path / "x", f"init={straight / 'vae'}", "model={}", "loss={l1_low: 1.0}")


def test_ivvae_starts_from_an_image_only_run(clips: Path, tmp_path: Path):
    """Both phases of the recipe: an image autoencoder of half the latent channels, then videos."""
    sizes = "latent_channels: {}, base_channels: 4, channel_multipliers: [1, 2, 2, 2], num_layers: 1"
    image_model = f"model={{type: ivvae, use_keyframe_branch: false, {sizes.format(2)}}}"
    script = Script("train_vae", "smoke.yaml", f"data.train={clips}", f"validation.folder={clips}")
    images = ("data.clip_sizes=[[1,32,32]]", "validation.num_frames=1", "num_steps=2", "validation.every=2")
    first = script.train(tmp_path / "images", image_model, *images)
    start = ("init=image", f"image_vae.path={first / 'vae'}", f"model={{type: ivvae, {sizes.format(4)}}}")
    still = ("validation.num_frames=1", "num_steps=1", "validation.every=1")
    second = script.train(tmp_path / "videos", *start, *still)
    # Before the first step, images are reconstructed as the averaged model of the first run does.
    records = read_log(first, "validation")[-1], read_log(second, "validation")[0]
    assert records[0]["clips"] == pytest.approx(records[1]["clips"], abs=8e-6)  # measured: 1e-6
    assert "started from the image autoencoder" in (second / "vae/README.md").read_text()
    with pytest.raises(ValueError, match="`model.type` must be 'ivvae' for `init: image`, got 'leanvae'"):
        script.train(tmp_path / "x", "init=image", f"image_vae.path={first}")
    with pytest.raises(ValueError, match="`image_vae.path` must be given for `init: image` and for nothing else, got"):
        script.train(tmp_path / "x", f"image_vae.path={first}")
