"""AutoencoderKLLeanVAE as a diffusers model; `test_golden.py` holds its numbers, `test_tiling.py` its streams."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


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
# Largest difference from float64, measured 0.035 and 0.21 on outputs of up to 21 (float32: 1.1e-5); four times that.
HALF_TOLERANCE = {torch.float16: 0.15, torch.bfloat16: 0.9}


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
    def test_image_is_a_video_of_one_frame(self, make_model: Callable, make_video: Callable):
        model, image = make_model(), make_video(2, 3, 16, 24)
        mean = model.encode(image).latent_dist.mean
        assert mean.shape == (2, 4, 1, 2, 3)
        assert torch.equal(mean, model.encode(image.unsqueeze(2)).latent_dist.mean)
        assert model(image).sample.shape == image.shape
        assert torch.equal(model(image).sample, model(image.unsqueeze(2)).sample.squeeze(2))
        assert torch.equal(model.decode(mean.squeeze(2)).sample, model.decode(mean).sample.squeeze(2))

    @torch.no_grad()
    def test_wan22_geometry(self, make_model: Callable, make_video: Callable):
        model = make_model(**WAN22)
        mean = model.encode(make_video(1, 3, 9, 32, 48)).latent_dist.mean
        assert mean.shape == (1, 48, 3, 2, 3)
        assert model.decode(mean).sample.shape == (1, 3, 9, 32, 48)
        assert (model.temporal_compression_ratio, model.spatial_compression_ratio) == (4, 16)
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
    @torch.no_grad()
    def test_batch_entries_are_independent_and_slicing_equals_whole(self, make_model: Callable, make_video: Callable):
        model, video = make_model(torch.float64), make_video(3, 3, 9, 16, 16, dtype=torch.float64)
        mean, reconstruction = model.encode(video).latent_dist.mean, model(video).sample
        alone = torch.cat([model(entry).sample for entry in video.split(1)])
        torch.testing.assert_close(alone, reconstruction, rtol=0, atol=1e-12)
        model.enable_slicing()
        torch.testing.assert_close(model.encode(video).latent_dist.mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(video).sample, reconstruction, rtol=0, atol=1e-12)
        model.disable_slicing()
        assert torch.equal(model(video).sample, reconstruction)

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
    def test_first_frame_is_the_image(self, make_model: Callable, make_video: Callable):
        model, video = make_model(torch.float64), make_video(1, 3, 9, 16, 16, dtype=torch.float64)
        image = model.encode(video[:, :, 0]).latent_dist.mean
        torch.testing.assert_close(model.encode(video).latent_dist.mean[:, :, :1], image, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_half_precision_is_near_double(self, make_model: Callable, make_video: Callable, dtype: torch.dtype):
        model, video = make_model(dtype), make_video(1, 3, 9, 16, 16)
        # Same rounded weights and pixels in float64: what is left is the arithmetic.
        exact = copy.deepcopy(model).double()(video.to(dtype).double()).sample
        reconstruction = model(video.to(dtype)).sample
        assert reconstruction.dtype == dtype
        assert exact.std() > 1
        torch.testing.assert_close(reconstruction.double(), exact, rtol=0, atol=HALF_TOLERANCE[dtype])

    @torch.no_grad()
    def test_float32_is_near_double(self, make_model: Callable, make_video: Callable):
        model, video = make_model(), make_video(1, 3, 9, 16, 16)
        exact = copy.deepcopy(model).double()(video.double()).sample
        torch.testing.assert_close(model(video).sample.double(), exact, rtol=0, atol=5e-5)

    def test_bfloat16_autocast(self, make_model: Callable, make_video: Callable):
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        expected = model(video).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reconstruction = model(video).sample
        torch.testing.assert_close(reconstruction.float(), expected, rtol=0, atol=HALF_TOLERANCE[torch.bfloat16])
        assert not torch.equal(reconstruction.float(), expected)
        reconstruction.float().square().mean().backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32
            for n, p in model.named_parameters()
            if "logvar" not in n
        )

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
        for settings in (before[""], after[""]):  # these four belong to `enable_tiling`
            for name in ("tile_sample_min_height", "tile_sample_min_width", "num_frames_per_chunk"):
                settings.pop(name)
        assert before == after
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(model(video).sample, first)


class TestTraining:
    def test_gradients_reach_pixels_latents_and_every_parameter(self, make_model: Callable, make_video: Callable):
        model, video = make_model().train(), make_video(1, 3, 5, 16, 16).requires_grad_()
        posterior = model.encode(video).latent_dist
        posterior.mean.retain_grad()
        loss = model.decode(posterior.mean).sample.square().mean() + posterior.logvar.square().mean()
        loss.backward()
        assert video.grad is not None and video.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 0
        assert posterior.mean.grad is not None and posterior.mean.grad.abs().min() > 0
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not idle

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

    @pytest.mark.parametrize("ablation", [ABLATIONS[0], ABLATIONS[-1]])
    def test_gradient_checkpointing_changes_nothing(self, make_model: Callable, make_video: Callable, ablation: dict):
        video, results = make_video(2, 3, 5, 16, 16), []
        for enabled in (False, True):
            model = make_model(**ablation).train()
            assert not model.is_gradient_checkpointing
            calls = []
            if enabled:
                model.enable_gradient_checkpointing()
                for blocks in (model.encoder.fusion_layers, model.decoder.fusion_layers):
                    function = blocks._gradient_checkpointing_func
                    blocks._gradient_checkpointing_func = lambda *a, f=function, c=calls: (c.append(1), f(*a))[1]
            output = model(video, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
            assert bool(calls) == enabled
            output.square().mean().backward()
            results.append([output.detach(), *(p.grad for p in model.parameters())])
        for plain, checkpointed in zip(*results, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)

    def test_tiled_forward_has_the_gradients_of_the_whole(self, make_model: Callable, make_video: Callable):
        video, gradients = make_video(1, 3, 9, 16, 24, dtype=torch.float64), []
        for tiled in (False, True):
            model = make_model(torch.float64)
            if tiled:
                model.enable_tiling(8, 8, 5)
            model(video).sample.square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10)

    def test_lora(self, make_model: Callable, make_video: Callable):
        peft = pytest.importorskip("peft", reason="peft is not installed (extra: test)")
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        base = model(video).sample.detach()
        num_layers = sum(name.endswith("ff.up_proj") for name, _ in model.named_modules())
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["ff.up_proj"], init_lora_weights=True)
        adapted = peft.get_peft_model(model, config)
        trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * num_layers > 0 and all("lora_" in name for name in trainable)
        torch.testing.assert_close(adapted(video).sample, base, rtol=0, atol=2e-5)
        optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(2):  # the first step moves B only, A has no gradient while B is zero
            optimizer.zero_grad()
            adapted(video).sample.square().mean().backward()
            optimizer.step()
        trained = adapted(video).sample.detach()
        assert (trained - base).abs().max() > 1e-3
        torch.testing.assert_close(adapted.merge_and_unload()(video).sample, trained, rtol=0, atol=1e-4)


class TestCompile:
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    @torch.no_grad()
    def test_full_graph_equals_eager(self, make_model: Callable, make_video: Callable, backend: str):
        torch.compiler.reset()
        model, video = make_model(num_fusion_layers=1), make_video(1, 3, 5, 16, 16)
        z = model.encode(video).latent_dist.mean
        encode = torch.compile(lambda x: model.encode(x, return_dict=False)[0].mean, fullgraph=True, backend=backend)
        decode = torch.compile(lambda x: model.decode(x, return_dict=False)[0], fullgraph=True, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                torch.testing.assert_close(encode(video), z, rtol=0, atol=1e-4)
                torch.testing.assert_close(decode(z), model.decode(z).sample, rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_repeated_blocks(self, make_model: Callable, make_video: Callable):
        torch.compiler.reset()
        model, video = make_model(num_fusion_layers=1), make_video(1, 3, 5, 16, 16)
        expected = model(video).sample
        names = {type(module).__name__ for module in model.modules()}
        assert set(AutoencoderKLLeanVAE._repeated_blocks) <= names
        assert set(AutoencoderKLLeanVAE._no_split_modules) <= names
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(video).sample, expected, rtol=0, atol=1e-5)


class TestMemory:
    @pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
    @torch.no_grad()
    def test_layerwise_casting(self, make_model: Callable, make_video: Callable, storage: torch.dtype):
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        rounded = make_model()
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        stored = {name: p.dtype for name, p in model.named_parameters()}
        assert {dtype for name, dtype in stored.items() if ".norm." in name} == {torch.float32}
        assert all(
            dtype == storage for name, dtype in stored.items() if name.endswith(("_proj.weight", "conv.weight"))
        )
        # Casting must do this and nothing else: round the weights that it stores.
        for name, parameter in rounded.named_parameters():
            parameter.copy_(parameter.to(stored[name]).to(torch.float32))
        assert torch.equal(model(video).sample, rounded(video).sample)
        assert model.dtype == torch.float32

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"offload_type": "leaf_level"},
            {"offload_type": "block_level", "num_blocks_per_group": 1},
            {"offload_type": "block_level", "num_blocks_per_group": 2, "non_blocking": True},
        ],
        ids=["leaf", "block", "non_blocking"],
    )
    @pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
    @torch.no_grad()
    def test_group_offload(self, tmp_path: Path, make_model: Callable, make_video: Callable, kwargs: dict, disk: bool):
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        expected, z = model(video).sample, model.encode(video).latent_dist.mean
        path = {"offload_to_disk_path": str(tmp_path)} if disk else {}
        model.enable_group_offload(torch.device("cpu"), **kwargs, **path)
        assert bool(list(tmp_path.iterdir())) == disk
        assert torch.equal(model(video).sample, expected)
        assert torch.equal(model.encode(video).latent_dist.mean, z)  # without `forward`: hooks must run here too
        assert torch.equal(model.decode(z).sample, expected)

    @torch.no_grad()
    def test_disk_offload(self, tmp_path: Path, make_model: Callable, make_video: Callable):
        model, video = make_model(), make_video(1, 3, 5, 16, 16)
        model.save_pretrained(tmp_path)
        device_map = {"encoder": "cpu", "bottleneck": "disk", "logvar_proj": "cpu", "decoder": "disk"}
        loaded = AutoencoderKLLeanVAE.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
        assert {p.device.type for p in loaded.decoder.parameters()} == {"meta"}
        assert torch.equal(loaded(video).sample, model(video).sample)


class TestWanPipeline:
    @torch.no_grad()
    def test_one_step(self, make_model: Callable):
        latents_mean, latents_std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
        vae = make_model(patch_size=(2, 4, 4), latents_mean=latents_mean, latents_std=latents_std)
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        assert (pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial) == (4, 8)
        arguments = {
            "prompt_embeds": torch.randn(1, 6, 16),
            "height": 16,
            "width": 32,
            "num_frames": 9,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
        }
        frames, latents = (
            pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type=kind).frames
            for kind in ("pt", "latent")
        )
        assert latents.shape == (1, 4, 3, 2, 4)
        assert frames.shape == (1, 9, 3, 16, 32)
        mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (latents_mean, latents_std))
        decoded = vae.decode(latents * std + mean).sample
        expected = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        "shape, message",
        [
            ((1, 3, 4, 16, 16), r"`num_frames` must be 4 \* n \+ 1 \(1, 5, 9, \.\.\.\), got 4\."),
            ((1, 3, 0, 16, 16), r"`num_frames` must be .* got 0\."),
            ((1, 3, 5, 12, 16), r"`height` and `width` must be positive multiples of 8, got 12 and 16\."),
            ((1, 3, 5, 16, 0), r"`height` and `width` must be positive multiples of 8, got 16 and 0\."),
            ((1, 4, 5, 16, 16), r"`x` must have shape \(batch_size, 3, .* got \(1, 4, 5, 16, 16\)\."),
            ((3, 16, 16), r"`x` must have shape .* got \(3, 16, 16\)\."),
        ],
    )
    def test_illegal_sample(self, make_model: Callable, shape: tuple, message: str):
        model = make_model()
        for call in (model.encode, model):
            with pytest.raises(ValueError, match=message):
                call(torch.zeros(shape))

    @pytest.mark.parametrize(
        "shape", [(1, 5, 2, 2, 2), (1, 4, 0, 2, 2), (1, 4, 2, 0, 2), (4, 2, 2), (1, 3, 2, 2)], ids=str
    )
    def test_illegal_latents(self, make_model: Callable, shape: tuple):
        message = r"`z` must have shape \(batch_size, 4, num_latent_frames, latent_height, latent_width\) or .* got \("
        with pytest.raises(ValueError, match=message):
            make_model().decode(torch.zeros(shape))

    def test_illegal_dtype(self, make_model: Callable):
        model = make_model()
        for call, name, shape in ((model.encode, "x", (1, 3, 5, 16, 16)), (model.decode, "z", (1, 4, 2, 2, 2))):
            for dtype in (torch.float64, torch.bfloat16):
                message = rf"`{name}` must have the model's dtype torch\.float32, got {dtype}\."
                with pytest.raises(ValueError, match=message):
                    call(torch.zeros(shape, dtype=dtype))
            for dtype in (torch.uint8, torch.int64, torch.complex64):
                with pytest.raises(ValueError, match=rf"`{name}` must be a floating-point tensor, got {dtype}\."):
                    call(torch.zeros(shape, dtype=dtype))

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
        ],
    )
    def test_illegal_config(self, make_model: Callable, config: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            make_model(**config)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((12, None, None), r"`tile_sample_min_height` must be a positive multiple of 8, got 12\."),
            ((None, 0, None), r"`tile_sample_min_width` must be a positive multiple of 8, got 0\."),
            ((None, -8, None), r"`tile_sample_min_width` must be a positive multiple of 8, got -8\."),
            ((None, None, 8), r"`num_frames_per_chunk` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 8\."),
            ((None, None, 1), r"`num_frames_per_chunk` must be .* got 1\."),
        ],
    )
    def test_illegal_tiling(self, make_model: Callable, arguments: tuple, message: str):
        model = make_model()
        with pytest.raises(ValueError, match=message):
            model.enable_tiling(*arguments)
        # A refused call leaves the model as it was.
        assert not model.use_tiling and model.tile_sample_min_height == model.tile_sample_min_width == 256
