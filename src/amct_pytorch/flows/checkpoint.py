"""Checkpoints of users: read as data only, and held against the model before they are loaded."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    FileAccessError,
    FileMissingError,
    ModelError,
    did_you_mean,
    shown,
)
from amct_pytorch.files import PathLike, as_path

# What wrappers put before every name: DistributedDataParallel, torch.compile.
PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: nn.Module, pth_file: PathLike, state_dict_name: str | None) -> None:
    """Loads a checkpoint into a model, all of it or nothing.

    Args:
        model: gets the values, in place.
        pth_file: file that ``torch.save`` wrote. No code in it is run.
        state_dict_name: key of the state dict in it; None: it is the state dict.

    Raises:
        ArgumentTypeError, ArgumentValueError: `state_dict_name` is no str, or no key of the
            checkpoint.
        FileMissingError, FileAccessError: the file cannot be read.
        ModelError: it holds something else than tensors and plain values, or does not fit the
            model; the first name missing, and the first that is not expected, are told.
    """
    path = as_path(pth_file, "pth_file")
    state = _without_prefixes(_state_dict(_read(path), state_dict_name, path), model)
    _check_fits(model, state, path)
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileMissingError(f"pth_file: there is no file {str(path)!r}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileAccessError(f"pth_file: cannot read {str(path)!r}: {reason}") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} cannot be read as data only ({_first_sentence(error)}). It may hold whole "
            "objects, whose code is not run; save model.state_dict()"
        ) from error
    except Exception as error:  # of whatever else a file holds, torch stumbles on anything
        raise ModelError(
            f"{path} is no checkpoint of torch.save: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0].split('. ')[0]}"


def _state_dict(checkpoint: Any, name: str | None, path: Path) -> dict[str, Any]:
    if name is not None:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"state_dict_name is {shown(name)}; allowed: a str, or None")
        keys = [str(key) for key in checkpoint] if isinstance(checkpoint, Mapping) else []
        if name not in keys:
            held = ", ".join(keys[:10]) or f"a {type(checkpoint).__name__}"
            raise ArgumentValueError(
                f"state_dict_name is {name!r}, which {path} does not have"
                f"{did_you_mean(name, keys)}; it has {held}"
            )
        checkpoint = checkpoint[name]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(key, str) for key in checkpoint):
        what = f"state_dict_name {name!r}" if name else "it"
        raise ModelError(f"{path}: {what} is a {type(checkpoint).__name__}; allowed: a state dict")
    nested = [key for key, value in checkpoint.items() if isinstance(value, Mapping)]
    if nested and name is None and not any(isinstance(v, Tensor) for v in checkpoint.values()):
        raise ModelError(
            f"{path} holds several things ({', '.join(list(checkpoint)[:10])}); name the state "
            f"dict among them with state_dict_name, {nested[0]!r} perhaps"
        )
    return dict(checkpoint)


def _without_prefixes(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    own = model.state_dict().keys()
    while True:
        for prefix in PREFIXES:
            wrapped = state and all(key.startswith(prefix) for key in state)
            if wrapped and not all(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                break
        else:
            return state


def _check_fits(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    problems = []
    if missing:
        problems.append(f"it lacks {_first(missing)}")
    if unexpected:
        hint = did_you_mean(unexpected[0], missing)
        problems.append(f"it has {_first(unexpected)}, which the model has not{hint}")
    for key, value in own.items():
        given = state.get(key)
        if not isinstance(given, Tensor) or not isinstance(value, Tensor):
            continue
        if given.shape != value.shape and not key.endswith("_extra_state"):
            problems.append(
                f"{key!r} has shape {list(given.shape)} in it and {list(value.shape)} in the model"
            )
            break
    if problems:
        raise ModelError(
            f"{path} does not fit the model: {'; '.join(problems)}. It must be of a model that was "
            "created from the same model with the same config"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
