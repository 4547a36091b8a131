"""`LeanVAELatteTransformer3DModel` as a model of diffusers: sizes, positions, images, mixins, compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from tiny import make_tiny

from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel, latte_variant


TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "sample_size": 8,
    "num_latent_frames": 5,
    "num_classes": 10,
}


def make_transformer(seed: int = 0, **config: Any) -> Any:
    return make_tiny("latte", seed=seed, **(TINY | config))


def make_inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Latents `(B, C, F, h, w)`, with steps and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.randint(1000, shape[:1], generator=generator),
        "class_labels": torch.randint(11, shape[:1], generator=generator),
    }


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class TestSizes:
    @pytest.mark.parametrize(
        "name, millions",
        # The reference's: patch size 2, four channels, no labels; the two tables are buffers
        [("S/2", 32_480_672), ("B/2", 129_547_040), ("L/2", 456_815_648), ("XL/2", 673_681_568)],
    )
    def test_variants(self, name: str, millions: int):
        with torch.device("meta"):
            model = LeanVAELatteTransformer3DModel(**latte_variant(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == millions
        assert model.pos_embed.shape == (1, 256, model.inner_dim) and model.temp_embed.shape == (1, 5, model.inner_dim)

    def test_default_is_the_released_size(self):
        with torch.device("meta"):
            model = LeanVAELatteTransformer3DModel()
        assert {name: model.config[name] for name in latte_variant("XL/2")} == latte_variant("XL/2")
        assert [latte_variant(f"XL/{p}")["patch_size"] for p in (2, 4, 8)] == [2, 4, 8]

    @pytest.mark.parametrize("name", ["XL", "XL/3", "M/2", "xl/2", "XL/2/2", ""])
    def test_unknown_variant(self, name: str):
        with pytest.raises(ValueError, match=rf"`name` must be a size S, B, L, XL .* got {name!r}\."):
            latte_variant(name)

    @pytest.mark.parametrize("patch_size", [1, 2, 4])
    @pytest.mark.parametrize("out_channels", [None, 4, 8])
    @torch.no_grad()
    def test_shapes(self, patch_size: int, out_channels: int | None):
        model = make_transformer(patch_size=patch_size, out_channels=out_channels)
        sample = model(**make_inputs(2, 4, 5, 8, 8)).sample
        assert sample.shape == (2, out_channels or 8, 5, 8, 8)
        assert sample.std() > 0.1

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"attention_head_dim": 15}, r"`num_attention_heads` \* `attention_head_dim` must be .* 4, got 30\."),
            ({"num_layers": 3}, r"`num_layers` must be a positive even number, got 3\."),
            ({"num_layers": 0}, r"`num_layers` must be a positive even number, got 0\."),
            ({"sample_size": 9}, r"`sample_size` must be a multiple of `patch_size` \(2\), got 9\."),
            ({"out_channels": 5}, r"`out_channels` must be 4 or 8, got 5\."),
            ({"num_classes": 0}, r"`num_classes` must be positive or `None`, got 0\."),
        ],
    )
    def test_config_errors(self, config: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            LeanVAELatteTransformer3DModel(**(TINY | config))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"hidden_states": torch.zeros(2, 4, 8, 8)}, r"`hidden_states` must have shape .* got \(2, 4, 8, 8\)\."),
            ({"hidden_states": torch.zeros(2, 3, 5, 8, 8)}, r"`hidden_states` must have shape \(batch_size, 4, "),
            ({"hidden_states": torch.zeros(2, 4, 5, 7, 8)}, r"sides in multiples of 2, got 7 x 8\."),
            ({"hidden_states": torch.zeros(2, 4, 5, 0, 8)}, r"sides in multiples of 2, got 0 x 8\."),
            ({"hidden_states": torch.zeros(2, 4, 5, 10, 8)}, r"up to 8 with stored positions .* got 10 and 8\."),
            ({"hidden_states": torch.zeros(2, 4, 6, 8, 8)}, r"up to 5 latent frames with stored .* got 6\."),
            ({"num_images": 5}, r"`num_images` must be 0 to 4 for 5 latent frames, got 5\."),
            ({"num_images": -1}, r"`num_images` must be 0 to 4 for 5 latent frames, got -1\."),
            ({"class_labels": None}, r"`class_labels` must be given for a class-conditional model, got None\."),
            ({"class_labels": torch.zeros(3).long()}, r"`class_labels` must have shape \(2,\), got \(3,\)\."),
            ({"class_labels": torch.zeros(2, 3).long(), "num_images": 1}, r"shape \(2,\) or \(2, 2\), got \(2, 3\)\."),
            ({"timestep": torch.zeros(3).long()}, r"`timestep` must have shape \(2,\) or \(\), got \(3,\)\."),
        ],
    )
    def test_input_errors(self, change: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            make_transformer()(**(make_inputs(2, 4, 5, 8, 8) | change))

    def test_labels_without_classes(self):
        with pytest.raises(ValueError, match=r"`class_labels` must be `None` for an unconditional model, got "):
            make_transformer(num_classes=None)(**make_inputs(2, 4, 5, 8, 8))


class TestConditions:
    def test_fresh_model_gives_zero(self):
        sample = LeanVAELatteTransformer3DModel(**TINY)(**make_inputs(2, 4, 5, 8, 8)).sample
        assert torch.equal(sample, torch.zeros(2, 8, 5, 8, 8))

    def test_initialization(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LeanVAELatteTransformer3DModel(num_attention_heads=4, attention_head_dim=32, num_layers=2)
        block = model.transformer_blocks[0]
        # Xavier-uniform: a standard deviation of (2 / (inputs + outputs)) ** 0.5; query, key and value are one matrix.
        for weight, inputs, outputs in [
            (block.attn.to_q.weight, 128, 3 * 128),
            (block.attn.to_v.weight, 128, 3 * 128),
            (block.attn.to_out[0].weight, 128, 128),
            (block.ff.net[0].proj.weight, 128, 512),
            (model.patch_embed.proj.weight, 16, 128),
        ]:
            assert weight.std().item() == pytest.approx((2 / (inputs + outputs)) ** 0.5, rel=0.04)
        assert model.timestep_embedder.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.04)
        zero = (block.norm1.linear, model.norm_out.linear, model.proj_out)
        assert all(torch.count_nonzero(p) == 0 for module in zero for p in module.parameters())
        assert all(torch.count_nonzero(p) == 0 for name, p in model.named_parameters() if name.endswith("bias"))

    @torch.no_grad()
    def test_every_condition_counts(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        sample = model(**inputs).sample
        for change in ({"timestep": inputs["timestep"] + 1}, {"class_labels": torch.tensor([10, 10])}):
            assert (model(**(inputs | change)).sample - sample).abs().max() > 1e-3
        assert_close(model(**(inputs | {"timestep": inputs["timestep"].float()})).sample, sample, 0)

    @torch.no_grad()
    def test_one_timestep_for_all(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        one = model(**(inputs | {"timestep": torch.tensor(7)})).sample
        assert_close(one, model(**(inputs | {"timestep": torch.tensor([7, 7])})).sample, 0)

    @torch.no_grad()
    def test_samples_do_not_meet(self):
        model, inputs = make_transformer(), make_inputs(3, 4, 5, 8, 8)
        sample = model(**inputs).sample
        for index in range(3):
            alone = model(**{name: tensor[index : index + 1] for name, tensor in inputs.items()}).sample
            assert_close(alone, sample[index : index + 1], 1e-5)

    def test_labels_are_never_dropped(self):
        model, inputs = make_transformer().train(), make_inputs(64, 4, 5, 8, 8)
        assert torch.equal(model(**inputs).sample, model(**inputs).sample)

    @torch.no_grad()
    def test_time_is_seen_in_both_directions(self):
        model, inputs = make_transformer(), make_inputs(1, 4, 5, 8, 8)
        sample = model(**inputs).sample
        for index in (0, 4):
            changed = inputs["hidden_states"].clone()
            changed[:, :, index] += 1
            difference = (model(**(inputs | {"hidden_states": changed})).sample - sample).abs().amax(dim=(0, 1, 3, 4))
            assert difference.min() > 1e-4

    def test_returns_a_tuple_on_request(self):
        model, inputs = make_transformer(), make_inputs(1, 4, 5, 8, 8)
        (sample,) = model(**inputs, return_dict=False)
        assert torch.equal(sample, model(**inputs).sample)


class TestImages:
    @torch.no_grad()
    def test_images_and_video_do_not_meet(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 7, 8, 8)
        sample = model(**inputs, num_images=2).sample
        video = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :5]}
        assert_close(sample[:, :, :5], model(**video).sample)
        changed = inputs["hidden_states"].clone()
        changed[:, :, 6] += 1
        difference = (model(**(inputs | {"hidden_states": changed}), num_images=2).sample - sample).abs()
        assert difference[:, :, 6].max() > 1e-2
        assert torch.equal(difference[:, :, :6], torch.zeros_like(difference[:, :, :6]))

    @torch.no_grad()
    def test_an_image_does_not_depend_on_its_place(self):
        model, inputs = make_transformer(), make_inputs(1, 4, 7, 8, 8)
        inputs["hidden_states"][:, :, 6] = inputs["hidden_states"][:, :, 5]
        sample = model(**inputs, num_images=2).sample
        assert_close(sample[:, :, 6], sample[:, :, 5])

    @torch.no_grad()
    def test_labels_of_images(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 7, 8, 8)
        labels = inputs["class_labels"]
        shared = model(**inputs, num_images=2).sample
        repeated = {**inputs, "class_labels": torch.stack((labels, labels, labels), dim=1)}
        assert_close(model(**repeated, num_images=2).sample, shared, 0)
        other = {**inputs, "class_labels": torch.stack((labels, labels, (labels + 1) % 11), dim=1)}
        sample = model(**other, num_images=2).sample
        assert_close(sample[:, :, :6], shared[:, :, :6], 0)
        moved = {**inputs, "class_labels": (labels + 1) % 11}
        assert_close(sample[:, :, 6], model(**moved, num_images=2).sample[:, :, 6])
        assert (sample[:, :, 6] - shared[:, :, 6]).abs().max() > 1e-3

    def test_images_train_spatial_blocks_only(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 7, 8, 8)
        model(**inputs, num_images=2).sample[:, :, 5:].sum().backward()
        assert all(parameter.grad is not None for parameter in model.transformer_blocks.parameters())
        gradients = [parameter.grad for parameter in model.temporal_transformer_blocks.parameters()]
        assert all(gradient is None or torch.count_nonzero(gradient) == 0 for gradient in gradients)

    @torch.no_grad()
    def test_unconditional(self):
        model, inputs = make_transformer(num_classes=None), make_inputs(2, 4, 7, 8, 8)
        del inputs["class_labels"]
        sample = model(**inputs, num_images=2).sample
        video = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :5]}
        assert_close(sample[:, :, :5], model(**video).sample)


class TestPositions:
    @pytest.fixture
    def model(self) -> Any:
        model = make_transformer(sample_size=12)  # a grid of 6 x 6
        with torch.no_grad():  # as after training: not the formula's
            model.pos_embed.mul_(0.9)
            model.temp_embed.mul_(0.9)
        return model

    def test_tables_are_weights(self, model: Any, tmp_path: Path):
        model.save_pretrained(tmp_path)
        loaded = LeanVAELatteTransformer3DModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.pos_embed, model.pos_embed) and torch.equal(loaded.temp_embed, model.temp_embed)
        assert not {"pos_embed", "temp_embed"} & dict(loaded.named_parameters()).keys()

    def test_stored_takes_centre_and_first_frames(self, model: Any):
        grid = model.pos_embed.view(6, 6, -1)
        assert torch.equal(model._spatial_positions(6, 6), model.pos_embed)
        assert torch.equal(model._spatial_positions(4, 2).view(4, 2, -1), grid[1:5, 2:4])
        assert torch.equal(model._spatial_positions(3, 6).view(3, 6, -1), grid[1:4])
        assert torch.equal(model._temporal_positions(3), model.temp_embed[:, :3])

    @pytest.mark.parametrize("mode", ["interpolate", "extrapolate"])
    def test_size_of_the_tables_is_untouched(self, model: Any, mode: str):
        model.set_position_mode(mode)
        assert model._spatial_positions(6, 6) is model.pos_embed
        assert model._temporal_positions(5) is model.temp_embed

    def test_interpolate(self, model: Any):
        model.set_position_mode("interpolate")
        grid, larger = model.pos_embed.view(6, 6, -1), model._spatial_positions(11, 11).view(11, 11, -1)
        assert_close(larger[::2, ::2], grid, 1e-6)  # 11 places at half the distance
        assert 0.3 < (larger[1, 0] - grid[0, 0]).norm() / (grid[1, 0] - grid[0, 0]).norm() < 0.7
        smaller = model._spatial_positions(2, 3).view(2, 3, -1)
        assert_close(smaller[[0, 0, 1, 1], [0, 2, 0, 2]], grid[[0, 0, 5, 5], [0, 5, 0, 5]], 1e-6)
        frames = model._temporal_positions(9)
        assert_close(frames[:, ::2], model.temp_embed, 1e-6)
        assert_close(frames[:, 1], model.temp_embed[:, :2].mean(dim=1), 1e-6)

    def test_extrapolate(self, model: Any):
        model.set_position_mode("extrapolate")
        grid, larger = model.pos_embed.view(6, 6, -1), model._spatial_positions(10, 7).view(10, 7, -1)
        assert torch.equal(larger[2:8, 1:], grid)  # 10 rows around 6, one more column to the left
        half = model.inner_dim // 2
        rows = get_1d_sincos_pos_embed_from_grid(half, torch.arange(-2, 8), output_type="pt").float()
        columns = get_1d_sincos_pos_embed_from_grid(half, torch.arange(-1, 6), output_type="pt").float()
        assert torch.equal(larger[0, :, half:], rows[:1].expand(7, -1))
        assert torch.equal(larger[9, :, :half], columns)
        assert torch.equal(larger[:, 0, half:], rows)
        wide = model._spatial_positions(4, 8).view(4, 8, -1)  # smaller in one direction, larger in the other
        assert torch.equal(wide[:, 1:7], grid[1:5])
        assert torch.equal(wide[0, 0, :half], columns[0])
        assert torch.equal(model._spatial_positions(4, 2).view(4, 2, -1), grid[1:5, 2:4])
        frames = model._temporal_positions(7)
        later = get_1d_sincos_pos_embed_from_grid(model.inner_dim, torch.arange(5, 7), output_type="pt").float()
        assert torch.equal(frames, torch.cat((model.temp_embed[0], later))[None])

    def test_formula_continues_the_fresh_tables(self):
        small, large = make_transformer(), make_transformer(sample_size=12, num_latent_frames=9)
        small.set_position_mode("extrapolate")
        assert torch.equal(small._temporal_positions(9), large.temp_embed)
        # The same formula, counted from the corner of the smaller grid.
        actual, expected = small._spatial_positions(6, 6).view(6, 6, -1), large.pos_embed.view(6, 6, -1)
        assert torch.equal(actual[1:, 1:], expected[:5, :5])

    @pytest.mark.parametrize("mode", ["interpolate", "extrapolate"])
    @torch.no_grad()
    def test_forward_at_other_sizes(self, mode: str):
        model = make_transformer()
        model.set_position_mode(mode)
        for shape in ((5, 12, 16), (9, 8, 8), (2, 4, 12)):
            sample = model(**make_inputs(2, 4, *shape)).sample
            assert sample.shape == (2, 8, *shape) and sample.isfinite().all()

    @torch.no_grad()
    def test_modes_of_space_and_time_are_apart(self):
        model, inputs = make_transformer(), make_inputs(1, 4, 7, 12, 12)
        samples = {}
        for mode in ("interpolate", "extrapolate"):
            for temporal_mode in ("interpolate", "extrapolate"):
                model.set_position_mode(mode, temporal_mode)
                samples[mode, temporal_mode] = model(**inputs).sample
        values = list(samples.values())
        assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(values) for b in values[:i])
        model.set_position_mode("interpolate", "stored")
        with pytest.raises(ValueError, match=r"up to 5 latent frames with stored positions .* got 7\."):
            model(**inputs)

    @pytest.mark.parametrize("args, name", [(("nearest",), "mode"), (("stored", "nearest"), "temporal_mode")])
    def test_unknown_mode(self, args: tuple[str, ...], name: str):
        model = make_transformer()
        with pytest.raises(ValueError, match=rf"`{name}` must be one of 'stored', .* got 'nearest'\."):
            model.set_position_mode(*args)
        assert model.position_mode == "stored"


class TestTraining:
    def test_gradient_checkpointing_is_exact(self):
        gradients = []
        for enabled in (False, True):
            model, inputs = make_transformer().train(), make_inputs(2, 4, 7, 8, 8)
            if enabled:
                model.enable_gradient_checkpointing()
            model(**inputs, num_images=2).sample.square().mean().backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
        assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])

    def test_checkpointing_keeps_less(self):
        kept = []
        for enabled in (False, True):
            model, inputs = make_transformer(num_layers=8).train(), make_inputs(2, 4, 5, 8, 8)
            if enabled:
                model.enable_gradient_checkpointing()
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
                model(**inputs)
            kept.append(sum(sizes))
        assert kept[1] < kept[0] / 4

    def test_lora(self, tmp_path: Path):
        peft = pytest.importorskip("peft")
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        plain = model(**inputs).sample
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        adapted = model(**inputs).sample
        assert (adapted - plain).abs().max() > 1e-3
        adapted.square().mean().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("lora" in name for name in trained)
        model.save_lora_adapter(tmp_path)
        model.disable_adapters()
        assert_close(model(**inputs).sample, plain, 0)
        other = make_transformer()
        other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
        assert_close(other(**inputs).sample, adapted, 0)

    @torch.no_grad()
    def test_adapters_must_be_merged_before_saving(self, tmp_path: Path):
        peft = pytest.importorskip("peft")
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        adapted = model(**inputs).sample
        message = r"^`save_pretrained` must be called on a model without adapters, got .*_blocks\.0\.attn\.to_q': call"
        for call in (lambda: None, model.fuse_lora):
            call()
            with pytest.raises(ValueError, match=message):
                model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        model.unload_lora()
        model.save_pretrained(tmp_path)
        assert_close(LeanVAELatteTransformer3DModel.from_pretrained(tmp_path)(**inputs).sample, adapted, 1e-5)


class TestDiffusers:
    @pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
    @torch.no_grad()
    def test_save_and_load(self, tmp_path: Path, shards: bool):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        model.save_pretrained(tmp_path, **({"max_shard_size": "64KB"} if shards else {}))
        assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards
        loaded = LeanVAELatteTransformer3DModel.from_pretrained(tmp_path)
        assert not loaded.training
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)

    @pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.15), (torch.float64, 1e-5)], ids=str)
    @torch.no_grad()
    def test_dtypes(self, tmp_path: Path, dtype: torch.dtype, atol: float):
        model = make_transformer()
        expected = model(**make_inputs(2, 4, 5, 8, 8)).sample  # up to 4
        model.save_pretrained(tmp_path)
        loaded = LeanVAELatteTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        loaded.set_position_mode("interpolate")
        assert loaded(**make_inputs(1, 4, 7, 10, 8, dtype=dtype)).sample.dtype == dtype
        loaded.set_position_mode("extrapolate")
        assert loaded(**make_inputs(1, 4, 7, 10, 8, dtype=dtype)).sample.dtype == dtype
        sample = loaded(**make_inputs(2, 4, 5, 8, 8, dtype=dtype)).sample
        assert sample.dtype == dtype
        assert_close(sample.float(), expected, atol)

    @torch.no_grad()
    def test_attention_processors_and_backends(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        expected = model(**inputs).sample
        assert len(model.attn_processors) == 4
        processor = type(next(iter(model.attn_processors.values())))()
        model.set_attn_processor(processor)
        assert all(used is processor for used in model.attn_processors.values())
        try:
            model.set_attention_backend("_native_math")
            actual = model(**inputs).sample
        finally:  # diffusers remembers the last one as the default of all models
            model.set_attention_backend("native")
        assert not torch.equal(actual, expected)  # another order of sums
        assert_close(actual, expected, 1e-5)
        assert_close(model(**inputs).sample, expected, 0)
        with pytest.raises(ValueError, match="backend"):
            model.set_attention_backend("none of them")

    @torch.no_grad()
    def test_fused_projections(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        expected, keys = model(**inputs).sample, set(model.state_dict())
        model.fuse_qkv_projections()
        model.transformer_blocks[0].attn.to_q.weight.zero_()  # no longer used
        assert_close(model(**inputs).sample, expected)
        model.unfuse_qkv_projections()
        assert set(model.state_dict()) == keys
        assert (model(**inputs).sample - expected).abs().max() > 1e-3

    @torch.no_grad()
    def test_layerwise_casting(self):
        model, inputs = make_transformer(), make_inputs(2, 4, 5, 8, 8)
        expected = model(**inputs).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert stored["transformer_blocks.0.attn.to_q.weight"] == torch.float8_e4m3fn
        assert stored["patch_embed.proj.weight"] == stored["norm_out.linear.weight"] == torch.float32
        difference = (model(**inputs).sample - expected).abs().max() / expected.abs().max()
        assert 1e-4 < difference < 0.15

    @torch.no_grad()
    def test_first_block_cache(self):
        model, inputs = make_transformer(num_layers=6), make_inputs(2, 4, 5, 8, 8)
        expected = model(**inputs).sample
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with model.cache_context("conditional"):
            assert_close(model(**inputs).sample, expected, 0)
        calls = []
        handle = model.temporal_transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
        with model.cache_context("conditional"):  # the same input again: all blocks but the first are skipped
            assert_close(model(**inputs).sample, expected, 1e-5)
        assert not calls
        handle.remove()
        model.disable_cache()
        assert_close(model(**inputs).sample, expected, 0)

    @torch.no_grad()
    def test_pyramid_attention_broadcast(self):
        model, inputs = make_transformer(num_layers=6), make_inputs(2, 4, 5, 8, 8)
        expected = model(**inputs).sample
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=3,
            current_timestep_callback=lambda: 500,
        )
        model.enable_cache(config)
        assert_close(model(**inputs).sample, expected, 0)
        assert_close(model(**inputs).sample, expected, 0)  # the attention of the step before, which was the same
        model.disable_cache()

    def test_names_for_placement_exist(self):
        names = {type(module).__name__ for module in make_transformer().modules()}
        model_class = LeanVAELatteTransformer3DModel
        assert {*model_class._no_split_modules, *model_class._repeated_blocks} <= names


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_full_graph(self):
        model, inputs = make_transformer(num_layers=2), make_inputs(2, 4, 7, 8, 8)
        expected = model(**inputs, num_images=2).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        sample = compiled(**inputs, num_images=2).sample
        assert_close(sample, expected)
        sample.sum().backward()
        assert model.proj_out.weight.grad is not None

    @pytest.mark.parametrize("mode", ["interpolate", "extrapolate"])
    @torch.no_grad()
    def test_full_graph_with_other_positions(self, mode: str):
        model, inputs = make_transformer(num_layers=2), make_inputs(1, 4, 7, 12, 8)
        model.set_position_mode(mode)
        expected = model(**inputs).sample
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(**inputs).sample, expected)

    @torch.no_grad()
    def test_repeated_blocks(self):
        model, inputs = make_transformer(num_layers=6), make_inputs(2, 4, 5, 8, 8)
        expected = model(**inputs).sample
        counter = torch._dynamo.testing.CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_close(model(**inputs).sample, expected)
        assert counter.frame_count == 3  # spatial, temporal, and the first temporal one, which adds the positions
