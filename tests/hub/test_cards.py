"""Cards: how to load, and what the Hub reads."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from huggingface_hub import ModelCard
from tiny import make_tiny

from diffusers_leanvae import hub
from diffusers_leanvae.checks import sha256


RESULT = {"dataset": "val", "psnr_frame_mean_rgb": 26.3, "ssim_frame_mean_rgb": 0.786, "num_videos": 7} | {
    "num_frames": 17,
    "resolution": 256,
    "rfvd_i3d_styleganv": 31.5,
    "bits_per_pixel": 0.25,
    "metrics": {
        "psnr_frame_mean_rgb": {"better": "higher"},
        "ssim_frame_mean_rgb": {"better": "higher"},
        "rfvd_i3d_styleganv": {"better": "lower"},
        "bits_per_pixel": {"better": None},
        "not_measured": {"better": "lower"},
    },
}


def test_cards_say_how_to_load(latte_pipeline: diffusers.DiffusionPipeline, tmp_path: Path):
    latte_pipeline.save_pretrained(tmp_path)
    card = hub.render_hub_card(tmp_path, "someone/shapes")
    assert card.startswith("---\nlibrary_name: diffusers\n") and "# shapes\n" in card
    assert 'diffusers_leanvae.LeanVAELattePipeline.from_pretrained("someone/shapes")' in card
    assert 'DiffusionPipeline.from_pretrained("someone/shapes", trust_remote_code=True)' in card
    assert "trust_remote_code" not in hub.render_hub_card(tmp_path, "someone/shapes", shim=False)
    assert "Classes: circle, square." in card and "| vae | `AutoencoderKLLeanVAE` |" in card
    count = sum(p.numel() for p in latte_pipeline.transformer.parameters()) / 1e6
    assert f"| transformer | `LeanVAELatteTransformer3DModel` | {count:.2f} M parameters |" in card
    assert "pip install diffusers-leanvae" not in card  # no registry has it
    with pytest.raises(ValueError, match="`repo_id` must be `user/name`, got 'vae'"):
        hub.push_to_hub(make_tiny("leanvae"), "vae")
    with pytest.raises(ValueError, match="`safe_serialization` must be True: weights are pushed as safetensors"):
        hub.push_to_hub(make_tiny("leanvae"), "someone/vae", safe_serialization=False)
    for folder in (tmp_path / "scheduler", tmp_path / "nothing", "-"):
        with pytest.raises(ValueError, match="`folder` must be that of a saved model, pipeline or adapter, got"):
            hub.push_folder(folder, "someone/vae")


def test_cards_carry_what_the_hub_reads(tmp_path: Path):
    make_tiny("leanvae").save_pretrained(tmp_path)
    weights = sha256(tmp_path / "diffusion_pytorch_model.safetensors")
    result = tmp_path / "val.json"
    result.write_text(json.dumps(RESULT | {"weights_sha256": weights}))
    picture = tmp_path / "sample.PNG"
    options = hub.CardOptions("apache-2.0", "someone/base", ("someone/clips",), (result,), picture)
    for name, wrong in (("license", "foo bar"), ("base_model", "???"), ("datasets", ("not valid id",))):
        with pytest.raises(ValueError, match=f"^`{name}` must be "):
            hub.CardOptions(**{name: wrong})
    with pytest.raises(ValueError, match=r"^`picture` must be one of .png, .*, got '.env'\.$"):
        hub.CardOptions(picture=Path(".env"))
    with pytest.raises(ValueError, match="`picture` must be an image file, got .*sample.PNG', which is no file"):
        hub.render_hub_card(tmp_path, "someone/vae", options)
    picture.write_bytes(b"picture")
    card = hub.render_hub_card(tmp_path, "someone/vae", options)
    data: Any = ModelCard(card).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "someone/base", ["someone/clips"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("diffusers", "video-to-video", "vae")
    found = {(each.metric_type, each.metric_name, each.metric_value) for each in data.eval_results}
    expected = {("psnr", "psnr_frame_mean_rgb", 26.3), ("ssim", "ssim_frame_mean_rgb", 0.786)}
    assert found == expected | {("rfvd", "rfvd_i3d_styleganv", 31.5)}
    assert "![A sample](picture.png)" in card and "4 latent channels, 4x8x8 compression" in card
    result.write_text(json.dumps(RESULT | {"weights_sha256": None}))
    with pytest.raises(ValueError, match="`results` must be of these weights, got .*val.json', measured with others"):
        hub.render_hub_card(tmp_path, "someone/vae", options)
    for text in ("[]", json.dumps(RESULT), "no JSON"):
        result.write_text(text)
        with pytest.raises(ValueError, match="`results` must be files of `leanvae eval`, got .*val.json"):
            hub.render_hub_card(tmp_path, "someone/vae", options)
    # Our own figures are of our own weights.
    published = Path(__file__).resolve().parents[2] / "results" / "val-17x256_compact-4ch.json"
    bundled_card = hub.render_hub_card("compact-4ch", "someone/vae", hub.CardOptions(results=(published,)))
    psnr = json.loads(published.read_text())["psnr_frame_mean_rgb"]
    assert 25 < psnr < 35 and f"7 videos, 17 frames, 256 pixels | psnr_frame_mean_rgb | {psnr} |" in bundled_card
