"""The frame around the loop of a training script: start, resume, log, save and stop. The step stays in the script.

run = TrainingRun(recipe, "leanvae")
...                                                  # data, and models prepared by `run.accelerator`, or `run.prepare`
run.resume(dataset, ema, [optimizer])
batches = run.load(dataset.batches(run.progress.step, recipe.num_steps))
for step in run.steps():
    for _ in run.parts(module):
        with run.loading():
            batch = next(batches)
        loss, terms = module(batch)
        run.backward(loss)
        run.add_terms(terms)
    norm = clip_gradients(parameters, max_norm)
    if run.is_finite(norm):
        optimizer.step()
        ema.step(weights_to_average(optimizer, parameters))
    run.finish({"loss": run.loss} | run.terms | {"grad_norm": norm})
    if run.is_due(recipe.save_every):
        run.save()
    ...                                              # validate, once the step is saved
run.check_finite(averaged)
with run.export("model") as folder:
    ...
run.close()
...                                                  # once `main` has returned: `launching.leave_job`
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..atomic import replace_folder
from ..checks import check_place
from ..data.datasets import ClipDataset
from ..data.latent_samples import LatentData
from ..data.schedule import Share, StepBatches
from ..hub import check_push, push_folder
from ..launching import start_accelerator
from .checkpoints import (
    Progress,
    abandon_after,
    append_json,
    find_checkpoint,
    forget_after,
    list_checkpoints,
    load_data_state,
    remove_leftovers,
    save_checkpoint,
    step_of,
    writing,
)
from .model_card import describe_recipe
from .post_hoc import average_post_hoc, check_exponents, check_steps
from .recipe import OptimizerRecipe, RunRecipe, check_optimizer, save_recipe
from .schedule_free import ScheduleFreeAdamW
from .sharding import WeightAverage, check_checkpoint, check_launcher, shard
from .trackers import check_trackers, log_media
from .whitened_muon import WhitenedMuon


OPTIMIZER_SETTINGS = ("lr", "lr_factor", "betas", "weight_decay")  # of a parameter group, what recipes set
NUM_TRACKED = 4  # pictures and videos of a validation that trackers get


class TrainingRun:
    """One run of a training script, in each of its processes.

    Args:
        recipe: What the run was asked for; `recipe.output` is its folder.
        name: The run's name for trackers.
        find_unused_parameters: Whether some steps leave parameters without a gradient; as of
            `torch.nn.parallel.DistributedDataParallel`.
        can_shard: Whether the script prepares its model by `prepare`, and so can be launched with FSDP.

    Attributes:
        accelerator: Prepares models and optimizers.
        device, is_main: This process.
        share: What this process draws of every step.
        is_sharding: Whether FSDP shards the model.
        say: Print a line, in the main process alone.
        checkpoint: The folder that the run resumes from, or `None` for a new run.
        progress: Counters of the run, which checkpoints keep.
        loss: Mean of the losses given to `backward` in this step, of this process; without a gradient.
        terms: Means of the terms given to `add_terms` in this step, likewise.
        num_bad_videos: Unusable videos met in this step by this process, for the script to count.
    """

    def __init__(
        self, recipe: RunRecipe, name: str, find_unused_parameters: bool = False, can_shard: bool = False
    ) -> None:
        self._started = time.monotonic()
        self.recipe, self.name, self.output = recipe, name, Path(recipe.output)
        check_place("`output`", self.output, self.output)
        check_launcher(recipe, can_shard)
        torch.set_float32_matmul_precision("high")
        check_trackers(recipe.trackers)
        is_mixed = recipe.mixed_precision not in (None, "fp32")
        self.accelerator = start_accelerator(
            mixed_precision=recipe.mixed_precision if is_mixed else "no",
            log_with=list(recipe.trackers) or None,
            project_dir=self.output,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
        if recipe.num_threads is not None:  # after Accelerate, which has a number of its own for several processes
            torch.set_num_threads(recipe.num_threads)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.is_sharding = self.accelerator.distributed_type == DistributedType.FSDP
        self.share = Share(
            self.accelerator.process_index, self.accelerator.num_processes, recipe.num_accumulation_steps
        )
        if is_mixed and self.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.say("warning: this CPU has no bfloat16 arithmetic, `mixed_precision=null` is many times faster")
        if recipe.push_to_hub is not None and self.is_main:  # now, and not when the work is done
            check_push(recipe.push_to_hub)
        set_seed(recipe.seed)
        self._checkpoints = self.output / "checkpoints"
        self.checkpoint = find_checkpoint(self._checkpoints, recipe.resume)
        if self.checkpoint is not None:
            check_checkpoint(self.checkpoint, self.is_sharding)
            check_optimizer(self.checkpoint, recipe.optimizer.name)
        self._check_post_hoc()
        self.progress, self.loss, self.num_bad_videos = Progress(), torch.zeros((), device=self.device), 0
        self.terms: dict[str, torch.Tensor] = {}
        self._means, self._minutes, self._is_finite, self._is_out_of_time = RunningMeans(), 0.0, True, False
        self._step_started = self._cpu_started = self._data_seconds = self._learning_rate = 0.0

    def _check_post_hoc(self) -> None:
        """Refuse an average to put together that the checkpoints there, and those to come, are not enough for."""
        recipe = self.recipe
        if recipe.post_hoc_power is None or recipe.ema_power is None:
            return
        done = 0 if self.checkpoint is None else step_of(self.checkpoint)
        found = [path for path in list_checkpoints(self._checkpoints) if step_of(path) <= done]
        check_exponents(found, recipe.ema_power)
        steps = [step_of(path) for path in found]
        if done < recipe.num_steps:
            every = recipe.save_every
            coming = range((done // every + 1) * every, recipe.num_steps, every)
            steps = [*steps, *coming, recipe.num_steps][-recipe.keep_checkpoints :]
        check_steps(steps, recipe.ema_power, recipe.post_hoc_power)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    # --- Start -------------------------------------------------------------------------------------------------------

    def prepare(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, blocks: Iterable[torch.nn.Module]
    ) -> torch.nn.Module:
        """Prepare the one module that a step calls: with FSDP it is sharded, in place, and otherwise wrapped.

        Args:
            module: On its device.
            optimizer: Of the module, which gets the new parameters.
            blocks: As of `shard`.
        """
        if self.is_sharding:
            return shard(self.accelerator, module, optimizer, blocks)
        return self.accelerator.prepare(module)

    def resume(
        self, dataset: ClipDataset | LatentData, ema: WeightAverage, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Take up the checkpoint, if there is one, and open the logs; once all models are prepared.

        Args:
            dataset: The training data, whose position checkpoints keep.
            ema: The averaged weights.
            optimizers: Prepared here, for checkpoints and fp16; steps are taken on the optimizers themselves. The
                first follows the learning rate of the recipe.
        """
        self._dataset, self._optimizers, self._ema = dataset, optimizers, ema
        for optimizer in () if self.is_sharding else optimizers:
            self.accelerator.prepare(optimizer)
        self.accelerator.register_for_checkpointing(ema, self.progress)
        if self.checkpoint is not None:
            with named_misfits(self.checkpoint), keeping_settings(optimizers, ema):
                self.accelerator.load_state(str(self.checkpoint))
            ema.load_shards(self.checkpoint)
            ema.to(self.device)
            dataset.load_state_dict(load_data_state(self.checkpoint, self.share.rank))
            self.say(f"resumed from {self.checkpoint}")
        if self.is_main:
            with writing(self.output):
                self._checkpoints.mkdir(parents=True, exist_ok=True)
                if self.checkpoint is not None:
                    abandon_after(self._checkpoints, self.progress.step)
                remove_leftovers(self._checkpoints)
                save_recipe(self.recipe, self.output / "recipe.yaml")
            for name in ("log.jsonl", "validation.jsonl"):
                forget_after(self.output / name, self.progress.step if self.checkpoint is not None else -1)
        if self.recipe.trackers:
            self.accelerator.init_trackers(self.name, config=describe_recipe(self.recipe))
        self.accelerator.wait_for_everyone()

    def load(
        self, batch_sampler: StepBatches, num_workers: int = 0, collate_fn: Callable[[Any], Any] | None = None
    ) -> Iterator[Any]:
        """Iterate over the batches of the data, pinned for a GPU; arguments as of `torch.utils.data.DataLoader`."""
        return iter(
            DataLoader(
                self._dataset,
                batch_sampler=batch_sampler,
                num_workers=num_workers,
                collate_fn=collate_fn,
                pin_memory=self.device.type == "cuda",
            )
        )

    # --- Steps -------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the number of each step that is left, with the learning rate set; stop early when time is over."""
        recipe, progress = self.recipe, self.progress
        self._bar = tqdm(total=recipe.num_steps, initial=progress.step, disable=not self.is_main, mininterval=1.0)
        while progress.step < recipe.num_steps and not self._is_out_of_time:
            self._step_started, self._cpu_started, self._data_seconds = time.monotonic(), time.process_time(), 0.0
            self.loss, self.terms, self.num_bad_videos = torch.zeros((), device=self.device), {}, 0
            self._learning_rate = recipe.optimizer.learning_rate_at(progress.step, recipe.num_steps)
            for group in self._optimizers[0].param_groups:
                group["lr"] = self._learning_rate * group.get("lr_factor", 1.0)
            yield progress.step
        if self._is_out_of_time:
            self.say(f"stopped at step {progress.step} of {recipe.num_steps}: {self._minutes:.1f} minutes are over")
        self._bar.close()

    def parts(self, *modules: torch.nn.Module) -> Iterator[int]:
        """Yield the number of each accumulation step; when they are done, gradients are complete and unscaled.

        Gradients of the prepared `modules` are synchronised between processes with the last part only.
        """
        for part in range(self.recipe.num_accumulation_steps):
            with contextlib.ExitStack() as stack:
                if part < self.recipe.num_accumulation_steps - 1:
                    for module in modules:
                        stack.enter_context(self.accelerator.no_sync(module))
                yield part
        self.accelerator.unscale_gradients()  # fp16

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Count the time of the block as time spent on data."""
        started = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - started

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the loss of one part."""
        self.accelerator.backward(loss / self.recipe.num_accumulation_steps)
        self.loss += loss.detach() / self.recipe.num_accumulation_steps

    def add_terms(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Count the terms of one part, without gradients; all parts of a step have the same."""
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term / self.recipe.num_accumulation_steps

    def is_finite(self, *grad_norms: torch.Tensor) -> bool:
        """Return whether the step's loss and gradients are finite in all processes, once in every step.

        Averages are the same in all processes, so all skip the same steps and leave the loop at the same one.
        """
        self._minutes, mean_bad_videos, *values = average(
            self.accelerator, [self._minutes_since_start, self.num_bad_videos, self.loss, *grad_norms]
        )
        self.progress.num_bad_videos += round(mean_bad_videos * self.share.world_size)
        self._is_out_of_time = self.recipe.max_minutes is not None and self._minutes >= self.recipe.max_minutes
        self._is_finite = all(map(math.isfinite, values))
        return self._is_finite

    def finish(self, terms: Mapping[str, torch.Tensor | float]) -> None:
        """Close a step: forget its gradients, count it, and log the means of `terms` where the recipe says so.

        Raises:
            RuntimeError: If too many steps in a row had no finite loss and gradient.
        """
        recipe, progress = self.recipe, self.progress
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # fp16: a smaller scale after gradients that were not finite
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        progress.step += 1
        progress.num_skipped += not self._is_finite
        progress.num_skipped_in_a_row = 0 if self._is_finite else progress.num_skipped_in_a_row + 1
        if self._is_finite:
            seconds = time.monotonic() - self._step_started
            times = {"seconds_per_step": seconds, "data_seconds_per_step": self._data_seconds}
            # Of all threads together: comparable where other programs take their share of the processor.
            times["cpu_seconds_per_step"] = time.process_time() - self._cpu_started
            self._means.update({**terms, **times})
        self._bar.update()
        if self.is_due(recipe.log_every):
            record = {"step": progress.step, "lr": self._learning_rate, "num_skipped": progress.num_skipped}
            record |= {"num_bad_videos": progress.num_bad_videos} | self._means.read(self.accelerator)
            if self.is_main:
                append_json(self.output / "log.jsonl", record)
                self.accelerator.log(record, step=progress.step)
                self._bar.set_postfix(loss=record.get("loss"), refresh=False)
        if progress.num_skipped_in_a_row >= recipe.max_skipped_steps:
            raise RuntimeError(
                f"Stopped: the {recipe.max_skipped_steps} newest steps had no finite loss and gradient."
            )

    def is_due(self, every: int) -> bool:
        """Return whether something that happens every few steps, and after the last one, happens now."""
        is_over = self._is_out_of_time or self.progress.step == self.recipe.num_steps
        return is_over or self.progress.step % every == 0

    def log_validation(self, figures: dict[str, Any]) -> None:
        """Write figures to `validation.jsonl`, and the numbers among them to the trackers; in the main process.

        They take the place of those of the same step, which a run that resumes from it may measure again.
        """
        step = self.progress.step
        forget_after(self.output / "validation.jsonl", step - 1)
        append_json(self.output / "validation.jsonl", {"step": step} | figures)
        means = {name: value for name, value in figures.items() if isinstance(value, float)}
        self.accelerator.log({f"validation/{name}": value for name, value in means.items()}, step=step)

    def show(self, pictures: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        """Show what a validation has made in the trackers; in the main process.

        Args:
            pictures: Files by name; the name is the same at each step.
            videos: Files in mp4, likewise. Trackers keep copies, so they get the first few.
        """
        shown, played = (
            {f"validation/{name}": path for name, path in islice(files.items(), NUM_TRACKED)}
            for files in (pictures, videos)
        )
        log_media(self.accelerator, self.progress.step, shown, played)

    def save(self) -> None:
        """Write a checkpoint; every process calls."""
        step = self.progress.step
        data_state = self._dataset.state_dict(step)
        keep = self.recipe.keep_checkpoints
        save_checkpoint(self.accelerator, self._checkpoints, step, keep, data_state, self._ema)

    # --- End ---------------------------------------------------------------------------------------------------------

    def average_post_hoc(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Make the average that `post_hoc_power` asks for of those in the checkpoints; every process calls.

        Args:
            parameters: What is averaged.

        Returns:
            Whether the recipe asks for one, so that the average is another now.
        """
        power = self.recipe.post_hoc_power
        if power is None:
            return False
        checkpoints = list_checkpoints(self._checkpoints)
        share = average_post_hoc(self._ema, parameters, checkpoints, power)
        self.say(
            f"averaged by a power function, exponent {power}, from {len(checkpoints)} checkpoints; {share:.1%} of it "
            f"counts for other steps than meant"
        )
        return True

    def check_finite(self, *models: torch.nn.Module | None) -> None:
        """Refuse weights that cannot be exported as `save_dtype`, before anything is replaced; `None` is no model.

        Raises:
            RuntimeError: If some are not finite in it.
        """
        dtype = self.recipe.save_dtype
        for model in models:
            for name, tensor in () if model is None else model.state_dict().items():
                if tensor.is_floating_point() and not tensor.to(getattr(torch, dtype)).isfinite().all():
                    raise RuntimeError(
                        f"Nothing was exported: the averaged weights must be finite in {dtype}, got others in "
                        f"{name!r} after {self.progress.step} steps."
                    )

    @contextlib.contextmanager
    def export(self, name: str) -> Iterator[Path]:
        """Fill the folder `name` of the output, which then goes to the Hub if asked for; in the main process."""
        target = self.output / name
        with writing(target), replace_folder(target) as folder:
            yield folder
        self.say(f"saved {target}")
        if self.recipe.push_to_hub is not None:
            push_folder(target, self.recipe.push_to_hub)
            self.say(f"uploaded to {self.recipe.push_to_hub}")

    def summarize(self) -> dict[str, Any]:
        """Tell a model card of the run: counters, minutes since the start, newest records of both logs (or `None`)."""
        summary = asdict(self.progress) | {"minutes": self._minutes_since_start}
        for name in ("log", "validation"):
            path = self.output / f"{name}.jsonl"
            # A run that resumes before the first record of a log leaves the file without a line.
            newest = path.read_text(encoding="utf-8").splitlines()[-1:] if path.exists() else []
            summary[name] = json.loads(newest[0]) if newest else None
        return summary

    def close(self) -> None:
        """Wait for all processes, then close data and trackers; `leave_job` is for when the models are gone too."""
        self._dataset.close()
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @property
    def _minutes_since_start(self) -> float:
        return (time.monotonic() - self._started) / 60


# --- What a run is made of -------------------------------------------------------------------------------------------


def build_optimizer(
    recipe: OptimizerRecipe, module: torch.nn.Module, adamw_layers: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer of whatever requires a gradient in a module; `adamw_layers` as of `WhitenedMuon`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.betas[0], recipe.betas[1]),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.name == "muon":
        return WhitenedMuon(module, adamw_factor=recipe.adamw_factor, adamw_layers=adamw_layers, **common)
    if recipe.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                '`optimizer.name: adamw8bit` needs bitsandbytes: pip install "diffusers-leanvae[adamw8bit]"'
            ) from error
        return AdamW8bit(parameters, **common)
    if recipe.name == "schedule_free":
        return ScheduleFreeAdamW(parameters, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def weights_to_average(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> Sequence[torch.Tensor]:
    """What an average takes after a step: the parameters, or what a schedule-free optimizer has averaged."""
    return optimizer.averages(parameters) if isinstance(optimizer, ScheduleFreeAdamW) else parameters


@contextlib.contextmanager
def named_misfits(checkpoint: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint is of another model than the recipe's."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__).strip()
        raise ValueError(
            f"`resume` must be a checkpoint of the model and the discriminators of this recipe, got "
            f"{str(checkpoint)!r} ({reason}): take the former recipe, or another `output`."
        ) from error


@contextlib.contextmanager
def keeping_settings(optimizers: Sequence[torch.optim.Optimizer], ema: WeightAverage) -> Iterator[None]:
    """Keep what the recipe sets of optimizers and average while a checkpoint is loaded, which has settings of its own.

    A run may resume with another recipe, and what it then says of itself must be what it does.
    """
    settings = [
        [{name: group[name] for name in OPTIMIZER_SETTINGS if name in group} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    decay, min_decay = ema.decay, ema.min_decay
    yield
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    ema.decay, ema.min_decay = decay, min_decay


def average(accelerator: Accelerator, values: Sequence[torch.Tensor | float]) -> list[float]:
    """Average each value over all processes."""
    tensors = [torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in values]
    reduced: Any = accelerator.reduce(torch.stack(tensors), reduction="mean")
    return reduced.tolist()


class RunningMeans:
    """Means of named values since the last reading; nothing waits for the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[torch.Tensor | float, int]] = {}

    def update(self, values: Mapping[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        names, sums = list(self.sums), list(self.sums.values())
        self.sums = {}
        if not names:
            return {}
        return dict(zip(names, average(accelerator, [total / count for total, count in sums]), strict=True))
