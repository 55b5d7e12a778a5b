"""Which layers can be split, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, did_you_mean, shown
from amct_pytorch.graph.look import shared_owners

MAX_STRIDE = 2
MIN_KERNEL = 3
# min(kernel) x min(channels): below it the smallest rank is the whole matrix.
MIN_SIDE = 16
MIN_CHANNELS = 64
# A kernel this large saves enough whatever the channels.
LARGE_KERNEL = 7


def conv_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every Conv2d of the model, subclasses too, by name, each once, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def why_not(model: nn.Module, layers: dict[str, nn.Conv2d]) -> dict[str, str]:
    """The reason why a layer is left alone, by name, for each layer that is."""
    sharing = shared_owners(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    reasons = {}
    for name, conv in layers.items():
        if len(names[conv]) > 1:
            reason: str | None = f"reused layer: it is also {names[conv][1]!r}"
        elif name in sharing:
            reason = f"reused layer: it shares memory with {sharing[name]!r}"
        else:
            reason = _not_plain(conv) or _shape_reason(conv)
        if reason:
            reasons[name] = reason
    return reasons


def not_replaceable(conv: nn.Conv2d) -> str | None:
    """Why a module cannot be exchanged for convolutions of torch's own, or None."""
    kind = type(conv)
    own = [
        method
        for method in ("forward", "_conv_forward", "__call__")
        if method in vars(conv) or getattr(kind, method) is not getattr(nn.Conv2d, method)
    ]
    if own:
        return f"it is a {kind.__name__} with a {own[0]} of its own"
    held = {*conv._parameters, *conv._buffers, *conv._modules}
    if held != {"weight", "bias"}:
        extra = sorted(held ^ {"weight", "bias"})
        return f"its weight is computed or masked ({', '.join(extra)})"
    return None


def _not_plain(conv: nn.Conv2d) -> str | None:
    reason = not_replaceable(conv)
    if reason:
        return reason
    if conv.weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if conv.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"its weight is {conv.weight.dtype}"
    return None


def _shape_reason(conv: nn.Conv2d) -> str | None:
    """What about the layer's shape rules a split out, or None."""
    if conv.groups != 1:
        return f"groups is {conv.groups}; supported is 1"
    if any(step != 1 for step in conv.dilation):
        return f"dilation is {tuple(conv.dilation)}; supported is 1"
    if max(conv.stride) > MAX_STRIDE:
        return f"stride is {tuple(conv.stride)}; supported is up to {MAX_STRIDE}"
    kernel, channels = min(conv.kernel_size), min(conv.in_channels, conv.out_channels)
    if kernel < MIN_KERNEL:
        return f"kernel is {tuple(conv.kernel_size)}; both sides must be >= {MIN_KERNEL}"
    if kernel * channels < MIN_SIDE:
        return (
            f"too small: the smaller kernel side ({kernel}) times the smaller number of channels "
            f"({channels}) is below {MIN_SIDE}"
        )
    if channels < MIN_CHANNELS and kernel < LARGE_KERNEL:
        return (
            f"too narrow: it has {channels} channels on one side; a split pays from "
            f"{MIN_CHANNELS} on, or where both kernel sides are >= {LARGE_KERNEL}"
        )
    return None


def left_out(
    names: Sequence[str],
    include: Iterable[str] | str | None,
    exclude: Iterable[str] | str | None,
) -> dict[str, str]:
    """The layers that the user's patterns leave out, with the reason.

    Args:
        names: of all Conv2d layers.
        include: shell patterns (``layer1.*``) of layers to try; None: all.
        exclude: patterns of layers to leave alone; wins over `include`.

    Raises:
        ArgumentTypeError: a pattern is no str.
        ArgumentValueError: a pattern matches no Conv2d.
    """
    wanted = None if include is None else _matching("include", include, names)
    unwanted = _matching("exclude", exclude or (), names)
    reasons = {}
    for name in names:
        if name in unwanted:
            reasons[name] = f"left out by exclude pattern {unwanted[name]!r}"
        elif wanted is not None and name not in wanted:
            reasons[name] = "matched by no include pattern"
    return reasons


def _matching(argument: str, patterns: Iterable[str] | str, names: Sequence[str]) -> dict[str, str]:
    """The first pattern that matches each name, for each name that one does."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable):
        raise ArgumentTypeError(
            f"{argument} is a {type(patterns).__name__}; allowed are a list of patterns and None"
        )
    found: dict[str, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(
                f"{argument} holds a {type(pattern).__name__}; allowed are patterns of type str"
            )
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ArgumentValueError(
                f"{argument} pattern {shown(pattern)} matches no Conv2d of the model"
                f"{did_you_mean(pattern, names)}; there are {len(names)}: "
                f"{', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
            )
        for name in hits:
            found.setdefault(name, pattern)
    return found
