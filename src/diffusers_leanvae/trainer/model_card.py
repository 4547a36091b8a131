"""The card of a trained model, filled from its run: recipe, steps, figures. Nothing in it is typed by hand."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ..conversion.checkpoints import is_hub_reference
from ..generation.pipeline import LatentVideoPipeline
from ..hub.cards import CARD_NAME, DESCRIPTIONS, CardOptions, card_metadata, compose_card, render_usage
from ..models.video_autoencoder import VideoAutoencoder
from .finetuning import NEW_MODELS
from .recipe import RunRecipe, dump_recipe


TEMPLATE = """\
# {title}

{kind}, {description}

```python
{usage}
```

Pixels are in `[-1, 1]`, videos `(batch_size, {in_channels}, num_frames, height, width)` with `num_frames` =
{ratio_t} * n + 1 and sizes that are multiples of {ratio_s}; latents have {latent_channels} channels at
{ratio_t}x{ratio_s}x{ratio_s} compression.
{num_parameters:.2f} M parameters, averaged over training ({average}).
"""


PIPELINE_TEMPLATE = """\
# {title}

Generates videos {of_what}: a [Latte](https://arxiv.org/abs/2401.03048) transformer on the latents of an
`{autoencoder}`, {description}

```python
{usage}
{prompt}frames = pipeline({arguments}).frames[0]
```

{num_frames} frames of {height}x{width} from latents of {channels}x{num_latent_frames}x{latent_size}; transformer of
{num_parameters:.2f} M parameters, averaged over training ({average}); sampled by `{scheduler}`.
{classes}"""
RUN_TEMPLATE = """
## Figures

{figures}

## Training

{steps} steps of {batch_size} clips ({minutes:.0f} minutes since the last start); {num_skipped} steps skipped because a
loss or gradient was not finite.
{losses}

The recipe, with all defaults resolved:

```yaml
{recipe}```
"""


def write_model_card(folder: Path, recipe: Any, vae: VideoAutoencoder, run: dict[str, Any]) -> None:
    """Write `README.md` into the folder of a saved model.

    Args:
        folder: The model's folder.
        recipe: The recipe of `train_vae.py`.
        vae: The model.
        run: As of `TrainingRun.summarize`: `step`, `num_skipped`, `minutes`, `validation` (the last record of
            `validation.jsonl`, or `None`), `log` (that of `log.jsonl`, or `None`).
    """
    folder.joinpath(CARD_NAME).write_text(render_model_card(recipe, vae, run), encoding="utf-8")


def render_model_card(recipe: Any, vae: VideoAutoencoder, run: dict[str, Any]) -> str:
    """The text of the card; arguments as of `write_model_card`."""
    is_new = recipe.init in NEW_MODELS
    class_name = type(vae).__name__
    start = "trained from scratch"
    if recipe.init == "image":
        start = f"started from the image autoencoder `{recipe.image_vae.path}`"
    repository, title = _name(recipe)
    tuned = {"full": "all weights", "decoder": "the decoder alone", "lora": "low-rank adapters, merged"}[recipe.tune]
    body = TEMPLATE.format(
        title=title,
        kind=DESCRIPTIONS[class_name].removesuffix("."),
        description=f"{start}." if is_new else f"fine-tuned from `{recipe.init}`: {tuned}.",
        usage=render_usage(class_name, repository, "vae"),
        in_channels=vae.in_channels,
        latent_channels=vae.latent_channels,
        ratio_t=vae.temporal_compression_ratio,
        ratio_s=vae.spatial_compression_ratio,
        num_parameters=sum(parameter.numel() for parameter in vae.parameters()) / 1e6,
        average=_describe_average(recipe),
    )
    tags = ["autoencoder", vae.conversion.NAME.lower().replace("-", "")]
    metadata = card_metadata(class_name, title, _origin(recipe.init if not is_new else None), tags)
    return compose_card(metadata, body + _describe_run(recipe, run, _figures(recipe, run["validation"])))


def write_pipeline_card(
    folder: Path,
    recipe: Any,
    pipeline: LatentVideoPipeline,
    latent_size: Sequence[int],
    run: dict[str, Any],
    prompt: str | None = None,
) -> None:
    """Write `README.md` into the folder of a saved pipeline.

    Args:
        folder: The pipeline's folder.
        recipe: The recipe of `train_lvdm.py`.
        pipeline: The pipeline.
        latent_size: Height and width of the latents that it was trained on.
        run: As of `write_model_card`.
        prompt: An example of what a pipeline of texts can be asked for.
    """
    text = render_pipeline_card(recipe, pipeline, latent_size, run, prompt)
    folder.joinpath(CARD_NAME).write_text(text, encoding="utf-8")


def render_pipeline_card(
    recipe: Any,
    pipeline: LatentVideoPipeline,
    latent_size: Sequence[int],
    run: dict[str, Any],
    prompt: str | None = None,
) -> str:
    """The text of the card of a pipeline; arguments as of `write_pipeline_card`."""
    vae, transformer, id2label = pipeline.vae, pipeline.transformer, pipeline.config.get("id2label")
    config, ratio = transformer.config, cast("int", vae.spatial_compression_ratio)
    height, width = (side * ratio for side in latent_size)
    num_latent_frames = config["num_latent_frames" if recipe.text is None else "video_length"]
    repository, title = _name(recipe)
    tuned = {"full": "", "lora": ": low-rank adapters, merged"}[recipe.tune]
    arguments = ["prompt=prompt"] if recipe.text is not None else []
    if id2label:
        arguments += [f"class_labels={json.dumps(next(iter(id2label.values())), ensure_ascii=False)}"]
    if height != width:  # by itself a pipeline makes squares
        arguments += [f"height={height}, width={width}"]
    arguments += [f"num_inference_steps={recipe.validation.num_inference_steps}"]
    arguments += [f"guidance_scale={recipe.validation.guidance_scale}"]
    class_name = type(pipeline).__name__
    body = PIPELINE_TEMPLATE.format(
        title=title,
        of_what=_of_what(recipe, id2label),
        autoencoder=type(vae).__name__,
        description="trained from scratch." if recipe.init is None else f"fine-tuned from `{recipe.init}`{tuned}.",
        usage=render_usage(class_name, repository, "pipeline"),
        arguments=", ".join(arguments),
        num_frames=vae.num_sample_frames(num_latent_frames),
        height=height,
        width=width,
        channels=config["in_channels"],
        num_latent_frames=num_latent_frames,
        latent_size="x".join(map(str, latent_size)),
        num_parameters=sum(parameter.numel() for parameter in transformer.parameters()) / 1e6,
        average=_describe_average(recipe),
        scheduler=type(pipeline.scheduler).__name__,
        prompt="" if recipe.text is None else f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n",
        classes=_describe_condition(pipeline, recipe, id2label),
    )
    metadata = card_metadata(class_name, title, _origin(recipe.init), ["video-generation", "latte"])
    return compose_card(metadata, body + _describe_run(recipe, run, _denoising_losses(run["validation"])))


def _describe_average(recipe: RunRecipe) -> str:
    if recipe.optimizer.name == "schedule_free":
        return "that of the optimizer"
    if recipe.post_hoc_power is not None:
        return f"by a power function, exponent {recipe.post_hoc_power}, from those in the checkpoints"
    if recipe.ema_power is None:
        return f"decay {recipe.ema_decay}"
    return f"by a power function, exponent {recipe.ema_power}"


def _name(recipe: RunRecipe) -> tuple[str, str]:
    """Return what the model is loaded by, and its title."""
    if recipe.push_to_hub is None:
        return "path/to/this/folder", Path(recipe.output).name
    return recipe.push_to_hub, recipe.push_to_hub.split("/")[-1]


def _origin(init: str | None) -> CardOptions:
    """Name the repository that a run started from, which a folder, a file here or a bundled model is not."""
    if init is None or Path(init).exists() or not is_hub_reference(init) or "://" in init:
        return CardOptions()
    return CardOptions(base_model="/".join(init.split("/")[:2]))


def _describe_run(recipe: Any, run: dict[str, Any], figures: str) -> str:
    return RUN_TEMPLATE.format(
        figures=figures,
        steps=run["step"],
        batch_size=recipe.batch_size,
        minutes=run["minutes"],
        num_skipped=run["num_skipped"],
        losses=_losses(run["log"]),
        recipe=dump_recipe(recipe),
    )


def _of_what(recipe: Any, id2label: dict[str, str] | None) -> str:
    if recipe.text is not None:
        return "of texts"
    return f"of {len(id2label)} classes" if id2label else "without a condition"


def _describe_condition(pipeline: LatentVideoPipeline, recipe: Any, id2label: dict[str, str] | None) -> str:
    if id2label:
        return f"\nClasses: {', '.join(id2label.values())}.\n"
    if recipe.text is None:
        return ""
    encoder, tokenizer = pipeline.components["text_encoder"], pipeline.components["tokenizer"]
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    training = "trained along" if recipe.text.train_text_encoder else "frozen"
    given = recipe.given_frames
    frames = "" if not given.share else f" Up to {given.max_frames} first latent frames can be given, without noise."
    return (
        f"\nTexts of up to {tokenizer.model_max_length} tokens go through a `{type(encoder).__name__}` of "
        f"{num_parameters:.2f} M parameters, {training}.{frames}\n"
    )


def _denoising_losses(validation: dict[str, Any] | None) -> str:
    if validation is None:
        return "No held-out latents were given."
    rows = [
        f"Loss on held-out latents at fixed noise levels (shares of the schedule), step {validation['step']}.",
        "",
        "| noise level | loss |",
        "| --- | --- |",
        *(f"| {level} | {_rounded(loss, 4)} |" for level, loss in validation["levels"].items()),
        f"| mean | {_rounded(validation['loss'], 4)} |",
    ]
    return "\n".join(rows)


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
            f"| {name} | {_rounded(psnr, 2)} | {_rounded(validation['clips_ssim'][name], 4)} |"
            for name, psnr in validation["clips"].items()
        ),
        f"| mean | {_rounded(validation['psnr_frame_mean_rgb'], 2)} | "
        f"{_rounded(validation['ssim_frame_mean_rgb'], 4)} |",
    ]
    return "\n".join(rows)


def _rounded(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _losses(log: dict[str, Any] | None) -> str:
    if log is None or "loss" not in log:
        return "No losses were logged."
    terms = {name: float(f"{value:.4g}") for name, value in log.items() if name not in ("step", "num_skipped")}
    return f"Means over the steps before step {log['step']}: `{json.dumps(terms)}`."


def describe_recipe(recipe: RunRecipe) -> dict[str, bool | int | float | str]:
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
