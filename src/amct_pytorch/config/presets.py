"""Ready configs for `quantize`. Each access to one of the names gives a fresh dict."""

from __future__ import annotations

import copy
from typing import Any


def _tensor(fmt: str, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    block: dict[str, Any] = {"type": fmt, "symmetric": True, "strategy": strategy}
    return block if group_size is None else {**block, "group_size": group_size}


def _config(
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    algorithm: dict[str, dict[str, Any]] | set[str],
    *,
    skip: str | None = "lm_head",
    batch_num: int | None = 1,
) -> dict[str, Any]:
    config: dict[str, Any] = {} if batch_num is None else {"batch_num": batch_num}
    config["quant_cfg"] = {"weights": weights} | ({} if inputs is None else {"inputs": inputs})
    config["algorithm"] = algorithm
    if skip is not None:
        config["skip_layers"] = {skip}
    return config


_HIFLOAT8 = _tensor("hifloat8", "tensor")
_FLOAT8 = _tensor("float8_e4m3fn", "tensor")
_MXFP8 = _tensor("mxfp8_e4m3fn", "group", 32)
_SMOOTH = {"smoothquant": {"smooth_strength": 0.5}}
_AWQ = {"awq": {"grids_num": 20}}

PRESETS: dict[str, dict[str, Any]] = {
    "INT4_AWQ_WEIGHT_QUANT_CFG": _config(_tensor("int4", "channel"), None, _AWQ),
    "INT4_GPTQ_WEIGHT_QUANT_CFG": _config(_tensor("int4", "channel"), None, {"gptq"}),
    "INT8_MINMAX_WEIGHT_QUANT_CFG": _config(_tensor("int8", "channel"), None, {"minmax"}),
    "INT8_SMOOTHQUANT_CFG": _config(_tensor("int8", "channel"), _tensor("int8", "tensor"), _SMOOTH),
    "HIFP8_OFMR_CFG": _config(_HIFLOAT8, _HIFLOAT8, {"ofmr"}, skip=None),
    "FP8_OFMR_CFG": _config(_FLOAT8, _FLOAT8, {"ofmr"}),
    "MXFP8_QUANT_CFG": _config(_MXFP8, _MXFP8, {"mxquant"}),
    "MXFP4_AWQ_WEIGHT_QUANT_CFG": _config(_tensor("mxfp4_e2m1", "group", 32), None, _AWQ),
    "HIFP8_CAST_CFG": _config(_tensor("hifloat8", "channel"), _HIFLOAT8, {"cast"}, batch_num=None),
    "HIFP8_QUANTILE_CFG": _config(_HIFLOAT8, _HIFLOAT8, {"quantile"}),
    "HIFP8_SMOOTHQUANT_CFG": _config(_tensor("hifloat8", "channel"), _HIFLOAT8, _SMOOTH),
}


def __getattr__(name: str) -> Any:
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
