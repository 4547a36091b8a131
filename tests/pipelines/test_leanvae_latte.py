"""The class-conditional and unconditional pipeline: labels, schedulers, known frames, long videos, errors."""

import json
import re
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from safetensors import safe_open

from diffusers_leanvae import LeanVAELattePipeline, LeanVAELatteTransformer3DModel
from diffusers_leanvae.conversion.latte import config_from_original, from_original
from diffusers_leanvae.generation.schedulers import make_scheduler, respaced_timesteps, set_timesteps
from diffusers_leanvae.latents import normalize_latents


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
LABELS = {0: "red circle, disc", 1: "blue square", 2: "green star"}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_name_and_by_id(class_case, tmp_path: Path):
    pipeline = class_case.pipeline(id2label=LABELS)
    expected = class_case.run(pipeline, class_labels=[0, 2], output_type="latent")
    for labels in (["disc", "green star"], ["red circle", 2], torch.tensor([0, 2]), np.array([0, 2]).tolist()):
        assert torch.equal(class_case.run(pipeline, class_labels=labels, output_type="latent"), expected)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.labels == pipeline.labels == {"red circle": 0, "disc": 0, "blue square": 1, "green star": 2}
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"] == {
        str(k): v for k, v in LABELS.items()
    }


def test_one_label_makes_one_video(class_case):
    pipeline = class_case.pipeline(id2label=LABELS)
    assert len(class_case.run(pipeline, class_labels="disc")) == len(class_case.run(pipeline, class_labels=1)) == 1


def test_no_label_is_the_null_class(class_case):
    pipeline = class_case.pipeline()
    seen = []

    def look(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        seen.extend(tensors["class_labels"].tolist())
        return {}

    class_case.run(
        pipeline,
        class_labels=None,
        num_videos_per_prompt=2,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["class_labels"],
    )
    assert set(seen) == {3}


def test_unconditional_model(class_case):
    pipeline = class_case.pipeline(transformer=class_case.components(num_classes=None)["transformer"])
    frames = class_case.run(pipeline, class_labels=None, num_videos_per_prompt=2)
    assert frames.shape == (2, 9, 3, 32, 32) and not pipeline.do_classifier_free_guidance
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, got"):
        class_case.run(pipeline)


# --- Guidance and schedulers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latte_uncond_c4", "latte_class_c4", "latte_class_c16"])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_trajectories_of_the_reference(name: str, scheduler: str, make_model, monkeypatch):
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs the golden tensors {path}")
    with safe_open(path, "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}
        heads = json.loads(file.metadata()["config"])["num_heads"]
    original = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    golden = {key: v.transpose(-3, -4) if v.ndim > 4 else v for key, v in golden.items()}  # channels first
    transformer = LeanVAELatteTransformer3DModel(**config_from_original(original, heads))
    transformer.load_state_dict(from_original(original))
    pipeline = LeanVAELattePipeline(
        make_model(latent_channels=transformer.config.in_channels), transformer.eval(), make_scheduler(scheduler)
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, steps = iter(golden["sample.noise"]), []
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noise))

    def collect(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        steps.append(tensors["latents"])
        return {}

    pipeline(
        golden["sample.y"] if "sample.y" in golden else None,
        num_videos_per_prompt=1 if "sample.y" in golden else len(golden["sample.z"]),
        guidance_scale=float(golden.get("sample.guidance_scale", torch.tensor(1.0))),
        num_guided_channels=4,
        timesteps=golden["sample.timesteps"].tolist(),
        latents=golden["sample.z"],
        output_type="latent",
        callback_on_step_end=collect,
    )
    expected = golden[f"sample.{scheduler}_steps"]
    assert len(steps) == len(expected)
    for actual, wanted in zip(steps, expected, strict=True):  # measured: up to 4e-5 of the largest value
        close(actual, wanted, atol=2e-4 * wanted.abs().max().item())


def test_the_number_of_guided_channels(class_case):
    pipeline = class_case.pipeline()
    plain, full, part = (
        class_case.run(pipeline, timesteps=[500], output_type="latent", **guidance)
        for guidance in ({"guidance_scale": 1.0}, {}, {"num_guided_channels": 1})
    )
    assert torch.equal(part[:, :1], full[:, :1]) and (part[:, :1] - plain[:, :1]).abs().max() > 0.1
    close(part[:, 1:], plain[:, 1:], atol=1e-5)
    assert (full[:, 1:] - plain[:, 1:]).abs().max() > 0.1


def test_only_ddpm_gets_the_variance(class_case):
    for name in ("ddpm", "ddim", "dpm++", "flow"):
        pipeline = class_case.pipeline(name)
        widths: list[int] = []
        step = pipeline.scheduler.step

        @wraps(step)
        def record(output: torch.Tensor, *args: Any, step=step, widths=widths, **kwargs: Any) -> Any:
            widths.append(output.shape[1])
            return step(output, *args, **kwargs)

        pipeline.scheduler.step = record
        class_case.run(pipeline)
        assert set(widths) == ({8} if name == "ddpm" else {4}), name


def test_a_dpm_solver_made_from_a_ddpm_config(class_case):
    # It inherits `variance_type="learned_range"`, and with it would keep three channels of what it gets.
    pipeline = class_case.pipeline("ddpm")
    expected = class_case.run(class_case.pipeline("dpm++"))
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    given, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    assert config["variance_type"] == "learned_range"
    for _ in range(2):
        close(class_case.run(pipeline), expected, atol=1e-6)
    assert pipeline.scheduler is given and dict(given.config) == config  # what is saved is what was loaded


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ],
)
def test_other_schedulers_run(class_case, name: str):
    pipeline = class_case.pipeline("ddpm")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    for inputs in ({}, {"video": torch.rand(9, 3, 32, 32), "strength": 0.5}, {"image": torch.rand(1, 3, 32, 32)}):
        videos = class_case.run(pipeline, num_inference_steps=4, class_labels=[0, 1], **inputs)
        assert videos.isfinite().all() and len(videos) == 2


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("CogVideoXDPMScheduler", {}, "got a CogVideoXDPMScheduler, which needs `timestep_back` and `sample`"),
        (
            "IPNDMScheduler",
            {"image": torch.rand(1, 3, 32, 32)},
            "must have `add_noise` or `scale_noise` .* a IPNDM",
        ),
        ("IPNDMScheduler", {"num_frames": 17}, "must have `add_noise` or `scale_noise` for an image, a video or seve"),
    ],
)
def test_schedulers_that_cannot_be_used(class_case, name: str, inputs: dict[str, Any], message: str):
    pipeline = class_case.pipeline("ddpm")
    pipeline.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=message):
        class_case.run(pipeline, num_inference_steps=4, **inputs)


def test_velocity_models_without_variance_channels(class_case):
    # With the velocity noise - x0 known exactly, any number of Euler steps ends at x0.
    transformer = class_case.components(out_channels=4)["transformer"]
    clean, noise = (torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))

    def velocity(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (noise - clean,)

    transformer.forward = velocity
    pipeline = class_case.pipeline("flow", transformer=transformer)
    for steps in (1, 7):
        latents = class_case.run(
            pipeline, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent"
        )
        close(latents, clean, atol=1e-5)
    with pytest.raises(ValueError, match="`scheduler` must have a fixed `variance_type`"):
        pipeline.scheduler = make_scheduler("ddpm")
        class_case.run(pipeline)


def test_lists_of_steps(class_case):
    pipeline = class_case.pipeline("ddim")
    steps = respaced_timesteps(21)
    device = torch.device("cpu")
    assert set_timesteps(pipeline.scheduler, 50, device, timesteps=steps).tolist() == steps
    flow = make_scheduler("flow")
    assert len(set_timesteps(flow, 50, device, sigmas=[1.0, 0.5])) == 2
    with pytest.raises(ValueError, match="must not be given together"):
        set_timesteps(flow, 50, device, timesteps=[1.0], sigmas=[1.0])
    with pytest.raises(ValueError, match="`timesteps` must be None for a DDIMScheduler"):
        set_timesteps(diffusers.DDIMScheduler(), 50, device, timesteps=steps)
    kinds: Any = (tuple, np.array, torch.tensor)
    for kind in kinds:
        assert set_timesteps(make_scheduler("ddpm"), 50, device, timesteps=kind([999, 0])).tolist() == [999, 0]
    assert set_timesteps(flow, 50, device, timesteps=[1000.0, 250.5, 0]).tolist() == [1000.0, 250.5, 0]


@pytest.mark.parametrize("steps", [[], [-1], [2000, 1], [500, 999], [999, 999], [float("nan")], ["1"], [True], 5, "5"])
@pytest.mark.parametrize("scheduler, last", [("ddpm", 999), ("ddim", 999), ("dpm++", 999), ("flow", 1000)])
def test_lists_of_steps_that_cannot_be_sampled_by(scheduler: str, last: int, steps: Any, class_case):
    message = rf"`timesteps` must be a list of at least one number from 0 to {last}, each less than .*, got "
    with pytest.raises(ValueError, match=message + re.escape(repr(steps))):
        class_case.run(class_case.pipeline(scheduler), timesteps=steps)


@pytest.mark.parametrize("sigmas", [[], [-0.5], [0.5, 1.0], [float("inf")]])
def test_noise_levels_that_cannot_be_sampled_by(sigmas: list[float], class_case):
    with pytest.raises(ValueError, match="`sigmas` must be a list of at least one number from 0 on, each less than"):
        class_case.run(class_case.pipeline("flow"), timesteps=None, sigmas=sigmas)


# --- Known frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++", "flow"])
def test_an_image_is_the_first_frame(class_case, make_video, scheduler: str):
    pipeline = class_case.pipeline(scheduler)
    image = make_video(2, 3, 32, 32) / 2 + 0.5
    inputs = {"class_labels": [0, 1], "guidance_scale": 1.0}
    latents = class_case.run(pipeline, image=image, output_type="latent", **inputs)
    expected = pipeline.vae.encode(image * 2 - 1).latent_dist.mode()
    close(latents[:, :, :1], normalize_latents(expected, pipeline.vae.config), atol=1e-6)
    # LeanVAE is causal: the decoded first frame is the image's reconstruction, whatever follows.
    frames = class_case.run(pipeline, image=image, **inputs)
    close(frames[:, 0], (pipeline.vae.decode(expected).sample[:, :, 0] / 2 + 0.5).clamp(0, 1), atol=1e-4)
    free = class_case.run(pipeline, output_type="latent", **inputs)
    assert (latents[:, :, 1:] - free[:, :, 1:]).abs().max() > 1e-3  # the known frame matters to the others


def test_kinds_of_images_and_videos(class_case):
    pipeline = class_case.pipeline()
    array = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
    images = [PIL.Image.fromarray(frame) for frame in array]
    expected = class_case.run(pipeline, image=tensor[:1], output_type="latent")
    for image in (images[0], array[0] / 255.0, tensor[0]):
        close(class_case.run(pipeline, image=image, output_type="latent"), expected, atol=1e-4)
    expected = class_case.run(pipeline, video=tensor, strength=0.5, output_type="latent")
    for video in (images, array / 255.0, tensor[None]):
        close(class_case.run(pipeline, video=video, strength=0.5, output_type="latent"), expected, atol=1e-4)
    smaller = tensor[:, :, ::2, ::2]
    assert class_case.run(pipeline, video=smaller, strength=0.5).shape == (1, 9, 3, 32, 32)  # resized


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++", "flow"])
def test_strength_says_how_much_of_a_video_stays(class_case, make_video, scheduler: str):
    pipeline = class_case.pipeline(scheduler)
    video = make_video(9, 3, 32, 32) / 2 + 0.5
    clean = pipeline.encode_video(video.transpose(0, 1)[None] * 2 - 1)
    distances = []
    for strength, count in ((0.1, 1), (0.5, 5), (0.9, 9)):
        latents = class_case.run(
            pipeline, video=video, strength=strength, num_inference_steps=10, guidance_scale=1.0, output_type="latent"
        )
        assert pipeline.num_timesteps == count
        distances.append((latents - clean).norm().item())
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.3 * clean.norm()


# --- Long videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reencode", [True, False])
def test_long_videos_go_on_from_their_last_frames(class_case, reencode: bool):
    pipeline = class_case.pipeline()
    inputs = {"num_frames": 21, "reencode_overlap": reencode, "num_overlap_latent_frames": 1}
    generators = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)]
    noise = torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    starts: list[torch.Tensor] = []
    predict = pipeline._predict

    def look(tensors: dict, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        starts.append(latents[:, :, :1])
        return predict(tensors, latents, timestep)

    pipeline._predict = look
    latents = class_case.run(pipeline, latents=noise, output_type="latent", generator=generators[0], **inputs)
    assert latents.shape == (1, 4, 6, 4, 4) and pipeline.num_timesteps == 3 * 2  # windows at 0, 2, 3
    frames = class_case.run(pipeline, latents=noise, generator=generators[1], **inputs)
    assert frames.shape == (1, 21, 3, 32, 32)
    # Decoded window by window or at once: one causal video.
    whole = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), "pt")
    close(frames, whole, atol=1e-4)
    # The first window is the short video of the same noise.
    short = class_case.run(pipeline, latents=noise[:, :, :3], output_type="latent")
    close(latents[:, :, :3], short, atol=1e-5)
    # The second window starts from the end of the first, at the noise of its first step.
    known = latents[:, :, 2:3]
    if reencode:
        last = pipeline.decode_latents(latents[:, :, :3])[:, :, -1:]
        known = pipeline.encode_video(last.clamp(-1, 1))
    set_timesteps(pipeline.scheduler, 2, torch.device("cpu"), timesteps=[200, 100])
    expected = pipeline.scheduler.add_noise(known, noise[:, :, 2:3], torch.tensor([200]))
    close(starts[2], expected, atol=1e-4)


def test_long_videos_from_an_image_or_a_video(class_case, make_video):
    pipeline = class_case.pipeline()
    video = make_video(17, 3, 32, 32) / 2 + 0.5
    clean = pipeline.encode_video(video.transpose(0, 1)[None] * 2 - 1)
    latents = class_case.run(pipeline, image=video[:1], num_frames=17, output_type="latent")
    close(latents[:, :, :1], clean[:, :, :1], atol=1e-5)
    near, far = (
        class_case.run(
            pipeline,
            video=video,
            num_frames=17,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=1.0,
            output_type="latent",
        )
        for strength in (0.1, 1.0)
    )
    assert (near - clean).norm() < 0.3 * clean.norm() < (far - clean).norm()


def test_longer_windows_than_trained(class_case):
    pipeline = class_case.pipeline()
    with pytest.raises(ValueError, match="latent frames"):
        class_case.run(pipeline, num_frames=17, num_frames_per_window=17)
    pipeline.transformer.set_position_mode("extrapolate")
    frames = class_case.run(pipeline, num_frames=17, num_frames_per_window=17)
    assert frames.shape == (1, 17, 3, 32, 32) and pipeline.num_timesteps == 2
    assert class_case.run(pipeline, height=48, width=64).shape == (1, 9, 3, 48, 64)


def test_decoding_streams(class_case):
    pipeline = class_case.pipeline()
    latents = class_case.run(pipeline, num_frames=33, output_type="latent")
    whole = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), "pt")
    pieces = list(pipeline.decode_stream(latents, num_latent_frames_per_step=2))
    assert [piece.shape[1] for piece in pieces] == [9, 8, 8, 8]
    close(torch.cat(pieces, dim=1), whole, atol=1e-5)
    assert isinstance(next(pipeline.decode_stream(latents, "pil"))[0][0], PIL.Image.Image)
    with pytest.raises(ValueError, match="`output_type` must be one of 'pil', 'np', 'pt', got 'latent'"):
        next(pipeline.decode_stream(latents, "latent"))


@pytest.mark.parametrize("reencode", [True, False])
@pytest.mark.parametrize("num_frames", [1, 9, 21])
def test_frames_are_handed_out_while_later_ones_are_sampled(class_case, num_frames: int, reencode: bool):
    pipeline = class_case.pipeline()
    handed_out, happened = [], []

    def take(given: Any, start: int, frames: torch.Tensor) -> None:
        assert given is pipeline and start == sum(piece.shape[1] for piece in handed_out)
        handed_out.append(frames)
        happened.append("frames")

    def after_step(given: Any, step: int, timestep: Any, tensors: dict) -> dict:
        happened.append("step")
        return {}

    inputs = {"num_frames": num_frames, "reencode_overlap": reencode, "num_overlap_latent_frames": 1}
    expected = class_case.run(pipeline, **inputs)
    frames = class_case.run(pipeline, **inputs, callback_on_frames=take, callback_on_step_end=after_step)
    latents = (num_frames - 1) // 4 + 1
    assert [piece.shape[1] for piece in handed_out] == [1] + [4] * (latents - 1)
    windows = [3, 2, 1] if num_frames == 21 else [latents]  # new latent frames of each, of two steps
    assert happened == [event for new in windows for event in ["step"] * 2 + ["frames"] * new]
    close(torch.cat(handed_out, dim=1), frames, atol=0)
    close(frames, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["pil", "np", "latent"])
def test_frames_are_handed_out_in_the_form_of_the_output(class_case, kind: str):
    pipeline, pieces = class_case.pipeline(), []

    def take(_: Any, start: int, frames: Any) -> None:
        pieces.append(frames)

    inputs = {"num_frames": 21, "num_overlap_latent_frames": 1}
    expected = class_case.run(pipeline, **inputs)
    output = class_case.run(pipeline, **inputs, output_type=kind, callback_on_frames=take)
    if kind == "pil":
        assert [image for piece in pieces for image in piece[0]] == output[0]
    elif kind == "np":
        assert np.array_equal(np.concatenate(pieces, axis=1), output)
    else:
        assert output.shape == (1, 4, 6, 4, 4)
        close(torch.cat(pieces, dim=1), expected, atol=1e-4)


def test_an_error_of_who_takes_the_frames_ends_the_sampling(class_case):
    pipeline, num_steps = class_case.pipeline(), 0

    def take(*_: Any) -> None:
        raise BrokenPipeError

    def after_step(*_: Any) -> dict:
        nonlocal num_steps
        num_steps += 1
        return {}

    with pytest.raises(BrokenPipeError):
        class_case.run(pipeline, num_frames=21, callback_on_frames=take, callback_on_step_end=after_step)
    assert num_steps == 2  # those of the first window


def test_who_takes_the_frames_can_interrupt(class_case):
    pipeline, starts = class_case.pipeline(), []

    def take(given: Any, start: int, frames: torch.Tensor) -> None:
        starts.append(start)
        given._interrupt = start == 1

    frames = class_case.run(pipeline, num_frames=21, num_overlap_latent_frames=1, callback_on_frames=take)
    assert starts == [0, 1] and frames.shape[1] == 21
    whole = class_case.run(pipeline, num_frames=21, num_overlap_latent_frames=1)
    close(frames[:, :9], whole[:, :9], atol=1e-4)  # the window that had been sampled


# --- Callbacks and errors --------------------------------------------------------------------------------------------


class Scale(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict) -> dict:
        return {"latents": callback_kwargs["latents"] * 0.5}


def test_callback_objects(class_case):
    pipeline = class_case.pipeline()
    plain = class_case.run(pipeline, timesteps=[100], output_type="latent")
    one = Scale(cutoff_step_ratio=1.0)
    for callback, factor in ((one, 0.5), (MultiPipelineCallbacks([one, one]), 0.25)):
        scaled = class_case.run(pipeline, timesteps=[100], output_type="latent", callback_on_step_end=callback)
        close(scaled, plain * factor, atol=1e-6)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"class_labels": 3}, "`class_labels` must be names, or ids 0 to 2, got 3"),
        ({"class_labels": 1.5}, "`class_labels` must be names, or ids 0 to 2, got 1.5"),
        ({"class_labels": "dog"}, "`class_labels` must be ids or known names .*, got 'dog'"),
        ({"class_labels": []}, "`class_labels` must hold at least one label"),
        ({"num_frames": 8}, r"`num_frames` must be 4 \* n \+ 1 \(1, 5, ...\), got 8"),
        ({"num_frames_per_window": 0}, r"`num_frames_per_window` must be 4 \* n \+ 1"),
        ({"height": 40}, "`height` must be a positive multiple of 16, got 40"),
        ({"width": 0}, "`width` must be a positive multiple of 16, got 0"),
        ({"height": 64}, "`hidden_states` must have height and width up to 4"),
        ({"num_frames": 17, "num_overlap_latent_frames": 3}, "`num_overlap_latent_frames` must be 1 to 2"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a positive integer, got 0"),
        ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt` must be a positive integer, got 0"),
        ({"num_guided_channels": 5}, "`num_guided_channels` must be 1 to 4, got 5"),
        ({"num_guided_channels": 1.5}, "`num_guided_channels` must be an integer, got 1.5"),
        ({"num_guided_channels": True}, "`num_guided_channels` must be an integer, got True"),
        ({"num_videos_per_prompt": True}, "`num_videos_per_prompt` must be a positive integer, got True"),
        ({"num_frames": True}, r"`num_frames` must be 4 \* n \+ 1 \(1, 5, ...\), got True"),
        ({"num_overlap_latent_frames": None}, "`num_overlap_latent_frames` must be an integer, got None"),
        ({"num_overlap_latent_frames": 1.5}, "`num_overlap_latent_frames` must be an integer, got 1.5"),
        ({"guidance_scale": "3"}, "`guidance_scale` must be a finite number from 0 on, got '3'"),
        ({"guidance_scale": None}, "`guidance_scale` must be a finite number from 0 on, got None"),
        ({"strength": "0.5"}, "`strength` must be a number more than 0 and at most 1, got '0.5'"),
        ({"strength": None}, "`strength` must be a number more than 0 and at most 1, got None"),
        ({"generator": 5}, "`generator` must be a torch.Generator or a list of them, got 5"),
        ({"generator": [5]}, r"`generator` must be a torch.Generator or a list of them, got \[5\]"),
        ({"latents": np.zeros((1, 4, 3, 4, 4))}, "`latents` must be a tensor, got a value of type ndarray"),
        ({"latents": torch.full((1, 4, 3, 4, 4), torch.nan)}, "`latents` must be finite, got NaN or infinite values"),
        ({"image": torch.full((1, 3, 32, 32), torch.nan)}, "`image` must be finite, got NaN or infinite values"),
        ({"video": np.full((9, 32, 32, 3), np.nan)}, "`video` must be finite, got NaN or infinite values"),
        ({"image": []}, "`image` must be one, or one for each of 1 videos, got none"),
        ({"video": []}, "`video` must be one, or one for each of 1 videos, got none"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names, among .*, got 'latents'"),
        ({"callback_on_step_end_tensor_inputs": None}, "must be a list of names, among .*, got None"),
        ({"output_type": "mp4"}, "`output_type` must be one of 'pil', 'np', 'pt', 'latent', got 'mp4'"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4)}, r"`latents` must have shape \(1, 4, 3, 4, 4\), got"),
        ({"generator": [torch.Generator()] * 2}, "`generator` must be one generator or 1, .* got 2"),
        ({"video": torch.rand(5, 3, 32, 32)}, "`video` must have 9 frames of 3 channels, got 5 of 3"),
        (
            {"video": torch.rand(9, 3, 32, 32), "strength": 0.0},
            "`strength` must be a number more than 0 and",
        ),
        ({"video": torch.rand(9, 3, 32, 32), "strength": 0.01}, "`strength` must leave at least one of"),
        ({"image": torch.rand(2, 3, 32, 32)}, "`image` must be one, or one for each of 1 videos, got 2"),
        ({"image": torch.rand(1, 3, 32, 32) * 255}, r"`image` must be in \[0, 1\]"),
        ({"image": torch.rand(1, 3, 32, 32), "video": torch.rand(9, 3, 32, 32)}, "must not be given together"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among latents, class_labels, got noise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(class_case, inputs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        class_case.run(class_case.pipeline(id2label=LABELS), **inputs)


def test_latents_and_transformer_must_fit(class_case, make_model):
    with pytest.raises(ValueError, match="`transformer` must have the 16 channels of the latents of `vae`, got 4"):
        class_case.run(class_case.pipeline(vae=make_model(latent_channels=16)))
