import pytest
import torch
from gptq_reference import gptq_by_columns, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st

from amct_pytorch.algorithms.gptq import GptqSettings, solve_gptq
from amct_pytorch.algorithms.hessian import Hessian
from amct_pytorch.errors import ArgumentValueError
from amct_pytorch.formats import FORMATS, Granularity, dequantize, fake_quantize, params_of

CHANNEL, TENSOR = Granularity("channel"), Granularity("tensor")
INT4, INT8 = FORMATS["int4"], FORMATS["int8"]
PLAIN = GptqSettings(act_order=False, static_groups=True, sweeps=0)


def groups_of(size):
    return Granularity("group", size)


def layer(outputs=24, inputs=96, seed=0, tokens=None):
    """A weight and the Hessian of correlated inputs of very different size."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=g) / inputs**0.5
    sizes = torch.rand(inputs, generator=g).mul(3).exp()
    x = (torch.randn(tokens or 4 * inputs, inputs, generator=g) @ mixing) * sizes
    return torch.randn(outputs, inputs, generator=g) * 0.02, x.T @ x / len(x)


def values(result, fmt, granularity):
    return dequantize(result.codes, result.scale, result.offset, fmt, granularity)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL, groups_of(32), groups_of(40)])
def test_agrees_with_the_definition(granularity, symmetric):
    weight, hessian = layer()
    result = solve_gptq(weight, hessian, INT4, granularity, symmetric=symmetric, settings=PLAIN)
    scale = granularity.expand(result.scale, weight.shape).double()
    offset = 0 if symmetric else granularity.expand(result.offset, weight.shape)

    def snap(column, k):
        o = offset if symmetric else offset[:, k]
        q = (torch.round(column / scale[:, k]) + o).clamp(-8, 7)
        return (q - o) * scale[:, k]

    expected = gptq_by_columns(weight, hessian, PLAIN.damping, snap)
    # No target of this layer lies within float32 rounding of a tie.
    torch.testing.assert_close(values(result, INT4, granularity).double(), expected)


def test_group_scales_are_taken_after_feedback():
    weight, hessian = layer()
    granularity = groups_of(32)
    dynamic = GptqSettings(act_order=False, static_groups=False, sweeps=0)
    result = solve_gptq(weight, hessian, INT4, granularity, settings=dynamic)
    static = solve_gptq(weight, hessian, INT4, granularity, settings=PLAIN)
    scale = granularity.expand(result.scale, weight.shape).double()

    def snap(column, k):
        return torch.round(column / scale[:, k]).clamp(-8, 7) * scale[:, k]

    expected = gptq_by_columns(weight, hessian, dynamic.damping, snap)
    torch.testing.assert_close(values(result, INT4, granularity).double(), expected)
    # Nothing precedes the first group; what precedes the others has changed them.
    assert torch.equal(result.scale[:, 0], static.scale[:, 0])
    assert not torch.equal(result.scale[:, 1:], static.scale[:, 1:])


@pytest.mark.parametrize("sweeps", [0, 1])
def test_act_order_puts_columns_back(sweeps):
    weight, hessian = layer()
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    order = GptqSettings(sweeps=0)
    plain = solve_gptq(weight, hessian, INT4, CHANNEL, settings=order)
    shuffled = solve_gptq(
        weight[:, shuffle], hessian[shuffle][:, shuffle], INT4, CHANNEL, settings=order
    )
    assert torch.equal(plain.codes[:, shuffle], shuffled.codes)


@pytest.mark.parametrize("static_groups", [True, False])
def test_act_order_rounds_large_inputs_first(static_groups):
    weight, hessian = layer()
    by_size = hessian.diagonal().argsort(descending=True)
    chosen = GptqSettings(static_groups=static_groups, sweeps=0)
    result = solve_gptq(weight, hessian, INT4, CHANNEL, settings=chosen)
    sorted_by_hand = solve_gptq(
        weight[:, by_size],
        hessian[by_size][:, by_size],
        INT4,
        CHANNEL,
        settings=GptqSettings(act_order=False, static_groups=static_groups, sweeps=0),
    )
    assert torch.equal(result.codes[:, by_size], sorted_by_hand.codes)


ALLOWED = [
    *((name, g, True) for name in ("int4", "int8") for g in (TENSOR, CHANNEL, groups_of(32))),
    *((name, g, False) for name in ("int4", "int8") for g in (TENSOR, CHANNEL, groups_of(40))),
    *((name, g, True) for name in ("float8_e4m3fn", "hifloat8") for g in (TENSOR, CHANNEL)),
    ("float4_e2m1", groups_of(32), True),
    ("float4_e2m1", groups_of(64), True),
    ("mxfp4_e2m1", groups_of(32), True),
]


@pytest.mark.parametrize(("name", "granularity", "symmetric"), ALLOWED)
@pytest.mark.parametrize("inputs", [96, 83])
def test_every_format_loses_less_than_nearest(name, granularity, symmetric, inputs):
    weight, hessian = layer(inputs=inputs)
    fmt = FORMATS[name]
    result = solve_gptq(weight, hessian, fmt, granularity, symmetric=symmetric)
    assert result.fell_back is None
    assert result.codes.dtype == fmt.code_dtype
    assert tuple(result.scale.shape) == granularity.scales_shape(weight.shape)
    assert (result.offset is None) == symmetric
    # The losses reported are those of the codes and of plain rounding. Float32 sums.
    solved = loss_of(weight - values(result, fmt, granularity), hessian)
    params = params_of(weight, fmt, granularity, symmetric=symmetric)
    rounded = fake_quantize(weight, params.scale, params.offset, fmt, granularity)
    assert result.loss == pytest.approx(solved, rel=1e-3)
    assert result.loss_nearest == pytest.approx(loss_of(weight - rounded, hessian), rel=1e-3)
    assert solved < 0.6 * result.loss_nearest
    if name.startswith("mx"):
        assert torch.equal(torch.frexp(result.scale).mantissa, torch.full_like(result.scale, 0.5))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 70),
    tokens=st.integers(1, 100),
    allowed=st.sampled_from(ALLOWED),
    chosen=st.builds(
        GptqSettings,
        damping=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
        act_order=st.booleans(),
        static_groups=st.booleans(),
        sweeps=st.integers(0, 2),
    ),
)
def test_never_worse_than_nearest(seed, outputs, inputs, tokens, allowed, chosen):
    name, granularity, symmetric = allowed
    weight, hessian = layer(outputs, inputs, seed, tokens)
    fmt = FORMATS[name]
    result = solve_gptq(weight, hessian, fmt, granularity, symmetric=symmetric, settings=chosen)
    params = params_of(weight, fmt, granularity, symmetric=symmetric)
    rounded = fake_quantize(weight, params.scale, params.offset, fmt, granularity)
    solved = values(result, fmt, granularity)
    nearest = loss_of(weight - rounded, hessian)
    # Float32 sums of the two losses may order near equals wrongly.
    assert loss_of(weight - solved, hessian) <= nearest * (1 + 1e-3) + 1e-9
    if result.fell_back is not None:
        assert torch.equal(solved, rounded)


def test_sweeps_only_lower_the_loss():
    weight, hessian = layer(outputs=48)
    for granularity, symmetric in ((groups_of(32), False), (CHANNEL, True), (TENSOR, True)):
        losses = [
            solve_gptq(
                weight,
                hessian,
                INT4,
                granularity,
                symmetric=symmetric,
                # Sweeps minimise the damped loss; with next to no damping the two agree.
                settings=GptqSettings(damping=1e-6, sweeps=sweeps),
            ).loss
            for sweeps in range(4)
        ]
        assert losses[3] < losses[2] < losses[1] < losses[0]


def test_weights_that_no_token_reaches_are_rounded_to_the_nearest():
    weight, hessian = layer()
    dead = [0, 17, 95]
    hessian[dead] = 0
    hessian[:, dead] = 0
    alive = [k for k in range(96) if k not in dead]
    for symmetric in (True, False):
        result = solve_gptq(weight, hessian, INT4, CHANNEL, symmetric=symmetric)
        assert result.dead_columns == 3
        solved = values(result, INT4, CHANNEL)
        off = (solved - weight).abs() / result.scale
        # Inside the range, which may leave out a few of them.
        assert off[:, dead].median() < 0.3
        assert (off[:, dead] < 0.501).float().mean() > 0.8
        assert off[:, alive].median() > off[:, dead].median()
        assert result.loss == pytest.approx(loss_of(weight - solved, hessian), rel=1e-3)


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, torch.nn.functional.relu])
@pytest.mark.parametrize(("tokens", "least"), [(16, 0.97), (64, 1.2), (1024, 1.4)])
def test_few_tokens_do_no_harm_to_others(activation, tokens, least):
    better = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(64, 128, generator=g)
        mix = torch.randn(32, 128, generator=g)

        def inputs(number, mix=mix, g=g):
            return activation(torch.randn(number, 32, generator=g) @ mix)

        seen, others = Hessian(128), Hessian(128)
        seen.add(inputs(tokens))
        others.add(inputs(4096))
        results = [
            solve_gptq(weight, seen.mean(), INT4, CHANNEL, tokens=tokens),
            solve_gptq(weight, torch.eye(128), INT4, CHANNEL),
        ]
        losses = [
            loss_of(weight - values(result, INT4, CHANNEL), others.mean()) for result in results
        ]
        better.append(losses[1] / losses[0])
    assert sum(better) / len(better) > least


def test_a_layer_without_input_is_rounded_to_the_nearest():
    weight, hessian = layer()
    result = solve_gptq(weight, torch.zeros_like(hessian), INT8, CHANNEL)
    assert "input" in result.fell_back
    params = params_of(weight, INT8, CHANNEL)
    expected = fake_quantize(weight, params.scale, None, INT8, CHANNEL)
    assert torch.equal(values(result, INT8, CHANNEL), expected)


@pytest.mark.parametrize("damping", [0.0, 1e-9])
def test_a_singular_hessian_is_damped_until_it_factorizes(damping):
    # 20 tokens cannot fill 96 dimensions.
    weight, hessian = layer(tokens=20)
    result = solve_gptq(weight, hessian, INT4, CHANNEL, settings=GptqSettings(damping=damping))
    assert result.fell_back is None
    # Next to float32 rounding, 1e-6 of the mean is the least that can help.
    assert 0.9e-6 < result.damping / float(hessian.diagonal().mean()) < 1.1e-3
    assert result.loss < result.loss_nearest


def test_a_matrix_that_is_no_hessian_falls_back():
    weight, hessian = layer()
    hessian[0, 1] = hessian[1, 0] = 1e6 * hessian.diagonal().max()
    result = solve_gptq(weight, hessian, INT4, CHANNEL)
    assert "positive definite" in result.fell_back


def test_a_target_is_come_near_to():
    weight, hessian = layer()
    target = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    result = solve_gptq(weight, hessian, INT4, CHANNEL, target=target)
    same = solve_gptq(target, hessian, INT4, CHANNEL)
    assert torch.equal(result.codes, same.codes)
    params = params_of(weight, INT4, CHANNEL)
    rounded = fake_quantize(weight, params.scale, None, INT4, CHANNEL)
    assert result.loss_nearest == pytest.approx(loss_of(target - rounded, hessian), rel=1e-3)


def test_arguments_stay_as_they_are():
    weight, hessian = layer()
    hessian[0] = 0
    hessian[:, 0] = 0
    kept = weight.clone(), hessian.clone()
    solve_gptq(weight, hessian, INT4, CHANNEL)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"hessian": torch.eye(5)}, "hessian has shape"),
        ({"target": torch.zeros(2, 4)}, "target has shape"),
        ({"weight": torch.full((3, 4), float("nan"))}, "weight holds NaN"),
        ({"hessian": torch.full((4, 4), float("inf"))}, "hessian holds NaN or inf"),
        ({"granularity": Granularity("token")}, "granularity is 'token'"),
        ({"fmt": FORMATS["hifloat8"], "symmetric": False}, "symmetric is False; hifloat8"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "weight": torch.ones(3, 4),
        "hessian": torch.eye(4),
        "fmt": INT4,
        "granularity": CHANNEL,
        "symmetric": True,
    }
    with pytest.raises(ArgumentValueError, match=message):
        solve_gptq(**{**arguments, **change})


@pytest.mark.parametrize("wrong", [{"damping": -0.1}, {"damping": float("nan")}, {"sweeps": -1}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ArgumentValueError, match=next(iter(wrong))):
        GptqSettings(**wrong)
