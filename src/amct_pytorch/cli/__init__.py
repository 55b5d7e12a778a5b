"""The `amct` command: one file a subcommand, thin over the flows.

Nothing here imports torch, onnx or onnxruntime before a subcommand runs, so that help and
completion come at once.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the `amct` script and of ``python -m amct_pytorch``."""
    from amct_pytorch.cli.root import amct

    amct(prog_name="amct")
