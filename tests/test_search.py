"""Neighbours and clusters against sorting, brute force and faiss."""
import math

import pytest
import torch

from robust_dml import neighbors as search
from robust_dml.triplets.distances import pairwise_distance, prepare
from robust_dml.neighbors import block_rows, cache_rows, distances, faiss_gpus, kmeans, knn, mask_rows_
from robust_dml.neighbors import resolve_backend, smallest, tally

BACKENDS = [
    'torch',
    pytest.param(
        'faiss', marks=pytest.mark.skipif(resolve_backend('auto') == 'torch', reason='faiss is not installed')
    ),
]


def gen(seed=0): return torch.Generator().manual_seed(seed)


def unit(n, d, seed=0, **kwargs): return torch.nn.functional.normalize(torch.randn(n, d, generator=gen(seed), **kwargs))


def brute(query, gallery, k, rows=None):
    "Rows by (distance in float64, row), the own one left out."
    def order(i):
        dist = (query[i].double() - gallery.double()).norm(dim=1).tolist()
        return sorted((j for j in range(len(gallery)) if rows is None or j != rows[i]), key=lambda j: (dist[j], j))[:k]
    return [order(i) for i in range(len(query))]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('block', [None, 1, 7, 1000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_knn_is_exact(backend, block, dtype):
    gallery, query = unit(90, 12, dtype=dtype), unit(20, 12, seed=1, dtype=dtype)
    dist, index = knn(query, gallery, k=6, backend=backend, block=block)
    assert index.tolist() == brute(query, gallery, 6) and dist.dtype == dtype
    torch.testing.assert_close(dist, (query[:,None] - gallery[index]).norm(dim=2), atol=2e-6, rtol=0)


@pytest.mark.parametrize('backend', BACKENDS)
def test_own_row_is_left_out_by_id(backend):
    gallery = unit(40, 8)
    gallery[7] = gallery[3]                                   # a duplicate
    rows = torch.randperm(40, generator=gen())[:15]
    rows[4], rows[5], rows[6] = -1, 3, 7
    query = gallery[rows.clamp(min=0)] + .01*unit(15, 8, seed=2)  # attacked: the own row need not be the nearest
    query[5] = query[6] = gallery[3]
    _, index = knn(query, gallery, k=4, rows=rows, backend=backend)
    assert index.tolist() == brute(query, gallery, 4, rows.tolist())
    assert (index[5,0], index[6,0]) == (7, 3) and not (index == rows[:,None]).any()


@pytest.mark.parametrize('backend', BACKENDS)
def test_all_but_the_own_row_can_be_asked_for(backend):
    emb = unit(12, 4)
    assert knn(emb, emb, k=11, rows=torch.arange(12), backend=backend)[1].sort(1).values.tolist() == [
        [j for j in range(12) if j != i] for i in range(12)
    ]


@pytest.mark.parametrize('backend', BACKENDS)
def test_knn_of_a_nearly_collapsed_model(backend):
    "Differences of 1e-4 around one point of length one: expanding the square in float32 would leave noise only."
    emb = unit(1, 64).repeat(2000, 1) + 1e-4*unit(2000, 64, seed=1)
    _, index = knn(emb, emb, k=3, rows=torch.arange(2000), backend=backend)
    dist = torch.cdist(emb.double(), emb.double(), compute_mode='donot_use_mm_for_euclid_dist').fill_diagonal_(math.inf)
    assert (index == dist.topk(3, largest=False).indices).float().mean() > .99
    easy = (2 - 2*emb@emb.T).fill_diagonal_(math.inf)
    assert (easy.topk(3, largest=False).indices == index).float().mean() < .1


@pytest.mark.parametrize('backend', BACKENDS)
def test_equal_neighbours_come_in_gallery_order(backend):
    "Eight corners of a cube around the query among far items: equal distances, but not to the last bit in faiss."
    corners = torch.cartesian_prod(*[torch.tensor([1., -1])]*3)
    gallery = torch.cat([corners, 9 + unit(40, 3)])[torch.randperm(48, generator=gen())]
    assert (
        knn(torch.zeros(1, 3), gallery, k=8, backend=backend)[1][0].tolist()
        == (gallery.abs() == 1).all(1).nonzero()[:, 0].tolist()
    )


def test_ties_go_to_the_lower_row():
    values = torch.randint(4, (50, 30), generator=gen()).float()
    value, index = smallest(values, 9)
    order = values.sort(dim=1, stable=True)
    assert torch.equal(value, order.values[:,:9]) and torch.equal(index, order.indices[:,:9])
    point = unit(1, 16)
    assert knn(point, point.repeat(70, 1), k=5)[1].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize('k', [1, 4, 17, 30])
def test_smallest_where_only_some_rows_are_tied_at_the_last_place(k):
    values = torch.rand(400, 30, generator=gen())
    values[::3] = values[::3].mul(6).floor()
    values[1::3,7] = math.inf
    order = values.sort(dim=1, stable=True)
    value, index = smallest(values, k)
    assert torch.equal(value, order.values[:,:k]) and torch.equal(index, order.indices[:,:k])


def test_mask_rows_in_place():
    dist = torch.zeros(3, 4)
    masked = mask_rows_(dist, torch.tensor([0, -1, 3]))
    assert masked is dist and dist.isinf().nonzero().tolist() == [[0, 0], [2, 3]]


@pytest.mark.parametrize('test', [torch.lt, torch.le, torch.eq])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_tally(test, dtype):
    dist = torch.randint(6, (40, 25), generator=gen()).to(dtype)
    than = torch.randint(6, (40, 1), generator=gen(1)).to(dtype)
    assert tally(test, dist, than, torch.empty_like(dist)).tolist() == test(dist, than).sum(1).tolist()


def test_tally_beyond_the_whole_numbers_of_float32():
    dist = torch.zeros(1, 2**24 + 3)
    assert tally(torch.lt, dist, torch.ones(1, 1), torch.empty_like(dist)).item() == 2**24 + 3


@pytest.mark.parametrize('columns', [1, 7, 64, 1000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_tiles_do_not_change_distances(columns, dtype):
    gallery = unit(90, 12, dtype=dtype)
    gallery[50] = gallery[3] + 1e-4                                # a close pair in another tile
    query = torch.cat([gallery[:4], unit(5, 12, 1, dtype=dtype)])
    dist = distances(query, prepare(gallery), columns=columns)
    naive = (query.double()[:,None] - gallery.double()).norm(dim=2)
    assert dist.dtype == dtype and (dist[range(4),range(4)] == 0).all()
    torch.testing.assert_close(dist.double(), naive, atol=1e-6, rtol=0)
    if columns >= 90: assert torch.equal(dist, pairwise_distance(query, gallery))


def test_blocks_are_small(monkeypatch):
    sizes, inner = [], search.pairwise_distance
    monkeypatch.setattr(search, 'pairwise_distance', lambda u, v: sizes.append((len(u), len(v.emb))) or inner(u, v))
    knn(unit(12_000, 2), unit(3000, 2), k=1)
    assert (
        sum(u * v for u, v in sizes) == 36_000_000
        and {v for _, v in sizes} == {2048, 952}
        and {u for u, _ in sizes} == {512, 12_000 % 512}
    )
    assert [block_rows(n) for n in (100, 2048, 3000, 10**5, 10**9)] == [2**20//100, 512, 512, 2**25//10**5, 1]
    assert (
        cache_rows(torch.empty(50, 60_000)) == 2**21 // 60_000
        and cache_rows(torch.empty(5, 3000)) == 5
        and cache_rows(torch.empty(5, 2**22)) == 1
    )


def test_small_parts_give_the_same_neighbours(monkeypatch):
    emb = unit(60, 5).round(decimals=1)                            # ties
    whole = knn(emb, emb, k=7, rows=torch.arange(60))
    monkeypatch.setattr(search, 'cache_rows', lambda dist: 3)
    for mine, theirs in zip(knn(emb, emb, k=7, rows=torch.arange(60), block=20), whole):
        assert torch.equal(mine, theirs)


def test_auto_takes_faiss_only_where_it_works(monkeypatch):
    """On a GPU faiss has to have been built for it; the one number that says so is replaced, as there may be no GPU
    here."""
    faiss = pytest.importorskip('faiss')
    assert faiss_gpus('cpu') == 0
    for gpus, backend in ((0, 'torch'), (2, 'faiss')):
        monkeypatch.setattr(faiss, 'get_num_gpus', lambda: gpus)
        assert faiss_gpus('cuda:1') == gpus and faiss_gpus('cpu') == 0
        assert (
            resolve_backend('auto', 'cuda') == backend
            and resolve_backend('auto', torch.device('cpu')) == resolve_backend('auto') == 'faiss'
        )
        assert resolve_backend('faiss', 'cuda') == 'faiss' and resolve_backend('torch', 'cuda') == 'torch'


@pytest.mark.parametrize('call,message', [
    (lambda e: knn(e, e, k=0), r'k must lie in \[1, 10\]'),
    (lambda e: knn(e, e, k=10, rows=torch.arange(10)), r'k must lie in \[1, 9\]'),
    (lambda e: knn(e, e, k=1, rows=torch.arange(9)), r'one integer per query \(10\)'),
    (lambda e: knn(e, e, k=1, rows=torch.arange(10) + 1), r'rows must lie in \[-1, 9\], found \[1, 10\]'),
    (lambda e: knn(e*math.inf, e, k=1), 'query must be finite'),
    (lambda e: knn(e, e.long(), k=1), 'gallery must be a float tensor'),
    (lambda e: knn(e[:0], e, k=1), 'query must be a float tensor of shape'),
    (lambda e: knn(e, e, k=1, backend='gpu'), "backend must be one of 'auto', 'torch', 'faiss', found 'gpu'"),
    (lambda e: kmeans(e, k=11), r'k must lie in \[1, 10\], found 11'),
    (lambda e: kmeans(e, k=2, niter=0), 'niter must lie in'),
    (lambda e: kmeans(e, k=2, nredo=0), 'nredo must lie in')])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call(unit(10, 4))


def test_finite_numbers_with_an_infinite_sum_pass():
    large = torch.full((10, 4), 3e38)
    assert search.check_embeddings('emb', large) is large
    large[3,2], large[4,1] = math.inf, -math.inf
    with pytest.raises(ValueError, match='emb must be finite, found 2'): search.check_embeddings('emb', large)


def groups(k, per, spread, seed=0, d=16):
    label = torch.arange(k).repeat_interleave(per)
    return unit(k, d, seed)[label] + spread*torch.randn(k*per, d, generator=gen(seed + 1)), label


@pytest.mark.parametrize('backend', BACKENDS)
def test_kmeans_finds_separate_groups(backend):
    emb, label = groups(4, 30, .02)
    cluster = kmeans(emb, k=4, nredo=40, backend=backend).view(4, 30)
    assert (cluster == cluster[:,:1]).all() and cluster[:,0].unique().numel() == 4


@pytest.mark.parametrize('backend', BACKENDS)
def test_kmeans_is_deterministic_and_seeded(backend):
    emb, _ = groups(12, 15, .2)
    state = torch.get_rng_state()
    first = kmeans(emb, k=12, backend=backend)
    assert torch.equal(first, kmeans(emb, k=12, backend=backend)) and torch.equal(state, torch.get_rng_state())
    assert any(not torch.equal(first, kmeans(emb, k=12, seed=s, backend=backend)) for s in range(3))


def error(emb, cluster):
    return sum(((emb[cluster == c] - emb[cluster == c].mean(0))**2).sum().item() for c in cluster.unique())


def test_kmeans_is_a_fixed_point():
    "After convergence every item is nearest to the mean of its own cluster."
    emb, _ = groups(6, 40, .15)
    cluster = kmeans(emb, k=6, niter=200)
    means = torch.stack([emb[cluster == c].mean(0) for c in range(6)])
    assert torch.equal(cluster, torch.cdist(emb, means, compute_mode='donot_use_mm_for_euclid_dist').argmin(1))


def test_more_starts_and_rounds_do_not_hurt():
    emb, _ = groups(12, 15, .2)
    errors = [error(emb, kmeans(emb, k=12, nredo=n, niter=100)) for n in (1, 3, 12)]
    assert errors[0] >= errors[1] >= errors[2] and errors[0] > errors[2]
    assert error(emb, kmeans(emb, k=12, niter=1)) > errors[0]


def test_kmeans_matches_scikit_learn():
    cluster = pytest.importorskip('sklearn.cluster')
    emb, _ = groups(5, 60, .15)
    theirs = cluster.KMeans(5, n_init=5, random_state=0).fit(emb.numpy()).inertia_
    assert error(emb, kmeans(emb, k=5, nredo=6, niter=50)) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('distinct', [1, 3])
def test_kmeans_with_fewer_distinct_items_than_clusters(backend, distinct):
    "Empty clusters are unavoidable here: equal items stay together."
    emb = unit(distinct, 8).repeat(10, 1)
    cluster = kmeans(emb, k=5, backend=backend)
    assert torch.equal(cluster, cluster[:distinct].repeat(10)) and cluster.unique().numel() <= distinct
    assert len(set(kmeans(emb[:distinct], k=distinct, backend=backend).tolist())) == distinct


def test_empty_clusters_take_the_farthest_items():
    emb = torch.tensor([[0., 0], [0, 2], [4, 0], [9, 9], [0, 0]])
    means = search._centroids(emb, torch.tensor([0, 0, 2, 2, 0]), torch.tensor([1., 3., 5., 6., 0.]), 5)
    torch.testing.assert_close(means, torch.tensor([[0, 2/3], [9, 9], [6.5, 4.5], [4, 0], [0, 2]]))


def test_kmeans_trains_on_256_items_per_centroid(monkeypatch):
    seen, inner = [], search._lloyd
    monkeypatch.setattr(search, '_lloyd', lambda emb, *args: seen.append(len(emb)) or inner(emb, *args))
    assert len(kmeans(unit(2000, 4), k=3)) == 2000 and len(kmeans(unit(700, 4), k=3)) == 700
    assert seen == [768, 700]
