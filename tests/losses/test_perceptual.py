"""LPIPS against a computation written apart from it, weight files and their errors, reference frames, MS-SSIM."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchmetrics.functional.image import lpips as theirs
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from diffusers_leanvae.losses.perceptual import LPIPS, SCALE_WEIGHTS, ms_ssim, reference_frames


# torchvision's numbers of the convolutions in `vgg16().features`, one row per stage; all but the first pool before.
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
HEADS = Path(theirs.__file__).parent / "lpips_models" / "vgg.pth"


def frames(num_frames: int, height: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_frames, 3, height // 8, width // 8, generator=generator)
    sample = F.interpolate(coarse, size=(height, width), mode="bicubic") * 2 - 1
    return sample, sample + noise * torch.randn(sample.shape, generator=generator)


@pytest.fixture(scope="module")
def vgg16() -> dict[str, torch.Tensor]:
    """Random VGG16 weights as torchvision saves them, a (small) classifier included."""
    generator = torch.Generator().manual_seed(0)
    widths = iter((64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512))
    weights, num_channels = {}, 3
    for index in (index for stage in CONVOLUTIONS for index in stage):
        width = next(widths)
        gain = (2 / (9 * num_channels)) ** 0.5
        weights[f"features.{index}.weight"] = gain * torch.randn(width, num_channels, 3, 3, generator=generator)
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        num_channels = width
    return weights | {"classifier.0.weight": torch.zeros(2, 2), "head.fc.bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def vgg16_file(vgg16, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg16") / "model.safetensors"
    save_file(vgg16, path)
    return path


def straight_lpips(weights: dict[str, torch.Tensor], sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """LPIPS in float64 from torchmetrics' pieces, around the VGG16 that torchmetrics takes from torchvision."""
    heads = torch.load(HEADS, map_location="cpu", weights_only=True)
    scaling, total = theirs.ScalingLayer().double(), torch.zeros(sample.shape[0], dtype=torch.float64)
    a, b = scaling(sample.double()), scaling(other.double())
    for stage, convolutions in enumerate(CONVOLUTIONS):
        if stage:
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
        for index in convolutions:
            weight, bias = (weights[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
            a, b = (F.conv2d(x, weight, bias, padding=1).relu() for x in (a, b))
        head = theirs.NetLinLayer(a.shape[1], use_dropout=True).double().eval()
        head.load_state_dict({"model.1.weight": heads[f"lin{stage}.model.1.weight"]})
        difference = (theirs._normalize_tensor(a) - theirs._normalize_tensor(b)) ** 2
        total = total + theirs._spatial_average(head(difference)).flatten()
    return total


def test_lpips_is_the_straight_computation(vgg16, vgg16_file):
    sample, reconstruction = frames(2, 32, 48, noise=0.3)
    expected = straight_lpips(vgg16, sample, reconstruction).detach()
    assert (expected > 0.01).all()
    lpips = LPIPS.from_weights(vgg16_file)
    actual = lpips(sample, reconstruction)
    assert actual.shape == (2,) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # bfloat16 products would be off by 1e-3
        under_autocast = lpips(sample.bfloat16().float(), reconstruction)
    torch.testing.assert_close(
        under_autocast.double(), straight_lpips(vgg16, sample.bfloat16(), reconstruction).detach(), rtol=0, atol=1e-6
    )
    actual = lpips.double()(sample.double(), reconstruction.double())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert lpips(sample.double(), sample.double()).tolist() == [0.0, 0.0]


def test_lpips_gradients_reach_the_reconstruction_alone(vgg16, vgg16_file):
    lpips = LPIPS.from_weights(vgg16_file).double()
    sample, reconstruction = (x.double().requires_grad_() for x in frames(1, 16, 16, noise=0.3))
    expected = torch.autograd.grad(straight_lpips(vgg16, sample, reconstruction).sum(), reconstruction)[0]
    lpips.train()
    lpips(sample, reconstruction).sum().backward()
    assert sample.grad is None and all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(reconstruction.grad, expected, rtol=0, atol=1e-10)


def test_lpips_on_alexnet_is_the_straight_computation(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {"classifier.1.weight": torch.zeros(2, 2)}
    for index, (width, num_channels, size) in shapes.items():
        gain = (2 / (size**2 * num_channels)) ** 0.5
        weights[f"features.{index}.weight"] = gain * torch.randn(width, num_channels, size, size, generator=generator)
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
    torch.save(weights, tmp_path / "alexnet.pth")
    sample, reconstruction = frames(2, 64, 72, noise=0.3)

    heads = torch.load(HEADS.with_name("alex.pth"), map_location="cpu", weights_only=True)
    scaling, expected = theirs.ScalingLayer().double(), torch.zeros(2, dtype=torch.float64)
    a, b = scaling(sample.double()), scaling(reconstruction.double())
    for number, (index, (_, _, size)) in enumerate(shapes.items()):
        if index in (3, 6):
            a, b = F.max_pool2d(a, 3, 2), F.max_pool2d(b, 3, 2)
        weight, bias = (weights[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
        stride, padding = (4, 2) if index == 0 else (1, size // 2)
        a, b = (F.conv2d(x, weight, bias, stride, padding).relu() for x in (a, b))
        difference = (theirs._normalize_tensor(a) - theirs._normalize_tensor(b)) ** 2
        weighted = F.conv2d(difference, heads[f"lin{number}.model.1.weight"].double())
        expected = expected + weighted.mean(dim=(1, 2, 3))

    lpips = LPIPS.from_weights(tmp_path / "alexnet.pth", trunk="alexnet")
    assert (expected > 0.01).all()
    torch.testing.assert_close(lpips(sample, reconstruction).double(), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="sides of at least 31"):
        lpips(sample[..., :30, :30], sample[..., :30, :30])
    with pytest.raises(ValueError, match="`alexnet` must be a file of torchvision's AlexNet weights, https://down"):
        LPIPS.from_weights(trunk="alexnet")
    with pytest.raises(ValueError, match="`vgg16` must hold exactly the weights of LPIPS's VGG16"):
        LPIPS.from_weights(tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match="`trunk` must be one of 'vgg16', 'alexnet', got 'vgg'"):
        LPIPS(trunk="vgg")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickled_weights_load_too(suffix: str, vgg16, tmp_path):
    torch.save(vgg16, tmp_path / f"vgg16{suffix}")
    state_dict = LPIPS.from_weights(str(tmp_path / f"vgg16{suffix}"), linear_heads=HEADS).state_dict()
    torch.testing.assert_close(state_dict["features.28.weight"], vgg16["features.28.weight"], rtol=0, atol=0)
    heads = torch.load(HEADS, map_location="cpu", weights_only=True)
    torch.testing.assert_close(state_dict["heads.3.weight"], heads["lin3.model.1.weight"], rtol=0, atol=0)
    copy = LPIPS(state_dict)
    torch.testing.assert_close(copy.state_dict(), state_dict, rtol=0, atol=0)


def test_wrong_weights_are_refused(vgg16, tmp_path):
    path = tmp_path / "vgg16.safetensors"

    def load(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, path)
        LPIPS.from_weights(path)

    with pytest.raises(ValueError, match=r"`vgg16` .* 1 differ, .*'features.31.weight' must be nothing, got \(2,\)"):
        load(vgg16 | {"features.31.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"`vgg16` .*'features.0.bias' must be \(64,\), got nothing"):
        load({key: value for key, value in vgg16.items() if key != "features.0.bias"})
    with pytest.raises(ValueError, match=r"`vgg16` .*'features.0.bias' must be \(64,\), got \(2,\)"):
        load(vgg16 | {"features.0.bias": torch.zeros(2)})
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="`vgg16` must be a readable file of weights"):
        LPIPS.from_weights(path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="`vgg16` must be a file of named tensors"):
        LPIPS.from_weights(tmp_path / "list.pth")
    save_file(vgg16, path)
    with pytest.raises(ValueError, match="`linear_heads` .* 33 differ"):
        LPIPS.from_weights(path, linear_heads=path)


@pytest.mark.parametrize("vgg16", ["missing.pth", Path("missing"), "nobody/nothing", "not//a/repository"])
def test_absent_weights_say_where_to_get_them(vgg16: str | Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"`vgg16` must be .*https://huggingface.co/timm/.* got '{vgg16}'"):
        LPIPS.from_weights(vgg16)


@pytest.mark.hub
def test_weights_from_the_hub():
    sample, reconstruction = frames(1, 64, 64, noise=0.3)
    distance = LPIPS.from_weights()(sample, reconstruction).item()
    assert 0.1 < distance < 1.5


def test_frames_are_checked():
    lpips, frame = LPIPS(), torch.zeros(1, 3, 16, 16)
    for function in (lpips, ms_ssim):
        with pytest.raises(ValueError, match=r"`reconstruction` must have the shape .*\(1, 3, 16, 16\), got \(2, 3,"):
            function(frame, torch.zeros(2, 3, 16, 16))
        for wrong in (torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 10, 16)):
            with pytest.raises(ValueError, match="`sample` must be frames"):
                function(wrong, wrong)


def test_reference_frames():
    rng = np.random.default_rng(0)
    drawn = [reference_frames(17, rng) for _ in range(100)]
    assert {tuple(frames) for frames in drawn} == {(0, i, i + 1, i + 2, i + 3) for i in (1, 5, 9, 13)}
    assert reference_frames(1, rng) == [0] and reference_frames(5, rng) == [0, 1, 2, 3, 4]
    assert reference_frames(33, np.random.default_rng(1)) == reference_frames(33, np.random.default_rng(1))
    for wrong in (0, -3, 16):
        with pytest.raises(ValueError, match=f"`num_frames` must be 4 .* got {wrong}"):
            reference_frames(wrong, rng)


@pytest.mark.parametrize(
    "height, width, num_scales", [(256, 256, 5), (104, 128, 4), (64, 64, 3), (48, 40, 2), (16, 24, 1)]
)
def test_ms_ssim_is_that_of_torchmetrics(height: int, width: int, num_scales: int):
    sample, reconstruction = (x.double() for x in frames(1, height, width, noise=0.2))
    reconstruction.requires_grad_()
    betas = tuple(weight / sum(SCALE_WEIGHTS[:num_scales]) for weight in SCALE_WEIGHTS[:num_scales])
    expected = 1 - multiscale_structural_similarity_index_measure(reconstruction, sample, data_range=2.0, betas=betas)
    expected_gradient = torch.autograd.grad(expected, reconstruction)[0]
    actual = ms_ssim(sample, reconstruction)
    gradient = torch.autograd.grad(actual, reconstruction)[0]
    assert actual.shape == () and 0.02 < actual < 0.9
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)  # they keep the weights in float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6 * expected_gradient.abs().max().item())
    torch.testing.assert_close(ms_ssim(sample.float(), reconstruction.float()).double(), actual, rtol=0, atol=2e-6)


def test_ms_ssim_stays_finite_at_its_ends():
    sample, _ = frames(2, 64, 64, noise=0.0)
    for reconstruction, expected in ((sample, 0.0), (-sample, 1.0), (torch.zeros_like(sample), 0.9)):
        reconstruction = reconstruction.clone().requires_grad_()
        loss = ms_ssim(sample, reconstruction)
        assert loss.item() == pytest.approx(expected, abs=0.1)
        assert torch.autograd.grad(loss, reconstruction)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert ms_ssim(sample.bfloat16(), sample.bfloat16() * 0.5).dtype == torch.float32
