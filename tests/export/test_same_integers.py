"""Fake-quant model and deploy session compute the same integers, layer by layer, bit for bit."""

import numpy as np
import onnx
import pytest
from export_networks import NETWORKS, case, tensors

from amct_pytorch.export.deploy import build_deploy
from amct_pytorch.export.deploy_session import DeploySession
from amct_pytorch.export.fake_quant import build_fake_quant
from amct_pytorch.export.onnx_file import save_onnx


@pytest.mark.parametrize("kernels", [None, ["float32"], ["split"], ["u8u8"]], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_fake_quant_is_the_deploy_arithmetic(tmp_path, network, symmetric, kernels):
    c = case(network, symmetric=symmetric)
    save_onnx(build_deploy(c.model, c.factors), tmp_path / "deploy.onnx")
    fake = build_fake_quant(c.model, c.factors)
    session = DeploySession(tmp_path / "deploy.onnx", kernels=kernels)
    assert list(session.layers) == list(c.factors)
    names = [name for pair in session.layers.values() for name in pair]
    outputs = [o.name for o in session.get_outputs()]
    found = dict(zip(names + outputs, session.run(names + outputs, {"x": c.x}), strict=True))
    rounds = [f"{layer}.round.output0" for layer in session.layers]
    simulated = tensors(fake, [*rounds, *names[::2], *outputs], {"x": c.x})
    for layer, (entering, leaving) in session.layers.items():
        assert found[entering].dtype == np.int8
        assert found[leaving].dtype == np.int32
        assert np.array_equal(found[entering], simulated[entering]), layer
        assert np.array_equal(found[leaving], simulated[f"{layer}.round.output0"]), layer
    for name in outputs:
        np.testing.assert_allclose(found[name], simulated[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_fake_quant_is_stock_onnx_and_near_float(network):
    c = case(network)
    fake = build_fake_quant(c.model, c.factors)
    onnx.checker.check_model(fake, full_check=True)
    assert fake.ir_version == 8
    outputs = [o.name for o in fake.graph.output]
    real, found = (tensors(m, outputs, {"x": c.x}) for m in (c.model, fake))
    for name in outputs:
        noise = np.square(real[name] - found[name]).sum() / np.square(real[name]).sum()
        # Two or three 8-bit layers in a row stay well below a thousandth of the signal's power.
        assert noise < 1e-3


def test_the_round_keeps_the_runtime_from_changing_integers():
    """Without it ONNX Runtime folds the scale into the weights: see formats, fake-quant."""
    c = case("conv_padding")
    fake = build_fake_quant(c.model, c.factors)
    makers = {n.output[0]: n for n in fake.graph.node}
    for layer in c.factors:
        multiply = next(n for n in fake.graph.node if n.name == f"{layer}.dequant")
        assert makers[multiply.input[0]].op_type == "Round"
