"""Long videos: the windows that cover one, and its frames while it is sampled."""

import pytest
import torch
from tiny import make_tiny

from diffusers_leanvae.generation.windows import FrameDecoder, plan_windows
from diffusers_leanvae.models.temporal_cache import TemporalCache


def test_windows_cover_a_video():
    assert plan_windows(3, 5, 2) == [(0, 3, 0)]
    assert plan_windows(5, 5, 2) == [(0, 5, 0)]
    assert plan_windows(8, 5, 2) == [(0, 5, 0), (3, 8, 2)]
    assert plan_windows(9, 5, 2) == [(0, 5, 0), (3, 8, 2), (4, 9, 4)]  # the last one overlaps more
    for total in range(1, 30):
        windows = plan_windows(total, 5, 2)
        assert sum(w.stop - w.start - w.num_known for w in windows) == total == windows[-1].stop
        assert {w.stop - w.start for w in windows} == {min(total, 5)}
        assert all(later.start + later.num_known == w.stop for w, later in zip(windows, windows[1:], strict=False))


@pytest.mark.parametrize("hands_out", [True, False])
def test_a_decoder_keeps_the_frames_it_is_asked_for(hands_out: bool):
    vae, latents = make_tiny("leanvae"), torch.randn(1, 4, 9, 2, 2, generator=torch.Generator().manual_seed(0))
    handed_out: dict[int, torch.Tensor] = {}

    def decode(part: torch.Tensor, cache: TemporalCache | None) -> torch.Tensor:
        with torch.no_grad():
            return vae.decode(part, return_dict=False, cache=cache)[0]

    expected, num_held = decode(latents, None), []
    decoder = FrameDecoder(vae, decode, 9, num_kept=5, on_frames=handed_out.__setitem__ if hands_out else None)
    stop = 0
    for part in latents.split(3, dim=2):
        decoder.push(part)
        stop += part.shape[2]
        frames = expected[:, :, : 4 * stop - 3]
        for count in (1, 4, 5):
            torch.testing.assert_close(decoder.last(count), frames[:, :, -count:], rtol=0, atol=1e-5)
        num_held.append(sum(piece.shape[2] for piece in decoder._pieces))
    assert max(num_held) <= (8 if hands_out else 12)  # whole pieces, as few as have 5 frames
    if hands_out:
        assert list(handed_out) == [0, *range(1, 33, 4)]
        torch.testing.assert_close(torch.cat(list(handed_out.values()), dim=2), expected, rtol=0, atol=1e-5)
