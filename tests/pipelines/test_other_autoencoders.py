"""A latent video pipeline takes any autoencoder of the package."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from tiny import make_tiny


siblings = pytest.mark.parametrize("sibling", ["wfvae", "ivvae"])


@siblings
def test_generates_and_survives_saving(class_case, sibling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pipeline = class_case.pipeline(vae=make_tiny(sibling, scaling_factor=0.5))
    videos = class_case.run(pipeline)
    assert videos.shape == (1, 9, 3, 32, 32) and videos.std() > 0.01
    latents = class_case.run(pipeline, output_type="latent")
    decoded = pipeline.video_processor.postprocess_video(pipeline.vae.decode(latents / 0.5).sample, output_type="pt")
    torch.testing.assert_close(videos, decoded)
    streamed = torch.cat(list(pipeline.decode_stream(latents, num_latent_frames_per_step=1)), dim=1)
    torch.testing.assert_close(streamed, videos, rtol=0, atol=1e-5)

    pipeline.save_pretrained(tmp_path)
    logging.enable_propagation()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert "Expected types" not in caplog.text
    assert type(loaded.vae) is type(pipeline.vae)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(class_case.run(loaded), videos)


@siblings
def test_long_videos(class_case, sibling: str):
    pipeline = class_case.pipeline(vae=make_tiny(sibling, scaling_factor=0.5))
    arguments = {"num_frames": 17, "num_overlap_latent_frames": 1}
    pieces = []
    callback = {"callback_on_frames": lambda _, start, frames: pieces.append((start, frames))}
    frames = class_case.run(pipeline, **arguments, reencode_overlap=False, **callback)
    assert frames.shape[1] == 17
    late = pipeline.vae.num_delayed_frames  # the last frames come with the last piece
    assert [start for start, _ in pieces] == [0, 1, *range(5 - late, 17 - late, 4)]
    assert torch.equal(torch.cat([piece for _, piece in pieces], dim=1), frames)
    whole = class_case.run(pipeline, **arguments, reencode_overlap=False)
    torch.testing.assert_close(frames, whole, rtol=0, atol=1e-4)
    if sibling == "ivvae":
        assert class_case.run(pipeline, **arguments, reencode_overlap=True).shape[1] == 17
    else:
        with pytest.raises(ValueError, match="`reencode_overlap` must be False for an AutoencoderKLWFVAE"):
            class_case.run(pipeline, **arguments, reencode_overlap=True)
