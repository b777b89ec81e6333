"Distances against float64 differences, finite differences and PyTorch's own functions."
import pytest
import torch
from torch.nn import functional as F

from robust_dml.triplets.distances import _distance_matrix, distance_and_gradient, hardness, normalise
from robust_dml.triplets.distances import paired_distance, pairwise_distance, prepare, triplet_loss


def cloud(n, spread, seed=0, dim=128):
    "Unit vectors around one point, at distances of about `spread`."
    gen = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, dim, generator=gen, dtype=torch.float64)
    return normalise(
        normalise(centre) + spread / (2 * dim) ** 0.5 * torch.randn(n, dim, generator=gen, dtype=torch.float64)
    ).float()


def truth(u, v):
    "Distances by differences in float64."
    return (u.double()[:,None] - v.double()[None]).norm(dim=-1)


def relative_error(u, v):
    expected = truth(u, v)
    error = ((pairwise_distance(u, v).double() - expected).abs()/expected.clamp(min=1e-12))[expected > 0]
    return error.max().item()


@pytest.mark.parametrize('spread', [1., .2, .0014, 1e-5])
def test_relative_error_of_a_shrunken_batch(spread):
    # 1e-5: float32 resolves 6e-8 of 25 times the squared distance where the product is used, a few times over
    assert relative_error(cloud(150, spread), cloud(150, spread)) < 1e-5


def test_cdist_would_fail_the_same_test():
    emb = cloud(150, .0014)
    off = ~torch.eye(150, dtype=torch.bool)
    assert ((torch.cdist(emb, emb).double() - truth(emb, emb)).abs()/truth(emb, emb))[off].max() > .1


def test_relative_error_of_mixed_scales():
    "Tight clusters far apart, a lone far row, and a query far from a collapsed gallery."
    clusters = torch.cat([cloud(40, .001, seed) for seed in range(4)])
    assert relative_error(clusters, clusters) < 1e-5
    outlier = torch.cat([cloud(60, .0014), -cloud(1, .0014)])
    assert relative_error(outlier, outlier) < 1e-5
    assert relative_error(-cloud(5, .0014), cloud(60, .0014)) < 1e-5


@pytest.mark.parametrize('close', [.05, .1, .14, .15, .2])
def test_relative_error_around_the_switch_between_both_formulas(close):
    base = cloud(64, 1.5)
    assert relative_error(normalise(base + close*cloud(64, 1.5, seed=1)), base) < 1e-5


def test_centring_leaves_only_the_diagonal_of_a_collapsed_batch_to_the_slow_way():
    emb = cloud(150, .0014)
    *_,pairs = _distance_matrix(emb, prepare(emb))
    assert pairs.tolist() == [[i, i] for i in range(150)]


def test_equal_rows_are_at_exactly_zero():
    emb = normalise(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    assert (pairwise_distance(emb, emb).diagonal() == 0).all()
    assert (pairwise_distance(emb[:1].expand(4, 64), emb[:1].expand(3, 64)) == 0).all()


def test_more_rows_than_the_centre_is_taken_from():
    u,v = cloud(3, 1.), cloud(2500, .01, seed=1)
    assert relative_error(u, v) < 1e-5


@pytest.mark.parametrize('needs', [(True, False), (False, True), (True, True)])
def test_gradcheck(needs):
    gen = torch.Generator().manual_seed(0)
    u,v = (torch.randn(n, 6, generator=gen, dtype=torch.float64, requires_grad=r) for n,r in zip((4, 5), needs))
    assert torch.autograd.gradcheck(pairwise_distance, (u, v))


def test_gradient_of_a_batch_against_itself():
    emb = cloud(20, .5).double().requires_grad_()
    weight = torch.rand(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, = torch.autograd.grad((pairwise_distance(emb, emb)*weight).sum(), emb)
    diff = emb[:,None] - emb[None]
    slow, = torch.autograd.grad((torch.linalg.vector_norm(diff, dim=-1)*weight).sum(), emb)
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)


def test_gradient_of_a_collapsed_batch_in_float32():
    emb = cloud(60, .0014)
    weight = torch.rand(60, 60, generator=torch.Generator().manual_seed(1)).fill_diagonal_(0.)
    def grad(x, dist): return torch.autograd.grad((dist(x)*weight.to(x.dtype)).sum(), x)[0]
    ours = grad(emb.clone().requires_grad_(), lambda x: pairwise_distance(x, x.detach()))
    exact = grad(
        emb.double().requires_grad_(), lambda x: torch.linalg.vector_norm(x[:, None] - x.detach()[None], dim=-1)
    )
    assert (ours - exact).norm() < 1e-4*exact.norm()


def test_fully_collapsed_batch_has_zero_gradient():
    emb = torch.ones(6, 4).requires_grad_()
    pairwise_distance(emb, emb).sum().backward()
    assert (emb.grad == 0).all()


def test_ignore_below_drops_only_close_pairs():
    u = torch.zeros(1, 3).requires_grad_()
    v = torch.tensor([[1e-8, 0., 0.], [0., 2., 0.]])
    near_and_far, = torch.autograd.grad(pairwise_distance(u, v).sum(), u)
    far, = torch.autograd.grad(pairwise_distance(u, v, ignore_below=1e-6).sum(), u)
    torch.testing.assert_close(far, torch.tensor([[0., -1., 0.]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(near_and_far, torch.tensor([[-1., -1., 0.]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize('spread', [1., .01, .0014])
def test_float32_gradient_with_near_duplicates(spread):
    "One gallery row a hair's breadth away must not spoil the pull of all the others."
    v = cloud(80, spread)
    u = v[:10] + 1e-6*torch.randn(10, 128, generator=torch.Generator().manual_seed(5))
    def grad(u, v, dist): return torch.autograd.grad(dist(u, v).sum(), (u, v))
    ours = grad(u.clone().requires_grad_(), v.clone().requires_grad_(), pairwise_distance)
    exact = grad(
        u.double().requires_grad_(), v.double().requires_grad_(),
        lambda u, v: torch.linalg.vector_norm(u[:, None] - v[None], dim=-1)
    )
    for a,b in zip(ours, exact): assert (a - b).norm(dim=1).max() < 1e-4*b.norm(dim=1).min()


def test_rotation_shift_and_permutation():
    u,v = cloud(10, 1.).double(), cloud(12, 1., seed=1).double()
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[
        0
    ]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    dist = pairwise_distance(u, v)
    torch.testing.assert_close(pairwise_distance(u@rotation, v@rotation), dist, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairwise_distance(u + 1, v + 1), dist, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairwise_distance(u, v[order]), dist[:,order], rtol=1e-12, atol=1e-12)


def test_autocast_and_half_precision_give_float32():
    u,v = cloud(5, .3), cloud(6, .3)
    with torch.autocast('cpu', dtype=torch.bfloat16): dist = pairwise_distance(u, v)
    assert torch.equal(dist, pairwise_distance(u, v))
    half = u.bfloat16()
    assert torch.equal(pairwise_distance(half, half), pairwise_distance(half.float(), half.float()))
    assert paired_distance(half, half).dtype == torch.float32


def test_backward_under_autocast_stays_in_float32():
    u,v = cloud(5, 1.).requires_grad_(), cloud(6, 1., seed=1)
    plain, = torch.autograd.grad(pairwise_distance(u, v).sum(), u)
    with torch.autocast('cpu', dtype=torch.bfloat16): cast, = torch.autograd.grad(pairwise_distance(u, v).sum(), u)
    assert torch.equal(plain, cast)


def test_inputs_are_not_modified():
    u,v = cloud(5, .1), cloud(6, .1)
    copies = u.clone(), v.clone()
    pairwise_distance(u, v); normalise(u); paired_distance(u, u)
    assert torch.equal(u, copies[0]) and torch.equal(v, copies[1])


def test_paired_distance_is_the_diagonal_and_matches_torch():
    u,v = cloud(30, 1.), cloud(30, 1., seed=1)
    torch.testing.assert_close(paired_distance(u, v).double(), truth(u, v).diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(paired_distance(u, v, offset=1e-6), F.pairwise_distance(u, v), rtol=1e-6, atol=0)
    w = u.clone().requires_grad_()
    start, = torch.autograd.grad(paired_distance(w, u, offset=1e-6).sum(), w)
    reference, = torch.autograd.grad(F.pairwise_distance(w, u).sum(), w)
    torch.testing.assert_close(start, reference)
    assert start.abs().min() > 0                             # the offset gives a first direction


def test_triplet_loss_values_and_gradient():
    ap,an = torch.tensor([.30, .60, .90, .20], requires_grad=True), torch.tensor([.50, .55, 1., .70])
    torch.testing.assert_close(hardness(ap, an), torch.tensor([-.20, .05, -.10, -.50]))
    loss = triplet_loss(ap, an, margin=.2)
    torch.testing.assert_close(loss, torch.tensor([0., .25, .10, 0.]), rtol=1e-5, atol=1e-7)
    loss.sum().backward()
    assert ap.grad[1:].tolist() == [1., 1., 0.]


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match='same D'): pairwise_distance(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match='one dtype'): pairwise_distance(torch.zeros(2, 3), torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match='must match'): paired_distance(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match='must match'): triplet_loss(torch.zeros(2), torch.zeros(3), margin=.2)


@pytest.mark.parametrize('spread', [1., .0014])
def test_a_prepared_gallery_and_the_gradient_without_a_graph_change_nothing(spread):
    gallery = cloud(70, spread)
    query = (gallery[:9] + .1*spread*cloud(9, spread, seed=1)).requires_grad_()
    weight = torch.rand(9, 70, generator=torch.Generator().manual_seed(2))
    plain = pairwise_distance(query, gallery, ignore_below=1e-6)
    dist, gradient = distance_and_gradient(query, prepare(gallery), ignore_below=1e-6)
    assert torch.equal(dist, plain.detach()) and torch.equal(pairwise_distance(query, prepare(gallery)), plain)
    expected, = torch.autograd.grad((weight*plain).sum(), query)
    assert not gradient(weight).requires_grad and torch.equal(gradient(weight), expected)


def test_a_row_at_the_centre_of_identical_rows_has_distance_and_gradient_zero():
    same = torch.ones(4, 3)
    dist, gradient = distance_and_gradient(same[:2], prepare(same))
    assert (dist == 0).all() and (gradient(torch.ones(2, 4)) == 0).all()


def test_rows_of_very_different_length_keep_their_precision():
    gen = torch.Generator().manual_seed(0)
    v = torch.randn(60, 32, generator=gen)*torch.logspace(-3, 3, 60)[:,None]
    u = v[::7] + .01*v[::7].norm(dim=1, keepdim=True)*torch.randn(9, 32, generator=gen)
    truth = (u.double()[:,None] - v.double()).norm(dim=2)
    assert ((pairwise_distance(u, v).double() - truth)/truth).abs().max() < 2e-5
