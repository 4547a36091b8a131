"""Steps of training, and the clip indices that every process draws in each, starting at any step."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from torch.utils.data import Sampler


@dataclass(frozen=True)
class Share:
    """The part of every step that one process draws.

    Args:
        rank: This process, from 0.
        world_size: Number of processes.
        num_accumulation_steps: Batches per step and process.
    """

    rank: int = 0
    world_size: int = 1
    num_accumulation_steps: int = 1

    @property
    def num_parts(self) -> int:
        """Batches of a step, over all processes."""
        return self.world_size * self.num_accumulation_steps


ALONE = Share()  # one process, which draws all of every step


@dataclass(frozen=True)
class StepSchedule:
    """The kind of each step, videos or images, and the clip indices that belong to it.

    Image steps are spread evenly. Step `s` owns the indices from `s * clips_per_step` on; a step of videos leaves the
    last of them unused where image steps are larger.

    Args:
        batch_size: Clips of a step of videos, over all processes and accumulation steps.
        image_ratio: The share of steps whose clips are single frames.
        image_batch_factor: Such a step has this many times more clips.
        procedural: The share of clips that are procedural footage, spread evenly over the clips of all steps.
    """

    batch_size: int
    image_ratio: float = 0.0
    image_batch_factor: int = 1
    procedural: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.image_ratio <= 1.0:
            raise ValueError(f"`image_ratio` must be from 0 to 1, got {self.image_ratio}.")
        if self.image_batch_factor < 1:
            raise ValueError(f"`image_batch_factor` must be at least 1, got {self.image_batch_factor}.")
        if not 0.0 <= self.procedural <= 1.0:
            raise ValueError(f"`procedural` must be from 0 to 1, got {self.procedural}.")

    @property
    def clips_per_step(self) -> int:
        return self.batch_size * (self.image_batch_factor if self.image_ratio > 0 else 1)

    def num_image_steps(self, step: int) -> int:
        """Count the image steps before `step`."""
        return _share_of(self.image_ratio, step)

    def is_image_step(self, step: int) -> bool:
        return self.num_image_steps(step + 1) > self.num_image_steps(step)

    def num_clips(self, step: int) -> int:
        return self.batch_size * (self.image_batch_factor if self.is_image_step(step) else 1)

    def is_procedural(self, index: int) -> bool:
        """Tell whether the clip of this index is procedural footage."""
        step, position = divmod(index, self.clips_per_step)
        num_larger = (self.image_batch_factor - 1) * self.num_image_steps(step)
        number = (step + num_larger) * self.batch_size + position  # indices have gaps
        return _share_of(self.procedural, number + 1) > _share_of(self.procedural, number)


def _share_of(ratio: float, count: int) -> int:
    """Count those of the first `count` that belong to a share which is spread evenly."""
    exact = Fraction(ratio).limit_denominator(10_000)  # both sides of a step must agree
    return count * exact.numerator // exact.denominator


class StepBatches(Sampler[list[int]]):
    """The index lists of one process: step `s` uses the clips from `s * schedule.clips_per_step` on.

    Args:
        schedule: How many clips a step has.
        start_step: The first step to draw, later ones when resuming.
        num_steps: The step to stop before.
        share: The part of a step that this process draws.
    """

    def __init__(self, schedule: StepSchedule, start_step: int, num_steps: int, share: Share = ALONE) -> None:
        if schedule.batch_size < 1 or schedule.batch_size % share.num_parts:
            raise ValueError(
                f"`batch_size` must be a multiple of {share.num_accumulation_steps} accumulation steps times "
                f"{share.world_size} processes, got {schedule.batch_size}."
            )
        self.schedule, self.start_step, self.num_steps, self.share = schedule, start_step, num_steps, share

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step) * self.share.num_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            count = self.schedule.num_clips(step) // self.share.num_parts
            for part in range(self.share.rank, self.share.num_parts, self.share.world_size):
                first = step * self.schedule.clips_per_step + part * count
                yield list(range(first, first + count))
