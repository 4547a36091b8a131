"""Optimizers and averages of `train_vae.py` that checkpoints must keep, and what no checkpoint can be used for."""

from pathlib import Path

import diffusers_leanvae.training.train_vae as train_vae
import pytest
import torch
from runs import Script, changed, optimizer_at, read_log, weights_at
from safetensors.torch import load_file

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.trainer.recipe import load_recipe


@pytest.fixture(scope="module")
def script(clips: Path) -> Script:
    return Script("train_vae", "smoke.yaml", f"data.train={clips}")


def train_straight_and_twice(script: Script, folder: Path, *settings: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Train ten steps at once and in two parts, which must come to the same; return one run and what it exports."""
    settings += ("optimizer.schedule=constant", "save_every=6")
    straight = script.train(folder / "straight", "num_steps=10", *settings)
    script.train(folder / "twice", "num_steps=6", *settings)
    twice = script.train(folder / "twice", "num_steps=10", *settings)
    torch.testing.assert_close(weights_at(twice, 10), weights_at(straight, 10), rtol=0, atol=0)
    assert changed(weights_at(straight, 6), weights_at(straight, 10))
    averages = [load_file(run / "vae/diffusion_pytorch_model.safetensors") for run in (straight, twice)]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
    return twice, averages[0]


def test_whitened_muon_resumes_to_the_same_numbers(script: Script, tmp_path: Path):
    run, _ = train_straight_and_twice(script, tmp_path, "optimizer.name=muon", "ema_power=2")
    assert "averaged over training (by a power function, exponent 2.0)" in (run / "vae/README.md").read_text()


def test_a_schedule_free_run_resumes_and_exports_its_own_average(script: Script, tmp_path: Path):
    run, exported = train_straight_and_twice(script, tmp_path, "optimizer.name=schedule_free", "ema_decay=0.5")
    names = [name for name, _ in AutoencoderKLLeanVAE.from_pretrained(run / "vae").named_parameters()]
    last, states = weights_at(run, 10), optimizer_at(run, 10).values()
    for name, state in zip(names, states, strict=True):
        average = (last[f"vae.{name}"] - 0.1 * state["z"]) / 0.9
        torch.testing.assert_close(exported[name], average, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(exported[name], last[f"vae.{name}"]) for name in names)
    assert "averaged over training (that of the optimizer)" in (run / "vae/README.md").read_text()


def test_a_finished_run_exports_another_average(script: Script, clips: Path, tmp_path: Path):
    settings = ("num_steps=12", "save_every=2", "keep_checkpoints=9", "ema_power=2", f"validation.folder={clips}")
    settings += ("freeze_encoder_step=7",)
    script.train(tmp_path, *settings)
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    before, figures = load_file(file), read_log(tmp_path, "validation")
    script.train(tmp_path, *settings, "post_hoc_power=2")  # the same average, by way of the checkpoints
    torch.testing.assert_close(load_file(file), before, rtol=0, atol=1e-6)
    script.train(tmp_path, *settings, "post_hoc_power=8")  # of fewer of the last steps
    after, last = load_file(file), {n.removeprefix("vae."): w for n, w in weights_at(tmp_path, 12).items()}
    ours, theirs = (sum((w[name] - last[name]).abs().sum() for name in last) for w in (after, before))
    assert 0 < ours < 0.2 * theirs  # measured: 0.12
    # What was frozen is what the decoder has learned from, and no average.
    frozen = {name for name in last if name.startswith("encoder.")}
    assert frozen and not changed(before, after) & frozen
    again = read_log(tmp_path, "validation")
    assert [record["step"] for record in again] == [record["step"] for record in figures]
    assert again[-1]["psnr_frame_mean_rgb"] != figures[-1]["psnr_frame_mean_rgb"] and again[:-1] == figures[:-1]
    assert "exponent 8.0, from those in the checkpoints" in (tmp_path / "vae/README.md").read_text()
    with pytest.raises(ValueError, match=r"^`ema_power` must be that of all checkpoints .* got 3.0 and 2.0 there\.$"):
        script.train(tmp_path, *settings, "ema_power=3", "post_hoc_power=5")
    assert load_recipe(train_vae.Recipe, tmp_path / "recipe.yaml").ema_power == 2.0  # what is refused leaves no trace


@pytest.mark.parametrize(("save_every", "keep"), [(12, 9), (1, 2)])
def test_too_few_checkpoints_are_refused_before_the_first_step(
    save_every: int, keep: int, script: Script, tmp_path: Path
):
    settings = (f"save_every={save_every}", f"keep_checkpoints={keep}", "ema_power=2", "post_hoc_power=30")
    message = r"^`post_hoc_power` must be nearer to `ema_power`, or .* got 30.0 of 2.0 from (1|2) checkpoints: 0\.[37]"
    with pytest.raises(ValueError, match=message):
        script.train(tmp_path, "num_steps=12", *settings)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_optimizer_or_model_is_refused(script: Script, tmp_path: Path):
    script.train(tmp_path / "run", "num_steps=1")
    for name in ("muon", "schedule_free"):
        with pytest.raises(ValueError, match=f"^`optimizer.name` must be 'adamw', that of .*, got '{name}': take"):
            script.train(tmp_path / "run", "num_steps=2", f"optimizer.name={name}", "optimizer.schedule=constant")
    message = (
        r"^`resume` must be a checkpoint of the model and the discriminators of this recipe, got .*step-0000001' \("
    )
    for change in ("model.low_freq_dim=16", "adversarial.weight=0.1"):
        with pytest.raises(ValueError, match=message):
            script.train(tmp_path / "run", "num_steps=2", change)
    (tmp_path / "file").touch()
    for name in ("file", "file/run"):
        with pytest.raises(ValueError, match="^`output` must lead to a folder to write to, got "):
            script.train(tmp_path / name, "num_steps=1")
