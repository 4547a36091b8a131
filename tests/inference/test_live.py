"""Raw frames through the live mode: the whole clip's result, any size and length, each frame as soon as it can be."""

import io
import os
import threading

import pytest
import torch

from diffusers_leanvae import AutoencoderKLWFVAE
from diffusers_leanvae.inference.live import reconstruct_stream
from diffusers_leanvae.inference.padding import crop_sample, pad_sample


@pytest.fixture(scope="module")
def vae(make_model):
    return make_model()


def clip(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def raw(frames: torch.Tensor) -> bytes:
    return frames.contiguous().numpy().tobytes()


class Target(io.BytesIO):
    """A target that notes how far its source has been read whenever a frame comes."""

    def __init__(self, source: io.BytesIO) -> None:
        super().__init__()
        self.source, self.places = source, []

    def write(self, data) -> int:
        self.places.append(self.source.tell())
        return super().write(data)


def frames_of(data: bytes, height: int, width: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, height, width, 3)


@torch.no_grad()
def whole(vae, frames: torch.Tensor) -> torch.Tensor:
    """The clip at once, in levels of 0 to 255, not rounded."""
    sample, padding = pad_sample(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    return crop_sample(vae(sample).sample, padding)[0].permute(1, 2, 3, 0).add(1).mul(127.5).clamp(0, 255)


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "step"),
    [(1, 16, 24, 4), (2, 16, 24, 4), (5, 9, 7, 4), (22, 27, 42, 4), (22, 16, 24, 8), (17, 1, 1, 16)],
)
def test_equals_the_whole_clip(vae, num_frames, height, width, step):
    frames, target = clip(num_frames, height, width), io.BytesIO()
    count = reconstruct_stream(vae, io.BytesIO(raw(frames)), target, width, height, num_frames_per_step=step)
    actual, expected = frames_of(target.getvalue(), height, width), whole(vae, frames)
    assert count == num_frames == len(actual)
    assert expected.std() > 10
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.51)  # rounding to 256 levels


def test_the_step_is_as_short_as_the_model_allows(vae):
    torch.manual_seed(0)
    config = {"base_channels": 4, "encoder_flow_channels": 3, "decoder_flow_channels": 2, "num_encoder_layers": 1}
    sibling = AutoencoderKLWFVAE(latent_channels=4, temporal_compression_ratio=8, **config).eval()
    for model, num_frames in ((vae, 6), (sibling, 12)):
        data, step = raw(clip(num_frames, 16, 24)), model.temporal_compression_ratio
        chosen, given = (Target(io.BytesIO(data)) for _ in range(2))
        assert reconstruct_stream(model, chosen.source, chosen, 24, 16) == num_frames
        reconstruct_stream(model, given.source, given, 24, 16, num_frames_per_step=step)
        assert chosen.getvalue() == given.getvalue() and chosen.places == given.places


def test_side_by_side(vae):
    frames, alone, target = clip(6, 10, 12), io.BytesIO(), io.BytesIO()
    reconstruct_stream(vae, io.BytesIO(raw(frames)), alone, 12, 10)
    assert reconstruct_stream(vae, io.BytesIO(raw(frames)), target, 12, 10, side_by_side=True) == 6
    left, right = frames_of(target.getvalue(), 10, 24).tensor_split((12,), dim=2)
    torch.testing.assert_close(left, frames, rtol=0, atol=0)
    torch.testing.assert_close(right, frames_of(alone.getvalue(), 10, 12), rtol=0, atol=0)


@pytest.mark.parametrize("num_frames", [0, 3, 6])
def test_an_input_cut_off_within_a_frame(vae, num_frames):
    frames, target = clip(num_frames + 1, 8, 16), io.BytesIO()
    data = raw(frames)[:-100]
    message = f"frames of 16x8 RGB24, 384 bytes each, got 284 bytes after {num_frames} whole frames"
    with pytest.raises(ValueError, match=message):
        reconstruct_stream(vae, io.BytesIO(data), target, 16, 8)
    if num_frames:  # what came before is good, and written
        actual = frames_of(target.getvalue(), 8, 16).float()
        torch.testing.assert_close(actual, whole(vae, frames[:-1]), rtol=0, atol=0.51)


def test_nothing_in_nothing_out(vae):
    target = io.BytesIO()
    assert reconstruct_stream(vae, io.BytesIO(), target, 16, 8) == 0
    assert target.getvalue() == b""


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_frames_come_out_while_the_input_is_open(vae, buffering):
    frames = clip(13, 24, 40)  # 2,880 bytes each
    expected, counts = whole(vae, frames), []
    to_network, feed = os.pipe()
    read, from_network = os.pipe()

    def run() -> None:
        with (
            open(to_network, "rb", buffering=buffering) as source,
            open(from_network, "wb", buffering=buffering) as out,
        ):
            counts.append(reconstruct_stream(vae, source, out, 40, 24))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    outputs = []
    with open(feed, "wb", buffering=0) as feeding, open(read, "rb", buffering=0) as reading:

        def take(num_frames: int) -> None:
            for _ in range(num_frames):
                data = b""
                while len(data) < 2880:
                    data += (piece := reading.read(2880 - len(data)))
                    assert piece, "the output ended early"
                outputs.append(frames_of(data, 24, 40))

        for index, frame in enumerate(frames):
            data = raw(frame)
            feeding.write(data[:1000])  # a frame comes in pieces
            feeding.write(data[1000:])
            if index and index % 4 == 0:  # would wait for ever if they were held back until more is read
                take(5 if index == 4 else 4)
        assert len(outputs) == 13
        feeding.close()
        assert reading.read() == b""
    thread.join(timeout=60)
    assert counts == [13]
    torch.testing.assert_close(torch.cat(outputs).float(), expected, rtol=0, atol=0.51)


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_ends_it_quietly(vae, buffering):
    read, write = os.pipe()
    os.close(read)
    target = open(write, "wb", buffering=buffering)
    assert reconstruct_stream(vae, io.BytesIO(raw(clip(9, 16, 24))), target, 24, 16) <= 5
    try:
        target.close()
    except BrokenPipeError:  # what a buffered stream still held
        pass


def test_misuse_is_named(vae):
    with pytest.raises(ValueError, match="`width` and `height` must be positive, got 0 and 8"):
        reconstruct_stream(vae, io.BytesIO(), io.BytesIO(), 0, 8)
    with pytest.raises(ValueError, match="`num_frames_per_step` must be a positive multiple of 4, got 6"):
        reconstruct_stream(vae, io.BytesIO(), io.BytesIO(), 16, 8, num_frames_per_step=6)
