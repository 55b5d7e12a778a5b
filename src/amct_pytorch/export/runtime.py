"""ONNX Runtime on a CPU: sessions whose int8 results are right, and latencies side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from amct_pytorch.export.integer_kernels import exact_kernels


class Runs(Protocol):
    """An ONNX Runtime session, or anything that runs like one."""

    def get_inputs(self) -> Sequence[Any]:
        """Inputs, each with a name."""

    def run(self, output_names: Any, feeds: Any) -> Sequence[Any]:
        """Outputs for the feeds."""


def fast_kernels_clip() -> bool:
    """Whether ONNX Runtime's fast u8 x s8 kernels give wrong sums on this machine (tried once).

    The kernels of fused layers are those of MatMulInteger; ConvInteger may have others, exact
    ones, on the same machine.
    """
    return any("u8s8" not in exact_kernels(op_type) for op_type in ("MatMul", "Conv"))


def cpu_options(threads: int = 1, exact_int8: bool = True) -> ort.SessionOptions:
    """Options of a session on `threads` cores.

    `exact_int8` matters only on x86 CPUs without the VNNI instructions: there the fast kernel for
    unsigned activations times signed weights adds two products in 16 bits and clips the sum, which
    ruins the result in silence (measured on EfficientNet-Lite0: 10 dB instead of 18.5). The
    session entry below makes ONNX Runtime use kernels that do not clip; where the fast ones are
    exact it would only cost speed (half of it on a CPU with VNNI), so it is left out there.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact_int8 and fast_kernels_clip():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def cpu_session(
    file: str | Path, threads: int = 1, exact_int8: bool = True
) -> ort.InferenceSession:
    """A session for an ONNX file, with `cpu_options`."""
    options = cpu_options(threads, exact_int8)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def interleaved_latency(
    sessions: Mapping[str, Runs],
    feeds: Mapping[str, Mapping[str, np.ndarray]],
    rounds: int = 60,
    warm_up: int = 8,
) -> dict[str, list[float]]:
    """Milliseconds of every call, the sessions taking turns so that all see the same machine.

    Args:
        sessions: by name.
        feeds: of each, by the same names.
        rounds: calls of each that are timed.
        warm_up: calls of each before that.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(warm_up + rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
