"""The card of a trained model, filled from its run: recipe, steps, figures. Nothing in it is typed by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .recipe import dump_recipe


TEMPLATE = """\
---
library_name: diffusers
tags:
- video
- autoencoder
- leanvae
- diffusers-leanvae
{base_model}---

# {title}

A [LeanVAE](https://arxiv.org/abs/2503.14325) video autoencoder, {description}

```python
import diffusers_leanvae

vae = diffusers_leanvae.AutoencoderKLLeanVAE.from_pretrained("{repository}")
```

Pixels are in `[-1, 1]`, videos `(batch_size, {in_channels}, num_frames, height, width)` with `num_frames` =
{ratio_t} * n + 1 and sizes that are multiples of {ratio_s}; latents have {latent_channels} channels at
{ratio_t}x{ratio_s}x{ratio_s} compression.
{num_parameters:.2f} M parameters, averaged over training (decay {ema_decay}).

## Figures

{figures}

## Training

{steps} steps of {batch_size} clips{minutes}; {num_skipped} steps skipped for want of a finite loss or gradient.
{losses}

The recipe, with all defaults resolved:

```yaml
{recipe}```
"""


def write_model_card(folder: Path, recipe: Any, vae: Any, run: dict[str, Any]) -> None:
    """Write `README.md` into the folder of a saved model.

    Args:
        folder: The model's folder.
        recipe: The recipe of `train_vae.py`.
        vae: The model.
        run: `step`, `num_skipped`, `minutes` (of the last start, or `None`), `validation` (the last record of
            `validation.jsonl`, or `None`), `log` (that of `log.jsonl`, or `None`).
    """
    folder.joinpath("README.md").write_text(render_model_card(recipe, vae, run), encoding="utf-8")


def render_model_card(recipe: Any, vae: Any, run: dict[str, Any]) -> str:
    """The text of the card; arguments as of `write_model_card`."""
    is_new = recipe.init in ("spec", "pca")
    repository = recipe.push_to_hub or "path/to/this/folder"
    tuned = {"full": "all weights", "decoder": "the decoder alone", "lora": "low-rank adapters, merged"}[recipe.tune]
    minutes = "" if run["minutes"] is None else f" ({run['minutes']:.0f} minutes since the last start)"
    return TEMPLATE.format(
        base_model=f"base_model: {recipe.init}\n" if not is_new and recipe.init.count("/") == 1 else "",
        title=repository.split("/")[-1] if recipe.push_to_hub else Path(recipe.output).name,
        description="trained from scratch." if is_new else f"fine-tuned from `{recipe.init}`: {tuned}.",
        repository=repository,
        in_channels=vae.config.in_channels,
        latent_channels=vae.config.latent_channels,
        ratio_t=vae.temporal_compression_ratio,
        ratio_s=vae.spatial_compression_ratio,
        num_parameters=sum(parameter.numel() for parameter in vae.parameters()) / 1e6,
        ema_decay=recipe.ema_decay,
        figures=_figures(recipe, run["validation"]),
        steps=run["step"],
        batch_size=recipe.batch_size,
        minutes=minutes,
        num_skipped=run["num_skipped"],
        losses=_losses(run["log"]),
        recipe=dump_recipe(recipe),
    )


def _figures(recipe: Any, validation: dict[str, Any] | None) -> str:
    if validation is None:
        return "No validation videos were given."
    size, num_frames = recipe.validation.size, recipe.validation.num_frames
    rows = [
        f"{num_frames} frames of {size}x{size} from the start and the centre of {len(validation['clips'])} videos; "
        f"mean over frames, then over videos; posterior means; step {validation['step']}.",
        "",
        "| video | PSNR (dB) | SSIM |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {psnr:.2f} | {validation['clips_ssim'][name]:.4f} |"
            for name, psnr in validation["clips"].items()
        ),
        f"| mean | {validation['psnr_frame_mean_rgb']:.2f} | {validation['ssim_frame_mean_rgb']:.4f} |",
    ]
    return "\n".join(rows)


def _losses(log: dict[str, Any] | None) -> str:
    if log is None or "loss" not in log:
        return "No losses were logged."
    terms = {name: float(f"{value:.4g}") for name, value in log.items() if name not in ("step", "num_skipped")}
    return f"Means over the steps before step {log['step']}: `{json.dumps(terms)}`."


def describe_recipe(recipe: Any) -> dict[str, bool | int | float | str]:
    """A recipe as flat names and plain values, as trackers take it."""
    flat: dict[str, bool | int | float | str] = {}

    def visit(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)

    visit(dataclasses.asdict(recipe), "")
    return flat
