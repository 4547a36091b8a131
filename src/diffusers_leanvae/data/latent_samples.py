"""Samples for latent diffusion: cached latents, or clips that a frozen autoencoder encodes on the fly.

Both come in the same order; the i-th sample of training is a function of the seed and of i, and of nothing else.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..text_encoders import TextEmbeddings
from .datasets import ClipDataset
from .named import NamedDataset
from .schedule import ALONE, Share, StepBatches, StepSchedule


class LatentBatch(NamedTuple):
    """A batch before encoding.

    Attributes:
        videos: Latents `(B, C, F, h, w)`, not normalised, or pixels `(B, 3, T, H, W)`, uint8 or in `[-1, 1]`.
        images: Likewise `(B * num_images, ..., 1, ..., ...)`, or `None`.
        class_labels: `(B,)`, with images `(B, 1 + num_images)`, or `None`.
        index: Numbers of the samples in training, `(B,)`.
        num_skipped: Unusable videos that were passed over.
        captions: A caption of each video, or `None`.
        text: Embeddings of these captions where they are stored with the latents, or `None`.
    """

    videos: torch.Tensor
    images: torch.Tensor | None
    class_labels: torch.Tensor | None
    index: torch.Tensor
    num_skipped: int
    captions: list[str] | None = None
    text: TextEmbeddings | None = None


class _Values(NamedTuple):
    """Latents or pixels of items, their labels where these are used, and all their captions where those are."""

    videos: torch.Tensor
    labels: torch.Tensor | None
    captions: list[tuple[str, ...]] | None


class LatentData(Dataset[LatentBatch]):
    """Endless samples of a list of items, reshuffled in every epoch; a batch is fetched in one call.

    Args:
        items: A `LatentFolder` (`latents`, `class_label`), clips (`pixels`, `class_label`), or a `ClipDataset`, which
            has an order of its own and no labels. For captions, each has a method `captions(number)`.
        has_latents: Whether the items are latents.
        has_labels: Whether to use the items' labels.
        seed: Seed of the order.
        num_images: Images of other items that each sample gets (joint training of arXiv 2401.03048): their first
            frames, which are latents of their own.
        in_memory_gib: Size up to which latents are read into memory once.
        has_captions: Whether to use the items' captions. Of several, a sample of training gets one at random.
        has_text: Whether captions come with their embeddings, where these are stored with the latents.
    """

    def __init__(
        self,
        items: Any,
        has_latents: bool,
        has_labels: bool = False,
        seed: int = 0,
        num_images: int = 0,
        in_memory_gib: float = 4.0,
        has_captions: bool = False,
        has_text: bool = True,
    ) -> None:
        self.items, self.has_latents, self.has_labels = items, has_latents, has_labels
        self.seed, self.num_images, self.has_captions, self.has_text = seed, num_images, has_captions, has_text
        self.has_own_order = isinstance(items, ClipDataset)
        if num_images and self.has_own_order:
            raise ValueError(f"`num_images` must be 0 for clips cut at random from videos, got {num_images}.")
        if num_images and has_captions:
            raise ValueError(f"`num_images` must be 0 with `has_captions`, got {num_images}.")
        self._epoch, self._permutation = -1, np.empty(0, np.int64)
        self.stored: _Values | None = None
        if has_latents and len(items) * items[0].latents.nbytes <= in_memory_gib * 2**30:
            self.stored = self._read(range(len(items)))[0]

    def describe(self) -> str:
        """Describe the data in a few words, for a log."""
        if self.has_own_order:
            return self.items.describe()
        kind = "latents" if self.has_latents else "clips"
        return f"{len(self.items)} {kind}" + (", in memory" if self.stored is not None else "")

    def order(self, index: int) -> int:
        """Return the item of the `index`-th sample of training."""
        epoch, place = divmod(index, len(self.items))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, 20, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(len(self.items))
        return int(self._permutation[place])

    def __getitems__(self, indices: Sequence[int]) -> LatentBatch:
        if self.has_own_order:
            return self._cut(indices, is_training=True)
        items = [self.order(index) for index in indices]
        values, num_skipped = self._get(items)
        batch = self._batch(values, items, indices, num_skipped, is_training=True)
        if self.num_images:
            others = [item for index in indices for item in self._images_of(index)]
            (clips, image_labels, _), num_skipped = self._get(others)
            labels = batch.class_labels
            if labels is not None and image_labels is not None:
                labels = torch.cat((labels[:, None], image_labels.view(-1, self.num_images)), dim=1)
            num_skipped += batch.num_skipped
            batch = batch._replace(images=clips[:, :, :1], class_labels=labels, num_skipped=num_skipped)
        return batch

    def first(self, num_items: int, batch_size: int) -> Iterator[LatentBatch]:
        """Yield the first items in their own order, in batches, for validation and statistics.

        Each comes with the first of its captions.
        Unusable videos of a named data set are left out; no other item stands in for them.
        """
        if self.has_own_order:
            for start in range(0, num_items, batch_size):
                yield self._cut(range(start, min(start + batch_size, num_items)), is_training=False)
            return
        num_items = min(num_items, len(self.items))
        num_skipped = 0
        held: LatentBatch | None = None  # until it is known whether all that come after are unusable
        for start in range(0, num_items, batch_size):
            indices = list(range(start, min(start + batch_size, num_items)))
            if isinstance(self.items, NamedDataset):
                clips = {index: self.items.clip_or_none(index) for index in indices}
                num_skipped += sum(clip is None for clip in clips.values())
                clips = {index: clip for index, clip in clips.items() if clip is not None}
                if not clips:
                    continue
                values = self._stack(list(clips.values()), list(clips))
                indices = list(clips)
            else:
                values, _ = self._get(indices)
            if held is not None:
                yield held
            held, num_skipped = self._batch(values, indices, indices, num_skipped, is_training=False), 0
        if held is not None:
            yield held._replace(num_skipped=held.num_skipped + num_skipped)

    def batches(self, batch_size: int, start_step: int, num_steps: int, share: Share = ALONE) -> StepBatches:
        """Return the `batch_sampler` of a process, from `start_step` until before `num_steps`."""
        if self.has_own_order:
            return self.items.batches(start_step, num_steps)
        return StepBatches(StepSchedule(batch_size), start_step, num_steps, share)

    def state_dict(self, step: int) -> dict[str, Any]:
        """As of `ClipDataset`."""
        return self.items.state_dict(step) if self.has_own_order else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `ClipDataset`."""
        if self.has_own_order:
            self.items.load_state_dict(state)

    def close(self) -> None:
        """Remove temporary files."""
        if self.has_own_order:
            self.items.close()

    def _images_of(self, index: int) -> list[int]:
        return np.random.default_rng([self.seed, 21, index]).integers(len(self.items), size=self.num_images).tolist()

    def _cut(self, indices: Sequence[int], is_training: bool) -> LatentBatch:
        clips = [self.items[index] for index in indices]
        num_skipped = sum(clip.num_skipped for clip in clips)
        videos = [clip.video for clip in clips]
        return self._batch(self._stack(clips, videos), videos, indices, num_skipped, is_training)

    def _get(self, items: Sequence[int]) -> tuple[_Values, int]:
        if self.stored is None:
            return self._read(items)
        chosen = torch.tensor(items)
        latents, labels, captions = self.stored
        return _Values(
            latents[chosen],
            None if labels is None else labels[chosen],
            None if captions is None else [captions[item] for item in items],
        ), 0

    def _read(self, items: Sequence[int]) -> tuple[_Values, int]:
        if isinstance(self.items, NamedDataset):
            found = [self.items.find(item) for item in items]
            # Another video may stand in for one that cannot be used, with its own label and captions.
            taken = [
                (item + num_skipped) % len(self.items) for item, (_, num_skipped) in zip(items, found, strict=True)
            ]
            return self._stack([clip for clip, _ in found], taken), sum(num_skipped for _, num_skipped in found)
        return self._stack([self.items[item] for item in items], items), 0

    def _stack(self, read: Sequence[Any], items: Sequence[int]) -> _Values:
        """Join what was read of items, of which `items` are the numbers (of a `ClipDataset`: of their videos)."""
        videos = torch.stack([item.latents if self.has_latents else item.pixels for item in read])
        labels = captions = None
        if self.has_labels and not self.has_own_order:
            known = [item.class_label for item in read]
            if None in known:
                number = items[known.index(None)]
                raise ValueError(f"`class_label` must be known of every item, got None for item {number}.")
            labels = torch.tensor(known)
        if self.has_captions:
            captions = [tuple(self.items.captions(number)) for number in items]
            if () in captions:
                number = items[captions.index(())]
                raise ValueError(f"`captions` must be known of every item, got none for item {number}.")
        return _Values(videos, labels, captions)

    def _batch(
        self, values: _Values, items: Sequence[int], indices: Sequence[int], num_skipped: int, is_training: bool
    ) -> LatentBatch:
        batch = LatentBatch(values.videos, None, values.labels, torch.tensor(indices), num_skipped)
        if values.captions is None:
            return batch
        choices = [0] * len(indices)
        if is_training:
            rngs = (np.random.default_rng([self.seed, 22, index]) for index in indices)
            choices = [int(rng.integers(len(of))) for rng, of in zip(rngs, values.captions, strict=True)]
        text = None
        if self.has_text and self.has_latents and self.items.text_settings is not None:
            read = [self.items.text(item, choice) for item, choice in zip(items, choices, strict=True)]
            text = TextEmbeddings(torch.cat([one.embeds for one in read]), torch.cat([one.mask for one in read]))
        captions = [of[choice] for of, choice in zip(values.captions, choices, strict=True)]
        return batch._replace(captions=captions, text=text)
