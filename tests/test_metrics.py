"""Retrieval and clustering measures against loops, scikit-learn and pytorch-metric-learning."""
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from robust_dml.data import archives, sets as data
from robust_dml.metrics import retrieval as metrics
from robust_dml.models import networks as models
from robust_dml.metrics.retrieval import average_precision, benign, first_match_rank, lone_queries, match_places
from robust_dml.metrics.retrieval import mean_average_precision, mean_average_precision_at_r, nmi
from robust_dml.metrics.retrieval import normalised_mutual_information, rankings, recall_at_k, retrieval


def gen(seed=0): return torch.Generator().manual_seed(seed)


def unit(n, d, seed=0, **kwargs): return torch.nn.functional.normalize(torch.randn(n, d, generator=gen(seed), **kwargs))


def sample(n=60, classes=25, d=6, seed=0):
    "Embeddings in float64 with labels, some classes of one image."
    return unit(n, d, seed, dtype=torch.float64), torch.randint(classes, (n,), generator=gen(seed + 1))


def ranking(query, label, gallery, gallery_label, own):
    "Matches of each query along its ranking, by Python's sort."
    for q, y, row in zip(query, label.tolist(), own):
        dist = (q - gallery).norm(dim=1).tolist()
        order = sorted((j for j in range(len(gallery)) if j != row), key=lambda j: (dist[j], j))
        yield [int(gallery_label[j]) == y for j in order]


def naive(query, label, gallery, gallery_label, own):
    "Rank, AP and AP@R of each query; -1 and NaN where nothing matches."
    ranks, aps, at_r = [], [], []
    for hits in ranking(query, label, gallery, gallery_label, own):
        places = [p for p, hit in enumerate(hits, 1) if hit]
        terms = [j/p for j, p in enumerate(places, 1)]
        ranks.append(places[0] - 1 if places else -1)
        aps.append(sum(terms)/len(places) if places else math.nan)
        at_r.append(sum(t for t, p in zip(terms, places) if p <= len(places))/len(places) if places else math.nan)
    return torch.tensor(ranks), torch.tensor(aps), torch.tensor(at_r)


def same(a, b): torch.testing.assert_close(a.double(), b.double(), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_six_points_on_the_circle(dtype):
    angle = torch.tensor([0., 20, 50, 90, 130, 200], dtype=torch.float64).deg2rad()
    emb, label = torch.stack([angle.cos(), angle.sin()], 1).to(dtype), torch.tensor([0, 0, 1, 1, 2, 2])
    assert first_match_rank(emb, label).tolist() == [0, 0, 1, 0, 1, 0]
    assert recall_at_k(emb, label, k=(1, 2)) == {1: pytest.approx(4/6), 2: 1.}
    assert average_precision(emb, label).tolist() == [1, 1, .5, 1, .5, 1]
    assert mean_average_precision(emb, label) == pytest.approx(5/6)


@pytest.mark.parametrize('block', [None, 1, 13])
@pytest.mark.parametrize('seed', range(4))
def test_leave_one_out_against_loops(seed, block):
    emb, label = sample(seed=seed)
    rank, ap, at_r = naive(emb, label, emb, label, range(60))
    assert (rank < 0).any() and (rank >= 0).any()
    assert torch.equal(first_match_rank(emb, label, block=block), rank)
    same(average_precision(emb, label, block=block), ap)
    same(average_precision(emb, label, at_r=True, block=block), at_r)
    assert recall_at_k(emb, label, k=3, block=block) == pytest.approx(
        (rank[rank >= 0] < 3).double().mean().item(), abs=1e-12
    )
    assert mean_average_precision(emb, label, block=block) == pytest.approx(ap.nanmean().item(), abs=1e-6)
    assert mean_average_precision_at_r(emb, label, block=block) == pytest.approx(at_r.nanmean().item(), abs=1e-6)
    assert lone_queries(label) == int((rank < 0).sum())


def test_separate_gallery_with_some_own_rows():
    gallery, gallery_label = sample(seed=1)
    rows = torch.tensor([3, -1, 10, -1, 59, 0])
    query = gallery[rows.clamp(min=0)] + .3*unit(6, 6, 9, dtype=torch.float64)
    label = gallery_label[torch.tensor([3, 5, 10, 2, 59, 0])]
    rank, ap, _ = naive(query, label, gallery, gallery_label, rows.tolist())
    assert torch.equal(first_match_rank(query, label, gallery, gallery_label, rows=rows, block=4), rank)
    same(average_precision(query, label, gallery, gallery_label, rows=rows, block=4), ap)
    without = naive(query, label, gallery, gallery_label, [-1]*6)[0]
    assert torch.equal(first_match_rank(query, label, gallery, gallery_label), without) and not torch.equal(
        without, rank
    )


def test_drop_first_is_the_rule_of_the_reference():
    emb, label = sample()
    emb[41], label[41], label[5] = emb[5], 3, 4                        # a duplicate under another label
    reference = []
    for i in range(60):
        order = (emb[i] - emb).norm(dim=1).sort(stable=True).indices[1:]  # the smallest goes, whatever it is
        hits = (label[order] == label[i]).nonzero()
        reference.append(int(hits[0]) if len(hits) else -1)
    assert first_match_rank(emb, label, self_exclusion='drop_first').tolist() == reference
    assert first_match_rank(emb, label).tolist() == naive(emb, label, emb, label, range(60))[0].tolist() != reference
    # attacked queries: the nearest item is not the own one
    far = emb + 2*unit(60, 6, 3, dtype=torch.float64)
    args = (far, label, emb, label)
    assert not torch.equal(
        first_match_rank(*args, rows=torch.arange(60)),
        first_match_rank(*args, rows=torch.arange(60), self_exclusion='drop_first')
    )
    # queries from outside: nothing to drop
    assert torch.equal(first_match_rank(*args), first_match_rank(*args, self_exclusion='drop_first'))


def test_ties_count_in_gallery_order():
    emb, label = torch.ones(6, 3), torch.tensor([0, 1, 1, 0, 2, 2])
    assert first_match_rank(emb, label).tolist() == [2, 1, 1, 0, 4, 4]
    same(average_precision(emb, label), torch.tensor([1/3, 1/2, 1/2, 1, 1/5, 1/5]))


def grid(n, seed, dtype):
    """Points with small whole coordinates whose mean is zero: duplicates and equal distances abound, and every product
    is exact."""
    half = torch.randint(-1, 3, (n//2, 3), generator=gen(seed))
    return torch.cat([half, -half])[torch.randperm(n, generator=gen(seed))].to(dtype)


def exact(label, squared):
    "Rank, AP and AP@R by sorting pairs of a squared distance and a row."
    found = []
    for i, line in enumerate(squared.tolist()):
        row = sorted((d, j) for j, d in enumerate(line) if j != i)
        places = [p for p, (_, j) in enumerate(row, 1) if label[j] == label[i]]
        terms = [(j/p, p) for j, p in enumerate(places, 1)]
        found.append(
            (
                places[0] - 1, sum(t for t, _ in terms) / len(places),
                sum(t for t, p in terms if p <= len(places)) / len(places)
            )
            if places
            else (-1, math.nan, math.nan)
        )
    return tuple(map(torch.tensor, zip(*found)))


@pytest.mark.parametrize('limit', [0, 3, 256])                      # sort all, count the small classes, count all
@pytest.mark.parametrize('few', [1, 5, 1000])                       # rows handled at once
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_ties_and_duplicates_against_loops(monkeypatch, limit, few, dtype):
    monkeypatch.setattr(metrics, 'cache_rows', lambda dist: min(len(dist), few))
    inner = metrics.match_places
    monkeypatch.setattr(
        metrics, 'match_places', lambda dist, column, near: inner(dist, column, near, count_up_to=limit)
    )
    emb = grid(70, 2, dtype)
    label = torch.cat([torch.zeros(20).long(), torch.randint(1, 18, (50,), generator=gen(3))])[
        torch.randperm(70, generator=gen(4))
    ]
    squared = (emb[:,None] - emb).square().sum(2)
    assert (
        len(emb.unique(dim=0)) < 60
        and lone_queries(label) > 0
        and (squared.sort(1).values.diff(dim=1) == 0).float().mean() > 0.5
    )
    rank, ap, at_r = exact(label, squared)
    for block in (None, 1, 13):
        found = retrieval(emb, label, block=block)
        assert torch.equal(found.rank, rank) and torch.equal(first_match_rank(emb, label, block=block), rank)
        same(found.ap, ap), same(found.ap_at_r, at_r)


def test_large_classes_are_sorted_and_small_ones_counted(monkeypatch):
    "Both ways must be taken, and agree to the last bit."
    taken = []
    for name in ('_count_places', '_sort_places'):
        monkeypatch.setattr(
            metrics, name,
            lambda dist, column, name=name, inner=getattr(metrics, name): taken.append((name, column.shape[1]))
            or inner(dist, column),
        )
    emb, label = unit(900, 8), torch.cat([torch.zeros(600), torch.arange(300)//3 + 1]).long()
    whole = retrieval(emb, label, block=300)
    assert taken == [('_count_places', 2)] + 2*[('_sort_places', 599)]
    monkeypatch.setattr(
        metrics, 'match_places',
        lambda dist, column, near, inner=match_places: inner(
            dist, column, near, count_up_to=0 if column.shape[1] < 599 else 599
        )
    )
    for mine, theirs in zip(retrieval(emb, label, block=300), whole): assert torch.equal(mine, theirs)
    assert taken[3:] == [('_sort_places', 2)] + 2*[('_count_places', 599)]


def test_places_of_left_out_and_missing_items():
    dist = torch.tensor([[3., math.inf, 1, 1, 2], [1, 1, 1, 1, math.inf]])
    column = torch.tensor([[4, 1, 3, 5], [3, 0, 4, 2]])
    for limit in (0, 4): assert match_places(dist, column, count_up_to=limit).tolist() == [[2, 5, 1, 5], [3, 0, 5, 2]]


def test_rankings_give_every_query_its_class():
    emb, label = sample()
    parts = [
        (w, d.clone(), torch.nn.functional.pad(c, (0, 60 - c.shape[1]), value=60))
        for w, d, c, _ in rankings(emb, label, block=7)
    ]
    which, dist, column = map(torch.cat, zip(*parts))
    back = which.argsort()
    assert which[back].tolist() == list(range(60)) and label.bincount()[label[which]].diff().min() >= 0
    dist, column = dist[back], column[back]
    for i in range(60):
        assert column[i][column[i] < 60].tolist() == [j for j in range(60) if label[j] == label[i] and j != i]
    assert dist.isinf().nonzero().tolist() == [[i, i] for i in range(60)]


@pytest.mark.parametrize('labels', [torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_integer_type(labels):
    emb, label = sample(classes=2)
    assert torch.equal(first_match_rank(emb, label.to(labels)), first_match_rank(emb, label))
    other = first_match_rank(emb[:9], label[:9].to(labels), emb, label, rows=torch.arange(9))
    assert torch.equal(other, first_match_rank(emb, label)[:9])


def test_all_at_one_point_in_bounded_time():
    "Everything is tied: places are those of the columns."
    label = torch.arange(3000)//3
    found = retrieval(torch.ones(3000, 4), label)
    first = torch.arange(3000)//3*3                                   # the first column of the class
    mates = torch.tensor([[1, 2], [0, 2], [0, 1]]).repeat(1000, 1) + first[:,None]
    place = mates - (mates > torch.arange(3000)[:,None]).long()       # the query itself is gone
    assert torch.equal(found.rank, place[:,0])
    same(found.ap, (1/(place[:,0] + 1) + 2/(place[:,1] + 1))/2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12))
def test_bounds_and_invariances(seed, n, classes):
    emb, label = sample(n, classes, d=4, seed=seed)
    rank = first_match_rank(emb, label)
    order = torch.randperm(n, generator=gen(seed))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=gen(seed), dtype=torch.float64))[0]
    assert torch.equal(first_match_rank(emb[order], label[order]), rank[order])   # order of queries and gallery
    # rotation, scale, shift, names of classes
    assert torch.equal(first_match_rank(3*emb@turn + 1, 7 - label), rank)
    ap, at_r = average_precision(emb, label), average_precision(emb, label, at_r=True)
    defined = rank >= 0
    assert torch.equal(ap.isnan(), ~defined) and lone_queries(label) == int((~defined).sum())
    assert ((ap[defined] > 0) & (ap[defined] <= 1) & (at_r[defined] <= ap[defined] + 1e-6)).all()


def test_perfect_random_and_collapsed_embeddings():
    label = torch.arange(20).repeat_interleave(10)
    perfect = benign(torch.eye(20)[label], label)
    assert [perfect[h] for h in ('R@1', 'R@2', 'mAP')] == [100, 100, 100] and perfect['NMI'] > 90
    random = benign(unit(200, 64), label)
    # chance is 4.5 %, about 1.5 % standard error
    assert random['R@1'] == pytest.approx(100*9/199, abs=5) and random['mAP'] < 15
    collapsed = benign(torch.ones(200, 8), label)
    assert collapsed['NMI'] == 0 and collapsed['R@1'] < 6 and collapsed['mAP'] < 20


def test_average_precision_matches_scikit_learn():
    sk = pytest.importorskip('sklearn.metrics')
    emb, label = sample(80, 8)
    dist = (emb[:,None] - emb).norm(dim=2)
    others = ~torch.eye(80, dtype=torch.bool)
    theirs = [sk.average_precision_score((label == label[i])[others[i]], -dist[i][others[i]]) for i in range(80)]
    same(average_precision(emb, label), torch.tensor(theirs))


def test_ranking_measures_match_pytorch_metric_learning():
    pytest.importorskip('pytorch_metric_learning')
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
    emb, label = sample(90, 20)
    calc = AccuracyCalculator(
        include=('precision_at_1', 'mean_average_precision', 'mean_average_precision_at_r'), k=None,
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)), device=torch.device('cpu')
    )
    theirs = calc.get_accuracy(emb, label)
    assert recall_at_k(emb, label, k=1) == pytest.approx(theirs['precision_at_1'], abs=1e-6)
    assert mean_average_precision(emb, label) == pytest.approx(theirs['mean_average_precision'], abs=1e-6)
    assert mean_average_precision_at_r(emb, label) == pytest.approx(theirs['mean_average_precision_at_r'], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 5)), min_size=1, max_size=40))
def test_nmi_matches_scikit_learn(pairs):
    sk = pytest.importorskip('sklearn.metrics')
    label, cluster = torch.tensor(pairs).T
    ours = normalised_mutual_information(label, cluster)
    assert ours == pytest.approx(sk.normalized_mutual_info_score(label.numpy(), cluster.numpy()), abs=1e-9)
    assert ours == pytest.approx(normalised_mutual_information(cluster, label), abs=1e-12)


def test_nmi_with_many_classes_needs_no_table():
    label = torch.arange(200_000)
    assert normalised_mutual_information(label, label) == pytest.approx(1)  # a dense table would have 4e10 cells


def clouds(spread, seed=0, classes=12, per=20):
    label = torch.arange(classes).repeat_interleave(per)
    return unit(classes, 16, seed)[label] + spread*torch.randn(classes*per, 16, generator=gen(seed + 1)), label


def test_nmi_counts_the_classes_present():
    emb, label = clouds(.01)
    assert (
        nmi(emb, 5 * label, backend='torch')
        == nmi(emb, label, k=12, backend='torch')
        != nmi(emb, label, k=3, backend='torch')
    )


def test_backends_give_the_same_nmi_up_to_their_starts():
    pytest.importorskip('faiss')
    easy, label = clouds(.001, classes=3)
    for backend in ('torch', 'faiss'):
        assert max(nmi(easy, label, seed=s, backend=backend) for s in range(8)) == pytest.approx(1)
    hard, label = clouds(.25)
    mean = {b: sum(nmi(hard, label, seed=s, backend=b) for s in range(16))/16 for b in ('torch', 'faiss')}
    # one value varies by about 0.045, the difference of two means of 16 by 0.016
    assert mean['torch'] == pytest.approx(mean['faiss'], abs=.04)


def test_blocks_are_small(monkeypatch):
    sizes, places, inner, count = [], [], metrics.distances, metrics.match_places
    monkeypatch.setattr(metrics, 'distances', lambda u, v, **kw: sizes.append(len(u)*len(v.emb)) or inner(u, v, **kw))
    monkeypatch.setattr(
        metrics, 'match_places', lambda dist, column, near: places.append(dist.numel()) or count(dist, column, near)
    )
    emb, label = unit(8000, 2), torch.arange(8000)//5
    recall_at_k(emb, label, k=1)
    average_precision(emb[:2000], label[:2000], emb, label)
    assert sum(sizes) == sum(places) == 80_000_000 and max(sizes) <= 2**25 and max(places) <= 2**21


def test_benign_takes_one_pass(monkeypatch):
    rows, inner = [], metrics.distances
    monkeypatch.setattr(metrics, 'distances', lambda u, v, **kw: rows.append(len(u)) or inner(u, v, **kw))
    emb, label = clouds(.3)
    benign(emb, label, backend='torch', block=100)
    assert rows == [100, 100, 40]


def test_backend_is_chosen_for_the_device_of_the_embeddings(monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, 'resolve_backend', lambda *args: asked.append(args) or 'torch')
    emb, label = clouds(.3)
    assert benign(emb, label)['backend'] == 'torch' and asked == [('auto', emb.device)]


def test_benign_row():
    emb, label = clouds(.3)
    label = torch.cat([label, torch.tensor([77])])
    emb = torch.cat([emb, unit(1, 16, 5)])
    row = benign(emb, label, backend='torch')
    assert row == benign(emb, label, backend='torch', block=17) and tuple(row) == (
        'R@1', 'R@2', 'mAP', 'NMI', 'undefined', 'backend'
    )
    assert (row['undefined'], row['backend']) == (1, 'torch')
    assert row['R@2'] == 100*recall_at_k(emb, label, k=2) and row['R@1'] < row['R@2']
    assert row['mAP'] == 100*mean_average_precision(emb, label) and row['NMI'] == 100*nmi(emb, label, backend='torch')
    assert benign(emb, label, self_exclusion='drop_first')['backend'] in ('torch', 'faiss')


@pytest.mark.parametrize(
    'options', [{}, dict(block=4), dict(self_exclusion='drop_first')], ids=('whole', 'blocks', 'drop_first')
)
def test_benign_of_a_gallery_of_its_own(options):
    "Against sorting loops; the gallery lacks some classes of the queries, and NMI is the gallery's."
    emb, label = sample(90, 45)
    query, query_label, gallery, gallery_label = emb[:30], label[:30], emb[30:], label[30:]
    rank, ap, _ = naive(query, query_label, gallery, gallery_label, [-1]*30)
    row, defined = benign(query, query_label, gallery, gallery_label, backend='torch', **options), rank >= 0
    assert 0 < row['undefined'] == int((~defined).sum()) == lone_queries(query_label, gallery_label) < 30
    for k in (1, 2): assert row[f'R@{k}'] == pytest.approx(100*(rank[defined] < k).double().mean().item(), abs=1e-9)
    assert row['mAP'] == pytest.approx(100*ap[defined].double().mean().item(), abs=1e-5)
    assert row['NMI'] == 100*nmi(gallery, gallery_label, backend='torch') != 100*nmi(emb, label, backend='torch')


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda e, y: recall_at_k(e, torch.arange(10), k=1), 'at least one query needs another image'),
        (lambda e, y: mean_average_precision(e, torch.arange(10)), 'at least one query needs another image'),
        (lambda e, y: recall_at_k(e, y, k=0), 'k must lie in'),
        (lambda e, y: recall_at_k(e, y, k=(1, 0)), 'k must lie in'),
        (lambda e, y: recall_at_k(e, y, e, k=1), 'gallery and gallery_label go together'),
        (lambda e, y: benign(e, y, e), 'gallery and gallery_label go together'),
        (lambda e, y: benign(e, y, e, y + 10), 'at least one query needs another image'),
        (
            lambda e, y: recall_at_k(e, y, e, y[:9], k=1),
            r'gallery_label must be a tensor of one integer per embedding \(10\)'
        ),
        (lambda e, y: recall_at_k(e, y.float(), k=1), 'query_label must be a tensor of one integer'),
        (lambda e, y: average_precision(e, y, self_exclusion='none'), 'self_exclusion must be one of'),
        (lambda e, y: average_precision(e * math.nan, y), 'query must be finite'),
        (lambda e, y: nmi(e, y[:3]), 'label must be a tensor of one integer'),
        (lambda e, y: normalised_mutual_information(y, y[:3]), 'label and cluster must match'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call(unit(10, 4), torch.arange(10)//2)


def test_the_colour_histogram_against_a_loop():
    images = torch.randint(0, 256, (3, 3, 5, 4), generator=gen(), dtype=torch.uint8)
    wanted = torch.zeros(3, 4**3)
    for k, image in enumerate(images):
        for red, green, blue in image.flatten(1).T.tolist(): wanted[k, red//64 + 4*(green//64) + 16*(blue//64)] += 1/20
    found = metrics.colour_histogram(images, bins=4)
    torch.testing.assert_close(found, wanted.sqrt())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_a_feature_must_not_take_the_name_of_the_histogram():
    images = data.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0]), ('a',))
    with pytest.raises(ValueError, match='names of their own'):
        metrics.untrained_baselines(data.Split('set', images, images), {'colour histogram': lambda images: images})


SHARED = Path(__file__).parents[2]/'shared'
WEIGHTS = SHARED/'weights'/'mobilenet_v2-b0353104.safetensors'


HERE = (SHARED/'data'/'grocery').is_dir() and WEIGHTS.is_file()


@pytest.mark.skipif(not HERE, reason='needs ../shared/data/grocery and the weights')
def test_pretrained_features_on_grocery(tmp_path):
    split = archives.read('grocery', SHARED/'data', size=64, cache=tmp_path, show=False)
    network = models.headless(models.build('mobilenet_v2', dim=8, size=64, channels=3, seed=0, weights=WEIGHTS))
    rows = metrics.untrained_baselines(
        split, dict(pretrained=partial(models.embed_all, network, batch_size=128)), backend='torch'
    )
    assert abs(rows['pretrained']['R@1'] - 44.3) < 1 # measured elsewhere with the same photographs and weights
    colours, n = metrics.colour_histogram(split.test.images[:]), split.queries
    nearest = (colours[:n] @ colours[n:].T).argmax(1) # unit length: the largest product is the smallest distance
    by_hand = (split.test.labels[n:][nearest] == split.test.labels[:n]).double().mean().item()*100
    assert abs(rows['colour histogram']['R@1'] - by_hand) < .2 # near-ties fall either way
    assert rows['pretrained']['undefined'] == rows['colour histogram']['undefined'] == 0
