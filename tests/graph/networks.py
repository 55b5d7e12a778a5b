"""Every case: one small network per structure."""

from graph import special_layers, structures
from graph.cases import CASES, Case, Net, conv, float_output, fresh, image, norm

__all__ = [
    "CASES",
    "Case",
    "Net",
    "conv",
    "float_output",
    "fresh",
    "image",
    "norm",
    "special_layers",
    "structures",
]
