"""The documented import path of tensor decomposition."""

from amct_pytorch.flows.decomposition import auto_decomposition, decompose_network

__all__ = ["auto_decomposition", "decompose_network"]
