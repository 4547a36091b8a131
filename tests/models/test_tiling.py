"""Tiles and chunks of time give what the whole gives: in float64, to 1e-10 on values of order 10."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from diffusers_leanvae.models import leanvae_blocks
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.temporal_cache import TemporalCache
from diffusers_leanvae.models.tiling import spans, time_chunks


CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_ista_iterations": 2, "num_branch_layers": 2, "num_fusion_layers": 1},
    {"bottleneck_type": "linear", "patch_embedding_type": "joint"},
    {"patch_embedding_type": "no_wavelet", "patch_norm": True},
    {"patch_size": (1, 2, 2)},
]


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1  # or there would be nothing to see
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def sizes(maximum: int) -> st.SearchStrategy[int]:
    return st.integers(1, maximum)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())) or "default")
@hypothesis.given(
    grid=st.tuples(sizes(9), sizes(9)),
    tile=st.tuples(sizes(5), sizes(5)),
    num_latent_frames=sizes(6),
    frames_per_chunk=sizes(3),
)
@hypothesis.settings(max_examples=8, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_tiled_equals_whole(
    make_model: Callable,
    make_video: Callable,
    config: dict[str, Any],
    grid: tuple[int, int],
    tile: tuple[int, int],
    num_latent_frames: int,
    frames_per_chunk: int,
):
    model: AutoencoderKLLeanVAE = make_model(torch.float64, **config)
    ratio_t, ratio_s = model.temporal_compression_ratio, model.spatial_compression_ratio
    shape = (1, 3, model.num_sample_frames(num_latent_frames), grid[0] * ratio_s, grid[1] * ratio_s)
    video = make_video(*shape, dtype=torch.float64)
    moments, sample = model.encode(video).latent_dist.parameters, model(video).sample
    model.enable_tiling(tile[0] * ratio_s, tile[1] * ratio_s, frames_per_chunk * ratio_t + 1)
    assert_exact(model.encode(video).latent_dist.parameters, moments)
    assert_exact(model(video).sample, sample)


@torch.no_grad()
def test_a_halo_one_token_narrower_is_seen(make_model: Callable, make_video: Callable):
    # The declared receptive field is tight: the test above can fail.
    video = make_video(1, 3, 5, 8, 96, dtype=torch.float64)
    model = make_model(torch.float64)
    moments = model.encode(video).latent_dist.parameters
    sample = model.decode(moments[:, :4]).sample
    model.enable_tiling(8, 8, 5)
    model.encoder_halo -= 1
    assert (model.encode(video).latent_dist.parameters - moments).abs().max() > 1e-6
    model.decoder_halo -= 1
    assert (model.decode(moments[:, :4]).sample - sample).abs().max() > 1e-6


def test_slices_of_every_size_equal_autograds_path(make_model: Callable, make_video: Callable, monkeypatch):
    # Without gradients tokens are overwritten slice by slice; with gradients nothing is: two ways to one result.
    for config in CONFIGS:
        model, video = make_model(torch.float64, **config), make_video(2, 3, 9, 24, 16, dtype=torch.float64)
        expected = model(video).sample
        assert expected.requires_grad
        for items in (1, 3, 1000):

            def few(size: int, elements_per_item: int, device: torch.device, items: int = items):
                return (slice(start, min(start + items, size)) for start in range(0, size, items))

            monkeypatch.setattr(leanvae_blocks, "slices", few)
            with torch.no_grad():
                assert_exact(model(video).sample, expected.detach())
            monkeypatch.undo()


@hypothesis.given(
    first=sizes(3), later=st.lists(sizes(3), max_size=3), tiled=st.booleans(), config=st.sampled_from(CONFIGS)
)
@hypothesis.settings(max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_stream_of_uneven_chunks_equals_whole(
    make_model: Callable, make_video: Callable, first: int, later: list[int], tiled: bool, config: dict[str, Any]
):
    model: AutoencoderKLLeanVAE = make_model(torch.float64, **config)
    ratio_t, ratio_s = model.temporal_compression_ratio, model.spatial_compression_ratio
    num_frames = [model.num_sample_frames(first), *(ratio_t * count for count in later)]
    video = make_video(1, 3, sum(num_frames), 3 * ratio_s, 4 * ratio_s, dtype=torch.float64)
    moments = model.encode(video).latent_dist.parameters
    z = moments[:, : model.latent_channels]
    sample = model.decode(z).sample
    if tiled:
        model.enable_tiling(2 * ratio_s, ratio_s, ratio_t + 1)
    encoding, decoding = TemporalCache(), TemporalCache()
    chunks = [model.encode(x, cache=encoding).latent_dist.parameters for x in video.split(num_frames, dim=2)]
    assert_exact(torch.cat(chunks, dim=2), moments)
    frames = [model.decode(x, cache=decoding).sample for x in z.split([first, *later], dim=2)]
    assert [x.shape[2] for x in frames] == num_frames
    assert_exact(torch.cat(frames, dim=2), sample)
    assert encoding.num_latent_frames == decoding.num_latent_frames == z.shape[2]


@torch.no_grad()
def test_cache_does_not_keep_activations_alive(make_model: Callable, make_video: Callable):
    model, cache = make_model(), TemporalCache()
    model.encode(make_video(1, 3, 33, 16, 16), cache=cache)
    assert all(tail.shape[1] == 2 for tail in cache.tails.values())
    assert all(tail.untyped_storage().nbytes() == tail.nbytes for tail in cache.tails.values())


class TestMisuse:
    @torch.no_grad()
    def test_chunks_of_another_size(self, make_model: Callable, make_video: Callable):
        model, cache = make_model(), TemporalCache()
        model.encode(make_video(1, 3, 5, 16, 16), cache=cache)
        with pytest.raises(ValueError, match=r"`cache` must be used with chunks of one shape, got \(1, 1, 3, 2"):
            model.encode(make_video(1, 3, 4, 24, 16), cache=cache)
        with pytest.raises(ValueError, match=r"`cache` must belong to a stream without failed chunks"):
            model.encode(make_video(1, 3, 4, 16, 16), cache=cache)
        with pytest.raises(ValueError, match=r"`state_dict` must be taken between chunks"):
            cache.state_dict()
        cache.reset()
        assert model.encode(make_video(1, 3, 5, 24, 16), cache=cache).latent_dist.mean.shape == (1, 4, 2, 3, 2)

    @torch.no_grad()
    def test_wrong_number_of_frames_does_not_spoil_the_stream(self, make_model: Callable, make_video: Callable):
        model, cache, video = make_model(torch.float64), TemporalCache(), make_video(1, 3, 9, 16, 16).double()
        outputs = [model.encode(video[:, :, :5], cache=cache).latent_dist.mean]
        message = r"`num_frames` must be 4 \* n \(4, 8, \.\.\.\) in a later chunk of a stream, got 5\."
        with pytest.raises(ValueError, match=message):
            model.encode(video[:, :, :5], cache=cache)
        outputs.append(model.encode(video[:, :, 5:], cache=cache).latent_dist.mean)
        assert_exact(torch.cat(outputs, dim=2), model.encode(video).latent_dist.mean)


@hypothesis.given(size=sizes(40), tile=sizes(12), halo=st.integers(0, 9))
def test_spans_cover_once_and_lie_within_their_halo(size: int, tile: int, halo: int):
    covered = []
    for span in spans(size, tile, halo):
        assert 0 < span.stop - span.start <= tile
        assert span.outer_start == max(span.start - halo, 0) and span.outer_stop == min(span.stop + halo, size)
        source = list(range(size))[span.source()]
        assert source[span.crop()] == list(range(size))[span.target()]
        covered += source[span.crop()]
    assert covered == list(range(size))


@hypothesis.given(num_latent_frames=sizes(20), per_chunk=sizes(6), is_first=st.booleans())
def test_time_chunks_cover_once(num_latent_frames: int, per_chunk: int, is_first: bool):
    chunks = list(time_chunks(num_latent_frames, per_chunk, is_first))
    assert [frame for start, stop in chunks for frame in range(start, stop)] == list(range(num_latent_frames))
    assert all(stop - start <= per_chunk + (is_first and start == 0) for start, stop in chunks)
