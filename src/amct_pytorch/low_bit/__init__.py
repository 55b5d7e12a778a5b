"""Layers with weights in few bits: calibration modules, deploy modules, their kernels."""
