import torch

from amct_pytorch.algorithms.target_correction import correction


def inputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g)
    seen = x + 0.3 * torch.randn(200, 12, generator=g) + 0.2 * x.roll(1, 1)
    return x, seen, torch.randn(5, 12, generator=g)


def corrected(x, seen, weight, damping):
    hessian = seen.T @ seen / len(x)
    return weight + weight @ correction(hessian, (x - seen).T @ seen / len(x), damping)


def test_without_damping_it_is_the_least_squares_weight():
    x, seen, weight = inputs()
    best = torch.linalg.lstsq(seen.double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(
        corrected(x, seen, weight, 0.0), best.float(), rtol=1e-4, atol=1e-5
    )  # normal equations in float32, condition below 100


def test_damping_holds_it_near_the_weight():
    x, seen, weight = inputs()
    moves = [
        float((corrected(x, seen, weight, damping) - weight).norm())
        for damping in (0.0, 0.1, 1.0, 1000.0)
    ]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 1e-2 * moves[0]


def test_equal_inputs_need_no_correction():
    x, _, weight = inputs()
    assert torch.equal(corrected(x, x, weight, 0.1), weight)
