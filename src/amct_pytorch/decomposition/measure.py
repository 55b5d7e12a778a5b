"""What a run of the model tells about its layers: sizes, odd uses, and the time they take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amct_pytorch.decomposition.geometry import Sizes
from amct_pytorch.graph.look import copy_model
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import OpCall, Operand, Trace, trace_forward

# Rounds of one layer against its pieces, taking turns; the fastest of each counts, which a busy
# neighbour disturbs least.
WARM_UP = 2
ROUNDS = 10
LEAST_ROUNDS = 3
SECONDS = 2.0


@dataclass(frozen=True)
class Seen:
    """How a layer was used in one run.

    Attributes:
        reason: why the layer cannot be exchanged; None if it can.
        input_shape: of the tensor that came in; empty if that was not seen.
        sizes: height and width of its input and output; zeros if they were not seen.
    """

    reason: str | None
    input_shape: tuple[int, ...] = ()
    sizes: Sizes = ((0, 0), (0, 0))


def see_layers(
    model: nn.Module, inputs: ModelInputs, convs: Mapping[str, nn.Conv2d]
) -> dict[str, Seen]:
    """Runs a copy of the model once and reports how each layer was used.

    Raises:
        ModelError: the model cannot be copied or run.
    """
    trace = trace_forward(copy_model(model), inputs)
    return {name: _seen(name, conv, trace) for name, conv in convs.items()}


def _seen(name: str, conv: nn.Conv2d, trace: Trace) -> Seen:
    value = trace.parameter_values.get(f"{name}.weight" if name else "weight")
    readers = [] if value is None else trace.consumers(value)
    runs = trace.runs.get(name, 0)
    if runs == 0 and readers:
        return Seen(f"its forward did not run; {readers[0].function} read its weight directly")
    if runs == 0:
        return Seen("it did not run on input_data")
    if runs > 1:
        return Seen(f"reused layer: it ran {runs} times in one forward")
    calls = [op for op in readers if op.function == "conv2d" and op.scopes[-1:] == (name,)]
    others = [op for op in readers if op not in calls]
    if others:
        return Seen(f"reused layer: its weight is also read by {others[0].function}")
    if len(calls) != 1:
        return Seen(f"its forward called conv2d with its weight {len(calls)} times, not once")
    return _as_called(conv, calls[0])


def _as_called(conv: nn.Conv2d, call: OpCall) -> Seen:
    """The sizes of one call; torch pads for itself where the padding mode is not zeros."""
    x, weight = call.argument(0, "input"), call.argument(1, "weight")
    assert isinstance(x, Operand)
    assert isinstance(weight, Operand)
    settings = [
        call.argument(place, key)
        for place, key in ((3, "stride"), (4, "padding"), (5, "dilation"), (6, "groups"))
    ]
    settings = [
        otherwise if value is None else value
        for value, otherwise in zip(settings, (1, 0, 1, 1), strict=True)
    ]
    shapes = [torch.empty(operand.shape, device="meta") for operand in (x, weight)]
    after = nn.functional.conv2d(shapes[0], shapes[1], None, *settings).shape
    height, width = x.shape[-2:]
    if conv.padding_mode != "zeros":
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        height, width = height - top - bottom, width - left - right
    return Seen(None, (*x.shape[:-2], height, width), ((height, width), (after[-2], after[-1])))


def measure(
    conv: nn.Conv2d, pieces: nn.Sequential, input_shape: tuple[int, ...]
) -> tuple[float, float]:
    """Milliseconds of one forward of a layer and of its pieces, on the layer's device.

    Hooks do not run. The input is random; the global random state stays as it is.
    """
    device = conv.weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(input_shape, generator=generator).to(device, conv.weight.dtype)
    best = [float("inf"), float("inf")]
    began = time.perf_counter()
    with torch.no_grad():
        for number in range(WARM_UP + ROUNDS):
            taken = (_timed((conv,), x), _timed(tuple(pieces), x))
            if number >= WARM_UP:
                best = [min(old, new) for old, new in zip(best, taken, strict=True)]
                enough = number - WARM_UP + 1 >= LEAST_ROUNDS
                if enough and time.perf_counter() - began > SECONDS:
                    break
    return best[0] * 1e3, best[1] * 1e3


def _timed(row: tuple[nn.Module, ...], x: Tensor) -> float:
    # With one thread on the CPU its own time is the latency, whatever else runs on the machine.
    alone = x.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    _wait(x.device)
    began = clock()
    for module in row:
        x = module.forward(x)
    _wait(x.device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
