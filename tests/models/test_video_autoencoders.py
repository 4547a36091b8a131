"""LeanVAE, WF-VAE and IV-VAE behind one interface: the same behaviour is asked of all, in every configuration."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from accelerate.utils import send_to_device
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from tiny_autoencoders import CASES, assert_exact, make, make_latents, make_video
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_leanvae import StreamingDecoder, StreamingEncoder, TemporalCache
from diffusers_leanvae.models.temporal_cache import WHOLE, Chunk, chunks
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.models.wavelets import haar_analysis_3d


all_cases = pytest.mark.parametrize("case", CASES)
models = pytest.mark.parametrize("case", ["lean", "wf", "iv"])


@all_cases
@torch.no_grad()
def test_shapes_images_and_slicing(case: str):
    vae = make(case)
    video = make_video(vae, batch_size=2)
    posterior = vae.encode(video).latent_dist
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 3, 2, 3)
    sample = vae(video).sample
    assert sample.shape == video.shape and sample.isfinite().all()
    vae.enable_slicing()
    assert_exact(vae(video).sample, sample)
    assert vae(video[:1, :, 0]).sample.shape == (1, 3, 16, 24)
    # The first frame is an image of its own.
    assert_exact(vae.encode(video[:, :, 0]).latent_dist.mean[:, :, 0], posterior.mean[:, :, 0])
    assert_exact(vae.decode(posterior.mean[:, :, 0]).sample, vae.decode(posterior.mean).sample[:, :, 0])


@all_cases
@torch.no_grad()
def test_an_empty_batch_is_an_empty_result(case: str):
    vae = make(case, torch.float32)
    video = make_video(vae)
    for enable in (lambda: None, lambda: vae.enable_tiling("auto"), lambda: vae.enable_tiling(8, 16, 9)):
        enable()
        z = vae.encode(video[:0]).latent_dist.mode()
        assert z.shape == (0, 4, 3, 2, 3)
        assert vae.decode(z).sample.shape == video[:0].shape


@all_cases
@pytest.mark.parametrize("step", [1, 2, 4])
@torch.no_grad()
def test_streams(case: str, step: int):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    video, latents = make_video(vae, 4), make_latents(vae, 5, 2, 3)
    encoder, decoder = StreamingEncoder(vae, step * ratio), StreamingDecoder(vae, step)
    parts = [encoder.push(part) for part in video.split(3, dim=2)] + [encoder.flush()]
    moments = torch.cat([part for part in parts if part is not None], dim=2)
    assert_exact(moments, vae.encode(video).latent_dist.mean)
    parts = []
    for index, part in enumerate(latents.split(1, dim=2)):
        parts.append(decoder.push(part))
        if index == 2:  # the stream goes on elsewhere
            state = {key: value.clone() for key, value in decoder.state_dict().items()}
            decoder = StreamingDecoder(vae, step)
            decoder.load_state_dict(state)
    parts.append(decoder.flush())
    sample = torch.cat([part for part in parts if part is not None], dim=2)
    assert_exact(sample, vae.decode(latents).sample)
    assert decoder.flush() is None


@all_cases
@torch.no_grad()
def test_output_is_as_late_as_the_model_says(case: str):
    vae, cache = make(case), TemporalCache()
    latents = make_latents(vae, 5, 2, 3)
    counts = [vae.decode(part, cache=cache).sample.shape[2] for part in latents[:, :, :4].split((1, 2, 1), dim=2)]
    assert sum(counts) == vae.num_sample_frames(4) - vae.num_delayed_frames
    cache.is_last = True
    assert vae.decode(latents[:, :, 4:], cache=cache).sample.shape[2] == (
        vae.temporal_compression_ratio + vae.num_delayed_frames
    )
    assert cache.nbytes() == 0  # nothing is remembered at the end
    is_linear = case.startswith("wf") and case != "wf_nearest"
    assert vae.num_delayed_frames == (0 if not is_linear else 6 if case == "wf_8x" else 2)


@models
@pytest.mark.parametrize("tiled", [False, True])
@torch.no_grad()
def test_streams_interleave_and_the_model_keeps_nothing(case: str, tiled: bool):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    videos = [sign * make_video(vae, 3, 16, 24) for sign in (1, -1)]
    samples = [vae.decode(vae.encode(video).latent_dist.mean).sample for video in videos]
    if tiled:
        vae.enable_tiling(8, 8, ratio + 1)
    encoders, decoders = [StreamingEncoder(vae, ratio) for _ in videos], [StreamingDecoder(vae, 1) for _ in videos]
    outputs: list[list[torch.Tensor | None]] = [[], []]
    for frames in zip(*(video.split(1, dim=2) for video in videos), strict=True):
        for frame, encoder, decoder, output in zip(frames, encoders, decoders, outputs, strict=True):
            if (ready := encoder.push(frame)) is not None:
                output.append(decoder.push(ready))
            vae(frame[:, :, 0])  # an image in between
    for sample, decoder, output in zip(samples, decoders, outputs, strict=True):
        output.append(decoder.flush())
        assert_exact(torch.cat([part for part in output if part is not None], dim=2), sample)


@all_cases
@torch.no_grad()
def test_tiles(case: str):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    tile = max(vae.encoder_halo, vae.decoder_halo) + 1  # the right one reads all of its halo, but not the first column
    video, latents = make_video(vae, 1, 16, 8 * (tile + 1)), make_latents(vae, 2, 2, tile + 1)
    moments, sample = vae.encode(video).latent_dist.parameters, vae.decode(latents).sample
    vae.enable_tiling(8, 8 * tile, ratio + 1)
    assert_exact(vae.encode(video).latent_dist.parameters, moments)
    assert_exact(vae.decode(latents).sample, sample)
    # A stream of tiles, whose last chunk comes later.
    decoder = StreamingDecoder(vae, 1)
    parts = [decoder.push(part) for part in latents.split(1, dim=2)] + [decoder.flush()]
    assert_exact(torch.cat([part for part in parts if part is not None], dim=2), sample)


@all_cases
def test_halos_are_what_the_network_reads(case: str):
    # Gradients tell: they have no neighbours to be rounded away against.
    vae = make(case).requires_grad_(False)
    for axis in (-2, -1):

        def strip(size: int, axis: int = axis) -> tuple[int, int]:
            return (size, 1) if axis == -2 else (1, size)

        center = vae.encoder_halo + 2  # far enough from both ends for one that is too narrow to be seen
        height, width = strip(2 * center + 1)
        video = make_video(vae, 1, 8 * height, 8 * width).requires_grad_()
        vae._encode_local(video, WHOLE).select(axis, center).abs().sum().backward()
        read = [i for i in range(2 * center + 1) if video.grad.narrow(axis, 8 * i, 8).any()]
        assert max(center - read[0], read[-1] - center) == vae.encoder_halo
        center = vae.decoder_halo + 2
        latents = make_latents(vae, 2, *strip(2 * center + 1))
        hidden = (latents if vae.is_local else vae._decode_whole(latents, WHOLE)).requires_grad_()
        vae._decode_local(hidden, WHOLE).narrow(axis, 8 * center, 8).abs().sum().backward()
        read = [i for i in range(2 * center + 1) if hidden.grad.select(axis, i).any()]
        assert max(center - read[0], read[-1] - center) == vae.decoder_halo


@models
@torch.no_grad()
def test_state_of_tiles_may_stay_on_disk(case: str, tmp_path: Path):
    vae = make(case)
    latents = make_latents(vae, 3, 2, 3)
    expected = vae.decode(latents).sample
    vae.enable_tiling(8, 16)
    decoder = StreamingDecoder(vae, 1, TemporalCache(tmp_path))
    parts = [decoder.push(part) for part in latents.split(1, dim=2)] + [decoder.flush()]
    assert_exact(torch.cat([part for part in parts if part is not None], dim=2), expected)


@all_cases
@torch.no_grad()
def test_time_is_causal_but_for_what_is_late(case: str):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    video, latents = make_video(vae, 3), make_latents(vae, 4, 2, 3)
    assert_exact(
        vae.encode(video[:, :, : 2 * ratio + 1]).latent_dist.mean, vae.encode(video).latent_dist.mean[:, :, :3]
    )
    whole, start = vae.decode(latents).sample, vae.decode(latents[:, :, :3]).sample
    known = start.shape[2] - vae.num_delayed_frames
    assert_exact(start[:, :, :known], whole[:, :, :known])
    if vae.num_delayed_frames:
        assert not torch.allclose(start[:, :, known], whole[:, :, known])


@torch.no_grad()
def test_iv_goes_group_by_group_without_gradients():
    vae = make("iv")
    video, latents = make_video(vae, 4), make_latents(vae, 5, 2, 3)
    calls: list[int] = []
    vae.encoder.conv_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[2]))
    moments, sample = vae.encode(video).latent_dist.parameters, vae.decode(latents).sample
    assert calls == [5, 4, 4, 4]
    calls.clear()
    with torch.enable_grad():
        assert_exact(vae.encode(video).latent_dist.parameters, moments)
    assert calls == [17]
    vae.num_frames_per_step = None
    assert_exact(vae.decode(latents).sample, sample)
    # A stream may change between the two.
    cache, parts = TemporalCache(), []
    for index, part in enumerate(latents.split(1, dim=2)):
        vae.num_frames_per_step = 5 if index % 2 else None
        parts.append(vae.decode(part, cache=cache).sample)
    assert_exact(torch.cat(parts, dim=2), sample)


@all_cases
def test_gradients_reach_every_parameter_and_every_frame(case: str):
    vae = make(case).train()
    video = make_video(vae, 1).requires_grad_()
    posterior = vae.encode(video).latent_dist
    (vae.decode(posterior.mode()).sample.square().mean() + posterior.logvar.square().mean()).backward()
    silent = [name for name, parameter in vae.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not silent
    assert video.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 0


@all_cases
def test_saved_and_loaded_by_diffusers(case: str, tmp_path: Path):
    vae = make(case, torch.float32, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 1.0, 2.0])
    vae.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is type(vae) is getattr(diffusers, type(vae).__name__)
    assert json.loads(loaded.to_json_string()) == json.loads(vae.to_json_string()) | {"_name_or_path": str(tmp_path)}
    video = make_video(vae)
    with torch.no_grad():
        torch.testing.assert_close(loaded(video).sample, vae(video).sample, rtol=0, atol=0)


# Four times what was measured, in bfloat16 and in float16: of the arithmetic, as both have the same rounded weights.
HALF_PRECISION = {"lean": (0.051, 0.0063), "wf": (0.09, 0.012), "iv": (0.075, 0.01)}


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_near(case: str, dtype: torch.dtype):
    vae = make(case, dtype)
    video = make_video(vae, 2, 32, 40)  # of which the bounds were measured
    exact = torch.nn.Module.to(copy.deepcopy(vae), torch.float64)
    expected, actual = exact(video.double()).sample, vae(video).sample
    assert actual.dtype == dtype
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < HALF_PRECISION[case][dtype == torch.float16]


@models
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float16], ids=str)
@torch.no_grad()
def test_layerwise_casting(case: str, storage: torch.dtype):
    vae, rounded = make(case, torch.float32), make(case, torch.float32)
    video = make_video(vae, 1)
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in vae.named_parameters()}
    assert {dtype for name, dtype in stored.items() if "norm" in name} == {torch.float32}
    layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    cast = {f"{name}.weight" for name, layer in vae.named_modules() if isinstance(layer, layers)}
    assert cast and {stored[name] for name in cast} == {storage}
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).to(torch.float32))
    assert torch.equal(vae(video).sample, rounded(video).sample)


@models
@torch.no_grad()
def test_loading_to_disk(case: str, tmp_path: Path):
    vae = make(case, torch.float32)
    video = make_video(vae, 1)
    vae.save_pretrained(tmp_path)
    device_map = {name: "cpu" for name, _ in vae.named_children()} | {"encoder": "disk"}
    loaded = type(vae).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    assert {parameter.device.type for parameter in loaded.encoder.parameters()} == {"meta"}
    assert torch.equal(loaded(video).sample, vae(video).sample)


@models
def test_names_for_placement_exist(case: str):
    vae = make(case)
    assert {*vae._no_split_modules, *vae._repeated_blocks} <= {type(module).__name__ for module in vae.modules()}


@torch.no_grad()
def test_group_norm_neither_streams_nor_tiles():
    vae = make("wf", base_channels=32, encoder_flow_channels=32, decoder_flow_channels=32, norm_type="group_norm")
    assert vae(make_video(vae, 1)).sample.isfinite().all()
    with pytest.raises(ValueError, match="`enable_tiling` needs `norm_type` 'layer_norm'"):
        vae.enable_tiling()
    with pytest.raises(ValueError, match="`cache` needs `norm_type` 'layer_norm'"):
        vae.encode(make_video(vae, 1), cache=TemporalCache())


@torch.no_grad()
def test_the_wavelet_constant_is_the_reference_s():
    vae = make("wf")
    video = make_video(vae)
    _, *subbands = vae.encoder.levels_and_subbands(video)
    first = haar_analysis_3d(torch.cat((video[:, :, :1], video), dim=2))[:, :3] * 0.3536
    assert subbands[0].shape[1] == 12 and subbands[1].shape[1] == 24
    torch.testing.assert_close(subbands[0][:, :3], first.unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).sum((4, 6)) / 2)


ILLEGAL_SAMPLES = [
    ((1, 3, 4, 16, 16), r"`num_frames` must be 4 \* n \+ 1 \(1, 5, 9, \.\.\.\), got 4\."),
    ((1, 3, 0, 16, 16), r"`num_frames` must be .* got 0\."),
    ((1, 3, 5, 12, 16), r"`height` and `width` must be positive multiples of 8, got 12 and 16\."),
    ((1, 3, 5, 16, 0), r"`height` and `width` must be positive multiples of 8, got 16 and 0\."),
    ((1, 4, 5, 16, 16), r"`x` must have shape \(batch_size, 3, .* got \(1, 4, 5, 16, 16\)\."),
    ((3, 16, 16), r"`x` must have shape .* got \(3, 16, 16\)\."),
]


@models
@pytest.mark.parametrize("shape, message", ILLEGAL_SAMPLES, ids=[str(shape) for shape, _ in ILLEGAL_SAMPLES])
def test_illegal_samples(case: str, shape: tuple[int, ...], message: str):
    vae = make(case)
    for call in (vae.encode, vae):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape, dtype=vae.dtype))


@models
@pytest.mark.parametrize(
    "shape", [(1, 5, 2, 2, 2), (1, 4, 0, 2, 2), (1, 4, 2, 0, 2), (4, 2, 2), (1, 3, 2, 2)], ids=str
)
def test_illegal_latents(case: str, shape: tuple[int, ...]):
    message = r"`z` must have shape \(batch_size, 4, num_latent_frames, latent_height, latent_width\) or .* got \("
    vae = make(case)
    with pytest.raises(ValueError, match=message):
        vae.decode(torch.zeros(shape, dtype=vae.dtype))


@models
def test_illegal_dtypes(case: str):
    vae = make(case, torch.float32)
    for call, name, shape in ((vae.encode, "x", (1, 3, 5, 16, 16)), (vae.decode, "z", (1, 4, 2, 2, 2))):
        for dtype in (torch.float64, torch.bfloat16):
            with pytest.raises(
                ValueError, match=rf"`{name}` must have the model's dtype torch\.float32, got {dtype}\."
            ):
                call(torch.zeros(shape, dtype=dtype))
        for dtype in (torch.uint8, torch.int64, torch.complex64):
            with pytest.raises(ValueError, match=rf"`{name}` must be a floating-point tensor, got {dtype}\."):
                call(torch.zeros(shape, dtype=dtype))


ILLEGAL_TILING = [
    ({"tile_sample_min_height": 12}, r"`tile_sample_min_height` must be a positive multiple of 8, got 12\."),
    ({"tile_sample_min_width": 0}, r"`tile_sample_min_width` must be a positive multiple of 8, got 0\."),
    ({"tile_sample_min_width": -8}, r"`tile_sample_min_width` must be a positive multiple of 8, got -8\."),
    ({"num_frames_per_chunk": 8}, r"`num_frames_per_chunk` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 8\."),
    ({"num_frames_per_chunk": 1}, r"`num_frames_per_chunk` must be .* got 1\."),
    ({"tile_sample_min_num_frames": 8}, r"`num_frames_per_chunk` must be .* got 8\."),
    ({"num_frames_per_chunk": 5, "tile_sample_min_num_frames": 5}, r"`tile_sample_min_num_frames` must come without"),
    ({"tile_sample_stride_height": 0}, r"`tile_sample_stride_height` must be a positive number, got 0\."),
    ({"tile_sample_stride_num_frames": "8"}, r"`tile_sample_stride_num_frames` must be a positive number, got '8'\."),
    ({"tile_sample_min_height": 64, "budget": 10**9}, r"`budget` and 'auto' must come without tile sizes, got both\."),
]


@models
@pytest.mark.parametrize("arguments, message", ILLEGAL_TILING, ids=[str(arguments) for arguments, _ in ILLEGAL_TILING])
def test_illegal_tiling(case: str, arguments: dict[str, Any], message: str):
    vae = make(case)
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**arguments)
    # A refused call leaves the model as it was.
    assert not vae.use_tiling and vae.tile_sample_min_height == vae.tile_sample_min_width == 256


@all_cases
def test_tiling_takes_the_keywords_of_diffusers(case: str):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    assert vae.tile_sizes(1, 9, 99, 99) == (None, None, None) or vae.num_frames_per_step is not None
    vae.enable_tiling(
        tile_sample_min_height=64,
        tile_sample_min_width=48,
        tile_sample_min_num_frames=2 * ratio + 1,
        tile_sample_stride_height=48,
        tile_sample_stride_width=32,
        tile_sample_stride_num_frames=12,
    )
    assert vae.tile_sizes(1, 9, 99, 99) == (8, 6, 2)
    vae.disable_tiling()
    vae.enable_tiling()  # what is not given stays
    assert vae.tile_sizes(1, 9, 99, 99) == (8, 6, 2)
    fresh = make(case)
    fresh.enable_tiling()
    assert fresh.tile_sizes(1, 9, 99, 99) == (32, 32, 4)


@all_cases
def test_the_config_answers_to_what_pipelines_read(case: str, tmp_path: Path):
    vae = make(case, scaling_factor=0.5)
    ratio, config = vae.temporal_compression_ratio, vae.config
    assert (config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial) == (4, ratio, 8)
    assert (config.temporal_compression_ratio, config.spatial_compression_ratio) == (ratio, 8)
    assert len(config.block_out_channels) == 4 and config.invert_scale_latents is False
    assert vae.temperal_downsample == ((False, True, True) if ratio == 4 else (True, True, True))
    # Statistics that are not set are answered to, and stay unset for those who ask for what is set.
    assert config.latents_mean == [0.0] * 4 and config.latents_std == [2.0] * 4
    assert config["latents_mean"] is None and config["latents_std"] is None
    given = make(case, latents_mean=[1.0] * 4, latents_std=[3.0] * 4, scaling_factor=0.5).config
    assert given.latents_mean == given["latents_mean"] == [1.0] * 4
    assert given.latents_std == [6.0] * 4 and given["latents_std"] == [3.0] * 4  # the factor is not asked for
    vae.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {key for key in stored if not key.startswith("_")} == set(inspect.signature(type(vae)).parameters)
    assert stored["latents_mean"] is None
    assert copy.deepcopy(config).z_dim == 4


@models
@pytest.mark.parametrize("is_normalised", [True, False])
@torch.no_grad()
def test_a_wan_pipeline_takes_every_model(case: str, is_normalised: bool):
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    vae = make(case, torch.float32, **({"latents_mean": mean, "latents_std": std} if is_normalised else {}))
    if not is_normalised:
        vae.register_to_config(scaling_factor=0.5)
        mean, std = [0.0] * 4, [2.0] * 4
    torch.manual_seed(0)
    transformer = tiny.make_tiny_wan_transformer(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial) == (4, 8)
    arguments = {
        "prompt_embeds": torch.randn(1, 6, 16),
        "height": 16,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }
    frames, latents = (
        pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type=kind).frames
        for kind in ("pt", "latent")
    )
    assert latents.shape == (1, 4, 3, 2, 4) and frames.shape == (1, 9, 3, 16, 32)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (mean, std))
    expected = (vae.decode(latents * std + mean).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert frames.std() > 0.05


@models
@pytest.mark.parametrize("tiled_first", [False, True])
@torch.no_grad()
def test_a_stream_keeps_the_tiling_it_started_with(case: str, tiled_first: bool):
    vae = make(case)
    video = make_video(vae, 2, 16, 24)
    z = vae.encode(video).latent_dist.mean
    sample = vae.decode(z).sample
    encoding, decoding = TemporalCache(), TemporalCache()
    switches = [lambda: vae.enable_tiling(8, 8, 5), vae.disable_tiling]
    latents, frames = [], []
    for switch, chunk in zip(switches if tiled_first else switches[::-1], video.split((5, 4), dim=2), strict=True):
        switch()
        latents.append(vae.encode(chunk, cache=encoding).latent_dist.mean)
        decoding.is_last = chunk.shape[2] == 4
        frames.append(vae.decode(latents[-1], cache=decoding).sample)
    assert_exact(torch.cat(latents, dim=2), z)
    assert_exact(torch.cat(frames, dim=2), sample)
    assert len(encoding.tiles) == len(decoding.tiles) == (6 if tiled_first else 0)


@models
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("parked", [False, True])
@torch.no_grad()
def test_a_stream_goes_on_from_its_state(case: str, tiled: bool, parked: bool, tmp_path: Path):
    vae = make(case)
    latents = make_latents(vae, 5, 2, 3)
    expected = vae.decode(latents).sample
    if tiled:
        vae.enable_tiling(8, 16, 5)
    directory = tmp_path if parked else None
    cache = TemporalCache(directory)
    first = vae.decode(latents[:, :, :2], cache=cache).sample
    state = {key: tensor.clone() for key, tensor in cache.state_dict().items()}
    restored = TemporalCache(directory)
    restored.load_state_dict(state)
    assert restored.num_latent_frames == 2 and restored.nbytes() == cache.nbytes()
    vae.disable_tiling()  # the stream knows its tiles
    for stream in (restored, cache.copy(dtype=vae.dtype), cache):
        second = vae.decode(latents[:, :, 2:4], cache=stream).sample
        stream.is_last = True
        last = vae.decode(latents[:, :, 4:], cache=stream).sample
        assert_exact(torch.cat((first, second, last), dim=2), expected)
        assert stream.nbytes() == 0
        with pytest.raises(ValueError, match="got a stream of another one"):
            vae.decode(latents[:, :, 4:], cache=stream)
    cache.reset()
    assert_exact(vae.decode(latents[:, :, :2], cache=cache).sample, first)


@models
@pytest.mark.parametrize("tile", [None, (8, 16)])
@torch.no_grad()
def test_a_stream_moves_to_another_model(case: str, tile: tuple[int, int] | None, tmp_path: Path):
    vae = make(case)
    video = make_video(vae, 2, 16, 24)
    latents = vae.encode(video).latent_dist.mode()
    sample = vae.decode(latents).sample
    if tile is not None:
        vae.enable_tiling(*tile, 5)
    for make_stream, pushed, expected in (
        (lambda model: StreamingEncoder(model, 4), video, latents),
        (lambda model: StreamingDecoder(model, 1), latents, sample),
    ):
        # Frames are waiting, then all have been pushed and only the end is missing.
        for cut in (pushed.shape[2] - 1, pushed.shape[2]):
            stream, later = make_stream(vae), make_stream(make(case))
            outputs = [stream.push(pushed[:, :, :cut])]
            save_file(stream.state_dict(), tmp_path / "state.safetensors")
            later.load_state_dict(load_file(tmp_path / "state.safetensors"))
            assert len(later.cache.tiles) == (4 if tile is not None else 0)
            outputs += [later.push(pushed[:, :, cut:]), later.flush()]
            assert_exact(torch.cat([output for output in outputs if output is not None], dim=2), expected)


def test_hooks_hand_a_chunk_on_as_it_is():
    chunk = Chunk(cache=TemporalCache(), is_last=False)
    assert send_to_device((chunk, {"chunk": chunk}), torch.device("meta")) == (chunk, {"chunk": chunk})
    assert copy.copy(chunk) is chunk and copy.deepcopy([chunk])[0] is chunk
    assert not hasattr(TemporalCache(), "to")  # which such hooks would call


def test_a_chunk_reads_what_was_before_and_changes_nothing_afterwards():
    cache = TemporalCache()
    for start, _, chunk in chunks(cache, [(0, 1), (1, 2), (2, 3)], is_first=True, is_last=False):
        x = torch.full((1, 1, 1, 2, 2), float(start), requires_grad=True)
        for _ in range(2):  # a layer that is computed again
            past = chunk.recall("layer", x)
            assert (past is None) if start == 0 else torch.equal(past, x - 1)
            chunk.remember("layer", x)
        if start == 1:
            second = chunk
    assert torch.equal(second.recall("layer", x), torch.zeros_like(x))
    second.remember("layer", x * 0 - 1)
    assert torch.equal(cache.tails["layer"], torch.full_like(x, 2))
    # Without gradients what was read is gone, and a second call of the layer would not find it.
    with torch.no_grad():
        chunk = Chunk(is_first=False, is_last=False, cache=cache)
        chunk.recall("layer", x)
        with pytest.raises(ValueError, match="called once per chunk where gradients are off, got one called twice"):
            chunk.recall("layer", x)
        with pytest.raises(ValueError, match="got a stream of another one"):
            chunk.recall("other layer", x)
        assert chunk.recall("other layer", x, is_optional=True) is None


@models
def test_chunks_of_another_size(case: str):
    vae = make(case)
    cache = TemporalCache()
    with torch.no_grad():
        vae.encode(torch.zeros(1, 3, 5, 16, 16, dtype=vae.dtype), cache=cache)
        with pytest.raises(ValueError, match="`cache` must be used with chunks of one shape"):
            vae.encode(torch.zeros(1, 3, 4, 16, 24, dtype=vae.dtype), cache=cache)


@pytest.mark.parametrize(
    "case, config, message",
    [
        ("wf", {"norm_type": "rms"}, "`norm_type` must be one of 'layer_norm', 'group_norm', got 'rms'"),
        ("wf", {"temporal_interpolation": "cubic"}, "`temporal_interpolation` must be one of 'linear', 'nearest'"),
        ("wf", {"temporal_compression_ratio": 2}, "`temporal_compression_ratio` must be one of 4, 8, got 2"),
        ("wf", {"latents_mean": [0.0]}, "`latents_mean` must have 4 entries, got 1"),
        ("iv", {"latents_std": [0.0]}, "`latents_std` must have 4 entries, got 1"),
        ("iv", {"latent_channels": 5}, "`latent_channels` must be a positive even number, got 5"),
        ("iv_motion", {"latent_channels": 0}, "`latent_channels` must be a positive integer, got 0"),
        ("iv", {"attention": "some"}, "`attention` must be one of 'all', 'mid', 'none', got 'some'"),
        ("iv", {"convolution": "both"}, "`convolution` must be one of 'group_causal', 'causal', got 'both'"),
        ("wf", {"num_wavelet_levels": 4}, "`num_wavelet_levels` must be one of 3, 2, 1, got 4"),
        ("iv", {"channel_multipliers": (1, 2)}, r"`channel_multipliers` must be four positive integers, got \(1, 2\)"),
        ("iv", {"base_channels": 3}, "`base_channels` must make even widths of all levels but the first"),
    ],
)
def test_illegal_configs(case: str, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(case, **config)


@models
def test_transforms_of_functions(case: str):
    vae = make(case)
    latents = torch.cat([make_latents(vae, 2, 2, 2), 2 * make_latents(vae, 2, 2, 2)])
    tangent = latents.sin()
    weights = {f"vae.{name}": weight.detach() for name, weight in vae.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Decoder(vae), weights, (z,)).square().mean()

    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    z = latents.clone().requires_grad_()
    loss(leaves, z).backward()
    assert z.grad is not None and z.grad.std() > 1e-6
    torch.testing.assert_close(torch.func.grad(loss, 1)(weights, latents), z.grad, rtol=1e-9, atol=1e-12)
    for name, gradient in torch.func.grad(loss)(weights, latents).items():
        expected = leaves[name].grad
        if expected is not None:  # the encoder has none
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    one_by_one = torch.func.vmap(lambda z: vae.decode(z[None]).sample[0])(latents)
    torch.testing.assert_close(one_by_one, vae.decode(latents).sample, rtol=0, atol=1e-10)
    with sdpa_kernel(SDPBackend.MATH):  # attention of the siblings has no other with forward gradients
        change = torch.func.jvp(lambda z: loss(weights, z), (latents,), (tangent,))[1]
    torch.testing.assert_close(change, (z.grad * tangent).sum(), rtol=1e-9, atol=1e-12)


class _Decoder(torch.nn.Module):
    def __init__(self, vae: VideoAutoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z).sample
