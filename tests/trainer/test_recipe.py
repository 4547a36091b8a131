"""Recipes: what a YAML file and the command line may say, and what the error tells when they may not."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

import diffusers_leanvae.training.train_lvdm as train_lvdm
import diffusers_leanvae.training.train_vae as train_vae
import pytest
import torch

from diffusers_leanvae.losses.objectives import LeanVAEObjective
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.trainer.finetuning import NEW_MODELS
from diffusers_leanvae.trainer.recipe import OptimizerRecipe, load_recipe, parse_recipe, save_recipe
from diffusers_leanvae.trainer.sharding import clip_gradients


CONFIGS = sorted(Path(train_vae.__file__).resolve().parent.glob("configs/*.yaml"))
CONFIGS = [path for path in CONFIGS if not path.stem.startswith("lvdm_")]  # those are of train_lvdm.py


@dataclass
class Section:
    folder: str
    rate: float = 0.5


@dataclass
class Small:
    section: Section
    num_steps: int = 3
    mode: Literal["fast", "slow"] = "fast"
    limit: float | None = None
    flag: bool = True
    sizes: list[list[int]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_values_defaults_and_overrides(tmp_path: Path):
    path = write(tmp_path, "section: {folder: clips}\nnum_steps: 5\n")
    recipe = load_recipe(
        Small,
        path,
        ["section.rate=5e-4", "limit=2", "sizes=[[17,64,64]]", "extra.width=8", "num_steps=7", "flag=false"],
    )
    expected = Small(Section("clips", 5e-4), 7, "fast", 2.0, False, [[17, 64, 64]], {"width": 8})
    assert recipe == expected and isinstance(recipe.limit, float)
    assert load_recipe(Small, path, ["limit=1.5", "limit=null"]).limit is None


def test_the_resolved_copy_reads_back_equal(tmp_path: Path):
    recipe = load_recipe(Small, write(tmp_path, "section: {folder: a}"), ["section.rate=1e-7", "extra.x=[1, 2]"])
    save_recipe(recipe, tmp_path / "copy.yaml")
    assert load_recipe(Small, tmp_path / "copy.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "section: {folder: a}\nnum_step: 5",
            [],
            r"Unknown recipe key `num_step`: legal keys here are section, num_st",
        ),
        (
            "section: {folder: a, rates: 1}",
            [],
            r"Unknown recipe key `section\.rates`: legal keys here are folder, rate",
        ),
        ("section: {folder: a}", ["section.size=1"], r"Unknown recipe key `section\.size`"),
        ("num_steps: 5", [], r"The recipe must set `section`"),
        ("section: {rate: 1}", [], r"The recipe must set `section\.folder`"),
        ("section: {folder: a}\nnum_steps: 1.5", [], r"`num_steps` must be of type int, got 1\.5"),
        ("section: {folder: a}\nnum_steps: true", [], r"`num_steps` must be of type int, got True"),
        ("section: {folder: a, rate: often}", [], r"`section\.rate` must be of type float, got 'often'"),
        ("section: {folder: a, rate: .nan}", [], r"`section\.rate` must be a number, got nan"),
        ("section: {folder: a}\nmode: best", [], r"`mode` must be one of 'fast', 'slow', got 'best'"),
        ("section: {folder: a}\nsizes: 3", [], r"`sizes` must be of type list\[list\[int\]\], got 3"),
        ("section: {folder: a}\nsizes: [[1, x]]", [], r"`sizes\[0\]\[1\]` must be of type int, got 'x'"),
        ("section: 3", [], r"`section` must be a section of keys, got 3"),
        ("section: {folder: a}", ["num_steps"], r"must read `key=value`, got 'num_steps'"),
        ("section: {folder: a}", ["num_steps.x=1", "num_steps=3", "num_steps.y=1"], r"`num_steps\.y` reaches into"),
        ("section: {folder: a}", ["sizes=[1"], r"value of an override must be YAML"),
        ("- a\n- b", [], r"must be a mapping of keys to values, got list"),
        ("section: {folder: a}\nnum_steps: 5\nnum_steps: 6", [], r"`num_steps` must be given once, .* in line 3"),
        ("section:\n  folder: a\n  folder: b", [], r"`section\.folder` must be given once, got it again in line 3"),
        ("section: {folder: a}", ["extra={x: {y: 1, y: 2}}"], r"`extra\.x\.y` must be given once, got it again"),
        ("a: [", [], r"must be a readable YAML recipe"),
    ],
)
def test_errors_name_the_key_and_what_is_legal(tmp_path: Path, text: str, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe(Small, write(tmp_path, text), overrides)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="must be a readable YAML recipe"):
        load_recipe(Small, tmp_path / "none.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_recipes_load_build_and_say_how_to_run(path: Path):
    recipe = load_recipe(train_vae.Recipe, path)
    text = path.read_text()
    for word in ("# Expected:", "# Cost:", "# Command:", f"training/configs/{path.name}"):
        assert word in text
    assert not any(Path(entry).is_absolute() for entry in (recipe.data.train, recipe.output))
    if recipe.init.startswith("runs/"):  # what another recipe leaves, of the same model
        recipe = replace(recipe, init="spec")
    with torch.device("meta" if recipe.init in NEW_MODELS else "cpu"):  # shapes only
        vae = train_vae.build_vae(recipe)
        discriminators = train_vae.build_discriminators(recipe.adversarial, vae.in_channels, count=2)
    train_vae.check_sizes(recipe, vae, discriminators)
    ratio_t, ratio_s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    for num_frames, *sides in recipe.data.clip_sizes:
        for factor in recipe.data.rescale_factors:
            edges = [round(side / factor / 16) * 16 if factor > 1 else side for side in sides]
            assert (num_frames - 1) % ratio_t == edges[0] % ratio_s == edges[1] % ratio_s == 0


def of_paper(name: str) -> train_vae.Recipe:
    (path,) = (path for path in CONFIGS if path.stem == name)
    return load_recipe(train_vae.Recipe, path)


@pytest.mark.parametrize("name", ["paper_4ch", "paper_16ch"])
def test_paper_recipes_have_the_published_numbers(name: str):
    recipe = of_paper(name)
    weights = {name: weight for name, weight in recipe.loss.items() if weight}
    assert weights == {"l1_pixel": 4.0, "lpips": 4.0, "l1_low": 0.2, "l1_high": 0.4, "kl": 1e-7}
    optimizer, adversarial = recipe.optimizer, recipe.adversarial
    assert optimizer.betas == [0.5, 0.9] and optimizer.num_warmup_steps == 5000 and optimizer.max_grad_norm == 1.0
    rates = [optimizer.learning_rate_at(step, recipe.num_steps) for step in (5000, 600_000, 699_999)]
    assert rates == pytest.approx([5e-5, 1e-5, 1e-5])
    assert (adversarial.weight, adversarial.start_step, recipe.num_steps) == (0.2, 600_000, 700_000)
    assert (adversarial.kind, adversarial.num_layers, adversarial.num_filters, adversarial.norm) == (
        "2d",
        3,
        64,
        "batch",
    )
    assert (adversarial.loss, adversarial.generator_loss, adversarial.learning_rate) == (
        "hinge",
        "non_saturating",
        1e-5,
    )
    assert (adversarial.lecam_weight, adversarial.lecam_decay) == (0.005, 0.999)
    assert recipe.batch_size == 40 and recipe.perceptual.frames == "reference"


def test_stages_of_wfvae_have_the_published_numbers():
    stages = [of_paper(f"wfvae_stage{stage}") for stage in (1, 2, 3)]
    assert [recipe.num_steps for recipe in stages] == [800_000, 200_000, 200_000]
    assert [recipe.data.clip_sizes for recipe in stages] == [[[25, 256, 256]], [[49, 256, 256]], [[49, 256, 256]]]
    assert [recipe.data.stride for recipe in stages] == [1, 2, 2]
    assert [recipe.init for recipe in stages] == ["spec", "runs/wfvae_stage1/vae", "runs/wfvae_stage2/vae"]
    assert all(recipe.model == stages[0].model for recipe in stages)
    with torch.device("meta"):
        vae = train_vae.build_vae(stages[0])
    assert sum(parameter.numel() for parameter in vae.parameters()) == 317_081_372 - 128  # constants of wavelets
    for recipe, lpips in zip(stages, (1.0, 1.0, 0.1), strict=True):
        weights = {name: weight for name, weight in recipe.loss.items() if weight}
        assert weights == {"l1": 1.0, "lpips": lpips, "kl": 1e-6, "wavelet": 0.1}
        assert recipe.loss["logvar"] == 0.0 and recipe.perceptual.frames == "all"
        adversarial, optimizer = recipe.adversarial, recipe.optimizer
        assert (adversarial.weight, adversarial.is_adaptive, adversarial.start_step) == (0.5, True, 0)
        assert (adversarial.kind, adversarial.num_layers, adversarial.num_filters) == ("3d", 4, 64)
        assert (adversarial.norm, adversarial.dropout, adversarial.lecam_weight) == ("batch", 0.3, 0.0)
        assert (adversarial.loss, adversarial.generator_loss, adversarial.update) == ("hinge", "hinge", "alternate")
        assert (optimizer.learning_rate, optimizer.schedule, optimizer.weight_decay) == (1e-5, "constant", 1e-4)
        assert optimizer.betas == [0.9, 0.999] and (recipe.batch_size, recipe.ema_decay) == (8, 0.999)


def test_phases_of_ivvae_follow_each_other():
    phases = [of_paper(f"ivvae_phase{phase}") for phase in (1, 2, 3, 4)]
    assert [recipe.num_steps for recipe in phases] == [200_000, 500_000, 200_000, 100_000]
    assert [recipe.data.clip_sizes[0] for recipe in phases[:3]] == [[1, 256, 256], [17, 256, 256], [17, 512, 512]]
    assert [bool(recipe.adversarial.weight) for recipe in phases] == [False, False, False, True]
    assert phases[1].init == "image" and phases[1].image_vae.path == "runs/ivvae_phase1/vae"
    assert [recipe.init for recipe in phases[2:]] == ["runs/ivvae_phase2/vae", "runs/ivvae_phase3/vae"]
    assert all(recipe.model == phases[1].model for recipe in phases[1:])
    image = phases[1].model | {"latent_channels": 8, "use_keyframe_branch": False}
    assert phases[0].model == image and phases[1].model["latent_channels"] == 16


@pytest.mark.parametrize(("name", "latent_channels", "ratio"), [("wan_aligned", 16, 8), ("wan22_aligned", 48, 16)])
def test_wan_recipes_have_the_published_numbers(name: str, latent_channels: int, ratio: int):
    recipe = of_paper(name)
    with torch.device("meta"):
        vae = train_vae.build_vae(recipe)
    assert (vae.latent_channels, vae.spatial_compression_ratio, vae.pixel_factor) == (latent_channels, ratio, 1.0)
    assert vae.config.num_ista_iterations == 4
    # 4 * (L1 + 0.5 * L1 of latents), wavelet terms as for the model's own reconstruction
    assert asdict(recipe.teacher.weights) == {
        "align_pixel": 4.0,
        "align_latents": 2.0,
        "align_low": 0.2,
        "align_high": 0.4,
    }
    assert recipe.teacher.has_discriminator and recipe.adversarial.update == "alternate"
    assert (recipe.adversarial.start_step, recipe.adversarial.num_layers) == (50_000, 7)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.final_learning_rate) == (5e-5, 2e-5)
    assert recipe.optimizer.num_warmup_steps == 10_000 and recipe.data.rescale_factors == [1.0, 1.25, 1.5, 2.0, 2.5]
    assert recipe.mixed_precision is None and not recipe.sample_posterior


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("paper_4ch", 39.77e6),
        ("compact_16ch", 5.83e6),
        ("compact_wfvae_16ch", 5.526e6),
        ("compact_ivvae_16ch", 6.092e6),
    ],
)
def test_sizes_are_those_of_the_heads(name: str, num_parameters: float):
    with torch.device("meta"):
        vae = train_vae.build_vae(of_paper(name))
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(num_parameters, rel=1e-3)


def test_learning_rate_warms_up_and_comes_down():
    cosine = OptimizerRecipe(learning_rate=1.0, final_learning_rate=0.2, num_warmup_steps=4)
    assert [cosine.learning_rate_at(step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine.learning_rate_at(4, 12) == 1.0
    assert cosine.learning_rate_at(8, 12) == pytest.approx(0.6)
    assert cosine.learning_rate_at(12, 12) == pytest.approx(0.2)
    early = OptimizerRecipe(learning_rate=1.0, final_learning_rate=0.2, num_warmup_steps=4, num_decay_steps=12)
    assert [early.learning_rate_at(step, 100) for step in (8, 12, 50)] == pytest.approx([0.6, 0.2, 0.2])
    constant = OptimizerRecipe(learning_rate=1.0, schedule="constant", num_warmup_steps=2)
    assert [constant.learning_rate_at(step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def recipe_with(**changes: Any) -> train_vae.Recipe:
    data = train_vae.DataRecipe(train="clips")
    return train_vae.Recipe(**{"data": data, "output": "runs/x", **changes})


@pytest.mark.parametrize(
    "name",
    ["batch_size", "num_steps", "log_every", "save_every", "keep_checkpoints", "num_threads", "num_statistics_clips"],
)
def test_counts_must_be_positive(name: str):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1.*, got 0"):
        recipe_with(**{name: 0})


SCRIPTS = {"vae": (train_vae.Recipe, "smoke"), "lvdm": (train_lvdm.Recipe, "lvdm_smoke")}


def load_smoke(script: str, *overrides: str) -> Any:
    recipe_class, name = SCRIPTS[script]
    return load_recipe(recipe_class, Path(train_vae.__file__).resolve().parent / f"configs/{name}.yaml", overrides)


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        ("vae", "adversarial.betas=[0.5]", r"`adversarial\.betas` must be two numbers in \[0, 1\), got \[0\.5\]"),
        ("vae", "adversarial.num_filters=0", r"`adversarial\.num_filters` must be at least 1, got 0"),
        ("vae", "teacher.clips={scenes: 5}", r"`teacher\.clips\.scenes` must be three positive integers .*, got 5"),
        ("vae", "teacher.clips={scenes: [5, 0, 8]}", r"`teacher\.clips\.scenes` must be three positive integers"),
        ("vae", "validation.size=0", r"`validation\.size` must be at least 1, got 0"),
        ("lvdm", "num_statistics_items=0", "`num_statistics_items` must be at least 1, got 0"),
        ("lvdm", "data.clip_size=[5,32]", r"`data\.clip_size` must be three positive integers .*, got \[5, 32\]"),
        ("lvdm", "data.num_clips=0", r"`data\.num_clips` must be at least 1, got 0"),
        ("lvdm", "validation.num_items=0", r"`validation\.num_items` must be at least 1, got 0"),
        ("lvdm", "validation.num_inference_steps=0", r"`validation\.num_inference_steps` must be at least 1, got 0"),
        ("lvdm", "validation.fps=0", r"`validation\.fps` must be at least 1, got 0"),
        ("lvdm", "validation.noise_levels=[]", r"`validation\.noise_levels` must hold at least one number, .*\[\]"),
        ("lvdm", "validation.noise_levels=[0.5,-0.1]", r"`validation\.noise_levels` must .* all from 0 to 1, got"),
    ],
)
def test_numbers_of_sections_are_checked_at_the_start(script: str, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_smoke(script, override)


def numbers_of(section_class: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The names of all numbers of a recipe but those in lists, and whether they need not be whole."""
    for name, kind in get_type_hints(section_class).items():
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        section = next(filter(is_dataclass, kinds), None)
        if section is not None:
            yield from numbers_of(section, f"{prefix}{name}.")
        elif {int, float} & set(kinds):
            yield f"{prefix}{name}", float in kinds


@pytest.mark.parametrize(
    ("script", "name", "is_real"),
    [
        *((script, *number) for script, (recipe_class, _) in SCRIPTS.items() for number in numbers_of(recipe_class)),
        *(("vae", f"loss.{name}", True) for name in asdict(LeanVAEObjective())),
    ],
)
def test_no_number_is_negative_or_infinite(script: str, name: str, is_real: bool):
    for value in ("-1", ".inf") if is_real and name != "optimizer.max_grad_norm" else ("-1",):
        with pytest.raises(ValueError, match=rf"{name.split('.')[-1]}` must be [^\n]*, got {value.strip('.')}[^\n]*$"):
            load_smoke(script, f"{name}={value}")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.max_grad_norm=0"], "`optimizer.max_grad_norm` must be above 0, or .inf to clip nothing, got 0.0"),
        (["optimizer.num_decay_steps=0"], "`optimizer.num_decay_steps` must be at least 1 or null, got 0"),
        (["ema_decay=2"], "`ema_decay` must be from 0 to 1, got 2.0"),
        (["max_skipped_steps=0"], "`max_skipped_steps` must be at least 1, got 0"),
        (["max_minutes=-1"], "`max_minutes` must be a finite number of at least 0 or null, got -1.0"),
        (["lora.rank=0"], "`lora.rank` must be at least 1, got 0"),
        (["lora.alpha=0"], "`lora.alpha` must be a finite number above 0, got 0.0"),
    ],
)
def test_numbers_of_both_scripts_say_what_is_legal(script: str, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_smoke(script, *overrides)


def test_what_is_legal_at_the_edge():
    recipe = load_smoke("vae", "optimizer.max_grad_norm=.inf", "optimizer.learning_rate=0", "max_minutes=0")
    assert recipe.optimizer.max_grad_norm == math.inf
    weights = [torch.nn.Parameter(torch.tensor([3.0, 4.0]))]
    weights[0].grad = weights[0].detach() * 1e6
    assert clip_gradients(weights, recipe.optimizer.max_grad_norm) == 5e6 and weights[0].grad[0] == 3e6
    with torch.device("meta"):
        assert load_smoke("vae", "model={type: wfvae}", "loss={logvar: -1}").loss["logvar"] == -1
    for value in ("-81", ".inf"):
        with pytest.raises(ValueError, match=f"`loss.logvar` must be from -80 to 80, got {value.strip('.')}"):
            load_smoke("vae", "model={type: wfvae}", f"loss={{logvar: {value}}}")
    with pytest.raises(ValueError, match=r"`data.rescale_factors` must be finite numbers, got \[1.0, inf\]"):
        load_smoke("vae", "data.rescale_factors=[1, .inf]")


def test_the_exponent_of_the_average_is_not_negative():
    for name in ("ema_power", "post_hoc_power"):
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0 or null, got -1"):
            recipe_with(**{name: -1.0})
        with pytest.raises(ValueError, match=f"`{name}` must be .* got inf"):
            recipe_with(**{name: math.inf})
    with pytest.raises(ValueError, match="`ema_power` must be given with `post_hoc_power: 3.0`, got null"):
        recipe_with(post_hoc_power=3.0)
    with pytest.raises(ValueError, match="`optimizer.schedule` must be 'constant' with .* got 'cosine'"):
        OptimizerRecipe(name="schedule_free")
    with pytest.raises(ValueError, match=r"`optimizer.betas` must begin above 0 with .* got \[0.0, 0.9\]"):
        OptimizerRecipe(name="schedule_free", schedule="constant", betas=[0.0, 0.9])
    with pytest.raises(ValueError, match="`ema_power` must be null with .*, which averages, got 3.0"):
        recipe_with(ema_power=3.0, optimizer=OptimizerRecipe(name="schedule_free", schedule="constant"))


def test_model_arguments_and_start_are_checked(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"Unknown recipe key `model\.z_dim`: legal keys here are in_channels, latent_c"
    ):
        train_vae.build_vae(recipe_with(model={"z_dim": 4}))
    with pytest.raises(
        ValueError,
        match=r"`init` must be 'spec', 'pca', 'image', 'compact-16ch', .* got 'nowhere', which does not exist",
    ):
        train_vae.build_vae(recipe_with(init="nowhere"))
    tiny = {"low_freq_dim": 8, "high_freq_dim": 24, "num_branch_layers": 1, "num_fusion_layers": 1}
    AutoencoderKLLeanVAE(**tiny).save_pretrained(tmp_path)
    assert train_vae.build_vae(recipe_with(init=str(tmp_path), model=tiny)).config.low_freq_dim == 8
    with pytest.raises(ValueError, match=r"`model\.latent_channels` must agree with `init`, which has 4, got 16"):
        train_vae.build_vae(recipe_with(init=str(tmp_path), model={"latent_channels": 16}))


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden checkpoints are not at {GOLDEN}")
def test_training_starts_from_an_original_checkpoint():
    vae = train_vae.build_vae(recipe_with(init=str(GOLDEN / "leanvae_4ch_release.ckpt")))
    assert vae.config.low_freq_dim == 8 and next(vae.parameters()).requires_grad


# --- The precision that the launcher asks for ------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_vae", "train_lvdm"])
@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        (None, "null", None),
        (None, "bf16", "bf16"),
        ("no", "fp16", "fp16"),  # which `accelerate launch` sets where nobody asked for anything
        ("no", "fp32", "fp32"),
        ("bf16", "null", "bf16"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_a_precision_that_the_recipe_leaves_open_is_the_launchers(
    script: str, launched: str | None, given: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert _parse(script, given).mixed_precision == expected


@pytest.mark.parametrize(
    ("launched", "given", "message"),
    [
        ("bf16", "fp16", "`mixed_precision` must be null or 'bf16', which the launcher asks for, got 'fp16'"),
        ("fp16", "fp32", "`mixed_precision` must be null or 'fp16', which the launcher asks for, got 'fp32'"),
        ("fp8", "null", "`--mixed_precision` must be one of 'no', 'bf16', 'fp16', got 'fp8'"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_refused(
    launched: str, given: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        _parse("train_lvdm", given)


def _parse(script: str, precision: str) -> Any:
    recipe_class, name, given = {
        "train_vae": (train_vae.Recipe, "smoke.yaml", ["data.train=clips"]),
        "train_lvdm": (train_lvdm.Recipe, "lvdm_smoke.yaml", []),
    }[script]
    path = Path(train_vae.__file__).resolve().parent / "configs" / name
    return parse_recipe(recipe_class, None, [str(path), *given, f"mixed_precision={precision}"])
