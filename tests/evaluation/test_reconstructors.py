"""Any autoencoder of diffusers is opened by class and path, and judged by the same code."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import make_tiny, seeded

from diffusers_leanvae import bundled
from diffusers_leanvae.checks import sha256
from diffusers_leanvae.evaluation.autoencoders import find_class, open_autoencoder
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor


# Small configs of other classes, with the shape of the latents of 9 frames of 32x48.
WAN: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 2,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.0, 0.0],
    "latents_std": [1.0, 1.0],
}
PEERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AutoencoderKLWan": (WAN, (2, 3, 4, 6)),
    "AutoencoderVidTok": ({"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}, (4, 3, 4, 6)),
    "AutoencoderKL": ({"block_out_channels": [4], "norm_num_groups": 2}, (4, 9, 32, 48)),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": [4, 4],
            "decoder_block_out_channels": [4, 4],
            "num_encoder_blocks": [1, 1],
            "num_decoder_blocks": [1, 1],
        },
        (4, 9, 16, 24),
    ),
    "AutoencoderKLTemporalDecoder": ({"block_out_channels": [32]}, (4, 9, 32, 48)),
}


def write_config(folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(PEERS[name][0]))
    return path


@pytest.mark.parametrize("name", PEERS)
def test_peers_with_random_weights(name: str, tmp_path: Path, make_video):
    before = torch.random.get_rng_state()
    vae, about = open_autoencoder(f"{name}:{write_config(tmp_path, name)}")
    again = open_autoencoder(f"{name}:{write_config(tmp_path, name)}").vae
    assert torch.equal(torch.random.get_rng_state(), before) and not vae.training
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))
    assert (about["class"], about["weights"], about["weights_sha256"]) == (name, "random", None)
    assert about["latent_channels"] == PEERS[name][1][0]
    clip = make_video(3, 9, 32, 48)
    result = AutoencoderReconstructor(vae, name).reconstruct(clip)
    assert result.latents is not None and result.latents.shape == PEERS[name][1]
    assert result.num_bits == 8 * result.latents.numel()
    assert result.bits_per_pixel == result.num_bits / (9 * 32 * 48)
    assert result.original.shape == result.pixels.shape == (9, 3, 32, 48)
    assert torch.equal(result.original, clip.transpose(0, 1).add(1).div(2))
    assert result.pixels.min() >= 0 and result.pixels.max() <= 1 and result.pixels.std() > 0
    assert result.encode_seconds > 0 and result.decode_seconds > 0


def test_images_are_coded_frame_by_frame(tmp_path: Path, make_video):
    vae = open_autoencoder(f"AutoencoderKL:{write_config(tmp_path, 'AutoencoderKL')}").vae
    clip = make_video(3, 9, 16, 24)
    result = AutoencoderReconstructor(vae, "images").reconstruct(clip)
    with torch.no_grad():
        alone = vae.decode(vae.encode(clip[:, 8:].transpose(0, 1)).latent_dist.mode()).sample
    # Measured 1e-6: the frames are eight at a time, and sums in another order.
    assert (result.pixels[8] - alone[0].add(1).div(2).clamp(0, 1)).abs().max() < 1e-5


def test_our_own_are_reconstructed_as_by_forward(make_video):
    vae, clip = make_tiny("leanvae", torch.bfloat16), make_video(3, 5, 16, 24)
    result = AutoencoderReconstructor(vae, "tiny", {"weights": "random"}).reconstruct(clip)
    with torch.no_grad():
        decoded = vae(clip[None].bfloat16(), return_dict=False)[0][0]
    assert torch.equal(result.pixels, decoded.float().transpose(0, 1).add(1).div(2).clamp(0, 1))
    assert torch.equal(result.original, clip.bfloat16().float().transpose(0, 1).add(1).div(2))
    assert AutoencoderReconstructor(vae, "tiny", {"weights": "random"}).about == {
        "weights": "random",
        "dtype": "bfloat16",
    }


def test_folders_of_any_class_and_bundled_names(tmp_path: Path):
    with seeded(3):
        wan = diffusers.AutoencoderKLWan(**WAN)
    wan.save_pretrained(tmp_path / "wan")
    for source in (str(tmp_path / "wan"), f"AutoencoderKLWan:{tmp_path / 'wan'}"):
        vae, about = open_autoencoder(source, dtype=torch.bfloat16)
        assert type(vae) is diffusers.AutoencoderKLWan and vae.dtype == torch.bfloat16
        assert torch.equal(vae.quant_conv.weight, wan.quant_conv.weight.bfloat16())
        assert about["weights"] == "trained" and about["spatial_compression_ratio"] == 8
        assert about["weights_sha256"] == sha256(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    vae, about = open_autoencoder("compact-4ch")
    assert (type(vae).__name__, about["latent_channels"]) == ("AutoencoderKLLeanVAE", 4)
    assert about["weights_sha256"] == sha256(bundled.model_path("compact-4ch") / "diffusion_pytorch_model.safetensors")
    pipeline = tmp_path / "pipeline"
    vae.save_pretrained(pipeline / "vae")
    (pipeline / "model_index.json").write_text('{"vae": ["diffusers_leanvae", "AutoencoderKLLeanVAE"]}')
    of_pipeline = open_autoencoder(str(pipeline)).about
    assert of_pipeline["weights_sha256"] == sha256(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    assert (about["temporal_compression_ratio"], about["spatial_compression_ratio"]) == (4, 8)


@pytest.mark.parametrize("name", ["UNet2DModel", "DDIMScheduler", "AutoencoderKLOther", "compact-4ch", "a/b", ""])
def test_other_names_are_no_class(name: str):
    assert find_class(name) is None


@pytest.mark.parametrize(
    "source, message",
    [
        ("AutoencoderKLWan:no/folder.json", "`source` must be the config of a AutoencoderKLWan, got 'no/folder.json'"),
        ("AutoencoderKLWan:{}", "`source` must hold weights of AutoencoderKLWan, got '.*'"),
        ("AutoencoderKLOther", "`source` must be 'compact-16ch'"),
    ],
)
def test_what_is_not_there_is_refused(source: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        open_autoencoder(source.format(tmp_path))


def test_sizes_that_do_not_come_back_are_refused(make_video):
    vae = diffusers.AutoencoderKLWan(**WAN).eval()
    with pytest.raises(
        ValueError, match=r"size that wan gives back, got \(8, 32, 32\), from which came \(5, 32, 32\)"
    ):
        AutoencoderReconstructor(vae, "wan").reconstruct(make_video(3, 8, 32, 32))
