"""Moments, shrinkage and the corrected target, against direct computation."""

import pytest
import torch
from torch import Tensor

from ernieq.calibrate import Moments, corrected_weight, shrinkage, shrunk_gram


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_in_batches_are_the_weighted_means() -> None:
    inputs, residuals, weights = random(50, 8), random(50, 5, seed=1), random(50, seed=2).square()
    moments = Moments(8, residual_rows=5)
    for part in (slice(0, 20), slice(20, 20), slice(20, 50)):
        moments.add(inputs[part], weights[part], residuals[part])
    expected = torch.einsum("t,ti,tj->ij", weights, inputs, inputs) / weights.sum()
    assert torch.allclose(moments.mean_gram(), expected, atol=1e-5)
    expected = torch.einsum("t,tr,ti->ri", weights, residuals, inputs) / weights.sum()
    assert torch.allclose(moments.mean_residual(), expected, atol=1e-5)
    assert moments.tokens == 50
    assert moments.effective_tokens == pytest.approx(
        float(weights.sum() ** 2 / weights.square().sum()), rel=1e-5
    )


def test_without_weights_every_token_counts_once() -> None:
    moments = Moments(4)
    moments.add(random(30, 4))
    assert moments.effective_tokens == pytest.approx(30)


def test_an_expert_that_saw_no_token_leans_on_its_layer_and_not_on_the_identity() -> None:
    prior = random(6, 6) @ random(6, 6).T
    assert torch.equal(shrunk_gram(Moments(6), prior, 1.0), prior)


def test_trust_grows_with_tokens_and_falls_with_width_and_strength() -> None:
    assert shrinkage(0, 16, 1.0) == 0
    assert shrinkage(16, 16, 1.0) == 0.5
    assert shrinkage(1600, 16, 1.0) > 0.98
    assert shrinkage(16, 32, 1.0) < 0.5 > shrinkage(16, 16, 2.0)


def test_the_correction_brings_the_output_back_to_the_wanted_one() -> None:
    weight, inputs = random(12, 8), random(400, 8, seed=1)
    distorted = inputs + 0.3 * inputs @ random(8, 8, seed=2) + 0.05 * random(400, 8, seed=3)
    moments = Moments(8, residual_rows=12)
    moments.add(distorted, residuals=(inputs - distorted) @ weight.T)
    corrected = corrected_weight(weight, moments.mean_gram(), moments.mean_residual(), 1e-6)
    best = torch.linalg.lstsq(distorted, inputs @ weight.T).solution.T
    assert torch.allclose(corrected, best, atol=1e-3)
    before = (distorted @ weight.T - inputs @ weight.T).square().mean()
    after = (distorted @ corrected.T - inputs @ weight.T).square().mean()
    assert after < 0.2 * before


def test_a_strong_damping_leaves_the_weight_where_it_is() -> None:
    weight, gram, residual = random(4, 8), torch.eye(8), random(4, 8, seed=1)
    assert torch.allclose(corrected_weight(weight, gram, residual, 1e9), weight, atol=1e-6)
    assert torch.equal(corrected_weight(weight, torch.zeros(8, 8), residual, 0.01), weight)
