import pytest
import torch
from calibrating_layers import GptqLayer, MinMaxLayer, layers, network, seen_inputs

from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ModelError,
)
from amct_pytorch.flows.block_calibration import calibrate_blocks
from amct_pytorch.low_bit.base_module import BaseQuantizeModule


def tokens(batches, seed=0, shape=(2, 30, 12)):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=g) / 2
    return [torch.randn(*shape, generator=g) @ mixing for _ in range(batches)]


# Rounding of sums that are cut differently: batches alone, and one after another in a forward.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_untouched(model):
    for module in model.modules():
        own = 1 if isinstance(module, BaseQuantizeModule) else 0
        assert len(module._forward_hooks) == own
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_each_gptq_layer_sees_what_it_gets_in_the_end(batches, returns_tuple):
    inputs = tokens(batches)
    _, model = network(GptqLayer, batches, returns_tuple=returns_tuple)
    calibrate_blocks(model, inputs)
    final = seen_inputs(model, inputs, layers(model))
    for name, layer in layers(model).items():
        assert layer.calibrated
        torch.testing.assert_close(torch.cat(layer.inputs), final[name], **CLOSE)


def test_other_layers_see_quantized_blocks_and_float_neighbours():
    inputs = tokens(2)
    plain, model = network(MinMaxLayer, 2)
    calibrate_blocks(model, inputs)
    final = seen_inputs(model, inputs, layers(model))
    floating = seen_inputs(plain, inputs, layers(model))
    for name, layer in layers(model).items():
        seen = torch.cat(layer.inputs)
        if not name.endswith("down"):
            torch.testing.assert_close(seen, final[name], **CLOSE)
        # Only the first block's layers see the float model's inputs.
        same = torch.allclose(seen, floating[name], **CLOSE)
        assert same == name.startswith("blocks.0.")


@pytest.mark.parametrize("batches", [1, 3])
def test_references_are_the_float_models_inputs(batches):
    inputs = tokens(batches)
    plain, model = network(GptqLayer, batches)
    calibrate_blocks(model, inputs)
    floating = seen_inputs(plain, inputs, layers(model))
    for name, layer in layers(model).items():
        if name == "head":  # behind the blocks
            assert layer.references == [None] * batches
        else:
            torch.testing.assert_close(torch.cat(layer.references), floating[name], **CLOSE)
        assert layer.reference is None


def output_error(model, plain, inputs):
    with torch.no_grad():
        return sum(float((model(x) - plain(x)).square().sum()) for x in inputs)


def test_following_the_float_model_brings_the_output_nearer():
    inputs = tokens(4)
    errors = {}
    for follow in (True, False):
        errors[follow] = 0.0
        for seed in range(5):
            plain, model = network(GptqLayer, 4, skip=("first", "head"), seed=seed, depth=5)
            calibrate_blocks(model, inputs, follow_float=follow)
            errors[follow] += output_error(model, plain, inputs)
    assert errors[True] < errors[False]


def test_without_following_there_are_no_references():
    inputs = tokens(2)
    _, model = network(GptqLayer, 2)
    calibrate_blocks(model, inputs, follow_float=False)
    for layer in layers(model).values():
        assert layer.calibrated
        assert layer.references == [None, None]


def test_layers_on_one_input_share_its_statistics():
    inputs = tokens(2)
    _, model = network(GptqLayer, 2)
    block = model.blocks[0]
    with torch.no_grad():
        model(inputs[0])
        gate, up, down = (m._calibration.shared for m in (block.gate, block.up, block.down))
        assert gate is up
        assert gate is not down
        assert gate.hessian.tokens == 60
        model(inputs[1])
    assert gate.tokens == 120


def test_padding_in_a_mask_does_not_count():
    x = tokens(1)[0]
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, 20:] = 0
    x[1, 20:] = 1e3
    _, masked = network(GptqLayer, 1)
    calibrate_blocks(masked, [{"x": x, "attention_mask": mask}], follow_float=False)
    # The network has no mixing of tokens: leaving the padding away is the same.
    _, cut = network(GptqLayer, 1)
    calibrate_blocks(cut, [x[mask != 0][None]], follow_float=False)
    for name, layer in layers(masked).items():
        assert torch.equal(layer.result.codes, layers(cut)[name].result.codes), name


@pytest.mark.parametrize("blocks", ["blocks", ["blocks.0", "blocks.1", "blocks.2"]])
def test_blocks_can_be_named(blocks):
    inputs = tokens(1)
    _, named = network(GptqLayer, 1)
    _, found = network(GptqLayer, 1)
    calibrate_blocks(named, inputs, blocks)
    calibrate_blocks(found, inputs)
    for name, layer in layers(named).items():
        assert torch.equal(layer.result.codes, layers(found)[name].result.codes)


def test_the_model_is_left_in_its_mode_and_without_hooks():
    _, model = network(GptqLayer, 2)
    model.train()
    model.blocks[1].eval()
    calibrate_blocks(model, tokens(2))
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    assert_untouched(model)


def test_an_error_in_the_model_leaves_no_hooks_either():
    _, model = network(GptqLayer, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        calibrate_blocks(model, [torch.zeros(2, 7)])
    assert_untouched(model)


class TestRefusals:
    def test_no_module(self):
        with pytest.raises(ArgumentTypeError, match="model is a str"):
            calibrate_blocks("model", tokens(1))

    def test_no_batch(self):
        with pytest.raises(ArgumentValueError, match="inputs has no batch"):
            calibrate_blocks(network(GptqLayer, 1)[1], [])

    def test_no_layer(self):
        with pytest.raises(ArgumentValueError, match="no layer to calibrate"):
            calibrate_blocks(network(GptqLayer, 1)[0], tokens(1))

    def test_too_few_batches(self):
        with pytest.raises(CalibrationError, match=r"blocks\.0\.gate, .*by 2 batches"):
            calibrate_blocks(network(GptqLayer, 3)[1], tokens(2))

    def test_unknown_block(self):
        with pytest.raises(ArgumentValueError, match="did you mean 'blocks'"):
            calibrate_blocks(network(GptqLayer, 1)[1], tokens(1), "block")

    def test_no_container(self):
        with pytest.raises(ArgumentValueError, match="'first', a Linear"):
            calibrate_blocks(network(GptqLayer, 1)[1], tokens(1), "first")

    def test_one_block_twice(self):
        with pytest.raises(ArgumentValueError, match="just once"):
            calibrate_blocks(network(GptqLayer, 1)[1], tokens(1), ["blocks.0", "blocks.0"])

    def test_a_block_that_is_not_called(self):
        _, model = network(GptqLayer, 1)
        model.blocks[0].spare = torch.nn.Sequential(torch.nn.Identity())
        with pytest.raises(ModelError, match=r"blocks\.0\.spare: the model's forward"):
            calibrate_blocks(model, tokens(1), ["blocks.0.spare"])

    def test_blocks_in_another_order(self):
        _, model = network(GptqLayer, 1)
        with pytest.raises(ModelError, match=r"blocks\.1: the model's forward calls blocks\.0 bef"):
            calibrate_blocks(model, tokens(1), ["blocks.1", "blocks.0"])

    @pytest.mark.parametrize("inputs", [torch.ones(2, 3), "abc", None, {"x": torch.ones(1)}])
    def test_inputs_that_are_no_batches(self, inputs):
        with pytest.raises(ArgumentTypeError, match=r"inputs is a .*; allowed is a list"):
            calibrate_blocks(network(GptqLayer, 1)[1], inputs)
