"Miners against a naive loop: the allowed sets, the distribution of the draws, and the corner cases."
import math
import time

import pytest
import torch

from robust_dml.core import generator
from robust_dml.triplets.distances import normalise
from robust_dml.triplets.mining import MINERS, distance_weighted, gradual_margin, hardest, random_triplets, semihard
from robust_dml.triplets.mining import softhard


def batch(pairs=12, classes=6, dim=8, spread=1.5, seed=0):
    "Overlapping classes, several pairs per class."
    gen = generator(seed, 'test mining')
    label = torch.randint(classes, (pairs,), generator=gen).repeat_interleave(2)
    return (
        normalise(
            torch.randn(classes, dim, generator=gen)[label] + spread * torch.randn(2 * pairs, dim, generator=gen)
        ),
        label,
    )


def or_else(*choices):
    "The first list that is not empty."
    return next(c for c in choices if c)


def allowed(name, emb, label, margin=.2, allow_self=True):
    "For each anchor the rows a naive reading of the definitions allows as positive and negative."
    rows,y = range(len(emb)),label.tolist()
    d = (emb.double()[:,None] - emb.double()[None]).norm(dim=-1).tolist()
    for a in rows[::2]:
        p,same,other = a + 1,[k for k in rows if y[k] == y[a]],[k for k in rows if y[k] != y[a]]
        ps,ns = [p],other
        if name == 'semihard': ns = [k for k in other if d[a][p] < d[a][k] < d[a][p] + margin]
        if name == 'range': ns = [k for k in other if d[a][k] < d[a][p] + margin]
        if name == 'softhard':
            ns = [k for k in other if d[a][k] < max(d[a][s] for s in same)]
            near = min((d[a][k] for k in other), default=math.inf)
            ps = or_else([k for k in same if d[a][k] > near], [k for k in same if allow_self or k != a])
        if name == 'hardest': ns = [min((k for k in other), key=lambda k: d[a][k])] if other else []
        yield ps, or_else(ns, other, list(rows))


def draws(mine, emb, label, times=1, **options):
    "Positives and negatives (times, b) of repeated calls."
    found = [mine(emb, label, gen=generator(i, 'draw'), **options) for i in range(times)]
    for t in found: assert torch.equal(t.a, torch.arange(0, len(emb), 2))
    return torch.stack([t.p for t in found]), torch.stack([t.n for t in found])


@pytest.mark.parametrize('name', MINERS)
@pytest.mark.parametrize('seed', range(4))
def test_every_draw_is_allowed_and_every_allowed_row_is_drawn(name, seed):
    emb,label = batch(seed=seed)
    p,n = draws(MINERS[name], emb, label, times=400, margin=.2)
    for i,(ps,ns) in enumerate(allowed(name, emb, label)):
        assert set(p[:,i].tolist()) == set(ps)
        if name == 'distance': assert set(n[:,i].tolist()) <= set(ns)
        # 24 rows at most: one is missed with probability 24*(23/24)**400 = 1e-6
        else: assert set(n[:,i].tolist()) == set(ns)


@pytest.mark.parametrize('name', ['random', 'semihard', 'range', 'softhard'])
def test_draws_are_uniform(name):
    "Chi-square of 1,500 draws per anchor; 5 standard deviations above its mean are allowed."
    emb,label = batch(seed=1)
    p,n = draws(MINERS[name], emb, label, times=1500, margin=.2)
    for i,sets in enumerate(allowed(name, emb, label)):
        for drawn,rows in zip((p[:,i], n[:,i]), sets):
            expected = 1500/len(rows)
            counts = torch.bincount(drawn, minlength=len(emb))[rows].double()
            chi2,free = ((counts - expected)**2/expected).sum().item(), len(rows) - 1
            assert chi2 <= free + 5*math.sqrt(2*free)


def test_anchors_draw_independently():
    emb,label = batch(pairs=20, classes=20, seed=2)
    _,n = draws(random_triplets, emb, label, times=1)
    assert n[0].unique().numel() > 8


def test_distance_weighted_probabilities():
    emb,label = batch(pairs=6, classes=3, dim=5, seed=3)
    _,n = draws(distance_weighted, emb, label, times=2000, dim=6)
    d = (emb.double()[:,None] - emb.double()[None]).norm(dim=-1)
    for i,a in enumerate(range(0, 12, 2)):
        log_w = [
            -4 * math.log(d[a, k]) - 1.5 * math.log(1 - d[a, k] ** 2 / 4) if label[k] != label[a] else -math.inf
            for k in range(12)
        ]
        w = torch.tensor([math.exp(x - max(log_w)) for x in log_w])
        share = torch.bincount(n[:,i], minlength=12)/2000
        assert (share - w/w.sum()).abs().max() < 5*.5/math.sqrt(2000)          # 5 standard deviations of a share


def test_distance_weighted_uses_the_dimension_of_the_embedding():
    emb,label = batch()
    assert torch.equal(draws(distance_weighted, emb, label)[1], draws(distance_weighted, emb, label, dim=8)[1])
    assert not torch.equal(
        draws(distance_weighted, emb, label, times=5)[1], draws(distance_weighted, emb, label, times=5, dim=512)[1]
    )


@pytest.mark.parametrize('name', MINERS)
def test_a_fully_collapsed_batch_still_gives_other_classes(name):
    emb,label = torch.ones(12, 4)/2, torch.arange(6).repeat_interleave(2)
    p,n = draws(MINERS[name], emb, label, times=50, margin=.2)
    assert (label[n] != label[::2]).all() and (label[p] == label[::2]).all()


@pytest.mark.parametrize('name', MINERS)
def test_antipodes_and_512_dimensions_do_not_break_the_weights(name):
    emb,label = batch(pairs=4, classes=4, dim=512)
    emb = torch.cat([emb, -emb])
    _,n = draws(MINERS[name], emb, torch.cat([label, label + 4]), times=20, margin=.2)
    assert (torch.cat([label, label + 4])[n] != torch.cat([label, label + 4])[::2]).all()


@pytest.mark.parametrize('name', MINERS)
def test_a_batch_of_one_class_gives_any_row(name):
    emb,_ = batch(pairs=4)
    p,n = draws(MINERS[name], emb, torch.zeros(8, dtype=torch.long), times=20, margin=.2)
    assert n.min() >= 0 and n.max() < 8
    if name != 'hardest': assert n.unique().numel() == 8


def test_softhard_fallback_may_be_the_anchor_only_when_allowed():
    label = torch.arange(8).repeat_interleave(2)
    emb = normalise(torch.randn(8, 32, generator=generator(0))[label] + .01*torch.randn(16, 32, generator=generator(1)))
    p,_ = draws(softhard, emb, label, times=500)
    share = (p == torch.arange(0, 16, 2)).float().mean()
    assert abs(share - .5) < 5*.5/math.sqrt(4000)
    p,_ = draws(softhard, emb, label, times=50, allow_self=False)
    assert (p == torch.arange(1, 16, 2)).all()


def test_hardest_skips_exact_duplicates():
    emb = normalise(torch.tensor([[1., 0.], [1., .1], [1., 0.], [1., .3], [0., 1.], [.1, 1.]]))
    t = hardest(emb, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert t.n[0] == 3                                     # row 2 is at distance zero


@pytest.mark.parametrize('name', MINERS)
def test_same_generator_same_triplets(name):
    emb,label = batch()
    one,two = (MINERS[name](emb, label, gen=generator(5), margin=.2) for _ in range(2))
    assert all(torch.equal(a, b) for a,b in zip(one, two))
    state = torch.get_rng_state()
    MINERS[name](emb, label, gen=generator(5), margin=.2)
    assert torch.equal(state, torch.get_rng_state())


def test_semihard_works_at_the_scale_of_a_collapsed_batch():
    "Distances near 0.001: a miner on inexact distances would leave the shell."
    emb,label = batch(pairs=20, classes=20, dim=64)
    emb = normalise(emb[:1] + .001*emb)
    _,n = draws(semihard, emb, label, times=50, margin=2e-4)
    for i,(_,ns) in enumerate(allowed('semihard', emb, label, margin=2e-4)): assert set(n[:,i].tolist()) <= set(ns)


def test_gradual_margin():
    assert [round(gradual_margin(e, 75, margin=.2), 4) for e in (0, 37, 74)] == [.2, .1135, .0513]
    assert gradual_margin(30, 60, margin=.2, schedule='linear') == pytest.approx(.1)
    assert gradual_margin(30, 60, margin=.2, schedule='const') == .2


@pytest.mark.parametrize('name', MINERS)
def test_a_batch_of_112_takes_under_2_ms(name):
    emb,label = batch(pairs=56, classes=56, dim=128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        times = []
        for i in range(30):
            gen = generator(i); start = time.perf_counter()
            MINERS[name](emb, label, gen=gen, margin=.2)
            times.append(time.perf_counter() - start)
    finally: torch.set_num_threads(threads)
    assert min(times) < .002                               # measured: about 0.5 ms; a loop over anchors takes 10 ms


def test_bad_batches_are_refused():
    emb,label = batch()
    with pytest.raises(ValueError, match='even number'): random_triplets(emb[:3], label[:3], gen=generator(0))
    with pytest.raises(ValueError, match='must share a class'):
        random_triplets(emb[:4], torch.tensor([0, 1, 1, 0]), gen=generator(0))
    with pytest.raises(ValueError, match='one label each'): random_triplets(emb, label[:-1], gen=generator(0))


def test_hardest_does_not_depend_on_the_scale_of_the_embeddings():
    emb,label = batch(seed=3)
    for scale in (1e-3, 1., 50., 1e6): assert torch.equal(hardest(scale*emb, label).n, hardest(emb, label).n)


@pytest.mark.parametrize('size', [1e-3, 1., 1e3])
def test_hardest_on_embeddings_of_any_length(size):
    "No number stands for infinity: raw embeddings may be farther apart than 2."
    emb, label = size*torch.randn(56, 6, generator=torch.Generator().manual_seed(0)), torch.arange(28).repeat_interleave(2)
    dist = torch.cdist(emb[::2].double(), emb.double()).masked_fill(label[::2,None] == label, math.inf)
    assert torch.equal(hardest(emb, label).n, dist.argmin(1))
