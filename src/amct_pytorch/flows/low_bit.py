"""`quantize`, `convert` and `algorithm_register`: low-bit layers inside a torch model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from amct_pytorch.algorithms.finite import is_finite
from amct_pytorch.config.low_bit import LayerRequest, LowBitConfig, parse_low_bit_config
from amct_pytorch.config.low_bit_table import Row, find_row, nearest_rows
from amct_pytorch.config.presets import PRESETS
from amct_pytorch.errors import (
    ArgumentTypeError,
    CalibrationError,
    ConfigError,
    ModelError,
    ProblemList,
    did_you_mean,
)
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.factor_watch import unwatch_factors, watch_factors
from amct_pytorch.logs import logger, start_logging
from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.low_bit.built_in import BUILT_IN
from amct_pytorch.low_bit.ledger import LayerOutcome, LowBitLedger
from amct_pytorch.low_bit.registry import REGISTRY, Algorithm
from amct_pytorch.memory import release_memory
from amct_pytorch.nn.wrapped import replace_modules

DEFAULT_CONFIG = "INT8_MINMAX_WEIGHT_QUANT_CFG"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@public_call
def algorithm_register(
    name: str,
    src_op: str,
    quant_op: type[BaseQuantizeModule],
    deploy_op: type[nn.Module] | None = None,
) -> None:
    """Registers an algorithm that `quantize` can then be asked for by name.

    Registering a name again for the same layer class overrides it, with a warning.

    Args:
        name: what configs call it.
        src_op: class name of the layers it replaces, such as ``Linear``.
        quant_op: a `BaseQuantizeModule` subclass, constructed as
            ``quant_op(ori_module, layer_name, quant_config)``; see its docstring.
        deploy_op: an `nn.Module` subclass, constructed as ``deploy_op(quant_module)``; None:
            `convert` leaves the quantize module in place, and says so.

    Raises:
        ArgumentTypeError: an argument has another type.
        ArgumentValueError: a name is empty.
    """
    start_logging(to_file=False)
    REGISTRY.register(name, src_op, quant_op, deploy_op)


@public_call
def quantize(model: nn.Module, config: Mapping[str, Any] | None = None) -> None:
    """Turns a float model into a calibration model, in place.

    Each layer that the config covers becomes its algorithm's quantize module. Then run
    `batch_num` forward passes, and call `convert`. The calibration model returns float outputs
    for these passes and simulated quantized outputs afterwards. ``print(model.amct_ledger)``
    tells what happens to every layer, and why some are left as they are.

    Args:
        model: float32, float16 or bfloat16, weights loaded, on any device.
        config: see ``docs/low_bit.md``; None: ``INT8_MINMAX_WEIGHT_QUANT_CFG``.

    Raises:
        ArgumentTypeError: `model` is not a module or `config` not a dict.
        ConfigError: the config is wrong, asks for what is not allowed together or does not fit
            the layers, or no layer is left to quantize.
        ModelError: the model is quantized or converted already, is itself the layer to replace,
            or holds weights that are NaN, infinite or not loaded.
    """
    start_logging(to_file=False)
    _check_model(model)
    raw = copy.deepcopy(PRESETS[DEFAULT_CONFIG]) if config is None else config
    parsed = parse_low_bit_config(raw, REGISTRY.options())
    if any(isinstance(module, BaseQuantizeModule) for module in model.modules()):
        raise ModelError("the model has quantize modules already; calibrate and convert it")
    # What a preset skips is nobody's slip of the pen.
    ledger, requests = _plan(model, parsed, skips_are_own=raw not in PRESETS.values())
    if model.training:
        logger.warning("the model is in training mode: dropout acts in calibration; call eval()")
    replacements: dict[nn.Module, nn.Module] = {}
    for outcome in ledger.quantized:
        algorithm, request = requests[outcome.name]
        module = model.get_submodule(outcome.name)
        quantizer = algorithm.quant_op(module, outcome.name, request.as_dict())
        quantizer.batch_num = request.batch_num
        quantizer.train(module.training)
        quantizer.outcome = outcome
        replacements[module] = quantizer
    replace_modules(model, replacements)
    watch_factors(model)
    model.amct_ledger = ledger  # type: ignore[assignment]
    left = len(ledger.layers) - len(ledger.quantized)
    logger.info("%d layers to quantize, %d left as they are", len(ledger.quantized), left)


@public_call
def convert(model: nn.Module) -> nn.Module:
    """Turns a calibrated model into the deploy model, in place.

    Args:
        model: what `quantize` made, after `batch_num` forward passes.

    Returns:
        `model`, with each quantize module replaced by its algorithm's deploy module.

    Raises:
        ArgumentTypeError: `model` is not a module.
        ModelError: it has no quantize module.
        CalibrationError: layers have not seen all their batches; the message names them.
    """
    start_logging(to_file=False)
    _check_model(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantizeModule)
    }
    if not modules:
        raise ModelError("the model has no quantize module; call quantize on it first")
    missing = [
        f"{name} has seen {module.batches_seen} of {module.batch_num} batches"
        for name, module in modules.items()
        if not module.calibrated
    ]
    if missing:
        problems = ProblemList(
            "convert before the end of calibration; run more batches through the model, or add "
            "layers that it does not use to skip_layers",
            CalibrationError,
        )
        for text in missing:
            problems.add(text)
        problems.raise_if_any()
    unwatch_factors(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():
        algorithm = _algorithm_of(module)
        if algorithm is None or algorithm.deploy_op is None:
            logger.warning("%s stays a %s: it has no deploy module", name, type(module).__name__)
            continue
        deployed = algorithm.deploy_op(module)
        deployed.train(module.training)
        replacements[module] = deployed
        module.outcome.status = "deployed"
    replace_modules(model, replacements)
    release_memory()
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is of type {type(model).__name__}; allowed is torch.nn.Module"
        )


def _algorithm_of(module: BaseQuantizeModule) -> Algorithm | None:
    asked = REGISTRY.find(module.outcome.algorithm or "", module.outcome.type)
    if asked is not None and asked.quant_op is type(module):
        return asked
    return next((found for found in REGISTRY if found.quant_op is type(module)), None)


def _plan(
    model: nn.Module, config: LowBitConfig, *, skips_are_own: bool
) -> tuple[LowBitLedger, dict[str, tuple[Algorithm, LayerRequest]]]:
    """What happens to each layer, before anything is changed."""
    ledger = LowBitLedger()
    requests: dict[str, tuple[Algorithm, LayerRequest]] = {}
    problems = ProblemList("config", ConfigError)
    refused: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        src_op = type(module).__name__
        algorithm = REGISTRY.find(config.algorithm, src_op)
        if algorithm is None and (not isinstance(weight, nn.Parameter) or weight.dim() < 2):
            continue
        outcome = LayerOutcome(name, src_op, float_bytes=_bytes_of(module))
        ledger.layers.append(outcome)
        request = config.for_layer(name)
        outcome.reason = _reason_to_leave(module, name, algorithm, request, config)
        if outcome.reason is not None or algorithm is None or request is None:
            continue
        _check_layer(module, name, algorithm, request, outcome, refused)
        outcome.status, outcome.algorithm = "calibrating", algorithm.name
        outcome.weights = _told(request.weights)
        outcome.inputs = None if request.inputs is None else _told(request.inputs)
        requests[name] = (algorithm, request)
    if not requests:
        _check_not_converted(model)
    for text, names in refused.items():
        problems.add(f"{_first_of(names)}: {text}")
    _check_names(config, [layer.name for layer in ledger.layers], problems, skips_are_own)
    problems.raise_if_any()
    if not requests:
        raise ConfigError(
            "config: no layer is left to quantize:\n  "
            + ("\n  ".join(map(str, ledger.layers[:10])) or "the model has no layer with weights")
        )
    return ledger, requests


def _check_not_converted(model: nn.Module) -> None:
    """Raises ModelError for a model that `convert` has been through."""
    # A class of torch's own may be an algorithm's deploy module too, and tells nothing.
    made = {
        algorithm.deploy_op
        for algorithm in REGISTRY
        if algorithm.deploy_op and not algorithm.deploy_op.__module__.startswith("torch.")
    }
    converted = [name or "itself" for name, module in model.named_modules() if type(module) in made]
    if converted:
        raise ModelError(
            f"the model is converted already: {_first_of(converted)}; quantize the float model"
        )


def _first_of(names: list[str]) -> str:
    more = len(names) - 3
    rest = f" and {more} more layer{'s' * (more > 1)}" if more > 0 else ""
    return f"{', '.join(names[:3])}{rest}"


def _reason_to_leave(
    module: nn.Module,
    name: str,
    algorithm: Algorithm | None,
    request: LayerRequest | None,
    config: LowBitConfig,
) -> str | None:
    if algorithm is None:
        covered = ", ".join(REGISTRY.layers_of(config.algorithm))
        return f"algorithm {config.algorithm!r} is for {covered}"
    part = config.skipped_by(name)
    if part is not None:
        return f"skip_layers has {part!r}"
    if request is None:
        return "quant_cfg has no weights block for it"
    dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
    if not dtypes <= set(FLOAT_DTYPES):
        told = ", ".join(sorted(str(dtype) for dtype in dtypes))
        logger.warning("layer %s stays float: its parameters are %s", name, told)
        return f"its parameters are {told}; allowed are float32, float16 and bfloat16"
    return None


def _check_layer(
    module: nn.Module,
    name: str,
    algorithm: Algorithm,
    request: LayerRequest,
    outcome: LayerOutcome,
    refused: dict[str, list[str]],
) -> None:
    """Raises or notes whatever keeps a layer from being quantized as asked.

    What the config asks and the layer cannot have goes to `refused`: the text, and the layers it
    is for.
    """
    if not name:
        raise ModelError(
            f"the model itself is a {type(module).__name__}, which cannot be replaced in place; "
            "put it into a torch.nn.Sequential"
        )
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if weight.is_meta:
            raise ModelError(f"the weight of layer {name!r} is on the meta device; load it first")
        if not is_finite(weight):
            raise ModelError(
                f"the weight of layer {name!r} holds NaN or infinity; load a sound checkpoint, or "
                "add the layer to skip_layers"
            )
        columns = weight[0].numel()
        size = request.weights.group_size
        if size is not None and size >= columns and not request.weights.type.startswith("mx"):
            refused.setdefault(_too_large(size, columns), []).append(name)
    if algorithm.built_in:
        row = find_row(request.combination(algorithm.src_op))
        if row is None:
            refused.setdefault(_not_allowed(request, algorithm), []).append(name)
        elif isinstance(weight, torch.Tensor):
            outcome.notes.extend(_limits_elsewhere(row, weight.shape))
    if module._forward_hooks or module._forward_pre_hooks:
        outcome.notes.append("its forward hooks do not run any more after calibration")


def _too_large(group_size: int, columns: int) -> str:
    allowed = f"a multiple of 32 in [32, {columns - 1}]" if columns > 32 else "no groups"
    return (
        f"weights.group_size is {group_size}; allowed with {columns} inputs: {allowed}. Give such "
        "layers a block of their own, 'NAME.weights', or add them to skip_layers"
    )


def _not_allowed(request: LayerRequest, algorithm: Algorithm) -> str:
    wanted = request.combination(algorithm.src_op)
    allowed = "\n    ".join(str(row) for row in nearest_rows(wanted))
    return f"not allowed together: {wanted}; allowed:\n    {allowed}"


def _limits_elsewhere(row: Row, shape: torch.Size) -> list[str]:
    """A note where Ascend's kernels could not run what runs here."""
    rows, columns = shape[0], shape[1:].numel()
    limits = [
        f"{what} a multiple of {multiple} (is {size})"
        for what, multiple, size in (("K", row.k_multiple, columns), ("N", row.n_multiple, rows))
        if size % multiple
    ]
    return [f"runs here, but Ascend's packed kernel needs {' and '.join(limits)}"] if limits else []


def _check_names(
    config: LowBitConfig, names: list[str], problems: ProblemList, skips_are_own: bool
) -> None:
    """Notes globs, and warns of skipped names, that are no layer's."""
    for override in config.overrides:
        if not any(override.matches(name) for name in names):
            near = [*names, *(f"{part}.*" for name in names for part in _prefixes(name))]
            problems.add(
                f"quant_cfg.{override.key}: no layer has such a name"
                f"{did_you_mean(override.pattern, near)}"
            )
    for part in config.skip_layers if skips_are_own else ():
        if not any(part in name for name in names):
            hint = did_you_mean(part, [*names, *(name.split(".")[-1] for name in names)])
            logger.warning("skip_layers: no layer's name contains %r%s", part, hint)


def _prefixes(name: str) -> Iterator[str]:
    """``a.b.c``: ``a`` and ``a.b``."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _told(block: Any) -> str:
    by = block.strategy if block.group_size is None else f"group of {block.group_size}"
    return f"{block.type} by {by}{'' if block.symmetric else ', asymmetric'}"


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


for _name, _src_op, _quant_op, _deploy_op in BUILT_IN:
    REGISTRY.register(_name, _src_op, _quant_op, _deploy_op)  # an import starts no logging
