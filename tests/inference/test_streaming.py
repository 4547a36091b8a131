"""Streams: any push sizes equal the whole video; streams do not influence each other."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from diffusers_leanvae import AutoencoderKLLeanVAE, StreamingDecoder, StreamingEncoder, TemporalCache
from diffusers_leanvae.models.temporal_cache import Chunk


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLLeanVAE:
    return make_tiny("leanvae", torch.float64, num_ista_iterations=2)


def video(num_frames: int, height: int = 24, width: int = 40, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, num_frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def run(stream: StreamingEncoder | StreamingDecoder, whole: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    outputs = [stream.push(piece) for piece in whole.split(sizes, dim=2)] + [stream.flush()]
    return torch.cat([output for output in outputs if output is not None], dim=2)


@pytest.mark.parametrize(
    ("num_frames", "sizes"),
    [
        (1, [1]),
        (5, [3, 2]),
        (9, [1] * 9),
        (17, [17]),
        (21, [7, 7, 7]),
        (33, [1, 16, 16]),
        (33, [32, 1]),
        (13, [0, 13]),
    ],
)
@pytest.mark.parametrize("tiled", [False, True])
@torch.no_grad()
def test_pushes_of_any_size_equal_the_whole(vae, num_frames, sizes, tiled):
    whole = video(num_frames)
    vae.disable_tiling()
    latents = vae.encode(whole).latent_dist.mode()
    sample = vae.decode(latents).sample
    assert latents.std() > 1e-2 and sample.std() > 1e-2
    if tiled:
        vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=24, num_frames_per_chunk=5)
    streamed = run(StreamingEncoder(vae, num_frames_per_step=8), whole, sizes)
    torch.testing.assert_close(streamed, latents, rtol=0, atol=1e-10)
    streamed = run(StreamingDecoder(vae, num_latent_frames_per_step=2), latents, [1] * latents.shape[2])
    torch.testing.assert_close(streamed, sample, rtol=0, atol=1e-10)
    vae.disable_tiling()


@pytest.mark.parametrize("num_frames", [2, 3, 4, 6, 20])
@torch.no_grad()
def test_lengths_that_are_not_legal_repeat_the_last_frame(vae, num_frames):
    whole = video(num_frames)
    padded = torch.cat((whole, whole[:, :, -1:].expand(-1, -1, (1 - num_frames) % 4, -1, -1)), dim=2)
    streamed = run(StreamingEncoder(vae), whole, [num_frames])
    torch.testing.assert_close(streamed, vae.encode(padded).latent_dist.mode(), rtol=0, atol=1e-10)


@torch.no_grad()
def test_interleaved_streams_and_an_image_between(vae):
    first, second, image = video(17, seed=2), video(17, 16, 32, seed=3), video(1, seed=4)
    expected = [vae.encode(x).latent_dist.mode() for x in (first, second, image)]
    streams = [StreamingEncoder(vae, 4), StreamingEncoder(vae, 8)]
    outputs: list[list[torch.Tensor]] = [[], []]
    for index in range(17):
        for stream, whole, output in zip(streams, (first, second), outputs, strict=True):
            latents = stream.push(whole[:, :, index : index + 1])
            output.extend([] if latents is None else [latents])
        torch.testing.assert_close(vae.encode(image).latent_dist.mode(), expected[2], rtol=0, atol=0)
    for stream, output in zip(streams, outputs, strict=True):
        latents = stream.flush()
        output.extend([] if latents is None else [latents])
    for output, whole in zip(outputs, expected, strict=False):
        torch.testing.assert_close(torch.cat(output, dim=2), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@torch.no_grad()
def test_a_failed_chunk_breaks_its_own_stream_only(vae, monkeypatch, direction, tiled):
    def work(x: torch.Tensor, cache: TemporalCache | None = None) -> torch.Tensor:
        if direction == "encode":
            return vae.encode(x, cache=cache).latent_dist.mode()
        return vae.decode(x, cache=cache).sample

    whole = video(9)
    whole = whole if direction == "encode" else vae.encode(whole).latent_dist.mode()
    first, second = whole.split((5, 4) if direction == "encode" else (2, 1), dim=2)
    expected = work(whole)
    if tiled:
        vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=24, num_frames_per_chunk=5)
    good, bad = TemporalCache(), TemporalCache()
    start = work(first, good)
    work(first, bad)
    layer = (vae.encoder if direction == "encode" else vae.decoder).fusion_layers[1].ff
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            work(second, bad)
    with pytest.raises(ValueError, match="without failed chunks"):
        work(second, bad)
    with pytest.raises(ValueError, match="whose last chunk failed"):
        bad.state_dict()
    joined = torch.cat((start, work(second, good)), dim=2)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-10)
    bad.reset()
    torch.testing.assert_close(work(whole, bad), expected, rtol=0, atol=1e-10)
    vae.disable_tiling()


@torch.no_grad()
def test_a_failed_step_leaves_other_streams_alone(vae, monkeypatch):
    whole = video(17)
    expected = vae.encode(whole).latent_dist.mode()
    good, bad = StreamingEncoder(vae, 4), StreamingEncoder(vae, 4)
    outputs = []
    for index, frame in enumerate(whole.split(1, dim=2)):
        if (latents := good.push(frame)) is not None:
            outputs.append(latents)
        with monkeypatch.context() as patch:
            if index == 8:
                patch.setattr(vae.encoder.fusion_layers[1].ff, "forward", lambda *_: 1 / 0)
            if index < 8:
                bad.push(frame)
            elif index == 8:
                with pytest.raises(ZeroDivisionError):
                    bad.push(frame)
            elif index == 12:
                with pytest.raises(ValueError, match="without failed chunks"):
                    bad.push(whole[:, :, 9:13])
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, rtol=0, atol=1e-10)
    bad.reset()
    torch.testing.assert_close(run(bad, whole, [17]), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_waits_is_the_streams_own(vae):
    # A camera's buffer is filled again and again, and a large piece must not stay for its last frame.
    whole, camera = video(9), torch.empty(1, 3, 1, 24, 40, dtype=torch.float64)
    stream, outputs = StreamingEncoder(vae, 8), []
    for frame in whole.split(1, dim=2):
        outputs.append(stream.push(camera.copy_(frame)))
    assert all(output is None for output in outputs[:-1])
    torch.testing.assert_close(outputs[-1], vae.encode(whole).latent_dist.mode(), rtol=0, atol=1e-10)
    stream.push(video(37))
    assert stream._buffer is not None and stream._buffer.shape[2] == 8  # of the five frames that wait, not of 37


@pytest.mark.parametrize("layout", [None, (16, 24, 5), (16, 24, 17)])
@torch.no_grad()
def test_the_last_chunk_leaves_no_state(vae, monkeypatch, layout):
    whole = video(13)
    expected = vae.encode(whole).latent_dist.mode()
    cache = TemporalCache(layout=layout)
    first = vae.encode(whole[:, :, :5], cache=cache).latent_dist.mode()
    assert cache.nbytes() > 0 and bool(cache.tiles) == (layout is not None)
    cache.is_last = True
    kept, remember = [], Chunk.remember

    def spy(self, name, frames, copy=True):
        kept.append(not self.is_last)
        remember(self, name, frames, copy)

    monkeypatch.setattr(Chunk, "remember", spy)
    last = vae.encode(whole[:, :, 5:], cache=cache).latent_dist.mode()
    assert cache.nbytes() == 0
    # Two chunks in a tile: the first must be remembered until the second, and not any longer.
    assert bool(kept) == (layout == (16, 24, 5)) and all(kept)
    torch.testing.assert_close(torch.cat((first, last), dim=2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tiled", [False, True])
@torch.no_grad()
def test_state_is_saved_and_restored(vae, tmp_path, tiled):
    if tiled:
        vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=24, num_frames_per_chunk=5)
    whole = video(23)
    with pytest.raises(ValueError, match="`state_dict` must be of a stream with as short steps, got 6 waiting for"):
        waiting = StreamingEncoder(vae, 8)
        waiting.push(whole[:, :, :15])
        StreamingEncoder(vae, 4).load_state_dict(waiting.state_dict())
    with pytest.raises(ValueError, match=r"^`state_dict` must be the state of a StreamingEncoder, got keys \[\]\.$"):
        StreamingEncoder(vae, 4).load_state_dict({})
    with pytest.raises(ValueError, match="^`state_dict` must be the state of a StreamingDecoder, got that of the oth"):
        StreamingDecoder(vae).load_state_dict(waiting.state_dict())
    expected = run(StreamingEncoder(vae, 4), whole, [23])
    stream = StreamingEncoder(vae, 4)
    before = stream.push(whole[:, :, :15])
    save_file(stream.state_dict(), tmp_path / "state.safetensors")
    later = StreamingEncoder(vae, 4)
    later.load_state_dict(load_file(tmp_path / "state.safetensors"))
    later.cache = later.cache.copy("cpu")
    assert later.cache.nbytes() == stream.cache.nbytes() > 0
    after = run(later, whole[:, :, 15:], [8])
    torch.testing.assert_close(torch.cat((before, after), dim=2), expected, rtol=0, atol=0)
    vae.disable_tiling()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("family, config", [("leanvae", {"num_fusion_layers": 1}), ("wfvae", {}), ("ivvae", {})])
@torch.no_grad()
def test_a_state_of_other_layers_is_refused(vae, family, config, tiled):
    stream = StreamingDecoder(vae, 1, TemporalCache(layout=(16, 24, 5) if tiled else None))
    stream.push(vae.encode(video(5)).latent_dist.mode())
    other = StreamingDecoder(make_tiny(family, torch.float64, **config), 1)
    with pytest.raises(
        ValueError, match="^`state_dict` must be the state of a StreamingDecoder of such a model, got "
    ):
        other.load_state_dict(stream.state_dict())


@torch.no_grad()
def test_misuse_is_named(vae):
    with pytest.raises(ValueError, match="positive multiple of 4, got 6"):
        StreamingEncoder(vae, num_frames_per_step=6)
    for step in (0, -1, None, "4", 4.0, 1.5):
        for stream_class in (StreamingEncoder, StreamingDecoder):
            with pytest.raises(ValueError, match=f"frames_per_step` must be a positive integer, got {step!r}"):
                stream_class(vae, step)
    stream = StreamingEncoder(vae)
    stream.push(video(2))
    kept = r"stream's \(B, C, H, W\), dtype and device \(\(1, 3, 24, 40\), torch.float64, 'cpu'\), got"
    with pytest.raises(ValueError, match=kept + r" \(\(1, 3, 16, 40\), torch.float64, 'cpu'\)\."):
        stream.push(video(2, height=16))
    with pytest.raises(ValueError, match=kept + r" \(\(1, 3, 24, 40\), torch.float32, 'cpu'\)\."):
        stream.push(video(2).float())
    with pytest.raises(ValueError, match="5 dimensions"):
        stream.push(video(2)[0])
    cache = TemporalCache()
    vae.encode(video(5), cache=cache)
    with pytest.raises(ValueError, match=r"must be 4 \* n .* in a later chunk"):
        vae.encode(video(5), cache=cache)
    with pytest.raises(ValueError, match="chunks of one shape"):
        vae.encode(video(4, height=16), cache=cache)


def test_the_end_of_an_empty_stream_is_nothing(vae):
    assert StreamingEncoder(vae).flush() is None
    assert StreamingDecoder(vae).flush() is None
