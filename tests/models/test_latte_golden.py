"""Latte against tensors recorded from the reference implementation (shared/golden, random weights, float32)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from diffusers_leanvae.conversion.latte import config_from_original, from_original, to_original
from diffusers_leanvae.generation.schedulers import guide_noise, make_scheduler, respaced_timesteps
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
NAMES = ["latte_uncond_c4", "latte_class_c4", "latte_class_c16"]
NUM_GUIDED_CHANNELS = 4  # of the reference, whatever the number of latent channels


class Golden(dict[str, torch.Tensor]):
    """Tensors of a file; those with five or more dimensions are turned from frames first to channels first."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.args = json.loads(file.metadata().get("config", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.state_dict = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
        super().__init__((k, v.transpose(-3, -4) if v.ndim > 4 else v) for k, v in tensors.items())

    def model(self) -> LeanVAELatteTransformer3DModel:
        model = LeanVAELatteTransformer3DModel(**config_from_original(self.state_dict, self.args["num_heads"]))
        model.load_state_dict(from_original(self.state_dict), strict=True)
        return model.eval()


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


def regroup(tokens: torch.Tensor, num_frames: int, is_temporal: bool) -> torch.Tensor:
    """Our tokens `(B, F * N, D)` in the reference's grouping: of a frame, or of a place."""
    tokens = tokens.unflatten(1, (num_frames, -1))
    return (tokens.transpose(1, 2) if is_temporal else tokens).flatten(0, 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward(name: str):
    golden = Golden(name)
    model, seen = golden.model(), {}

    def record(key: str):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor):
            seen[f"{key}.in"], seen[f"{key}.out"] = args[0], output

        return hook

    spatial, temporal = model.transformer_blocks[0], model.temporal_transformer_blocks[0]
    for key, module in {"t": model.timestep_embedder, "s": spatial, "m": temporal, "f": model.proj_out}.items():
        module.register_forward_hook(record(key))
    out = model(golden["forward.x"], golden["forward.t"], golden.get("forward.y")).sample

    num_frames = golden["forward.x"].shape[2]
    # Measured: up to 5e-7 of the largest value.
    assert_matches(seen["t.out"], golden["forward.mid.t_emb"], 1e-5)
    if model.class_embedder is not None:
        assert_matches(model.class_embedder(golden["forward.y"]), golden["forward.mid.y_emb"], 1e-5)
    assert_matches(regroup(seen["s.in"], num_frames, False), golden["forward.mid.block0_in"], 1e-5)
    assert_matches(regroup(seen["s.out"], num_frames, False), golden["forward.mid.block0_out"], 1e-5)
    with_positions = seen["m.in"] + model.temp_embed.repeat_interleave(seen["m.in"].shape[1] // num_frames, dim=1)
    assert_matches(regroup(with_positions, num_frames, True), golden["forward.mid.block1_in"], 1e-5)
    assert_matches(regroup(seen["m.out"], num_frames, True), golden["forward.mid.block1_out"], 1e-5)
    assert_matches(regroup(seen["f.out"], num_frames, False), golden["forward.mid.final_tokens"], 1e-5)
    assert_matches(out, golden["forward.out"], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_back_bit_for_bit(name: str):
    golden = Golden(name)
    back = to_original(golden.model().state_dict())
    assert back.keys() == golden.state_dict.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in golden.state_dict.items())


def test_stored_tables_are_used():
    golden = Golden("latte_class_c16")  # its tables are not the formula's
    fresh, stored = LeanVAELatteTransformer3DModel(**golden.model().config), golden.model()
    assert (fresh.pos_embed - stored.pos_embed).abs().max() > 1e-2
    assert (fresh.temp_embed - stored.temp_embed).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["latte_uncond_c4", "latte_class_c4"])
def test_tables_follow_the_formula(name: str):
    golden = Golden(name)
    fresh = LeanVAELatteTransformer3DModel(**golden.model().config)
    assert torch.equal(fresh.pos_embed, golden.state_dict["pos_embed"])
    assert torch.equal(fresh.temp_embed, golden.state_dict["temp_embed"])


def guided(model: LeanVAELatteTransformer3DModel, golden: Golden, latents, t, labels, scale: float) -> torch.Tensor:
    timesteps = t.expand(latents.shape[0])
    conditional = model(latents, timesteps, labels).sample
    if labels is None:
        return conditional
    null = torch.full_like(labels, golden.args["num_classes"])
    unconditional = model(latents, timesteps, null).sample
    return guide_noise(conditional, unconditional, scale, model.in_channels, NUM_GUIDED_CHANNELS)


@pytest.mark.parametrize("name", NAMES[1:])
@torch.no_grad()
def test_guidance(name: str):
    golden = Golden(name)
    model = golden.model()
    latents, timesteps, labels = (golden[f"cfg.{key}"] for key in "xty")
    half = latents.shape[0] // 2
    assert (labels[half:] == golden.args["num_classes"]).all()
    for index, scale in enumerate(golden["cfg.scales"].tolist()):
        expected = golden[f"cfg.out{index}"]
        actual = guided(model, golden, latents[:half], timesteps[:half], labels[:half], scale)
        assert_matches(actual, expected[:half], 2e-5)  # measured 4e-6
        null = model(latents[:half], timesteps[half:], labels[half:]).sample
        second = torch.cat((actual[:, :NUM_GUIDED_CHANNELS], null[:, NUM_GUIDED_CHANNELS:]), dim=1)
        assert_matches(second, expected[half:], 2e-5)


def trajectory(golden: Golden, scheduler_name: str, timesteps: list[int], monkeypatch) -> list[torch.Tensor]:
    model = golden.model()
    scheduler: Any = make_scheduler(scheduler_name)
    scheduler.set_timesteps(timesteps=timesteps)
    scale = golden["sample.guidance_scale"].item() if "sample.guidance_scale" in golden else 1.0
    latents, steps = golden["sample.z"], []
    for index, t in enumerate(scheduler.timesteps):
        output = guided(model, golden, latents, t, golden.get("sample.y"), scale)
        if scheduler_name == "ddpm":
            noise = golden["sample.noise"][index]
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise
            )
        else:
            output = output[:, : model.in_channels]
        latents = scheduler.step(output, t, latents).prev_sample
        steps.append(latents)
    return steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["ddpm", "ddim", "ddim_leading"])
@torch.no_grad()
def test_trajectory(name: str, method: str, monkeypatch):
    golden = Golden(name)
    key = "sample.ddim_leading_timesteps" if method == "ddim_leading" else "sample.timesteps"
    timesteps = golden[key].tolist()
    if method != "ddim_leading":
        assert timesteps == respaced_timesteps(len(timesteps))
    steps = trajectory(golden, method.removesuffix("_leading"), timesteps, monkeypatch)
    # Measured: up to 3e-5 of the largest value with DDPM (its tables are in float32), 1e-5 with DDIM.
    for actual, expected in zip(steps, golden[f"sample.{method}_steps"], strict=True):
        assert_matches(actual, expected, 2e-4)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_single_steps(method: str, monkeypatch):
    golden = Golden("latte_diffusion")
    scheduler: Any = make_scheduler(method)
    timesteps = golden["step.timesteps"].tolist()
    x, output, noise = golden["step.x"], golden["step.model_output"], golden["step.noise"]
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    for index in range(len(timesteps)):
        scheduler.set_timesteps(timesteps=timesteps)
        given = output if method == "ddpm" else output[:, : x.shape[1]]
        actual = scheduler.step(given, scheduler.timesteps[index], x).prev_sample
        assert_matches(actual, golden[f"step.{method}"][index], 2e-4)


def test_respacing():
    golden = Golden("latte_diffusion")
    for n in (1, 2, 5, 10, 21, 43, 50, 91, 100, 250, 1000):
        assert respaced_timesteps(n)[::-1] == golden[f"respacing.{n}"].tolist()
