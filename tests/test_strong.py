"Stronger attacks against literal loops, the plain attack and each other."
import copy
import math
from fractions import Fraction
from functools import partial
from itertools import combinations

import pytest
import torch
from scipy.stats import kendalltau
from torch import nn, tensor

from robust_dml.data import sets
from robust_dml.attacks.suite import FIXED, SUITE, Attack, Gallery, Queries, members, run_attack
from robust_dml.defenses.baselines import multi_similarity_loss
from robust_dml.core import generator
from robust_dml.triplets.distances import normalise
from robust_dml.metrics.evaluate import evaluate, queries_and_gallery
from robust_dml.models.networks import build, embed, embed_all
from robust_dml.attacks.loop import pgd, project
from robust_dml.runs.store import Run, append_line, read_lines
from robust_dml.attacks.strong import APGD, BALLS, BEYOND, GOALS, LTM_NEAREST, R_AT_1, Ascent, adaptive, checkpoints
from robust_dml.attacks.strong import curve, curve_line, decisive, onto_l2, onto_linf, order, over_eps, over_steps
from robust_dml.attacks.strong import random_start, run_strong, spqa, three, unit, worst_case
from robust_dml.defenses.train import train
from robust_dml.defenses.base import make_defense as make

PLAIN = {**SUITE, **FIXED}
ALL = {**PLAIN, **BEYOND}
BUDGET = dict(eps=.1, step_size=.01, steps=20, seed=0)


def toy(dtype=torch.float64, rows=range(0, 60, 5)):
    "The network and the images of the attacks' notebook."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8*5*5, 16)).double()
    kinds = torch.rand(10, 1, 12, 12).double()
    images = (kinds.repeat_interleave(6, 0) + .15*torch.randn(60, 1, 12, 12).double()).clamp(0, 1).to(dtype)
    net, rows = net.to(dtype), tensor(list(rows))
    shelf = Gallery(embed(net, images).detach(), torch.arange(10).repeat_interleave(6))
    return net, images[rows], members(shelf, rows), shelf


@pytest.fixture(scope='module')
def trained():
    "A net trained for seconds on characters, and a part of the test set as queries."
    images = sets.glyphs(train_classes=20, test_classes=12, per_class=8)
    net = build('small', dim=16, size=28, channels=1, seed=0)
    train(net, images.train, make('natural', margin=.2, miner='semihard'), epochs=12, pairs=20, lr=2e-3, show=False)
    queries, gallery = queries_and_gallery(embed_all(net, images.test, batch_size=96), images.test.labels)
    rows = torch.arange(0, 96, 4)
    return net, images.test, images.test.batch(rows), members(gallery, rows), gallery


# --- balls
# ------------------------------------------------------------------------------------------------------------------

def cloud(seed=0, count=40):
    gen = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 3, 5, 4, generator=gen, dtype=torch.float64)
    clean[:, 0] = (clean[:, 0] > .5).double()  # a channel at the ends of the range
    return clean, clean + torch.randn(clean.shape, generator=gen, dtype=torch.float64) * torch.logspace(
        -3, 1, count
    ).view(-1, 1, 1, 1)


@pytest.mark.parametrize('eps', [0., .03, .7, 3.])
def test_l2_projection_stays_in_both_sets_and_moves_nothing_that_is_inside(eps):
    clean, far = cloud()
    found = onto_l2(clean, eps)(far)
    for c, f, p in zip(clean, far, found):
        length = math.sqrt(sum((a - b)**2 for a, b in zip(f.flatten().tolist(), c.flatten().tolist())))
        radial = c + (f - c)*min(1., eps/length)
        torch.testing.assert_close(p, radial.clamp(0, 1), rtol=0, atol=1e-12)
    assert (found - clean).flatten(1).norm(dim=1).max() <= eps*(1 + 1e-12) and found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(onto_l2(clean, eps)(found), found, rtol=0, atol=1e-15)


def test_linf_projection_is_that_of_the_loop():
    clean, far = cloud()
    assert torch.equal(onto_linf(clean, .1)(far), project(far, clean, .1))


def test_directions_have_unit_length_and_zero_stays_zero():
    _, grad = cloud()
    torch.testing.assert_close(unit(1e-9*grad).flatten(1).norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(unit(torch.zeros(2, 1, 3, 3)), torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize('norm', BALLS)
def test_random_points_fill_the_unit_ball(norm):
    gen, p = generator(0, 'test'), math.inf if norm == 'linf' else 2
    points = torch.stack([BALLS[norm].sample((1, 2, 2), gen) for _ in range(4000)]).flatten(1)
    # uniform in a ball of four dimensions: the volume inside the radius is uniform
    share = points.norm(p=p, dim=1)**4
    # four standard errors
    assert share.max() <= 1 and abs(share.mean() - .5) < .02 and abs((share < .25).double().mean() - .25) < .03
    assert points.mean(0).abs().max() < .05


# --- the move
# ---------------------------------------------------------------------------------------------------------------

def test_checkpoints_follow_the_published_recursion():
    for steps in (1, 7, 100, 333):
        p, found = [Fraction(0), Fraction(22, 100)], set()
        while p[-1] <= 1:
            found.add(math.ceil(p[-1]*steps))
            p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
        assert checkpoints(steps) == found


def literal(x0, value_and_grad, *, eps, step, steps, momentum, halve):
    """One image, one number at a time: Auto-PGD as its authors write it, with a fresh start of the momentum after a
    return."""
    def clip(z): return [min(max(v, c - eps, 0.), c + eps, 1.) for v, c in zip(z, x0)]
    checks = sorted(checkpoints(steps)) if halve else []
    x, before, path = list(x0), None, []
    best, gains, since, level, halved, last = None, 0, 0, None, True, None
    for k in range(steps):
        value, grad = value_and_grad(x)
        if last is not None: gains += value > last
        if best is None or value > best[0]: best = value, list(x), list(grad)
        level, last = best[0] if level is None else level, value
        if k in checks:
            if gains < .75*(k - since) or (not halved and best[0] <= level):
                step, x, grad, before, halved = step/2, list(best[1]), list(best[2]), list(best[1]), True
            else: halved = False
            gains, since, level = 0, k, best[0]
        z = clip([v + step*((g > 0) - (g < 0)) for v, g in zip(x, grad)])
        new = (
            z
            if before is None or not momentum
            else clip([v + (1 - momentum) * (n - v) + momentum * (v - b) for v, n, b in zip(x, z, before)])
        )
        before, x = x, new
        path.append(step)
    return x, path


@pytest.mark.parametrize('momentum, halve', [(0., False), (.25, False), (0., True), (.25, True)])
def test_ascent_matches_a_literal_loop(momentum, halve):
    net, x, queries, shelf = toy(rows=range(0, 60, 15))
    attack, options = SUITE['ES'], dict(eps=.1, steps=25)
    def objective(emb): return attack.objective(emb, queries, None, shelf)
    move = Ascent(x, ball=BALLS['linf'], step_size=.2, momentum=momentum, halve=halve, **options)
    found = pgd(net, objective, x, step_size=.2, move=move, **options).images
    for i, image in enumerate(x):
        def value_and_grad(flat):
            z = tensor(flat, dtype=torch.float64).view(1, 1, 12, 12).requires_grad_()
            value = attack.objective(
                embed(net, z), Queries(*(v[i : i + 1] for v in (queries.emb, queries.label, queries.row, queries.id))),
                None, shelf
            )
            return value.item(), torch.autograd.grad(value.sum(), z)[0].flatten().tolist()
        expected, path = literal(
            image.flatten().tolist(), value_and_grad, eps=0.1, step=0.2, steps=25, momentum=momentum, halve=halve
        )
        torch.testing.assert_close(found[i].flatten(), tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (path[-1] < .2) == halve  # the branch that halves was taken
        assert move.step[i].item() == path[-1]


def test_halving_needs_the_best_image_and_not_the_last():
    "An objective that only falls: every checkpoint halves and goes back to the start."
    start = torch.full((1, 1, 1, 1), .5, dtype=torch.float64)
    move, at = Ascent(start, ball=BALLS['linf'], eps=.5, step_size=.1, steps=10, halve=True), start
    for k in range(10):
        at = move(at, torch.ones_like(at), tensor([-float(k)]))
        if k in checkpoints(10): assert at.item() == pytest.approx(.5 + move.step.item())
    assert move.step.item() == pytest.approx(.1/2**len(checkpoints(10) - {10}))


def test_halving_when_the_search_climbs_without_reaching_its_best():
    "The start is the best; then a fall and a steady climb below it. Counted steps alone would never halve."
    at = torch.full((1, 1, 1, 1), .5, dtype=torch.float64)
    move, steps = Ascent(at, ball=BALLS['linf'], eps=.5, step_size=.1, steps=100, halve=True), []
    for k in range(75):
        at = move(at, torch.ones_like(at), tensor([0. if k == 0 else k - 1000.]))
        steps.append(move.step.item())
    halved = [k for k in range(1, 75) if steps[k] < steps[k-1]]
    assert halved == [41, 70]  # not at 22, where nothing is known of the level before; not right after a halving, at 57


# --- equality with the plain attack
# -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize(
    'options', [dict(), dict(steps=1), dict(steps=2, keep='best'), dict(steps=0), dict(eps=0.0)], ids=str
)
def test_without_options_it_is_run_attack_to_the_last_bit(name, options):
    for dtype in (torch.float32, torch.float64):
        scene = toy(dtype)
        kw = {**BUDGET, 'steps': 6, **options}
        plain, same = (run(scene[0], ALL[name], *scene[1:], **kw) for run in (run_attack, run_strong))
        assert torch.equal(plain.images, same.images)
        for k in ALL[name].outcomes:
            assert torch.equal(plain.after[k], same.after[k]) and torch.equal(plain.before[k], same.before[k])
    if kw['steps'] and kw['eps']: assert not torch.equal(same.images, scene[1])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(restarts=0), 'restarts must be a whole number'), (dict(restarts=1.5), 'restarts must be a whole number'),
        (dict(norm='l1'), "'linf', 'l2'"), (dict(keep='first'), "'last', 'best'"),
        (dict(momentum=-0.1), 'momentum must lie in'), (dict(eps=8.0), 'eps must lie in'),
        (dict(step_size=0.0), 'above 0'), (dict(norm='l2', eps=-1.0), 'eps must lie in'),
        (dict(norm='l2', step_size=0.0), 'above 0'), (dict(by='R@1'), "by must be one of 'LTM'")
    ],
)
def test_bad_arguments_are_named(change, message):
    net, x, queries, shelf = toy()
    with pytest.raises(ValueError, match=message):
        run_strong(net, SUITE['LTM'], x, queries, shelf, **{**BUDGET, **change})


def test_images_and_queries_must_match():
    net, x, queries, shelf = toy()
    with pytest.raises(ValueError, match='image by image, found 3 and 12'):
        run_strong(net, SUITE['ES'], x[:3], queries, shelf, **BUDGET)


@pytest.mark.parametrize('norm', BALLS)
def test_the_model_is_left_as_it_was_and_the_images_stay_allowed(norm):
    net, x, queries, shelf = toy()
    net.train()
    before = copy.deepcopy(net.state_dict())
    eps = .1 if norm == 'linf' else 1.2
    o = run_strong(
        net, SUITE['TMA'], x, queries, shelf, eps=eps, step_size=2 * eps, steps=8, seed=0, restarts=3, norm=norm, **APGD
    )
    delta = (o.images - x).flatten(1)
    assert (delta.abs().amax(1) if norm == 'linf' else delta.norm(dim=1)).max() <= eps * (
        1 + 1e-12
    ) and delta.abs().max() > 0.05
    assert o.images.min() >= 0 and o.images.max() <= 1 and not o.images.requires_grad
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


# --- restarts
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('norm', BALLS)
def test_starts_depend_on_seed_attack_restart_and_query_only(norm):
    net, x, queries, shelf = toy()
    draw = partial(random_start, x, queries, ball=BALLS[norm], eps=.3)
    base = draw(seed=0, name='ES', restart=1)
    assert torch.equal(draw(seed=0, name='ES', restart=1), base)
    grey = random_start(torch.full_like(x, .5), queries, ball=BALLS[norm], eps=.3, seed=0, name='ES', restart=1)
    assert len({tuple(g.tolist()) for g in grey.flatten(1)}) == len(x)  # no two queries start alike
    for other in (
        draw(seed=1, name='ES', restart=1), draw(seed=0, name='TMA', restart=1), draw(seed=0, name='ES', restart=2)
    ):
        assert ((other - base).flatten(1).abs().amax(1) > .01).all()
    pick = tensor([7, 2])
    some = Queries(*(v[pick] for v in (queries.emb, queries.label, queries.row, queries.id)))
    assert torch.equal(random_start(x[pick], some, ball=BALLS[norm], eps=.3, seed=0, name='ES', restart=1), base[pick])
    length = (base - x).flatten(1).norm(p=math.inf if norm == 'linf' else 2, dim=1)
    assert length.max() <= .3*(1 + 1e-6) and length.min() > .05  # the points are drawn in float32


@pytest.mark.parametrize('name', ['CA+', 'QA-', 'ES', 'LTM nearest', 'OA'])
def test_batches_change_nothing(name):
    net, x, queries, shelf = toy()
    run = partial(run_strong, net, ALL[name], gallery=shelf, **BUDGET | dict(steps=8, step_size=.2), restarts=3, **APGD)
    whole = run(x=x, queries=queries)
    for pick in torch.arange(12).split(5):
        part = run(
            x=x[pick], queries=Queries(*(v[pick] for v in (queries.emb, queries.label, queries.row, queries.id)))
        )
        torch.testing.assert_close(part.images, whole.images[pick], rtol=0, atol=1e-9)
        for k in part.after: torch.testing.assert_close(part.after[k], whole.after[k][pick], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', ALL)
def test_more_restarts_are_never_worse_for_any_query(name):
    scene = toy()
    outcome, sign = decisive(ALL[name])
    runs = [
        sign * run_strong(scene[0], ALL[name], *scene[1:], **BUDGET | dict(steps=5), restarts=r).after[outcome]
        for r in (1, 2, 6)
    ]
    assert (runs[1] >= runs[0]).all() and (runs[2] >= runs[1]).all()


def test_restarts_find_what_one_search_misses():
    scene = toy()
    for by in ('ES:D', 'ES:R'):
        sign = GOALS[by]
        one, six = (
            sign * run_strong(scene[0], SUITE['ES'], *scene[1:], **BUDGET, restarts=r, by=by).after[by].mean()
            for r in (1, 6)
        )
        assert six > one


def test_the_measured_outcome_decides_and_the_objective_breaks_ties():
    "An attack whose objective prefers a dark image and whose outcome a bright one; the first search goes nowhere."
    class Mean(nn.Module):
        def forward(self, x): return torch.stack([x.mean((1, 2, 3)), torch.ones(len(x), dtype=x.dtype)], 1)
    def bright(emb): return emb[:, 0]/emb[:, 1]
    def attack(measure):
        return Attack(
            'TMA', lambda *a: {}, lambda emb, *a: -bright(emb), lambda emb, *a: {'TMA': measure(bright(emb))}, ('TMA',)
        )
    x, shelf = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64), Gallery(
        torch.eye(2, dtype=torch.float64), tensor([0, 1])
    )
    queries = Queries(embed(Mean(), x), torch.zeros(4).long(), torch.full((4,), -1), torch.arange(4))
    def run(measure):
        return run_strong(
            Mean(), attack(measure), x, queries, shelf, eps=0.2, step_size=1e-9, steps=2, seed=0, restarts=8
        )
    starts = torch.stack(
        [x]
        + [random_start(x, queries, ball=BALLS['linf'], eps=0.2, seed=0, name='TMA', restart=r) for r in range(1, 8)]
    ).mean((2, 3, 4))
    torch.testing.assert_close(run(lambda b: b).images.mean((1, 2, 3)), starts.amax(0), rtol=0, atol=1e-8)
    for tie in (torch.zeros_like, lambda b: b*math.nan):
        torch.testing.assert_close(run(tie).images.mean((1, 2, 3)), starts.amin(0), rtol=0, atol=1e-8)


# --- strength
# ---------------------------------------------------------------------------------------------------------------

def reached(net, attack, x, queries, gallery, **kw):
    "Mean objective at the end of an attack, and its decisive outcome with the attacker's sign."
    run = run_strong if kw.keys() & {'restarts', 'momentum', 'halve'} else run_attack
    o, (outcome, sign) = run(net, attack, x, queries, gallery, **kw), decisive(attack)
    with torch.no_grad():
        value = attack.objective(
            embed(net.eval(), o.images), queries, attack.targets(queries, gallery, kw['seed']), gallery
        )
    return value.nan_to_num(0.).mean().item(), sign*o.after[outcome].nanmean().item()


@pytest.mark.parametrize('name', ALL)
def test_harder_search_is_at_least_as_strong_on_the_toy(name):
    scene = toy(rows=range(60))
    plain = reached(scene[0], ALL[name], *scene[1:], **BUDGET)
    schedule = reached(scene[0], ALL[name], *scene[1:], **BUDGET | dict(step_size=.1), **APGD)
    restarts = reached(scene[0], ALL[name], *scene[1:], **BUDGET, restarts=4)
    assert schedule[0] >= plain[0] and restarts[1] >= plain[1]


@pytest.mark.parametrize('name', ALL)
def test_harder_search_is_at_least_as_strong_on_a_trained_model(name, trained):
    net, _, *scene = trained
    budget = dict(eps=16/255, step_size=4/255, steps=12, seed=0)
    plain = reached(net, ALL[name], *scene, **budget)
    schedule = reached(net, ALL[name], *scene, **budget | dict(step_size=16/255), **APGD)
    restarts = reached(net, ALL[name], *scene, **budget, restarts=3)
    assert schedule[0] >= plain[0] and restarts[1] >= plain[1]


def test_the_nearest_stranger_is_a_stronger_aim_than_the_farthest(trained):
    net, _, *scene = trained
    budget = dict(eps=8/255, step_size=2/255, steps=10, seed=0)
    lost = {
        name: 100 - run_attack(net, ALL[name], *scene, **budget).after[name].nanmean().item()
        for name in ('LTM', 'LTM fixed', 'LTM nearest')
    }
    assert lost['LTM nearest'] > max(lost['LTM'], lost['LTM fixed']) + 10, lost


def test_a_larger_l2_ball_and_the_same_radius_in_linf_are_ordered(trained):
    net, _, *scene = trained
    def shift(eps, norm):
        return (
            run_strong(net, SUITE['ES'], *scene, eps=eps, step_size=eps / 4, steps=10, seed=0, norm=norm)
            .after['ES:D']
            .mean()
        )
    assert shift(.1, 'l2') < shift(1., 'l2') < shift(4., 'l2')
    assert shift(.05, 'l2') < shift(.05, 'linf')  # the L2 ball of the same radius lies inside


# --- attacks beyond the ten
# -------------------------------------------------------------------------------------------------

def scene(n=60, batch=7, dim=5, classes=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (n,), generator=gen)
    label[0] = classes  # a query without a mate
    gallery = Gallery(normalise(torch.randn(n, dim, generator=gen, dtype=torch.float64)), label)
    queries = members(gallery, torch.cat([tensor([0]), 1 + torch.randperm(n - 1, generator=gen)[:batch - 1]]))
    return gallery, queries, normalise(queries.emb + .3*torch.randn(batch, dim, generator=gen, dtype=torch.float64))


def dist(u, v): return math.sqrt(sum((a - b)**2 for a, b in zip(u.tolist(), v.tolist())))
def plus(z): return max(z, 0.)
def mean(values): return sum(values)/len(values)


def qa(d, rows, sign): return -mean([plus(sign*(d[m] - b)) for m in rows for b in d])
def place(d, rows): return 100*mean([sorted(range(len(d)), key=lambda k: d[k]).index(m)/len(d) for m in rows])


def by_definition(name, d, i, queries, t, gallery):
    "(objective, {outcome: value}) of query i, whose distances are d."
    y, own, label = gallery.label.tolist(), queries.row[i].item(), queries.label[i].item()
    if name == 'LTM nearest':
        mates, strangers = [d[k] for k in range(len(d)) if y[k] == label and k != own], [
            d[k] for k in range(len(d)) if y[k] != label
        ]
        return (
            (min(mates) - min(strangers), {name: 100.0 * (min(mates) < min(strangers))})
            if mates
            else (0.0, {name: math.nan})
        )
    rows = t['row'][i].tolist()
    if name == 'OA':
        lacking = [plus(d[a] - d[b]) for a, b in combinations(rows, 2)]
        tau = kendalltau(range(len(rows)), [d[r] for r in rows]).statistic
        return -mean(lacking) + qa(d, rows, 1), {'OA': tau, 'OA:top': place(d, rows)}
    kept = t['keep'][i].tolist()
    return qa(d, rows, 1 if name == 'SPQA+' else -1) + (1 if name == 'SPQA+' else 100) * qa(d, kept, 1), {
        name: place(d, rows), f'{name}:top': place(d, kept)
    }


@pytest.mark.parametrize('name', BEYOND)
def test_objective_and_outcomes_match_the_definition(name):
    gallery, queries, emb = scene()
    attack = BEYOND[name]
    t = attack.targets(queries, gallery, 3)
    values, found = attack.objective(emb, queries, t, gallery), attack.measure(emb, queries, t, gallery)
    assert tuple(found) == attack.outcomes
    for i, q in enumerate(emb):
        objective, outcomes = by_definition(name, [dist(q, x) for x in gallery.emb], i, queries, t, gallery)
        assert values[i].item() == pytest.approx(objective, abs=1e-9)
        for k in outcomes: assert found[k][i].item() == pytest.approx(outcomes[k], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize('name', BEYOND)
def test_gradients(name):
    gallery, queries, emb = scene()
    attack = BEYOND[name]
    t = attack.targets(queries, gallery, 3)
    assert torch.autograd.gradcheck(lambda e: attack.objective(e, queries, t, gallery), emb.clone().requires_grad_())
    for special in (queries.emb, gallery.emb[:1].expand_as(emb)):  # on gallery items, and all queries on one point
        z = special.clone().requires_grad_()
        assert torch.autograd.grad(attack.objective(z, queries, t, gallery).sum(), z)[0].isfinite().all()
    collapsed = Gallery(gallery.emb[:1].repeat(60, 1), gallery.label)
    asked = members(collapsed, queries.row)
    z = asked.emb.clone().requires_grad_()
    assert (
        torch.autograd.grad(attack.objective(z, asked, attack.targets(asked, collapsed, 3), collapsed).sum(), z)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize('name', BEYOND)
def test_targets_depend_on_seed_and_query_only(name):
    gallery, queries, _ = scene(n=330)
    pick = tensor([4, 1])
    some = Queries(*(v[pick] for v in (queries.emb, queries.label, queries.row, queries.id)))
    whole, part = (BEYOND[name].targets(q, gallery, 3) for q in (queries, some))
    for k in whole: assert torch.equal(part[k], whole[k][pick])
    if name != 'LTM nearest': assert not torch.equal(BEYOND[name].targets(queries, gallery, 4)['row'], whole['row'])


@pytest.mark.parametrize('name', ['SPQA+', 'SPQA-'])
def test_kept_items_are_the_nearest_others(name):
    gallery, queries, _ = scene()
    t = spqa(name, weight=1., keep=4, m=1).targets(queries, gallery, 0)
    for i in range(len(queries.id)):
        d = [dist(queries.emb[i], x) for x in gallery.emb]
        out = {queries.row[i].item(), *t['row'][i].tolist()}
        assert t['keep'][i].tolist() == sorted((k for k in range(60) if k not in out), key=lambda k: d[k])[:4]


def test_the_wanted_orders_are_orders_of_the_nearest_items():
    gallery, queries, _ = scene(batch=40)
    rows = order(weight=1., k=3).targets(queries, gallery, 0)['row']
    for i in range(40):
        d = [dist(queries.emb[i], x) for x in gallery.emb]
        assert set(rows[i].tolist()) == set(
            sorted((k for k in range(60) if k != queries.row[i]), key=lambda k: d[k])[:3]
        )
    tau = BEYOND['OA'].measure(queries.emb, queries, BEYOND['OA'].targets(queries, gallery, 0), gallery)['OA']
    assert abs(tau.mean()) < .2 and tau.std() > .2  # random orders; four standard errors


def test_the_price_of_disorder_buys_order(trained):
    net, _, *scene = trained
    budget = dict(eps=16/255, step_size=4/255, steps=12, seed=0)
    free, paid = (run_attack(net, spqa('SPQA+', weight=w), *scene, **budget) for w in (0., 1.))
    assert paid.after['SPQA+:top'].mean() < free.after['SPQA+:top'].mean() - 1
    assert free.after['SPQA+'].mean() < paid.after['SPQA+'].mean() < paid.before['SPQA+'].mean() - 5
    o = run_attack(net, BEYOND['OA'], *scene, **budget)
    assert o.after['OA'].mean() > o.before['OA'].mean() + .3


@pytest.mark.parametrize(
    'make_one, message',
    [
        (lambda g, q: spqa('QA+', weight=1.0), "'SPQA\\+', 'SPQA-'"),
        (lambda g, q: spqa('SPQA+', weight=-1.0), 'weight must lie in'),
        (lambda g, q: order(weight=-1.0), 'weight must lie in'),
        (lambda g, q: spqa('SPQA+', weight=1.0, keep=60).targets(q, g, 0), 'keep must lie in \\[1, 58\\]'),
        (lambda g, q: order(weight=1.0, k=60).targets(q, g, 0), 'k must lie in \\[2, 59\\]'),
        (lambda g, q: order(weight=1.0, k=1).targets(q, g, 0), 'k must lie in'),
        (lambda g, q: adaptive(three, name='x', strangers=0), 'mates and strangers'),
        (lambda g, q: decisive(Attack('mine', None, None, None, ('mine',))), 'mine must have an outcome')
    ],
)
def test_bad_switches_are_named(make_one, message):
    gallery, queries, _ = scene()
    with pytest.raises(ValueError, match=message): make_one(gallery, queries)


# --- adaptive
# ---------------------------------------------------------------------------------------------------------------

def small_batches(gallery, queries, emb, mates, strangers):
    "For each query: the embeddings and labels of its own small batch, or None without a mate."
    for i, q in enumerate(emb):
        d = [dist(q, x) for x in gallery.emb]
        same = [k for k in range(len(d)) if gallery.label[k] == queries.label[i] and k != queries.row[i]]
        other = [k for k in range(len(d)) if gallery.label[k] != queries.label[i]]
        near = (sorted(same, key=lambda k: d[k]) + [min(same, key=lambda k: d[k])]*mates)[:mates] if same else []
        rows = near + sorted(other, key=lambda k: d[k])[:strangers]
        yield (
            (torch.cat([q[None], gallery.emb[rows]]), torch.cat([queries.label[i : i + 1], gallery.label[rows]]))
            if same
            else None
        )


@pytest.mark.parametrize(
    'loss, mates, strangers',
    [(three, 1, 1), (partial(three, margin=0.3), 1, 1), (multi_similarity_loss, 4, 10), (multi_similarity_loss, 25, 3)]
)
def test_any_loss_sees_the_query_with_its_nearest_items(loss, mates, strangers):
    gallery, queries, emb = scene()
    attack = adaptive(loss, name='any', mates=mates, strangers=strangers)
    t = attack.targets(queries, gallery, 0)
    z = emb.clone().requires_grad_()
    values = attack.objective(z, queries, t, gallery)
    grad, = torch.autograd.grad(values.sum(), z)
    for i, batch in enumerate(small_batches(gallery, queries, emb, mates, strangers)):
        if batch is None:
            assert values[i] == 0 and (grad[i] == 0).all()
            continue
        e = batch[0].requires_grad_()
        value = loss(e, batch[1])
        torch.testing.assert_close(values[i], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[i], torch.autograd.grad(value, e)[0][0], rtol=0, atol=1e-12)


def test_the_inside_of_the_triplet_loss_is_ltm_towards_the_nearest():
    net, x, queries, shelf = toy()
    attack = adaptive(three, name='triplet')
    a, b = (run_attack(net, k, x, queries, shelf, **BUDGET) for k in (attack, LTM_NEAREST))
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=1e-12)
    assert attack.outcomes == ('adaptive triplet',) and decisive(attack) == ('adaptive triplet', -1)
    assert torch.equal(a.after['adaptive triplet'], b.after['LTM nearest'])


def test_a_silent_hinge_hides_what_the_inside_finds(trained):
    net, _, *scene = trained
    budget = dict(eps=16/255, step_size=4/255, steps=10, seed=0)
    hinged, inside, ms = (
        run_attack(net, a, *scene, **budget)
        for a in (
            adaptive(partial(three, margin=0.02), name='hinge'), adaptive(three, name='inside'),
            adaptive(multi_similarity_loss, name='ms', mates=4, strangers=16)
        )
    )
    still = (hinged.images == scene[0]).flatten(1).all(1)
    assert still.any() and hinged.after['adaptive hinge'].nanmean() > inside.after['adaptive inside'].nanmean() + 10
    assert ms.after['adaptive ms'].nanmean() < ms.before['adaptive ms'].nanmean() - 30


# --- worst case
# -------------------------------------------------------------------------------------------------------------

def test_union_of_an_evaluation_without_attacking_again(trained, tmp_path):
    net, images, *_ = trained
    run = Run(tmp_path)
    attacks = {k: ALL[k] for k in ('ES', 'LTM', 'GTM', 'LTM fixed', 'GTM fixed', 'LTM nearest', 'CA+')}
    options = dict(eps=4/255, step_size=1/255, steps=6, attacks=attacks, batch_size=40, backend='torch', show=False)
    result = evaluate(net, images, run=run, **options)
    worst = worst_case(read_lines(run, 'queries.jsonl'))
    for h in R_AT_1: assert worst.each[h] == pytest.approx(result.after[h])
    assert worst.before == pytest.approx(result.benign['R@1'])
    queries, gallery = queries_and_gallery(embed_all(net, images, batch_size=96), images.labels)
    again = [
        run_attack(
            net, attacks[k], images.batch(queries.id), queries, gallery, eps=4 / 255, step_size=1 / 255, steps=6, seed=0
        )
        for k in attacks
        if k != 'CA+'
    ]
    hits = torch.stack([o.after[list(o.after)[-1]] for o in again])
    # one query may tip between batches of float32
    assert worst.after == pytest.approx(hits.amin(0).mean().item(), abs=100/96)
    assert worst.after < min(worst.each.values()) + 1e-9 and worst.after < worst.before


def test_union_by_brute_force():
    gen = torch.Generator().manual_seed(0)
    hits = {
        h: [None if i % 7 == 0 else 100.0 * v for i, v in enumerate(torch.randint(2, (30,), generator=gen).tolist())]
        for h in ('ES:R', 'LTM', 'GTM')
    }
    records = [
        dict(start=i, before={h: [100.0] * 6}, after={h: v[i : i + 6]})
        for h, v in hits.items()
        for i in (12, 0, 24, 6, 18)
    ]
    worst = worst_case(records)
    known = [i for i in range(30) if i % 7]
    rows = {i: {h for h in hits if hits[h][i] == 0} for i in known}
    assert worst.after == pytest.approx(100*mean([not rows[i] for i in known]))
    for h in hits: assert worst.alone[h] == pytest.approx(100*mean([rows[i] == {h} for i in known]))
    assert [q for q in worst.queries.tolist() if q == q] == [100.*(not rows[i]) for i in known] and worst.before == 100
    assert worst_case(records, ['LTM']).after == pytest.approx(worst.each['LTM'])


@pytest.mark.parametrize('headings, message', [(['LTM', 'CA+'], "found {'LTM': 2, 'CA\\+': 0}"), ([], 'that are R@1')])
def test_union_needs_all_parts(headings, message):
    with pytest.raises(ValueError, match=message):
        worst_case([dict(start=0, before={'LTM': [100., 0.]}, after={'LTM': [100., 0.]})], headings)


# --- curves
# -----------------------------------------------------------------------------------------------------------------

def test_one_search_passes_through_the_shorter_ones(trained):
    net, _, *scene = trained
    ways = dict(eps=16/255, step_size=2/255, seed=0)
    for name in ('LTM nearest', 'ES', 'QA+'):
        points = over_steps(net, ALL[name], *scene, steps=[0, 2, 3, 9], **ways)
        assert [p['steps'] for p in points] == [0, 2, 3, 9]
        for p in points:
            for k, v in run_attack(net, ALL[name], *scene, steps=p['steps'], **ways).after.items():
                assert p['after'][k] == v.tolist()
        assert points[0]['after'] != points[-1]['after']


def test_radii_are_separate_attacks_and_options_reach_the_search():
    net, x, queries, shelf = toy()
    points = over_eps(
        net, SUITE['ES'], x, queries, shelf, eps=[0.0, 0.05, 0.1], step_ratio=0.1, steps=6, seed=0, restarts=2,
        by='ES:D'
    )
    assert [p['eps'] for p in points] == [0., .05, .1] and points[0]['after'] == points[0]['before']
    o = run_strong(
        net, SUITE['ES'], x, queries, shelf, eps=0.05, step_size=0.1 * 0.05, steps=6, seed=0, restarts=2, by='ES:D'
    )
    assert points[1]['after'] == {k: v.tolist() for k, v in o.after.items()} != points[2]['after']


def test_an_interrupted_curve_goes_on_and_mixes_no_models(trained, tmp_path):
    net, images, _, _, gallery = trained
    queries, _ = queries_and_gallery(gallery.emb, gallery.label)
    grid = partial(over_eps, eps=[0., 8/255], step_ratio=.25, steps=3, seed=0)
    run, seen = Run(tmp_path), []
    def counting(model, attack, x, *rest):
        seen.append(len(x))
        if len(seen) == 2: raise KeyboardInterrupt
        return grid(model, attack, x, *rest)
    options = dict(attack=LTM_NEAREST, dataset=images, queries=queries, gallery=gallery, batch_size=40)
    def go(points, model):
        return curve(
            points, model, **options, known=read_lines(run, 'curve.jsonl'),
            keep=partial(append_line, run, 'curve.jsonl')
        )
    with pytest.raises(KeyboardInterrupt): go(counting, net)
    again = go(counting, net)
    assert (
        seen == [40, 40, 40, 16] and again == curve(grid, net, **options) and len(read_lines(run, 'curve.jsonl')) == 3
    )
    assert go(counting, net) == again and len(seen) == 4
    line = curve_line(again, 'LTM nearest')
    assert [p['eps'] for p in line] == [0., 8/255] and line[0]['value'] > line[1]['value'] and line[0]['queries'] == 96
    assert line[0]['value'] == pytest.approx(
        evaluate(
            net, images, attacks={'ES': SUITE['ES']}, eps=0.0, step_size=0.1, steps=1, backend='torch', show=False
        ).benign['R@1']
    )
    other = build('small', dim=16, size=28, channels=1, seed=1)
    assert go(counting, other) == curve(grid, other, **options)
    # known records are taken as they are
    assert go(partial(over_eps, eps=[.1], step_ratio=.25, steps=3, seed=0), net) == again


def test_a_line_leaves_out_what_is_undefined_and_refuses_other_points():
    def record(start, eps, values):
        return dict(start=start, points=[dict(eps=eps, steps=3, before={}, after={'LTM': values})])
    assert curve_line([record(0, 0.1, [100.0, None]), record(2, 0.1, [0.0, 0.0])], 'LTM') == [
        dict(eps=0.1, steps=3, value=pytest.approx(100 / 3), queries=3)
    ]
    assert math.isnan(curve_line([record(0, .1, [None])], 'LTM')[0]['value'])
    shorter = dict(record(1, .1, [0.]), points=[])
    for other in (record(1, .2, [0.]), shorter):
        with pytest.raises(ValueError, match='same points in every batch, found 2'):
            curve_line([record(0, .1, [0.]), other], 'LTM')
    with pytest.raises(ValueError, match='found 0'): curve_line([], 'LTM')


@pytest.mark.parametrize('steps', [[], [-1, 3]])
def test_bad_steps_are_named(steps):
    net, x, queries, shelf = toy()
    with pytest.raises(ValueError, match='steps must be numbers'):
        over_steps(net, SUITE['ES'], x, queries, shelf, eps=.1, step_size=.01, steps=steps, seed=0)
