"""Another autoencoder as teacher: tiny Wan models of both compressions."""

import runpy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

from diffusers_leanvae import bundled
from diffusers_leanvae.evaluation.diffusability import load_clips
from diffusers_leanvae.losses.alignment import AlignmentWeights, Teacher, alignment_terms
from diffusers_leanvae.models.wavelets import haar_analysis_2d, haar_analysis_3d


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_random_wan.py"
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 0.25]}
# As Wan2.2: pixels are folded into channels before the network, which compresses 8 times more.
WAN_16 = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "is_residual": True}


def make_wan(**config: Any) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**(WAN | config))


def statistics(teacher: Teacher) -> dict[str, Any]:
    return {"latents_mean": teacher.latents_mean, "latents_std": teacher.latents_std}


@pytest.mark.parametrize(
    "config, student_config, ratio",
    [pytest.param({}, {}, 8, id="4x8x8"), pytest.param(WAN_16, {"patch_size": (2, 8, 8)}, 16, id="4x16x16")],
)
def test_student_and_teacher_have_one_latent_layout(make_model, make_video, config, student_config, ratio: int):
    teacher = Teacher(make_wan(**config))
    assert (teacher.latent_channels, teacher.compression_ratios) == (4, (4, ratio, ratio))
    student = make_model(**student_config, **statistics(teacher))
    teacher.check_student(student)
    sample = make_video(1, 3, 5, 32, 64)
    latents = teacher.encode(sample)
    own = student.encode(sample).latent_dist.mode()
    assert latents.shape == own.shape == (1, 4, 2, 32 // ratio, 64 // ratio)

    terms, reconstruction = alignment_terms(student, latents, own, sample, normalise=True)
    assert set(terms) == set(asdict(AlignmentWeights())) and reconstruction.shape == sample.shape
    torch.stack(list(terms.values())).sum().backward()
    still = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"logvar_proj.weight", "logvar_proj.bias"}  # means alone are aligned
    assert all(p.grad is None for p in teacher.vae.parameters())


def test_terms_are_those_of_the_specification(make_model, make_video):
    teacher = Teacher(make_wan())
    student = make_model(**statistics(teacher))
    sample = make_video(1, 3, 9, 32, 32)
    latents, own = teacher.encode(sample), student.encode(sample).latent_dist.mode()
    terms, reconstruction = alignment_terms(student, latents, own, sample, normalise=True)

    decoded = student.decode(latents).sample
    torch.testing.assert_close(reconstruction, decoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(terms["align_pixel"], 0.5 * F.l1_loss(decoded, sample), rtol=0, atol=1e-5)
    mean, std = (torch.tensor(s).view(1, 4, 1, 1, 1) for s in (teacher.latents_mean, teacher.latents_std))
    normalised = F.l1_loss((own - mean) / std, (latents - mean) / std)
    torch.testing.assert_close(terms["align_latents"], normalised, rtol=0, atol=1e-5)
    error = 0.5 * (decoded - sample)
    bands = (haar_analysis_2d(error[:, :, :1]), haar_analysis_3d(error[:, :, 1:]))
    for name, part in (("align_low", slice(3)), ("align_high", slice(3, None))):
        torch.testing.assert_close(terms[name], sum(b[:, part].abs().mean() for b in bands), rtol=0, atol=1e-4)

    plain = alignment_terms(student, latents, own, sample, normalise=False).terms
    torch.testing.assert_close(plain["align_latents"], F.l1_loss(own, latents), rtol=0, atol=1e-6)


def test_teacher_is_deterministic_frozen_and_no_part_of_a_model(make_video):
    teacher = Teacher(make_wan().train())
    sample = make_video(1, 3, 5, 16, 16)
    latents = teacher.encode(sample.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        again = teacher.encode(sample)
    assert torch.equal(latents, again) and not latents.requires_grad
    assert not teacher.vae.training and not any(p.requires_grad for p in teacher.vae.parameters())
    module = torch.nn.Linear(1, 1)
    setattr(module, "teacher", teacher)  # noqa: B010 - as a training module may hold it
    assert set(module.state_dict()) == {"weight", "bias"}


def test_teacher_from_a_folder(tmp_path, make_video):
    wan = make_wan().eval()
    wan.save_pretrained(tmp_path / "pipeline" / "vae")
    teacher = Teacher.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    assert type(teacher.vae) is AutoencoderKLWan
    assert (teacher.latents_mean, teacher.latents_std) == (WAN["latents_mean"], WAN["latents_std"])
    assert teacher.scaling_factor == 1.0
    sample = make_video(1, 3, 5, 16, 16)
    assert torch.equal(teacher.encode(sample), Teacher(wan).encode(sample))
    half = Teacher.from_pretrained(tmp_path / "pipeline" / "vae", dtype=torch.float64)
    assert half.vae.dtype == torch.float64 and half.encode(sample).dtype == torch.float32


def test_a_teacher_with_a_factor_alone(make_model, make_video):
    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    teacher = Teacher(AutoencoderKLCogVideoX(**sizes))
    assert (teacher.latents_mean, teacher.latents_std, teacher.scaling_factor) == (None, None, 1.15258426)
    student = make_model()
    teacher.check_student(student)
    sample = make_video(1, 3, 9, 32, 32)
    assert teacher.encode(sample).shape == student.encode(sample).latent_dist.mode().shape


def test_a_leanvae_can_teach_as_well(make_model, make_video):
    teacher, student = Teacher(make_model(seed=1)), make_model()
    teacher.check_student(student)
    assert teacher.latents_mean is None
    sample = make_video(1, 3, 5, 16, 16)
    latents, own = teacher.encode(sample), student.encode(sample).latent_dist.mode()
    with pytest.raises(ValueError, match="`normalise` must be false"):
        alignment_terms(student, latents, own, sample, normalise=True)


def test_what_does_not_fit_is_refused(make_model, make_video):
    with pytest.raises(ValueError, match="4 channels at a compression of 4x16x16"):
        Teacher(make_wan(**WAN_16)).check_student(make_model())
    with pytest.raises(ValueError, match="got 8 channels at 4x8x8"):
        Teacher(make_wan()).check_student(make_model(latent_channels=8))
    with pytest.raises(ValueError, match="`latents_mean` in the teacher's config must have 4 entries, got 16."):
        Teacher(make_wan(latents_mean=[0.0] * 16))
    latents = torch.zeros(1, 4, 2, 2, 2)
    with pytest.raises(ValueError, match="`teacher_latents` must have the shape"):
        alignment_terms(make_model(), latents, latents[..., :1], make_video(1, 3, 5, 16, 16), normalise=False)


def test_training_on_the_terms_aligns_the_latents(make_model, make_video):
    teacher = Teacher(make_wan())
    student = make_model(num_fusion_layers=1, **statistics(teacher)).train()
    sample = make_video(2, 3, 5, 16, 16)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    latents, errors = teacher.encode(sample), []
    for _ in range(30):
        terms = alignment_terms(
            student, latents, student.encode(sample).latent_dist.mode(), sample, normalise=True
        ).terms
        errors.append(terms["align_latents"].item())
        optimizer.zero_grad()
        (terms["align_latents"] + terms["align_pixel"]).backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0], errors


def test_the_script_makes_a_teacher_whose_latents_vary(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [SCRIPT.name, str(tmp_path), "--latent-channels", "4", "--base-dim", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    teacher = Teacher.from_pretrained(tmp_path)
    assert teacher.compression_ratios == (4, 8, 8) and teacher.latents_mean == [0.0] * 4
    clips = load_clips(bundled.clip_path().parent, 8, (17, 64, 64), seed=0)
    std = teacher.encode(clips.float() / 127.5 - 1).std(dim=(0, 2, 3, 4))
    torch.testing.assert_close(std, torch.tensor(teacher.latents_std), rtol=0, atol=1e-3)
