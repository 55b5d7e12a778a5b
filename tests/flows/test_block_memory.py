"""Peak memory of `calibrate_blocks` beside the model."""

import pytest
import torch
from calibrating_layers import network
from live_tensors import LiveTensors

from amct_pytorch.flows.block_calibration import calibrate_blocks
from amct_pytorch.low_bit.gptq import GptqLinear
from amct_pytorch.low_bit.minmax import MinMaxLinear

WIDTH, BATCHES, SHAPE = 32, 64, (2, 64, 32)
# What runs into a block, for all batches.
INPUTS = BATCHES * 2 * 64 * WIDTH * 4
# The second moments of its layers' inputs, summed up in float64.
HESSIANS = 8 * (WIDTH**2 + (2 * WIDTH) ** 2)


class Gptq(GptqLinear):
    """An algorithm of its own, so that the sizes of the table of combinations do not matter."""


class MinMax(MinMaxLinear):
    pass


def peak(layer, **options):
    _, model = network(layer, BATCHES, width=WIDTH)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SHAPE, generator=generator) for _ in range(BATCHES)]
    with LiveTensors() as live:
        calibrate_blocks(model, inputs, **options)
    return live.peak


def test_what_is_counted():
    with LiveTensors() as live:
        x = torch.ones(1000)
        view = x[:10].add_(1)
        y = x.double()
        assert live.bytes == 12_000
        del x
        assert live.bytes == 12_000  # held by the view
        del view, y
    assert (live.bytes, live.peak) == (0, 12_000)


@pytest.mark.parametrize("layer", [Gptq, MinMax])
def test_one_and_a_half_times_a_blocks_inputs_and_hessians(layer):
    assert peak(layer, follow_float=False) <= 1.5 * (INPUTS + HESSIANS)


def test_following_the_float_model_takes_its_inputs_and_moments_as_well():
    # Two inputs of each block, and beside the second moments those of the difference, float32.
    assert peak(Gptq) <= 1.5 * (2 * INPUTS + 1.5 * HESSIANS)


def test_nothing_of_a_block_stays_but_its_quantized_layers():
    peaks, left = [], []
    for depth in (2, 4):
        _, model = network(Gptq, 4, width=WIDTH, depth=depth)
        inputs = [torch.ones(SHAPE).cumsum(0) for _ in range(4)]
        with LiveTensors() as live:
            calibrate_blocks(model, inputs)
        peaks.append(live.peak)
        left.append(live.bytes)
    # Three layers of 2 · WIDTH² weights in each block: codes unpacked for simulation in int8,
    # packed in half of that, and some scales.
    assert left[1] - left[0] <= 2 * 6 * WIDTH**2 * 2
    assert peaks[1] - peaks[0] <= left[1] - left[0]
