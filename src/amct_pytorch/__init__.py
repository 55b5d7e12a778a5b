"""Model compression for PyTorch behind the AMCT interface."""

from amct_pytorch.flows.post_training import create_quant_config, quantize_model, save_model

__all__ = ["create_quant_config", "quantize_model", "save_model"]
