"""`vae.fuse()` computes the same function: whole, tiled, streamed, for images and batches, in every configuration."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from tiny import make_tiny, make_video

from diffusers_leanvae import AutoencoderKLLeanVAE, TemporalCache
from diffusers_leanvae.kernels.slabs import find_compiler
from diffusers_leanvae.models import autoencoder_kl_leanvae, leanvae_fused, leanvae_fused_blocks
from diffusers_leanvae.models.leanvae_fused_blocks import (
    CppSlabBlock,
    DenseProduct,
    PackedProduct,
    Slab,
    TorchSlabBlock,
    product_dtype,
    same_product,
    slabs,
)


CONFIGS = {
    "default": {},
    "joint": {"patch_embedding_type": "joint"},
    "no_wavelet": {"patch_embedding_type": "no_wavelet"},
    "linear": {"bottleneck_type": "linear"},
    "patch_norm": {"patch_norm": True},
    "wan": {"patch_size": (2, 8, 8), "pixel_factor": 1.0},
    "one_iteration": {"num_ista_iterations": 1, "num_branch_layers": 0},
    "no_layers": {"num_ista_layers": 0},
}


def make_vae(dtype: torch.dtype = torch.float64, **config) -> AutoencoderKLLeanVAE:
    return make_tiny("leanvae", dtype, **({"num_ista_iterations": 2, "num_ista_layers": 2} | config))


@torch.no_grad()
def run(
    vae: AutoencoderKLLeanVAE, x: torch.Tensor, is_fused: bool, kernels: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    vae.fuse(kernels) if is_fused else vae.unfuse()  # type: ignore[arg-type]
    parameters = vae.encode(x).latent_dist.parameters
    return parameters, vae.decode(parameters.chunk(2, dim=1)[0]).sample


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype and not torch.equal(actual, torch.zeros_like(actual))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# Slabs of 30 tokens: rows of the 8x10 tokens of a frame, several frames of 3x4 tokens.
@pytest.mark.parametrize("shape", [(2, 3, 17, 3, 4), (1, 3, 1, 6, 6), (1, 3, 9, 8, 10)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_equals_eager_in_float64(monkeypatch: pytest.MonkeyPatch, config: dict, shape: tuple[int, ...]):
    monkeypatch.setattr(leanvae_fused_blocks, "CPU_SLAB_TOKENS", 30)
    vae = make_vae(**config)
    ratio = vae.spatial_compression_ratio
    x = torch.rand(*shape[:3], shape[3] * ratio, shape[4] * ratio, dtype=torch.float64) * 2 - 1
    for actual, eager in zip(run(vae, x, True), run(vae, x, False), strict=True):
        assert_near(actual, eager, 1e-13)


KERNELS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")),
]
WIDTHS = {"low_freq_dim": 16, "high_freq_dim": 32}  # that the kernels in C++ take


@pytest.mark.parametrize("kernels", KERNELS)
def test_float32_differs_by_rounding(kernels: str):
    vae = make_vae(torch.float32, **WIDTHS)
    exact, x = copy.deepcopy(vae).double(), torch.rand(1, 3, 9, 80, 96) * 2 - 1
    results = run(vae, x, True, kernels), run(vae, x, False), run(exact, x.double(), False)
    for fused_result, eager, right in zip(*results, strict=True):
        errors = [(y - right).square().mean().sqrt() / right.abs().max() for y in (fused_result, eager)]
        assert errors[0] < 1e-6 and errors[0] < 2 * errors[1]  # measured: 2.1e-7, 1.23 times
        assert not torch.equal(fused_result, eager)  # or it did not run


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("products", [torch.float32, None], ids=["float32_products", "16_bit_products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_worse_than_eager(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: torch.dtype | None, kernels: str
):
    if kernels == "cpp" and dtype == torch.float16:
        kernels = "auto"  # which leaves float16 to PyTorch
    for module in (leanvae_fused, leanvae_fused_blocks):  # whatever the processor has
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: products or dtype)
    exact = make_vae(torch.float64, **WIDTHS)
    vae = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(vae.state_dict())  # the same, rounded, weights
    x = (torch.rand(1, 3, 9, 80, 96) * 2 - 1).to(dtype)
    z = torch.randn(1, 4, 3, 10, 12).to(dtype)
    errors = {}
    with torch.no_grad():
        expected = exact.encode(x.double()).latent_dist.parameters, exact.decode(z.double()).sample
        for name in ("eager", "fused"):
            vae.fuse(kernels) if name == "fused" else vae.unfuse()
            results = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
            assert all(result.dtype == dtype for result in results)
            errors[name] = [
                (result - right).square().mean().sqrt().item() for result, right in zip(results, expected, strict=True)
            ]
    assert all(0 < actual <= eager for actual, eager in zip(errors["fused"], errors["eager"], strict=True)), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_tokens", [30, 1024])
def test_kernels_in_cpp_compute_what_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, config: dict, dtype: torch.dtype, num_tokens: int
):
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setattr(leanvae_fused_blocks, "CPU_SLAB_TOKENS", num_tokens)
    vae = make_vae(dtype, **(WIDTHS | config))
    ratio = vae.spatial_compression_ratio
    x = (torch.rand(2, 3, 9, 6 * ratio, 10 * ratio) * 2 - 1).to(dtype)
    whole = run(vae, x, True, "torch")
    vae.fuse("cpp")
    blocks = [
        block for stack in vae._fused.encoder_branches for block in stack.blocks
    ] + vae._fused.decoder_fusion.blocks
    assert blocks and all(type(block) is CppSlabBlock for block in blocks)
    encoder, decoder = TemporalCache(), TemporalCache()
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        # The same latents for both, so that their difference is not counted twice.
        sample = vae.decode(whole[0].chunk(2, dim=1)[0]).sample
        streamed = torch.cat(
            [vae.encode(part, cache=encoder).latent_dist.parameters for part in x.split((5, 4), 2)], 2
        )
        latents = streamed.chunk(2, dim=1)[0]
        frames = torch.cat([vae.decode(part, cache=decoder).sample for part in latents.split((1, 2), 2)], 2)
    pairs = {"moments": (moments, whole[0]), "sample": (sample, whole[1])}
    assert not any(torch.equal(*pair) for pair in pairs.values())  # or the kernels did not run
    pairs |= {"streamed": (streamed, moments), "frames": (frames, sample)}
    for name, (actual, expected) in pairs.items():
        assert actual.dtype == dtype
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < (5e-6 if dtype == torch.float32 else 5e-2), (name, error.item())  # 1.8e-6, 0.033


def test_what_the_kernels_in_cpp_are_not_for():
    with pytest.raises(ValueError, match="`kernels` must not be 'cpp' but for a float32 or bfloat16 model on the CPU"):
        make_vae(torch.float64).fuse("cpp")
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    vae = make_vae(torch.float32, low_freq_dim=8, high_freq_dim=32)
    vae.fuse()
    kinds = [{type(block) for block in stack.blocks} for stack in vae._fused.encoder_branches]
    assert kinds == [{TorchSlabBlock}, {CppSlabBlock}]  # each block has its own width


def test_kernels_in_cpp_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoencoder_kl_leanvae.slabs, "load", lambda: None)
    vae = make_vae(torch.float32, **WIDTHS)
    vae.fuse()
    assert all(type(block) is TorchSlabBlock for block in vae._fused.decoder_fusion.blocks)
    with pytest.raises(ValueError, match=r"`kernels` must not be 'cpp' without a C\+\+ compiler that works"):
        vae.fuse("cpp")


def test_products_are_in_float32_where_the_processor_has_none_of_16_bits(monkeypatch: pytest.MonkeyPatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        for is_supported, expected in ((True, dtype), (False, torch.float32)):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda answer=is_supported: answer)
            assert product_dtype(dtype, cpu) == expected
            assert product_dtype(dtype, gpu) == dtype
    assert all(product_dtype(dtype, cpu) == dtype for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 1024, 1500])
def test_packed_weights_give_the_same_products(dtype: torch.dtype, num_rows: int):
    if not leanvae_fused_blocks._onednn_has_products(dtype):
        pytest.skip(f"oneDNN has no products of {dtype} here")
    torch.manual_seed(0)
    weight, x = torch.randn(96, 40, dtype=dtype), torch.randn(num_rows, 40, dtype=dtype)
    memory = torch.empty(num_rows, 96, dtype=dtype)
    actual = PackedProduct(weight)(x, memory)
    exact = x.double() @ weight.double().t()
    assert_near(actual.double(), exact, 1e-6 if dtype == torch.float32 else 8e-3)  # measured: 2e-7, 2e-3


@pytest.mark.parametrize(
    "dtype, capability, is_enabled, expected",
    [
        (torch.float32, "AVX512", True, PackedProduct),
        (torch.float32, "AVX512_VNNI", True, PackedProduct),
        (torch.float32, "AVX2", True, DenseProduct),
        (torch.float32, "AVX512", False, DenseProduct),
        (torch.float64, "AVX512", True, DenseProduct),
    ],
)
def test_where_weights_are_packed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: str, is_enabled: bool, expected: type
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with torch.backends.mkldnn.flags(enabled=is_enabled):
        assert type(same_product(torch.randn(32, 8, dtype=dtype))) is expected


@pytest.mark.parametrize("sizes", [(17,), (1, 4, 12), (5, 8, 4)])
def test_streams(sizes: tuple[int, ...]):
    vae = make_vae()
    x = torch.rand(2, 3, 17, 32, 48, dtype=torch.float64) * 2 - 1
    expected, sample = run(vae, x, False)
    vae.fuse()
    encoder, decoder = TemporalCache(), TemporalCache()
    with torch.no_grad():
        moments = [vae.encode(part, cache=encoder).latent_dist.parameters for part in x.split(sizes, dim=2)]
        latents = torch.cat(moments, dim=2).chunk(2, dim=1)[0]
        counts = [part.shape[2] for part in moments]
        frames = [vae.decode(part, cache=decoder).sample for part in latents.split(counts, dim=2)]
    assert_near(torch.cat(moments, dim=2), expected, 1e-13)
    assert_near(torch.cat(frames, dim=2), sample, 1e-13)


def test_a_stream_may_change_between_fused_and_eager():
    vae = make_vae()
    x = torch.rand(1, 3, 9, 32, 48, dtype=torch.float64) * 2 - 1
    expected, _ = run(vae, x, False)
    cache, moments = TemporalCache(), []
    with torch.no_grad():
        for index, part in enumerate(x.split((1, 4, 4), dim=2)):
            vae.fuse() if index % 2 else vae.unfuse()
            moments.append(vae.encode(part, cache=cache).latent_dist.parameters)
    assert_near(torch.cat(moments, dim=2), expected, 1e-13)


@pytest.mark.parametrize("kernels", [None, "torch", "cpp"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_stream_may_go_on_in_another_dtype(kernels: str | None, dtypes: tuple[torch.dtype, torch.dtype]):
    if kernels == "cpp" and find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    x = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    expected, _ = run(make_vae(torch.float32, **WIDTHS), x, False)
    cache, moments = TemporalCache(), []
    with torch.no_grad():
        for dtype, part in zip(dtypes, x.split((5, 4), dim=2), strict=True):
            vae = make_vae(dtype, **WIDTHS)
            if kernels is not None:
                vae.fuse(kernels)
            moments.append(vae.encode(part.to(dtype), cache=cache).latent_dist.parameters)
    # Measured: 1.0e-2 eager, 6.3e-3 in slabs of PyTorch, 7.4e-3 in C++.
    assert_near(torch.cat([part.float() for part in moments], dim=2), expected, 1.3e-2)


def test_tiles():
    vae = make_vae()
    x = torch.rand(1, 3, 9, 72, 104, dtype=torch.float64) * 2 - 1
    expected, sample = run(vae, x, False)
    vae.enable_tiling(40, 56, 5)
    for actual, eager in zip(run(vae, x, True), (expected, sample), strict=True):
        assert_near(actual, eager, 1e-13)


def test_input_is_left_alone():
    vae = make_vae()
    x, z = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64), torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    before = x.clone(), z.clone()
    vae.fuse()
    with torch.no_grad():
        vae.encode(x), vae.decode(z)
    assert torch.equal(x, before[0]) and torch.equal(z, before[1])


def test_state_dict_stays_stock():
    vae = make_vae()
    x = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    before = {key: tensor.clone() for key, tensor in vae.state_dict().items()}
    run(vae, x, True)
    after = vae.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("change", ["load", "cast", "train", "data", "average"])
@torch.no_grad()
def test_changed_weights_take_the_layers_until_fused_again(change: str):
    vae, x = make_vae(), torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    vae.fuse()
    if change == "load":
        vae.load_state_dict({key: tensor * 0.9 for key, tensor in vae.state_dict().items()})
    elif change == "cast":
        vae, x = vae.float(), x.float()
    elif change == "data":
        vae.encoder.fusion_layers[0].conv.bias.data.add_(1)  # which no version counter sees
    elif change == "average":
        EMAModel([parameter * 0.9 for parameter in vae.parameters()]).copy_to(vae.parameters())
    else:
        vae.encoder.fusion_layers[0].conv.bias.add_(1)
    prepared = vae._fused
    with pytest.warns(UserWarning, match=r"the layers are used: weights changed since; call `fuse` again\.$"):
        actual = vae.encode(x).latent_dist.parameters
    assert vae._fused is prepared  # a call changes nothing of the model
    vae.unfuse()
    expected = vae.encode(x).latent_dist.parameters
    assert torch.equal(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.fuse()
        assert_near(vae.encode(x).latent_dist.parameters, expected, 1e-13 if x.dtype == torch.float64 else 1e-5)


@torch.no_grad()
def test_copies_are_not_fused_and_compute_the_same(tmp_path: Path):
    vae, x = make_vae(torch.float32), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    expected = vae(x).sample
    vae.fuse()
    torch.save(vae, tmp_path / "vae.pt")
    loaded = torch.load(tmp_path / "vae.pt", weights_only=False)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), loaded):
        assert other._fused is None and torch.equal(other(x).sample, expected)
        other.fuse()
        assert_near(other(x).sample, expected, 1e-5)
    assert vae._fused is not None


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_hooks_see_what_layers_get_and_give(fuse: bool):
    vae, x = make_vae(), torch.rand(1, 3, 9, 32, 32, dtype=torch.float64) * 2 - 1
    expected = vae(x).sample
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for layer in (*vae.encoder.fusion_layers, *vae.decoder.fusion_layers)
    ]
    if fuse:
        vae.fuse()
        with pytest.warns(UserWarning, match="the layers are used: layers have hooks, which would see nothing"):
            sample = vae(x).sample
    else:
        sample = vae(x).sample
    assert_near(sample, expected, 1e-13)
    first, seen[:] = list(seen), []
    with torch.enable_grad():
        vae.unfuse()
        vae(x)
    assert len(first) == len(seen) > 2
    for pair, other in zip(first, seen, strict=True):
        for values, others in zip(pair, other, strict=True):
            assert_near(values, others.detach(), 1e-13)
        assert not torch.equal(*pair)
    for hook in hooks:
        hook.remove()
    vae.fuse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_near(vae(x).sample, expected, 1e-13)


def test_gradients_go_through_the_layers():
    vae = make_vae()
    vae.fuse()
    with pytest.warns(UserWarning, match=r"^`fuse` has no effect in this call, .*: gradients are enabled, which"):
        vae(torch.rand(1, 3, 5, 32, 32, dtype=torch.float64)).sample.sum().backward()
    assert all(p.grad is not None for name, p in vae.named_parameters() if "logvar" not in name)


@torch.no_grad()
def test_what_keeps_prepared_weights_from_serving_is_said():
    vae = make_vae().float()
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    expected = vae.encode(x).latent_dist.mean
    vae.fuse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(vae.encode(x).latent_dist.mean, expected)  # or prepared weights did not serve
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on; cast the model"):
        vae.encode(x)
    vae.enable_layerwise_casting(torch.bfloat16, torch.float32)
    sentence = r"the layers are used: its weights are torch\.bfloat16 on cpu, the input torch\.float32 on cpu\.$"
    with pytest.warns(UserWarning, match=sentence):
        vae.encode(x)


def test_negative_threshold():
    vae = make_vae()
    with torch.no_grad():
        vae.bottleneck.iterations[0].threshold.fill_(-0.02)
    x = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    assert_near(run(vae, x, True)[1], run(vae, x, False)[1], 1e-13)


def test_hooks_that_cast_layers_when_they_are_called_get_the_layers():
    vae = make_vae(torch.float32)
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    vae.fuse()
    vae.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with torch.no_grad():
        fused = vae.encode(x).latent_dist.parameters
        vae.unfuse()
        assert torch.equal(fused, vae.encode(x).latent_dist.parameters)
    with pytest.raises(ValueError, match="`fuse` must be called before layers are offloaded or cast when called, got"):
        vae.fuse()
    vae = make_vae(torch.float32)
    vae.decoder.half()
    with pytest.raises(ValueError, match="`fuse` must be called on a model of one dtype on one device, got torch.f"):
        vae.fuse()


def test_another_product_may_be_tried():
    class HalfProduct:  # not a `DenseProduct`, of which the weight alone may be taken
        def __init__(self, weight: torch.Tensor):
            self.product = DenseProduct(weight)

        def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            return self.product(x, out).mul_(0.5)

    vae, x = make_tiny("leanvae"), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    expected = run(vae, x, True, "torch")
    for product, is_same in ((same_product, True), (HalfProduct, False)):
        vae._fused = leanvae_fused.FusedLeanVAE(vae, prepare_product=product)
        with torch.no_grad():
            moments = vae.encode(x).latent_dist.parameters
            sample = vae.decode(moments.chunk(2, dim=1)[0]).sample
        assert torch.equal(moments, expected[0]) == torch.equal(sample, expected[1]) == is_same


def test_errors():
    with pytest.raises(ValueError, match="`kernels` must be one of 'auto', 'torch', 'cpp', 'triton', got 'cuda'"):
        make_vae().fuse(kernels="cuda")  # type: ignore[arg-type]
    vae = make_vae(torch.float32)
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="`fuse` must be called before layers are offloaded or cast"):
        vae.fuse()
    lora = pytest.importorskip("peft").LoraConfig(target_modules=["up_proj"])
    vae = make_vae()
    pytest.importorskip("peft").inject_adapter_in_model(lora, vae)
    with pytest.raises(ValueError, match="`fuse` must be called on plain layers"):
        vae.fuse()


class OtherWeight(torch.Tensor):
    """Stands in for a quantized weight: it has no memory of its own, and can do nothing but be multiplied."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: torch.Tensor):
        self.kept = weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].kept, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].kept)
        raise NotImplementedError(f"{function}")


FEED_FORWARD = ("up_proj", "down_proj")


def quantize(vae: AutoencoderKLLeanVAE, by: str) -> str:
    """Quantize the feed-forwards of a model; returns what their weights are called."""
    if by == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not a requirement")
        quantization.quantize_(
            vae, quantization.Int8WeightOnlyConfig(), lambda layer, name: name.endswith(("up_proj", "down_proj"))
        )
    for name, module in vae.named_modules():
        if by == "stand-in" and name.endswith(("up_proj", "down_proj")):
            module.weight = torch.nn.Parameter(OtherWeight(module.weight.detach()), requires_grad=False)
    kinds = {type(parameter).__name__ for parameter in vae.parameters()} - {"Parameter"}
    return kinds.pop()


@pytest.mark.parametrize("by", ["stand-in", "torchao"])
@torch.no_grad()
def test_quantized_weights_are_refused_or_used_as_they_are(by: str):
    vae = make_tiny("leanvae")
    video = make_video(1, 3, 5, 16, 24)
    plain = vae(video).sample
    vae.fuse()
    kind = quantize(vae, by)
    with pytest.warns(UserWarning, match="`fuse` has no effect in this call, the layers are used: weights changed"):
        fused_before = vae(video).sample
    vae.unfuse()
    assert torch.equal(vae(video).sample, fused_before)
    assert (fused_before - plain).abs().max() < 0.1 * plain.std()
    with pytest.raises(ValueError, match=f"`fuse` must be called on plain weights, got {kind}; a quantized model is"):
        vae.fuse()
    assert torch.equal(vae(video).sample, fused_before)


@pytest.mark.parametrize("size", [(5, 3, 4, 100), (5, 3, 4, 30), (2, 7, 5, 12), (1, 3, 50, 7)])
def test_slabs_cover_every_token_once_backward_in_time(size: tuple[int, int, int, int]):
    num_steps, height, width, num_tokens = size
    counts = torch.zeros(num_steps, height)
    parts: list[Slab] = list(slabs(num_steps, height, width, num_tokens))
    for slab in parts:
        counts[slab.steps, slab.rows] += 1
        assert (slab.stop - slab.start) * (slab.bottom - slab.top) * width <= max(num_tokens, width)
    assert (counts == 1).all()
    assert [slab.start for slab in parts] == sorted((slab.start for slab in parts), reverse=True)
