"""Codecs at the rate of latents: as good as the rate allows, and not a bit more."""

from pathlib import Path

import av
import pytest
import torch
from patterns import drifting_pattern

from diffusers_leanvae.evaluation.codecs import CODECS, CodecReconstructor, count_bytes, encodable, find_quality
from diffusers_leanvae.evaluation.metrics import frame_psnr
from diffusers_leanvae.video_io import write_video
from diffusers_leanvae.video_io.pixels import pixels_to_sample


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """A clip that moves, with a little noise, in [-1, 1]."""
    frames = drifting_pattern(9, height=64, width=96, seed=3).float()
    frames += 3 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return pixels_to_sample(frames.clamp(0, 255)).permute(3, 0, 1, 2)


# x265 is slow to start, and its two ways of storing colour are those of x264.
@pytest.mark.parametrize(
    "codec, rates", [(name, [0.3, 1.0]) for name in ("x264", "x264-444", "av1")] + [("x265", [0.3])]
)
def test_more_bits_give_more_quality_and_never_too_many(codec: str, rates: list[float], clip: torch.Tensor):
    psnr = []
    for rate in rates:
        reconstructor = CodecReconstructor(codec, rate, preset="ultrafast")
        result = reconstructor.reconstruct(clip)
        # Near the rate: a step of the quality is some 4 % of the size, for AV1 15 %.
        assert (0.7 if codec == "av1" else 0.85) * rate < result.bits_per_pixel <= rate
        assert result.pixels.shape == result.original.shape == (9, 3, 64, 96)
        assert torch.equal(result.original, clip.transpose(0, 1).add(1).div(2)) and result.latents is None
        assert result.encode_seconds > 0 and result.decode_seconds > 0
        assert reconstructor.name == f"{codec} at {rate:.3g} bit/px"
        assert reconstructor.about["pixel_format"] == ("yuv444p" if "444" in codec else "yuv420p")
        psnr.append(frame_psnr(result.pixels, result.original).mean().item())
    assert psnr[0] > 20
    assert psnr == sorted(psnr) and (len(psnr) == 1 or psnr[1] > psnr[0] + 0.1)  # measured: 0.33 dB of AV1


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1"])
def test_only_packets_count(codec: str, tmp_path: Path):
    """Headers and the encoder's signature are most of a file with a single grey frame."""
    path = tmp_path / "clip.mkv"
    write_video(path, torch.full((1, 64, 96, 3), 128, dtype=torch.uint8), 25, codec=codec)
    with av.open(str(path)) as container:
        num_bytes = sum(packet.size for packet in container.demux(container.streams.video[0]))
    signature = num_bytes - count_bytes(path)
    # x264's text in the first packet; others put none there.
    assert 600 < signature < 800 if codec == "libx264" else signature == 0
    assert 10 < count_bytes(path) < 100 < path.stat().st_size - count_bytes(path)


@pytest.mark.parametrize("codec", ["x264", "av1"])
def test_a_rate_out_of_reach_takes_the_best_or_the_worst(codec: str, clip: torch.Tensor):
    small = CodecReconstructor(codec, 1e-6, preset="ultrafast").reconstruct(clip)
    large = CodecReconstructor(codec, 100.0, preset="ultrafast").reconstruct(clip)
    assert 1e-6 < small.bits_per_pixel < 0.2 < large.bits_per_pixel < 100


def test_the_search():
    asked: list[int] = []

    def size(quality: int) -> float:
        asked.append(quality)
        return 1000 / (quality + 1)

    for num_qualities in (1, 2, 64, 205):
        for max_size in (1, 4.9, 5, 333, 500, 999, 1000, 2000):
            asked.clear()
            found = find_quality(size, num_qualities, max_size)
            legal = [quality for quality in range(num_qualities) if 1000 / (quality + 1) <= max_size]
            assert found == (legal[0] if legal else num_qualities - 1)
            assert found in asked and len(asked) == len(set(asked)) <= 9


def test_what_is_not_legal_is_refused():
    with pytest.raises(ValueError, match="`codec` must be one of 'x264', .*, got 'mpeg2'"):
        CodecReconstructor("mpeg2", 1.0)
    with pytest.raises(ValueError, match="`bits_per_pixel` must be more than 0, got 0"):
        CodecReconstructor("x264", 0)
    with pytest.raises(ValueError, match="libx265 needs a picture of at least"):
        CodecReconstructor("x265", 1.0).check_size(8, 8)
    CodecReconstructor("x265", 1.0).check_size(64, 64)
    assert set(encodable()) <= set(CODECS)
