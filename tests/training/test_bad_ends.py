"""Runs that must not end well: weights that are not finite, and places that cannot be written to."""

import re
import sys
from pathlib import Path

import pytest
import torch
from runs import Script, read_log
from safetensors.torch import save_file
from tiny import make_tiny

from diffusers_leanvae.data.shapes import NUM_CLASSES
from diffusers_leanvae.trainer.checkpoints import append_json, writing


STILL = ("num_steps=1", "batch_size=2", "optimizer.learning_rate=0", "ema_decay=0")
PLAIN = ("validation.data=null", "validation.num_samples=0")


# --- Weights that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (1e5, "float16")], ids=["NaN", "too large for float16"]
)
@pytest.mark.parametrize("name", ["train_vae", "train_lvdm"])
def test_weights_that_are_not_finite_replace_nothing(
    name: str, value: float, dtype: str, script: Script, clips: Path, tmp_path: Path
):
    if name == "train_vae":
        model, exported = make_tiny("leanvae"), "vae"
        script, given = Script(name, "smoke.yaml", f"data.train={clips}"), ()
    else:
        model = make_tiny(
            "latte", out_channels=4, num_latent_frames=2, num_classes=NUM_CLASSES
        )  # of `lvdm_smoke.yaml`
        exported, given = "pipeline", (*PLAIN, "variant=null")
    broken, parameter = next((key, x) for key, x in model.named_parameters() if "bias" in key)
    with torch.no_grad():
        parameter.view(-1)[0] = value
    model.save_pretrained(tmp_path / "init")
    former = tmp_path / "run" / exported / "former.txt"
    former.parent.mkdir(parents=True)
    former.touch()
    message = f"^Nothing was exported: .* must be finite in {dtype}, got others in {broken!r} after 1 steps.$"
    with pytest.raises(RuntimeError, match=message):
        script.train(tmp_path / "run", *STILL, *given, f"init={tmp_path / 'init'}", "model={}", f"save_dtype={dtype}")
    assert former.exists()


def test_logs_are_json_whatever_is_measured(tmp_path: Path):
    append_json(tmp_path / "log.jsonl", {"step": 1, "loss": float("nan"), "levels": {"0.5": float("inf"), "0.7": 0.5}})
    assert read_log(tmp_path) == [{"step": 1, "loss": None, "levels": {"0.5": None, "0.7": 0.5}}]


# --- Places that cannot be written to --------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Files may have 4 KiB: what a write meets at the end of the disk, nearly."""
    resource = pytest.importorskip("resource", reason="Windows knows no limit of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (torch.save, r"the disk is full, or the file would be too large \(.*\)"),
        (save_file, r".*[Ff]ile too large.*"),
        (lambda tensors, path: path.write_bytes(tensors["x"].numpy().tobytes()), r"File too large"),
    ],
    ids=["torch", "safetensors", "bytes"],
)
def test_whatever_writes_the_place_is_named(write, reason: str, small_files: None, tmp_path: Path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=rf"^Cannot write {re.escape(repr(str(path)))}: {reason}\.$"), writing(path):
        write({"x": torch.zeros(10_000)}, path)


def test_a_checkpoint_that_cannot_be_written_is_named(script: Script, small_files: None, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^Cannot write '.*run/checkpoints/step-0000001': [^\n]*too large[^\n]*$"):
        script.train(tmp_path / "run", *STILL, *PLAIN)
    assert len(read_log(tmp_path / "run")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has /proc")
def test_a_place_for_no_files_is_refused_before_anything_is_loaded(script: Script):
    with pytest.raises(ValueError, match="'/proc/x'"):
        script.train(Path("/proc/x"), "vae=/nowhere")
