"""Make the bundled `mini-scenes`: a text-to-video pipeline of two moving objects, from captions to frames.

    python scripts/make_mini_scenes.py text --output runs/scenes_text           # a CPU, under 20 minutes
    python scripts/make_mini_scenes.py pool --text runs/scenes_text --output /dev/shm/pool.pt         # a GPU
    python scripts/make_mini_scenes.py train --text runs/scenes_text --pool /dev/shm/pool.pt --output runs/scenes

`text` makes a T5 encoder with a vocabulary of the words of captions, and teaches it to tell from each of a caption's
tokens what the scene is: both objects, which is above or to the left, and the background. `pool` paints scenes on the
GPU and encodes them. `train` trains the transformer, and the text encoder along, by the training module of
`training/train_lvdm.py`; a step is one CUDA graph, and everything random in it is drawn on the GPU, so that a small
model is not held up by the launching of its kernels. The number of steps follows from the time given.

No scene with a held-out look is ever drawn or described here.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers_leanvae.training.train_lvdm import LatentDiffusionTrainingModule
from torch import nn

from diffusers_leanvae.data.drawing import NUM_SAMPLES, is_inside
from diffusers_leanvae.data.scenes import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    MovingScenes,
    Scene,
    lay_out_scene,
)
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.latents import encode_batch
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.losses.diffusion import FlowMatchingObjective
from diffusers_leanvae.text_encoders import (
    TextEmbeddings,
    encode_tokens,
    load_text_encoder,
    make_text_encoder,
    tokenize,
)
from diffusers_leanvae.trainer.denoising_validation import denoise
from diffusers_leanvae.trainer.text_conditioning import build_text_transformer


TEXT_SEED, POOL_SEED, VALIDATION_SEED = 7, 11, 1
MAX_LENGTH = 48  # of the tokenizer
LENGTH = 40  # tokens that captions are padded to here; the longest has 34
TEXT_CONFIG = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
PARTS = (("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("direction", DIRECTIONS), ("speed", SPEEDS))


# --- Text ------------------------------------------------------------------------------------------------------------


def label_caption(scene: Scene, caption: str) -> list[int]:
    """Number what a caption says: five properties of each object, the relation, the background, then what helps.

    What it may leave out has one number more, for "not said". What helps is a step on the way: the same properties in
    the order in which the objects are named, and whether the first one named is the first; -100 where both look alike.
    """
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    says = {"size": bool({*words} & {*SIZES}), "speed": bool({*words} & {"slowly", "quickly", "fast"})}
    objects = [
        [values.index(getattr(item, name)) if says.get(name, True) else len(values) for name, values in PARTS]
        for item in (scene.first, scene.second)
    ]
    relation = RELATIONS.index(scene.relation)
    background = BACKGROUNDS.index(scene.background) if "background" in words else len(BACKGROUNDS)
    place = next(number for number, word in enumerate(words) if word in SHAPES)
    named = [SHAPES.index(words[place]), COLORS.index(words[place - 1])]
    is_first = [named == item[:2] for item in objects]
    if is_first[0] == is_first[1]:
        order = [-100] * 11
    else:
        order = [*objects[is_first[1]], *objects[is_first[0]], int(is_first[0])]
    return [*objects[0], *objects[1], relation, background, *order]


def caption_batches(batch_size: int, seed: int) -> Iterator[tuple[list[str], torch.Tensor]]:
    scenes = MovingScenes(seed=seed, num_clips=10**9)
    start = 0
    while True:
        numbers = range(start, start + batch_size)
        start += batch_size
        captions = [scenes.captions(number, 1)[0] for number in numbers]
        labels = [label_caption(scenes.scene(number), text) for number, text in zip(numbers, captions, strict=True)]
        yield captions, torch.tensor(labels)


def train_text(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    scenes = MovingScenes(seed=TEXT_SEED, num_clips=20_000)
    encoder = make_text_encoder((c for n in range(20_000) for c in scenes.captions(n, 1)), TEXT_CONFIG, MAX_LENGTH)
    properties = [len(values) + (name in ("size", "speed")) for name, values in PARTS] * 2
    told = [*properties, len(RELATIONS), len(BACKGROUNDS) + 1]
    sizes = [*told, *properties, 2]  # as `label_caption` numbers them
    head = nn.Linear(encoder.width, sum(sizes))
    parameters = [*encoder.model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches, started = caption_batches(options.batch_size, TEXT_SEED), time.monotonic()

    def forward(captions: list[str], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = tokenize(encoder.tokenizer, captions, LENGTH)
        logits = head(encoder.model(input_ids=ids, attention_mask=mask)[0])  # (B, L, sum(sizes))
        losses, right = [], []
        for number, part in enumerate(logits.split(sizes, dim=-1)):
            wanted = labels[:, number, None].expand(-1, LENGTH)
            losses.append((F.cross_entropy(part.transpose(1, 2), wanted, reduction="none") * mask).sum() / mask.sum())
            right.append((part * mask[..., None]).sum(1).argmax(-1) == labels[:, number])
        return torch.stack(losses), torch.stack(right)

    def share_right(right: torch.Tensor) -> float:
        """Share of captions of which all is right but what only helps."""
        return right[: len(told)].all(0).float().mean().item()

    for step in range(options.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 100) * decay
        losses, right = forward(*next(batches))
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": losses[: len(told)].mean().item(), "order": losses[-1].item()}
            row |= {"named": losses[len(told) : -1].mean().item(), "right": share_right(right)}
            print(json.dumps(row | {"seconds": time.monotonic() - started}), flush=True)
    with torch.no_grad():
        share = share_right(forward(*next(caption_batches(1000, VALIDATION_SEED)))[1])
    print(json.dumps({"held_out_captions_all_right": share}), flush=True)
    encoder.model.save_pretrained(options.output / "text_encoder")
    encoder.tokenizer.save_pretrained(options.output / "tokenizer")


# --- The pool of encoded scenes --------------------------------------------------------------------------------------


def describe_range(job: tuple[int, int, int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Lay out scenes: rows of 24 numbers for `paint`, and captions."""
    seed, start, stop, side, num_captions = job
    scenes = MovingScenes(17, side, side, seed=seed, num_clips=stop)
    rows, captions = [], []
    for number in range(start, stop):
        scene = scenes.scene(number)
        layout = lay_out_scene(scene, 17, side, side, seed, number)
        row = [*layout.ground, layout.angle]
        for item, place in zip((scene.first, scene.second), layout.objects, strict=True):
            row += [SHAPES.index(item.shape), place.extent_x, place.extent_y]
            row += [place.x[0], place.y[0], place.x[-1], place.y[-1], *place.color]
        rows.append(row)
        captions.append(scenes.captions(number, num_captions))
    return np.array(rows, np.float32), captions


def paint(rows: torch.Tensor, side: int, num_frames: int = 17) -> torch.Tensor:
    """Paint scenes as `draw_scene` does, many at once: `(B, 3, num_frames, side, side)` in `[-1, 1]`."""
    line = torch.linspace(-1, 1, side, device=rows.device)
    ground, angle = rows[:, :3, None, None, None], rows[:, 3, None, None]
    ramp = 1 + 0.1 * (line[:, None] * angle.sin() + line * angle.cos())  # (B, side, side)
    pixels = ground * ramp[:, None, None]
    time_line, place = torch.linspace(0, 1, num_frames, device=rows.device), torch.arange(side, device=rows.device)
    for item in rows[:, 4:].split(10, dim=1):
        shape, extent_x, extent_y = (value[:, None, None, None] for value in item[:, :3].unbind(1))
        x, y = (item[:, 3 + k, None] + time_line * (item[:, 5 + k] - item[:, 3 + k])[:, None] for k in (0, 1))
        coverage = torch.zeros((), device=rows.device)
        for i, j in itertools.product(range(NUM_SAMPLES), repeat=2):
            v = (place[:, None] + (i + 0.5) / NUM_SAMPLES - y[..., None, None]) / (extent_y / 2)  # (B, T, side, 1)
            u = (place + (j + 0.5) / NUM_SAMPLES - x[..., None, None]) / (extent_x / 2)  # (B, T, 1, side)
            for number, name in enumerate(SHAPES):
                coverage = coverage + ((shape == number) & is_inside(name, u, v))
        pixels = pixels + coverage[:, None] / NUM_SAMPLES**2 * (item[:, 7:, None, None, None] - pixels)
    return pixels * 2 - 1


@torch.no_grad()
def make_pool(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    vae = load_autoencoder(options.vae).to(device).eval()
    encoder = load_text_encoder(options.text, max_length=MAX_LENGTH)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    painter = torch.compile(paint, dynamic=False) if device.type == "cuda" else paint
    pool: dict[str, Any] = {"vae": options.vae}
    for name, seed, count in (
        ("train", POOL_SEED, options.num_scenes),
        ("validation", VALIDATION_SEED, options.num_held_out),
    ):
        started = time.monotonic()
        piece = max(1, min(2048, count // options.workers))
        jobs = [(seed, n, min(n + piece, count), options.side, options.num_captions) for n in range(0, count, piece)]
        latents, ids, masks = [], [], []
        with multiprocessing.get_context("spawn").Pool(options.workers) as workers:
            for rows, captions in workers.imap(describe_range, jobs):
                texts = tokenize(encoder.tokenizer, [text for some in captions for text in some], LENGTH)
                ids.append(texts[0].view(len(captions), -1, LENGTH).to(torch.uint8))
                masks.append(texts[1].view(len(captions), -1, LENGTH).to(torch.uint8))
                for part in torch.from_numpy(rows).to(device).split(options.batch_size):
                    full = F.pad(part, (0, 0, 0, options.batch_size - len(part)))  # one shape, compiled once
                    latents.append(encode_batch(vae, painter(full, options.side))[: len(part)].to(torch.float16))
        pool[name] = {"latents": torch.cat(latents).cpu(), "ids": torch.cat(ids), "mask": torch.cat(masks)}
        print(name, tuple(pool[name]["latents"].shape), f"{time.monotonic() - started:.1f} s", flush=True)
    torch.save(pool, options.output)


# --- Training --------------------------------------------------------------------------------------------------------


class GraphableTextEncoder(nn.Module):
    """The text encoder given its mask as a bias: transformers would look into a mask, which no CUDA graph can."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        bias = (1 - attention_mask.float())[:, None, None] * torch.finfo(torch.float32).min
        return (self.model(input_ids=input_ids, attention_mask=bias)[0],)


class Training:
    """All that a step needs, on the device: the pool, the models, their averages, and the optimizer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.encoder = load_text_encoder(options.text, max_length=MAX_LENGTH)
        self.null = [value.to(self.device) for value in tokenize(self.encoder.tokenizer, [""], LENGTH)]
        pool = torch.load(options.pool, weights_only=True, mmap=True)
        self.vae_name = pool["vae"]
        self.data, self.held_out = (
            {name: value.to(self.device) for name, value in pool[part].items()} for part in ("train", "validation")
        )
        # Mean and deviation of the channels, of the first scenes, as of `latent_statistics: data`.
        some = self.data["latents"][:4096].double()
        self.mean, self.std = some.mean((0, 2, 3, 4)).float(), some.std((0, 2, 3, 4)).float()
        for part in (self.data, self.held_out):
            for piece in part["latents"].split(8192):
                piece.copy_((piece.float() - _per_channel(self.mean)) / _per_channel(self.std))
        channels, num_frames, side = self.data["latents"].shape[1:4]
        shape = {"in_channels": channels, "out_channels": channels, "sample_size": side}
        shape |= {"num_latent_frames": num_frames, "num_attention_heads": options.heads, "attention_head_dim": 32}
        shape |= {"num_layers": 2 * options.layers, "patch_size": options.patch}
        self.transformer = build_text_transformer(shape, {}, self.encoder.width, None)
        self.objective = FlowMatchingObjective("uniform", shift=options.shift)
        text_encoder = GraphableTextEncoder(self.encoder.model)
        self.module = LatentDiffusionTrainingModule(self.transformer, self.objective, text_encoder=text_encoder)
        self.module.to(self.device).train()
        self.encoder.model.eval()
        self.parameters = list(self.module.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.rates = [torch.tensor(0.0, device=self.device) for _ in range(2)]  # of the transformer, of the text
        groups = [list(self.transformer.parameters()), list(self.encoder.model.parameters())]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in zip(groups, self.rates, strict=True)],
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=self.is_cuda,
            capturable=self.is_cuda,
        )
        self.sums = torch.zeros(2, device=self.device)  # of loss and norm of the gradient

    def step(self) -> None:
        """Take one step; nothing here may wait for the GPU."""
        size, device, data = self.options.batch_size, self.device, self.data
        number = torch.randint(0, len(data["latents"]), (size,), device=device)
        which = torch.randint(0, data["ids"].shape[1], (size,), device=device)
        is_dropped = torch.rand(size, 1, device=device) < 0.1
        ids = torch.where(is_dropped, self.null[0], data["ids"][number, which].long())
        mask = torch.where(is_dropped, self.null[1], data["mask"][number, which].long())
        given = torch.randint(1, 3, (size,), device=device) * (torch.rand(size, device=device) < 0.1)
        uniform = (torch.arange(size, device=device) + torch.rand(size, device=device)) / size
        latents, timesteps = data["latents"][number].float(), self.objective.timesteps(uniform)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            text = TextEmbeddings(ids, mask)
            loss = self.module(latents, torch.randn_like(latents), timesteps, text=text, num_given=given).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.parameters, self.options.average_weight)
        self.sums.add_(torch.stack((loss.detach(), norm.detach())))

    def prepare(self) -> Callable[[], None]:
        """Compile the transformer and record a step as a CUDA graph; return what runs a step."""

        def plain() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self.step()

        if not self.is_cuda:
            return plain
        self.transformer.compile(dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                plain()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages of the weights into the models."""
        with torch.no_grad():
            current = [parameter.detach().clone() for parameter in self.parameters]
            torch._foreach_copy_(self.parameters, self.averages)
            yield
            torch._foreach_copy_(self.parameters, current)

    def validate(self) -> dict[str, float]:
        """Measure the losses of held-out scenes at fixed levels, with their captions and with those of others."""
        latents, ids, mask = (self.held_out[name] for name in ("latents", "ids", "mask"))
        count = len(latents) if self.is_cuda else 16
        latents, ids, mask = latents[:count].float(), ids[:count, 0].long(), mask[:count, 0].long()
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        row = {}
        with self.averaged(), torch.compiler.set_stance("force_eager"):
            states = encode_tokens(self.encoder.model, ids, mask)
            for level in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0):
                timesteps = self.objective.timesteps_at(torch.full((count,), level, device=self.device))
                noisy = self.objective.add_noise(latents, noise, timesteps)
                for kind, shift in (("right", 0), ("wrong", 1)):
                    text = TextEmbeddings(states.roll(shift, 0), mask.roll(shift, 0))
                    with torch.autocast(self.device.type, torch.bfloat16):
                        output = denoise(self.transformer, noisy, timesteps, None, text)
                    losses = self.objective.loss(output, latents, noise, timesteps)["loss"]
                    row[f"{kind}_{level}"] = losses.mean().item()
        return row

    def save(self, folder: Path) -> None:
        """Write the pipeline with averaged weights."""
        from diffusers_leanvae import LeanVAELatteTextToVideoPipeline

        vae = load_autoencoder(self.vae_name)
        vae.register_to_config(latents_mean=self.mean.tolist(), latents_std=self.std.tolist())
        parts = (self.encoder.tokenizer, self.encoder.model, vae, self.transformer)
        with self.averaged():
            scheduler = make_scheduler("flow", self.options.shift)
            LeanVAELatteTextToVideoPipeline(*parts, scheduler, clean_given_frames=True).save_pretrained(folder)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1, 1)


def rate_at(step: int, num_steps: int, hold: float) -> float:
    """Share of the learning rate: up for 500 steps, held until a share `hold` of them, then down to zero."""
    warm = max(1, min(500, num_steps // 10))
    return min(1.0, step / warm, (num_steps - step) / max(1, num_steps - int(hold * num_steps)))


def train(options: argparse.Namespace) -> None:
    started = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    training = Training(options)
    run_step = training.prepare()
    begun = time.monotonic()
    for _ in range(options.probe):  # at a learning rate of zero
        run_step()
    training.sums.tolist()  # waits
    seconds_per_step = (time.monotonic() - begun) / options.probe
    left = options.minutes * 60 - (time.monotonic() - started) - options.reserve
    num_steps = options.steps or max(10, int(left / seconds_per_step))
    print(f"{1000 * seconds_per_step:.2f} ms a step, {num_steps} steps", flush=True)
    torch._foreach_copy_(training.averages, [parameter.detach() for parameter in training.parameters])
    training.sums.zero_()
    every, interval = max(1, min(100, num_steps // 10)), max(1, num_steps // 6)
    begun = last = time.monotonic()
    with open(options.output / "log.jsonl", "w", encoding="utf-8") as log:

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)

        for number in range(1, num_steps + 1):
            share = rate_at(number, num_steps, options.hold)
            training.rates[0].fill_(options.rate * share)
            training.rates[1].fill_(options.rate * options.text_rate * share)
            run_step()
            if number % every == 0:
                (loss, norm), now = (training.sums / every).tolist(), time.monotonic()
                training.sums.zero_()
                write({"step": number, "loss": loss, "grad_norm": norm, "seconds_per_step": (now - last) / every})
                last = now
            if number % interval == 0 or number == num_steps:
                write({"step": number} | training.validate())
    training.save(options.output / "pipeline")
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(options).items()}
    del settings["run"]
    settings |= {"num_steps": num_steps, "train_seconds": time.monotonic() - begun}
    settings["device"] = torch.cuda.get_device_name() if training.is_cuda else "cpu"
    (options.output / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    text = commands.add_parser("text", help="make and teach the text encoder")
    text.add_argument("--output", type=Path, required=True)
    text.add_argument("--steps", type=int, default=4000)
    text.add_argument("--batch-size", type=int, default=64)
    text.add_argument("--rate", type=float, default=3e-3)
    text.set_defaults(run=train_text)
    pool = commands.add_parser("pool", help="paint and encode scenes")
    pool.add_argument("--output", type=Path, required=True)
    pool.add_argument("--text", type=Path, required=True)
    pool.add_argument("--vae", default="compact-4ch")
    pool.add_argument("--side", type=int, default=128)
    pool.add_argument("--num-scenes", type=int, default=262_144)
    pool.add_argument("--num-held-out", type=int, default=512, help="scenes for the validation")
    pool.add_argument("--num-captions", type=int, default=4)
    pool.add_argument("--batch-size", type=int, default=128)
    pool.add_argument("--workers", type=int, default=12)
    pool.add_argument("--device", default="cuda")
    pool.set_defaults(run=make_pool)
    fit = commands.add_parser("train", help="train on the pool")
    fit.add_argument("--output", type=Path, required=True)
    fit.add_argument("--text", type=Path, required=True)
    fit.add_argument("--pool", type=Path, required=True)
    fit.add_argument("--minutes", type=float, default=7.0, help="from start to end")
    fit.add_argument("--reserve", type=float, default=15.0, help="seconds of them for the end")
    fit.add_argument("--steps", type=int, default=None, help="instead of what the time allows")
    fit.add_argument("--probe", type=int, default=50, help="steps that measure how long one takes")
    fit.add_argument("--batch-size", type=int, default=256)
    fit.add_argument("--heads", type=int, default=8)
    fit.add_argument("--layers", type=int, default=6, help="pairs of blocks")
    fit.add_argument("--patch", type=int, default=4)
    fit.add_argument("--shift", type=float, default=3.0)
    fit.add_argument("--rate", type=float, default=1e-3)
    fit.add_argument("--text-rate", type=float, default=0.1, help="of the rate")
    fit.add_argument("--hold", type=float, default=0.3, help="share of the steps at the full rate")
    fit.add_argument("--average-weight", type=float, default=0.001)
    fit.add_argument("--device", default="cuda")
    fit.set_defaults(run=train)
    options = parser.parse_args()
    if options.output.suffix != ".pt":
        options.output.mkdir(parents=True, exist_ok=True)
    options.run(options)


if __name__ == "__main__":
    main()
