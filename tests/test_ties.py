"""One ranking for one set of embeddings: ties, near-ties, sizes far from one and half precision, in every search and
measure."""
import math

import pytest
import torch
from torch.nn.functional import normalize

from robust_dml.attacks.suite import Gallery, first_hit, members
from robust_dml.metrics.clustering import centre_measure, clusters
from robust_dml.metrics.retrieval import benign, first_match_rank, match_places, nmi, rankings, recall_at_k, retrieval
from robust_dml.neighbors import Near, distances, in_range, kmeans, knn, knn_shards, nearest_settled, resolve_backend
from robust_dml.neighbors import smallest_settled
from robust_dml.triplets.distances import exact_distances, exact_paired, prepare

BACKENDS = [
    'torch',
    pytest.param('faiss', marks=pytest.mark.skipif(resolve_backend('auto') == 'torch', reason='faiss is missing')),
]
DTYPES = [torch.float32, torch.float64]


def gen(seed=0): return torch.Generator().manual_seed(seed)


def codes(n=400, dim=48, seed=0, dtype=torch.float32, unit=True):
    "Codes of ±1, most of them at distances that many others have too."
    code = torch.randn(n, dim, generator=gen(seed)).sign().to(dtype)
    return normalize(code) if unit else code


def labels(n=400, classes=12): return torch.randint(classes, (n,), generator=gen(9))


def whole(emb):
    "Codes as whole numbers: squared distances of these are exact."
    return emb.sign().double()


def truth(query, gallery, own=True):
    "Columns of every row by (distance in whole numbers, column), the own one last."
    square = (query[:,None] - gallery).square().sum(2)
    if own: square.fill_diagonal_(math.inf)
    return square.sort(dim=1, stable=True).indices


def ranks(order, label):
    "First match and average precision by a plain loop."
    rank, ap = [], []
    for i, row in enumerate(order[:, :-1].tolist()):
        hit = [place for place, j in enumerate(row) if label[j] == label[i]]
        rank.append(hit[0])
        ap.append(sum((n + 1)/(place + 1) for n, place in enumerate(hit))/len(hit))
    return torch.tensor(rank), torch.tensor(ap)


@pytest.mark.parametrize('unit', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
def test_measures_of_codes_do_not_depend_on_blocks(dtype, unit):
    emb, label = codes(dtype=dtype, unit=unit), labels()
    rank, ap = ranks(truth(whole(emb), whole(emb)), label)
    for block in (None, 1, 3, 64, 400):
        found = retrieval(emb, label, block=block)
        assert torch.equal(found.rank, rank) and torch.equal(first_match_rank(emb, label, block=block), rank)
        torch.testing.assert_close(found.ap, ap, atol=1e-6, rtol=0)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_neighbours_of_codes_do_not_depend_on_blocks_or_shards(dtype, backend):
    emb, rows = codes(dtype=dtype), torch.arange(400)
    order = truth(whole(emb), whole(emb))
    for k in (1, 7, 60):
        for block in (None, 1, 33):
            found = knn(emb, emb, k=k, rows=rows, backend=backend, block=block)[1]
            assert torch.equal(found, order[:, :k]), (k, block)
        shards = knn_shards(emb, emb.split(90), k=k, rows=rows, backend=backend)[1]
        assert torch.equal(shards, order[:, :k])


@pytest.mark.parametrize('dtype', DTYPES)
def test_all_searches_know_one_r_at_1(dtype):
    emb, label = codes(dtype=dtype), labels()
    expected = 100*(ranks(truth(whole(emb), whole(emb)), label)[0] == 0).double().mean().item()
    rows = torch.arange(len(emb))
    gallery = Gallery(emb, label)
    hits = torch.cat([first_hit(q.emb, q, q.row, gallery) for q in (members(gallery, r) for r in rows.split(37))])
    nearest = label[knn(emb, emb, k=1, rows=rows)[1][:, 0]] == label
    found = (
        hits.double().mean().item(), 100*nearest.double().mean().item(), 100*recall_at_k(emb, label, k=1),
        benign(emb, label, backend='torch')['R@1']
    )
    assert found == pytest.approx([expected]*4, abs=1e-9)


@pytest.mark.parametrize('spread', [1e-3, 1e-5, 1e-6])
def test_a_nearly_collapsed_embedding_has_one_r_at_1(spread):
    centre = normalize(torch.randn(1, 64, generator=gen(1)))
    label = torch.arange(120)//4
    kind = torch.randn(30, 64, generator=gen(2))[label] + .3*torch.randn(120, 64, generator=gen(3))
    emb = centre + spread*kind
    gallery = Gallery(emb, label)
    exact = (emb.double()[:,None] - emb.double()).norm(dim=2).fill_diagonal_(math.inf)
    expected = 100*(label[exact.argmin(1)] == label).double().mean().item()
    queries = members(gallery, torch.arange(120))
    assert first_hit(emb, queries, queries.row, gallery).double().mean().item() == pytest.approx(expected)
    assert 100*recall_at_k(emb, label, k=1) == pytest.approx(expected) and expected > 50


def near_ties(dtype):
    "Items on a sphere around each query: their distances differ by rounding and little more."
    query = torch.randn(5, 40, generator=gen(4), dtype=torch.float64)
    turn = normalize(torch.randn(300, 40, generator=gen(5), dtype=torch.float64))
    far = 1 + 1e-8*torch.randperm(300, generator=gen())[:,None]
    return query.to(dtype), (query[:1] + turn*far).to(dtype)


@pytest.mark.parametrize('columns', [7, 100, 2048])
@pytest.mark.parametrize('dtype', DTYPES)
def test_near_ties_are_settled_by_difference(dtype, columns):
    query, gallery = near_ties(dtype)
    exact = torch.stack([exact_paired(q.expand_as(gallery), gallery) for q in query])
    assert torch.equal(exact_distances(query, gallery, columns=columns), exact)
    order = exact.sort(dim=1, stable=True).indices
    product, near = distances(query, prepare(gallery), columns=columns), Near(query, prepare(gallery))
    for k in (1, 5, 18, 299): assert torch.equal(smallest_settled(product, near, k)[1], order[:, :k])
    assert torch.equal(nearest_settled(product, near)[1], order[:, 0])
    column = torch.randperm(300, generator=gen(6))[None].expand(5, 300)
    places = order.argsort(1).gather(1, column)
    for limit in (0, 300): assert torch.equal(match_places(product, column, near, count_up_to=limit), places)
    few = column[:, :6]
    assert torch.equal(match_places(product, few, near), order.argsort(1).gather(1, few))
    if dtype == torch.float32: assert not torch.equal(product[0].argsort(stable=True), order[0])  # the test bites


def test_rows_by_product_and_by_difference_are_the_same_numbers():
    for kind in (lambda x: x, torch.sign, lambda x: 1 + 1e-3*x, lambda x: x.exp()**2, lambda x: x.relu()):
        x = kind(torch.randn(300, 33, generator=gen(7)))
        x[7] = x[3]
        pairs = exact_paired(x[:40,None].expand(40, 300, 33), x.expand(40, 300, 33))
        assert torch.equal(exact_distances(x[:40], x), pairs)


@pytest.mark.parametrize('size', [1e-38, 1e-30, 1e-10, 1., 1e10, 1e19, 1e37])
def test_no_ranking_depends_on_the_size_of_the_embeddings(size):
    emb, label = torch.randn(90, 12, generator=gen(8)), torch.randint(9, (90,), generator=gen(9))
    expected, rows = retrieval(emb, label), torch.arange(90)
    scaled = (emb.double()*size).float()
    found = retrieval(scaled, label)
    assert torch.equal(found.rank, expected.rank)
    torch.testing.assert_close(found.ap, expected.ap)
    for backend in ('torch', resolve_backend('auto')):
        dist, index = knn(scaled, scaled, k=5, rows=rows, backend=backend)
        value, order = knn(emb, emb, k=5, rows=rows, backend=backend)
        assert torch.equal(index, order)
        torch.testing.assert_close(dist.double()/size, value.double(), rtol=1e-5, atol=0)
        assert torch.equal(
            kmeans(scaled, k=9, seed=1, backend=backend), kmeans(in_range(scaled)[0][0], k=9, seed=1, backend=backend)
        )
        assert nmi(scaled, label, backend=backend) == pytest.approx(nmi(emb, label, backend=backend), abs=.15)
    member = clusters(scaled, k=9, seed=1, restarts=2, backend='torch').member
    assert torch.equal(member, clusters(emb, k=9, seed=1, restarts=2, backend='torch').member)
    assert 0 <= benign(scaled, label, backend='torch')['mAP'] <= 100


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_the_numbers_that_it_holds(dtype, backend):
    emb, label = normalize(torch.randn(700, 32, generator=gen(2))).to(dtype), labels(700)
    full, rows = emb.float(), torch.arange(700)
    dist, index = knn(emb, emb, k=9, rows=rows, backend=backend)
    value, order = knn(full, full, k=9, rows=rows, backend=backend)
    assert dist.dtype == torch.float32 and torch.equal(index, order) and torch.equal(dist, value)
    assert torch.equal(knn_shards(emb, emb.split(300), k=9, rows=rows, backend=backend)[1], order)
    assert torch.equal(kmeans(emb, k=5, backend=backend), kmeans(full, k=5, backend=backend))
    assert torch.equal(*(clusters(x, k=5, seed=0, restarts=2, backend=backend).member for x in (emb, full)))
    assert retrieval(emb, label).ap.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(retrieval(emb, label), retrieval(full, label)))
    assert benign(emb, label, backend=backend) == benign(full, label, backend=backend)


def test_nearest_centres_are_exact():
    centre = codes(30, 16, seed=3)
    emb = codes(200, 16, seed=4)
    square = (whole(emb)[:,None] - whole(centre)).square().sum(2)
    found = centre_measure(emb, None, dict(centre=centre, own=square.argmin(1)), None, name='x')['x']
    assert (found == 100).all()


def test_rankings_hand_over_what_settles_them():
    emb, label = codes(60), labels(60)
    for which, dist, column, near in rankings(emb, label, block=7):
        assert torch.equal(near.query, emb[which]) and near.rows(dist).isinf().sum() == len(which)
