"""One layer of the record file: from its message to factors and back, with all checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from amct_pytorch.errors import shown
from amct_pytorch.formats.integer import IntFormat
from amct_pytorch.record.factors import LayerFactors

WEIGHT_TYPES = {IntFormat(bits).record_name: bits for bits in (8, 7, 6, 4)}
ACTIVATION_TYPES = {IntFormat(bits).record_name: bits for bits in (8, 4)}
MODES = ("DEFAULT", "FORCE_FP16_QUANT")

# Told field, value and what is allowed, as one text.
Tell = Callable[[str], None]


def factors_of(value: Any, tell: Tell) -> LayerFactors:
    """The factors that a SingleLayerRecord holds.

    Args:
        value: the message.
        tell: called for each thing that is wrong; the factors are of use only if it was not.
    """
    factors = LayerFactors(
        scale_w=tuple(value.scale_w),
        scale_d=value.scale_d if value.HasField("scale_d") else None,
        offset_d=value.offset_d,
        weight_bits=_bits(value, "wts_type", WEIGHT_TYPES, tell),
        activation_bits=_bits(value, "act_type", ACTIVATION_TYPES, tell),
        balance=tuple(value.tensor_balance_factor),
        skip_fusion=value.skip_fusion,
        fakequant_precision_mode=value.fakequant_precision_mode,
    )
    if len(value.offset_w) != len(value.scale_w):
        tell(
            f"offset_w has {len(value.offset_w)} values and scale_w {len(value.scale_w)}; "
            "allowed: equally many"
        )
    for index, offset in enumerate(value.offset_w):
        if offset != 0:
            tell(f"offset_w[{index}] is {offset}; allowed: 0")
            break
    check_factors(factors, tell)
    return factors


def _bits(value: Any, name: str, types: dict[str, int], tell: Tell) -> int:
    """Bits of the type in field `name`; older files have one `dst_type` instead."""
    if value.HasField(name):
        given = getattr(value, name)
        if given not in types:
            tell(f"{name} is {shown(given)}; allowed: {', '.join(types)}")
        return types.get(given, 8)
    if value.dst_type not in WEIGHT_TYPES:
        tell(f"dst_type is {shown(value.dst_type)}; allowed: {', '.join(WEIGHT_TYPES)}")
    # 6 and 7 bits are for weights only: such a layer's input has 8.
    return types.get(value.dst_type, 8)


def check_factors(factors: LayerFactors, tell: Tell) -> None:
    """Hold factors against the format.

    Args:
        factors: what was read, or is to be written.
        tell: called for each thing that is wrong.
    """
    check_positive("scale_w", factors.scale_w, tell)
    if factors.scale_d is not None:
        check_positive("scale_d", [factors.scale_d], tell)
    check_positive("tensor_balance_factor", factors.balance, tell)
    for name, bits, types in (
        ("weight_bits", factors.weight_bits, WEIGHT_TYPES),
        ("activation_bits", factors.activation_bits, ACTIVATION_TYPES),
    ):
        if bits not in types.values():
            tell(f"{name} is {bits}; allowed: {', '.join(map(str, types.values()))}")
            return
    grid = IntFormat(factors.activation_bits)
    if not grid.qmin <= factors.offset_d <= grid.qmax:
        tell(f"offset_d is {factors.offset_d}; allowed: {grid.qmin} to {grid.qmax}")
    if factors.fakequant_precision_mode not in MODES:
        mode = shown(factors.fakequant_precision_mode)
        tell(f"fakequant_precision_mode is {mode}; allowed: {' or '.join(MODES)}")


def check_positive(name: str, values: Iterable[float], tell: Tell) -> None:
    """Tells the first that is not finite and > 0 as float32, which is what the file holds."""
    values = tuple(values)
    with np.errstate(over="ignore", under="ignore"):
        stored = np.asarray(values, dtype=np.float32)
    wrong = np.flatnonzero(~(np.isfinite(stored) & (stored > 0)))
    if wrong.size:
        value = values[wrong[0]]
        place = name if name == "scale_d" else f"{name}[{wrong[0]}]"
        fits = "" if not math.isfinite(value) or value <= 0 else ", within float32"
        tell(f"{place} is {value}; allowed: finite and > 0{fits}")


def fill_entry(value: Any, factors: LayerFactors, *, plain_types: bool = True) -> None:
    """Make a SingleLayerRecord say `factors`; fields of other matters stay as they are.

    Args:
        value: the message.
        factors: what it shall say.
        plain_types: whether it names the type of eight bits, too.
    """
    del value.scale_w[:]
    del value.offset_w[:]
    del value.tensor_balance_factor[:]
    value.scale_w.extend(factors.scale_w)
    value.offset_w.extend([0] * len(factors.scale_w))
    value.tensor_balance_factor.extend(factors.balance)
    for name in ("scale_d", "offset_d", "skip_fusion", "dst_type", "fakequant_precision_mode"):
        value.ClearField(name)
    if factors.scale_d is not None:
        value.scale_d = factors.scale_d
        value.offset_d = factors.offset_d
    if factors.skip_fusion:
        value.skip_fusion = True
    bits = {"act_type": factors.activation_bits, "wts_type": factors.weight_bits}
    for name, number in bits.items():
        value.ClearField(name)
        if number != 8 or plain_types:
            setattr(value, name, IntFormat(number).record_name)
    if factors.fakequant_precision_mode != "DEFAULT":
        value.fakequant_precision_mode = factors.fakequant_precision_mode
