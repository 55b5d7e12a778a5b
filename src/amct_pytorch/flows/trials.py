"""The trials of a search for a config, in a file that lets the same search go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amct_pytorch.config.models import CalibrationConfig
from amct_pytorch.files import write_whole
from amct_pytorch.logs import logger
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.record.fingerprint import fingerprint


class Trials:
    """What was tried, and what came out.

    An earlier run's metrics count if it was the same search: the same model, config and
    calibration data, and the same metric of the float model, which other data to evaluate on, or
    another way to do it, would hardly give.

    Args:
        path: the file; an earlier run may have left it.
        identity: of model, config and calibration data; see `identity_of`.
        float_metric: the evaluator's, of the float model.
    """

    def __init__(self, path: Path, identity: str, float_metric: Any) -> None:
        self._path, self._identity, self._float_metric = path, identity, float_metric
        self._own: list[dict[str, Any]] = []
        self._earlier = self._read()

    def done(self, rolled_back: list[str]) -> dict[str, Any] | None:
        """The trial of this run with these layers in float."""
        return _of(self._own, rolled_back)

    def earlier(self, rolled_back: list[str]) -> dict[str, Any] | None:
        """That of an earlier run, whose metric is known; its verdict may have been another."""
        return _of(self._earlier, rolled_back)

    def add(self, rolled_back: list[str], metric: Any, accepted: bool, loss: float) -> None:
        """Keeps a trial; the file has it when this returns.

        Args:
            rolled_back: the layers in float.
            metric: the evaluator's.
            accepted: whether it is good enough.
            loss: what was lost.
        """
        exact = survives_json(metric)
        self._own.append(
            {
                "rolled_back": rolled_back,
                "metric": metric if exact else repr(metric),
                "exact": exact,
                "accepted": accepted,
                "loss": loss,
            }
        )
        # This run, too, may be interrupted before it has come to what is known already.
        left = [trial for trial in self._earlier if self.done(trial["rolled_back"]) is None]
        metric = self._float_metric
        content = {
            "float_metric": metric if survives_json(metric) else repr(metric),
            "factors": self._identity,
            "trials": self._own,
        }
        if left:
            content["earlier"] = left
        text = json.dumps(content, indent=4)
        write_whole(self._path, text.encode(), what="save_dir", announce=False)

    def _read(self) -> list[dict[str, Any]]:
        """The trials of an earlier run of the same search; none where it was another."""
        try:
            found = json.loads(self._path.read_text())
            if found["factors"] != self._identity:
                return []
            trials = [
                trial
                for trial in (*found["trials"], *found.get("earlier", ()))
                if isinstance(trial["rolled_back"], list)
                and trial["exact"] is True
                and "metric" in trial
            ]
            before = found["float_metric"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if survives_json(self._float_metric) and before != self._float_metric:
            logger.warning(
                "%s: an earlier search found %s for the float model, which now has %s; it was "
                "evaluated otherwise, so its %d trials are run again",
                self._path,
                before,
                self._float_metric,
                len(trials),
            )
            return []
        return trials


def identity_of(
    model: nn.Module, config: CalibrationConfig, factors: Mapping[str, LayerFactors]
) -> str:
    """SHA-256 over a model's tensors, a config, and the factors that calibration data gave."""
    digest = hashlib.sha256(fingerprint(factors).encode())
    digest.update(config.model_dump_json().encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"\0{name}\0{values.dtype}\0{tuple(tensor.shape)}\0".encode())
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def survives_json(value: Any) -> bool:
    """Whether a value comes out of a JSON file as it went in."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _of(trials: list[dict[str, Any]], rolled_back: list[str]) -> dict[str, Any] | None:
    return next((trial for trial in trials if trial["rolled_back"] == rolled_back), None)
