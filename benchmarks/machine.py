"""What the figures depend on and a reader has to know: the CPU and the settings."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# One thread for every contender, whatever it would choose itself, and threads that wait asleep.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def describe() -> dict[str, object]:
    """CPU model, its int8-related instructions, cores, and the settings of every process."""
    model, flags = platform.processor() or platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            flags = value
            break
    return {
        "cpu": model,
        "int8_instructions": [flag for flag in _INT8_FLAGS if flag in flags.split()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "settings": {**SETTINGS, "cores a process may use": "1"},
    }


def has_exact_u8s8(instructions: list[str]) -> bool:
    """Whether u8 x s8 products are summed without clipping (VNNI on x86; always elsewhere)."""
    x86 = "avx2" in instructions
    return not x86 or any("vnni" in flag for flag in instructions)


def hold_to_one_core() -> None:
    """Keep this process, and the threads it will start, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
