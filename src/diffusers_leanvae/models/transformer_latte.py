"""Class-conditional and unconditional Latte (arXiv 2401.03048) on video latents, built from diffusers' parts.

Read upwards: `LeanVAELatteTransformer3DModel.forward` is the last lines of the file, blocks and attention come first.

Shape letters in the margins: B batch, C latent channels, O output channels, F latent frames, h w latent size, p patch
size, N tokens of a frame, D width. Tokens are `(B, F * N, D)`, frame by frame, from the patches to the last
projection; a block regroups them for its attention only.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import nn

from ..checks import check_choice, check_integer, is_integer
from ..conversion import latte
from ..conversion.latte import VARIANTS
from .pretrained import FILE_ARGUMENTS, PretrainedModel, load_single_file
from .video_config import check_factor, check_sizes


POSITION_MODES = ("stored", "interpolate", "extrapolate")
PATCH_SIZES = (2, 4, 8)


def latte_variant(name: str) -> dict[str, int]:
    """Config of a named size for `LeanVAELatteTransformer3DModel`: `"XL/2"` is size XL with 2 x 2 patches.

    Args:
        name: One of the sizes S, B, L, XL, a slash, and a patch size of 2, 4, 8.
    """
    size, _, patch_size = name.partition("/")
    if size not in VARIANTS or patch_size not in map(str, PATCH_SIZES):
        raise ValueError(
            f"`name` must be a size {', '.join(VARIANTS)} and a patch size {', '.join(map(str, PATCH_SIZES))} such as "
            f"'XL/2', got {name!r}."
        )
    num_layers, dim, heads = VARIANTS[size]
    return {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "patch_size": int(patch_size),
    }


class LeanVAELatteAttnProcessor:
    """Self-attention through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "LeanVAELatteAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2).type_as(query))


class LeanVAELatteAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of `(batch, sequence, dim)`, with biases, without mask."""

    _default_processor_cls = LeanVAELatteAttnProcessor
    _available_processors = [LeanVAELatteAttnProcessor]
    processor: Any

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False
        inner_dim = heads * dim_head
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim)])
        self.set_processor(LeanVAELatteAttnProcessor())  # type: ignore[arg-type]

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class LeanVAELatteBlock(nn.Module):
    """One adaLN-zero block whose attention runs inside each frame, or over the frames at each place."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_dim: int, is_temporal: bool):
        super().__init__()
        self.is_temporal = is_temporal
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = LeanVAELatteAttention(dim, heads, dim_head)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=ff_dim, activation_fn="gelu-approximate")

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, num_frames: int, pos_embed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens `(B, F * N, D)` under the condition `temb` `(B, D)`; `pos_embed` is added to them first."""
        if pos_embed is not None:
            hidden_states = hidden_states + pos_embed
        norm_hidden_states, gate_attn, shift, scale, gate_ff = self.norm1(hidden_states, emb=temb)
        frames = norm_hidden_states.unflatten(1, (num_frames, -1))  # (B, F, N, D)
        if self.is_temporal:
            frames = frames.transpose(1, 2)  # (B, N, F, D)
        attn_output = self.attn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        if self.is_temporal:
            attn_output = attn_output.transpose(1, 2)
        hidden_states = hidden_states + gate_attn[:, None] * attn_output.flatten(1, 2)
        norm_hidden_states = self.norm2(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        return hidden_states + gate_ff[:, None] * self.ff(norm_hidden_states)


class LeanVAELatteTransformer3DModel(PretrainedModel, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Latte, a latent diffusion transformer for video (arXiv 2401.03048), unconditional or conditional on a class.

    Blocks come in pairs: attention inside each frame, then attention over the frames at each place. The positions are
    two stored tables, `pos_embed` of a square grid and `temp_embed` of the frames; both are loaded with the weights.
    Inputs of the tables' size take them as they are. For others see [`set_position_mode`].

    A fresh model gives exactly 0.

    Args:
        num_attention_heads: Heads.
        attention_head_dim: Width of a head; the width of the tokens is the product of both, a multiple of 4.
        in_channels: Latent channels `C`.
        out_channels: Output channels: `2 * C` (the default: epsilon, then the variance value) or `C`.
        num_layers: Blocks of both kinds together, so an even number.
        patch_size: Side of a square patch of latents.
        sample_size: Latent height and width of the stored table.
        num_latent_frames: Latent frames of the stored table.
        num_classes: Classes, or `None` for an unconditional model. Label `num_classes` is the null class. The model
            itself never drops a label: training replaces labels by the null class.
        mlp_ratio: Width of the feed-forward layers over the width of the tokens.
    """

    conversion = latte
    _supports_gradient_checkpointing = True
    _no_split_modules = ["LeanVAELatteBlock"]
    _repeated_blocks = ["LeanVAELatteBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "timestep_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        patch_size: int = 2,
        sample_size: int = 32,
        num_latent_frames: int = 5,
        num_classes: int | None = None,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        check_sizes(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            patch_size=patch_size,
            sample_size=sample_size,
            num_latent_frames=num_latent_frames,
        )
        check_integer("num_layers", num_layers)
        check_factor("mlp_ratio", mlp_ratio)
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(f"`num_attention_heads` * `attention_head_dim` must be a multiple of 4, got {dim}.")
        if num_layers < 2 or num_layers % 2:
            raise ValueError(f"`num_layers` must be a positive even number, got {num_layers}.")
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` ({patch_size}), got {sample_size}.")
        if out_channels not in (None, in_channels, 2 * in_channels):
            raise ValueError(f"`out_channels` must be {in_channels} or {2 * in_channels}, got {out_channels}.")
        if num_classes is not None and not (is_integer(num_classes) and num_classes > 0):
            raise ValueError(f"`num_classes` must be positive or `None`, got {num_classes!r}.")
        self.inner_dim = dim
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patch_size = patch_size
        self.grid_size = sample_size // patch_size
        self.position_mode = self.temporal_position_mode = "stored"

        self.patch_embed = PatchEmbed(
            sample_size,
            sample_size,
            patch_size,
            in_channels,
            dim,
            pos_embed_type=None,  # type: ignore[arg-type]
        )
        pos_embed = get_2d_sincos_pos_embed(dim, self.grid_size, base_size=self.grid_size, output_type="pt")
        temp_embed = get_1d_sincos_pos_embed_from_grid(dim, torch.arange(num_latent_frames), output_type="pt")
        # Persistent, since the tables of trained weights are not the formula's: averaging has shrunk them.
        self.register_buffer("pos_embed", pos_embed.float().unsqueeze(0))  # (1, N, D)
        self.register_buffer("temp_embed", temp_embed.float().unsqueeze(0))  # (1, F, D)

        # Without a shift of the frequencies, which diffusers' combined embedding of step and label would have.
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = None
        if num_classes is not None:
            # The null class is an ordinary row, and the embedding's own random dropping stays off.
            self.class_embedder = LabelEmbedding(num_classes + 1, dim, dropout_prob=0.0)

        block = (dim, num_attention_heads, attention_head_dim, int(dim * mlp_ratio))
        num_pairs = num_layers // 2
        self.transformer_blocks = nn.ModuleList(LeanVAELatteBlock(*block, is_temporal=False) for _ in range(num_pairs))
        self.temporal_transformer_blocks = nn.ModuleList(
            LeanVAELatteBlock(*block, is_temporal=True) for _ in range(num_pairs)
        )

        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """The reference's initialisation: zero gates and a zero last layer, so that a fresh model gives exactly 0."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
            elif name.startswith("timestep_embedder"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                # The reference has query, key and value in one matrix: twice the inputs and outputs together.
                is_qkv = name.endswith(("to_q", "to_k", "to_v"))
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if is_qkv else 1.0)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.embedding_table.weight, std=0.02)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        num_attention_heads: int | None = None,
        **hub_kwargs: Any,
    ) -> "LeanVAELatteTransformer3DModel":
        """Load one file of weights: an original Latte checkpoint (averaged weights are preferred), or our own.

        Args:
            pretrained_model_link_or_path: A file, a Hub file such as `Yumic/LeanVAE/ucf-dim4.pt`, or its URL; a folder
                or Hub repository with one checkpoint in it. Weights of `save_pretrained` need their config next to
                them, or `config`.
            torch_dtype: Dtype to cast the weights to; as stored if `None`.
            num_attention_heads: Heads of a model of none of the sizes S, B, L, XL, which its file does not tell.
            hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` for `huggingface_hub`;
                as of diffusers `config` (a folder, Hub repository or file with a config, or its values), `subfolder`
                (of `config`, or else of a folder or repository), `config_revision`, `device`, `disable_mmap`.

        Raises:
            ValueError: If there is no such checkpoint, it is not complete, or an argument is not legal.
        """
        unknown = set(hub_kwargs) - set(FILE_ARGUMENTS)
        if unknown:
            raise ValueError(f"`hub_kwargs` must be Hub arguments, got {', '.join(sorted(unknown))}.")
        read = partial(latte.read_original_checkpoint, num_attention_heads=num_attention_heads)
        values = {} if num_attention_heads is None else {"num_attention_heads": num_attention_heads}
        return load_single_file(cls, pretrained_model_link_or_path, read, torch_dtype, values, hub_kwargs)

    def enable_cache(self, config: Any) -> None:
        """Reuse outputs of blocks between steps, as diffusers' `CacheMixin` offers it."""
        TransformerBlockRegistry.register(LeanVAELatteBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    # ---- positions --------------------------------------------------------------------------------------------------

    def set_position_mode(self, mode: str, temporal_mode: str | None = None) -> None:
        """Choose the positions of inputs that are smaller or larger than the stored tables.

        Args:
            mode: For height and width:
                `"stored"` (the default): the centre of the stored grid; larger inputs are an error.
                `"interpolate"`: the whole grid resampled, its corners kept. Positions stay in the trained range.
                `"extrapolate"`: the stored grid in the centre, surrounded by the sine-cosine formula. Neighbours keep
                their trained distance.
            temporal_mode: The same for the frames, `mode` if `None`. Shorter inputs take the first rows of the table,
                and it is extrapolated behind its end: the first latent frame stays the first.
        """
        temporal_mode = mode if temporal_mode is None else temporal_mode
        for name, value in (("mode", mode), ("temporal_mode", temporal_mode)):
            check_choice(name, value, POSITION_MODES)
        self.position_mode, self.temporal_position_mode = mode, temporal_mode

    def _spatial_positions(self, height: int, width: int) -> torch.Tensor:
        """Positions `(1, N, D)` of a grid of `height` x `width` patches."""
        size = self.grid_size
        if (height, width) == (size, size):
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (size, size))  # (1, row, column, D)
        if self.position_mode == "interpolate":
            table = table.permute(0, 3, 1, 2).float()
            table = F.interpolate(table, (height, width), mode="bicubic", align_corners=True)
            return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        top, left = (size - height) // 2, (size - width) // 2
        if max(height, width) <= size:
            return table[:, top : top + height, left : left + width].flatten(1, 2)
        if self.position_mode == "stored":
            pixels = self.patch_size
            raise ValueError(
                f"`hidden_states` must have height and width up to {size * pixels} with stored positions (see "
                f"`set_position_mode`), got {height * pixels} and {width * pixels}."
            )
        rows = self._formula(self.inner_dim // 2, torch.arange(top, top + height))
        columns = self._formula(self.inner_dim // 2, torch.arange(left, left + width))
        extended = torch.cat(
            (columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)), dim=-1
        )  # the column comes first
        inside = [slice(max(-start, 0), size - start) for start in (top, left)]
        stored = [slice(max(start, 0), start + length) for start, length in ((top, height), (left, width))]
        extended[inside[0], inside[1]] = table[0, stored[0], stored[1]]
        return extended.flatten(0, 1).unsqueeze(0)

    def _temporal_positions(self, num_frames: int) -> torch.Tensor:
        """Positions `(1, F, D)` of `num_frames` latent frames."""
        size = self.temp_embed.shape[1]
        if num_frames == size:
            return self.temp_embed
        if self.temporal_position_mode == "interpolate":
            table = self.temp_embed.transpose(1, 2).float()
            table = F.interpolate(table, num_frames, mode="linear", align_corners=True)
            return table.transpose(1, 2).to(self.temp_embed.dtype)
        if num_frames < size:
            return self.temp_embed[:, :num_frames]
        if self.temporal_position_mode == "stored":
            raise ValueError(
                f"`hidden_states` must have up to {size} latent frames with stored positions (see "
                f"`set_position_mode`), got {num_frames}."
            )
        later = self._formula(self.inner_dim, torch.arange(size, num_frames))
        return torch.cat((self.temp_embed, later.unsqueeze(0)), dim=1)

    def _formula(self, dim: int, positions: torch.Tensor) -> torch.Tensor:
        codes = get_1d_sincos_pos_embed_from_grid(dim, positions.to(self.pos_embed.device), output_type="pt")
        return codes.to(self.pos_embed.dtype)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _check(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, num_images: int
    ) -> None:
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.in_channels:
            raise ValueError(
                f"`hidden_states` must have shape (batch_size, {self.in_channels}, num_latent_frames, height, width), "
                f"got {tuple(hidden_states.shape)}."
            )
        batch_size, _, num_frames, height, width = hidden_states.shape
        if height == 0 or width == 0 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"`hidden_states` must have sides in multiples of {self.patch_size}, got {height} x {width}."
            )
        if not 0 <= num_images < num_frames:
            raise ValueError(
                f"`num_images` must be 0 to {num_frames - 1} for {num_frames} latent frames, got {num_images}."
            )
        if (class_labels is None) != (self.class_embedder is None):
            expected = "given" if class_labels is None else "`None`"
            kind = "a class-conditional" if class_labels is None else "an unconditional"
            raise ValueError(f"`class_labels` must be {expected} for {kind} model, got {class_labels}.")
        if tuple(timestep.shape) not in ((batch_size,), ()):
            raise ValueError(f"`timestep` must have shape ({batch_size},) or (), got {tuple(timestep.shape)}.")
        shapes = [(batch_size,)] + ([(batch_size, 1 + num_images)] if num_images else [])
        if class_labels is not None and tuple(class_labels.shape) not in shapes:
            raise ValueError(
                f"`class_labels` must have shape {' or '.join(map(str, shapes))}, got {tuple(class_labels.shape)}."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_images: int = 0,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise and variance value (or velocity) of noisy latents.

        Args:
            hidden_states: Noisy normalised latents `(batch_size, in_channels, num_latent_frames, height, width)`,
                height and width multiples of `patch_size`.
            timestep: Training step of each sample in 0 .. 1000, `(batch_size,)` or one for all; integers or floats.
            class_labels: Labels `(batch_size,)`, where `num_classes` is the null class; `None` for an unconditional
                model. With images also `(batch_size, 1 + num_images)`: the label of the video, then of each image.
            num_images: This many frames at the end are images of their own (joint training on images and videos): they
                pass the spatial blocks only.
            return_dict: Whether to return a `Transformer2DModelOutput` instead of a plain tuple.

        Returns:
            The output `(batch_size, out_channels, num_latent_frames, height, width)` as `sample`.
        """
        self._check(hidden_states, timestep, class_labels, num_images)
        batch_size, _, num_frames, height, width = hidden_states.shape
        grid = (height // self.patch_size, width // self.patch_size)
        num_patches = grid[0] * grid[1]
        num_video_tokens = (num_frames - num_images) * num_patches

        frames = hidden_states.transpose(1, 2).flatten(0, 1)  # (B * F, C, h, w)
        tokens = self.patch_embed(frames) + self._spatial_positions(*grid)  # (B * F, N, D)
        tokens = tokens.to(hidden_states.dtype)
        temporal_positions = self._temporal_positions(num_frames - num_images).repeat_interleave(num_patches, dim=1)

        temb = self.timestep_embedder(self.time_proj(timestep.expand(batch_size)).to(tokens.dtype))  # (B, D)
        image_temb = temb.unsqueeze(1).expand(-1, num_images, -1)
        if self.class_embedder is not None:
            labels = self.class_embedder(class_labels).reshape(batch_size, -1, self.inner_dim)
            temb = temb + labels[:, 0]
            image_temb = image_temb + labels[:, -num_images:]
        # Video and images under one condition need no condition of each frame.
        spatial_temb = temb
        if num_images:
            video_temb = temb.unsqueeze(1).expand(-1, num_frames - num_images, -1)
            spatial_temb = torch.cat((video_temb, image_temb), dim=1).flatten(0, 1)  # (B * F, D)
        num_groups = spatial_temb.shape[0]
        num_frames_per_group = batch_size * num_frames // num_groups

        def run(block: nn.Module, *args: Any) -> torch.Tensor:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(block, *args)  # type: ignore[misc]
            return block(*args)

        for index, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            tokens = tokens.reshape(num_groups, -1, self.inner_dim)
            tokens = run(spatial, tokens, spatial_temb, num_frames_per_group)
            tokens = tokens.reshape(batch_size, -1, self.inner_dim)  # (B, F * N, D)
            video, images = tokens.tensor_split((num_video_tokens,), dim=1)
            video = run(temporal, video, temb, num_frames - num_images, temporal_positions if index == 0 else None)
            tokens = torch.cat((video, images), dim=1) if num_images else video

        tokens = self.norm_out(tokens.reshape(num_groups, -1, self.inner_dim), spatial_temb)
        patches = self.proj_out(tokens)
        patches = patches.view(batch_size, num_frames, *grid, self.patch_size, self.patch_size, self.out_channels)
        sample = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch_size, self.out_channels, num_frames, height, width)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)
