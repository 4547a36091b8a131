"""Demands of diffusers on every pipeline, for both of ours: the assertions of its own shared pipeline tests."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import FasterCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from tiny import make_tiny


REQUIRED = {
    "num_inference_steps",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "guidance_scale",
    "num_frames",
    "height",
    "width",
}


def close(actual: Any, expected: Any, atol: float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol)


def models(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def batch(case: Any, size: int) -> dict[str, Any]:
    """Inputs of `size` videos, as the shared tests make them: texts of unequal lengths, all else repeated."""
    batched: dict[str, Any] = {name: [case.inputs[name]] * size for name in case.batched}
    if "prompt" in batched:
        text = case.inputs["prompt"]
        batched["prompt"] = [text[: len(text) // i] for i in range(1, size)] + [100 * "very long "]
    return batched | {"generator": [torch.Generator().manual_seed(i) for i in range(size)]}


def test_call_signature(case):
    parameters = inspect.signature(case.pipeline_class.__call__).parameters
    assert REQUIRED | set(case.batched) <= set(parameters)
    assert all(p.default is not inspect.Parameter.empty for name, p in parameters.items() if name != "self")


def test_output_shape_and_kinds(case):
    pipeline = case.pipeline()
    frames = case.run(pipeline)
    assert frames.shape == (1, 9, 3, 32, 32) and frames.dtype == torch.float32
    assert 0 <= frames.min() and frames.max() <= 1 and frames.std() > 0.1
    array = case.run(pipeline, output_type="np")
    assert isinstance(array, np.ndarray) and array.shape == (1, 9, 32, 32, 3)
    close(array.transpose(0, 1, 4, 2, 3), frames, atol=0)
    images = case.run(pipeline, output_type="pil")
    assert len(images) == 1 and len(images[0]) == 9 and images[0][0].size == (32, 32)
    close(
        np.stack([np.asarray(image) for image in images[0]]) / 255, array[0].astype(np.float64), atol=0.5 / 255 + 1e-6
    )
    latents = case.run(pipeline, output_type="latent")
    assert latents.shape == (1, 4, 3, 4, 4)
    close(pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), "pt"), frames, atol=0)


def test_save_load_local(case, tmp_path: Path):
    pipeline = case.pipeline()
    expected = case.run(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = case.pipeline_class.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    close(case.run(loaded), expected, atol=0)
    general = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(general) is case.pipeline_class
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == case.pipeline_class.__name__
    assert index["vae"] == ["diffusers_leanvae", "AutoencoderKLLeanVAE"]


@pytest.mark.parametrize("family", ["leanvae", "wfvae", "ivvae"])
def test_from_pipe(case, family: str):
    pipeline = case.pipeline(vae=make_tiny(family))
    other = case.pipeline_class.from_pipe(pipeline)
    assert type(other) is case.pipeline_class and other is not pipeline
    assert all(getattr(other, name) is component for name, component in pipeline.components.items())


def test_a_pipeline_without_autoencoder_says_so(case):
    with pytest.raises(ValueError, match="`vae` must be a video autoencoder, got None"):
        case.run(case.pipeline(vae=None), output_type="latent")


def test_save_load_with_variant(case, tmp_path: Path):
    pipeline = case.pipeline()
    pipeline.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    with pytest.raises((ValueError, OSError)):
        case.pipeline_class.from_pretrained(tmp_path)
    loaded = models(case.pipeline_class.from_pretrained(tmp_path, variant="fp16"))
    for name, model in models(pipeline).items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded[name].state_dict()[key], tensor), key


def test_batch_consistent(case):
    frames = case.run(case.pipeline(), **batch(case, 2))
    assert frames.shape == (2, 9, 3, 32, 32)
    assert (frames[0] - frames[1]).abs().max() > 0.1


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "flow"])
def test_batch_single_identical(case, scheduler: str):
    pipeline = case.pipeline(scheduler)
    single = case.run(pipeline, output_type="latent")  # pixels of untrained networks are mostly black or white
    batched = case.run(pipeline, output_type="latent", **batch(case, 3))
    relative = 4e-5 if scheduler == "ddpm" else 2e-6  # measured: 9.5e-6, 4e-7
    close(batched[0], single[0], atol=relative * single.abs().max().item())


def test_dict_and_tuple_outputs_equivalent(case):
    pipeline = case.pipeline()
    generator = torch.Generator().manual_seed(0)
    output = pipeline(**case.inputs, generator=generator, num_inference_steps=2)
    close(case.run(pipeline, return_dict=False, num_inference_steps=2), output.frames, atol=0)


def test_components_function(case):
    components = case.components()
    assert set(case.pipeline_class(**components).components) == set(components)


def test_save_load_optional_components(text_case, tmp_path: Path):
    pipeline = text_case.pipeline()
    expected = text_case.run(pipeline)
    embeds = pipeline.encode_prompt(text_case.inputs["prompt"], text_case.inputs["negative_prompt"])
    names = pipeline._callback_tensor_inputs[1:]
    given = dict(zip(names, embeds, strict=True)) | {"prompt": None, "negative_prompt": None}
    for name in pipeline._optional_components:
        setattr(pipeline, name, None)
    close(text_case.run(pipeline, **given), expected, atol=2e-5)
    pipeline.save_pretrained(tmp_path)
    loaded = text_case.pipeline_class.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert all(getattr(loaded, name) is None for name in pipeline._optional_components)
    close(text_case.run(loaded, **given), expected, atol=2e-5)


def test_to_dtype(case):
    pipeline = case.pipeline()
    assert {model.dtype for model in models(pipeline).values()} == {torch.float32}
    pipeline.to(torch.float16)
    assert {model.dtype for model in models(pipeline).values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case, dtype: torch.dtype):
    expected = case.run(case.pipeline())
    frames = case.run(case.pipeline().to(dtype))
    assert frames.isfinite().all()
    assert (frames.float() - expected).abs().mean() < 0.05


def test_float16_and_dtype_of_each_component_survive_saving(case, tmp_path: Path):
    case.pipeline().to(torch.float16).save_pretrained(tmp_path)
    loaded = case.pipeline_class.from_pretrained(tmp_path, dtype=torch.float16)
    assert {model.dtype for model in models(loaded).values()} == {torch.float16}
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    loaded = case.pipeline_class.from_pretrained(tmp_path, dtype=dtypes)
    assert loaded.transformer.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    assert case.run(loaded).isfinite().all()


def test_num_videos_per_prompt(case):
    pipeline = case.pipeline()
    for size in (1, 2):
        inputs = {name: value for name, value in batch(case, size).items() if name != "generator"}
        assert len(case.run(pipeline, **inputs, num_videos_per_prompt=2)) == 2 * size


def test_guidance(case):
    pipeline = case.pipeline()
    plain, guided = case.run(pipeline, guidance_scale=1.0), case.run(pipeline, guidance_scale=7.5)
    assert plain.shape == guided.shape
    assert (plain - guided).abs().max() > 0.05


def test_callback_inputs(case):
    pipeline = case.pipeline()
    steps = []

    def check(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        steps.append(step)
        assert set(tensors) == expected
        assert pipeline.current_timestep == timestep
        return tensors

    for names in (["latents"], pipeline._callback_tensor_inputs):
        expected = set(names)
        case.run(pipeline, callback_on_step_end=check, callback_on_step_end_tensor_inputs=names)
    assert steps == [0, 1, 0, 1] and pipeline.num_timesteps == 2 and pipeline.current_timestep is None

    def zero(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        last = step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else {}

    assert case.run(pipeline, callback_on_step_end=zero, output_type="latent").abs().sum() == 0


def test_callback_changes_guidance(case):
    pipeline = case.pipeline()
    scales = []

    def increase(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        pipeline._guidance_scale += 1.0
        scales.append(pipeline.guidance_scale)
        return tensors

    names = pipeline._callback_tensor_inputs
    frames = case.run(
        pipeline, guidance_scale=2.0, callback_on_step_end=increase, callback_on_step_end_tensor_inputs=names
    )
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps and scales == [3.0, 4.0]
    assert (frames - case.run(pipeline, guidance_scale=2.0)).abs().max() > 1e-3


def test_callback_interrupts(case):
    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        pipeline._interrupt = step == 0
        seen.append(tensors["latents"])
        return {}

    seen: list[torch.Tensor] = []
    pipeline = case.pipeline()
    latents = case.run(pipeline, num_inference_steps=4, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 1 and torch.equal(latents, seen[0])


def test_encode_prompt_works_in_isolation(text_case):
    components = text_case.components()
    text_parts = {"tokenizer", "text_encoder"}
    with_text = text_case.pipeline_class(**{k: v if k in text_parts else None for k, v in components.items()})
    texts = {name: text_case.inputs[name] for name in text_case.batched}
    outputs = with_text.encode_prompt(**texts)
    visitor = ReturnNameVisitor()  # how the shared test learns the names of what comes back
    visitor.visit(visitor.get_ast_tree(cls=text_case.pipeline_class))
    given = dict(zip(visitor.return_names, outputs, strict=True))
    assert set(given) <= set(inspect.signature(text_case.pipeline_class.__call__).parameters)
    without_text = text_case.pipeline(tokenizer=None, text_encoder=None)
    actual = text_case.run(without_text, **given, prompt=None, negative_prompt=None)
    close(actual, text_case.run(text_case.pipeline()), atol=2e-5)


def test_attention_slicing_and_vae_tiling_change_nothing(case):
    pipeline = case.pipeline()
    expected = case.run(pipeline)
    pipeline.enable_attention_slicing(slice_size=1)
    close(case.run(pipeline), expected, atol=1e-5)
    pipeline.vae.enable_tiling(16, 16, 5)
    pipeline.vae.enable_slicing()
    close(case.run(pipeline, num_videos_per_prompt=1), expected, atol=1e-5)


def test_layerwise_casting(case):
    pipeline = case.pipeline().to(torch.bfloat16)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert case.run(pipeline).isfinite().all()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(case, offload_type: str):
    expected = case.run(case.pipeline())
    pipeline = case.pipeline()
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    device = torch.device("cpu")
    for model in models(pipeline).values():
        diffusers.hooks.apply_group_offloading(
            model, onload_device=device, offload_device=device, offload_type=offload_type, **blocks
        )
    close(case.run(pipeline), expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(case, method: str):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    expected = case.run(case.pipeline().to("cuda")).cpu()
    pipeline = case.pipeline()
    for _ in range(2):
        getattr(pipeline, method)(device="cuda")
        close(case.run(pipeline).cpu(), expected, atol=2e-4)
        device = "cpu" if method == "enable_model_cpu_offload" else "meta"
        assert all(model.device.type == device for model in models(pipeline).values())


def test_offload_order_names_every_model(case):
    order = case.pipeline_class.model_cpu_offload_seq.split("->")
    assert set(order) == set(models(case.pipeline())) and order[-2:] == ["transformer", "vae"]


CACHES = {
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        temporal_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(r"^transformer_blocks",),
        temporal_attention_block_identifiers=(r"^temporal_transformer_blocks",),
    ),
    "faster": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        temporal_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(r"^transformer_blocks",),
        temporal_attention_block_identifiers=(r"^temporal_transformer_blocks",),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.5,
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches(case, kind: str):
    if kind == "faster" and "prompt" not in case.inputs:
        pytest.skip("FasterCache caches the modules that diffusers' own blocks have, attn1 and attn2")
    pipeline = case.pipeline()
    expected = case.run(pipeline, num_inference_steps=4)
    config = CACHES[kind]
    config.current_timestep_callback = lambda: pipeline.current_timestep
    pipeline.transformer.enable_cache(config)
    cached = case.run(pipeline, num_inference_steps=4)
    assert cached.isfinite().all() and not torch.equal(cached, expected)
    close(case.run(pipeline, num_inference_steps=4), cached, atol=0)  # nothing is left over for the next call
    pipeline.transformer.disable_cache()
    close(case.run(pipeline, num_inference_steps=4), expected, atol=1e-5)
