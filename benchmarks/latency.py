"""Latency of an int8 ONNX file against the float one: one image, the two taking turns.

Run by the harness in a process of its own: `latency.py float.onnx int8.onnx inputs.npz`.
Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys

import numpy as np
from ort_sessions import cpu_session, interleaved_latency


def measure(float_file: str, int8_file: str, image: np.ndarray) -> dict[str, float]:
    """Medians in ms, and the median over the rounds of float / int8."""
    sessions = {
        "float": cpu_session(float_file),
        "int8_clipping": cpu_session(int8_file, exact_int8=False),
    }
    # ONNX Runtime 1.32 cannot prepare its exact kernels where layers share a zero point tensor.
    with contextlib.suppress(Exception):
        sessions["int8"] = cpu_session(int8_file)
    times = interleaved_latency(sessions, image)
    result = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    for name in sessions.keys() - {"float"}:
        pairs = zip(times["float"], times[name], strict=True)
        result[f"{name}_speed_up"] = statistics.median(a / b for a, b in pairs)
    return result


if __name__ == "__main__":
    with np.load(sys.argv[3]) as arrays:
        first = arrays["calibration"][:1]
    print(json.dumps(measure(sys.argv[1], sys.argv[2], first)))
