"""IV-VAE from image autoencoders: a video that stands still is reconstructed as its image is."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import enliven, make_tiny, make_video, seeded

from diffusers_leanvae import AutoencoderKLIVVAE
from diffusers_leanvae.trainer.image_weights import initialize_from_image_vae, load_image_vae


ABLATIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "causal": {"convolution": "causal"},
    "plain": {"use_pyramid": False, "attention": "none"},
    "motion": {"use_keyframe_branch": False, "attention": "mid"},
}


def make_image_vae(latent_channels: int, **config: Any) -> AutoencoderKLIVVAE:
    config |= {"use_keyframe_branch": False, "latent_channels": latent_channels}
    return make_tiny("ivvae", torch.float64, seed=3, **config)


@pytest.mark.parametrize("latent_channels", [2, 4], ids=["half", "all"])
@pytest.mark.parametrize("name", ABLATIONS)
@torch.no_grad()
def test_a_still_video_is_what_its_image_is(name: str, latent_channels: int):
    config = ABLATIONS[name]
    vae, image_vae = make_tiny("ivvae", torch.float64, **config), make_image_vae(latent_channels, **config)
    if name == "motion" and latent_channels == 2:
        with pytest.raises(ValueError, match="`image_vae` must have 4 latent channels for this model, got 2"):
            initialize_from_image_vae(vae, image_vae)
        return
    initialize_from_image_vae(vae, image_vae)
    image = make_video(1, 3, 1, 32, 40, dtype=torch.float64)
    expected = image_vae(image).sample
    assert expected.std() > 0.05
    still = image.repeat(1, 1, 9, 1, 1)
    actual = vae(still).sample
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=1e-12)  # measured: 1e-13
    torch.testing.assert_close(vae(image).sample, expected, rtol=0, atol=1e-12)
    latents, mean = vae.encode(still).latent_dist.mean, image_vae.encode(image).latent_dist.mean
    mean = torch.cat((mean, mean), dim=1) if latent_channels == 2 else mean  # of each branch, or shared by both
    torch.testing.assert_close(latents, mean.expand_as(latents), rtol=0, atol=4e-14)  # measured: 4e-15


def test_branches_can_learn_to_see_each_other():
    vae = make_tiny("ivvae", torch.float64)
    initialize_from_image_vae(vae, make_image_vae(2))
    vae(make_video(1, 3, 5, 32, 32, dtype=torch.float64)).sample.square().mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def make_autoencoder_kl(**config: Any) -> AutoencoderKL:
    sizes = {"block_out_channels": (4, 8, 16, 16), "layers_per_block": 2, "latent_channels": 2, "norm_num_groups": 4}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with seeded(5):
        return enliven(AutoencoderKL(**(sizes | config)), seed=5)


@torch.no_grad()
def test_filters_of_diffusers_are_taken_over():
    vae, source = make_tiny("ivvae", channel_multipliers=[1, 2, 4, 4]), make_autoencoder_kl()
    initialize_from_image_vae(vae, source)
    first = vae.encoder.conv_in
    for conv in (first.conv_2d.weight, first.conv_3d.weight[:, :, 1]):
        torch.testing.assert_close(conv, source.encoder.conv_in.weight, rtol=0, atol=0)
    assert first.conv_3d.weight[:, :, ::2].abs().max() == 0
    last = vae.decoder.blocks[-1].conv2
    theirs = source.decoder.up_blocks[-1].resnets[-1].conv2.weight
    torch.testing.assert_close(last.conv_2d.weight, torch.cat((theirs, 0 * theirs), dim=1), rtol=0, atol=0)
    torch.testing.assert_close(last.conv_3d.weight[:, :, 1], torch.cat((0 * theirs, theirs), dim=1), rtol=0, atol=0)
    image = make_video(1, 3, 1, 32, 40)
    still, expected = vae(image.repeat(1, 1, 5, 1, 1)).sample, vae(image).sample
    torch.testing.assert_close(still, expected.expand_as(still), rtol=0, atol=1e-4)  # measured: 2.2e-5
    # The third level has a shortcut there and none here: what it adds to is exact, whatever the projection.
    upsample, resnet = source.decoder.up_blocks[1].upsamplers[0].conv, source.decoder.up_blocks[2].resnets[0]
    ours = vae.decoder.blocks[10]
    x = make_video(1, 16, 1, 4, 4)
    expected = resnet.conv_shortcut(upsample(x[:, :, 0]))
    torch.testing.assert_close(ours.conv_2d(x)[:, :, 0], expected, rtol=0, atol=4e-6)  # measured: 7e-7


def test_what_does_not_fit_is_refused(tmp_path: Any):
    vae = make_tiny("ivvae")
    with pytest.raises(ValueError, match="`image_vae` must have 2 or 4 latent channels for this model, got 6"):
        initialize_from_image_vae(vae, make_tiny("ivvae", latent_channels=6))
    with pytest.raises(ValueError, match="with `use_keyframe_branch` false, got true"):
        initialize_from_image_vae(vae, make_tiny("ivvae"))
    with pytest.raises(ValueError, match="must have the `attention` of the model, all, got none"):
        initialize_from_image_vae(vae, make_image_vae(2, attention="none"))
    with pytest.raises(ValueError, match=r"must have block_out_channels \[4, 8, 12, 12\] and layers_per_block 2"):
        initialize_from_image_vae(vae, make_autoencoder_kl(layers_per_block=1))
    with pytest.raises(ValueError, match="`image_vae.path` must be a saved model, got 'nowhere'"):
        load_image_vae("nowhere")
    make_tiny("wfvae").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`image_vae.path` must be an AutoencoderKL .*an AutoencoderKLWFVAE"):
        load_image_vae(tmp_path)
