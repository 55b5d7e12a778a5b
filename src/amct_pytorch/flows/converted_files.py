"""`save_converted` and `load_converted`: a deploy model of `convert` as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from amct_pytorch.errors import (
    ArgumentTypeError,
    FileAccessError,
    FileMissingError,
    ModelError,
    ProblemList,
    did_you_mean,
)
from amct_pytorch.files import PathLike, as_path, check_writable, write_whole
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.low_bit.deploy_conv import LowBitConv2d
from amct_pytorch.low_bit.deploy_linear import LinearSpec, LowBitLinear
from amct_pytorch.low_bit.ledger import LowBitLedger
from amct_pytorch.nn.wrapped import replace_modules

LAYERS_KEY = "amct.low_bit_layers"
TIED_KEY = "amct.tied"
LEDGER_KEY = "amct.ledger"


@public_call
def save_converted(model: nn.Module, file: PathLike) -> None:
    """Writes a converted model: all its parameters and buffers, low-bit weights packed.

    The file is an ordinary safetensors file with the names of ``model.state_dict()``; tensors
    that several names share are stored once. What the low-bit layers are is in its metadata,
    so that `load_converted` needs neither the config nor calibration; the ledger is there too.

    Args:
        model: what `convert` returned.
        file: the file to write, whole or not at all.

    Raises:
        ArgumentTypeError: `model` is not a module.
        ModelError: the model has no deploy layer, is still being calibrated, or has deploy layers
            of algorithms that were registered by the user, whose structure is not known here.
        FileAccessError: the file cannot be written.
    """
    _check_module(model)
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseQuantizeModule):
            raise ModelError(f"layer {name!r} is being calibrated; call convert first")
        if isinstance(module, LowBitLinear):
            layers[name] = {"type": "Linear", **module.spec.as_dict()}
        elif isinstance(module, LowBitConv2d):
            layers[name] = {"type": "Conv2d", **module.structure()}
    _check_own_layers(model, layers)
    if not layers:
        raise ModelError("the model has no deploy layer; call quantize, calibrate and convert it")
    check_writable(file, "file")
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = owners.setdefault(memory, name) if tensor.numel() else name
        if first != name:
            tied[name] = first
        else:
            # Views of one storage are no sharing that a file could keep.
            tensors[name] = tensor.detach().contiguous().clone()
    metadata = {"format": "pt", LAYERS_KEY: json.dumps(layers), TIED_KEY: json.dumps(tied)}
    ledger = getattr(model, "amct_ledger", None)
    if isinstance(ledger, LowBitLedger):
        metadata[LEDGER_KEY] = ledger.to_json()
    write_whole(file, lambda path: _save(tensors, path, metadata), what="file")


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Like safetensors, but with the permissions of other files, and errors that are OSErrors."""
    mode = path.stat().st_mode if path.exists() else None
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if mode is not None:
        path.chmod(mode)


@public_call
def load_converted(model: nn.Module, file: PathLike) -> nn.Module:
    """Makes a float model the converted model that `save_converted` wrote, in place.

    No float weight is needed: `model` may have been built without loading any, or on the
    ``meta`` device where none of its buffers is left out of its state dict.

    Args:
        model: of the structure that was quantized.
        file: written by `save_converted`.

    Returns:
        `model`, on the CPU, in eval mode, with the ledger it was saved with.

    Raises:
        ArgumentTypeError: `model` is not a module.
        FileMissingError, FileAccessError: the file cannot be read.
        ModelError: it is no such file, or the model is of another structure; the model is then
            as it was.
    """
    _check_module(model)
    saved = _Saved.read(file)
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = ProblemList(str(file), ModelError)
    replacements: dict[nn.Module, nn.Module] = {}
    layers: dict[str, nn.Module] = {}
    for name, raw in saved.layers.items():
        module = modules.get(name)
        if module is None:
            problems.add(f"{name}: the model has no such layer{did_you_mean(name, modules)}")
        elif isinstance(module, LowBitLinear | LowBitConv2d):
            problems.add(f"{name} is converted already; give a float model")
        elif type(module).__name__ != raw["type"]:
            problems.add(f"{name} is a {type(module).__name__} in the model; saved: {raw['type']}")
        elif module in replacements:
            layers[name] = replacements[module]
        else:
            layer = _layer_of(module, {key: raw[key] for key in raw if key != "type"})
            if layer is None:
                problems.add(f"{name}: the model has {module}; saved: {raw}")
            else:
                layers[name] = replacements[module] = layer
    problems.raise_if_any()
    _check_tensors(model, layers, saved, problems)
    replace_modules(model, replacements)
    model.load_state_dict(saved.tensors, strict=False, assign=True)
    for name, first in saved.tied.items():
        _tie(model, name, first)
    if saved.ledger is not None:
        model.amct_ledger = saved.ledger  # type: ignore[assignment]
    return model.eval()


@dataclass(frozen=True)
class _Saved:
    """What a file holds."""

    tensors: dict[str, Tensor]
    layers: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]
    ledger: LowBitLedger | None

    @classmethod
    def read(cls, file: PathLike) -> _Saved:
        path = as_path(file, "file")
        if not path.exists():
            raise FileMissingError(f"file: {str(path)!r} does not exist")
        if path.is_dir():
            raise FileAccessError(f"file: {str(path)!r} is a folder; allowed: a file")
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if LAYERS_KEY not in metadata:
                    raise ModelError(f"{path}: it was not written by save_converted")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            layers, tied = json.loads(metadata[LAYERS_KEY]), json.loads(metadata[TIED_KEY])
            told = metadata.get(LEDGER_KEY)
            ledger = None if told is None else LowBitLedger.from_json(told)
            absent = [first for first in tied.values() if first not in tensors]
            if absent:
                raise KeyError(absent[0])
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileAccessError(f"file: cannot read {str(path)!r}: {reason}") from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: it is no sound safetensors file: {error}") from None
        return cls(tensors, layers, tied, ledger)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is of type {type(model).__name__}; allowed is torch.nn.Module"
        )


def _check_own_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    ledger = getattr(model, "amct_ledger", None)
    foreign = [
        entry
        for entry in getattr(ledger, "quantized", [])
        if entry.status == "deployed" and entry.name not in layers
    ]
    if foreign:
        raise ModelError(
            f"layer {foreign[0].name!r} was deployed by {foreign[0].algorithm!r}, an algorithm of "
            "your own, which load_converted could not rebuild; save the state dict yourself"
        )


def _layer_of(module: nn.Module, raw: Mapping[str, Any]) -> LowBitLinear | LowBitConv2d | None:
    """An empty deploy layer in the place of `module`; None where the structures differ."""
    try:
        return _empty_layer(module, raw)
    except (KeyError, TypeError, ValueError, AttributeError):  # spoiled metadata
        return None


def _empty_layer(module: nn.Module, raw: Mapping[str, Any]) -> LowBitLinear | LowBitConv2d | None:
    if isinstance(module, nn.Linear):
        spec = LinearSpec.from_dict(raw)
        same = (module.in_features, module.out_features) == (spec.in_features, spec.out_features)
        return LowBitLinear.from_spec(spec) if same else None
    if isinstance(module, nn.Conv2d):
        layer = LowBitConv2d.from_structure(raw)
        return layer if layer.structure() == {**layer.structure(), **_sizes(module)} else None
    return None


def _sizes(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "shape": list(conv.weight.shape),
        "stride": list(conv.stride),
        "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
    }


def _check_tensors(
    model: nn.Module, layers: Mapping[str, nn.Module], saved: _Saved, problems: ProblemList
) -> None:
    """That names, shapes and, in the deploy layers, dtypes are those that will be loaded."""
    inside = tuple(f"{name}." for name in layers)
    expected = {k: t for k, t in model.state_dict().items() if not k.startswith(inside)}
    own = {
        f"{name}.{k}": t for name, layer in layers.items() for k, t in layer.state_dict().items()
    }
    found = {**saved.tensors, **{name: saved.tensors[first] for name, first in saved.tied.items()}}
    for name, tensor in {**expected, **own}.items():
        if name not in found:
            problems.add(f"{name} is missing in the file")
        elif found[name].shape != tensor.shape:
            problems.add(
                f"{name} has shape {list(found[name].shape)}; the model's is {list(tensor.shape)}"
            )
        elif name in own and found[name].dtype != tensor.dtype:
            problems.add(f"{name} is {found[name].dtype}; it must be {tensor.dtype}")
    for name in found:
        if name not in expected and name not in own:
            problems.add(f"{name}: the model has no such tensor{did_you_mean(name, expected)}")
    problems.raise_if_any()


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Makes the tensor `name` the very tensor `first`."""
    parent, _, leaf = name.rpartition(".")
    source_parent, _, source_leaf = first.rpartition(".")
    tensor = getattr(model.get_submodule(source_parent), source_leaf)
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor
