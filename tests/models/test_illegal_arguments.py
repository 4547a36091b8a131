"""What sizes, inputs, plans, tiles of streams and changes of the config must not be, of all models alike."""

import copy
import math
import pickle
from typing import Any

import accelerate
import pytest
import tiny
import torch
from tiny_autoencoders import make, make_latents, make_video

from diffusers_leanvae import StreamingEncoder, TemporalCache


models = pytest.mark.parametrize("case", ["lean", "wf", "iv"])
TILE = r"must be three positive integers, height, width and frames of a tile, got"
ILLEGAL_PLANS = [
    ({"num_frames": 0}, r"^`num_frames` must be a positive integer, got 0\.$"),
    ({"num_frames": 17.0}, r"^`num_frames` must be a positive integer, got 17\.0\.$"),
    ({"num_frames": 6}, r"^`num_frames` must be 4 \* n \+ 1 \(1, 5, 9, \.\.\.\), got 6\.$"),
    ({"height": 0}, r"^`height` must be a positive integer, got 0\.$"),
    ({"height": 13}, r"^`height` and `width` must be positive multiples of 8, got 13 and 64\.$"),
    ({"width": -8}, r"^`width` must be a positive integer, got -8\.$"),
    ({"batch_size": 0}, r"^`batch_size` must be a positive integer, got 0\.$"),
    ({"dtype": torch.int8}, r"^`dtype` must be a floating-point dtype, got torch\.int8\.$"),
    ({"dtype": "bf16"}, r"^`dtype` must be a floating-point dtype, got 'bf16'\.$"),
    ({"budget": "1GiB"}, r"^`budget` must be a positive number of bytes, got '1GiB'\.$"),
    ({"budget": -1}, r"^`budget` must be a positive number of bytes, got -1\.$"),
    ({"tile": (8, 8)}, rf"^`tile` {TILE} \(8, 8\)\.$"),
    ({"tile": (0, 0, 0)}, rf"^`tile` {TILE} \(0, 0, 0\)\.$"),
    ({"tile": "auto"}, rf"^`tile` {TILE} 'auto'\.$"),
    ({"tile": (12, 8, 5)}, r"^`tile\[0\]` must be a positive multiple of 8, got 12\.$"),
    ({"tile": (64, 64, 4)}, r"^`tile\[2\]` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 4\.$"),
]


@models
@pytest.mark.parametrize("arguments, message", ILLEGAL_PLANS, ids=[str(arguments) for arguments, _ in ILLEGAL_PLANS])
def test_illegal_plans(case: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(case).plan(**{"num_frames": 17, "height": 64, "width": 64} | arguments)


@pytest.mark.parametrize("layout", [(16, 16), (-8, 16, 5), (0, 16, 5), (16.0, 16, 5), 16], ids=str)
def test_illegal_layouts(layout: Any):
    with pytest.raises(ValueError, match=f"^`layout` {TILE} "):
        TemporalCache(layout=layout)


@models
@pytest.mark.parametrize(
    "layout, message",
    [
        ((15, 16, 5), r"^`layout\[0\]` must be a positive multiple of 8, got 15\.$"),
        ((16, 16, 4), r"^`layout\[2\]` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 4\.$"),
    ],
    ids=str,
)
def test_layouts_of_other_ratios(case: str, layout: tuple[int, int, int], message: str):
    vae = make(case)
    with pytest.raises(ValueError, match=message):
        vae.encode(make_video(vae), cache=TemporalCache(layout=layout))


@models
@pytest.mark.parametrize(
    "config, message",
    [
        ({"latents_mean": [0.0] * 3 + [math.inf]}, "`latents_mean` must hold finite numbers, got inf"),
        ({"latents_mean": [None] * 4}, "`latents_mean` must hold finite numbers, got None"),
        ({"latents_std": [1.0] * 3 + [0.0]}, "`latents_std` must hold finite numbers above 0, got 0.0"),
        ({"latents_std": [1.0] * 3 + [math.nan]}, "`latents_std` must hold finite numbers above 0, got nan"),
        ({"latents_std": ["1"] * 4}, "`latents_std` must hold finite numbers above 0, got '1'"),
        ({"scaling_factor": 0.0}, "`scaling_factor` must be a finite number above 0, got 0.0"),
        ({"scaling_factor": "1"}, "`scaling_factor` must be a finite number above 0, got '1'"),
    ],
)
def test_illegal_statistics(case: str, config: dict[str, Any], message: str):
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with pytest.raises(ValueError, match=message):
        make(case, **statistics | config)


POSITIVE, COUNT = "must be a positive integer, got", "must be an integer of at least 0, got"
SWITCH = "must be one of True, False, got"
ILLEGAL_SIZES: list[tuple[str, str, Any, str]] = [
    *[("leanvae", name, 0, POSITIVE) for name in ("in_channels", "latent_channels", "low_freq_dim", "high_freq_dim")],
    *[("leanvae", f"num_{name}", -1, COUNT) for name in ("branch_layers", "fusion_layers", "ista_iterations")],
    ("leanvae", "num_ista_layers", 1.5, COUNT),
    ("leanvae", "latent_channels", "4", POSITIVE),
    ("leanvae", "patch_norm", "no", SWITCH),
    ("leanvae", "patch_size", (2, 4.0, 4.0), r"must be three positive integers \(.*\) with height = width, got"),
    *[("wfvae", name, 0, POSITIVE) for name in ("latent_channels", "base_channels", "num_decoder_layers")],
    *[("wfvae", f"{name}_flow_channels", 0, POSITIVE) for name in ("encoder", "decoder")],
    *[("wfvae", f"num_{name}_layers", -1, COUNT) for name in ("encoder", "flow")],
    ("wfvae", "use_attention", None, SWITCH),
    *[("ivvae", name, 0, POSITIVE) for name in ("latent_channels", "base_channels", "num_layers")],
    ("ivvae", "num_layers", -1, POSITIVE),
    ("ivvae", "use_pyramid", "no", SWITCH),
    ("ivvae", "channel_multipliers", (1, 2, 2, 0.5), "must be four positive integers, got"),
    *[("latte", name, 0, POSITIVE) for name in ("num_attention_heads", "in_channels", "sample_size", "patch_size")],
    ("latte", "num_latent_frames", 0, POSITIVE),
    ("latte", "num_layers", 2.0, "must be an integer, got"),
    ("latte", "num_classes", 1.5, "must be positive or `None`, got"),
    ("latte", "mlp_ratio", 0, "must be a finite number above 0, got"),
]


@pytest.mark.parametrize("family, name, value, message", ILLEGAL_SIZES)
def test_illegal_sizes(family: str, name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=rf"^`{name}` {message} ") as error:
        tiny.make_fresh(family, **{name: value})
    assert str(error.value).endswith(f", got {value!r}.")


@torch.no_grad()
def test_layers_that_may_be_absent():
    for family, names in (
        ("leanvae", ("num_branch_layers", "num_fusion_layers", "num_ista_iterations", "num_ista_layers")),
        ("wfvae", ("num_encoder_layers", "num_flow_layers")),
    ):
        vae = tiny.make_tiny(family, **dict.fromkeys(names, 0))
        assert vae(tiny.make_video(1, 3, 5, 16, 16)).sample.std() > 0.1


@models
@torch.no_grad()
def test_illegal_inputs(case: str):
    vae = make(case)
    x, z = make_video(vae), make_latents(vae, 2, 2, 2)
    for bad, kind in ((x.numpy(), "ndarray"), (x.tolist(), "list"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"^`x` must be a `torch\.Tensor`, got a `{kind}`\.$"):
            vae.encode(bad)
        with pytest.raises(ValueError, match=rf"^`z` must be a `torch\.Tensor`, got a `{kind}`\.$"):
            vae.decode(bad)
        with pytest.raises(ValueError, match=rf"^`piece` must be a `torch\.Tensor`, got a `{kind}`\.$"):
            StreamingEncoder(vae).push(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`x` must be on the model's device cpu, got one on meta\.$"):
        vae.encode(x.to("meta"))
    with pytest.raises(ValueError, match=r"^`z` must be on the model's device cpu, got one on meta\.$"):
        vae.decode(z.to("meta"))
    expected = vae.encode(x).latent_dist.mode()
    accelerate.cpu_offload(vae, torch.device("cpu"))  # what lies on another device comes when it is called
    assert next(vae.parameters()).device.type == "meta"
    torch.testing.assert_close(vae.encode(x).latent_dist.mode(), expected, rtol=0, atol=0)


@models
def test_the_meta_device(case: str):
    vae = make(case).to("meta")
    x = make_video(vae).to("meta")
    assert vae(x).sample.shape == x.shape  # with gradients
    with torch.no_grad():
        assert vae(x).sample.shape == x.shape
        with pytest.raises(
            ValueError, match=r"^`x` must have the model's dtype torch\.float64, got torch\.float32\.$"
        ):
            vae.encode(x.float())
        with pytest.raises(ValueError, match=r"^`z` must be on the model's device meta, got one on cpu\.$"):
            vae.decode(make_latents(make(case), 2, 2, 2))


CHANGES: dict[str, Any] = {
    "attribute": lambda config: setattr(config, "scaling_factor", 0.5),
    "item": lambda config: config.__setitem__("scaling_factor", 0.5),
    "no attribute": lambda config: delattr(config, "scaling_factor"),
    "no item": lambda config: config.__delitem__("scaling_factor"),
    "update": lambda config: config.update(scaling_factor=0.5),
    "union": lambda config: config.__ior__({"scaling_factor": 0.5}),
    "pop": lambda config: config.pop("scaling_factor"),
    "setdefault": lambda config: config.setdefault("scaling_factor", 0.5),
}


@models
@pytest.mark.parametrize("change", CHANGES)
def test_a_config_is_changed_by_its_model_alone(case: str, change: str):
    vae = make(case)
    with pytest.raises(ValueError, match="^`config` must be changed by `register_to_config` of the model, such as"):
        CHANGES[change](vae.config)
    vae.register_to_config(scaling_factor=0.5)
    assert vae.config.scaling_factor == vae.config["scaling_factor"] == 0.5


@models
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_of_a_config(case: str, duplicate: Any):
    config = make(case).config
    copied = duplicate(config)
    assert type(copied) is type(config) and copied == config and copied.z_dim == config.z_dim == 4
    copied["scaling_factor"] = 0.5
    assert copied["scaling_factor"] == 0.5 != config["scaling_factor"]


@models
@pytest.mark.parametrize(
    "values, message",
    [
        ({"latents_mean": [1.0]}, r"`latents_mean` must have 4 entries, got 1\."),
        (
            {"latents_std": [1.0] * 4},
            r"`latents_mean` and `latents_std` must be given together, got no `latents_mean`\.",
        ),
        ({"latents_mean": 1.0}, r"`latents_mean` must be a list of 4 numbers, got 1\.0\."),
        ({"scaling_factor": -1}, r"`scaling_factor` must be a finite number above 0, got -1\."),
    ],
)
def test_statistics_that_could_not_be_loaded(case: str, values: dict[str, Any], message: str):
    vae = make(case)
    with pytest.raises(ValueError, match=f"^{message}$"):
        vae.register_to_config(**values)
    assert vae.config["latents_mean"] is vae.config["latents_std"] is None and vae.config["scaling_factor"] == 1.0
