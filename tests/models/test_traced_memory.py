"""Memory of any autoencoder as its traced network says: counted right, and what a planner makes of it."""

import pytest
import torch
from tiny_autoencoders import assert_exact, make, make_video
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_leanvae import StreamingDecoder, StreamingEncoder, TemporalCache
from diffusers_leanvae.models.traced_memory import _Alive
from diffusers_leanvae.models.video_layers import FrameConv2d


siblings = pytest.mark.parametrize("case", ["wf_one_layer", "iv_one_layer"])


def test_what_is_alive_is_counted():
    with torch.no_grad(), FakeTensorMode():
        given = torch.empty(100)
    with torch.no_grad(), given.fake_mode, _Alive(on_cpu=False) as alive:
        x = torch.empty(1000)
        y = x + 1
        view = y[:500]
        assert alive.num_bytes == 8000
        z = x * y
        assert alive.take_peaks() == {0: 12000}
        del x, z
        assert alive.num_bytes == 4000
        del y
        assert alive.num_bytes == 4000  # the view keeps it
        del view
        given.view(10, 10)  # nothing new
        assert (alive.num_bytes, *alive.take_peaks().values(), *alive.take_peaks().values()) == (0, 12000, 0)


@pytest.mark.parametrize("size", [4, 64])  # PyTorch gives the larger one to oneDNN, and we the other
@pytest.mark.parametrize(
    "layout, kernel, dilation, channels, has_copy",
    [
        (torch.contiguous_format, 3, 1, 40 + 48, True),  # 20 and 40 channels are 32 and 48 in blocks of 16
        (torch.channels_last_3d, 3, 1, 40, True),
        (torch.contiguous_format, 1, 1, 40, False),
        (torch.contiguous_format, 3, 2, 40 + 48, True),
    ],
)
def test_what_a_convolution_takes_for_itself(
    layout: torch.memory_format, kernel: int, dilation: int, channels: int, has_copy: bool, size: int
):
    with torch.no_grad(), FakeTensorMode():
        conv = FrameConv2d(20, 40, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
        x = torch.empty(1, 20, 20, size, size).contiguous(memory_format=layout)
        for on_cpu in (False, True):
            with _Alive(on_cpu) as alive:
                y = conv(x)
            assert y.shape == (1, 40, 20, size, size)
            weight = 4 * conv.weight.numel() if on_cpu and has_copy else 0
            assert alive.take_peaks()[weight] == 4 * 20 * size**2 * (channels if on_cpu else 40)


@siblings
def test_the_state_is_as_large_as_predicted(case: str):
    vae = make(case, torch.float32)
    model = vae.memory_model()
    video = make_video(vae, 1, 128, 128)
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        for decoding in (False, True):
            cache = TemporalCache()
            (vae.decode if decoding else vae.encode)(latents if decoding else video, cache=cache)
            short = model.cost(decoding, (1, 5, 128, 128), (128, 128), 5, 4)
            tiled = model.cost(decoding, (1, 5, 128, 256), (128, 128), 5, 4)
            assert 0 <= 4 * short.state - cache.nbytes() <= 0.1 * cache.nbytes()  # and what a chunk takes in addition
            assert short.state == short.tile_state < tiled.tile_state < tiled.state


@siblings
def test_the_prediction_follows_area_length_and_dtype(case: str):
    vae = make(case, torch.float32)
    small, wide, long = (vae.plan(n, 128, w, tile=(128, w, n)) for n, w in ((5, 128), (5, 512), (9, 128)))
    for name in ("encode_bytes", "decode_bytes"):
        assert getattr(wide, name) == pytest.approx(4 * getattr(small, name), rel=0.02)  # copies of weights
        assert 1.1 < getattr(long, name) / getattr(small, name) < 2.5
    half = vae.plan(5, 128, 128, torch.bfloat16, tile=(128, 128, 5))
    assert half.peak_bytes == pytest.approx(small.peak_bytes / 2, rel=1e-6)
    tiled = vae.plan(9, 1024, 1024, tile=(256, 256, 9))
    assert tiled.peak_bytes < 0.7 * vae.plan(9, 1024, 1024, tile=(1024, 1024, 9)).peak_bytes
    assert tiled.decode_overhead > 1
    with pytest.raises(ValueError, match=r"`budget` must be at least about \d+ MiB for 9 frames of 1024x1024, got 1 "):
        vae.plan(9, 1024, 1024, budget=2**20)


@siblings
@torch.no_grad()
def test_a_budget_changes_nothing_but_memory(case: str):
    vae = make(case)
    video = make_video(vae, 4, 16, 24)
    z = vae.encode(video).latent_dist.mode()
    sample = vae.decode(z).sample
    small = vae.plan(17, 16, 24, tile=(16, 24, 17)).peak_bytes - 1
    plan = vae.plan(17, 16, 24, budget=small)
    assert plan.peak_bytes <= small and plan.num_frames_per_chunk < 17
    for settings in ({"budget": small}, {"tile_sample_min_height": "auto"}):
        vae.enable_tiling(**settings)
        cache = TemporalCache()
        vae.encode(video, cache=cache)
        assert (cache.layout == plan[:3]) == ("budget" in settings)  # there is plenty of memory for such a video
        assert_exact(vae.encode(video).latent_dist.mode(), z)
        assert_exact(vae.decode(z).sample, sample)


@siblings
@torch.no_grad()
def test_streams_within_a_bound(case: str, tmp_path):
    model = make(case, torch.float32).memory_model()
    settings = {"max_frames_per_step": 4}
    roomy = model.fit_stream((1080, 1920), None, 4, 2**40, **settings)
    assert roomy.overhead == 1 and not roomy.is_parked
    tight = model.fit_stream((1080, 1920), None, 4, round(1.09 * roomy.num_bytes), **settings)
    assert 1.1 * tight.num_bytes <= 1.09 * roomy.num_bytes and tight.layout is not None and tight.overhead > 1
    # What is chosen is what is computed, with the state of the tiles on disk or not.
    vae = make(case)
    video = make_video(vae, 2, 32, 48)
    z = vae.encode(video).latent_dist.mode()
    sample = vae.decode(z).sample
    for folder in (None, tmp_path):
        encoder = StreamingEncoder(vae, 4, cache=TemporalCache(folder, (16, 24, 5)))
        decoder = StreamingDecoder(vae, 1, cache=TemporalCache(folder, (16, 24, 5)))
        latents = [encoder.push(video), encoder.flush()]
        assert_exact(torch.cat([part for part in latents if part is not None], dim=2), z)
        frames = [decoder.push(z), decoder.flush()]
        assert_exact(torch.cat([part for part in frames if part is not None], dim=2), sample)


def test_statistics_of_the_whole_video_rule_out_a_plan():
    vae = make("wf", norm_type="group_norm", base_channels=32, encoder_flow_channels=32, decoder_flow_channels=32)
    with pytest.raises(ValueError, match="`plan` needs `norm_type` 'layer_norm'"):
        vae.plan(9, 64, 64, budget=10**9)
