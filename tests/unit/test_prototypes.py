"""Prototypes, Sinkhorn and the mean entropy against naive code on plain probabilities."""

import math

import pytest
import torch
from torch.nn import functional as F

from data2vec_vision.prototypes import Prototypes, mean_entropy_gap, prototype_use, sinkhorn


def cosines(rows=12, n_prototypes=5, width=3):
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, n_prototypes))
    return F.normalize(z, dim=1) @ F.normalize(w, dim=1).T


def naive_sinkhorn(P, iterations):
    """The published loop, on plain probabilities or exponentials P [B, K]."""
    B, K = P.shape
    Q = P.T / P.sum()
    for _ in range(iterations):
        for k in range(K):
            Q[k] = Q[k] / Q[k].sum() / K
        for b in range(B):
            Q[:, b] = Q[:, b] / Q[:, b].sum() / B
    return (Q * B).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("rows", [2, 12, 40])
def test_sinkhorn_equals_the_published_loop_on_exponentials(iterations, rows):
    scores = cosines(rows) / 0.05
    expected = naive_sinkhorn(scores.exp(), iterations)
    torch.testing.assert_close(sinkhorn(scores, iterations), expected, rtol=1e-10, atol=1e-14)


def test_sinkhorn_of_logarithms_equals_the_published_loop_on_sharpened_probabilities():
    """MSN's targets: p to the power 1 / T, divided by its sum, then the same loop without an exponential."""
    p = (cosines() / 0.1).softmax(dim=1)
    sharp = p**4 / (p**4).sum(dim=1, keepdim=True)
    assert sinkhorn(sharp.log()).allclose(naive_sinkhorn(sharp, 3), rtol=1e-10, atol=1e-14)


def test_sinkhorn_takes_three_iterations():
    scores = cosines() / 0.05
    assert torch.equal(sinkhorn(scores), sinkhorn(scores, 3)) and not torch.equal(sinkhorn(scores), sinkhorn(scores, 4))


def test_rows_of_sinkhorn_sum_to_one_and_prototypes_have_nearly_equal_shares():
    scores = cosines(rows=256, n_prototypes=16, width=32) / 0.05
    before, after = scores.softmax(dim=1), sinkhorn(scores)
    torch.testing.assert_close(after.sum(dim=1), torch.ones(256, dtype=torch.float64))
    shares = after.mean(dim=0) * 16  # one is the same for all
    assert shares.min() > 0.85 and shares.max() < 1.15
    assert before.mean(dim=0).max() * 16 > 1.5  # the shares were not equal by themselves
    torch.testing.assert_close(sinkhorn(scores, 1000).mean(dim=0) * 16, torch.ones(16, dtype=torch.float64))


def test_sinkhorn_of_a_collapse_is_the_uniform_assignment():
    """All samples alike: exactly one share for every prototype, which is why a collapsed SwAV stands at ln K."""
    scores = (cosines()[:1] / 0.05).expand(12, -1)
    torch.testing.assert_close(sinkhorn(scores), torch.full((12, 5), 0.2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_sinkhorn_neither_overflows_nor_underflows():
    """Cosines of plus and minus one at a temperature of 0.005: plain exponentials are infinite or zero in fp32."""
    generator = torch.Generator().manual_seed(0)
    cosine = torch.randint(2, (32, 8), generator=generator) * 2.0 - 1
    cosine[0], cosine[1] = 1, -1
    cosine[:, 0] = -1  # a prototype that nobody is near
    assert (cosine / 0.005).exp().isinf().any()
    q = sinkhorn(cosine / 0.005)
    assert q.isfinite().all() and q.dtype == torch.float32
    torch.testing.assert_close(q.sum(dim=1), torch.ones(32))
    torch.testing.assert_close(q.double(), sinkhorn(cosine.double() / 0.005), rtol=1e-3, atol=1e-3)


def test_sinkhorn_of_half_precision_is_computed_in_fp32_and_without_gradient():
    scores = (cosines() / 0.05).half().requires_grad_()
    q = sinkhorn(scores)
    assert q.dtype == torch.float32 and not q.requires_grad
    torch.testing.assert_close(q.double(), sinkhorn(scores.detach().double()), rtol=1e-5, atol=1e-6)


def prototypes(count=4, width=3):
    torch.manual_seed(0)
    result = Prototypes(count, width).double()
    result.weight.data = torch.randn(count, width, dtype=torch.float64) * torch.tensor([[0.1], [1], [7], [50]])
    return result


def test_cosines_equal_naive_code_whatever_the_lengths():
    p, z = prototypes(), torch.randn(6, 3, dtype=torch.float64) * 9
    out = p(z)
    for b in range(6):
        for k in range(4):
            w = p.weight[k]
            assert out[b, k].item() == pytest.approx((z[b] @ w / z[b].norm() / w.norm()).item())


def test_the_gradient_of_cosines_turns_a_prototype_and_does_not_lengthen_it():
    p, z = prototypes(), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    p(z).square().sum().backward()
    assert p.weight.grad.abs().max() > 0.01
    torch.testing.assert_close((p.weight.grad * p.weight).sum(dim=1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close((z.grad * z).sum(dim=1), torch.zeros(6, dtype=torch.float64))


def test_scores_are_plain_scalar_products_with_what_is_stored():
    p, units = prototypes(), F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1)
    weights = torch.randn(6, 4, dtype=torch.float64)
    scores = p.scores(units)
    torch.testing.assert_close(scores, torch.stack([torch.stack([z @ w for w in p.weight]) for z in units]))
    (scores * weights).sum().backward()
    torch.testing.assert_close(p.weight.grad, weights.T @ units)


def test_renormalising_keeps_directions_the_parameter_and_gradients_of_earlier_passes():
    p, units = prototypes(), F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1).requires_grad_()
    parameter, before = p.weight, p.weight.detach().clone()
    scores = p.scores(units)
    p.renormalize()
    assert p.weight is parameter and p.weight.requires_grad
    torch.testing.assert_close(p.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(p.weight * before.norm(dim=1, keepdim=True), before)
    scores.sum().backward()
    torch.testing.assert_close(units.grad, before.sum(dim=0).expand(6, -1))


def test_scores_stay_in_the_precision_of_the_projections_under_autocast():
    p, z = prototypes().float(), torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = p(z), p.scores(z)
    assert one.dtype == two.dtype == torch.float32
    assert torch.equal(one, p(z)) and torch.equal(two, p.scores(z))


def test_prototypes_start_at_random_and_are_not_decayed():
    torch.manual_seed(0)
    p = Prototypes(500, 16)
    assert p.no_weight_decay() == {"weight"} == {name for name, _ in p.named_parameters()}
    assert p.weight.abs().max() <= 0.25 and p.weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)


def naive_gap(probabilities):
    """ln K - H of the mean probability, number by number."""
    B, K = probabilities.shape
    mean = [sum(probabilities[b, k].item() for b in range(B)) / B for k in range(K)]
    return math.log(K) + sum(m * math.log(m) for m in mean if m > 0)


def test_the_mean_entropy_gap_equals_naive_code():
    log_p = (cosines() / 0.1).log_softmax(dim=1)
    assert mean_entropy_gap(log_p).item() == pytest.approx(naive_gap(log_p.exp()), rel=1e-10)


def test_the_gap_is_zero_when_samples_spread_and_ln_k_when_they_collapse():
    K = 8
    one_hot = torch.eye(K, dtype=torch.float64)
    spread = one_hot.repeat(3, 1).log()  # each sample sure of itself, each prototype as often chosen
    collapsed = one_hot[:1].expand(24, -1).log()
    uniform = torch.full((24, K), 1 / K, dtype=torch.float64).log()
    assert mean_entropy_gap(spread).item() == pytest.approx(0, abs=1e-12)
    assert mean_entropy_gap(uniform).item() == pytest.approx(0, abs=1e-12)
    assert mean_entropy_gap(collapsed).item() == pytest.approx(math.log(K))
    assert 0 < mean_entropy_gap(torch.cat([spread, collapsed])) < math.log(K)


def test_descending_the_gap_spreads_the_samples():
    logits = 5 * cosines(rows=16, n_prototypes=6)
    logits[:, 0] += 5
    logits.requires_grad_()
    gaps, crowded = [], []
    for _ in range(100):
        gap = mean_entropy_gap(logits.log_softmax(dim=1))
        [gradient] = torch.autograd.grad(gap, logits)
        gaps.append(gap.item())
        crowded.append(logits.softmax(dim=1).mean(dim=0)[0].item())
        logits = (logits - 5 * gradient).detach().requires_grad_()
    assert 0 < gaps[-1] < 0.1 * gaps[0]
    assert crowded[0] > 0.5 and crowded[-1] < 0.4


def test_the_gradient_of_the_gap_is_finite_where_a_prototype_is_nobodys():
    """At a low temperature a probability is zero in fp32 for all samples; x log x has a gradient there that x takes away."""
    logits = torch.tensor([[1.0, -1.0, 0.9], [1.0, -1.0, 0.95]], requires_grad=True)
    log_p = (logits / 0.005).log_softmax(dim=1)
    assert log_p.exp()[:, 1].max() == 0
    gap = mean_entropy_gap(log_p)
    gap.backward()
    assert gap.item() == pytest.approx(math.log(3), rel=1e-3) and logits.grad.isfinite().all()


def test_prototype_use_tells_life_from_collapse():
    K, one_hot = 6, torch.eye(6, dtype=torch.float64)
    alive = prototype_use(one_hot, mean_entropy_gap(one_hot.log()))
    assert (alive["prototypes_used"], alive["target_max"]) == (6, 1)
    assert alive["entropy"].item() == pytest.approx(1)
    targets = torch.tensor([[0.5, 0.3, 0.2, 0, 0, 0], [0.6, 0.4, 0, 0, 0, 0], [0.1, 0.7, 0.2, 0, 0, 0]])
    half = prototype_use(targets, mean_entropy_gap(targets.double().clamp(min=1e-9).log()))
    assert half["prototypes_used"] == 2 and half["target_max"].item() == pytest.approx(0.6)
    assert half["entropy"].item() == pytest.approx(1 - naive_gap(targets) / math.log(K), abs=1e-6)
    dead = prototype_use(one_hot[:1].expand(6, -1), mean_entropy_gap(one_hot[:1].expand(6, -1).log()))
    assert dead["prototypes_used"] == 1 and dead["entropy"].item() == pytest.approx(0, abs=1e-12)
    assert all(value.shape == () and not value.requires_grad for value in half.values())
