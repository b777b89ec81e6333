"""Clustering and centres under attack: scores against scikit-learn, readings against literal loops, and what the
threat model promises."""
import json
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.cluster import KMeans
from torch import nn, tensor

from robust_dml.metrics import clustering
from robust_dml.data import sets
from robust_dml.attacks.suite import Gallery, members, run_attack
from robust_dml.metrics.clustering import ATTACKS, MODES, SCOPES, ClusterProtocol, adjusted_mutual_information
from robust_dml.metrics.clustering import agreement, aims, attacked_images, class_centres, class_rows, clustered
from robust_dml.metrics.clustering import clusters, hungarian_accuracy, scene_of, matched_clusters, new_centres, overlap
from robust_dml.metrics.clustering import pairwise_f1, proxy, read, references, spread_start
from robust_dml.core import generator
from robust_dml.data.sets import ImageSet
from robust_dml.triplets.distances import normalise
from robust_dml.metrics.evaluate import evaluate
from robust_dml.metrics.retrieval import recall_at_k
from robust_dml.models.networks import build, embed, embed_all
from robust_dml.attacks.loop import autograd_gradient
from robust_dml.runs.store import Run, append_line, read_lines, to_json
from robust_dml.defenses.train import train
from robust_dml.defenses.base import make_defense as make

BUDGET = dict(eps=24/255, step_size=6/255, steps=6, show=False, backend='torch', kmeans_restarts=2, kmeans_rounds=20)


# --- two labellings
# ---------------------------------------------------------------------------------------------------------

labellings = st.integers(1, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-3, 6), min_size=n, max_size=n)]*2))


@settings(max_examples=150, deadline=None)
@given(labellings)
def test_scores_are_those_of_scikit_learn(pair):
    label, cluster = (tensor(v) for v in pair)
    (tn, fp), (fn, tp) = sk.cluster.pair_confusion_matrix(*pair).astype(float)
    assert pairwise_f1(label, cluster) == pytest.approx(2*tp/(2*tp + fp + fn) if tp + fp + fn else 1., abs=1e-12)
    assert adjusted_mutual_information(label, cluster) == pytest.approx(sk.adjusted_mutual_info_score(*pair), abs=1e-8)
    assert agreement(label, cluster)['NMI'] == pytest.approx(sk.normalized_mutual_info_score(*pair), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 3), min_size=n, max_size=n), st.lists(st.integers(0, 4), min_size=n, max_size=n)
        )
    )
)
def test_hungarian_accuracy_is_that_of_the_best_permutation(pair):
    label, cluster = pair
    best = max(sum(names[c] == y for y, c in zip(label, cluster)) for names in permutations(range(5)))
    assert hungarian_accuracy(tensor(label), tensor(cluster)) == pytest.approx(best/len(label))


def test_scores_of_many_images():
    gen = torch.Generator().manual_seed(0)
    label, cluster = torch.arange(3000) // 7, torch.randint(500, (3000,), generator=gen)
    mixed = torch.where(torch.rand(3000, generator=gen) < .5, label, cluster)
    assert abs(adjusted_mutual_information(label, cluster)) < .01 < agreement(label, cluster)['NMI']
    assert adjusted_mutual_information(label, mixed) == pytest.approx(
        sk.adjusted_mutual_info_score(label, mixed), abs=1e-8
    )
    assert pairwise_f1(label, cluster) < .01


def test_perfect_and_renamed_clusters_score_one():
    label = torch.arange(60) // 5
    assert all(v == pytest.approx(1.) for v in agreement(label, (7*label + 3) % 97).values())


def test_overlap_names_what_it_wants():
    with pytest.raises(ValueError, match=r'vectors of one length and hold something, found \(0,\) and \(0,\)'):
        overlap(tensor([]).long(), tensor([]).long())


# --- k-means
# ----------------------------------------------------------------------------------------------------------------

def cloud(classes=8, each=9, spread=.1, dim=12, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(each)
    return (
        normalise(
            torch.randn(classes, dim, generator=gen, dtype=dtype)[label]
            + spread * torch.randn(classes * each, dim, generator=gen, dtype=dtype)
        ),
        label,
    )


def test_spread_start_draws_by_squared_distance():
    "Second row: chances 0, 1, 4, 9 from the first of four items on a line (over 14)."
    line = tensor([[0.], [1], [2], [3]])
    second = [rows[1] for rows in (spread_start(line, 2, generator(s)).tolist() for s in range(4000)) if rows[0] == 0]
    for item, chance in enumerate((0, 1/14, 4/14, 9/14)):
        assert (
            abs(second.count(item) / len(second) - chance)
            < 4 * math.sqrt(max(chance * (1 - chance), 1e-9) / len(second)) + 1e-9
        )


def test_spread_start_takes_each_item_once_while_there_are_others():
    emb = torch.randn(30, 4, generator=generator(0, 'items'))
    assert spread_start(emb, 30, generator(1)).sort().values.tolist() == list(range(30))


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_rounds_are_those_of_scikit_learn(backend):
    emb, _ = cloud(spread=.6)
    start = emb[spread_start(emb, 8, generator(3))]
    for rounds in (1, 2, 5):
        found = KMeans(8, init=start.numpy(), n_init=1, max_iter=rounds, tol=0, algorithm='lloyd').fit(emb.numpy())
        iterate = clustering._torch_rounds if backend == 'torch' else clustering._faiss_rounds
        torch.testing.assert_close(
            iterate(emb, start, rounds), torch.from_numpy(found.cluster_centers_), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_best_of_several_starts(backend):
    emb, _ = cloud(spread=.5)
    def error(found): return sum((emb[i] - found.centre[c]).square().sum().item() for i, c in enumerate(found.member))
    errors = [error(clusters(emb, k=8, seed=5, restarts=n, backend=backend)) for n in range(1, 7)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    again = clusters(emb, k=8, seed=5, restarts=6, backend=backend)
    assert torch.equal(again.member, clusters(emb, k=8, seed=5, restarts=6, backend=backend).member)
    assert torch.equal(again.member, torch.cdist(emb, again.centre.double()).argmin(1))


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_clusters_of_groups_and_of_nothing(backend):
    emb, label = cloud(spread=.02)
    assert hungarian_accuracy(label, clusters(emb, k=8, seed=0, backend=backend).member) == 1
    assert clusters(torch.ones(7, 3), k=4, seed=0, backend=backend).member.unique().numel() == 1
    assert clusters(emb[:5], k=5, seed=0, backend=backend).member.unique().numel() == 5
    with pytest.raises(ValueError, match='found 5 images for 6 clusters; add images or ask for fewer clusters'):
        clusters(emb[:5], k=6, seed=0, backend=backend)


# --- centres
# ----------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=8), st.floats(.01, .99), st.integers(0, 5))
def test_references_are_a_part_of_every_class(sizes, frac, seed):
    label = torch.cat([torch.full((n,), 3*k) for k, n in enumerate(sizes)])
    label = label[torch.randperm(len(label), generator=generator(seed))]
    chosen = references(label, frac=frac, seed=seed)
    for k, n in enumerate(sizes):
        assert chosen[label == 3*k].sum().item() == min(max(round(tensor(frac*n).item()), 1), n - 1)
    assert torch.equal(chosen, references(label, frac=frac, seed=seed))


def test_every_image_can_be_a_reference():
    label = torch.arange(6) // 3
    assert torch.stack([references(label, frac=.34, seed=s) for s in range(60)]).any(0).all()


def test_centres_are_normalised_means():
    emb, label = cloud()
    for k, centre in enumerate(class_centres(emb, label, 8)):
        mean = emb[label == k].mean(0)
        torch.testing.assert_close(centre, mean/mean.norm())
    with pytest.raises(ValueError, match=r'none for 2 of 9 classes \(first: 4\)'):
        class_centres(emb[label != 4], label[label != 4], 9)


# --- attacks
# ----------------------------------------------------------------------------------------------------------------

def literal(name, emb, i, clean, label, centres):
    "The table of objectives, one query, word by word."
    def d(a, b): return (a - b).norm().item()
    mates = [j for j in range(len(clean)) if label[j] == label[i] and j != i]
    strangers = [j for j in range(len(clean)) if label[j] != label[i]]
    mate = min(mates, key=lambda j: d(clean[i], clean[j]))
    if name == 'selfshift': return d(emb, clean[i])
    if name == 'nnpos': return d(emb, clean[mate])
    if name == 'gap': return d(emb, clean[mate])**2 - min(d(emb, clean[j]) for j in strangers)**2
    return d(emb, centres[label[i]])**2 - min(d(emb, c) for k, c in enumerate(centres) if k != label[i])**2


@pytest.mark.parametrize('name', list(ATTACKS))
def test_objectives_against_loops(name):
    clean, label = cloud(spread=.5)
    shelf, rows = Gallery(clean, label), torch.arange(0, 72, 5)
    queries, centres = members(shelf, rows), class_centres(clean, label, 8)
    emb = normalise(
        clean[rows] + 0.5 * torch.randn(len(rows), 12, generator=generator(0, 'moved'), dtype=torch.float64)
    ).requires_grad_()
    attack = ATTACKS[name]
    targets = attack.targets(queries, shelf, 0)
    values = attack.objective(emb, queries, targets, shelf)
    wanted = [literal(name, e, i, clean, label, centres) for e, i in zip(emb.detach(), rows.tolist())]
    torch.testing.assert_close(values.detach(), tensor(wanted, dtype=torch.float64), rtol=0, atol=5e-6)
    torch.autograd.gradcheck(lambda e: attack.objective(e, queries, targets, shelf), emb)
    order = torch.randperm(len(rows), generator=generator(1))
    some = members(shelf, rows[order])
    torch.testing.assert_close(attack.objective(emb[order], some, attack.targets(some, shelf, 0), shelf), values[order])


def test_proxies_are_asked_by_cosine():
    clean, label = cloud()
    proxies = 7*torch.randn(8, 12, generator=generator(0, 'proxies'), dtype=torch.float64)
    shelf, attack = Gallery(clean, label), proxy(proxies)
    queries = members(shelf, torch.arange(72))
    targets = attack.targets(queries, shelf, 0)
    cosine = clean@normalise(proxies).T
    wanted = cosine.scatter(1, label[:, None], -9.).amax(1) - cosine.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(attack.objective(clean, queries, targets, shelf), wanted)
    assert torch.equal(attack.measure(clean, queries, targets, shelf)['proxy'], 100*(wanted < 0).double())
    with pytest.raises(ValueError, match=r'label must lie in \[0, 6\], found 7'):
        proxy(proxies[:7]).targets(queries, shelf, 0)


@pytest.mark.parametrize('name', list(ATTACKS))
@pytest.mark.parametrize('case', ['duplicates', 'collapsed', 'lone'])
def test_gradients_are_finite_where_distances_are_zero(name, case):
    clean, label = cloud(classes=3, each=2)
    if case == 'duplicates': clean = clean[label*2]
    if case == 'collapsed': clean = clean[:1].expand(6, -1).clone()
    if case == 'lone': label = tensor([0, 1, 1, 2, 2, 2])
    shelf = Gallery(clean, label)
    queries, emb = members(shelf, torch.arange(6)), clean.clone().requires_grad_()
    values = ATTACKS[name].objective(emb, queries, ATTACKS[name].targets(queries, shelf, 0), shelf)
    assert values.isfinite().all() and torch.autograd.grad(values.sum(), emb)[0].isfinite().all()


def test_nnpos_stays_with_its_first_mate_and_gap_looks_anew():
    angle = torch.deg2rad(tensor([0., 10, 20, 90, 200]).double())
    shelf = Gallery(torch.stack([angle.cos(), angle.sin()], 1), tensor([0, 0, 0, 1, 2]))
    query = members(shelf, tensor([0]))
    targets = ATTACKS['nnpos'].targets(query, shelf, 0)
    at = lambda deg: torch.stack([torch.deg2rad(tensor([deg])).cos(), torch.deg2rad(tensor([deg])).sin()], 1).double()
    assert torch.equal(targets['mate'], shelf.emb[[1]])
    gap = [ATTACKS['gap'].objective(at(deg), query, targets, shelf).item() for deg in (80., 190.)]
    chord = lambda deg: 4*math.sin(math.radians(deg)/2)**2
    assert gap == pytest.approx([chord(70) - chord(10), chord(180) - chord(10)], abs=1e-5)


# --- searches
# ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def images(): return sets.glyphs(train_classes=16, test_classes=8, per_class=7)


@pytest.fixture(scope='module')
def model(images):
    "A net trained for seconds, so that embeddings have structure."
    net = build('small', dim=16, size=28, channels=1, seed=0)
    train(net, images.train, make('natural', margin=.2, miner='semihard'), epochs=15, pairs=20, lr=2e-3, show=False)
    return net


@pytest.fixture(scope='module')
def result(model, images): return clustered(model, images.test, **BUDGET)


def stand(model, images):
    emb = embed_all(model, images.test, batch_size=64)
    return (
        Gallery(emb, images.test.labels), images.test.batch(torch.arange(20)),
        members(Gallery(emb, images.test.labels), torch.arange(20))
    )


def test_search_follows_the_one_loop(model, images):
    "From the clean image with the last iterate it is `run_attack`, to the last bit."
    shelf, x, queries = stand(model, images)
    p = ClusterProtocol(eps=.1, step_size=.02, steps=5, random_start=False, keep='last')
    for attack in ATTACKS.values():
        found = attacked_images(model, attack, x, queries, shelf, p)
        assert torch.equal(
            found.images, run_attack(model, attack, x, queries, shelf, eps=0.1, step_size=0.02, steps=5, seed=0).images
        )
        assert torch.equal(found.emb, embed(model.eval(), found.images).detach())
        assert torch.equal(found.values, attack.objective(found.emb, queries, attack.targets(queries, shelf, 0), shelf))


def test_search_starts_anywhere_in_the_ball_and_stays_there(model, images):
    shelf, x, queries = stand(model, images)
    seen = []
    def spy(see, objective, x_adv): seen.append(x_adv); return autograd_gradient(see, objective, x_adv)
    found = attacked_images(
        model, ATTACKS['gap'], x, queries, shelf, ClusterProtocol(eps=0.1, step_size=0.02, steps=5), spy
    )
    assert all(
        (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        for x_adv in (*seen, found.images)
    )
    # random, clipped to [0, 1] on a plain background
    assert (seen[0] - x).abs().mean() > .02 and len(seen[0].unique()) > 10_000


def test_more_searches_steps_and_room_never_help_the_defender(model, images):
    shelf, x, queries = stand(model, images)
    attack = ATTACKS['centre']
    def reached(**change):
        return attacked_images(
            model, attack, x, queries, shelf, ClusterProtocol(**dict(eps=0.1, step_size=0.02, steps=3) | change)
        ).values
    assert (reached(restarts=3) >= reached()).all() and (reached(restarts=3) > reached()).any()
    assert (reached(steps=9) >= reached()).all() and reached(steps=9).mean() > reached().mean()
    wide = [reached(eps=e, step_size=e/5, steps=6).mean() for e in (.02, .05, .1, .2)]
    assert wide == sorted(wide) and wide[0] < wide[-1]


def test_no_budget_no_effect(model, images):
    found = clustered(model, images.test, **BUDGET | dict(eps=0.))
    for scope in SCOPES:
        for scores in found.attacked[scope].values(): assert scores == pytest.approx(found.clean, abs=1e-6)


def test_the_model_is_left_alone(model, images):
    model.train().zero_grad()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (clustered(model, images.test, modes=('centre',), **BUDGET) for _ in range(2))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert replace(first, seconds=0.) == replace(second, seconds=0.)


# --- readings
# ---------------------------------------------------------------------------------------------------------------

def test_numbers_follow_from_the_attacked_embeddings(model, images):
    "Everything recomputed from the records by loops and scikit-learn, gate off."
    records, p = [], dict(BUDGET, kmeans_seeds=2, recluster_rounds=0, gate='off')
    found = clustered(model, images.test, save=records.append, batch_size=20, **p)
    clean, label = embed_all(model, images.test, batch_size=56), images.test.labels
    half = references(label, frac=.5, seed=0)
    for name in ('gap', 'selfshift'):
        adv = torch.cat([clustering._from_text(r, 'cpu') for r in records if r['attack'] == name])
        for scope, other in (('query', clean), ('all', adv)):
            dist = torch.cdist(adv.double(), other.double()).fill_diagonal_(math.inf)
            assert found.attacked[scope][name]['R@1'] == pytest.approx(
                100 * (label[dist.argmin(1)] == label).double().mean().item()
            )
            centres = torch.stack([normalise(other[half & (label == k)].mean(0, keepdim=True))[0] for k in range(8)])
            hits = (torch.cdist(adv, centres).argmin(1) == label)[~half]
            assert found.attacked[scope][name]['centre'] == pytest.approx(100*hits.double().mean().item(), abs=1e-4)
            groups = [clusters(other, k=8, seed=s, restarts=2, rounds=20, backend='torch') for s in range(2)]
            split = [torch.cdist(adv, g.centre).argmin(1) for g in groups]
            for score, theirs in (('AMI', sk.adjusted_mutual_info_score), ('NMI', sk.normalized_mutual_info_score)):
                assert found.attacked[scope][name][score] == pytest.approx(
                    100 * sum(theirs(label, s) for s in split) / 2, abs=1e-6
                )
    assert found.clean['R@1'] == pytest.approx(100*recall_at_k(clean, label, k=1), abs=1e-4)


def test_attacks_work_and_the_gate_holds(result, model, images):
    assert result.clean['R@1'] > 45 and result.clean['centre'] > 40
    assert result.attacked['query']['gap']['R@1'] < 15 and result.attacked['query']['centre']['centre'] < 15
    for name, scores in result.attacked['query'].items():
        for score in ('R@1', 'centre'): assert scores[score] <= result.clean[score], name
    free = clustered(model, images.test, gate='off', modes=('retrieval', 'centre'), **BUDGET)
    for scope in SCOPES:
        for name in ATTACKS:
            assert result.attacked[scope][name]['R@1'] <= free.attacked[scope][name]['R@1']
    assert any(result.attacked[s][n]['R@1'] < free.attacked[s][n]['R@1'] for s in SCOPES for n in ATTACKS)
    assert result.worst('all')['NMI'] == min(v['NMI'] for v in result.attacked['all'].values()) < result.clean['NMI']


def test_retrieval_agrees_with_evaluate(model, images):
    "The same attacks through the other door: gate off, from the clean image, last iterate."
    some = {name: ATTACKS[name] for name in ('nnpos', 'gap')}
    ours = clustered(
        model, images.test, attacks=some, gate='off', random_start=False, keep='last', modes=('retrieval',),
        scopes=('query',), **BUDGET
    )
    theirs = evaluate(
        model, images.test, attacks=some, **{k: BUDGET[k] for k in ('eps', 'step_size', 'steps', 'show', 'backend')}
    )
    for name in some: assert ours.attacked['query'][name]['R@1'] == pytest.approx(theirs.after[name], abs=1e-4)
    assert ours.clean['R@1'] == pytest.approx(theirs.benign['R@1'], abs=1e-4)


def test_a_query_finds_no_copy_of_itself():
    "All images twice under two labels: the copy of the other label is nearest, one's own row is not found."
    emb = normalise(torch.randn(6, 5, generator=generator(0)))
    twice, label = torch.cat([emb, emb]), torch.arange(12) // 6
    scene = scene_of(twice, label, None, ClusterProtocol(eps=.1, step_size=.1, steps=1, modes=('retrieval',)), 'torch')
    # an attacked query as well: its own clean row is nearest and does not count
    for moved in (twice, normalise(twice + 1e-3*torch.randn(twice.shape, generator=generator(1)))):
        for scope in SCOPES: assert read(scene, moved, mode='retrieval', scope=scope) == {'R@1': 0.}


def test_asking_images_have_no_part_in_the_centres():
    emb, label = cloud(spread=.5)
    p = ClusterProtocol(eps=.1, step_size=.1, steps=1, modes=('centre',), gate='off')
    half = references(label, frac=.5, seed=0)
    scene = scene_of(emb, label, half, p, 'torch')
    moved = torch.where(half[:, None], emb, emb.roll(9, 0))
    hits = torch.cdist(moved, class_centres(emb[half], label[half], 8)).argmin(1) == label
    for scope in SCOPES:
        assert read(scene, moved, mode='centre', scope=scope)['centre'] == pytest.approx(
            100 * hits[~half].double().mean().item()
        )


def test_one_image_classes_are_undefined_for_retrieval(images, model):
    part = ImageSet(images.test.images[:22], images.test.labels[:22], images.test.classes[:4])
    found = clustered(model, part, modes=('retrieval', 'kmeans'), **BUDGET)
    assert found.excluded == 1 and found.classes == 4 and math.isfinite(found.attacked['all']['gap']['R@1'])
    with pytest.raises(ValueError, match=r'needs 2 images for centre accuracy.*found 1 classes with one \(first: 3\)'):
        clustered(model, part, **BUDGET)


# --- aiming
# -----------------------------------------------------------------------------------------------------------------

def test_centre_is_aimed_at_the_centres_that_are_used():
    emb, label = cloud(spread=.5)
    half = references(label, frac=.5, seed=0)
    p = ClusterProtocol(eps=.1, step_size=.1, steps=1, kmeans_seeds=1)
    scene, shelf = scene_of(emb, label, half, p, 'torch'), Gallery(emb, label)
    (_, rest, whole), (_, own, part) = aims(ATTACKS['centre'], scene)
    assert (rest, own) == (('retrieval', 'kmeans'), ('centre',))
    query = members(shelf, torch.arange(3))
    torch.testing.assert_close(whole.targets(query, shelf, 0)['centre'], class_centres(emb, label, 8))
    torch.testing.assert_close(part.targets(query, shelf, 0)['centre'], class_centres(emb[half], label[half], 8))


def test_new_centres_are_those_of_the_attacked_images():
    emb, label = cloud(spread=.3)
    half, p = references(label, frac=.5, seed=0), ClusterProtocol(eps=.1, step_size=.1, steps=1, kmeans_seeds=1)
    scene = scene_of(emb, label, half, p, 'torch')
    moved = normalise(emb + .4*torch.randn(emb.shape, generator=generator(2), dtype=emb.dtype))
    torch.testing.assert_close(new_centres(scene, moved, 'centre'), class_centres(moved[half], label[half], 8))
    found = scene.cluster(moved, 0)
    kind, column, shared = matched_clusters(label, found.member)
    centres = new_centres(scene, moved, 'kmeans')
    for k, c in zip(kind, column): torch.testing.assert_close(centres[k], normalise(found.centre[c][None])[0])
    assert shared == sum(((label == k) & (found.member == c)).sum().item() for k, c in zip(kind, column))


def test_the_lower_round_counts(model, images):
    found = clustered(model, images.test, attacks={'centre': ATTACKS['centre']}, **BUDGET | dict(recluster_rounds=2))
    for mode in ('centre', 'kmeans'):
        rounds = found.rounds['centre'][mode]
        assert len(rounds) == 3 and rounds[1] != rounds[0]
        for score in MODES[mode]: assert found.attacked['all']['centre'][score] == min(r[score] for r in rounds)
    assert found.image_steps == 6*56*(2 + 2*2)
    none = clustered(model, images.test, attacks={'centre': ATTACKS['centre']}, **BUDGET | dict(recluster_rounds=0))
    assert all(
        none.attacked['all']['centre'][s] == found.rounds['centre'][m][0][s]
        for m in ('centre', 'kmeans')
        for s in MODES[m]
    )
    assert not clustered(model, images.test, scopes=('query',), **BUDGET).rounds


# --- the whole thing
# --------------------------------------------------------------------------------------------------------

def test_batch_size_changes_nothing_in_float64(images):
    net = build('small', dim=16, size=28, channels=1, seed=0).double()
    train(net, images.train, make('natural', margin=.2), epochs=2, pairs=20, lr=2e-3, show=False)
    whole, parts = (clustered(net, images.test, batch_size=n, **BUDGET) for n in (56, 5))
    for scope in SCOPES:
        for name in ATTACKS: assert parts.attacked[scope][name] == pytest.approx(whole.attacked[scope][name], abs=1e-9)
    assert parts.clean == pytest.approx(whole.clean, abs=1e-9)


def test_a_killed_call_goes_on_from_its_records(model, images, tmp_path, result):
    run, count = Run(tmp_path), 0

    def dying(record):
        nonlocal count
        append_line(run, 'clusters.jsonl', record)
        count += 1
        if count == 11: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): clustered(model, images.test, batch_size=16, save=dying, **BUDGET)
    with open(tmp_path/'clusters.jsonl', 'a') as file: file.write('{"key": "torn')
    again = clustered(
        model, images.test, batch_size=16, known=read_lines(run, 'clusters.jsonl'),
        save=partial(append_line, run, 'clusters.jsonl'), **BUDGET
    )
    once = clustered(model, images.test, batch_size=16, **BUDGET)
    assert replace(again, seconds=0.) == replace(once, seconds=0.) and again.seconds > 0
    assert len(read_lines(run, 'clusters.jsonl')) == 7*4
    def none(record): raise AssertionError('nothing is left to attack')
    assert replace(
        clustered(model, images.test, batch_size=16, known=read_lines(run, 'clusters.jsonl'), save=none, **BUDGET),
        seconds=0.0
    ) == replace(once, seconds=0.0)


@pytest.mark.parametrize(
    'change',
    [
        dict(eps=0.02), dict(step_size=0.01), dict(steps=2), dict(seed=1), dict(restarts=2), dict(random_start=False),
        dict(keep='last'), dict(batch_size=9), dict(limit=30)
    ],
)
def test_records_of_another_budget_are_passed_over(model, images, change):
    records, some = [], dict(BUDGET, modes=('retrieval',), attacks={'gap': ATTACKS['gap']})
    clustered(model, images.test, save=records.append, **some)
    new = []
    mixed = clustered(model, images.test, known=records, save=new.append, **some | change)
    assert replace(mixed, seconds=0.) == replace(clustered(model, images.test, **some | change), seconds=0.) and new


def test_reading_differently_uses_the_same_records(model, images):
    records = []
    clustered(model, images.test, save=records.append, **BUDGET)
    def none(record): raise AssertionError('nothing is left to attack')
    for change in (dict(gate='off'), dict(scopes=('query',)), dict(modes=('centre',)), dict(recluster_rounds=0)):
        clustered(model, images.test, known=[{'other': 1}, *records], save=none, **BUDGET | change)


def test_the_record_is_plain_json(result):
    back = json.loads(to_json(asdict(result)))
    assert (
        back['attacked'] == result.attacked
        and back['rounds'] == result.rounds
        and back['protocol']['modes'] == list(MODES)
    )


def test_limit_takes_whole_classes(model, images):
    found = clustered(
        model, images.test, limit=30, modes=('kmeans',), attacks={'selfshift': ATTACKS['selfshift']}, **BUDGET
    )
    assert (found.images, found.classes) == (28, 4)
    rows = class_rows(images.test.labels, limit=30, seed=0)
    part = ImageSet(images.test.images[rows], images.test.labels[rows].unique(return_inverse=True)[1], tuple('abcd'))
    assert clustered(
        model, part, modes=('kmeans',), attacks={'selfshift': ATTACKS['selfshift']}, **BUDGET
    ).clean == pytest.approx(found.clean, abs=1e-9)
    assert not torch.equal(rows, class_rows(images.test.labels, limit=30, seed=1))


def test_a_collapsed_model_is_read_as_one(images):
    class Constant(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(4))
        def forward(self, x): return self.w + 0*x.flatten(1).sum(1, keepdim=True)
    found = clustered(Constant(), images.test, **BUDGET)
    for scores in (found.clean, *found.attacked['all'].values()):
        assert (
            scores['NMI'] == 0
            and scores['AMI'] == pytest.approx(0, abs=1e-9)
            and scores['Hungarian'] == pytest.approx(100 / 8)
        )


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(eps=8.0), r'eps must lie in \[0, 1\]'), (dict(modes=()), 'modes must name some of'),
        (dict(modes=('cluster',)), 'modes must name some of'),
        (dict(scopes=('gallery',)), 'scopes must name some of query, all'),
        (dict(gate='on'), "gate must be one of 'auto', 'off'"), (dict(kmeans_start='best'), 'kmeans_start'),
        (dict(restarts=0), r'restarts must lie in \[1, inf\]'), (dict(limit=-1), 'limit'),
        (dict(gallery_frac=0.0), 'gallery_frac must lie between 0 and 1'), (dict(keep='first'), 'keep')
    ],
)
def test_bad_protocols_are_refused(model, images, bad, message):
    with pytest.raises(ValueError, match=message): clustered(model, images.test, **BUDGET | bad)


def test_one_class_is_refused(model, images):
    one = ImageSet(images.test.images[:7], images.test.labels[:7], images.test.classes[:1])
    with pytest.raises(ValueError, match='two classes'): clustered(model, one, **BUDGET)
