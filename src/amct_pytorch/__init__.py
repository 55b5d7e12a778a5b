"""Model compression for PyTorch behind the AMCT interface.

Public names are imported when they are first used, so that importing the package costs next
to nothing beside torch and needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amct_pytorch.auto_calibration.model_evaluator import ModelEvaluator
    from amct_pytorch.errors import AmctError
    from amct_pytorch.export.deploy_session import DeploySession
    from amct_pytorch.export.qdq import deploy_to_qdq
    from amct_pytorch.flows.auto_calibration import accuracy_based_auto_calibration
    from amct_pytorch.flows.balancing import quantize_preprocess
    from amct_pytorch.flows.block_calibration import calibrate_blocks
    from amct_pytorch.flows.channel_search import auto_channel_prune_search
    from amct_pytorch.flows.compression import (
        create_compressed_retrain_model,
        restore_compressed_retrain_model,
        save_compressed_retrain_model,
    )
    from amct_pytorch.flows.converted_files import load_converted, save_converted
    from amct_pytorch.flows.decomposition import auto_decomposition, decompose_network
    from amct_pytorch.flows.distillation import (
        create_distill_config,
        create_distill_model,
        distill,
        save_distill_model,
    )
    from amct_pytorch.flows.kv_cache import create_quant_cali_config, create_quant_cali_model
    from amct_pytorch.flows.low_bit import algorithm_register, convert, quantize
    from amct_pytorch.flows.post_training import create_quant_config, quantize_model, save_model
    from amct_pytorch.flows.pruning import (
        create_prune_retrain_model,
        restore_prune_retrain_model,
        save_prune_retrain_model,
    )
    from amct_pytorch.flows.retraining import (
        create_quant_retrain_config,
        create_quant_retrain_model,
        restore_quant_retrain_model,
        save_quant_retrain_model,
    )
    from amct_pytorch.flows.trained_operators import convert_qat_model
    from amct_pytorch.low_bit.base_module import BaseQuantizeModule
    from amct_pytorch.nn.module.quantization.quant_calibration_op import QuantCalibrationOp

_PRESETS = (
    "FP8_OFMR_CFG",
    "HIFP8_CAST_CFG",
    "HIFP8_OFMR_CFG",
    "HIFP8_QUANTILE_CFG",
    "HIFP8_SMOOTHQUANT_CFG",
    "INT4_AWQ_WEIGHT_QUANT_CFG",
    "INT4_GPTQ_WEIGHT_QUANT_CFG",
    "INT8_MINMAX_WEIGHT_QUANT_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "MXFP4_AWQ_WEIGHT_QUANT_CFG",
    "MXFP8_QUANT_CFG",
)

_HOMES = {
    "AmctError": "errors",
    "BaseQuantizeModule": "low_bit.base_module",
    "DeploySession": "export.deploy_session",
    "ModelEvaluator": "auto_calibration.model_evaluator",
    "QuantCalibrationOp": "nn.module.quantization.quant_calibration_op",
    "accuracy_based_auto_calibration": "flows.auto_calibration",
    "algorithm_register": "flows.low_bit",
    "auto_channel_prune_search": "flows.channel_search",
    "auto_decomposition": "flows.decomposition",
    "calibrate_blocks": "flows.block_calibration",
    "convert": "flows.low_bit",
    "create_distill_config": "flows.distillation",
    "create_distill_model": "flows.distillation",
    "convert_qat_model": "flows.trained_operators",
    "create_compressed_retrain_model": "flows.compression",
    "create_prune_retrain_model": "flows.pruning",
    "create_quant_cali_config": "flows.kv_cache",
    "create_quant_cali_model": "flows.kv_cache",
    "create_quant_config": "flows.post_training",
    "create_quant_retrain_config": "flows.retraining",
    "create_quant_retrain_model": "flows.retraining",
    "decompose_network": "flows.decomposition",
    "load_converted": "flows.converted_files",
    "save_converted": "flows.converted_files",
    "deploy_to_qdq": "export.qdq",
    "restore_compressed_retrain_model": "flows.compression",
    "restore_prune_retrain_model": "flows.pruning",
    "save_compressed_retrain_model": "flows.compression",
    "save_prune_retrain_model": "flows.pruning",
    "quantize": "flows.low_bit",
    "save_distill_model": "flows.distillation",
    "quantize_model": "flows.post_training",
    "quantize_preprocess": "flows.balancing",
    "restore_quant_retrain_model": "flows.retraining",
    "save_quant_retrain_model": "flows.retraining",
    "save_model": "flows.post_training",
    **dict.fromkeys(_PRESETS, "config.presets"),
}

__version__ = "0.1.0"
__all__ = [
    "FP8_OFMR_CFG",
    "HIFP8_CAST_CFG",
    "HIFP8_OFMR_CFG",
    "HIFP8_QUANTILE_CFG",
    "HIFP8_SMOOTHQUANT_CFG",
    "INT4_AWQ_WEIGHT_QUANT_CFG",
    "INT4_GPTQ_WEIGHT_QUANT_CFG",
    "INT8_MINMAX_WEIGHT_QUANT_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "MXFP4_AWQ_WEIGHT_QUANT_CFG",
    "MXFP8_QUANT_CFG",
    "AmctError",
    "BaseQuantizeModule",
    "DeploySession",
    "ModelEvaluator",
    "QuantCalibrationOp",
    "accuracy_based_auto_calibration",
    "algorithm_register",
    "auto_channel_prune_search",
    "auto_decomposition",
    "calibrate_blocks",
    "convert",
    "convert_qat_model",
    "create_compressed_retrain_model",
    "create_distill_config",
    "create_distill_model",
    "create_prune_retrain_model",
    "create_quant_cali_config",
    "create_quant_cali_model",
    "create_quant_config",
    "create_quant_retrain_config",
    "create_quant_retrain_model",
    "decompose_network",
    "deploy_to_qdq",
    "distill",
    "load_converted",
    "quantize",
    "quantize_model",
    "quantize_preprocess",
    "restore_compressed_retrain_model",
    "restore_prune_retrain_model",
    "restore_quant_retrain_model",
    "save_compressed_retrain_model",
    "save_converted",
    "save_distill_model",
    "save_model",
    "save_prune_retrain_model",
    "save_quant_retrain_model",
]


def __getattr__(name: str) -> Any:
    if name == "distill":  # the package of that name, which can be called
        return importlib.import_module(f"{__name__}.distill")
    if name not in _HOMES:
        from amct_pytorch.errors import did_you_mean

        hint = did_you_mean(name, __all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name not in _PRESETS:  # of these every user gets a dict of their own
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
