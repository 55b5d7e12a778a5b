"""Ranks and errors against a float64 reference; bounds and policies."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from evbmf_reference import evbmf_rank, truncation_error
from torch import Tensor

from amct_pytorch.decomposition import lanczos, solve
from amct_pytorch.decomposition.evbmf import evbmf, evbmf_leading
from amct_pytorch.decomposition.factorise import Sketch, factorise
from amct_pytorch.decomposition.geometry import Geometry
from amct_pytorch.decomposition.lanczos import Lanczos, leading_vectors
from amct_pytorch.decomposition.policy import RankPolicy, rank_bounds
from amct_pytorch.decomposition.solve import SPATIAL_MODES, Solution, as_matrix, solve_layer


def _random(seed: int) -> Tensor:
    """A conv weight of low rank in its spatial form, plus noise; every seed another shape."""
    generator = torch.Generator().manual_seed(seed)
    n, c, kh, kw = [(64, 96, 3, 3), (128, 64, 3, 5), (64, 64, 5, 3), (96, 160, 3, 3)][seed % 4]
    rank = 8 + 6 * seed
    left = torch.randn(c * kh, rank, generator=generator)
    right = torch.randn(rank, n * kw, generator=generator)
    decay = torch.linspace(1, 0.1, rank)[:, None]
    noise = [0.1, 1.0, 3.0][seed % 3] * torch.randn(c * kh, n * kw, generator=generator)
    matrix = left @ (decay * right) + noise
    return 0.01 * matrix.reshape(c, kh, n, kw).permute(2, 0, 1, 3).contiguous()


def _real(model: torch.nn.Module) -> list[Tensor]:
    """Weights of a trained network: its largest 1 x 1 convolutions, cut into 3 x 3 kernels."""
    weights = [p.detach() for p in model.parameters() if p.dim() == 4 and p.shape[1] >= 480]
    return [w.flatten(1)[:, :432].reshape(len(w), 48, 3, 3) for w in weights[-8:]]


def _check(weight: Tensor) -> None:
    for axis in (0, 1):
        matrix = as_matrix(weight, axis)
        found = factorise(matrix)
        assert found.method == "gram float32"
        rank = evbmf_rank(matrix.numpy())
        assert evbmf(found.energies, *matrix.shape).rank == rank
        rank = max(rank, 16)
        # A float32 Gram matrix has relative errors of 1e-6 of the largest energy.
        assert found.error(rank) == pytest.approx(truncation_error(matrix.numpy(), rank), abs=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_rank_and_error_of_random_weights_are_those_of_the_reference(seed):
    _check(_random(seed))


def test_rank_and_error_of_real_weights_are_those_of_the_reference(efficientnet_lite0):
    weights = _real(efficientnet_lite0)
    assert len(weights) == 8
    for weight in weights:
        _check(weight)


def test_the_rank_of_a_clean_low_rank_matrix_is_found():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(s, generator=generator) for s in ((100, 7), (7, 150)))
    noise = 1e-3 * torch.randn(100, 150, generator=generator)
    matrix = left @ right + noise
    assert evbmf(factorise(matrix, exact=True).energies, 100, 150).rank == 7
    # A float32 Gram matrix cannot see noise this weak, and the policy knows.
    policy = RankPolicy(bounded=False)
    assert not policy.choose(factorise(matrix), (100, 150), 64, int).certain
    assert policy.choose(factorise(matrix, exact=True), (100, 150), 64, int).certain


def test_noise_alone_has_no_rank():
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    assert evbmf(factorise(matrix).energies, 200, 300).rank == 0
    assert evbmf(torch.zeros(4), 4, 9).rank == 0


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 9)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_factors_are_those_of_the_svd(shape, scale):
    matrix = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rank = max(1, min(shape) // 3)
    left, right = factorise(matrix).factors(matrix, rank)
    error = float((left @ right - matrix).double().norm() / matrix.double().norm())
    assert error == pytest.approx(truncation_error(matrix.numpy(), rank), abs=1e-5)
    # The scale is split evenly.
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-3)


def test_a_gram_matrix_that_fails_its_checks_gives_way_to_float64_and_svd(monkeypatch):
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(4))
    eigvalsh = torch.linalg.eigvalsh

    def broken_in_float32(gram):
        return eigvalsh(gram) * (2 if gram.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.linalg, "eigvalsh", broken_in_float32)
    assert factorise(matrix).method == "gram float64"
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: eigvalsh(gram) + 1)
    found = factorise(matrix)
    assert found.method == "svd float64"
    left, right = found.factors(matrix.double(), 20)
    assert torch.allclose(left @ right, matrix.double(), atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
def test_lanczos_vectors_hold_the_energy_of_the_leading_ones(decay, monkeypatch):
    monkeypatch.setattr(lanczos, "SMALL", 500)
    generator = torch.Generator().manual_seed(5)
    size, rank = 600, 100
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    values = torch.arange(1.0, size + 1) ** -decay
    gram = (basis * values) @ basis.T
    vectors = leading_vectors(gram, rank, 1e-5)
    held = float((vectors * (gram @ vectors)).sum())
    assert held == pytest.approx(float(values[:rank].sum()), rel=3e-5)
    assert torch.allclose(vectors.T @ vectors, torch.eye(rank), atol=1e-4)


def _basis_of(gram: Tensor) -> Lanczos:
    return Lanczos(partial(torch.matmul, gram), gram)


def test_a_lanczos_basis_that_has_the_whole_space_says_so():
    few = torch.zeros(200, 200)
    few[range(40), range(40)] = 1.0  # nothing new is left after the second block
    assert not _basis_of(few).grow(150)
    assert _basis_of(torch.eye(200)).grow(32)
    assert not _basis_of(torch.randn(200, 200) @ torch.randn(200, 200)).grow(190)


def test_lanczos_stops_where_its_error_is_small_enough():
    """The excess that it reports is the true one, once small."""
    generator = torch.Generator().manual_seed(6)
    matrix = torch.randn(600, 900, generator=generator)
    gram = matrix @ matrix.T
    values = torch.linalg.eigvalsh(gram.double()).flip(0)
    basis = _basis_of(gram)
    assert basis.grow(450)
    found = basis.solve(150)
    best = 1 - float(values[:150].sum() / values.sum())
    kept = 1 - float(found.values[:150].sum() / values.sum())
    assert found.excess(float(values.sum())) == pytest.approx(kept**0.5 - best**0.5, abs=2e-4)


def _known(kind: str, rows: int, columns: int) -> Tensor:
    """Energies of a matrix of that kind."""
    generator = torch.Generator().manual_seed(rows + columns)
    noise = torch.randn(rows, columns, generator=generator)
    few = rows // 2 if kind == "half" else 40 if kind == "low" else 100
    left = torch.randn(rows, few, generator=generator)
    right = torch.randn(few, columns, generator=generator)
    matrix = {
        "noise": lambda: noise,
        "low": lambda: left @ right + 3 * noise,
        "decay": lambda: (left * torch.linspace(1, 0.1, few)) @ right + 0.5 * noise,
        "half": lambda: (left * torch.linspace(1, 0.1, few)) @ right,
        "power": lambda: torch.arange(1, rows + 1)[:, None] ** -0.7 * noise,
    }[kind]()
    return torch.linalg.svdvals(matrix.double()) ** 2


@pytest.mark.parametrize("shape", [(300, 300), (300, 500), (200, 800)])
@pytest.mark.parametrize("kind", ["noise", "low", "decay", "half", "power"])
def test_leading_energies_decide_as_all_of_them_do(kind, shape):
    energies = _known(kind, *shape)
    everything = evbmf(energies, *shape)
    for part in (6, 4):
        count = shape[0] // part
        found = evbmf_leading(
            energies[:count],
            float(energies.sum()),
            float((energies**2).sum()),
            *shape,
            enough=count - 2,
            uncertainty=1e-6 * float(energies[0]),
        )
        if found is None:
            # Energies that fall all the way have no noise to speak of: all must be looked at.
            assert kind == "power"
        elif found.at_least:
            assert count - 2 <= found.rank <= everything.rank
        else:
            assert found.rank == everything.rank
            assert found.threshold == pytest.approx(everything.threshold, rel=1e-3)


def test_leading_energies_that_cannot_decide_say_so():
    energies = _known("decay", 300, 300)  # rank 98
    sums = float(energies.sum()), float((energies**2).sum())
    options = {"enough": 99, "uncertainty": 1e-6 * float(energies[0])}
    assert evbmf_leading(energies[:50], *sums, 300, 300, **options) is None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", [{}, {"name": "flops", "flops_ratio": 0.3}], ids=str)
def test_leading_components_give_what_all_give(seed, policy, monkeypatch):
    """The same layer with and without the short way of large layers."""
    weight = _random(seed)
    whole = _solve(weight, **policy)
    monkeypatch.setattr(solve, "LARGE_SIDE", 100)
    monkeypatch.setattr(lanczos, "BLOCK", 8)  # in proportion to so small a layer
    short = _solve(weight, **policy)
    assert whole.method == "gram float32"
    # Noise this weak beside the signal is only seen in the complete spectrum.
    weak = seed % 3 == 0 and not policy
    assert short.method in ("lanczos float32", "gram float32")[: 1 + weak]
    assert (short.rank, short.split) == (whole.rank, whole.split) or short.mode != whole.mode
    reference = as_matrix(weight, solve.SPATIAL_MODES.index(short.mode)).numpy()
    # The vectors are sought until they add 1e-5, estimated to second order, to the error.
    assert short.error == pytest.approx(truncation_error(reference, short.rank), abs=3e-5)
    # Of two orders that are as good as each other either may be taken.
    assert short.error == pytest.approx(whole.error, rel=0.02)
    if not policy:
        estimate = evbmf_rank(reference)
        assert short.estimate <= estimate if short.at_least else short.estimate == estimate


@pytest.mark.parametrize("kind", ["noise", "low", "decay", "half", "power"])
def test_a_guessed_spectrum_has_the_sums_and_the_rank_of_the_true_one(kind):
    shape = (600, 900)
    energies = _known(kind, *shape)
    generator = torch.Generator().manual_seed(9)
    rotation = torch.linalg.qr(torch.randn(600, 600, generator=generator)).Q
    matrix = torch.zeros(shape)
    matrix[:, :600] = rotation * energies.sqrt().float()
    guess = Sketch(matrix).guess()
    assert guess is not None and len(guess.energies) == 600
    for rank in (100, 150):
        expected = float(energies[rank:].sum() / energies.sum()) ** 0.5
        # How many energies lie above a value is known to sqrt(2 rank / 32), 2 to 3 in a hundred,
        # and at most twice that is taken here; at the end of the signal each counts for a lot.
        assert guess.error(rank) == pytest.approx(expected, rel=0.06)
    # Up to a quarter, the most that is ever solved for by leading components.
    expected = min(evbmf(energies, *shape).rank, 150)
    assert min(evbmf(guess.energies, *shape).rank, 150) == pytest.approx(expected, rel=0.1, abs=2)


def test_a_matrix_too_small_to_guess_says_so():
    assert Sketch(torch.eye(150)).guess() is None


def _solve(weight: Tensor, **policy: object) -> Solution:
    n, c, kh, kw = weight.shape
    solution = solve_layer(weight, Geometry(c, n, (kh, kw), (1, 1)), RankPolicy(**policy))
    assert isinstance(solution, Solution)
    return solution


def test_default_ranks_stay_within_their_bounds():
    assert rank_bounds(192, 64) == (28, 32)
    assert rank_bounds(384, 128) == (55, 64)
    assert rank_bounds(768, 256) == (154, 192)
    for seed in range(4):
        weight = _random(seed)
        side = min(as_matrix(weight, 0).shape)
        low, high = rank_bounds(side, min(weight.shape[:2]))
        # Rounding to a multiple of 16 may leave the bounds by half of that.
        assert low - 8 <= _solve(weight).rank <= high + 8
        assert _solve(weight).rank % 16 == 0


def test_without_bounds_the_estimate_is_taken():
    solution = _solve(_random(3), bounded=False)
    assert abs(solution.rank - solution.estimate) <= 8


def test_the_energy_policy_keeps_that_share():
    solution = _solve(_random(0), name="energy", energy=0.95)
    assert solution.error**2 <= 0.05 + 1e-6
    assert solution.rank % 16 == 0


def test_the_flops_policy_spends_no_more_than_its_share():
    weight = _random(3)
    n, c, kh, kw = weight.shape
    geometry = Geometry(c, n, (kh, kw), (1, 1))
    solution = _solve(weight, name="flops", flops_ratio=0.4)
    share = geometry.macs(solution.split) / geometry.macs(geometry.whole)
    assert 0.3 < share <= 0.4


def test_the_order_with_less_error_is_taken():
    generator = torch.Generator().manual_seed(6)
    # Of rank 16 when the vertical axis goes with the input channels, of full rank otherwise.
    left, right = (torch.randn(s, generator=generator) for s in ((192, 16), (16, 192)))
    weight = (left @ right).reshape(64, 3, 64, 3).permute(2, 0, 1, 3)
    assert _solve(weight).mode == "FCFK"
    assert _solve(weight.transpose(2, 3)).mode == "FCSK"
    assert _solve(weight).error < 1e-5 < _solve(weight).other_error


def test_the_other_error_is_that_at_equal_cost():
    # Wide in one direction: of the bounds, the other order's allow it more than what is spent.
    weight = torch.randn(128, 64, 3, 5, generator=torch.Generator().manual_seed(6))
    geometry = Geometry(64, 128, (3, 5), (1, 1))
    solution = _solve(weight)
    other = 1 - SPATIAL_MODES.index(solution.mode)
    ranks = [geometry.macs(solution.split) // geometry.macs(geometry.spatial(other, 1))]
    policy = RankPolicy()
    matrix = as_matrix(weight, other)
    found = factorise(matrix)
    channels = min(weight.shape[:2])
    ranks.append(policy.choose(found, tuple(matrix.shape), channels, int).rank)
    at_equal_cost, at_its_own = (found.error(rank) for rank in ranks)
    assert solution.other_error == pytest.approx(at_equal_cost, abs=1e-6)
    assert abs(at_equal_cost - at_its_own) > 0.01


def test_tucker_is_taken_where_it_costs_less():
    generator = torch.Generator().manual_seed(7)
    core = torch.randn(16, 16, 3, 3, generator=generator)
    outer, inner = (torch.randn(s, generator=generator) for s in ((96, 16), (128, 16)))
    weight = torch.einsum("no,okij,ck->ncij", outer, core, inner)
    geometry = Geometry(128, 96, (3, 3), (1, 1))
    spatial = solve_layer(weight, geometry, RankPolicy("energy", energy=0.999))
    tucker = solve_layer(weight, geometry, RankPolicy("energy", energy=0.999), tucker=True)
    assert (spatial.mode[:2], tucker.mode) == ("FC", "TUCKER2")
    assert geometry.macs(tucker.split) < geometry.macs(spatial.split)
    assert tucker.error <= spatial.error + 1e-4


def test_weights_that_cannot_be_solved_give_a_reason():
    geometry = Geometry(64, 64, (3, 3), (1, 1))
    bad = torch.zeros(64, 64, 3, 3)
    assert solve_layer(bad, geometry, RankPolicy()) == "its weight is all zero"
    bad[0, 0, 0, 0] = float("nan")
    assert solve_layer(bad, geometry, RankPolicy()) == "its weight holds NaN or infinity"
    noise = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(8))
    assert "out of the noise" in solve_layer(noise, geometry, RankPolicy(bounded=False))
    assert "would not save" in solve_layer(noise, geometry, RankPolicy("energy", energy=1.0))
    saving = solve_layer(noise, geometry, RankPolicy(), minimum_saving=0.99)
    assert "minimum_saving" in saving
