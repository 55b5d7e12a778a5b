"""The operator that calibrates KV caches inside a user's own network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.config.kv_cache import operator_params
from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, CalibrationError, shown
from amct_pytorch.files import PathLike, check_writable
from amct_pytorch.logs import start_logging
from amct_pytorch.observers.kv_cache import KvObserver
from amct_pytorch.record.kv_cache import add_kv_factors, read_kv_factors

METHOD = "kv_cache_quant"


class QuantCalibrationOp(nn.Module):
    """Observes tensors that pass through it, then writes their int8 factors to a record file.

    Each name has a count of its own: when `batch_num` tensors of that name have passed, its
    factors are added to the record; later ones are let through unseen. One operator may serve
    many names, and many operators and processes one record.

    Example::

        class Attention(nn.Module):
            def __init__(self):
                ...
                self.calibrate = QuantCalibrationOp("record.txt", {"batch_num": 8})

            def forward(self, x):
                key = self.calibrate("layer0.key", self.k_proj(x))
                value = self.calibrate("layer0.value", self.v_proj(x))

    Args:
        record_file: record to add to; it need not exist.
        quant_algo_params: None for all defaults, or a dict of `act_algo` ("ifmr" or "hfmg"),
            `num_bits` (8), `with_offset` (True), `asymmetric` (beats `with_offset`),
            `batch_num` (1), `quant_granularity` (0, "0", "per_tensor"; or 1, "1",
            "per_channel": along the last axis); for ifmr `max_percentile`, `min_percentile`
            (0.999999), `search_range` ([0.7, 1.3]), `search_step` (0.01); for hfmg
            `num_of_bins` (4096).
        quant_method: "kv_cache_quant".

    Raises:
        ArgumentTypeError, ArgumentValueError: naming the key, what was found and is allowed.
        FileAccessError: the record cannot be written.
        RecordError: there is a record already, and it is not sound.
    """

    def __init__(
        self,
        record_file: PathLike,
        quant_algo_params: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        super().__init__()
        if quant_method != METHOD:
            raise ArgumentValueError(f"quant_method is {shown(quant_method)}; allowed: {METHOD!r}")
        self._params, self.batch_num, self._asymmetric = operator_params(quant_algo_params)
        self.record_file = check_writable(record_file, "record_file")
        if self.record_file.exists():
            read_kv_factors(self.record_file)  # a record that could not be added to is told now
        self._observers: dict[str, KvObserver] = {}
        self._batches: dict[str, int] = {}

    def extra_repr(self) -> str:
        """Where factors go, and after how many batches."""
        return f"record_file={str(self.record_file)!r}, batch_num={self.batch_num}"

    @property
    def pending(self) -> tuple[str, ...]:
        """Names that were seen and whose factors have not been written yet."""
        return tuple(name for name, n in self._batches.items() if n < self.batch_num)

    def forward(self, layer_name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x`, unchanged.

        Args:
            layer_name: under which its factors are recorded.
            x: floating tensor [..., channels].
            mask: [...], 0 where `x` is padding that the statistics should not see; None: no
                padding.

        Raises:
            ArgumentTypeError: `layer_name` is no name.
            CalibrationError: `x` holds NaN or infinity, or does not fit earlier ones.
            RecordError, FileAccessError: the record cannot be added to; the next call with
                this name tries again.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return x
        if not isinstance(layer_name, str) or not layer_name:
            raise ArgumentTypeError(f"layer_name is {shown(layer_name)}; allowed: a name")
        seen = self._batches.get(layer_name, 0)
        if seen >= self.batch_num:
            return x
        if layer_name not in self._observers:
            observer = KvObserver(layer_name, self._params, asymmetric=self._asymmetric)
            self._observers[layer_name] = observer
        observer = self._observers[layer_name]
        observer.update(x, mask)
        if seen + 1 == self.batch_num:
            if not observer.seen:
                raise CalibrationError(f"no value of {layer_name!r} was observed: all is padding")
            start_logging(to_file=True)
            add_kv_factors(self.record_file, {layer_name: observer.factors()})
            del self._observers[layer_name]
        self._batches[layer_name] = seen + 1
        return x
