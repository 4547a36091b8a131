"""Make the bundled `mini-scenes`: a text-to-video pipeline of two moving objects, trained here from captions to frames.

    python scripts/make_mini_scenes.py text --output runs/mini_scenes_text      # a CPU, some minutes
    python scripts/make_mini_scenes.py pool --output /dev/shm/pool.pt           # a GPU, under a minute
    python scripts/make_mini_scenes.py train --text runs/mini_scenes_text --pool /dev/shm/pool.pt --minutes 7 --output OUT

`text` makes a T5 encoder with a vocabulary of the words of captions, and teaches it to tell from each of a caption's
tokens what the scene is: both objects, which is above or to the left, and the background. `pool` paints scenes on the
GPU and encodes them. `train` trains the transformer, and the text encoder along, by the training module of
`training/train_lvdm.py`; a step is one CUDA graph, and everything random in it is drawn on the GPU, so that a small
model is not held up by the launching of its kernels. The number of steps follows from the time given.

No scene with a held-out look is ever drawn or described here.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
from diffusers_leanvae.text_encoders import TextEmbeddings, load_text_encoder, make_text_encoder, tokenize
from diffusers_leanvae.trainer.denoising_validation import denoise
from diffusers_leanvae.trainer.text_conditioning import build_text_transformer
from diffusers_leanvae.training.train_lvdm import LatentDiffusionTrainingModule


TEXT_SEED, POOL_SEED, VALIDATION_SEED = 7, 11, 1
MAX_LENGTH = 48  # of the tokenizer
LENGTH = 40  # tokens that captions are padded to here; the longest has 35
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
        [
            values.index(getattr(item, name)) if says.get(name, True) else len(values)
            for name, values in PARTS
        ]
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
    sizes = [*properties, len(RELATIONS), len(BACKGROUNDS) + 1, *properties, 2]
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

    for step in range(options.steps):
        share = step / options.steps
        rate = options.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = rate
        losses, right = forward(*next(batches))
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": losses[:12].mean().item(), "order": losses[22].item()}
            row |= {"named": losses[12:22].mean().item(), "right": right[:12].all(0).float().mean().item()}
            print(json.dumps(row | {"seconds": time.monotonic() - started}), flush=True)
    with torch.no_grad():
        rights = [forward(*next(held))[1] for held in [caption_batches(500, VALIDATION_SEED)] for _ in range(2)]
    print(json.dumps({"held_out_captions_all_right": torch.cat(rights, 1)[:12].all(0).float().mean().item()}), flush=True)
    encoder.model.save_pretrained(options.output / "text_encoder")
    encoder.tokenizer.save_pretrained(options.output / "tokenizer")


# --- The pool of encoded scenes --------------------------------------------------------------------------------------


def describe_range(job: tuple[int, int, int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Lay out scenes: rows of 28 numbers for `paint`, and captions."""
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
    time_line = torch.linspace(0, 1, num_frames, device=rows.device)
    for item in rows[:, 4:].split(10, dim=1):
        shape, extent_x, extent_y = (value[:, None, None, None] for value in item[:, :3].unbind(1))
        x, y = (item[:, 3 + k, None] + time_line * (item[:, 5 + k] - item[:, 3 + k])[:, None] for k in (0, 1))
        place = torch.arange(side, device=rows.device)
        coverage = torch.zeros((), device=rows.device)
        for i in range(4):
            v = (place[:, None] + (i + 0.5) / 4 - y[..., None, None]) / (extent_y / 2)  # (B, T, side, 1)
            for j in range(4):
                u = (place + (j + 0.5) / 4 - x[..., None, None]) / (extent_x / 2)  # (B, T, 1, side)
                is_box = (u.abs() <= 1) & (v.abs() <= 1)
                is_cross = is_box & (torch.minimum(u.abs(), v.abs()) <= 0.36)
                is_triangle = (u.abs() <= (v + 1) / 2) & (v <= 1)
                inside = torch.where(shape == 2, is_triangle, is_cross)
                inside = torch.where(shape == 1, is_box, inside)
                coverage = coverage + torch.where(shape == 0, u * u + v * v <= 1, inside)
        pixels = pixels + coverage[:, None] / 16 * (item[:, 7:, None, None, None] - pixels)
    return pixels * 2 - 1


@torch.no_grad()
def make_pool(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    vae = load_autoencoder(options.vae).to(device).eval()
    encoder = load_text_encoder(options.text, max_length=MAX_LENGTH)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    painter = torch.compile(paint, dynamic=False) if device.type == "cuda" else paint
    pool: dict[str, Any] = {"side": options.side, "vae": options.vae}
    for name, seed, count in (("train", POOL_SEED, options.num_scenes), ("validation", VALIDATION_SEED, 512)):
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


def train(options: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pool = torch.load(options.pool, weights_only=True, mmap=True)
    encoder = load_text_encoder(options.text, max_length=MAX_LENGTH)
    data = {name: value.to(device) for name, value in pool["train"].items()}
    held = {name: value.to(device) for name, value in pool["validation"].items()}
    # Mean and deviation of the channels, of the first scenes, as of `latent_statistics: data`.
    some = data["latents"][:4096].double()
    mean, std = (value.view(1, -1, 1, 1, 1).float() for value in (some.mean((0, 2, 3, 4)), some.std((0, 2, 3, 4))))
    for part in (data, held):
        for piece in part["latents"].split(8192):
            piece.copy_((piece.float() - mean) / std)
    channels, num_frames, side = data["latents"].shape[1:4]
    null = tokenize(encoder.tokenizer, [""], LENGTH)
    null_ids, null_mask = (value.to(device) for value in null)
    heads = options.heads
    config = {
        "in_channels": channels, "out_channels": channels, "sample_size": side, "num_latent_frames": num_frames,
        "num_attention_heads": heads, "attention_head_dim": 32, "num_layers": 2 * options.layers,
        "patch_size": options.patch,
    }  # fmt: skip
    transformer = build_text_transformer(config, {}, encoder.width, None)
    objective = FlowMatchingObjective("uniform", shift=options.shift)
    module = LatentDiffusionTrainingModule(transformer, objective, text_encoder=GraphableTextEncoder(encoder.model))
    module.to(device).train()
    encoder.model.eval()
    names = [name for name, _ in module.named_parameters()]
    parameters = list(module.parameters())
    if options.resume is not None:
        state = torch.load(options.resume, weights_only=True)
        for name, parameter in module.named_parameters():
            parameter.data.copy_(state[name])
    average = [parameter.detach().clone() for parameter in parameters]
    print(f"{sum(p.numel() for p in transformer.parameters())} parameters, {len(data['latents'])} scenes", flush=True)
    if is_cuda:
        transformer.compile(dynamic=False)
    rates = [torch.tensor(0.0, device=device) for _ in range(2)]
    is_text = [name.startswith("text_encoder.") for name in names]
    groups = [[p for p, t in zip(parameters, is_text, strict=True) if t == which] for which in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        betas=(0.9, 0.99), weight_decay=0.01, fused=is_cuda, capturable=is_cuda,
    )  # fmt: skip
    size, num_captions, total = options.batch_size, data["ids"].shape[1], torch.zeros(2, device=device)

    def step() -> None:
        number = torch.randint(0, len(data["latents"]), (size,), device=device)
        which = torch.randint(0, num_captions, (size,), device=device)
        latents = data["latents"][number].float()
        is_dropped = torch.rand(size, 1, device=device) < 0.1
        ids = torch.where(is_dropped, null_ids, data["ids"][number, which].long())
        mask = torch.where(is_dropped, null_mask, data["mask"][number, which].long())
        given = torch.randint(1, 3, (size,), device=device) * (torch.rand(size, device=device) < 0.1)
        uniform = (torch.arange(size, device=device) + torch.rand(size, device=device)) / size
        noise = torch.randn_like(latents)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = module(
                latents, noise, objective.timesteps(uniform), text=TextEmbeddings(ids, mask), num_given=given
            ).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(average, parameters, options.average_weight)
        total.add_(torch.stack((loss.detach(), norm.detach())))

    replay = step
    if is_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                optimizer.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        print(f"compiled {time.monotonic() - started:.1f} s", flush=True)
        optimizer.zero_grad(set_to_none=True)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        except Exception as error:  # noqa: BLE001 - a run on a lent machine must not end here
            print(f"no graph: {error!r}", flush=True)
            torch.cuda.synchronize()
    if replay is step:

        def replay() -> None:
            optimizer.zero_grad(set_to_none=True)
            step()

    for value, parameter in zip(average, parameters, strict=True):
        value.copy_(parameter)
    begun = time.monotonic()
    for _ in range(options.probe):
        replay()
    total.tolist()
    per_step = (time.monotonic() - begun) / options.probe
    left = options.minutes * 60 - (time.monotonic() - started) - options.reserve
    num_steps = options.steps or max(10, int(left / per_step / 1.01))
    print(f"{1000 * per_step:.2f} ms a step, {num_steps} steps", flush=True)
    log = open(options.output / "log.jsonl", "w")  # noqa: SIM115

    @torch.no_grad()
    def validate(number: int) -> None:
        current = [parameter.detach().clone() for parameter in parameters]
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
        latents, ids, mask = held["latents"].float(), held["ids"][:, 0].long(), held["mask"][:, 0].long()
        count = len(latents) if is_cuda else 16
        latents, ids, mask = latents[:count], ids[:count], mask[:count]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
        module.text_encoder.eval()
        states = module.text_encoder(ids, mask)[0]
        row: dict[str, Any] = {"step": number}
        for level in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0):
            timesteps = objective.timesteps_at(torch.full((count,), level, device=device))
            noisy = objective.add_noise(latents, noise, timesteps)
            for kind, shift in (("right", 0), ("wrong", 1)):
                text = TextEmbeddings(states.roll(shift, 0), mask.roll(shift, 0))
                with torch.autocast(device.type, torch.bfloat16):
                    output = eager(noisy, timesteps, text)
                row[f"{kind}_{level}"] = objective.loss(output, latents, noise, timesteps)["loss"].mean().item()
        for parameter, value in zip(parameters, current, strict=True):
            parameter.copy_(value)
        print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
        log.write(json.dumps(row) + "\n")
        log.flush()

    def eager(noisy: torch.Tensor, timesteps: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return denoise(transformer, noisy, timesteps, None, text)

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        current = [parameter.detach().clone() for parameter in parameters]
        for parameter, value in zip(parameters, average, strict=True):
            parameter.data.copy_(value)
        from diffusers_leanvae import LeanVAELatteTextToVideoPipeline

        vae = load_autoencoder(pool["vae"])
        vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
        parts = (encoder.tokenizer, encoder.model, vae, transformer, make_scheduler("flow", options.shift))
        pipeline = LeanVAELatteTextToVideoPipeline(*parts, True)
        pipeline.save_pretrained(folder)
        for parameter, value in zip(parameters, current, strict=True):
            parameter.data.copy_(value)

    total.zero_()
    every = max(1, min(options.log_every, num_steps // 10))
    begun = last = time.monotonic()
    warm, hold = max(1, min(500, num_steps // 10)), int(options.hold * num_steps)
    next_check = interval = max(1, num_steps // 6)
    for number in range(1, num_steps + 1):
        share = min(1.0, number / warm, (num_steps - number) / max(1, num_steps - hold))
        rates[0].fill_(options.rate * share)
        rates[1].fill_(options.rate * options.text_rate * share)
        replay()
        if number % every == 0 or number == num_steps:
            loss, norm = (total / every).tolist()
            total.zero_()
            now = time.monotonic()
            row = {"step": number, "loss": loss, "grad_norm": norm, "seconds_per_step": (now - last) / every}
            last = now
            log.write(json.dumps(row) + "\n")
            if number % (every * 10) == 0 or not is_cuda:
                print(f"[{now - started:.0f} s]", json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
            if not math.isfinite(loss):
                print("diverged", flush=True)
                break
        if number >= next_check and number < num_steps:
            validate(number)
            next_check += interval
    validate(number)
    torch.save(dict(module.named_parameters()), options.output / "state.pt")
    save(options.output / "pipeline")
    settings = {k: str(v) for k, v in vars(options).items() if k != "run"}
    settings["device"] = torch.cuda.get_device_name() if is_cuda else "cpu"
    settings |= {"num_steps": number, "train_seconds": time.monotonic() - begun}
    (options.output / "settings.json").write_text(json.dumps(settings, indent=2))
    print(f"done {time.monotonic() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    text = commands.add_parser("text", help="make and teach the text encoder")
    text.add_argument("--output", type=Path, required=True)
    text.add_argument("--steps", type=int, default=6000)
    text.add_argument("--batch-size", type=int, default=64)
    text.add_argument("--rate", type=float, default=1e-3)
    text.set_defaults(run=train_text)
    pool = commands.add_parser("pool", help="paint and encode scenes")
    pool.add_argument("--output", type=Path, required=True)
    pool.add_argument("--text", type=Path, required=True)
    pool.add_argument("--vae", default="compact-4ch")
    pool.add_argument("--side", type=int, default=128)
    pool.add_argument("--num-scenes", type=int, default=262_144)
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
    fit.add_argument("--resume", type=Path, help="state.pt of an earlier run to go on from, at a new rate")
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
    fit.add_argument("--log-every", type=int, default=100)
    fit.add_argument("--device", default="cuda")
    fit.set_defaults(run=train)
    options = parser.parse_args()
    if options.output.suffix != ".pt":
        options.output.mkdir(parents=True, exist_ok=True)
    options.run(options)


if __name__ == "__main__":
    main()
