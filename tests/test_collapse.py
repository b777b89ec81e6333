"Collapseness, separability and the indicators against sums written out."
import math

import pytest
import torch
from torch import tensor

from robust_dml.triplets.collapse import collapseness, indicators, is_collapsed, separability, weighted_mean
from robust_dml.core import generator
from robust_dml.triplets.distances import normalise

AP,AN = tensor([.30, .60, .90, .20], dtype=torch.float64), tensor([.50, .55, 1., .70], dtype=torch.float64)


@pytest.mark.parametrize(
    'lam, weighting, expected',
    [
        (10.0, 'near', -0.302486), (10.0, 'far', -0.094372), (2.0, 'near', -0.250749), (2.0, 'far', -0.118265),
        (0.0, 'near', -0.1875), (7.0, 'uniform', -0.1875)
    ],
)
def test_worked_values(lam, weighting, expected):
    assert collapseness(AP, AN, lam=lam, weighting=weighting).item() == pytest.approx(expected, abs=1e-6)


def slow_mean(dist, lam, sign):
    "Eq. (6) and (7) with the shift written out: weights in (0, 1]."
    ends = min(dist) if sign > 0 else max(dist)
    w = [math.exp(-sign*lam*(d - ends)) for d in dist]
    assert max(w) == 1.
    return sum(a*b for a,b in zip(w, dist))/sum(w)


@pytest.mark.parametrize('lam', [0., 1., 10., 100.])
def test_weighted_mean_is_the_sum_of_the_equation(lam):
    dist = 2*torch.rand(56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert weighted_mean(dist, lam=lam).item() == pytest.approx(slow_mean(dist.tolist(), lam, 1), rel=1e-12)
    assert weighted_mean(dist, lam=lam, weighting='far').item() == pytest.approx(
        slow_mean(dist.tolist(), lam, -1), rel=1e-12
    )


def test_sharp_weights_tend_to_the_extremes():
    assert weighted_mean(AP, lam=1e4).item() == pytest.approx(.2)
    assert weighted_mean(AP, lam=1e4, weighting='far').item() == pytest.approx(.9)


@pytest.mark.parametrize('weighting', ['near', 'far', 'uniform'])
def test_gradcheck_and_permutation(weighting):
    def f(p, n): return collapseness(p, n, lam=10., weighting=weighting)
    assert torch.autograd.gradcheck(f, (AP.clone().requires_grad_(), AN.clone().requires_grad_()))
    order = tensor([2, 0, 3, 1])
    assert f(AP[order], AN).item() == pytest.approx(f(AP, AN).item(), abs=1e-15)


def test_semihard_triplets_have_negative_plain_collapseness():
    gen = torch.Generator().manual_seed(0)
    ap = torch.rand(56, generator=gen)
    assert collapseness(ap, ap + .2*torch.rand(56, generator=gen), lam=0.) < 0


def test_separability():
    assert separability(AP, AN).item() == pytest.approx((.6875 - .5)/.59375)
    assert separability(AN, AP).item() == pytest.approx(-separability(AP, AN).item())
    assert separability(torch.zeros(2), torch.zeros(3)).isnan()


def labelled(n=40, spread=1.):
    gen = generator(0, 'test collapse')
    label = torch.randint(6, (n,), generator=gen)
    return normalise(normalise(torch.randn(1, 16, generator=gen)) + spread*torch.randn(n, 16, generator=gen)), label


def test_indicators_are_means_over_pairs():
    emb,label = labelled()
    pairs = [(i, j) for i in range(40) for j in range(i)]
    dist = {(i, j): (emb[i].double() - emb[j].double()).norm().item() for i,j in pairs}
    def mean(rows): return sum(dist[r] for r in rows)/len(rows)
    same,other = [p for p in pairs if label[p[0]] == label[p[1]]], [p for p in pairs if label[p[0]] != label[p[1]]]
    found = indicators(emb, label, gen=generator(0))
    assert found['mean_distance'] == pytest.approx(mean(pairs), rel=1e-6)
    assert found['same_distance'] == pytest.approx(mean(same), rel=1e-6)
    assert found['other_distance'] == pytest.approx(mean(other), rel=1e-6)
    assert found['separability'] == pytest.approx(2*(mean(other) - mean(same))/(mean(other) + mean(same)), rel=1e-4)


def test_sample_is_drawn_from_gen_and_close_to_the_whole():
    emb,label = labelled(600)
    whole, part, again, another = (
        indicators(emb, label, gen=generator(s), sample=k) for s, k in ((0, 600), (0, 200), (0, 200), (1, 200))
    )
    assert part == again and part != another
    assert part['mean_distance'] == pytest.approx(whole['mean_distance'], rel=.05)     # 200 of 600 images


def test_indicators_do_not_depend_on_the_order_of_a_whole_set():
    emb,label = labelled()
    order = torch.randperm(40, generator=generator(1))
    one,two = indicators(emb, label, gen=generator(0)), indicators(emb[order], label[order], gen=generator(0))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize('spread, collapsed', [(1., False), (.05, False), (1e-4, True), (0., True)])
def test_flag(spread, collapsed):
    assert is_collapsed(indicators(*labelled(spread=spread), gen=generator(0))) is collapsed


def test_flag_threshold_and_undefined():
    assert is_collapsed({'mean_distance': .1}, threshold=.2) and not is_collapsed({'mean_distance': .1})
    assert is_collapsed({'mean_distance': math.nan})


def test_bad_input():
    with pytest.raises(ValueError, match='must match'): collapseness(AP, AN[:2], lam=1.)
    with pytest.raises(ValueError, match='weighting must be one of'): weighted_mean(AP, lam=1., weighting='middle')
    with pytest.raises(ValueError, match='lam must lie in'): weighted_mean(AP, lam=-1.)
    with pytest.raises(ValueError, match='one entry per row'):
        indicators(torch.ones(3, 2), torch.zeros(2), gen=generator(0))
