"""LeanVAE, WF-VAE and IV-VAE behind one interface: the same behaviour is asked of all, in every configuration."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoModel
from tiny_autoencoders import CASES, assert_exact, make, make_latents, make_video

from diffusers_leanvae import StreamingDecoder, StreamingEncoder, TemporalCache
from diffusers_leanvae.models.temporal_cache import Chunk
from diffusers_leanvae.models.wavelets import haar_analysis_3d


all_cases = pytest.mark.parametrize("case", CASES)
both = pytest.mark.parametrize("case", ["wf", "iv"])


@all_cases
@torch.no_grad()
def test_shapes_images_and_slicing(case: str):
    vae = make(case)
    video = make_video(vae, batch_size=2)
    posterior = vae.encode(video).latent_dist
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 3, 4, 5)
    sample = vae(video).sample
    assert sample.shape == video.shape and sample.isfinite().all()
    vae.enable_slicing()
    assert_exact(vae(video).sample, sample)
    assert vae(video[:1, :, 0]).sample.shape == (1, 3, 32, 40)
    # The first frame is an image of its own.
    assert_exact(vae.encode(video[:, :, 0]).latent_dist.mean[:, :, 0], posterior.mean[:, :, 0])
    assert_exact(vae.decode(posterior.mean[:, :, 0]).sample, vae.decode(posterior.mean).sample[:, :, 0])


@all_cases
@pytest.mark.parametrize("step", [1, 2, 4])
@torch.no_grad()
def test_streams(case: str, step: int):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    video, latents = make_video(vae, 4), make_latents(vae, 5, 4, 5)
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


@both
@torch.no_grad()
def test_streams_interleave_and_the_model_keeps_nothing(case: str):
    vae = make(case)
    latents = make_latents(vae, 4, 2, 3), make_latents(vae, 4, 2, 3) * 0.5
    decoders = [StreamingDecoder(vae, 1) for _ in latents]
    parts: list[list[torch.Tensor | None]] = [[], []]
    for index in range(4):
        for z, decoder, out in zip(latents, decoders, parts, strict=True):
            out.append(decoder.push(z[:, :, index : index + 1]))
            vae.decode(z[:, :, :2])
    for z, decoder, out in zip(latents, decoders, parts, strict=True):
        out.append(decoder.flush())
        assert_exact(torch.cat([part for part in out if part is not None], dim=2), vae.decode(z).sample)


@all_cases
@torch.no_grad()
def test_tiles(case: str):
    vae = make(case)
    ratio = vae.temporal_compression_ratio
    video, latents = make_video(vae, 1, 72, 120), make_latents(vae, 2, 9, 15)
    moments, sample = vae.encode(video).latent_dist.parameters, vae.decode(latents).sample
    vae.enable_tiling(40, 64, ratio + 1)
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
    video = make_video(vae, 1, 8, 400).requires_grad_()
    vae._encode_local(video, Chunk())[..., 25].abs().sum().backward()
    read = [index for index in range(50) if video.grad[..., 8 * index : 8 * index + 8].any()]
    assert max(25 - read[0], read[-1] - 25) == vae.encoder_halo
    latents = make_latents(vae, 2, 1, 50)
    hidden = (latents if vae.is_local else vae._decode_whole(latents, Chunk())).requires_grad_()
    vae._decode_local(hidden, Chunk())[..., 200:208].abs().sum().backward()
    read = [index for index in range(50) if hidden.grad[..., index].any()]
    assert max(25 - read[0], read[-1] - 25) == vae.decoder_halo


@both
@torch.no_grad()
def test_state_of_tiles_may_stay_on_disk(case: str, tmp_path: Path):
    vae = make(case)
    latents = make_latents(vae, 4, 6, 8)
    expected = vae.decode(latents).sample
    vae.enable_tiling(24, 32)
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
    video, latents = make_video(vae, 4), make_latents(vae, 5, 4, 5)
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


@both
def test_training(case: str):
    vae = make(case).train()
    video = make_video(vae, 1)
    reference = vae(video).sample
    reference.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in vae.named_parameters()}
    silent = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    # Half of the moments' layer is the log-variance, which the mean does not need; all others have gradients.
    assert not silent
    vae.zero_grad()
    vae.enable_gradient_checkpointing()
    sample = vae(video).sample
    assert_exact(sample, reference)
    sample.square().mean().backward()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


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


@both
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.15), (torch.float16, 0.04)], ids=str)
@torch.no_grad()
def test_half_precision_is_near(case: str, dtype: torch.dtype, limit: float):
    vae = make(case)
    video = make_video(vae)
    expected = vae(video).sample
    actual = vae.to(dtype)(video.to(dtype)).sample
    assert actual.dtype == dtype
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < limit  # random weights amplify more than trained ones


@both
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float16], ids=str)
@torch.no_grad()
def test_layerwise_casting(case: str, storage: torch.dtype):
    vae, rounded = make(case, torch.float32), make(case, torch.float32)
    video = make_video(vae, 1)
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in vae.named_parameters()}
    assert {dtype for name, dtype in stored.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in stored.items() if "norm" not in name} == {storage}
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).to(torch.float32))
    assert torch.equal(vae(video).sample, rounded(video).sample)


@both
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@torch.no_grad()
def test_group_offload(case: str, level: str, tmp_path: Path):
    vae = make(case, torch.float32)
    video = make_video(vae, 1)
    expected, z = vae(video).sample, vae.encode(video).latent_dist.mean
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    vae.enable_group_offload(torch.device("cpu"), offload_type=level, offload_to_disk_path=str(tmp_path), **blocks)
    assert list(tmp_path.iterdir())
    assert torch.equal(vae(video).sample, expected)
    assert torch.equal(vae.encode(video).latent_dist.mean, z)  # without `forward`: hooks must run here too
    assert torch.equal(vae.decode(z).sample, expected)


@both
@torch.no_grad()
def test_disk_offload(case: str, tmp_path: Path):
    vae = make(case, torch.float32)
    video = make_video(vae, 1)
    vae.save_pretrained(tmp_path)
    device_map = {"encoder": "disk", "decoder": "cpu"}
    loaded = type(vae).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    assert {parameter.device.type for parameter in loaded.encoder.parameters()} == {"meta"}
    assert torch.equal(loaded(video).sample, vae(video).sample)


@both
def test_compile(case: str):
    vae = make(case, torch.float32)
    video = make_video(vae, 1, 16, 16)
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mean, vae.decode(make_latents(vae, 2, 2, 2)).sample
        encode = torch.compile(lambda x: vae.encode(x).latent_dist.mean, backend="eager", fullgraph=True)
        decode = torch.compile(lambda z: vae.decode(z).sample, backend="eager", fullgraph=True)
        actual = encode(video), decode(make_latents(vae, 2, 2, 2))
    torch.testing.assert_close(actual, expected)


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


ERRORS = {
    "frames": ((1, 3, 3, 16, 16), r"`num_frames` must be 4 \* n \+ 1 \(1, 5, 9, ...\), got 3"),
    "size": ((1, 3, 5, 16, 20), "`height` and `width` must be positive multiples of 8, got 16 and 20"),
    "channels": ((1, 4, 5, 16, 16), r"`x` must have shape \(batch_size, 3, num_frames"),
}


@both
@pytest.mark.parametrize("shape, message", ERRORS.values(), ids=ERRORS)
def test_illegal_samples(case: str, shape: tuple[int, ...], message: str):
    vae = make(case)
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape, dtype=vae.dtype))


@both
def test_other_errors(case: str):
    vae = make(case)
    with pytest.raises(ValueError, match="`z` must have shape"):
        vae.decode(torch.zeros(1, 4, 0, 2, 2, dtype=vae.dtype))
    with pytest.raises(ValueError, match="`x` must have the model's dtype torch.float64, got torch.float32"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="`tile_sample_min_width` must be a positive multiple of 8, got 12"):
        vae.enable_tiling(16, 12)
    with pytest.raises(ValueError, match=r"`num_frames_per_chunk` must be 4 \* n \+ 1 with n >= 1"):
        vae.enable_tiling(16, 16, 4)
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
        ("iv", {"channel_multipliers": (1, 2)}, r"`channel_multipliers` must be four positive integers, got \(1, 2\)"),
        ("iv", {"base_channels": 3}, "`base_channels` must make even widths of all levels but the first"),
    ],
)
def test_illegal_configs(case: str, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(case, **config)
