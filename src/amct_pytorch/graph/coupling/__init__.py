"""Which channels of a network hang together (DepGraph, arXiv 2301.12900)."""
