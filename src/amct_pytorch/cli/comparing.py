"""What `amct compare` measures."""

from __future__ import annotations

import statistics
from typing import Any

from tqdm import tqdm

from amct_pytorch.cli.data import Data
from amct_pytorch.cli.measure import OutputAgreement
from amct_pytorch.cli.models import Runner
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.export.runtime import interleaved_latency


def compared(
    reference: Runner, other: Runner, data: Data, rounds: int
) -> tuple[list[OutputAgreement], dict[str, Any]]:
    """Two models on the same data.

    Args:
        reference: the float model.
        other: the quantized one.
        data: for both.
        rounds: timed calls of each; 0: none.

    Returns:
        The agreement of each output, and the document for JSON.

    Raises:
        AmctError: a model cannot be run on the data, or they have other outputs.
    """
    outputs: list[OutputAgreement] = []
    for batch in tqdm(data, "comparing", len(data), leave=False, unit="batch", disable=None):
        meant = reference.run(None, _feeds(reference, batch))
        got = other.run(None, _feeds(other, batch))
        if not outputs:
            _check_outputs(reference, other, meant, got)
            outputs = [OutputAgreement(name) for name in reference.output_names]
        for one, a, b in zip(outputs, meant, got, strict=True):
            one.add(a, b)
    times = _latency(reference, other, data, rounds)
    return outputs, {
        "samples": data.samples,
        "outputs": [one.as_dict() for one in outputs],
        "models": {
            "float": _about(reference, times.get("float")),
            "quant": _about(other, times.get("quant")),
        },
        "speed_up": times.get("speed_up"),
    }


def _feeds(model: Runner, batch: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip([spec.name for spec in model.inputs], batch, strict=True))


def _check_outputs(reference: Runner, other: Runner, meant: list[Any], got: list[Any]) -> None:
    if len(meant) != len(got):
        raise ArgumentValueError(
            f"FLOAT has {len(meant)} outputs ({', '.join(reference.output_names)}), QUANT "
            f"{len(got)} ({', '.join(other.output_names)})"
        )


def _latency(reference: Runner, other: Runner, data: Data, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, and the median ratio of two calls that follow each other."""
    if not rounds:
        return {}
    batch = data.batch(0)
    one = batch if data.fixed else tuple(array[:1] for array in batch)
    models: dict[str, Any] = {"float": reference, "quant": other}
    feeds = {name: _feeds(model, one) for name, model in models.items()}
    times = interleaved_latency(models, feeds, rounds, warm_up=3)
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["float"], times["quant"], strict=True)]
    return {**found, "speed_up": statistics.median(ratios)}


def _about(model: Runner, milliseconds: float | None) -> dict[str, Any]:
    return {
        "model": "",
        "kind": model.kind,
        "runs_in": model.runtime,
        "bytes": model.bytes,
        "milliseconds": milliseconds,
    }
