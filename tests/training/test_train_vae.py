"""The training script: it runs, it resumes to the same numbers, and what goes wrong leaves whole files."""

import shutil
import sys
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import diffusers_leanvae.training.train_vae as train_vae
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from local_hub import LocalHub
from PIL import Image
from runs import (
    DISTURBING,
    Script,
    assert_same_run,
    assert_same_training,
    changed,
    launch,
    optimizer_at,
    read_log,
    weights_at,
)
from safetensors.torch import load_file, save_file

from diffusers_leanvae.data import open_training_data, pixels_to_sample, read_center_clip
from diffusers_leanvae.data.clip_lists import ClipSelection, open_clip_list
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.data.shapes import MovingShapes
from diffusers_leanvae.losses.objectives import LeanVAEObjective
from diffusers_leanvae.losses.perceptual import LPIPS
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.video_io import probe_video, read_video


SMALL_GAN = ("adversarial.weight=0.2", "adversarial.num_layers=1", "adversarial.num_filters=8")
REGULARISERS = (
    "regularization.equivariance_probability=0.5",
    "regularization.equivariance_min_scale=0.5",
    "regularization.local_correlation=0.1",
    "regularization.mask_latents=true",
    "regularization.low_pass=0.1",
    "loss.latent_consistency=0.1",
)
# Terms whose mean over clips is the same however clips are shared: no batch norm, nothing that counts passes.
ADVERSARIAL = (
    "num_steps=4",
    "adversarial.update=alternate",
    "adversarial.start_step=1",
    "adversarial.learning_rate=1e-3",
    "adversarial.norm=group",
    "adversarial.lecam_weight=0",
    *SMALL_GAN,
)
# Recipes whose steps do not depend on how they are shared: the last step, and the settings.
SHARED = {
    "plain": (3, ("num_steps=3", "batch_size=4", "data.procedural=0.5")),
    "muon": (6, ("num_steps=6", "batch_size=4", "optimizer.name=muon")),
    "regularised": (3, ("num_steps=3", "batch_size=4", *REGULARISERS)),
    "adversarial": (4, ("batch_size=4", *ADVERSARIAL)),
}
FULL = (
    *DISTURBING,
    "data.image_ratio=0.3",
    "data.procedural=0.5",
    "data.stride=[1,2]",
    "adversarial.start_step=2",
    "adversarial.learning_rate=1e-3",
    "adversarial.is_adaptive=true",
    "freeze_encoder_step=6",
    *SMALL_GAN,
    *REGULARISERS,
)


@pytest.fixture(scope="module")
def script(clips: Path) -> Script:
    return Script("train_vae", "smoke.yaml", f"data.train={clips}")


@pytest.fixture(scope="module")
def straight(script: Script, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.train(tmp_path_factory.mktemp("straight"), f"validation.folder={clips}", *FULL)


@pytest.fixture(scope="module")
def launched(script: Script, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs processes of its own: a folder of runs."""
    folder, view = tmp_path_factory.mktemp("launched"), f"validation.folder={clips}"
    launch(
        folder,
        script.job(folder / "one-killed", view, *FULL, num_processes=1, kill=["save", 8]),
        script.job(folder / "two-straight", view, *FULL),
        script.job(folder / "two-killed", view, *FULL, kill=["update", 6]),
        script.job(folder / "two-killed", view, *FULL),
        *(script.job(folder / f"two-{name}", view, *overrides) for name, (_, overrides) in SHARED.items()),
    )
    return folder


# --- It runs ---------------------------------------------------------------------------------------------------------


def test_the_script_runs_under_torchrun_and_leaves_a_model(script: Script, clips: Path, tmp_path: Path):
    output, videos = tmp_path / "run", tmp_path / "validation"
    shutil.copytree(clips, videos)
    shutil.copy(clips / "b.mp4", videos / "b.mov")
    (videos / "a-bad.mp4").write_bytes(b"not a video")
    said = script.torchrun(output, "num_steps=2", "init=pca", f"validation.folder={videos}")
    assert said.count("data: ") == 1  # one job, of which the first process speaks
    states = sorted(path.name for path in (output / "checkpoints/step-0000002").glob("random_states_*"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]
    assert said.count("validation: 1 files cannot be used and are left out: a-bad.mp4") == 1
    assert [(record["step"], record["num_failed"]) for record in read_log(output, "validation")] == [(0, 1), (2, 1)]
    (record, _) = read_log(output, "validation")
    assert list(record["clips"]) == ["a.mp4", "b.mov", "b.mp4", "nested/c.mp4"] and list(record["failed"]) == [
        "a-bad.mp4"
    ]
    assert record["clips"]["b.mov"] == record["clips"]["b.mp4"]
    shown = output / "validation/step-0000000"
    assert sorted(path.relative_to(shown).as_posix() for path in shown.rglob("*.mp4")) == [
        "a.mp4",
        "b.mov.mp4",
        "b.mp4",
        "nested/c.mp4",
    ]
    assert {path.name for path in output.iterdir()} == {
        "checkpoints",
        "log.jsonl",
        "recipe.yaml",
        "vae",
        "validation",
        "validation.jsonl",
    }
    vae = AutoencoderKLLeanVAE.from_pretrained(output / "vae")
    assert vae.dtype == torch.float32 and len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
    log = read_log(output)
    assert [record["step"] for record in log] == [1, 2]
    counters = {"step", "lr", "num_skipped", "num_bad_videos"}
    measured = {"loss", "grad_norm", "seconds_per_step", "data_seconds_per_step", "cpu_seconds_per_step"}
    left_out = {"lpips", "ms_ssim", "charbonnier", "latent_consistency"}
    assert set(log[0]) == counters | measured | set(asdict(LeanVAEObjective())) - left_out


def test_validation_and_statistics_are_those_of_the_averaged_model(clips: Path, straight: Path):
    vae = AutoencoderKLLeanVAE.from_pretrained(straight / "vae")
    (record,) = (record for record in read_log(straight, "validation") if record["step"] == 8)
    assert list(record["clips"]) == list(record["clips_ssim"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]
    clip = read_center_clip(clips / "b.mp4", num_frames=5, size=32)[None]
    with torch.no_grad():
        error = ((vae(clip).sample.clamp(-1, 1) - clip) / 2).square().mean(dim=(0, 1, 3, 4))
    assert record["clips"]["b.mp4"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-4)
    for name, key in (("psnr", "clips"), ("ssim", "clips_ssim")):
        assert record[f"{name}_frame_mean_rgb"] == pytest.approx(sum(record[key].values()) / 3)

    dataset = open_training_data(
        str(clips), batch_size=4, clip_sizes=[[5, 32, 32]], stride=[1, 2], image_ratio=0.3, num_accumulation_steps=2
    )
    with torch.no_grad():
        latents = [vae.encode(pixels_to_sample(dataset[i].pixels[None])).latent_dist.mean for i in range(8)]
    values = torch.cat([latent.transpose(0, 1).flatten(1) for latent in latents], dim=1).double()
    torch.testing.assert_close(torch.tensor(vae.config.latents_mean).double(), values.mean(1), rtol=0, atol=1e-6)
    std = values.std(1, correction=0)
    torch.testing.assert_close(torch.tensor(vae.config.latents_std).double(), std, rtol=1e-4, atol=0)


def test_originals_stand_beside_reconstructions(straight: Path):
    names = sorted(path.name for path in (straight / "validation").iterdir())
    steps = [f"step-000000{step}" for step in (0, 4, 8)]
    assert names == sorted([*steps, *(f"{step}.png" for step in steps)])
    video = probe_video(straight / "validation/step-0000008/nested/c.mp4")
    assert (video.num_frames, video.height, video.width, video.fps) == (5, 32, 64, 24)
    picture = probe_video(straight / "validation/step-0000008.png")
    assert (picture.height, picture.width) == (3 * 32, 64)


def test_the_card_tells_of_the_run(straight: Path):
    card = (straight / "vae/README.md").read_text()
    record = read_log(straight, "validation")[-1]
    assert f"| b.mp4 | {record['clips']['b.mp4']:.2f} | {record['clips_ssim']['b.mp4']:.4f} |" in card
    assert (
        "8 steps of 4 clips" in card and "  equivariance_probability: 0.5\n" in card and "trained from scratch" in card
    )


def test_the_model_and_its_card_go_to_the_hub(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with LocalHub() as server:
        server.connect(monkeypatch)
        run = script.train(tmp_path / "run", "num_steps=1", "push_to_hub=someone/tiny")
    files = server.repositories["someone/tiny"]
    assert set(files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "modeling_leanvae.py"}
    assert bytes(files["README.md"]) == (run / "vae/README.md").read_bytes()
    assert b'from_pretrained("someone/tiny")' in files["README.md"]


def test_a_push_that_would_fail_is_refused_before_training(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with LocalHub() as server, pytest.raises(ValueError, match="`push_to_hub` must begin with one of 'someone'"):
        server.connect(monkeypatch)
        script.train(tmp_path / "run", "num_steps=1", "push_to_hub=other/tiny")
    assert not (tmp_path / "run").exists()


# --- It resumes ------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_numbers(script: Script, clips: Path, straight: Path, tmp_path: Path):
    assert script.interrupt(tmp_path, f"validation.folder={clips}", *FULL, update=7) == [1, 2, 3, 4, 5, 6]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # what a kill can leave
    script.train(tmp_path, f"validation.folder={clips}", *FULL)
    assert_same_run(tmp_path, straight)


def test_a_kill_while_saving_leaves_no_half_checkpoint(script: Script, clips: Path, straight: Path, launched: Path):
    output = launched / "one-killed"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["partial-0000008", "step-0000004"]
    script.train(output, f"validation.folder={clips}", *FULL)
    assert_same_run(output, straight)


def test_a_validation_that_fails_loses_no_step_and_is_made_up_for(
    script: Script, clips: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path, scores: object) -> None:
        if "step-0000004" in path.name:
            raise KeyboardInterrupt
        write_picture(path, scores)

    write_picture = train_vae.write_picture
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_vae, "write_picture", fail)
        script.train(tmp_path, f"validation.folder={clips}", *FULL)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000004"]
    script.train(tmp_path, f"validation.folder={clips}", *FULL)
    assert_same_run(tmp_path, straight)


def test_two_processes_resume_to_the_same_numbers(launched: Path):
    assert_same_run(launched / "two-killed", launched / "two-straight")


def test_old_checkpoints_go_and_an_older_one_can_be_resumed(script: Script, tmp_path: Path):
    script.train(tmp_path, "num_steps=4", "save_every=1", "keep_checkpoints=3")
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003", "step-0000004"]
    expected = weights_at(tmp_path, 4)
    script.train(tmp_path, "num_steps=4", "save_every=1", "keep_checkpoints=3", f"resume={folder / 'step-0000002'}")
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003", "step-0000004"]
    torch.testing.assert_close(weights_at(tmp_path, 4), expected, rtol=0, atol=0)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4]
    # What the run goes on from and what it writes stay, and not what it takes the place of.
    script.train(tmp_path, "num_steps=3", "save_every=1", "keep_checkpoints=1", f"resume={folder / 'step-0000002'}")
    assert [path.name for path in folder.iterdir()] == ["step-0000003"]
    with pytest.raises(ValueError, match="`output` must hold no checkpoints when `resume` is null"):
        script.train(tmp_path, "resume=null")
    with pytest.raises(ValueError, match="`resume` must be 'latest', a checkpoint folder or null, got 'nowhere'"):
        script.train(tmp_path, "resume=nowhere")
    with pytest.raises(ValueError, match="`resume` must be 'latest', a checkpoint folder or null, got '.*checkpoints"):
        script.train(tmp_path, f"resume={folder}")


def test_a_resumed_run_does_what_its_recipe_says(script: Script, tmp_path: Path):
    settings = ("num_steps=1", "optimizer.name=muon", "adversarial.start_step=2", *SMALL_GAN)
    script.train(tmp_path, *settings)
    changes = ("num_steps=2", "optimizer.betas=[0.5,0.6]", "optimizer.weight_decay=0.25", "optimizer.adamw_factor=0.5")
    changes += ("adversarial.betas=[0.1,0.2]", "adversarial.learning_rate=1e-3", "ema_decay=0.5")
    script.train(tmp_path, *settings, *changes)
    folder = tmp_path / "checkpoints/step-0000002"
    groups = [torch.load(folder / f"optimizer{n}.bin", weights_only=True)["param_groups"] for n in ("", "_1")]
    assert {(group["betas"], group["weight_decay"]) for group in groups[0]} == {((0.5, 0.6), 0.25)}
    assert {group["lr_factor"] for group in groups[0]} == {0.5, 1.0}
    assert {group["num_steps"] for group in groups[0]} == {2}  # this is no setting
    assert {(group["betas"], group["lr"]) for group in groups[1]} == {((0.1, 0.2), 1e-3)}
    assert torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)["decay"] == 0.5


def test_a_validation_that_was_given_up_does_not_hinder_the_export(script: Script, clips: Path, tmp_path: Path):
    assert script.interrupt(tmp_path, f"validation.folder={clips}", "num_steps=2", update=2) == [1]
    script.train(tmp_path, "num_steps=2")
    assert read_log(tmp_path, "validation") == []
    assert "No validation videos were given." in (tmp_path / "vae/README.md").read_text()


# --- It does not matter how the work is shared -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_processes_and_accumulation_give_the_same_model(name: str, script: Script, launched: Path, tmp_path: Path):
    """A step's clips, noise and gradient do not depend on how they are shared; only the order of sums does."""
    step, overrides = SHARED[name]
    whole, parts = (script.train(tmp_path / f"parts-{n}", *overrides, f"num_accumulation_steps={n}") for n in (1, 2))
    # Whitening multiplies rounding where inputs hardly vary: measured 3e-4 and 3e-5.
    bounds = {"gradients": 2e-3, "weights": 2e-4} if name == "muon" else {}
    for number in ("", "_1") if name == "adversarial" else ("",):
        for run in (parts, launched / f"two-{name}"):
            assert_same_training(run, whole, step, number, **bounds)
    record = read_log(launched / f"two-{name}", "validation")[-1]
    assert list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]


def test_the_log_has_the_mean_of_all_accumulation_steps(script: Script, tmp_path: Path):
    settings = ("num_steps=1", "batch_size=4", "sample_posterior=false")
    runs = [script.train(tmp_path / f"parts-{n}", *settings, f"num_accumulation_steps={n}") for n in (1, 2)]
    whole, parts = ({name: read_log(run)[0][name] for name in ("loss", "l1_pixel", "kl")} for run in runs)
    assert parts == pytest.approx(whole, rel=1e-5)


# --- Whose turn it is, and what is trained ---------------------------------------------------------------------------


def test_generator_and_discriminator_take_turns(script: Script, tmp_path: Path):
    turns = ("adversarial.update=alternate", "adversarial.start_step=1", "adversarial.kind=3d", *SMALL_GAN)
    script.train(tmp_path, "num_steps=4", "save_every=1", "keep_checkpoints=4", *turns)
    log = read_log(tmp_path)
    assert ["loss" in record for record in log] == [True, True, False, True]
    assert ["adversarial" in record for record in log] == [False, True, False, True]
    assert ["discriminator" in record for record in log] == [False, False, True, False]
    for step, moved, still in ((2, "", "_1"), (3, "_1", ""), (4, "", "_1")):
        assert changed(weights_at(tmp_path, step - 1, moved), weights_at(tmp_path, step, moved)), step
        assert not changed(weights_at(tmp_path, step - 1, still), weights_at(tmp_path, step, still)), step


def is_of_encoder(key: str) -> bool:
    return key.startswith(("vae.encoder.", "vae.logvar_proj.", "vae.bottleneck.phi"))


def test_the_encoder_can_be_frozen_on_the_way(straight: Path):
    before, after = weights_at(straight, 4), weights_at(straight, 8)
    steps = [int(state["step"]) for state in optimizer_at(straight, 8).values()]
    names = list(before)
    assert {True, False} == {is_of_encoder(name) for name in names}
    assert max(steps) == 8 and steps.count(6) == sum(map(is_of_encoder, names))
    assert changed(before, after)


@pytest.fixture(scope="module")
def base_model(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.train(tmp_path_factory.mktemp("base"), "num_steps=1") / "vae"


def test_decoder_tuning_leaves_the_latents_as_they_are(script: Script, base_model: Path, tmp_path: Path):
    script.train(tmp_path, f"init={base_model}", "tune=decoder", "num_steps=2", "freeze_encoder_step=1")
    before = {f"vae.{key}": x for key, x in load_file(base_model / "diffusion_pytorch_model.safetensors").items()}
    moved = changed(before, weights_at(tmp_path, 2))
    assert not any(map(is_of_encoder, moved))
    assert moved >= {key for key in before if key.startswith(("vae.decoder.", "vae.bottleneck.initial"))}
    assert "fine-tuned from" in (tmp_path / "vae/README.md").read_text()
    with pytest.raises(ValueError, match="`tune` must be 'full' for the new model of `init: spec`, got 'decoder'"):
        script.train(tmp_path / "new", "tune=decoder")


def test_an_adaptive_weight_needs_last_layers_that_are_trained(script: Script, base_model: Path, tmp_path: Path):
    settings = ("tune=lora", "adversarial.is_adaptive=true", "adversarial.start_step=5", "num_steps=2", *SMALL_GAN)
    with pytest.raises(ValueError, match=r"`adversarial\.is_adaptive` must be false where .* are frozen, got true"):
        script.train(tmp_path, f"init={base_model}", *settings)


def test_lora_leaves_adapters_and_a_merged_model(script: Script, base_model: Path, tmp_path: Path):
    from peft import PeftModel

    settings = ("lora.rank=2", "num_steps=3", "ema_decay=0.5", "optimizer.learning_rate=1e-2")
    script.train(tmp_path, f"init={base_model}", "tune=lora", *settings)
    trained = weights_at(tmp_path, 3)
    base = load_file(base_model / "diffusion_pytorch_model.safetensors")
    kept = {key: x for key, x in trained.items() if "lora_" not in key}
    assert sorted(x.double().sum().item() for x in kept.values()) == sorted(
        x.double().sum().item() for x in base.values()
    )
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merged = AutoencoderKLLeanVAE.from_pretrained(tmp_path / "vae")
    adapted = PeftModel.from_pretrained(AutoencoderKLLeanVAE.from_pretrained(base_model), str(tmp_path / "adapter"))
    sample = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = merged(sample).sample
        torch.testing.assert_close(adapted.get_base_model()(sample).sample, expected, rtol=0, atol=1e-6)
        plain = AutoencoderKLLeanVAE.from_pretrained(base_model)(sample).sample
    assert (plain - expected).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"`lora` must fit the model, got \['nothing'\]"):
        script.train(tmp_path / "x", f"init={base_model}", "tune=lora", "lora.targets=[nothing]")


def test_a_teacher_lends_latents_and_their_statistics(script: Script, tmp_path: Path):
    torch.manual_seed(1)
    tiny = {"low_freq_dim": 8, "high_freq_dim": 24, "num_branch_layers": 1, "num_fusion_layers": 1}
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5}
    AutoencoderKLLeanVAE(**tiny, **statistics).save_pretrained(tmp_path / "teacher")
    judged = ("teacher.has_discriminator=true", "sample_posterior=false", "loss.ms_ssim=1.0", *SMALL_GAN)
    run = script.train(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}", "num_steps=2", *judged)
    config = AutoencoderKLLeanVAE.load_config(run / "vae")
    assert {name: config[name] for name in statistics} == statistics
    aligned = {"align_pixel", "align_latents", "align_low", "align_high", "align_ms_ssim", "align_adversarial"}
    log = read_log(run)
    assert aligned | {"align_discriminator", "align_lecam"} <= set(log[-1])
    assert changed(weights_at(run, 2, "_1"), weights_at(run, 2, "_2"))
    AutoencoderKLLeanVAE(**tiny, scaling_factor=0.5).save_pretrained(tmp_path / "factor")
    run = script.train(tmp_path / "factored", f"teacher.path={tmp_path / 'factor'}", "num_steps=1")
    config = AutoencoderKLLeanVAE.load_config(run / "vae")
    assert {name: config[name] for name in statistics} == dict.fromkeys(statistics) | {"scaling_factor": 0.5}
    with pytest.raises(ValueError, match="`student` must have the teacher's latents, 4 channels"):
        script.train(tmp_path / "x", f"teacher.path={tmp_path / 'teacher'}", "model.latent_channels=8")


def test_clips_of_a_teacher_come_in_turn_and_as_they_were_drawn():
    sizes = {"shapes": (5, 16, 24), "scenes": (1, 48, 48)}
    lists = [open_clip_list(ClipSelection(source, size)) for source, size in sizes.items()]
    clips = [train_vae.read_teacher_clip(lists, number) for number in range(4)]
    drawn = [MovingShapes(*sizes["shapes"]), MovingScenes(*sizes["scenes"])]
    for number, clip in enumerate(clips):
        assert torch.equal(clip[0], drawn[number % 2][number // 2].pixels)
    assert torch.equal(train_vae.read_teacher_clip(lists, 2 * len(lists[0])), clips[0])  # they start anew


def test_clips_of_a_teacher_are_large_enough_for_the_losses(script: Script, base_model: Path, tmp_path: Path):
    teacher = (f"teacher.path={base_model}", "teacher.clips={scenes: [1, 48, 48], shapes: [5, 16, 24]}", "num_steps=1")
    judged = ("adversarial.start_step=5", "adversarial.weight=1", "adversarial.num_filters=4")
    with pytest.raises(ValueError, match=r"`teacher\.clips\.shapes` must have sides of at least 24 .* \[5, 16, 24\]"):
        script.train(tmp_path, *teacher, *judged, "teacher.has_discriminator=true")


def test_a_teacher_is_compared_on_clips_of_its_own(script: Script, tmp_path: Path):
    torch.manual_seed(1)
    tiny = {"low_freq_dim": 8, "high_freq_dim": 24, "num_branch_layers": 1, "num_fusion_layers": 1}
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    AutoencoderKLLeanVAE(**tiny, **statistics, scaling_factor=0.5).save_pretrained(tmp_path / "teacher")
    teacher = (f"teacher.path={tmp_path / 'teacher'}", "teacher.clips={shapes: [5, 16, 24], scenes: [1, 48, 48]}")
    run = script.train(tmp_path / "run", *teacher, "num_steps=4", "log_every=1", "save_every=2")
    log = read_log(run)
    assert all({"align_pixel", "align_latents", "align_low", "align_high"} <= set(row) for row in log)
    config = AutoencoderKLLeanVAE.load_config(run / "vae")
    assert not {tuple(config[name]) for name in statistics} & {tuple(values) for values in statistics.values()}
    assert config["scaling_factor"] == 1.0  # its own statistics leave nothing to scale
    # Interrupted and resumed, the same clips come; with two clips a step other ones.
    again = script.train(tmp_path / "again", *teacher, "num_steps=2", "log_every=1", "save_every=2")
    assert script.train(again, *teacher, "num_steps=4", "log_every=1", "save_every=2") == again
    assert [row["align_latents"] for row in read_log(again)] == [row["align_latents"] for row in log]
    parts = script.train(tmp_path / "parts", *teacher, "num_steps=1", "log_every=1", "num_accumulation_steps=2")
    assert read_log(parts)[0]["align_latents"] != log[0]["align_latents"]
    for entries, message in (
        (("teacher.clips={shapes: [5, 16, 16]}",), "`teacher.clips` must be empty without `teacher.path`, got"),
        ((teacher[0], "teacher.clips={shapes: [5, 16]}"), "`teacher.clips.shapes` must be three positive integers"),
        ((teacher[0], "teacher.clips={scenes: [5, 16, 16]}"), "`teacher.clips` has 'scenes' .* must be at least 48"),
        ((teacher[0], "teacher.clips={/none: [5, 16, 16]}"), "`teacher.clips` has '/none' .* which is not there"),
        ((teacher[0], "teacher.clips={'hub:a/b': [5, 16, 16]}"), "must name sources on this machine, got 'hub:a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            script.train(tmp_path / "x", *entries)


def test_lpips_joins_from_a_file_of_weights(script: Script, tmp_path: Path):
    torch.manual_seed(0)
    trunk = {key: value for key, value in LPIPS().state_dict().items() if key.startswith("features.")}
    save_file(trunk, tmp_path / "vgg16.safetensors")
    settings = ("num_steps=1", "loss.lpips=4.0", f"perceptual.vgg16={tmp_path / 'vgg16.safetensors'}")
    run = script.train(tmp_path / "run", *settings)
    (record,) = read_log(run)
    weights = asdict(LeanVAEObjective(lpips=4.0))
    terms = {name: record[name] for name in weights if name in record}
    assert terms["lpips"] > 0
    assert record["loss"] == pytest.approx(sum(weights[name] * term for name, term in terms.items()), rel=1e-5)
    assert not any("features" in key for key in weights_at(run, 1))


# --- What goes wrong -------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int], only_loss: bool = False) -> None:
    """Make the loss of the given calls of the training module infinite, with gradients that are not, or are."""
    forward, count = train_vae.VAETrainingModule.forward, iter(range(1000))

    def poisoned(self, *args):
        output = forward(self, *args)
        if next(count) not in calls:
            return output
        return output._replace(loss=output.loss + float("inf") if only_loss else output.loss * float("inf"))

    monkeypatch.setattr(train_vae.VAETrainingModule, "forward", poisoned)


def scale_losses_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Accelerate the gradient scaler that it has for fp16 on a GPU."""
    initialize = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu"), True

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)


@pytest.mark.parametrize(
    ("only_loss", "precision"),
    [(False, "null"), (True, "null"), (False, "fp16")],
    ids=["gradient", "loss", "fp16"],
)
def test_steps_that_are_not_finite_are_skipped(
    only_loss: bool, precision: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, {1}, only_loss)
    if precision == "fp16":
        scale_losses_on_cpu(monkeypatch)
    settings = ("num_steps=3", "save_every=1", "keep_checkpoints=3", f"mixed_precision={precision}")
    script.train(tmp_path, *settings, *SMALL_GAN)
    log = read_log(tmp_path)
    assert [record["num_skipped"] for record in log] == [0, 1, 1]
    assert "loss" in log[0] and "loss" not in log[1]
    assert not changed(weights_at(tmp_path, 1), weights_at(tmp_path, 2))
    assert changed(weights_at(tmp_path, 2), weights_at(tmp_path, 3))
    trained = {key for key in weights_at(tmp_path, 1, "_1") if "running" not in key and "num_batches" not in key}
    moved = changed(weights_at(tmp_path, 1, "_1"), weights_at(tmp_path, 2, "_1")) & trained
    assert moved <= {"lecam.ema_real", "lecam.ema_fake"}
    if precision == "fp16":
        scales = [torch.load(tmp_path / f"checkpoints/step-000000{step}/scaler.pt")["scale"] for step in (1, 2, 3)]
        assert scales[0] == 2 * scales[1] == 2 * scales[2]


def test_too_many_such_steps_stop_the_run(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, {1, 2, 3, 4, 5})
    with pytest.raises(RuntimeError, match="the 2 newest steps had no finite loss and gradient"):
        script.train(tmp_path, "max_skipped_steps=2")
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]


def test_bad_videos_are_counted(script: Script, clips: Path, tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((clips / name).read_bytes())
    (tmp_path / "c.mp4").write_bytes((clips / "a.mp4").read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"Skipping a video.*c\.mp4"):
        run = script.train(tmp_path / "run", f"data.train={tmp_path}", "num_steps=3", "data.cache_gib=0")
    counts = [record["num_bad_videos"] for record in read_log(run)]
    assert counts == sorted(counts) and 1 <= counts[-1] <= 4  # three steps of two clips: two epochs of three videos


def test_out_of_time_saves_and_exports(script: Script, tmp_path: Path):
    script.train(tmp_path, "max_minutes=0", "mixed_precision=bf16", "save_dtype=float16")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    weights = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert {tensor.dtype for tensor in weights_at(tmp_path, 1).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("loss.lpips=4", "perceptual.vgg16=none.pth"), ValueError, "LPIPS has no weights: `vgg16` must be a file"),
        ((*SMALL_GAN, "adversarial.num_layers=4"), ValueError, "must leave sides of at least 48 .* got 32"),
        ((*REGULARISERS, "loss.ms_ssim=1", "data.clip_sizes=[[5,16,16]]"), ValueError, "at least 11 .* got 8"),
        (
            ("regularization.low_pass=1", "data.clip_sizes=[[5,8,16]]"),
            ValueError,
            "at least 16 for .*low_pass`, got 8",
        ),
        (("regularization.equivariance_probability=2",), ValueError, "must be from 0 to 1, got 2.0"),
        (("data.clip_sizes=[[5,32,32],[5,32,30]]",), ValueError, r"`data.clip_sizes` must have 4 \* n \+ 1 .* 30\]"),
        (("data.clip_sizes=[[6,32,32]]",), ValueError, r"of multiples of 8 for this model, got \[6, 32, 32\]"),
        (("validation.folder=nowhere",), ValueError, "^`validation.folder` must be an existing folder or null, got"),
        (("seed=-1",), ValueError, r"^`seed` must be from 0 to 2\*\*32 - 1, got -1"),
    ],
    ids=["lpips", "discriminator", "equivariance", "low_pass", "probability", "sides", "frames", "folder", "seed"],
)
def test_recipes_that_cannot_work_are_refused(
    overrides: tuple[str, ...], error: type[Exception], message: str, script: Script, tmp_path: Path
):
    with pytest.raises(error, match=message):
        script.train(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("package", "extra", "override"),
    [("wandb", "wandb", "trackers=[wandb]"), ("bitsandbytes", "adamw8bit", "optimizer.name=adamw8bit")],
    ids=["wandb", "bitsandbytes"],
)
def test_a_missing_package_is_named(
    package: str, extra: str, override: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "diffusers-leanvae\[{extra}\]"'):
        script.train(tmp_path, override)


def test_trackers_get_what_the_log_gets(script: Script, clips: Path, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script.train(tmp_path, "num_steps=2", "trackers=[tensorboard]", "validation.every=2", f"validation.folder={clips}")
    events = EventAccumulator(str(tmp_path / "leanvae"), {"images": 0}).Reload()
    log = read_log(tmp_path)
    for name in ("loss", "l1_pixel", "grad_norm"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(record["step"], pytest.approx(record[name])) for record in log]
    assert [event.step for event in events.Scalars("validation/psnr_frame_mean_rgb")] == [0, 2]
    names = ["a.mp4", "b.mp4", "nested/c.mp4"]
    assert events.Tags()["images"] == ["validation/pictures", *(f"validation/{name}" for name in names)]
    for event in events.Images("validation/pictures"):
        with Image.open(tmp_path / "validation" / f"step-{event.step:07d}.png") as written:
            with Image.open(BytesIO(event.encoded_image_string)) as shown:
                assert np.array_equal(np.asarray(shown), np.asarray(written)) and shown.size == (64, 96)
    for name in names:
        first, last = events.Images(f"validation/{name}")
        assert (first.step, last.step) == (0, 2) and (last.width, last.height) == (64, 32)
        with Image.open(BytesIO(last.encoded_image_string)) as shown:
            assert shown.format == "GIF" and shown.n_frames == 5
            frame = torch.from_numpy(np.asarray(shown.convert("RGB")))
        written, _ = read_video(tmp_path / "validation" / "step-0000002" / name)
        difference = (frame.float() - written[0].float()).abs().mean()
        assert difference < 8.0  # of 255 levels: animations have 256 colours


@pytest.mark.slow
def test_compiled_parts_train_alike(script: Script, tmp_path: Path):
    runs = [script.train(tmp_path / flag, "num_steps=2", f"compile={flag}") for flag in ("false", "true")]
    assert_same_training(runs[1], runs[0], 2)
