"""Which video pipelines of diffusers run with our autoencoders as `vae`: tiny random networks, real schedulers.

    python benchmarks/stock_pipelines.py    # writes results/stock_pipelines.json

A pipeline samples two steps twice from one seed, to frames and to latents. It runs if the frames have the size that
was asked for and are what the autoencoder decodes from those latents, after their normalisation is undone once.
Prompts are given as embeddings, so that no text encoder is needed. The table is in docs/diffusers_pipelines.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils import logging
from PIL import Image

from diffusers_leanvae import AutoencoderKLIVVAE, AutoencoderKLLeanVAE, AutoencoderKLWFVAE
from diffusers_leanvae.checks import one_line
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.latents import denormalize_latents


ROOT = Path(__file__).resolve().parent.parent
NUM_FRAMES, HEIGHT, WIDTH, DIM = 9, 32, 32, 16
FLOW, COG = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.CogVideoXDDIMScheduler
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
WAN = HEADS | {
    "patch_size": (1, 2, 2),
    "text_dim": DIM,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
COGVIDEOX = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 4, "text_embed_dim": DIM}


class Stock(NamedTuple):
    """How a pipeline is built around an autoencoder, and called.

    `statistics` is what of our config it applies: all of it, or the factor alone.
    """

    statistics: str
    components: Callable[[Any], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]


def _embeds(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def _video() -> list[Image.Image]:
    return [_image(seed) for seed in range(NUM_FRAMES)]


def _wan(in_channels: Callable[[int], int] = int, model: str = "WanTransformer3DModel", **config: Any) -> Any:
    def components(vae: Any) -> dict[str, Any]:
        channels = vae.config.latent_channels
        transformer = getattr(diffusers, model)(
            **WAN, in_channels=in_channels(channels), out_channels=channels, **config
        )
        return {"scheduler": FLOW(shift=5.0), "transformer": transformer}

    return components


def _vace(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    mask = vae.config.spatial_compression_ratio**2
    return _wan(model="WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=2 * channels + mask)(vae)


def _skyreels(vae: Any) -> dict[str, Any]:
    transformer = _wan(model="SkyReelsV2Transformer3DModel")(vae)["transformer"]
    return {
        "scheduler": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    } | {"transformer": transformer}


def _hunyuan(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=DIM,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return {"scheduler": FLOW(shift=7.0), "transformer": transformer} | dict.fromkeys(
        ("text_encoder_2", "tokenizer_2")
    )


def _hunyuan15(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * channels + 1,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=DIM,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
    encoders = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    return {"scheduler": FLOW(shift=7.0), "transformer": transformer, "guider": guider} | encoders


def _cogvideox(factor: int = 1) -> Callable[[Any], dict[str, Any]]:
    def components(vae: Any) -> dict[str, Any]:
        channels = vae.config.latent_channels
        transformer = diffusers.CogVideoXTransformer3DModel(
            **COGVIDEOX,
            in_channels=factor * channels,
            out_channels=channels,
            num_layers=1,
            sample_width=WIDTH // 8,
            sample_height=HEIGHT // 8,
            sample_frames=NUM_FRAMES,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=6,
            use_rotary_positional_embeddings=True,
        )
        return {"scheduler": COG(), "transformer": transformer}

    return components


def _ltx(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=DIM,
    )
    return {"scheduler": FLOW(), "transformer": transformer}


def _mochi(vae: Any) -> dict[str, Any]:
    transformer = diffusers.MochiTransformer3DModel(
        **HEADS,
        in_channels=vae.config.latent_channels,
        num_layers=2,
        pooled_projection_dim=DIM,
        text_embed_dim=DIM,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return {"scheduler": FLOW(), "transformer": transformer}


def _latte(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    transformer = diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=1,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=DIM,
        video_length=3,
    )
    return {"scheduler": diffusers.DDIMScheduler(), "transformer": transformer}


def _allegro(vae: Any) -> dict[str, Any]:
    channels = vae.config.latent_channels
    transformer = diffusers.AllegroTransformer3DModel(
        **HEADS,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=NUM_FRAMES,
        caption_channels=DIM,
    )
    return {"scheduler": diffusers.DDIMScheduler(), "transformer": transformer}


def _prompt(**more: Any) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        made = {name: value() if callable(value) else value for name, value in more.items()}
        return {"prompt_embeds": _embeds(1, 6, DIM), "guidance_scale": 1.0, "num_frames": NUM_FRAMES} | made

    return inputs


def _mask(length: int = 6) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.long)


def _given_video() -> dict[str, Any]:
    return {"video": _video(), "prompt_embeds": _embeds(1, 6, DIM), "guidance_scale": 1.0, "strength": 0.6}


def _hunyuan15_inputs() -> dict[str, Any]:
    prompts = {"prompt_embeds": _embeds(1, 6, DIM), "prompt_embeds_mask": _mask(), "num_frames": NUM_FRAMES}
    return prompts | {"prompt_embeds_2": _embeds(1, 6, 8), "prompt_embeds_mask_2": _mask()}


def _latte_inputs() -> dict[str, Any]:
    prompts = {"prompt_embeds": _embeds(1, 6, DIM), "negative_prompt": None, "mask_feature": False}
    return prompts | {"guidance_scale": 1.0, "video_length": 3}


ALL, FACTOR = "mean, deviation, factor", "factor"
STOCK = {
    "WanPipeline": Stock(ALL, _wan(), _prompt()),
    "WanImageToVideoPipeline": Stock(ALL, _wan(lambda channels: 2 * channels + 4), _prompt(image=_image)),
    "WanVideoToVideoPipeline": Stock(ALL, _wan(), _given_video),
    "WanVACEPipeline": Stock(ALL, _vace, _prompt(video=_video)),
    "SkyReelsV2Pipeline": Stock(ALL, _skyreels, _prompt()),
    "HunyuanVideoPipeline": Stock(
        FACTOR, _hunyuan, _prompt(pooled_prompt_embeds=_embeds(1, 8), prompt_attention_mask=_mask)
    ),
    "HunyuanVideo15Pipeline": Stock(FACTOR, _hunyuan15, _hunyuan15_inputs),
    "CogVideoXPipeline": Stock(FACTOR, _cogvideox(), _prompt()),
    "CogVideoXImageToVideoPipeline": Stock(FACTOR, _cogvideox(2), _prompt(image=_image)),
    "CogVideoXVideoToVideoPipeline": Stock(FACTOR, _cogvideox(), _given_video),
    "LTXPipeline": Stock(ALL, _ltx, _prompt(prompt_attention_mask=_mask)),
    "MochiPipeline": Stock(ALL, _mochi, _prompt(prompt_attention_mask=_mask)),
    "LattePipeline": Stock(FACTOR, _latte, _latte_inputs),
    "AllegroPipeline": Stock(FACTOR, _allegro, _prompt(prompt_attention_mask=_mask)),
}
SMALL: dict[str, Any] = {
    "LeanVAE": (AutoencoderKLLeanVAE, {"latent_channels": 12, "low_freq_dim": 8, "high_freq_dim": 24}),
    "WF-VAE": (AutoencoderKLWFVAE, {"latent_channels": 12, "base_channels": 4, "encoder_flow_channels": 3}),
    "IV-VAE": (AutoencoderKLIVVAE, {"latent_channels": 12, "base_channels": 4, "channel_multipliers": [1, 2, 3, 3]}),
}


def build(name: str, vae: Any) -> diffusers.DiffusionPipeline:
    """A stock pipeline around an autoencoder; its networks are random, from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = STOCK[name].components(vae)
    pipeline = getattr(diffusers, name)(**({"text_encoder": None, "tokenizer": None, "vae": vae} | components))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(name: str, pipeline: Any, output_type: str) -> torch.Tensor:
    """Frames `(1, num_frames, 3, height, width)` in `[0, 1]`, or latents `(1, z, num_latent_frames, h, w)`."""
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": output_type}
    result = pipeline(**options, **STOCK[name].inputs(), generator=torch.Generator().manual_seed(0)).frames
    return result.transpose(1, 2) if output_type == "latent" and name.startswith("CogVideoX") else result


def decode(name: str, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What frames the latents of a pipeline stand for, when their normalisation is undone once."""
    if STOCK[name].statistics == ALL:
        latents = denormalize_latents(latents, vae.config)
    else:
        latents = latents / vae.config.scaling_factor
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@torch.no_grad()
def try_out(name: str, vae: Any) -> str:
    """Run a pipeline with an autoencoder: "runs", or the error, or what is wrong with the frames."""
    try:
        pipeline = build(name, vae)
        frames, latents = (generate(name, pipeline, kind) for kind in ("pt", "latent"))
        if tuple(frames.shape) != (1, NUM_FRAMES, 3, HEIGHT, WIDTH):
            return f"gives {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[4]}"
        difference = (frames - decode(name, vae, latents)).abs().max().item()
    except Exception as error:  # of any kind: pipelines of others fail in ways of their own
        return f"{type(error).__name__}: {one_line(error)}"
    return "runs" if difference < 1e-4 else f"frames differ by {difference:.2g} from what the latents decode to"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "stock_pipelines.json")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    for name, stock in STOCK.items():
        row = {"pipeline": name, "latents normalised by": stock.statistics}
        for model, (model_class, config) in SMALL.items():
            torch.manual_seed(0)
            row[model] = try_out(name, model_class(**config).eval())
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)
    write_result(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
