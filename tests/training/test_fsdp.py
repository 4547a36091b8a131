"""FSDP2 and the launcher's configurations: shards train as the whole does, and come back as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from runs import Script, assert_same_run, assert_same_training, changed, join_shards, launch, read_log, weights_at
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader


pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
CONFIGS = Path(__file__).resolve().parents[2] / "training/configs/accelerate"
# What could go wrong with shards: parts of a step, clipping, averages, something beside the transformer, recomputing.
FULL = (
    "num_steps=4",
    "save_every=2",
    "validation.every=2",
    "validation.num_samples=1",
    "num_accumulation_steps=2",
    "batch_size=8",
    "num_images=1",
    "representation.weight=0.5",
    "representation.after_block=2",
    "representation.hidden_dim=8",
    "gradient_checkpointing=true",
    "optimizer.max_grad_norm=0.5",
    "ema_decay=0.9",
    "ema_min_decay=0.5",
)
TEXT = (
    "num_steps=2",
    "batch_size=2",
    "data.kind=scenes",
    "data.clip_size=[5,64,64]",
    "data.num_clips=20",
    "num_classes=null",
    "text.encoder=new",
    "text.train_text_encoder=true",
    "text.config={d_model: 16, d_kv: 8, d_ff: 16, num_layers: 1, num_heads: 2}",
    "validation.data=null",
    "validation.num_samples=0",
)


def environment(name: str, *options: str) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration: all that matters to the processes that it starts."""
    path = str(CONFIGS / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, *options, "script.py"])
    found = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def launched(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    fsdp = environment("fsdp2", "--num_processes", "2")
    launch(
        folder,
        script.job(folder / "ddp", *FULL),
        script.job(folder / "fsdp", *FULL, environment=fsdp),
        script.job(folder / "resumed", *FULL, f"resume={folder}/fsdp/checkpoints/step-0000002", environment=fsdp),
        script.job(folder / "ddp_text", *TEXT),
        script.job(folder / "fsdp_text", *TEXT, environment=fsdp),
    )
    return folder


def _exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    weights = weights_at(run, step).items()
    return {key.removeprefix("transformer."): x for key, x in weights if key.startswith("transformer.")}


@pytest.mark.slow
def test_shards_train_as_the_whole_does(launched: Path):
    assert_same_training(launched / "fsdp", launched / "ddp", 4)
    for name in ("log", "validation"):
        ours, theirs = ([x["loss"] for x in read_log(launched / run, name)] for run in ("fsdp", "ddp"))
        assert ours == pytest.approx(theirs, abs=2e-6)  # measured: 2e-7
    ours, theirs = (_exported(launched / run) for run in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys() and changed(ours, _weights(launched / "fsdp", 4))
    difference = torch.cat([(ours[key] - tensor).abs().flatten() for key, tensor in theirs.items()])
    assert difference.double().quantile(0.999) <= 4e-6  # of a mean of weights, as in `assert_same_training`


@pytest.mark.slow
def test_a_run_on_shards_resumes_to_the_same_numbers(launched: Path):
    for name in ("checkpoints/step-0000004", "pipeline"):
        assert_same_run(launched / "resumed" / name, launched / "fsdp" / name)
    for name, steps in (("log", [3, 4]), ("validation", [4])):
        ours, theirs = (read_log(launched / run, name)[-len(steps) :] for run in ("resumed", "fsdp"))
        assert [record["step"] for record in ours] == steps
        assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    assert changed(_weights(launched / "fsdp", 2), _weights(launched / "fsdp", 4))


@pytest.mark.slow
def test_checkpoints_hold_shards_and_the_pipeline_the_whole_average(launched: Path):
    checkpoint = launched / "fsdp/checkpoints/step-0000004"
    names = list(dict(_parameters(launched / "fsdp")))
    for folder, prefix in (("pytorch_model_fsdp_0", "model.transformer."), ("average", "")):
        saved = FileSystemReader(checkpoint / folder).read_metadata().state_dict_metadata
        keys = [f"{prefix}{name}" if prefix else str(index) for index, name in enumerate(names)]
        # Two shares of all that has two rows to share.
        assert {len(saved[key].chunks) for key in keys if saved[key].size[0] > 1} == {2}
    average = join_shards(checkpoint / "average")
    for index, (name, parameter) in enumerate(_parameters(launched / "fsdp")):
        torch.testing.assert_close(parameter, average[str(index)], rtol=0, atol=0, msg=name)
    state = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    assert state["optimization_step"] == 4 and "shadow_params" not in state


def _parameters(run: Path) -> list[tuple[str, torch.Tensor]]:
    from diffusers_leanvae import LeanVAELatteTransformer3DModel

    model = LeanVAELatteTransformer3DModel.from_pretrained(run / "pipeline/transformer")
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@pytest.mark.slow
def test_a_text_encoder_that_is_trained_along_is_sharded_too(launched: Path):
    runs = [launched / "fsdp_text", launched / "ddp_text"]
    for key, tolerance in (("loss", 4e-6), ("grad_norm", 4e-6)):  # measured: 5e-7
        ours, theirs = ([record[key] for record in read_log(run)] for run in runs)
        assert ours == pytest.approx(theirs, abs=tolerance)
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = (load_file(run / f"pipeline/{name}.safetensors") for run in runs)
        assert ours.keys() == theirs.keys()
        difference = torch.cat([(ours[key] - tensor).abs().flatten() for key, tensor in theirs.items()])
        assert difference.double().quantile(0.999) <= 4e-6


@pytest.mark.slow
def test_a_checkpoint_of_shards_says_that_it_needs_fsdp(launched: Path, script: Script, tmp_path: Path):
    checkpoint = launched / "fsdp/checkpoints/step-0000002"
    with pytest.raises(ValueError, match="A run that began with FSDP must go on with it, got the checkpoint .*0002"):
        script.train(tmp_path, *FULL, f"resume={checkpoint}")


@pytest.mark.slow
def test_the_command_of_the_configuration_shards(script: Script, tmp_path: Path):
    """All of `accelerate launch`, which starts as many processes on the processor where its configuration says so."""
    arguments = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(script.path)]
    settings = script.arguments(tmp_path / "run", "num_steps=1", "batch_size=2", "validation.num_samples=0")
    finished = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run/checkpoints/step-0000001/average/.metadata").is_file()


@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_shards(launched: Path, script: Script):
    fsdp = environment("fsdp2", "--num_processes", "4")
    settings = (*FULL, f"resume={launched / 'fsdp/checkpoints/step-0000002'}")
    launch(launched, script.job(launched / "four", *settings, num_processes=4, environment=fsdp))
    ours, theirs = (read_log(launched / run)[-1] for run in ("four", "fsdp"))
    assert ours["step"] == 4 and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    ours, theirs = (_exported(launched / run) for run in ("four", "fsdp"))
    difference = torch.cat([(ours[key] - tensor).abs().flatten() for key, tensor in theirs.items()])
    assert difference.double().quantile(0.999) <= 4e-6


@pytest.mark.parametrize("name", ["one_gpu", "several_gpus", "several_nodes", "fsdp2"])
def test_every_configuration_leaves_the_precision_to_the_recipe(name: str):
    nodes = ("--machine_rank", "1", "--main_process_ip", "127.0.0.1") if name == "several_nodes" else ()
    found = environment(name, *(() if name == "one_gpu" else ("--num_processes", "16")), *nodes)
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (found.get("ACCELERATE_USE_FSDP"), found.get("FSDP_VERSION")) == (
        ("true", "2") if name == "fsdp2" else (None, None)
    )
    assert f"training/configs/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
