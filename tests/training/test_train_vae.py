"""The training script: it runs, it resumes to the same numbers, and what goes wrong leaves whole files."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import diffusers_leanvae.training.train_vae as train_vae
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from diffusers_leanvae.data import VideoFolder, pixels_to_sample, read_center_clip
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.objectives import LossWeights
from diffusers_leanvae.training_module import VAETrainingModule


SCRIPT = Path(train_vae.__file__).resolve()
SMOKE = SCRIPT.parent / "configs" / "smoke.yaml"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(clips: Path, output: Path, *overrides: str) -> list[str]:
    return [str(SMOKE), f"data.train={clips}", f"output={output}", "num_threads=1", *overrides]


def train(clips: Path, output: Path, *overrides: str) -> Path:
    train_vae.main(arguments(clips, output, *overrides))
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Equal to the last bit: trained weights, averaged weights, optimizer, logged losses, exported model."""
    newest = "checkpoints/step-0000006"
    assert sorted(path.name for path in (actual / "checkpoints").iterdir()) == ["step-0000003", "step-0000006"]
    for name in (f"{newest}/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        torch.testing.assert_close(load_file(actual / name), load_file(expected / name), rtol=0, atol=0)
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        ours, theirs = (torch.load(run / newest / name, weights_only=True) for run in (actual, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name in ("log.jsonl", "validation.jsonl"):
        ours, theirs = (without_times(read_json_lines(run / name)) for run in (actual, expected))
        assert ours == theirs
    assert (actual / "vae/config.json").read_text() == (expected / "vae/config.json").read_text()


@pytest.fixture(scope="module")
def full() -> tuple[str, ...]:
    """Overrides that switch on what could disturb resuming."""
    return ("num_accumulation_steps=2", "data.clip_sizes=[[5,32,32],[1,16,16]]", "gradient_checkpointing=true")


@pytest.fixture(scope="module")
def straight(clips: Path, full: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(clips, tmp_path_factory.mktemp("straight"), f"validation.folder={clips}", *full)


def test_the_script_runs_and_leaves_a_model(clips: Path, tmp_path: Path):
    output = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *arguments(clips, output, "num_steps=2", "init=pca")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "log.jsonl", "recipe.yaml", "vae"]
    vae = AutoencoderKLLeanVAE.from_pretrained(output / "vae")
    assert vae.dtype == torch.float32 and len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
    log = read_json_lines(output / "log.jsonl")
    assert [record["step"] for record in log] == [1, 2]
    assert set(log[0]) == {
        *("step", "lr", "num_skipped", "loss", "grad_norm", "seconds_per_step", "data_seconds_per_step"),
        *asdict(LossWeights()),
    }


def test_validation_and_statistics_are_those_of_the_averaged_model(clips: Path, straight: Path):
    vae = AutoencoderKLLeanVAE.from_pretrained(straight / "vae")
    (record,) = (record for record in read_json_lines(straight / "validation.jsonl") if record["step"] == 6)
    assert list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]
    clip = read_center_clip(clips / "b.mp4", num_frames=5, size=32)[None]
    with torch.no_grad():
        error = ((vae(clip).sample.clamp(-1, 1) - clip) / 2).square().mean(dim=(0, 1, 3, 4))
    assert record["clips"]["b.mp4"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-4)
    assert record["psnr_frame_mean_rgb"] == pytest.approx(sum(record["clips"].values()) / 3)

    dataset = VideoFolder(clips, clip_sizes=[[5, 32, 32], [1, 16, 16]], clips_per_size=2)
    with torch.no_grad():
        latents = [vae.encode(pixels_to_sample(dataset[i].pixels[None])).latent_dist.mean for i in range(8)]
    values = torch.cat([latent.transpose(0, 1).flatten(1) for latent in latents], dim=1).double()
    torch.testing.assert_close(torch.tensor(vae.config.latents_mean).double(), values.mean(1), rtol=0, atol=1e-6)
    std = values.std(1, correction=0)
    torch.testing.assert_close(torch.tensor(vae.config.latents_std).double(), std, rtol=1e-4, atol=0)
    assert sorted(path.name for path in (straight / "validation").iterdir()) == [
        f"step-000000{step}.png" for step in (0, 3, 6)
    ]


def test_an_interrupted_run_resumes_to_the_same_numbers(
    clips: Path, straight: Path, full: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = EMAModel.step

    def interrupted(self: EMAModel, parameters: list[torch.nn.Parameter]) -> None:
        if self.optimization_step == 4:
            raise KeyboardInterrupt
        step(self, parameters)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EMAModel, "step", interrupted)
        train(clips, tmp_path, f"validation.folder={clips}", *full)
    assert [record["step"] for record in read_json_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # what a kill can leave
    AcceleratorState._reset_state(reset_partial_state=True)
    train(clips, tmp_path, f"validation.folder={clips}", *full)
    assert_same_run(tmp_path, straight)


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
from diffusers_leanvae.training import train_vae

save_state = Accelerator.save_state

def half(self, folder):
    save_state(self, folder)
    if folder.endswith("0000006"):
        (Path(folder) / "optimizer.bin").write_bytes(b"")
        (Path(folder) / "custom_checkpoint_0.pkl").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

Accelerator.save_state = half
train_vae.main(sys.argv[1:])
"""


def test_a_kill_while_saving_leaves_no_half_checkpoint(
    clips: Path, straight: Path, full: tuple[str, ...], tmp_path: Path
):
    overrides = (f"validation.folder={clips}", *full)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments(clips, tmp_path, *overrides)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["partial-0000006", "step-0000003"]
    train(clips, tmp_path, *overrides)
    assert_same_run(tmp_path, straight)


def test_processes_and_accumulation_give_the_same_model(clips: Path, tmp_path: Path):
    """A step's clips, noise and gradient do not depend on how they are shared; only the order of sums does."""
    runs = [train(clips, tmp_path / f"accumulate-{n}", "num_steps=3", f"num_accumulation_steps={n}") for n in (1, 2)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    shared = tmp_path / "shared"
    finished = subprocess.run(
        [*launcher, *arguments(clips, shared, "num_steps=3", f"validation.folder={clips}")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert finished.returncode == 0, finished.stderr
    runs.append(shared)
    first, *others = (load_file(run / "checkpoints/step-0000003/model.safetensors") for run in runs)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=2e-6)
    (record,) = (record for record in read_json_lines(shared / "validation.jsonl") if record["step"] == 3)
    assert list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]


def test_old_checkpoints_go_and_an_older_one_can_be_resumed(clips: Path, tmp_path: Path):
    train(clips, tmp_path, "num_steps=4", "save_every=1", "keep_checkpoints=3")
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003", "step-0000004"]
    expected = load_file(folder / "step-0000004" / "model.safetensors")
    train(clips, tmp_path, "num_steps=4", "save_every=1", "keep_checkpoints=3", f"resume={folder / 'step-0000002'}")
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003", "step-0000004"]
    torch.testing.assert_close(load_file(folder / "step-0000004" / "model.safetensors"), expected, rtol=0, atol=0)
    assert [record["step"] for record in read_json_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="`output` must hold no checkpoints when `resume` is null"):
        train(clips, tmp_path, "resume=null")
    with pytest.raises(ValueError, match="`resume` must be 'latest', a checkpoint folder or null, got 'nowhere'"):
        train(clips, tmp_path, "resume=nowhere")


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the loss of the given calls of the training module infinite."""
    forward, count = VAETrainingModule.forward, iter(range(1000))

    def poisoned(self, *args):
        loss, terms = forward(self, *args)
        return (loss * float("inf") if next(count) in calls else loss), terms

    monkeypatch.setattr(VAETrainingModule, "forward", poisoned)


def test_steps_without_a_finite_gradient_are_skipped(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, {1})
    train(clips, tmp_path, "num_steps=3", "save_every=1", "keep_checkpoints=3")
    log = read_json_lines(tmp_path / "log.jsonl")
    assert [record["num_skipped"] for record in log] == [0, 1, 1]
    assert "loss" in log[0] and "loss" not in log[1]
    weights = [load_file(tmp_path / f"checkpoints/step-000000{step}/model.safetensors") for step in (1, 2, 3)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert any(not torch.equal(weights[2][key], weights[0][key]) for key in weights[0])


def test_too_many_such_steps_stop_the_run(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, {1, 2, 3, 4, 5})
    with pytest.raises(RuntimeError, match="the 2 newest steps had no finite gradient"):
        train(clips, tmp_path, "max_skipped_steps=2")
    assert [record["step"] for record in read_json_lines(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_out_of_time_saves_and_exports(clips: Path, tmp_path: Path):
    train(clips, tmp_path, "max_minutes=0", "mixed_precision=bf16", "save_dtype=float16")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    weights = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    trained = load_file(tmp_path / "checkpoints/step-0000001/model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
