"""The planner's choices, and streams whose tiles are parked on disk."""

import dataclasses

import pytest
import torch

from diffusers_leanvae import StreamingDecoder, StreamingEncoder, TemporalCache
from diffusers_leanvae.models import leanvae_blocks
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.memory_planning import MemoryModel, OtherMemory
from diffusers_leanvae.models.temporal_cache import Chunk
from diffusers_leanvae.models.traced_memory import _Alive


MIB = 2**20


@pytest.fixture(scope="module")
def full_size() -> AutoencoderKLLeanVAE:
    with torch.device("meta"):
        return AutoencoderKLLeanVAE(latent_channels=16)


def test_a_larger_budget_never_means_more_work(full_size):
    plans = [full_size.plan(17, 1080, 1920, budget=budget * MIB) for budget in (700, 1000, 1500, 4000)]
    work = [plan.encode_overhead + 2.5 * plan.decode_overhead for plan in plans]
    assert work == sorted(work, reverse=True) and work[0] > 3.5
    assert plans[-1][:2] == (1080, 1920) and plans[-1].decode_overhead == 1.0
    for plan, budget in zip(plans, (700, 1000, 1500, 4000), strict=True):
        assert plan.peak_bytes <= budget * MIB


def test_sizes_are_legal_for_enable_tiling(full_size, make_model):
    for num_frames, height, width in ((17, 1080, 1920), (1, 2160, 3840), (241, 256, 256), (5, 8, 8)):
        plan = full_size.plan(num_frames, height, width, budget=3000 * MIB)
        make_model().enable_tiling(*plan[:3])


def test_half_precision_takes_about_half(full_size):
    tile = (1080, 1920, 17)
    single = full_size.plan(17, 1080, 1920, torch.float32, tile=tile)
    half = full_size.plan(17, 1080, 1920, torch.bfloat16, tile=tile)
    assert half.peak_bytes == single.peak_bytes // 2


def test_nothing_fits(full_size):
    with pytest.raises(
        ValueError, match=r"`budget` must be at least about \d+ MiB for 17 frames of 1920x1080, got 1 MiB"
    ):
        full_size.plan(17, 1080, 1920, budget=MIB)


@torch.no_grad()
def test_auto_and_budget_change_nothing_but_memory(make_model, make_video, monkeypatch):
    model, video = make_model(torch.float64), make_video(1, 3, 21, 64, 96, dtype=torch.float64)
    z = model.encode(video).latent_dist.mode()
    expected = model.decode(z).sample
    assert not model.use_tiling
    shapes = []
    original = AutoencoderKLLeanVAE._decode_local

    def spy(self, chunk, *args):
        shapes.append(tuple(chunk.shape[2:]))
        return original(self, chunk, *args)

    monkeypatch.setattr(AutoencoderKLLeanVAE, "_decode_local", spy)
    small = model.plan(21, 64, 96, tile=(32, 32, 9)).peak_bytes
    for settings in ({"budget": small}, {"tile_sample_min_height": "auto"}):
        shapes.clear()
        model.enable_tiling(**settings)
        torch.testing.assert_close(model.encode(video).latent_dist.mode(), z, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.decode(z).sample, expected, rtol=0, atol=1e-10)
        assert (len(shapes) > 1) == ("budget" in settings)  # there is plenty of memory for such a video
    with pytest.raises(ValueError, match="must come without tile sizes"):
        model.enable_tiling(64, budget=10**9)
    for budget in ("2GiB", 0, 1.5):
        with pytest.raises(ValueError, match=r"`budget` must be a positive number of bytes, got"):
            model.enable_tiling(budget=budget)
    for num_frames in ("17", 17.0, 4):
        with pytest.raises(ValueError, match=r"`num_frames_per_chunk` must be .* \* n \+ 1 with n >= 1 .*, got"):
            model.enable_tiling(num_frames_per_chunk=num_frames)


@pytest.fixture(scope="module")
def on_cpu(full_size) -> MemoryModel:
    return dataclasses.replace(full_size.memory_model(), slice_elements=2**22)


def test_streams_within_bounds(on_cpu):
    for num_frames in (None, 17, 21, 1200):
        plans = [on_cpu.fit_stream((1080, 1920), num_frames, 4, bound * MIB) for bound in (500, 900, 1500, 3000, 8000)]
        for plan, bound in zip(plans, (500, 900, 1500, 3000, 8000), strict=True):
            assert 0 < plan.num_bytes <= bound * MIB / 1.1
            assert plan.num_frames_per_step % 4 == 0 and plan.num_frames_per_step <= 20
            assert not plan.is_parked or plan.layout is not None
        work = [plan.overhead for plan in plans]
        assert work == sorted(work, reverse=True) and work[0] > 1.5
        assert plans[-1].overhead == 1.0 and not plans[-1].is_parked
        # Only what is longer than a step has a state, which tight bounds put on disk.
        assert plans[0].is_parked and plans[2].is_parked == (num_frames != 17)


def test_a_stream_in_memory_takes_its_state_with_it(on_cpu):
    settings = ((256, 256), None, 16, (256, 256, 17), 4)
    both = on_cpu.stream(*settings).num_bytes
    parked = on_cpu.stream(*settings, is_parked=True).num_bytes
    short = on_cpu.stream((256, 256), 13, *settings[2:]).num_bytes
    # Two steps of 32x32 tokens of 512 numbers in 6 + 14 convolutions: 80 MiB.
    assert 75 * MIB < both - short < 95 * MIB
    assert short < parked < both


def test_what_others_hold_counts_when_they_hold_it(on_cpu):
    settings, writer = (16, (256, 256, 17), 4), OtherMemory(writer=3 * MIB, per_written=MIB, max_written=40)
    alone = {n: on_cpu.stream((256, 256), n, *settings).num_bytes for n in (13, 37, None)}
    with_writer = {n: on_cpu.stream((256, 256), n, *settings, others=writer).num_bytes for n in (13, 37, None)}
    assert with_writer[13] == alone[13]  # while the network works on the only step nothing is written
    assert with_writer[37] == alone[37] + 23 * MIB  # 37 - 17 frames, and the writer itself
    assert with_writer[None] == alone[None] + 43 * MIB
    others = OtherMemory(fixed=MIB, per_step_frame=MIB)
    assert on_cpu.stream((256, 256), None, *settings, others=others).num_bytes == alone[None] + 18 * MIB


@pytest.mark.parametrize("layout", [None, (16, 24, 5)])
@torch.no_grad()
def test_the_state_is_as_large_as_predicted(make_model, make_video, layout):
    model, video = make_model(), make_video(1, 3, 13, 40, 48)
    plan = model.memory_model()
    for decoding, halo in ((False, model.encoder_halo), (True, model.decoder_halo)):
        cache = TemporalCache(layout=layout)
        if decoding:
            model.decode(model.encode(video).latent_dist.mode(), cache=cache)
        else:
            model.encode(video, cache=cache)
        cost = plan.cost(decoding, (1, 13, 40, 48), (40, 48) if layout is None else layout[:2], 5, 4)
        one_more = cost.tile_state // (halo + 1)
        assert cache.nbytes() == 4 * (cost.state - one_more)


def test_nothing_fits_a_stream(on_cpu):
    with pytest.raises(
        ValueError, match=r"`max_memory` must be at least about \d+ MiB for frames of 1920x1080"
    ) as error:
        on_cpu.fit_stream((1080, 1920), None, 4, MIB, others=OtherMemory(fixed=100 * MIB))
    least = int(str(error.value).split("about ")[1].split()[0])
    assert least > 110
    on_cpu.fit_stream((1080, 1920), None, 4, least * MIB, others=OtherMemory(fixed=100 * MIB))
    with pytest.raises(ValueError, match=f"at least about {least} MiB"):
        on_cpu.fit_stream((1080, 1920), None, 4, (least - 1) * MIB, others=OtherMemory(fixed=100 * MIB))


@torch.no_grad()
def test_parked_caches_give_the_same_stream(make_model, make_video, tmp_path):
    model, video = make_model(torch.float64), make_video(1, 3, 21, 40, 48, dtype=torch.float64)
    z = model.encode(video).latent_dist.mode()
    expected = model.decode(z).sample
    model.enable_tiling(16, 24, 5)
    encoder = StreamingEncoder(model, 4, cache=TemporalCache(tmp_path))
    decoder = StreamingDecoder(model, 1, cache=TemporalCache(tmp_path))
    latents, frames = [], []
    for frame in video.split(1, dim=2):
        latents.append(encoder.push(frame))
        assert encoder.cache.nbytes() == decoder.cache.nbytes() == 0  # nothing stays in memory between the steps
        if latents[-1] is not None:
            frames.append(decoder.push(latents[-1]))
    assert len(encoder.cache.tiles) == 6
    assert not list(tmp_path.iterdir())  # the files have no names: not even SIGKILL leaves one behind
    latents, frames = ([part for part in parts if part is not None] for parts in (latents, frames))
    torch.testing.assert_close(torch.cat(latents, dim=2), z, rtol=0, atol=1e-10)
    frames.append(decoder.flush())
    frames = [part for part in frames if part is not None]
    torch.testing.assert_close(torch.cat(frames, dim=2), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_parked_stream_is_saved_moved_and_continued(make_model, make_video, tmp_path):
    model, video = make_model(torch.float64), make_video(1, 3, 13, 24, 16, dtype=torch.float64)
    expected = model.encode(video).latent_dist.mode()[:, :, 2:]
    cache = TemporalCache(tmp_path, layout=(16, 8, 5))  # the stream's own tiles: the model has none
    model.encode(video[:, :, :5], cache=cache)
    in_memory, parked, other = TemporalCache(), TemporalCache(tmp_path), cache.copy("cpu")
    in_memory.load_state_dict(cache.state_dict())
    parked.load_state_dict(cache.state_dict())
    assert in_memory.nbytes() == other.nbytes() > 0 == parked.nbytes() == cache.nbytes()
    for stream in (in_memory, parked, other, cache):
        rest = model.encode(video[:, :, 5:], cache=stream).latent_dist.mode()
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-10)


def test_a_folder_to_park_in_must_exist(tmp_path):
    with pytest.raises(ValueError, match="`directory` must be an existing folder, got '.*nothing'"):
        TemporalCache(tmp_path / "nothing")


@pytest.mark.parametrize("num_elements", [2**22, 2**14], ids=["whole", "in_slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_freq_dim": 48, "high_freq_dim": 144},
        {"low_freq_dim": 48, "high_freq_dim": 144, "patch_embedding_type": "joint", "bottleneck_type": "linear"},
    ],
    ids=["narrow", "wide", "wide_in_one_stack"],
)
@torch.no_grad()
def test_the_peak_is_that_of_the_network(make_model, make_video, monkeypatch, options, dtype, num_elements):
    monkeypatch.setattr(leanvae_blocks, "slice_elements", lambda device: num_elements)
    vae = make_model(dtype, **options)
    model = dataclasses.replace(vae.memory_model(), slice_elements=num_elements)
    for shape in ((1, 1, 48, 48), (2, 5, 40, 64), (1, 17, 64, 48)):
        num_frames, height, width = shape[1:]
        video = make_video(shape[0], 3, num_frames, height, width, dtype=dtype)
        latents = vae.encode(video).latent_dist.mode()
        for decoding, call, x in ((False, vae._encode_local, video), (True, vae._decode_local, latents)):
            with _Alive(on_cpu=False) as alive:
                call(x, Chunk())
            predicted = model.cost(decoding, shape, (height, width), num_frames, dtype.itemsize).working
            assert predicted * dtype.itemsize == pytest.approx(alive.take_peaks()[0], rel=0.1), (decoding, shape)
