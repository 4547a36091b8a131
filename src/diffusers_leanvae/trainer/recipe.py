"""Training recipes: a YAML file becomes a dataclass; what the dataclass does not know is an error.

A script owns its dataclasses, but for what every run has (`RunRecipe`); this file fills and saves them:

    recipe = load_recipe(Recipe, "training/configs/smoke.yaml", ["num_steps=10", "data.train=clips"])
    save_recipe(recipe, "runs/smoke/recipe.yaml")
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..checks import check_choice


Recipe = TypeVar("Recipe")
Run = TypeVar("Run", bound="RunRecipe")


@dataclasses.dataclass
class OptimizerRecipe:
    """The optimizer and its learning rate."""

    # "muon": `whitened_muon.WhitenedMuon`; "schedule_free": `schedule_free.ScheduleFreeAdamW`, with its own average
    name: Literal["adamw", "adamw8bit", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 5e-5
    adamw_factor: float = 0.1  # with "muon": the learning rate of what is no linear map, relative to `learning_rate`
    final_learning_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    num_warmup_steps: int = 0
    num_decay_steps: int | None = None  # the cosine ends here and its final rate stays; null: at the last step
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # above 0; .inf: gradients are never clipped

    def __post_init__(self) -> None:
        amounts = ("learning_rate", "adamw_factor", "final_learning_rate", "num_warmup_steps", "weight_decay")
        check_amounts(self, *amounts, prefix="optimizer.")
        check_counts(self, "num_decay_steps", prefix="optimizer.")
        check_betas("optimizer.betas", self.betas)
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"`optimizer.max_grad_norm` must be above 0, or .inf to clip nothing, got {self.max_grad_norm}."
            )
        if self.name == "schedule_free":
            if self.schedule != "constant":
                raise ValueError(
                    f"`optimizer.schedule` must be 'constant' with `optimizer.name: schedule_free`, got "
                    f"{self.schedule!r}."
                )
            if self.betas[0] == 0:
                raise ValueError(
                    f"`optimizer.betas` must begin above 0 with `optimizer.name: schedule_free`, got {self.betas}."
                )

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Linear warm-up, then constant, or a cosine to `final_learning_rate` at `num_decay_steps` or `num_steps`."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        last = num_steps if self.num_decay_steps is None else self.num_decay_steps
        progress = min(1.0, (step - self.num_warmup_steps) / max(1, last - self.num_warmup_steps))
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclasses.dataclass(kw_only=True)
class RunRecipe:
    """The keys that every run has, whatever it trains; the recipe of a script derives from this and adds its own."""

    output: str  # the folder of the run
    seed: int = 0
    batch_size: int  # per optimizer step, over all processes and accumulation steps
    num_accumulation_steps: int = 1
    num_steps: int = 1000
    max_minutes: float | None = None  # stop early, with a checkpoint and the model as it is
    # null: what the launcher says (`accelerate launch --mixed_precision`), and else float32
    mixed_precision: Literal["bf16", "fp16", "fp32"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    num_threads: int | None = None  # CPU threads of each process
    optimizer: OptimizerRecipe = dataclasses.field(default_factory=OptimizerRecipe)
    ema_decay: float  # approached as (1 + step) / (10 + step), so that short runs average over a tenth
    # Exponent of an average by a power function (2312.02696), in place of the decay: 6.94 has a deviation of a tenth
    # of the steps done, 16.97 of a twentieth; null: by `ema_decay`.
    ema_power: float | None = None
    # Exponent of the average that is exported, in place of `ema_power`: put together afterwards from the checkpoints,
    # of which `keep_checkpoints` must keep enough. A finished run, started again with another one, exports anew.
    post_hoc_power: float | None = None
    max_skipped_steps: int = 20  # give up after this many steps in a row without a finite loss and gradient
    log_every: int
    # They get what log.jsonl gets, and pictures and videos of validations.
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = dataclasses.field(default_factory=list)
    save_every: int
    keep_checkpoints: int = 2
    resume: str | None = "latest"  # "latest": the newest in `output`, if any | a checkpoint folder | null
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the model that is exported
    push_to_hub: str | None = None  # user/name: upload what is exported at the end

    def __post_init__(self) -> None:
        names = ("batch_size", "num_accumulation_steps", "num_steps", "log_every", "save_every", "keep_checkpoints")
        check_counts(self, *names, "max_skipped_steps", "num_threads")
        check_amounts(self, "max_minutes", "ema_power", "post_hoc_power")
        check_shares(self, "ema_decay")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {self.seed}.")
        if self.post_hoc_power is not None and self.ema_power is None:
            raise ValueError(f"`ema_power` must be given with `post_hoc_power: {self.post_hoc_power}`, got null.")
        if self.ema_power is not None and self.optimizer.name == "schedule_free":
            raise ValueError(
                f"`ema_power` must be null with `optimizer.name: schedule_free`, which averages, got {self.ema_power}."
            )
        if self.compile and self.optimizer.name == "muon":
            raise ValueError(
                "`compile` must be false with `optimizer.name: muon`, which watches the layers, got true."
            )


def check_counts(section: Any, *names: str, prefix: str = "") -> None:
    """Refuse numbers below 1 of a section; `prefix` is what its keys are called with in errors."""
    _check_numbers(section, names, prefix, "at least 1", lambda number: number >= 1)


def check_amounts(section: Any, *names: str, prefix: str = "") -> None:
    """Refuse numbers of a section that are negative or infinite, as [`check_counts`] does."""
    _check_numbers(section, names, prefix, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def check_positives(section: Any, *names: str, prefix: str = "") -> None:
    """Refuse numbers of a section that are 0, negative or infinite, as [`check_counts`] does."""
    _check_numbers(section, names, prefix, "a finite number above 0", lambda number: 0 < number < math.inf)


def check_shares(section: Any, *names: str, prefix: str = "") -> None:
    """Refuse numbers of a section that are not from 0 to 1, as [`check_counts`] does."""
    _check_numbers(section, names, prefix, "from 0 to 1", lambda number: 0 <= number <= 1)


def _check_numbers(
    section: Any, names: Sequence[str], prefix: str, legal: str, is_legal: Callable[[float], bool]
) -> None:
    for name in names:
        number = getattr(section, name)
        if number is not None and not is_legal(number):
            has_null = type(None) in typing.get_args(typing.get_type_hints(type(section))[name])
            raise ValueError(f"`{prefix}{name}` must be {legal}{' or null' if has_null else ''}, got {number}.")


def check_betas(name: str, betas: Sequence[float]) -> None:
    """Refuse what is no pair of decays of an optimizer."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"`{name}` must be two numbers in [0, 1), got {betas}.")


def check_clip_size(name: str, size: Any) -> None:
    """Refuse what is no frames, height and width of a clip."""
    if not isinstance(size, list) or len(size) != 3 or any(type(edge) is not int or edge < 1 for edge in size):
        raise ValueError(f"`{name}` must be three positive integers [num_frames, height, width], got {size}.")


def parse_recipe(recipe_class: type[Run], description: str | None, arguments: Sequence[str] | None) -> Run:
    """Read the recipe that a command line names: a YAML file or a shipped recipe, then any number of `key=value`.

    A precision that the recipe leaves open is what the launcher asks for.

    Args:
        recipe_class: As of `load_recipe`, in the file of the training script.
        description: The text of `--help`.
        arguments: The command line; `None` for that of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the YAML recipe, or the name of one in `configs` beside the script")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one entry of the recipe")
    options = parser.parse_args(arguments)
    file = find_recipe(options.recipe, Path(inspect.getfile(recipe_class)))
    recipe = load_recipe(recipe_class, file, options.overrides)
    launched: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    check_choice("--mixed_precision", launched, ("no", "bf16", "fp16"))
    # "no" says nothing: `accelerate launch` sets it where it was not told.
    if launched != "no" and recipe.mixed_precision not in (launched, None):
        raise ValueError(
            f"`mixed_precision` must be null or {launched!r}, which the launcher asks for, got "
            f"{recipe.mixed_precision!r}."
        )
    if launched != "no":
        recipe.mixed_precision = launched
    return recipe


def list_recipes(script: Path) -> dict[str, Path]:
    """Find the recipes that are shipped beside a training script, by name; `lvdm_` is what `train_lvdm.py` takes."""
    paths = sorted(script.parent.glob("configs/*.yaml"))
    return {path.stem: path for path in paths if path.stem.startswith("lvdm_") == (script.stem == "train_lvdm")}


def find_recipe(name: str, script: Path) -> Path:
    """Find a recipe by its path, or by its name among those that are shipped beside a training script.

    Raises:
        ValueError: If there is none.
    """
    path, recipes = Path(name), list_recipes(script)
    if path.is_file():
        return path
    if name not in recipes:
        near = difflib.get_close_matches(path.stem, recipes, n=1, cutoff=0.6)
        suggestion = f"; perhaps {near[0]!r} is meant" if near else ""
        raise ValueError(f"`recipe` must be a YAML file, or one of {', '.join(recipes)}, got {name!r}{suggestion}.")
    return recipes[name]


def load_recipe(recipe_class: type[Recipe], path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe into `recipe_class`.

    Args:
        recipe_class: A dataclass; nested sections are fields whose type is a dataclass. A field without a default must
            be given.
        path: The YAML file.
        overrides: `key=value` strings, applied in order; dots reach into sections and the value is read as YAML
            (`optimizer.learning_rate=1e-4`, `data.clip_sizes=[[17,64,64]]`, `resume=null`).
    """
    yaml = _import_yaml()
    try:
        tree = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`path` must be a readable YAML recipe, got {str(path)!r}: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"A recipe must be a mapping of keys to values, got {type(tree).__name__} in {str(path)!r}.")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"An override must read `key=value`, got {override!r}.")
        try:
            value = _read_yaml(text, f"{key.strip()}.") if text else None
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The value of an override must be YAML, got {override!r}: {error}") from error
        _set(tree, key.strip(), value)
    return fill_section(recipe_class, tree, prefix="")


def save_recipe(recipe: Any, path: str | Path) -> None:
    """Write a recipe with every default and override resolved; `load_recipe` reads it back to an equal object."""
    Path(path).write_text(dump_recipe(recipe), encoding="utf-8")


def check_optimizer(checkpoint: Path, name: str) -> None:
    """Refuse a checkpoint of another optimizer, by the recipe that its run has saved; without one it passes."""
    path = checkpoint.absolute().parents[1] / "recipe.yaml"
    tree = _import_yaml().safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = tree.get("optimizer", {}).get("name", name)
    if found != name:
        raise ValueError(
            f"`optimizer.name` must be {found!r}, that of the checkpoint {str(checkpoint)!r}, got {name!r}: take "
            f"another `output` for another optimizer."
        )


def dump_recipe(recipe: Any) -> str:
    """The text that `save_recipe` writes."""
    return _import_yaml().safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """Write a value of a recipe as YAML on one line."""
    text = _import_yaml().safe_dump(_to_lists(value), default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _read_yaml(text: str, prefix: str = "") -> Any:
    """Read YAML; a key that a section has twice, of which PyYAML would silently take the last, is an error."""
    yaml = _import_yaml()
    waiting: list[tuple[str, Any]] = [(prefix, yaml.compose(text, Loader=yaml.SafeLoader))]
    seen = set()  # an alias leads to the same node again
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, yaml.MappingNode) or node in seen:
            continue
        seen.add(node)
        names = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in names:
                raise ValueError(f"`{name}` must be given once, got it again in line {key.start_mark.line + 1}.")
            names.add(name)
            waiting.append((f"{name}.", value))
    return yaml.safe_load(text)


def _set(tree: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, last = dotted_key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ValueError(f"`{dotted_key}` reaches into `{section}`, which is a value and not a section.")
    tree[last] = value


def fill_section(recipe_class: type[Recipe], tree: Any, prefix: str) -> Recipe:
    """Make a dataclass of a section that was read from YAML; `prefix` is what its keys are called with in errors.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of another type.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"`{prefix.rstrip('.')}` must be a section of keys, got {tree!r}.")
    hints = typing.get_type_hints(recipe_class)
    fields = {field.name: field for field in dataclasses.fields(recipe_class)}  # pyright: ignore[reportArgumentType]
    unknown = [str(key) for key in tree if key not in fields]
    if unknown:
        legal = ", ".join(fields)
        raise ValueError(f"Unknown recipe key `{prefix}{unknown[0]}`: legal keys here are {legal}.")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}")
        elif isinstance(field.default, tuple):  # as what the resolved copy of the recipe will be read back to
            values[name] = _to_lists(field.default)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"The recipe must set `{prefix}{name}`.")
    return recipe_class(**values)


def _convert(expected: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return fill_section(expected, {} if value is None else value, prefix=f"{key}.")
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # Of several types, a list is for the one that is a list, and anything else for the other.
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) > 1:
            choices = [choice for choice in choices if _is_list(choice) == isinstance(value, list)]
        return _convert(choices[0], value, key)
    if origin is typing.Literal:
        check_choice(key, value, arguments)
        return value
    if _is_list(expected) and isinstance(value, list):
        return [_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return value
    # YAML 1.1 reads `5e-4` as a string and `1` as an integer: both are meant as numbers here.
    if expected is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            if math.isnan(number):
                raise ValueError(f"`{key}` must be a number, got {value!r}.")
            return number
    # bool is a subclass of int, so `num_steps: true` needs the exact type.
    if origin is None and type(value) is expected:
        return value
    wanted = getattr(expected, "__name__", str(expected)) if origin is None else str(expected)
    wanted = wanted.replace("collections.abc.Sequence", "list")
    raise ValueError(f"`{key}` must be of type {wanted}, got {value!r}.")


def _to_lists(value: Any) -> Any:
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


def _is_list(expected: Any) -> bool:
    return typing.get_origin(expected) in (list, Sequence)


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('Recipes need PyYAML: pip install "diffusers-leanvae[train]"') from error
    return yaml
