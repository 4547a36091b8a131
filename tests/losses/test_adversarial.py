"""Patch discriminators, their losses against the recorded ones of WF-VAE, LeCam, and the module of a training step."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_ranks
from wfvae_losses import read_recording

from diffusers_leanvae.losses.adversarial import (
    DiscriminatorTrainingModule,
    LeCam,
    PatchDiscriminator2d,
    PatchDiscriminator3d,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


CLASSES = [PatchDiscriminator2d, PatchDiscriminator3d]
VIDEO = (2, 3, 5, 24, 32)


def videos(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def tiny(network: type = PatchDiscriminator2d, **options) -> DiscriminatorTrainingModule:
    torch.manual_seed(0)
    return DiscriminatorTrainingModule(network(num_layers=2, num_filters=4), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_terms_are_those_of_wfvae(dtype: torch.dtype):
    config, golden, discriminator = read_recording(dtype)

    def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual.squeeze(), expected.squeeze(), rtol=2e-6, atol=0)  # measured: 2e-7

    last_layer = golden["last_layer"].requires_grad_()
    sample, reconstruction = golden["inputs"], F.conv3d(golden["features"], last_layer)
    real_logits, fake_logits = discriminator(sample), discriminator(reconstruction)
    assert_matches(real_logits, golden["disc.logits_real"])
    assert_matches(fake_logits, golden["disc.logits_fake"])
    assert_matches(discriminator_loss(real_logits, fake_logits, "hinge"), golden["disc.loss_hinge"])
    assert_matches(discriminator_loss(real_logits, fake_logits, "non_saturating"), golden["disc.loss_vanilla"])
    assert_matches(generator_loss(fake_logits, "hinge"), golden["gen.after_disc_start.g_loss"])

    error = (sample - reconstruction).transpose(1, 2).flatten(0, 1)
    perceptual = error.square().mean(dim=(1, 2, 3), keepdim=True)  # stands in for LPIPS in the recording
    reconstruction_loss = (error.abs() + config["perceptual_weight"] * perceptual).sum() / error.shape[0]
    assert_matches(reconstruction_loss, golden["gen.after_disc_start.nll_loss"])
    weight = adaptive_weight(reconstruction_loss, generator_loss(fake_logits, "hinge"), last_layer, maximum=1e6)
    assert not weight.requires_grad
    assert_matches(config["disc_weight"] * weight, golden["gen.after_disc_start.d_weight"])
    assert adaptive_weight(reconstruction_loss, generator_loss(fake_logits, "hinge"), [last_layer]) == 1e4


@pytest.mark.parametrize("num_frames", [1, 2, 5, 17])
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("network", CLASSES)
def test_shapes_and_gradients(network: type, norm: str, num_frames: int):
    torch.manual_seed(0)
    discriminator = network(num_layers=2, num_filters=8, norm=norm)
    sample = videos(2, 3, num_frames, 24, 32).requires_grad_()
    logits = discriminator(sample)
    # 4x4 kernels of stride 1 lose a row and a column each, 3x3x3 kernels none; time is halved twice, rounding up.
    expected = (2 * num_frames, 1, 4, 6) if network is PatchDiscriminator2d else (2, 1, -(-num_frames // 4), 6, 8)
    assert logits.shape == expected
    logits.sum().backward()
    assert sample.grad is not None and sample.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters() if p.ndim > 1)


def test_frames_of_the_2d_discriminator_are_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator2d(num_layers=1, num_filters=4, norm="group")
    sample = videos(2, 3, 3, 8, 8)
    single = torch.cat([discriminator(sample[i : i + 1, :, j : j + 1]) for i in range(2) for j in range(3)])
    torch.testing.assert_close(discriminator(sample), single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", CLASSES)
def test_layout_and_initialisation(network: type):
    torch.manual_seed(0)
    layers = network(num_layers=5, num_filters=16).layers
    weights = [layer.weight for layer in layers if hasattr(layer, "stride")]
    assert [weight.shape[0] for weight in weights] == [16, 32, 64, 128, 128, 128, 1]
    assert all(weight.shape[-1] == (4 if network is PatchDiscriminator2d else 3) for weight in weights)
    scales = torch.cat([layer.weight for layer in layers if hasattr(layer, "running_mean")]).detach()
    assert weights[4].std().item() == pytest.approx(0.02, rel=0.02)
    assert scales.mean().item() == pytest.approx(1.0, abs=5e-3) and scales.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("network", CLASSES)
def test_bad_arguments(network: type):
    with pytest.raises(ValueError, match="`norm` must be one of 'batch', 'group', 'instance', 'none', got 'layer'"):
        network(norm="layer")
    with pytest.raises(ValueError, match="`num_layers` must be at least 1, got 0"):
        network(num_layers=0)
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\), got 1.0"):
        network(dropout=1.0)
    for shape in ((2, 3, 24, 24), (1, 4, 5, 24, 24)):
        with pytest.raises(ValueError, match="`sample` must be videos"):
            network(num_filters=4)(torch.zeros(shape))
    for function in (lambda: generator_loss(torch.zeros(1, 1, 2, 2), "wgan"), lambda: tiny(kind="wgan")):
        with pytest.raises(ValueError, match="`kind` must be one of 'hinge', 'non_saturating', got 'wgan'"):
            function()
    with pytest.raises(ValueError, match="`generator_kind` must be one of 'hinge', 'non_saturating', got 'wgan'"):
        tiny(generator_kind="wgan")
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got 1.0"):
        LeCam(1.0)


def test_smallest_frames():
    discriminator = PatchDiscriminator2d(num_filters=4).eval()
    assert discriminator(torch.zeros(1, 3, 1, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"sides of at least 24, got \(1, 3, 1, 23, 24\)"):
        discriminator(torch.zeros(1, 3, 1, 23, 24))
    assert PatchDiscriminator3d(num_filters=4).eval()(torch.zeros(1, 3, 1, 1, 1)).shape == (1, 1, 1, 1, 1)


def test_generator_term_is_taken_on_the_mean_of_each_frame():
    logits = torch.tensor([[1.0, 3.0], [-4.0, 0.0]]).reshape(2, 1, 1, 2)  # means 2 and -2
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    for shape in ((2, 1, 1, 2), (1, 1, 2, 1, 2)):  # of two frames, of one video with two frames
        assert generator_loss(logits.reshape(shape)).item() == pytest.approx(expected, abs=1e-6)
        assert generator_loss(logits.reshape(shape), "hinge").item() == 0.0
    assert generator_loss(logits.bfloat16()).dtype == torch.float32


def test_lecam():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    assert lecam(real, fake).item() == (1 + 9) / 2 + (4 + 0) / 2  # running means of 0
    lecam.update(real, fake)
    torch.testing.assert_close((lecam.ema_real.item(), lecam.ema_fake.item()), (0.2, -0.1), rtol=0, atol=1e-6)
    expected = (1.1**2 + 3.1**2) / 2 + (2.2**2 + 0.2**2) / 2
    assert lecam(real, fake).item() == pytest.approx(expected, abs=1e-5)
    before = {name: value.clone() for name, value in lecam.state_dict().items()}
    lecam.update(real, fake * math.nan)
    torch.testing.assert_close(lecam.state_dict(), before, rtol=0, atol=0)
    lecam.update(real, fake)
    assert lecam.ema_real.item() == pytest.approx(0.2 * 0.9 + 2 * 0.1, abs=1e-6)


def test_adaptive_weight_is_the_ratio_of_the_gradients():
    a, b, unused = (torch.tensor([value], requires_grad=True) for value in (1.0, 2.0, 3.0))
    reconstruction, adversarial = (3 * a + 4 * b).sum(), 10 * a.sum()
    assert adaptive_weight(reconstruction, adversarial, [a, b, unused]).item() == pytest.approx(0.5, abs=1e-6)
    assert adaptive_weight(reconstruction, adversarial, [a, b], maximum=0.25).item() == 0.25
    assert adaptive_weight(reconstruction, adversarial, a).item() == pytest.approx(0.3, abs=1e-6)
    (reconstruction + adversarial).backward()  # the graphs are still there
    assert a.grad is not None and a.grad.item() == 13.0


@pytest.mark.parametrize("network", CLASSES)
def test_the_discriminator_learns_and_videos_get_no_gradient(network: type):
    module = tiny(network, lecam_weight=0.1)
    real, fake = videos(*VIDEO).requires_grad_(), (videos(*VIDEO, seed=1) * 0.3).requires_grad_()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, terms = module(real, fake)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert real.grad is None and fake.grad is None
    assert losses[-1] < losses[0] - 0.1
    assert set(terms) == {"discriminator", "lecam", "logits_real", "logits_fake"}
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    assert terms["logits_real"] > terms["logits_fake"]
    torch.testing.assert_close(loss.detach(), terms["discriminator"] + 0.1 * terms["lecam"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", CLASSES)
def test_generator_term_leaves_the_discriminator_alone(network: type):
    module = tiny(network)
    module(videos(*VIDEO), videos(*VIDEO, seed=1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fake = videos(*VIDEO, seed=2).requires_grad_()
    term = module.generator_term(fake)
    term.backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    expected = generator_loss(module.discriminator(fake))  # the plain way: this one does move the running statistics
    gradient = torch.autograd.grad(expected, fake)[0]
    torch.testing.assert_close(term, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(fake.grad, gradient, rtol=0, atol=1e-7)
    assert module.state_dict()["discriminator.layers.3.num_batches_tracked"] == 3


def test_eval_mode_changes_nothing():
    module = tiny().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(videos(*VIDEO), videos(*VIDEO, seed=1))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def train(module: DiscriminatorTrainingModule, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss, _ = module(videos(*VIDEO, seed=step), videos(*VIDEO, seed=100 + step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_resumed_equals_straight():
    straight = tiny()
    optimizer = torch.optim.Adam(straight.parameters(), lr=1e-3)
    expected = train(straight, optimizer, range(4))
    first = tiny()
    optimizer = torch.optim.Adam(first.parameters(), lr=1e-3)
    losses = train(first, optimizer, range(2))
    torch.manual_seed(1)
    second = DiscriminatorTrainingModule(PatchDiscriminator2d(num_layers=2, num_filters=4))
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.Adam(second.parameters(), lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    assert losses + train(second, resumed, range(2, 4)) == expected
    torch.testing.assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


def half_the_batch(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(one_step(slice(rank, rank + 1)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_step(share: slice) -> dict[str, torch.Tensor]:
    """LeCam's running means and an adaptive weight after one step on a part of a batch of two."""
    module = DiscriminatorTrainingModule(PatchDiscriminator2d(num_layers=1, num_filters=4, norm="group").double())
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    sample, features = (videos(*VIDEO, seed=seed, dtype=torch.float64)[share] for seed in (0, 1))
    last_layer = torch.nn.Parameter(torch.full((3, 1, 1, 1), 0.7, dtype=torch.float64))
    reconstruction = features * last_layer
    module(sample, reconstruction)
    loss = (sample - reconstruction).abs().mean()
    weight = adaptive_weight(loss, module.generator_term(reconstruction), last_layer)
    return {"ema_real": module.lecam.ema_real, "ema_fake": module.lecam.ema_fake, "weight": weight}


def test_two_processes_agree_with_one_of_twice_the_batch(tmp_path):
    run_ranks(half_the_batch, str(tmp_path), num_processes=2, output=tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = one_step(slice(None))
    assert all(value.abs() > 1e-6 for value in whole.values())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=0)
