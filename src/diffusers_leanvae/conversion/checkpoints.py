"""Original checkpoints of every family: found here or on the Hub, read, selected, renamed, written.

Functions of files and dictionaries: no model is imported here. What a family's own keys are called stands in the
other modules of this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import safetensors
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..atomic import replace_file
from ..checks import CHECKPOINT_SUFFIXES, reason_of
from ..hub_errors import hub_reason
from .headers import CONFIG_NAME, WEIGHTS_NAME, TensorInfo, read_header


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


# Arguments of `from_single_file` that are `huggingface_hub`'s.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


# --- Where a checkpoint is -------------------------------------------------------------------------------------------


def resolve_checkpoint(reference: str | Path, **hub_kwargs: Any) -> Path:
    """Return the local path of a checkpoint, after downloading it and the `config.json` next to it where needed.

    Args:
        reference: A file, or a folder with one checkpoint in it; a Hub file such as `Yumic/LeanVAE/LeanVAE-dim4.ckpt`
            or its URL; a Hub repository `user/repo`, or a folder in one, with one checkpoint in it.
        hub_kwargs: Passed on to `huggingface_hub` (`revision`, `token`, `cache_dir`, ...).

    Raises:
        ValueError: If it is none of these.
    """
    if os.path.isdir(reference):
        names = [path.name for path in Path(reference).iterdir() if path.is_file()]
        return Path(reference) / _choose_checkpoint(names, str(reference))
    if os.path.exists(reference):
        return Path(reference)
    text = str(reference)
    url = urlparse(text)
    parts = [part for part in (url.path if _is_url(text) else text).split("/") if part]
    if not is_hub_reference(text):
        raise ValueError(
            f"`reference` must be a file, a Hub file 'user/repo/file' or its URL "
            f"'https://huggingface.co/user/repo/resolve/revision/file', or a folder or Hub repository 'user/repo' "
            f"with one checkpoint, got {text!r}."
        )
    if _is_url(text):
        hub_kwargs.setdefault("revision", parts[3])
        del parts[2:4]
    repo, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if not name.endswith(CHECKPOINT_SUFFIXES):
            names = list_repository(repo, name, **hub_kwargs)
            name = f"{name}/{_choose_checkpoint(names, text)}".removeprefix("/")
        path = Path(hf_hub_download(repo, name, **hub_kwargs))
        with suppress(EntryNotFoundError):  # most have none
            hf_hub_download(repo, str(Path(name).with_name(CONFIG_NAME).as_posix()), **hub_kwargs)
    except Exception as error:  # huggingface_hub lets errors of its HTTP client through
        reason = hub_reason(error, f"model {repo!r}", hub_kwargs.get("revision"), name)
        if reason is None:
            raise
        raise ValueError(f"`reference` must be on the Hub and readable, got {text!r}: {reason}.") from error
    return path


def is_checkpoint_reference(text: str) -> bool:
    """Tell whether a path, Hub reference or URL names a checkpoint itself, by its suffix, and not a folder."""
    return urlparse(text).path.endswith(CHECKPOINT_SUFFIXES) and not os.path.isdir(text)


def is_here(source: str | os.PathLike[str]) -> bool:
    """Tell whether a path exists; an empty one does not, though for the system it is the current folder."""
    return bool(os.fspath(source)) and os.path.exists(source)


def is_hub_reference(text: str) -> bool:
    """Tell whether a text that names nothing here may name something on the Hub: `user/repo[/path]`, or a URL."""
    url = urlparse(text)
    parts = [part for part in (url.path if url.scheme else text).split("/") if part]
    if url.scheme:
        hosts = {"huggingface.co", "hf.co", urlparse(constants.ENDPOINT).netloc}
        return _is_url(text) and url.netloc in hosts and len(parts) > 4 and parts[2] in ("resolve", "blob")
    # A missing `folder/file.ckpt` is a mistake and no repository, and so is what is missing in a folder that is here:
    # asking the Hub for it would take long where there is no connection.
    is_long_enough = len(parts) > 2 or (len(parts) == 2 and not text.endswith(CHECKPOINT_SUFFIXES))
    is_path = text.startswith(("/", ".", "~")) or text.endswith("/") or "\\" in text or ".." in parts
    return is_long_enough and not is_path and not os.path.isdir(parts[0])


def _is_url(text: str) -> bool:
    return urlparse(text).scheme in ("http", "https")


def _choose_checkpoint(names: Iterable[str], folder: str) -> str:
    found = sorted(name for name in names if name.endswith(CHECKPOINT_SUFFIXES))
    if WEIGHTS_NAME in found:
        return WEIGHTS_NAME
    if len(found) != 1:
        names = [*found[:3], *([f"{len(found) - 3} more"] if len(found) > 3 else ())]
        raise ValueError(f"`reference` must name one checkpoint, got {folder!r} with {', '.join(names) or 'none'}.")
    return found[0]


def list_repository(repo: str, folder: str, **hub_kwargs: Any) -> list[str]:
    """List the files of a folder in a repository; of what is cached, where there is no connection."""
    if hub_kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE:
        options: dict[str, Any] = hub_kwargs | {"local_files_only": True}
        root = Path(snapshot_download(repo, **options))
        return [path.name for path in (root / folder).glob("*") if path.is_file()]
    revision, token = hub_kwargs.get("revision"), hub_kwargs.get("token")
    files = [Path(name) for name in HfApi().list_repo_files(repo, revision=revision, token=token)]
    return [file.name for file in files if file.parent == Path(folder)]


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read arguments and tensors of an original checkpoint of some kind, which only the error names.

    A pickle is opened with `weights_only=True`, and beyond tensors only `argparse.Namespace` is allowed. The keys of
    a dictionary inside get its name in front, but for those of `state_dict`.

    Raises:
        ValueError: If there is no such file, or it is damaged, or a pickle with anything else inside.
    """
    if not path.is_file():
        raise ValueError(f"`path` must be an original {kind} checkpoint, got {str(path)!r}, which is no file.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def read_keys(path: str | Path) -> set[str]:
    """Read the keys of the tensors that [`read_tensors`] would read, without reading these.

    Raises:
        ValueError: As [`read_tensors`] does.
    """
    return set(read_layout(path)[1])


def read_layout(path: str | Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Read arguments, and shapes and dtypes of tensors, as [`read_tensors`] would read them, but without their values.

    Raises:
        ValueError: As [`read_tensors`] does.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path` must be an original checkpoint, got {str(path)!r}, which is no file.")
    if path.suffix == ".safetensors":
        header = read_header(path)
        return header.args(), header.tensors
    args, tensors = _read_pickle(path, "meta")
    infos = {
        key: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in tensors.items()
    }
    return args, infos


def has_anchor(keys: Iterable[str], anchor: str) -> bool:
    """Tell whether a key is there, whatever stands in front of it: the name of a part, or a wrapper's prefix."""
    return any(key == anchor or key.endswith(f".{anchor}") for key in keys)


def read_config(path: Path, anchor: str | None) -> dict[str, Any]:
    """Read the arguments in the `config.json` next to an original checkpoint.

    Args:
        path: The checkpoint.
        anchor: An argument that every such config has and no other: a config without it, such as one of ours, is not
            of the original and is left alone. `None` if the original has no config.

    Returns:
        The arguments, of which there are none without such a file.
    """
    if anchor is None:
        return {}
    try:
        config = json.loads(path.with_name(CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and anchor in config else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return read_header(path).args(), {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"`path` must be a valid safetensors file, got {str(path)!r}: {error}.") from None


def _read_pickle(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`path` must be a pickle of tensors and plain values, got {str(path)!r}: {pickle_reason(error)}."
        ) from None
    except Exception as error:  # on bytes that are no checkpoint torch's unpickler fails with whatever comes first
        reason = "it is no readable PyTorch file"
        if isinstance(error, PermissionError | MemoryError | RuntimeError):
            reason = reason_of(error)
        elif not path.stat().st_size:
            reason = "it is empty"
        raise ValueError(f"`path` must be a PyTorch checkpoint, got {str(path)!r}: {reason}.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"`path` must hold a dictionary, got {str(path)!r} with a {type(checkpoint).__name__}.")
    parameters = _as_mapping(checkpoint.get("hyper_parameters"))
    args = _as_mapping(checkpoint["args"] if "args" in checkpoint else parameters.get("args"))
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in checkpoint.items():  # `state_dict`, and EMA copies stored next to it
        if isinstance(entry, dict):
            scope = "" if name == "state_dict" else f"{name}."
            tensors.update({f"{scope}{key}": value for key, value in entry.items() if isinstance(value, torch.Tensor)})
            for key, part in entry.items() if name == "state_dict" else ():  # of a model with several parts
                if isinstance(part, dict):
                    tensors.update({f"{key}.{k}": v for k, v in part.items() if isinstance(v, torch.Tensor)})
        elif isinstance(entry, torch.Tensor):  # a bare state dict
            tensors[str(name)] = entry
    return args, tensors


def _as_mapping(values: Any) -> dict[str, Any]:
    """Return arguments as a dictionary of what has a name; empty if they are something else."""
    values = vars(values) if isinstance(values, argparse.Namespace) else values
    return {name: value for name, value in values.items() if isinstance(name, str)} if isinstance(values, dict) else {}


def pickle_reason(error: pickle.UnpicklingError) -> str:
    """Say in part of a sentence why `torch.load` with `weights_only=True` has refused a pickle."""
    reason = re.sub(r"\s+", " ", str(error))
    unsafe = re.search(r"GLOBAL (\S+)", reason) or re.search(r"Unsupported \S+ ([^\W\d]\S*)", reason)
    return f"it wants to import {unsafe[1]!r}" if unsafe else "it is no readable PyTorch file"


# --- Selecting and renaming ------------------------------------------------------------------------------------------


@contextmanager
def named_gaps(path: Path, kind: str) -> Iterator[None]:
    """Turn the `KeyError` of a missing tensor into a sentence about the file.

    Raises:
        ValueError: If a tensor is missing.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"`path` must be a complete {kind} checkpoint, got {str(path)!r} without {error}.") from None


def select_network(
    path: Path,
    args: dict[str, Any],
    tensors: Mapping[str, Any],
    kind: str,
    anchor: str,
    config_anchor: str | None,
    config_from_original: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Select the weights of the network in a file and read its config from them; names and shapes are all it takes.

    Args:
        path: The file.
        args: Constructor's arguments in it.
        tensors: All tensors in it, or what is known of them ([`headers.TensorInfo`]).
        kind: Of network, for errors.
        anchor: See [`select_weights`].
        config_anchor: See [`read_config`].
        config_from_original: Reads our config from arguments and weights.

    Returns:
        Config of our class, and the weights under original keys.

    Raises:
        ValueError: If the file is no such checkpoint.
    """
    args, tensors = read_config(path, config_anchor) | args, select_weights(path, tensors, anchor, kind)
    with named_gaps(path, kind):
        return config_from_original(args, tensors), tensors


def select_weights(path: Path, tensors: Mapping[str, torch.Tensor], anchor: str, kind: str) -> dict[str, torch.Tensor]:
    """Select the weights of one network in a file that may hold several: averaged (EMA) ones if there are any.

    Args:
        path: Of the file, for the error.
        tensors: All of them.
        anchor: One key that every network of the kind has. What precedes it in the file is cut off; what does not
            start so is foreign: losses, discriminator, optimizer.
        kind: Of network, for the error.
    """
    prefixes = [key.removesuffix(anchor) for key in tensors if has_anchor((key,), anchor)]
    if not prefixes:
        raise ValueError(f"`path` must be an original {kind} checkpoint, got {str(path)!r} without {anchor!r}.")
    prefix = next((p for p in prefixes if "ema" in re.split(r"[._]", p.lower())), prefixes[0])
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def count_matches(state_dict: Mapping[str, Any], pattern: str) -> int:
    """Count the different numbers, the pattern's group, in the keys that match."""
    return len({match[1] for key in state_dict if (match := re.fullmatch(pattern, key))})


def convert_keys(
    state_dict: Mapping[str, torch.Tensor],
    pairs: list[tuple[str, str]],
    placeholders: Mapping[str, str],
    kind: str,
) -> dict[str, torch.Tensor]:
    """Rename keys by templates; every key must fit one.

    Args:
        state_dict: Weights.
        pairs: Templates of keys, such as `{half}.{i}.weight`, and of what becomes of them.
        placeholders: Regular expression of each name in braces.
        kind: Whose keys they are, for the error.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        renamed = next(
            (new for old, ours in pairs if (new := _rename(key, old, ours, placeholders)) is not None), None
        )
        if renamed is None:
            unknown.append(key)
        else:
            converted[renamed] = tensor
    if unknown:
        raise ValueError(
            f"`state_dict` must hold {kind} keys only, got {len(unknown)} others, for instance {unknown[0]!r}."
        )
    return converted


def _rename(key: str, source: str, target: str, placeholders: Mapping[str, str]) -> str | None:
    pattern = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{placeholders[m[1]]})", re.escape(source))
    match = re.fullmatch(pattern, key)
    return target.format(**match.groupdict()) if match else None


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_tensors(
    path: str | Path,
    args: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    names: tuple[str, ...] = ("state_dict",),
) -> None:
    """Write an original checkpoint, complete or not at all.

    Args:
        path: The file.
        args: Constructor's arguments: metadata of a safetensors file (by the suffix of `path`), `args` in any other.
        weights: The weights, under original keys.
        names: Entries of a torch file that hold them; the same tensors twice are written once.
    """
    import safetensors.torch
    import torch

    path = Path(path)
    if lost := [key for key, value in weights.items() if value.is_meta]:
        raise ValueError(
            f"`state_dict` must hold weights in memory, got {len(lost)} offloaded or on the meta device, for instance "
            f"{lost[0]!r}."
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    with replace_file(path) as partial:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, partial, metadata={"format": "pt", "args": json.dumps(args)})
        else:
            torch.save({"args": args} | dict.fromkeys(names, tensors), partial)
