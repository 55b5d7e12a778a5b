"""From what was observed of a layer to its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from amct_pytorch.algorithms.arq import arq_scale, bias_limit, floored_for_bias
from amct_pytorch.config.models import ActivationParams, CalibrationConfig, HfmgParams
from amct_pytorch.formats import INT8, IntFormat
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.observers.hfmg import search_window
from amct_pytorch.observers.histogram import Histogram
from amct_pytorch.observers.range_search import SearchSettings, search_range
from amct_pytorch.observers.statistics import LayerStatistics
from amct_pytorch.record.factors import LayerFactors

FP16_NORMAL = (2.0**-14, 65504.0)


def weight_factors(
    name: str,
    config: CalibrationConfig,
    layout: WeightLayout | None,
    weight: Tensor,
    balance: tuple[float, ...] = (),
) -> LayerFactors:
    """The factors that depend on the weights alone.

    Args:
        name: the layer.
        config: the calibration config.
        layout: of its weight; None for a layer without weights, whose scale is 1.
        weight: its weight after fusion and balancing.
        balance: the factors that it was balanced with.
    """
    params = config.layers[name].weight_quant_params
    scale_w: tuple[float, ...] = (1.0,)
    if layout is not None:
        scale = arq_scale(
            weight, IntFormat(params.num_bits), layout, channel_wise=params.channel_wise
        )
        scale_w = tuple(scale.cpu().tolist())
    return LayerFactors(
        scale_w=scale_w,
        weight_bits=params.num_bits,
        balance=balance,
        skip_fusion=not config.do_fusion or name in config.skip_fusion_layers,
        fakequant_precision_mode=config.fakequant_precision_mode or "DEFAULT",
    )


def complete_factors(
    name: str,
    config: CalibrationConfig,
    known: LayerFactors,
    bias: Tensor,
    inputs: Histogram,
) -> LayerFactors:
    """Adds the input's factors, and widens weight scales that the bias would overflow.

    Args:
        name: the layer.
        config: the calibration config.
        known: its weight factors.
        bias: its bias after fusion, [out_channels]; empty for a layer without weights.
        inputs: what was observed of its input.
    """
    params = config.layers[name].activation_quant_params
    scale_d, offset_d = input_range(params, inputs, symmetric=not config.asymmetric(name))
    if known.fakequant_precision_mode == "FORCE_FP16_QUANT":
        scale_d = fp16_scale(scale_d)
    scale_w = torch.tensor(known.scale_w)
    if bias.numel():
        scale_w = floored_for_bias(scale_w, scale_d, bias.cpu(), bias_limit(scale_w))
    return replace(
        known,
        scale_w=tuple(scale_w.tolist()),
        scale_d=scale_d,
        offset_d=offset_d,
        activation_bits=params.num_bits,
    )


def input_range(
    params: ActivationParams, inputs: Histogram, *, symmetric: bool
) -> tuple[float, int]:
    """Scale and offset of an input, by the algorithm that its config names."""
    activation = IntFormat(params.num_bits)
    if isinstance(params, HfmgParams):
        return search_window(inputs, params.num_of_bins, activation, symmetric=symmetric)
    settings = SearchSettings(
        params.max_percentile, params.min_percentile, params.search_range, params.search_step
    )
    return search_range(inputs, settings, activation, symmetric=symmetric)


def fp16_scale(scale: float) -> float:
    """`scale` rounded to float16; beyond its normal range, its square root is rounded."""
    low, high = FP16_NORMAL
    if low <= scale <= high:
        return float(torch.tensor(scale).half())
    root = min(max(math.sqrt(scale), low), high)
    return float(torch.tensor(root).half().float() ** 2)


def output_ranges(statistics: Mapping[str, LayerStatistics]) -> dict[str, tuple[float, float]]:
    """8-bit ranges [lo, hi] of the outputs that were observed, by layer name."""
    return {
        name: output_range(observed.outputs)
        for name, observed in statistics.items()
        if observed.outputs is not None and observed.outputs.total
    }


def output_range(observed: Histogram) -> tuple[float, float]:
    """The 8-bit range [lo, hi] of an output, of which some values were observed.

    Chosen like an asymmetric input range, by the error over these values.
    """
    scale, offset = search_range(observed, SearchSettings(), INT8, symmetric=False)
    return (INT8.qmin - offset) * scale, (INT8.qmax - offset) * scale
