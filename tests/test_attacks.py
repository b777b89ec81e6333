"""The ten attacks against literal loops over their definitions, the worked example on the circle, and the properties
of an attack."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn, tensor

from robust_dml.attacks.suite import _extremes, FIXED, SUITE, Attack, Gallery, Queries, ca_constants, draw, gtm_targets
from robust_dml.attacks.suite import hinge, ltm_targets, mates, members, near, nearest, noise, position, qa_measure
from robust_dml.attacks.suite import run_attack, suite
from robust_dml.triplets.distances import normalise, paired_distance
from robust_dml.models.networks import embed

ALL = {**SUITE, **FIXED}
HEADINGS = ('CA+', 'CA-', 'QA+', 'QA-', 'TMA', 'ES:D', 'ES:R', 'LTM', 'GTM', 'GTT')


# --- the worked example: six items on the unit circle
# -----------------------------------------------------------------------

def on_circle(*degrees):
    return torch.stack([(t := tensor(degrees, dtype=torch.float64).deg2rad()).cos(), t.sin()], 1)


CIRCLE = Gallery(on_circle(0., 20, 50, 90, 130, 200), tensor([0, 0, 1, 1, 2, 2]))
ZERO, MOVED = members(CIRCLE, tensor([0])), on_circle(35.)


def value(name, emb, targets): return ALL[name].objective(emb, ZERO, targets, CIRCLE).item()
def outcome(name, emb, targets): return {k: v.item() for k, v in ALL[name].measure(emb, ZERO, targets, CIRCLE).items()}


@pytest.mark.parametrize('name, moved, clean', [('CA+', .233735, .523603), ('CA-', .238196, .037348)])
def test_circle_candidate(name, moved, clean):
    t = ca_constants(tensor([[3]]), CIRCLE)
    assert value(name, MOVED, t) == pytest.approx(-moved, abs=1e-6) and value(name, ZERO.emb, t) == pytest.approx(
        -clean, abs=1e-6
    )
    assert outcome(name, MOVED, t)[name] == pytest.approx(100 * 3 / 6) and outcome(name, ZERO.emb, t)[
        name
    ] == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize('name, moved, clean', [('QA+', .274496, .508351), ('QA-', .268408, .158967)])
def test_circle_query(name, moved, clean):
    t = dict(row=tensor([[3]]))
    assert value(name, MOVED, t) == pytest.approx(-moved, abs=1e-6) and value(name, ZERO.emb, t) == pytest.approx(
        -clean, abs=1e-6
    )
    assert outcome(name, MOVED, t)[name] == outcome(name, ZERO.emb, t)[name] == pytest.approx(100*3/6)


def test_circle_mismatch_and_shift():
    t = dict(emb=CIRCLE.emb[[4]])
    assert value('TMA', MOVED, t) == pytest.approx(-1.087156, abs=1e-6) and outcome('TMA', MOVED, t)[
        'TMA'
    ] == pytest.approx(-0.087156, abs=1e-6)
    t = SUITE['ES'].targets(ZERO, CIRCLE, 0)
    assert value('ES', MOVED, t) == pytest.approx(.601412, abs=2e-6)  # the offset of 1e-6 per coordinate
    assert outcome('ES', MOVED, t) == pytest.approx({'ES:D': .601412, 'ES:R': 100.}, abs=1e-6)
    assert outcome('ES', ZERO.emb, t) == {'ES:D': 0., 'ES:R': 100.}


@pytest.mark.parametrize('name, own_copy', [('LTM', True), ('LTM fixed', False)])
def test_circle_ltm(name, own_copy):
    chord = lambda degrees: 2*math.sin(math.radians(degrees)/2)
    t = ALL[name].targets(ZERO, CIRCLE, 0)
    assert value(name, MOVED, t) == pytest.approx(-1.721837, abs=1e-6)
    assert value(name, on_circle(5.), t) == pytest.approx(-(chord(165) - chord(5 if own_copy else 15)), abs=1e-6)
    # own copy never answers
    assert outcome(name, MOVED, t)[name] == 100 and outcome(name, on_circle(40.), t)[name] == 0


@pytest.mark.parametrize('name, rows, distance', [('GTM', [0, 1], .60141), ('GTM fixed', [2, 3], .26105)])
def test_circle_gtm(name, rows, distance):
    t = ALL[name].targets(members(CIRCLE, tensor([0, 2])), CIRCLE, 0)
    assert t['row'].tolist() == rows
    assert value(name, MOVED, ALL[name].targets(ZERO, CIRCLE, 0)) == pytest.approx(-distance, abs=1e-5)


def test_circle_gtt():
    t = SUITE['GTT'].targets(ZERO, CIRCLE, 0)
    assert t['row'].item() == 1 and value('GTT', MOVED, t) == pytest.approx(-.656357, abs=1e-6)
    assert outcome('GTT', ZERO.emb, t)['GTT'] == outcome('GTT', MOVED, t)['GTT'] == 100  # [1, 2, 3, 4] keep row 1
    # row 5 overtakes at 110
    assert outcome('GTT', on_circle(105.), t)['GTT'] == 100 and outcome('GTT', on_circle(115.), t)['GTT'] == 0


# --- a random gallery, literal loops
# ----------------------------------------------------------------------------------------

def scene(n=330, batch=7, dim=5, classes=11, seed=0):
    gen = torch.Generator().manual_seed(seed)
    gallery = Gallery(
        normalise(torch.randn(n, dim, generator=gen, dtype=torch.float64)), torch.randint(classes, (n,), generator=gen)
    )
    queries = members(gallery, torch.randperm(n, generator=gen)[:batch])
    return gallery, queries, normalise(queries.emb + .3*torch.randn(batch, dim, generator=gen, dtype=torch.float64))


def dist(u, v): return math.sqrt(sum((a - b)**2 for a, b in zip(u.tolist(), v.tolist())))
def plus(z): return max(z, 0.)
def mean(values): return sum(values)/len(values)


def literal(name, q, i, queries, t, gallery):
    "(objective, {outcome: value}) of query i by the definitions, one scalar at a time."
    X, y, n, s, label = (
        gallery.emb, gallery.label.tolist(), len(gallery.emb), queries.row[i].item(), queries.label[i].item()
    )
    d = [dist(q, x) for x in X]
    others = [k for k in range(n) if k != s]
    hit = 100.*(y[min(others, key=lambda k: d[k])] == label)
    base, sign = name.split()[0], 1 if '+' in name else -1
    if base in ('CA+', 'CA-'):
        rows = t['row'][i].tolist()
        A, B = [dist(q, X[w]) for w in rows], [[dist(x, X[w]) for x in X] for w in rows]
        return -mean([plus(sign * (a - b)) for a, bs in zip(A, B) for b in bs]), {
            base: 100 * mean([sum(a > b for b in bs) / n for a, bs in zip(A, B)])
        }
    if base in ('QA+', 'QA-', 'GTT'):
        rows = t['row'][i].tolist()
        full, short = sorted(range(n), key=lambda k: d[k]), sorted(others, key=lambda k: d[k])[:4]
        found = {base: 100.*(rows[0] in short) if base == 'GTT' else 100*mean([full.index(m)/n for m in rows])}
        return -mean([plus(sign*(d[m] - b)) for m in rows for b in d]), found
    if base == 'TMA':
        cos = sum(a*b for a, b in zip(q.tolist(), t['emb'][i].tolist()))
        return cos - 1, {'TMA': cos}
    if base == 'ES':
        q0 = queries.emb[i]
        return dist(q + 1e-6, q0), {'ES:D': dist(q, q0), 'ES:R': hit}
    if base == 'LTM':
        same = [d[k] for k in range(n) if y[k] == label and (name == 'LTM' or k != s)]
        return -plus(max(d[k] for k in range(n) if y[k] != label) - min(same)), {name: hit}
    return -dist(q, X[gtm_row(name, i, queries, gallery)]), {name: hit}


def gtm_row(name, i, queries, gallery):
    "Row of GTM's target; the source form follows the reference code step by step."
    d = tensor([dist(queries.emb[i], x) for x in gallery.emb])
    d[queries.row[i]] = 1e38
    unmatch = gallery.label != gallery.label[d.argmin()]
    if name == 'GTM': return d.argsort().argsort()[unmatch].argmin().item()
    return min(unmatch.nonzero()[:, 0].tolist(), key=lambda k: d[k])


@pytest.mark.parametrize('name', ALL)
def test_objective_and_outcomes_match_literal_loops(name):
    gallery, queries, emb = scene()
    attack = {**suite(w=3, m=2), **FIXED}[name]
    t = attack.targets(queries, gallery, 5)
    values, found = attack.objective(emb, queries, t, gallery), attack.measure(emb, queries, t, gallery)
    assert tuple(found) == attack.outcomes
    for i, q in enumerate(emb):
        objective, outcomes = literal(name, q, i, queries, t, gallery)
        assert values[i].item() == pytest.approx(objective, abs=2e-6)
        for k in outcomes: assert found[k][i].item() == pytest.approx(outcomes[k], abs=1e-9)


def test_suite_has_nine_attacks_and_ten_outcomes():
    assert tuple(o for a in SUITE.values() for o in a.outcomes) == HEADINGS and len(SUITE) == 9
    assert tuple(FIXED) == ('LTM fixed', 'GTM fixed') and all(
        a.name == k and isinstance(a, Attack) for k, a in ALL.items()
    )
    with pytest.raises(TypeError): SUITE['ES'] = None


def test_suite_switches_reach_the_attacks():
    gallery, queries, _ = scene()
    for name, options in (('LTM', dict(ltm_exclude_self=True)), ('GTM', dict(gtm_index='fixed'))):
        switched, sound, plain = (
            a.targets(queries, gallery, 0) for a in (suite(**options)[name], FIXED[f'{name} fixed'], SUITE[name])
        )
        assert all(torch.equal(switched[k], sound[k]) for k in sound) and any(
            not torch.equal(plain[k], sound[k]) for k in sound
        )


@pytest.mark.parametrize('options', [dict(gtm_index='both'), dict(self_exclusion='self'), dict(w=0), dict(m=-1)])
def test_suite_refuses_unknown_values(options):
    with pytest.raises(ValueError, match=next(iter(options))): suite(**options)


# --- targets
# ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ALL)
def test_targets_depend_on_seed_attack_and_query_only(name):
    gallery, queries, _ = scene(batch=6)
    attack = {**suite(w=2, m=2), **FIXED}[name]
    pick = tensor([4, 1])
    some = Queries(queries.emb[pick], queries.label[pick], queries.row[pick], queries.id[pick])
    whole, part = attack.targets(queries, gallery, 3), attack.targets(some, gallery, 3)
    for k in whole: torch.testing.assert_close(part[k], whole[k][pick], rtol=0, atol=1e-12)


def test_streams_differ_between_seeds_attacks_and_queries():
    _, queries, _ = scene(batch=40)
    a = draw(queries, 1000, 1, seed=0, name='QA+')
    assert len(a.unique()) > 30
    assert (a != draw(queries, 1000, 1, seed=1, name='QA+')).sum() > 30 and (
        a != draw(queries, 1000, 1, seed=0, name='CA+')
    ).sum() > 30


def test_random_rows_are_uniform():
    queries = Queries(torch.ones(4000, 1), *[torch.arange(4000)]*3)
    counts = draw(queries, 10, 1, seed=0, name='TMA').flatten().bincount(minlength=10)
    assert counts.min() > 320 and counts.max() < 480  # 400 +- 4 standard deviations


def test_near_items_are_the_nearest_hundredth_without_the_query():
    gallery, queries, _ = scene(n=330)
    rows = near(queries, gallery)
    assert rows.shape == (7, 3)
    for i in range(7):
        d = [dist(queries.emb[i], x) for x in gallery.emb]
        assert rows[i].tolist() == sorted((k for k in range(330) if k != queries.row[i]), key=lambda k: d[k])[:3]
    assert near(members(CIRCLE, tensor([0])), CIRCLE).tolist() == [[1]]  # at least one


def test_near_candidates_with_and_without_repetition():
    gallery, queries, _ = scene(n=500, batch=40)
    pool = near(queries, gallery)
    ca, qa = (suite(w=5, m=5)[k].targets(queries, gallery, 0)['row'] for k in ('CA-', 'QA-'))
    assert all(set(r) <= set(p) for r, p in zip(ca.tolist(), pool.tolist())) and any(
        len(set(r)) < 5 for r in ca.tolist()
    )
    assert torch.equal(qa.sort().values, pool.sort().values)
    with pytest.raises(ValueError, match='choose fewer'): suite(m=6)['QA-'].targets(queries, gallery, 0)


def test_constants_of_ca_are_distances_of_the_querying_rows():
    gallery, queries, _ = scene(n=60, classes=4)
    t = suite(w=2)['CA+'].targets(queries, gallery, 0)
    assert t['dist'].shape == (7, 2, 60)
    assert t['dist'][3, 1, 8].item() == pytest.approx(dist(gallery.emb[8], gallery.emb[t['row'][3, 1]]), abs=1e-9)


def test_self_exclusion_by_id_or_by_distance():
    "Rows 0 and 1 coincide; the query is row 1."
    gallery = Gallery(on_circle(0., 0, 10, 180), tensor([0, 1, 1, 0]))
    query = members(gallery, tensor([1]))
    by_id, dropped = suite(), suite(self_exclusion='drop_first')
    assert (
        by_id['GTT'].targets(query, gallery, 0)['row'].item() == 0
        and dropped['GTT'].targets(query, gallery, 0)['row'].item() == 1
    )
    for name in ('ES', 'LTM', 'GTM'):
        hits = [
            s[name].measure(query.emb, query, s[name].targets(query, gallery, 0), gallery)[s[name].outcomes[-1]].item()
            for s in (by_id, dropped)
        ]
        assert hits == [0., 100.]
    assert near(query, gallery).item() == 0 and near(query, gallery, 'drop_first').item() == 1


def test_queries_from_outside_the_gallery_hide_nothing():
    outside = Queries(on_circle(1.), tensor([0]), tensor([-1]), tensor([77]))
    for s in (suite(), suite(self_exclusion='drop_first')):
        assert s['GTT'].targets(outside, CIRCLE, 0)['row'].item() == 0 and near(outside, CIRCLE).item() == 0
        t = s['ES'].targets(outside, CIRCLE, 0)
        assert s['ES'].measure(outside.emb, outside, t, CIRCLE)['ES:R'].item() == 100
    assert torch.equal(
        ltm_targets(outside, CIRCLE, 0)['mate'], ltm_targets(outside, CIRCLE, 0, exclude_self=True)['mate']
    )


def test_a_lonely_query_has_no_answer():
    gallery = Gallery(CIRCLE.emb, tensor([0, 1, 1, 1, 2, 2]))
    queries = members(gallery, tensor([0, 2]))
    for name in ('ES', 'LTM', 'GTM', 'LTM fixed', 'GTM fixed'):
        t = ALL[name].targets(queries, gallery, 0)
        hits = ALL[name].measure(queries.emb, queries, t, gallery)[ALL[name].outcomes[-1]]
        assert hits[0].isnan() and hits[1] == 100
        z = queries.emb.clone().requires_grad_()
        assert torch.autograd.grad(ALL[name].objective(z, queries, t, gallery).sum(), z)[0].isfinite().all()


def test_ties_go_to_the_lower_row_even_with_rounding():
    d = tensor([[.5, .2, .2 + 1e-15, .2, .9]], dtype=torch.float64)
    assert nearest(d).item() == 1 and nearest(d.flip(1), within=noise(d)).item() == 1
    assert nearest(d[:, [0, 2, 3]]).item() == 2                              # exact distances: what is nearer is nearer
    assert position(d, torch.arange(5)[None]).tolist() == [[3, 0, 1, 2, 4]]
    r = torch.rand(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(position(r, torch.arange(50).expand(6, 50)), r.argsort(dim=1).argsort(dim=1)) and torch.equal(
        nearest(r), r.argmin(1)
    )


def test_rank_counts_strictly_closer_items_only():
    gallery = Gallery(on_circle(0., 0, 0, 90), tensor([0, 0, 1, 1]))
    queries = members(gallery, tensor([1]))
    t = ca_constants(tensor([[3]]), gallery)  # rows 0, 1, 2 tie, row 3 asks: only itself is closer
    assert SUITE['CA+'].measure(queries.emb, queries, t, gallery)['CA+'].item() == pytest.approx(25.)
    assert qa_measure(queries.emb, queries, dict(row=tensor([[2]])), gallery, name='QA+')[
        'QA+'
    ].item() == pytest.approx(50.0)


# --- gradients
# --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ALL)
def test_gradcheck(name):
    gallery, queries, emb = scene(n=40, batch=3, classes=4)
    attack = ALL[name]
    t = attack.targets(queries, gallery, 2)
    assert torch.autograd.gradcheck(
        lambda raw: attack.objective(normalise(raw), queries, t, gallery), emb.clone().requires_grad_(), atol=1e-5
    )


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_finite_gradient_at_the_clean_image_at_duplicates_and_after_a_collapse(name, dtype):
    apart = normalise(torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=dtype))
    for emb in (apart, apart[[0, 0, 1, 1, 2, 2, 3, 3]], apart[[0]*8]):
        gallery = Gallery(emb, tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        queries = members(gallery, torch.arange(8))
        t = ALL[name].targets(queries, gallery, 0)
        z = emb.clone().requires_grad_()
        values = ALL[name].objective(z, queries, t, gallery)
        grad, = torch.autograd.grad(values.sum(), z)
        assert values.isfinite().all() and grad.isfinite().all()
        if name == 'ES': assert (grad.norm(dim=1) > .9).all()  # never stuck at the start


def test_rounding_at_the_start_gives_no_direction():
    """A distance that is zero but for rounding pushes nowhere: to the own copy (source GTM, LTM, CA+) or to the wanted
    row (QA)."""
    nudged = ZERO.emb + 1e-15*tensor([[0., 1.]])
    for name, t in (
        ('GTM', gtm_targets(ZERO, CIRCLE, 0)), ('CA+', ca_constants(tensor([[0]]), CIRCLE)),
        ('QA+', dict(row=tensor([[0]])))
    ):
        z = nudged.clone().requires_grad_()
        assert torch.autograd.grad(ALL[name].objective(z, ZERO, t, CIRCLE).sum(), z)[0].abs().max() == 0
    z, t = nudged.clone().requires_grad_(), ltm_targets(ZERO, CIRCLE, 0)
    grad, = torch.autograd.grad(ALL['LTM'].objective(z, ZERO, t, CIRCLE).sum(), z)
    assert grad.norm() == pytest.approx(1.)  # the pull of the farthest item alone


# --- whole attacks on a small network
# ---------------------------------------------------------------------------------------

BUDGET = dict(eps=.1, step_size=.02, steps=8, seed=0)


@pytest.fixture(scope='module')
def world():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 16))
        .double()
        .eval()
    )
    x = (torch.rand(10, 1, 12, 12).repeat_interleave(6, 0) + .15*torch.randn(60, 1, 12, 12)).clamp(0, 1).double()
    gallery = Gallery(embed(model, x).detach(), torch.arange(10).repeat_interleave(6))
    return model.requires_grad_(), x, gallery, torch.arange(0, 60, 4)


def run(world, name, rows=None, model=None, **options):
    net, x, gallery, some = world
    rows = some if rows is None else rows
    return run_attack(model or net, ALL[name], x[rows], members(gallery, rows), gallery, **{**BUDGET, **options})


@pytest.mark.parametrize('name', ALL)
def test_result_does_not_depend_on_the_batch(world, name):
    whole = run(world, name)
    parts = [run(world, name, rows) for rows in (world[3][:1], world[3][1:6], world[3][6:])]
    torch.testing.assert_close(torch.cat([p.images for p in parts]), whole.images, rtol=0, atol=1e-12)
    for key in ALL[name].outcomes:
        for when in ('before', 'after'):
            torch.testing.assert_close(
                torch.cat([getattr(p, when)[key] for p in parts]), getattr(whole, when)[key], rtol=0, atol=1e-9
            )


@pytest.mark.parametrize('name', ALL)
def test_budget_identity_and_untouched_model(world, name):
    model, x, gallery, some = world
    state = copy.deepcopy(model.state_dict())
    model.train()
    found = run(world, name)
    assert model.training and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    assert (found.images - x[some]).abs().max() <= .1 + 1e-15 and found.images.min() >= 0 and found.images.max() <= 1
    for nothing in (dict(eps=0.), dict(steps=0)):
        still = run(world, name, **nothing)
        assert torch.equal(still.images, x[some])
        for key in still.after: torch.testing.assert_close(still.after[key], still.before[key], rtol=0, atol=1e-9)


TOWARDS = {
    'CA+': -1, 'CA-': 1, 'QA+': -1, 'QA-': 1, 'TMA': 1, 'ES:D': 1, 'ES:R': -1, 'LTM': -1, 'LTM fixed': -1,
    'GTM fixed': -1, 'GTT': -1
}


@pytest.mark.parametrize('name', [n for n in ALL if n != 'GTM'])
def test_gains_ground_beyond_random_noise(world, name):
    """White box must beat the best of nothing and of random corners of the ball, on average over the queries, by a
    clear margin."""
    model, x, gallery, some = world
    queries, found = members(gallery, some), run(world, name, steps=15)
    noise = .1*torch.randn(x[some].shape, generator=torch.Generator().manual_seed(1)).sign()
    emb = embed(model, (x[some] + noise).clamp(0, 1)).detach()
    blind = ALL[name].measure(emb, queries, ALL[name].targets(queries, gallery, 0), gallery)
    scale = {'TMA': .05, 'ES:D': .1}
    for key in found.after:
        for other in (found.before, blind):
            assert TOWARDS[key]*(found.after[key] - other[key]).mean() > scale.get(key, 10.), key


@pytest.mark.parametrize(
    'name, key, goal',
    [
        ('GTM fixed', 'GTM fixed', 0.0), ('LTM fixed', 'LTM fixed', 0.0), ('GTT', 'GTT', 0.0), ('ES', 'ES:R', 0.0),
        ('QA+', 'QA+', 0.0)
    ],
)
def test_a_huge_ball_succeeds(world, name, key, goal):
    assert run(world, name, eps=1., step_size=.03, steps=60).after[key].mean() == pytest.approx(goal, abs=8.)


@pytest.mark.parametrize('name', ALL)
def test_best_iterate_never_loses_by_more_steps(world, name):
    net, x, gallery, some = world
    queries = members(gallery, some)
    targets = ALL[name].targets(queries, gallery, 0)
    def reached(**options):
        return ALL[name].objective(
            embed(net, run(world, name, keep='best', **options).images).detach(), queries, targets, gallery
        )
    few, many = reached(steps=2), reached(steps=9)
    assert (many >= few - 1e-9).all() and many.mean() > few.mean()
    small = run(world, name, keep='best')
    assert (reached(eps=.2, start=small.images) >= reached() - 1e-9).all()


def test_transfer_to_the_same_weights_is_white_box(world):
    assert torch.equal(run(world, 'QA-').images, run(world, 'QA-', model=copy.deepcopy(world[0])).images)


def test_random_targets_change_with_the_seed_and_are_shared_before_and_after(world):
    a, b = run(world, 'TMA'), run(world, 'TMA', seed=1)
    assert not torch.equal(a.before['TMA'], b.before['TMA']) and torch.equal(
        a.before['TMA'], run(world, 'TMA', steps=1).before['TMA']
    )


def test_before_is_what_the_definitions_promise(world):
    assert (run(world, 'ES').before['ES:D'] == 0).all() and (run(world, 'GTT').before['GTT'] == 100).all()
    # the query itself is first, the pool holds one item
    assert run(world, 'QA-').before['QA-'].max() == pytest.approx(100/60)


def test_es_d_may_be_read_before_the_final_update(world):
    final, last = run(world, 'ES'), run(world, 'ES', esd_eval='last_forward')
    earlier = run(world, 'ES', steps=BUDGET['steps'] - 1)
    torch.testing.assert_close(last.after['ES:D'], earlier.after['ES:D'])
    assert torch.equal(last.images, final.images) and torch.equal(last.after['ES:R'], final.after['ES:R'])
    assert not torch.allclose(last.after['ES:D'], final.after['ES:D'])


def test_single_precision_agrees_with_double(world):
    model, x, gallery, some = world
    single = Gallery(gallery.emb.float(), gallery.label)
    for name in ALL:
        half = run_attack(
            copy.deepcopy(model).float(), ALL[name], x[some].float(), members(single, some), single, **BUDGET
        )
        for key, v in run(world, name).after.items():
            # one query of 15 is 6.7
            assert (half.after[key].double() - v).mean().abs() < (.01 if key in ('TMA', 'ES:D') else 7.), key


def test_bad_input_is_named(world):
    model, x, gallery, some = world
    queries = members(gallery, some)
    with pytest.raises(ValueError, match='image by image'):
        run_attack(model, SUITE['ES'], x, queries, gallery, **BUDGET)
    with pytest.raises(ValueError, match='esd_eval'): run(world, 'ES', esd_eval='first')
    with pytest.raises(ValueError, match='eps must lie'): run(world, 'ES', eps=8.)
    with pytest.raises(ValueError, match='two classes'): Gallery(gallery.emb, torch.zeros(60).long())
    with pytest.raises(ValueError, match='gallery needs'): Gallery(gallery.emb, gallery.label[:5])
    with pytest.raises(ValueError, match='queries need'):
        Queries(queries.emb, queries.label, queries.row[:2], queries.id)


def test_ltm_finds_a_mate_in_the_last_row():
    "Item 4 (130°) has one mate, the last row (200°); the farthest item of another class lies at 0°."
    query = members(CIRCLE, tensor([4]))
    value = ALL['LTM fixed'].objective(query.emb, query, ltm_targets(query, CIRCLE, 0, exclude_self=True), CIRCLE)
    expected = 2*math.sin(math.radians(35)) - 2*math.sin(math.radians(65))
    assert value.item() == pytest.approx(expected, abs=1e-6)


# --- every shortcut against the plain form
# -----------------------------------------------------------------------------------

def plain_objective(name):
    "The objective as it is printed, through autograd and torch.cdist's exact mode."
    sign = 1 if '+' in name else -1
    def far(emb, gallery):
        return torch.where(
            (d := torch.cdist(emb, gallery.emb, compute_mode='donot_use_mm_for_euclid_dist')) > noise(emb), d,
            d.detach()
        )
    def ca(emb, queries, t, gallery):
        return -hinge(sign*(far(emb, gallery).gather(1, t['row'])[...,None] - t['dist'])).mean((1, 2))
    def qa(emb, queries, t, gallery):
        dist = far(emb, gallery)
        return -hinge(sign*(dist.gather(1, t['row'])[...,None] - dist[:,None])).mean((1, 2))
    def ltm(emb, queries, t, gallery):
        dist, same = far(emb, gallery), gallery.label == queries.label[:,None]
        mate = same & (torch.arange(len(gallery.label)) != queries.row[:,None]) if name == 'LTM fixed' else same
        return -hinge(dist.masked_fill(same, -torch.inf).amax(1) - dist.masked_fill(~mate, torch.inf).amin(1))
    return {'CA+': ca, 'CA-': ca, 'QA+': qa, 'QA-': qa, 'GTT': qa, 'LTM': ltm, 'LTM fixed': ltm}[name]


@pytest.mark.parametrize('name', ['CA+', 'CA-', 'QA+', 'QA-', 'GTT', 'LTM', 'LTM fixed'])
def test_closed_forms_find_the_same_adversarial_images(world, name):
    model, x, gallery, some = world
    attack = {**suite(w=3, m=1 if name == 'QA-' else 2), **FIXED}[name]  # QA-: the pool is one item
    forms = attack, replace(attack, objective=plain_objective(name))
    short, plain = (
        run_attack(model, a, x[some], members(gallery, some), gallery, **{**BUDGET, 'steps': 16}) for a in forms
    )
    assert (short.images - x[some]).abs().max() > .05
    torch.testing.assert_close(short.images, plain.images, rtol=0, atol=1e-12)
    for key, value in plain.after.items(): torch.testing.assert_close(short.after[key], value, rtol=0, atol=1e-9)


def test_half_precision_searches_as_well_and_is_measured_in_full(world):
    model, x, gallery, some = world
    model, x, gallery = copy.deepcopy(model).float(), x.float(), Gallery(gallery.emb.float(), gallery.label)
    full, half = (
        run_attack(model, SUITE['ES'], x[some], members(gallery, some), gallery, **BUDGET, precision=p)
        for p in ('float32', 'bfloat16')
    )
    assert not torch.equal(full.images, half.images) and half.after['ES:D'].dtype == torch.float32
    with torch.no_grad(): moved = paired_distance(embed(model, half.images), gallery.emb[some])
    torch.testing.assert_close(half.after['ES:D'], moved)
    assert half.after['ES:D'].mean() > .9*full.after['ES:D'].mean()
    with pytest.raises(ValueError, match='precision'): run(world, 'ES', precision='float16')


def test_mates_lists_the_class_and_fills_up():
    gallery = Gallery(torch.eye(5), tensor([3, 1, 3, 1, 3]))
    query = Queries(torch.eye(5)[:3], tensor([1, 3, 7]), tensor([1, -1, -1]), torch.arange(3))
    row, real = mates(query, gallery)
    assert row.tolist() == [[1, 3, 1], [0, 2, 4], [0, 0, 0]] and real.tolist() == [
        [True, True, False], [True] * 3, [False] * 3
    ]


def test_ltm_leaves_its_own_class_alone_when_classes_differ_in_size():
    """The class of one image that is the farthest of all; the table of mates repeats its row to the size of the
    largest class."""
    gallery = Gallery(on_circle(180., 10, 40, 50, 60), torch.tensor([0, 0, 1, 1, 1]))
    query = Queries(on_circle(5.), torch.tensor([0]), torch.tensor([-1]), torch.tensor([0]))
    assert _extremes(query.emb, ltm_targets(query, gallery, 0), gallery).tolist() == [[4, 1]]
