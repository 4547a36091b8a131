"""What only AutoencoderKLLeanVAE has; `test_video_autoencoders.py` holds what all models do."""

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.leanvae_blocks import LeanVAEBlock


ABLATIONS = [
    pytest.param(
        {"patch_embedding_type": embedding, "bottleneck_type": bottleneck, "patch_norm": norm},
        id=f"{embedding}-{bottleneck}-{'norm' if norm else 'plain'}",
    )
    for embedding in ("separate", "joint", "no_wavelet")
    for bottleneck in ("compressed_sensing", "linear")
    for norm in (False, True)
]
WAN22 = {"patch_size": (2, 8, 8), "latent_channels": 48, "pixel_factor": 1.0}


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = model.state_dict()
    assert other.state_dict().keys() == expected.keys()
    for key, tensor in other.state_dict().items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


class TestSaving:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_round_trip_keeps_dtype_and_bits(self, tmp_path: Path, make_model: Callable, dtype: torch.dtype):
        model = make_model(dtype)
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        loaded = AutoencoderKLLeanVAE.from_pretrained(tmp_path, torch_dtype=dtype)
        assert not loaded.training
        assert_same_weights(model, loaded)

    def test_torch_dtype_casts(self, tmp_path: Path, make_model: Callable):
        model = make_model()
        model.save_pretrained(tmp_path)
        assert_same_weights(
            model.to(torch.bfloat16), AutoencoderKLLeanVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        )

    def test_variant(self, tmp_path: Path, make_model: Callable):
        model = make_model()
        model.save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
        assert_same_weights(model, AutoencoderKLLeanVAE.from_pretrained(tmp_path, variant="fp16"))
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            AutoencoderKLLeanVAE.from_pretrained(tmp_path)

    @pytest.mark.parametrize("variant", [None, "ema"])
    def test_shards(self, tmp_path: Path, make_model: Callable, variant: str | None):
        model = make_model()
        model.save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert len(list(tmp_path.glob("*.index*.json"))) == 1
        assert_same_weights(model, AutoencoderKLLeanVAE.from_pretrained(tmp_path, variant=variant))

    def test_config_round_trip(self, tmp_path: Path, make_model: Callable):
        config = {
            "latents_mean": [0.5, -1.0, 0.0, 2.0],
            "latents_std": [1.0, 2.0, 3.0, 0.25],
            "scaling_factor": 0.7744,
            "pixel_factor": 1.0,
            "patch_embedding_type": "joint",
            "bottleneck_type": "linear",
            "patch_norm": True,
            "patch_size": (1, 2, 2),
        }
        make_model(**config).save_pretrained(tmp_path)
        loaded = AutoencoderKLLeanVAE.from_pretrained(tmp_path).config
        for name, value in config.items():
            assert loaded[name] == (list(value) if isinstance(value, tuple) else value), name
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["_class_name"] == "AutoencoderKLLeanVAE"
        # Derived names are answered, never stored: the ratios have one home.
        assert not {"z_dim", "scale_factor_temporal", "scale_factor_spatial"} & stored.keys()
        assert (loaded.z_dim, loaded.scale_factor_temporal, loaded.scale_factor_spatial) == (4, 2, 4)


class TestShapes:
    @pytest.mark.parametrize(
        "shape, latent_shape",
        [
            ((1, 3, 1, 8, 8), (1, 4, 1, 1, 1)),
            ((2, 3, 1, 16, 24), (2, 4, 1, 2, 3)),
            ((1, 3, 5, 16, 8), (1, 4, 2, 2, 1)),
            ((2, 3, 17, 8, 24), (2, 4, 5, 1, 3)),
        ],
    )
    @torch.no_grad()
    def test_video(self, make_model: Callable, make_video: Callable, shape: tuple, latent_shape: tuple):
        model, video = make_model(), make_video(*shape)
        encoded = model.encode(video)
        assert isinstance(encoded, AutoencoderKLOutput)
        assert encoded.latent_dist.mean.shape == encoded.latent_dist.logvar.shape == latent_shape
        assert torch.equal(model.encode(video, return_dict=False)[0].mean, encoded.latent_dist.mean)
        decoded = model.decode(encoded.latent_dist.mean)
        assert isinstance(decoded, DecoderOutput) and decoded.sample.shape == shape
        assert torch.equal(model.decode(encoded.latent_dist.mean, return_dict=False)[0], decoded.sample)
        assert torch.equal(model(video).sample, decoded.sample)
        assert torch.equal(model(video, return_dict=False)[0], decoded.sample)

    @torch.no_grad()
    def test_wan22_geometry(self, make_model: Callable, make_video: Callable):
        model = make_model(**WAN22)
        mean = model.encode(make_video(1, 3, 9, 32, 48)).latent_dist.mean
        assert mean.shape == (1, 48, 3, 2, 3)
        assert model.decode(mean).sample.shape == (1, 3, 9, 32, 48)
        assert (model.temporal_compression_ratio, model.spatial_compression_ratio) == (4, 16)
        assert model.temperal_downsample == (False, False, True, True) and len(model.config.block_out_channels) == 5
        assert [model.num_latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
        assert [model.num_sample_frames(n) for n in (1, 2, 21)] == [1, 5, 81]

    @pytest.mark.parametrize("ablation", ABLATIONS)
    def test_every_ablation_trains(self, make_model: Callable, make_video: Callable, ablation: dict[str, Any]):
        model, video = make_model(**ablation), make_video(1, 3, 5, 16, 16)
        reconstruction = model(video, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
        assert reconstruction.shape == video.shape
        reconstruction.square().mean().backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not idle
        assert model.encode(video).latent_dist.mean.shape == (1, 4, 2, 2, 2)

    @pytest.mark.parametrize("ablation", ABLATIONS[::2])
    @torch.no_grad()
    def test_subbands_are_what_decode_synthesizes(self, make_model: Callable, make_video: Callable, ablation: dict):
        model, video = make_model(torch.float64, **ablation), make_video(1, 3, 9, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(model.synthesize(model.analyze(video)), video, rtol=0, atol=1e-14)
        z = model.encode(video).latent_dist.mean
        decoded = model.synthesize(model.decode_subbands(z))
        torch.testing.assert_close(decoded, model.decode(z).sample, rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_pixel_factor_only_scales_pixels(self, make_model: Callable, make_video: Callable):
        half, whole, video = make_model(), make_model(pixel_factor=1.0), make_video(1, 3, 5, 16, 16)
        # Factors of two are exact, so not a bit may differ.
        assert torch.equal(half(video).sample, 2 * whole(video / 2).sample)


class TestPosterior:
    @torch.no_grad()
    def test_sample_follows_mean_std_and_generator(self, make_model: Callable, make_video: Callable):
        posterior = make_model().encode(make_video(1, 3, 5, 16, 16)).latent_dist
        samples = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(samples[0], posterior.mean + posterior.std * noise, rtol=0, atol=1e-6)
        assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
        assert torch.equal(posterior.mode(), posterior.mean)
        torch.testing.assert_close(posterior.std, torch.exp(0.5 * posterior.logvar), rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_logvar_is_clamped(self, make_model: Callable, make_video: Callable):
        model = make_model()
        model.logvar_proj.weight.zero_()
        model.logvar_proj.bias.copy_(torch.tensor([100.0, -100.0, 1.0, 0.0]))
        logvar = model.encode(make_video(1, 3, 5, 8, 8)).latent_dist.logvar
        expected = torch.tensor([20.0, -30.0, 1.0, 0.0]).view(1, 4, 1, 1, 1).expand_as(logvar)
        assert torch.equal(logvar, expected)

    @torch.no_grad()
    def test_forward_decodes_mode_or_sample(self, make_model: Callable, make_video: Callable):
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        posterior = model.encode(video).latent_dist
        assert torch.equal(model(video).sample, model.decode(posterior.mode()).sample)
        sampled = model(video, sample_posterior=True, generator=torch.Generator().manual_seed(7)).sample
        expected = model.decode(posterior.sample(torch.Generator().manual_seed(7))).sample
        assert torch.equal(sampled, expected) and not torch.equal(sampled, model(video).sample)


class TestNumerics:
    @pytest.mark.parametrize("ablation", ABLATIONS[::3])
    @torch.no_grad()
    def test_causality(self, make_model: Callable, make_video: Callable, ablation: dict[str, Any]):
        model, video = make_model(torch.float64, **ablation), make_video(1, 3, 13, 16, 16, dtype=torch.float64)
        changed = video.clone()
        changed[:, :, 5:9] *= -1  # frames of the third latent frame
        difference = (model.encode(changed).latent_dist.mean - model.encode(video).latent_dist.mean).abs()
        assert difference[:, :, :2].max() == 0
        assert difference[:, :, 2].max() > 1e-3 and difference[:, :, 3].max() > 1e-3
        z = model.encode(video).latent_dist.mean
        changed = z.clone()
        changed[:, :, 2] *= -1
        difference = (model.decode(changed).sample - model.decode(z).sample).abs()
        assert difference[:, :, :5].max() == 0
        assert difference[:, :, 5:9].max() > 1e-3 and difference[:, :, 9:].max() > 1e-3

    @torch.no_grad()
    def test_float32_is_near_double(self, make_model: Callable, make_video: Callable):
        model, video = make_model(), make_video(1, 3, 9, 16, 16)
        exact = copy.deepcopy(model).double()(video.double()).sample
        torch.testing.assert_close(model(video).sample.double(), exact, rtol=0, atol=5e-5)

    @torch.no_grad()
    def test_forward_is_deterministic_and_leaves_no_trace(self, make_model: Callable, make_video: Callable):
        def snapshot(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
            return {
                name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
                for name, module in model.named_modules()
            }

        model, video = make_model(), make_video(2, 3, 9, 16, 16)
        weights = copy.deepcopy(model.state_dict())
        before, first = snapshot(model), model(video).sample
        model.enable_tiling(8, 8, 5)
        model.enable_slicing()
        model(video)
        model(video[:, :, 0])
        model.disable_tiling()
        model.disable_slicing()
        after = snapshot(model)
        for settings in (before[""], after[""]):  # these three belong to `enable_tiling`
            for name in ("tile_sample_min_height", "tile_sample_min_width", "num_frames_per_chunk"):
                settings.pop(name)
        assert before == after
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(model(video).sample, first)


class TestTraining:
    def test_gradient_check_in_double(self, make_model: Callable, make_video: Callable):
        model, video = make_model(torch.float64), make_video(1, 3, 5, 8, 8, dtype=torch.float64)
        direction = make_video(*video.shape, dtype=torch.float64, seed=2)
        video.requires_grad_()
        model(video).sample.sin().sum().backward()
        analytic = (video.grad * direction).sum()
        with torch.no_grad():
            step = 1e-6
            above, below = (model(video + sign * step * direction).sample.sin().sum() for sign in (1, -1))
        torch.testing.assert_close((above - below) / (2 * step), analytic, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("widths", [(4, 12), (16, 48), (48, 144)])
    def test_narrow_models_start_alive(self, make_video: Callable, widths: tuple[int, int]):
        """With the reference's deviation at every width, these gradients would be zero."""
        torch.manual_seed(0)
        model = AutoencoderKLLeanVAE(latent_channels=4, low_freq_dim=widths[0], high_freq_dim=widths[1])
        video = make_video(1, 3, 5, 32, 32)
        (model(video).sample - video).abs().mean().backward()
        for iteration in model.bottleneck.iterations:
            assert torch.nn.utils.get_total_norm(p.grad for p in iteration.forward_transform.parameters()) > 1e-3

    def test_initial_weights_are_the_references(self):
        model: Any = AutoencoderKLLeanVAE(latent_channels=4)  # of the released width
        iteration = model.bottleneck.iterations[1]
        for linear in (model.decoder.video_high_proj, iteration.backward_transform[0].ff.up_proj):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01)
            assert linear.bias is None or not linear.bias.any()

    def test_lora(self, make_model: Callable, make_video: Callable):
        peft = pytest.importorskip("peft", reason="peft is not installed (extra: test)")
        model, video = make_model(torch.float64), make_video(1, 3, 5, 16, 16, dtype=torch.float64)
        base = model(video).sample.detach()
        num_layers = sum(name.endswith("ff.up_proj") for name, _ in model.named_modules())
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["ff.up_proj"], init_lora_weights=True)
        adapted = peft.get_peft_model(model, config)
        trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * num_layers > 0 and all("lora_" in name for name in trainable)
        torch.testing.assert_close(adapted(video).sample, base, rtol=0, atol=1e-12)
        optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(2):  # the first step moves B only, A has no gradient while B is zero
            optimizer.zero_grad()
            adapted(video).sample.square().mean().backward()
            optimizer.step()
        trained = adapted(video).sample.detach()
        assert (trained - base).abs().max() > 1e-3
        torch.testing.assert_close(adapted.merge_and_unload()(video).sample, trained, rtol=0, atol=1e-12)


class TestErrors:
    @pytest.mark.parametrize(
        "config, message",
        [
            ({"patch_embedding_type": "both"}, r"`patch_embedding_type` must be one of 'separate', .* got 'both'\."),
            (
                {"bottleneck_type": "vq"},
                r"`bottleneck_type` must be one of 'compressed_sensing', 'linear', got 'vq'\.",
            ),
            ({"patch_size": (2, 4)}, r"`patch_size` must be three positive integers .* got \(2, 4\)\."),
            ({"patch_size": (2, 4, 8)}, r"`patch_size` must be .* height = width, got \(2, 4, 8\)\."),
            ({"patch_size": (0, 4, 4)}, r"`patch_size` must be .* got \(0, 4, 4\)\."),
            ({"latents_mean": [0.0] * 3}, r"`latents_mean` must have 4 entries, got 3\."),
            ({"latents_std": [1.0] * 16}, r"`latents_std` must have 4 entries, got 16\."),
            (
                {"latents_std": [1.0] * 4},
                "`latents_mean` and `latents_std` must be given together, got no `latents_m",
            ),
            ({"pixel_factor": 0.0}, r"`pixel_factor` must be a finite number above 0, got 0\.0\."),
            ({"pixel_factor": -1.0}, r"`pixel_factor` must be a finite number above 0, got -1\.0\."),
            ({"pixel_factor": math.nan}, r"`pixel_factor` must be a finite number above 0, got nan\."),
            ({"pixel_factor": "x"}, r"`pixel_factor` must be a finite number above 0, got 'x'\."),
        ],
    )
    def test_illegal_config(self, make_model: Callable, config: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            make_model(**config)


def test_a_layer_by_itself_leaves_its_input_alone():
    # As if the package had first been used where gradients are off.
    spec = importlib.util.find_spec("diffusers_leanvae.models.temporal_cache")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.no_grad():
        spec.loader.exec_module(module)
        tokens = torch.randn(1, 2, 3, 3, 8)
        before = tokens.clone()
        assert not torch.equal(LeanVAEBlock(8)(tokens, module.WHOLE), before)
    assert torch.equal(tokens, before)
