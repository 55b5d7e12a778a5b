"""Splitting one convolution into a few small ones: ranks, factors, files, modules."""
