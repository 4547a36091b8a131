"""Every switch with every way to compute a video, on every model: outputs and gradients are those of the plain call.

What wrappers do to a call must not matter: compute layers again (checkpointing), copy arguments (offloading), replace
weights around a call (casting, offloading), compile layers. What cannot work is refused in one sentence.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
from tiny_autoencoders import make
from torch.utils.checkpoint import checkpoint

from diffusers_leanvae import TemporalCache
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


MODELS = {"leanvae": "lean", "wfvae": "wf_one_layer", "ivvae": "iv_one_layer"}
CPU = torch.device("cpu")
BATCH, LATENT_FRAMES, LATENT_HEIGHT, LATENT_WIDTH = 2, 3, 1, 2
HUGE = 4096


class Result(NamedTuple):
    moments: torch.Tensor
    sample: torch.Tensor
    gradients: dict[str, torch.Tensor]  # of the inputs, and of the weights as far as they have some


# ---- ways to compute a video ----------------------------------------------------------------------------------------


def tiled(vae: VideoAutoencoder, tile: int, num_latent_frames: int) -> None:
    vae.enable_tiling(tile, tile, num_latent_frames * vae.temporal_compression_ratio + 1)


def whole(vae: VideoAutoencoder) -> None:
    pass


def tiles(vae: VideoAutoencoder) -> None:
    tiled(vae, 8, HUGE)


def chunks(vae: VideoAutoencoder) -> None:
    tiled(vae, HUGE, 1)


def tiles_and_chunks(vae: VideoAutoencoder) -> None:
    tiled(vae, 8, 1)


def call_whole(vae: VideoAutoencoder, video: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return vae.encode(video).latent_dist.parameters, vae.decode(z).sample


def call_stream(
    vae: VideoAutoencoder, video: torch.Tensor, z: torch.Tensor, restores: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio, outputs = vae.temporal_compression_ratio, []
    for x, sizes in ((video, [1] + [ratio] * (LATENT_FRAMES - 1)), (z, [1] * LATENT_FRAMES)):
        cache, parts = TemporalCache(), []
        pieces = x.split(sizes, dim=2)
        for index, piece in enumerate(pieces):
            cache.is_last = index == len(pieces) - 1
            if x is video:
                parts.append(vae.encode(piece, cache=cache).latent_dist.parameters)
            else:
                parts.append(vae.decode(piece, cache=cache).sample)
            if restores and index == 0:
                state, cache = cache.state_dict(), TemporalCache()
                cache.load_state_dict(state)
        outputs.append(torch.cat(parts, dim=2))
    return outputs[0], outputs[1]


WAYS: dict[str, tuple[Callable[[VideoAutoencoder], None], Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = {
    "whole": (whole, call_whole),
    "tiles": (tiles, call_whole),
    "chunks": (chunks, call_whole),
    "tiles and chunks": (tiles_and_chunks, call_whole),
    "stream": (whole, call_stream),
    "restored stream": (tiles, functools.partial(call_stream, restores=True)),
}


# ---- switches -------------------------------------------------------------------------------------------------------


def group_offload(level: str, **kwargs: Any) -> Callable[[VideoAutoencoder, Path], None]:
    blocks = {"num_blocks_per_group": 1} if level == "block" else {}

    def switch(vae: VideoAutoencoder, folder: Path) -> None:
        path = {"offload_to_disk_path": str(folder)} if kwargs else {}
        vae.enable_group_offload(CPU, offload_type=f"{level}_level", **blocks, **path)

    return switch


def disk_offload(vae: VideoAutoencoder, folder: Path) -> None:
    # Some layers in each direction: to read all of them again and again would take most of the time of these tests.
    for number, name in enumerate(ON_DISK_LAYERS[type(vae).__name__]):
        (folder / str(number)).mkdir()
        accelerate.disk_offload(vae.get_submodule(name), str(folder / str(number)), CPU)


def cast_layers(vae: VideoAutoencoder, folder: Path) -> None:
    vae.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)


ON_DISK_LAYERS = {
    "AutoencoderKLLeanVAE": ("encoder.low_layers", "bottleneck.iterations.0", "decoder.high_layers"),
    "AutoencoderKLWFVAE": ("encoder.mid", "decoder.flows.0", "decoder.levels.0"),
    "AutoencoderKLIVVAE": ("encoder.blocks.0", "decoder.blocks.6"),
}
SWITCHES: dict[str, Callable[[VideoAutoencoder, Path], Any]] = {
    "none": lambda vae, folder: None,
    "slicing": lambda vae, folder: vae.enable_slicing(),
    "gradient checkpointing": lambda vae, folder: vae.enable_gradient_checkpointing(),
    "group offload, leaf": group_offload("leaf"),
    "group offload, block": group_offload("block"),
    "accelerate, cpu offload": lambda vae, folder: accelerate.cpu_offload(vae, CPU),
    "layerwise casting": cast_layers,
}
ON_DISK: dict[str, Callable[[VideoAutoencoder, Path], Any]] = {
    "accelerate, disk offload": disk_offload,
    "group offload, leaf, disk": group_offload("leaf", disk=True),
    "group offload, block, disk": group_offload("block", disk=True),
}


# ---- the matrix -----------------------------------------------------------------------------------------------------


def make_vae(model: str, dtype: torch.dtype = torch.float64) -> VideoAutoencoder:
    # Weights are numbers of 32 bits, so that a switch may store them as such.
    return torch.nn.Module.to(make(MODELS[model], torch.float32), dtype)


def make_inputs(vae: VideoAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_frames, ratio = vae.num_sample_frames(LATENT_FRAMES), vae.spatial_compression_ratio
    size = (LATENT_HEIGHT * ratio, LATENT_WIDTH * ratio)
    video = torch.rand(BATCH, 3, num_frames, *size, generator=generator) * 2 - 1
    z = torch.randn(BATCH, vae.latent_channels, LATENT_FRAMES, LATENT_HEIGHT, LATENT_WIDTH, generator=generator)
    return video.to(torch.float64), z.to(torch.float64)


def compute(vae: VideoAutoencoder, way: str, has_gradients: bool = True, dtype: torch.dtype | None = None) -> Result:
    prepare, call = WAYS[way]
    prepare(vae)
    video, z = (x.to(dtype or torch.float64).requires_grad_(has_gradients) for x in make_inputs(vae))
    with torch.set_grad_enabled(has_gradients):
        moments, sample = call(vae, video, z)
    gradients = {}
    if has_gradients:
        (moments.square().mean() + sample.square().mean()).backward()
        named = {"video": video, "z": z} | dict(vae.named_parameters())
        gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    return Result(moments.detach(), sample.detach(), gradients)


@functools.cache
def plain(model: str) -> Result:
    vae = make_vae(model)
    result = compute(vae, "whole")
    assert len(result.gradients) == 2 + len(list(vae.parameters()))
    assert min(result.moments.std(), result.sample.std()) > 0.1  # or there would be nothing to see
    return result


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    # Some gradients are zero but for rounding: that of a key's bias, which softmax does not see.
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= tolerance, (name, error)


def check(actual: Result, model: str, tolerance: float = 1e-10) -> None:
    expected = plain(model)
    assert_near(actual.moments, expected.moments, tolerance, "moments")
    assert_near(actual.sample, expected.sample, tolerance, "sample")
    for name, gradient in actual.gradients.items():
        assert_near(gradient, expected.gradients[name], tolerance, name)


models = pytest.mark.parametrize("model", MODELS)
ways = pytest.mark.parametrize("way", WAYS)


@models
@ways
@pytest.mark.parametrize("switch", SWITCHES)
def test_outputs_and_gradients(model: str, way: str, switch: str, tmp_path: Path):
    vae = make_vae(model)
    SWITCHES[switch](vae, tmp_path)
    assert vae.is_gradient_checkpointing == (switch == "gradient checkpointing")
    result = compute(vae, way)
    # Hooks of Accelerate compute with copies of the weights, which keep no gradients.
    assert len(result.gradients) == (2 if "accelerate" in switch else len(plain(model).gradients))
    check(result, model)
    # Without gradients layers work in place, and a remembered tensor is given away when it is read.
    check(compute(vae, way, has_gradients=False), model)


@models
@ways
@pytest.mark.parametrize("switch", ON_DISK)
def test_weights_on_disk(model: str, way: str, switch: str, tmp_path: Path):
    vae = make_vae(model)
    ON_DISK[switch](vae, tmp_path)
    assert list(tmp_path.iterdir())
    check(compute(vae, way, has_gradients=False), model)
    if "group" in switch:  # those of Accelerate are as above, but slower
        with pytest.raises(ValueError, match="`offload_to_disk_path` must not be given to .* for gradients"):
            compute(vae, way)


@functools.cache
def plain_autocast(model: str) -> Result:
    with torch.autocast("cpu", torch.bfloat16):
        return compute(make_vae(model, torch.float32), "whole", dtype=torch.float32)


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square of the differences over that of what is expected."""
    error = sum(((a.double() - b.double()) ** 2).sum() for a, b in zip(actual, expected, strict=True))
    return float((error / sum((b.double() ** 2).sum() for b in expected)) ** 0.5)


class AutocastBounds(NamedTuple):
    """Four times what was measured with bfloat16."""

    whole: float  # outputs, from those of the whole clip: a sum in another order may round to the next number
    exact: float  # outputs, from those in float64
    gradients: float  # from those in float64


AUTOCAST = {
    "leanvae": AutocastBounds(whole=0.016, exact=0.053, gradients=0.055),
    "wfvae": AutocastBounds(whole=0.016, exact=0.06, gradients=0.155),
    "ivvae": AutocastBounds(whole=0.016, exact=0.11, gradients=0.27),
}


@models
@ways
def test_autocast(model: str, way: str):
    with torch.autocast("cpu", torch.bfloat16):
        result = compute(make_vae(model, torch.float32), way, dtype=torch.float32)
    assert result.moments.dtype == result.sample.dtype == torch.bfloat16
    whole, exact, bounds = plain_autocast(model), plain(model), AUTOCAST[model]
    assert relative_error([*result[:2]], [*whole[:2]]) <= bounds.whole
    assert 0 < relative_error([*result[:2]], [*exact[:2]]) <= bounds.exact
    gradients = [[r.gradients[name] for name in exact.gradients] for r in (result, exact)]
    assert relative_error(*gradients) <= bounds.gradients


@ways
def test_fuse(way: str):
    vae = make_vae("leanvae")
    layers = compute(vae, way, has_gradients=False)
    vae.fuse()
    result = compute(vae, way, has_gradients=False)
    check(result, "leanvae")
    assert not torch.equal(result.sample, layers.sample)  # or the prepared weights were not used
    with pytest.warns(UserWarning, match="`fuse` has no effect in this call, .* gradients are enabled"):
        check(compute(vae, way), "leanvae")


@pytest.mark.parametrize("model", ["wfvae", "ivvae"])
def test_fuse_is_refused_where_it_can_do_nothing(model: str):
    vae = make_vae(model)
    with pytest.raises(ValueError, match=f"`fuse` needs an `AutoencoderKLLeanVAE`, got an `{type(vae).__name__}`;"):
        vae.fuse()
    vae.unfuse()


@models
@pytest.mark.parametrize("way", ["whole", "tiles", "chunks", "stream"])
def test_checkpointing_that_loses_the_state_s_gradients_is_refused(model: str, way: str):
    vae = make_vae(model)
    vae.enable_gradient_checkpointing(lambda layer, *args: checkpoint(layer.__call__, *args, use_reentrant=True))
    if way in ("whole", "tiles"):  # nothing is remembered
        check(compute(vae, way), model)
        return
    with pytest.raises(ValueError, match="`use_reentrant` must be False for gradient checkpointing of streams"):
        compute(vae, way)


@models
def test_a_state_on_disk_has_no_gradients(model: str, tmp_path: Path):
    vae = make_vae(model)
    vae.enable_tiling(8, 8)
    video, _ = make_inputs(vae)
    with pytest.raises(ValueError, match="`directory` must be `None` where gradients are computed"):
        vae.encode(video, cache=TemporalCache(tmp_path))
    vae.requires_grad_(False)
    vae.encode(video, cache=TemporalCache(tmp_path))


# Blocks are compiled for each width, and where a stream is for each place in the network: minutes.
FAST_COMPILED = {("leanvae", "whole"), ("leanvae", "chunks"), ("wfvae", "whole")}
COMPILED = [
    pytest.param(model, way, marks=() if (model, way) in FAST_COMPILED else pytest.mark.slow)
    for model in MODELS
    for way in WAYS
]


@pytest.mark.parametrize("model, way", COMPILED)
def test_compiled_blocks(model: str, way: str):
    torch.compiler.reset()
    vae = make_vae(model)
    vae.compile_repeated_blocks(fullgraph=True, backend="eager")
    check(compute(vae, way, has_gradients=False), model)


@pytest.mark.slow
def test_compiled_blocks_of_a_whole_clip_with_gradients():
    torch.compiler.reset()
    vae = make_vae("ivvae")  # which takes groups of frames one by one without gradients
    vae.compile_repeated_blocks(fullgraph=True, backend="eager")
    check(compute(vae, "whole"), "ivvae")
