"""Black-box attacks against literal loops, a spying model that counts and forbids gradients, a dead gradient, and the
properties they share."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn, tensor

from robust_dml.attacks.suite import FIXED, SUITE, Gallery, members, run_attack
from robust_dml.attacks.blackbox import NES, Lists, Shifted, Subject, learned, measured, nes, random_noise
from robust_dml.attacks.blackbox import random_search, relevance, shared_gradient, side, square, squares, streams, topk
from robust_dml.attacks.blackbox import transfer, transfer_matrix, universal
from robust_dml.core import generator
from robust_dml.models.networks import embed
from robust_dml.attacks.loop import autograd_gradient

EPS, SOME, REST = .1, torch.arange(0, 120, 6), torch.arange(1, 120, 6)
BALL, FINE = dict(eps=EPS, seed=0), dict(step_size=.02, steps=40)
ES, GTM = SUITE['ES'], FIXED['GTM fixed']

KINDS = .25 + .5*torch.rand(20, 1, 10, 10, generator=generator(0, 'patterns')).double()
LABEL = torch.arange(20).repeat_interleave(6)
IMAGES = (KINDS[LABEL] + .1*torch.randn(120, 1, 10, 10, generator=generator(0, 'noise')).double()).clamp(0, 1)
X = IMAGES[SOME]


def trained(seed):
    "A small network that tells the twenty patterns apart."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8*16, 16)).double()
    centre = nn.Parameter(torch.randn(16, 20).double())
    step = torch.optim.Adam([*net.parameters(), centre], lr=.01)
    for _ in range(30):
        loss = nn.functional.cross_entropy(embed(net, IMAGES) @ centre, LABEL)
        step.zero_grad()
        loss.backward()
        step.step()
    net.zero_grad()
    return net


def subject(model, ids=SOME):
    with torch.no_grad(): gallery = Gallery(embed(model, IMAGES), LABEL)
    return Subject(model, members(gallery, ids), gallery)


class Spy(nn.Module):
    "Keeps every image that the model is shown and refuses to be differentiated."
    def __init__(self, net):
        super().__init__()
        self.net, self.shown = net, []

    def forward(self, x):
        assert not torch.is_grad_enabled() and not self.training
        self.shown.append(x.clone())
        return self.net(x)


class Through(nn.Module):
    "A model with a function of the image in front."
    def __init__(self, net, front):
        super().__init__()
        self.net, self.front = net, front

    def forward(self, x): return self.net(self.front(x))


@pytest.fixture(scope='module')
def net(): return trained(0)


@pytest.fixture(scope='module')
def scene(net): return subject(net)[1:]


@pytest.fixture(scope='module')
def white(net, scene): return {a.name: run_attack(net, a, X, *scene, **FINE, **BALL) for a in (ES, GTM)}


ASKING = {
    'nes': lambda *a, budget: nes(*a, step_size=.03, samples=20, sigma=.02, budget=budget, **BALL),
    'square': lambda *a, budget: square(*a, budget=budget, **BALL),
    'topk': lambda *a, budget: topk(*a, k=10, budget=budget, **BALL),
    'corner': lambda *a, budget: random_noise(*a, kind='corner', budget=budget, **BALL),
    'uniform': lambda *a, budget: random_noise(*a, kind='uniform', budget=budget, **BALL),
}
each = pytest.mark.parametrize('name', ASKING)


# --- NES
# -------------------------------------------------------------------------------------------------------------------

def smooth():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6*16, 5)).double()


def away(emb): return (emb - tensor([.5, -.5, .5, -.5, 0.])).square().sum(1)


def test_nes_points_where_the_gradient_points():
    """m pairs in d dimensions: cosine 1/sqrt(1 + (d+1)/m) = 0.994, and a projection of relative spread sqrt(2/m) =
    0.026."""
    model, x = smooth(), .2 + .6*torch.rand(4, 1, 6, 6, generator=generator(0, 'x'), dtype=torch.float64)
    def see(x): return embed(model, x)
    values, grad, emb = autograd_gradient(see, away, x)
    estimate = NES([generator(0, i) for i in range(4)], samples=6000, sigma=1e-3)
    found, guess, seen = estimate(see, away, x)
    torch.testing.assert_close((found, seen), (values, emb))
    assert torch.cosine_similarity(guess.flatten(1), grad.flatten(1)).min() > .985
    scale = (guess*grad).flatten(1).sum(1)/grad.square().flatten(1).sum(1)
    assert (scale - 1).abs().max() < .12 and estimate.asked == 6001


def test_nes_is_the_printed_sum():
    "Literal loop over pairs; probes leave [0, 1] only to be clipped."
    model, x, sigma = smooth(), torch.rand(2, 1, 6, 6, generator=generator(1, 'x'), dtype=torch.float64).round(), .05
    def see(x): return embed(model, x)
    _, found, _ = NES([generator(0, 'a'), generator(0, 'b')], samples=6, sigma=sigma)(see, away, x)
    for i, key in enumerate('ab'):
        gen, total = generator(0, key), 0
        for _ in range(3):
            u = torch.randn(1, 6, 6, generator=gen, dtype=torch.float64)
            high, low = (away(see((x[i] + s*sigma*u).clamp(0, 1)[None])).item() for s in (1, -1))
            total = total + u*(high - low)/(6*sigma)
        torch.testing.assert_close(found[i], total.detach())


@pytest.mark.parametrize(
    'options',
    [
        dict(samples=5, sigma=0.1), dict(samples=0, sigma=0.1), dict(samples=2.0, sigma=0.1),
        dict(samples=2, sigma=0.0), dict(samples=2, sigma=math.nan)
    ],
)
def test_nes_refuses(options):
    with pytest.raises(ValueError, match='must .* found'): NES([], **options)


# --- random search and squares
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('drift, chosen', [(False, [1, 0]), (True, [3, 2])])
def test_random_search_keeps_the_best(drift, chosen):
    values = tensor([[0., 7], [5, 7], [4, 7], [5, 6]]).double()  # of step and image
    asked = iter(values)
    found = random_search(
        lambda x: next(asked), lambda step, best: torch.full_like(best, step), torch.zeros(2, 1, 1, 1).double() - 1,
        budget=4, drift=drift
    )
    assert found.flatten().tolist() == chosen


def test_square_schedule_is_the_authors():
    "Their table of shares over ten thousand iterations."
    bounds = [
        (10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256),
        (10_000, 512)
    ]
    for step in (0, 10, 11, 50, 51, 200, 201, 777, 2000, 4001, 8000, 8001, 9999):
        part = next(p for b, p in bounds if step <= b)
        assert side(step, budget=10_000, share=.8, size=(224, 224)) == max(1, round(224*math.sqrt(.8/part)))
    assert side(0, budget=1, share=1., size=(3, 9)) == 3


@pytest.mark.parametrize('channels', [1, 3])
def test_squares_repaint_one_square_in_one_colour(channels):
    x = torch.rand(6, channels, 9, 7, generator=generator(0, 'x'), dtype=torch.float64)
    low, high = (x - EPS).clamp(0), (x + EPS).clamp(max=1)
    propose = squares(x, [generator(0, i) for i in range(6)], eps=EPS, budget=60, share=.8)
    best = propose(0, x)
    assert ((best == low) | (best == high)).all()
    up = best == high
    # stripes, differing from image to image
    assert (up == up[:, :, :1]).all() and up.any() and not up.all() and not torch.equal(up[0], up[1])
    places = set()
    for step in range(1, 60):
        new, edge = propose(step, best), side(step, budget=60, share=.8, size=(9, 7))
        changed = (new != best).any(1)
        assert ((new == low) | (new == high)).all() and changed.flatten(1).any(1).all()
        for moved, colours in zip(changed, (new == high)):
            rows, columns = moved.nonzero().unbind(1)
            assert rows.max() - rows.min() < edge and columns.max() - columns.min() < edge
            assert all(len(set(c[moved].tolist())) == 1 for c in colours) or channels > 1
            if edge == 1: places.add((rows[0].item(), columns[0].item()))
        best = new
    assert len(places) > 50  # of 63: everywhere


@pytest.mark.parametrize('name', [n for n in ASKING if n != 'nes'])  # which descends and does not search
def test_result_is_the_best_image_that_was_shown(name, net, scene):
    "Replays the search on what the spy saw. The lists tie: the last of the best is kept."
    spy, (queries, gallery) = Spy(net), scene
    images = ASKING[name](spy, GTM, X, queries, gallery, budget=25).outcome.images
    *shown, final = spy.shown
    torch.testing.assert_close(final, images, rtol=0, atol=0)
    if name == 'topk':
        lists = [Lists(net, queries, gallery, 10)(s) for s in shown]
        score = torch.stack([-relevance(found, lists[0]) for found in lists[1:]]).flip(0)
        row, shown = score.shape[0] - 1 - score.argmax(0), shown[1:]
    else:
        targets = GTM.targets(queries, gallery, 0)
        with torch.no_grad():
            row = torch.stack([GTM.objective(embed(net, s), queries, targets, gallery) for s in shown]).argmax(0)
    assert torch.equal(torch.stack(shown)[row, torch.arange(20)], images) and len(row.unique()) > 3


def test_noise_fills_the_ball_or_sits_at_its_corners(net, scene):
    """In a grey image nothing is clipped: |v| is 1 at a corner and 1/2 on average in the ball (2000 pixels: five
    deviations are 0.033)."""
    grey = torch.full_like(X, .5)
    corner, uniform = (
        (ASKING[k](net, ES, grey, *scene, budget=1).outcome.images - grey) / EPS for k in ('corner', 'uniform')
    )
    torch.testing.assert_close(corner.abs(), torch.ones_like(X))
    assert abs(uniform.abs().mean() - .5) < .033 and abs(uniform.mean()) < .065 and abs(corner.mean()) < .112


def test_more_noise_is_never_worse(net, scene):
    "The draws of a small budget are the first ones of a large budget."
    found = [
        random_noise(net, ES, X, *scene, kind='corner', budget=n, **BALL).outcome.after['ES:D'] for n in (1, 4, 16)
    ]
    assert (found[0] <= found[1]).all() and (found[1] <= found[2]).all() and found[2].mean() > 1.1*found[0].mean()


# --- only the ranked list
# ------------------------------------------------------------------------------------------------------

def test_relevance_is_the_printed_sum():
    gen = generator(0, 'lists')
    clean, found = (torch.stack([torch.randperm(9, generator=gen)[:5] for _ in range(8)]) for _ in range(2))
    w = [1/math.log2(r + 2) for r in range(5)]
    for c, f, value in zip(clean.tolist(), found.tolist(), relevance(found, clean).tolist()):
        assert value == pytest.approx(sum(w[c.index(i)]*w[f.index(i)] for i in c if i in f)/sum(v*v for v in w))
    torch.testing.assert_close(relevance(clean, clean), torch.ones(8).double())
    assert relevance(clean + 9, clean).tolist() == [0.]*8


def test_topk_knows_nothing_but_lists(net, scene):
    """Neither the adversary's knowledge of embeddings and labels nor distances that keep their order change what it
    finds."""
    queries, gallery = scene
    def images(model, queries, gallery):
        return topk(model, ES, X, queries, gallery, k=10, budget=40, **BALL).outcome.images
    found = images(net, queries, gallery)
    garbage = replace(
        queries, emb=torch.randn(20, 16, generator=generator(0, 'emb')).double(), label=queries.label.flip(0)
    )
    assert torch.equal(images(net, garbage, Gallery(gallery.emb, gallery.label.roll(1))), found)
    class Shrunk(nn.Module):  # one more coordinate, the same for all: every distance shrinks by the same factor
        def forward(self, x): return nn.functional.pad(embed(net, x), (0, 1), value=3.)
    assert torch.equal(images(*subject(Shrunk())), found)
    other = Gallery(gallery.emb.flip(0), gallery.label.flip(0))  # the lists themselves matter
    assert not torch.equal(images(net, queries, other), found)


def test_lists_leave_the_own_row_out(net, scene):
    lists = Lists(net, *scene, 119)
    rows = lists(X)
    assert not (rows == SOME[:, None]).any() and rows.dtype == torch.long and lists.asked == 1


# --- strength
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('attack, outcome, sign', [(ES, 'ES:D', 1), (GTM, 'GTM fixed', -1)], ids=['ES', 'GTM'])
def test_between_noise_and_white_box(attack, outcome, sign, net, scene, white):
    "On a healthy model, 300 queries do more than one random corner and no more than the white box."
    def harm(o): return sign*o.after[outcome].mean().item()
    limit, floor = harm(white[attack.name]), harm(
        random_noise(net, attack, X, *scene, kind='corner', budget=1, **BALL).outcome
    )
    assert white[attack.name].before.get('ES:R', tensor(100.)).mean() == 100 and limit > floor
    for name in ('nes', 'square', 'topk'):
        assert (
            floor + 0.1 * (limit - floor) < harm(ASKING[name](net, attack, X, *scene, budget=300).outcome) <= limit
        ), name
    for kind in ('uniform', 'corner'):
        assert harm(ASKING[kind](net, attack, X, *scene, budget=300).outcome) <= floor + .5*(limit - floor)


def test_lists_are_disturbed(net, scene):
    "What topk wants: less of the clean list than random corners leave, and more than nothing."
    lists = Lists(net, *scene, 10)
    def left(outcome): return relevance(lists(outcome.images), lists(X)).mean().item()
    corner, found = (
        left(ASKING[name](net, ES, X, *scene, budget=n).outcome) for name, n in (('corner', 1), ('topk', 300))
    )
    assert found < .65*corner and corner < 1


@pytest.mark.parametrize(
    'front', [lambda x: (15 * x).round() / 15, lambda x: x.detach() + 0 * x], ids=['rounded', 'detached']
)
def test_squares_see_through_a_dead_gradient(front, net):
    hidden = subject(Through(net, front))
    blind = run_attack(hidden.model, ES, X, *hidden[1:], **FINE, **BALL)
    assert blind.after['ES:D'].max() < 1e-12 and torch.equal(blind.images, X)
    found, plain = (
        square(m, ES, X, *subject(m)[1:], budget=150, **BALL).outcome.after['ES:D'].mean() for m in (hidden.model, net)
    )
    assert found > .8*plain and plain > .6


# --- shared properties
# -----------------------------------------------------------------------------------------------------------

@each
def test_counts_are_exact_and_no_gradient_is_asked_for(name, net, scene):
    spy = Spy(net)
    found = ASKING[name](spy, ES, X, *scene, budget=41)
    assert found.asked == (21 if name == 'nes' else 41)          # one step of 21, and not enough for another
    assert sum(map(len, spy.shown)) == 20*(found.asked + 1)      # and one look at the result
    assert max(map(len, spy.shown)) <= 40                        # memory: an antithetic pair of the batch


@each
def test_no_budget_is_the_identity(name, net, scene):
    found = ASKING[name](net, ES, X, *scene, budget=0)
    assert torch.equal(found.outcome.images, X) and found.asked == 0
    assert found.outcome.after['ES:D'].max() < 1e-12 and torch.equal(
        found.outcome.after['ES:R'], found.outcome.before['ES:R']
    )


def test_one_query_buys_topk_nothing(net, scene):
    found = ASKING['topk'](net, ES, X, *scene, budget=1)
    assert torch.equal(found.outcome.images, X) and found.asked == 0


@each
def test_batches_and_order_change_nothing(name, net, scene):
    ask, (_, gallery) = ASKING[name], scene
    whole = ask(net, GTM, X, *scene, budget=42).outcome
    order = torch.randperm(20, generator=generator(0, 'order'))
    parts = [ask(net, GTM, X[i], members(gallery, SOME[i]), gallery, budget=42).outcome for i in order.split(6)]
    torch.testing.assert_close(torch.cat([p.images for p in parts]), whole.images[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([p.after['GTM fixed'] for p in parts]), whole.after['GTM fixed'][order])


@each
def test_seed_and_attack_key_the_randomness(name, net, scene):
    ask = ASKING[name]
    first, again = (ask(net, ES, X, *scene, budget=21).outcome.images for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, ask(net, replace(ES, name='other'), X, *scene, budget=21).outcome.images)
    keys = [
        streams(members(scene[1], SOME[:2]), seed=s, method=m, name=n)
        for s, m, n in ((0, 'a', 'b'), (1, 'a', 'b'), (0, 'c', 'b'), (0, 'a', 'c'))
    ]
    assert len({g.initial_seed() for row in keys for g in row}) == 8


@each
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_inside_the_ball(name, dtype, net):
    "Also where pixels are at the ends of the range; nothing is left in the model."
    model = trained(0).to(dtype).train()
    x = IMAGES[SOME].to(dtype)
    x[:, :, 0], x[:, :, 1] = 0, 1
    with torch.no_grad(): gallery = Gallery(embed(model, IMAGES.to(dtype)), LABEL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = ASKING[name](model, ES, x, members(gallery, SOME), gallery, budget=43).outcome.images
    assert images.dtype == dtype and images.min() >= 0 and images.max() <= 1
    assert .5*EPS < (images - x).abs().max() <= EPS + (1e-6 if dtype == torch.float32 else 1e-12)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@each
def test_bad_input_is_refused(name, net, scene):
    ask, (queries, gallery) = ASKING[name], scene
    with pytest.raises(ValueError, match='image by image, found 3 and 20'):
        ask(net, ES, X[:3], queries, gallery, budget=1)
    with pytest.raises(ValueError, match='budget must be a whole number of at least 0, found -1'):
        ask(net, ES, X, queries, gallery, budget=-1)
    with pytest.raises(ValueError, match='budget must be a whole number'): ask(net, ES, X, queries, gallery, budget=2.)
    with pytest.raises(ValueError, match=r'\[0, 1\]'): ask(net, ES, 2*X, queries, gallery, budget=1)
    with pytest.raises(ValueError, match='eps must lie'): square(net, ES, X, queries, gallery, eps=8., budget=1, seed=0)


@pytest.mark.parametrize('name', [n for n in ASKING if n != 'topk'])  # which does not read the objective
def test_a_nan_is_an_error(name, net, scene):
    lost = replace(ES, objective=lambda emb, *a: emb.sum(1)*math.nan)
    with pytest.raises(ValueError, match='finite'): ASKING[name](net, lost, X, *scene, budget=42)


# --- universal perturbations
# -------------------------------------------------------------------------------------------------------

def test_universal_is_one_perturbation_learned_elsewhere(net, scene, white):
    queries, gallery = scene
    other = dict(learn_x=IMAGES[REST], learn_queries=members(gallery, REST), **FINE, **BALL)
    found = universal(net, ES, X, queries, gallery, **other)
    delta = learned(net, ES, IMAGES[REST], members(gallery, REST), gallery, **FINE, **BALL)
    torch.testing.assert_close(found.outcome.images, (X + delta).clamp(0, 1))
    assert found.asked == 0 and delta.shape == X.shape[1:] and .9*EPS < delta.abs().max() <= EPS + 1e-12
    alone = universal(net, ES, X[:3], members(gallery, SOME[:3]), gallery, batch_size=7, **other).outcome.images
    torch.testing.assert_close(alone, found.outcome.images[:3])
    corner = random_noise(net, ES, X, queries, gallery, kind='corner', budget=1, **BALL).outcome.after['ES:D'].mean()
    assert 1.3*corner < found.outcome.after['ES:D'].mean() < white['ES'].after['ES:D'].mean()


def test_universal_gradient_is_that_of_the_sum(net, scene):
    "On the shifted model, block by block, against one plain backward pass."
    queries, gallery = members(scene[1], REST), scene[1]
    targets = GTM.targets(queries, gallery, 0)
    def objective(emb): return GTM.objective(emb, queries, targets, gallery)
    delta = (.05*torch.randn(1, 10, 10, generator=generator(0, 'delta')).double()).requires_grad_()
    total = objective(embed(net, (IMAGES[REST] + delta).clamp(0, 1))).sum()
    expected, = torch.autograd.grad(total, delta)
    shifted = Shifted(net, IMAGES[REST], 6)
    values, grad, _ = shared_gradient(
        lambda d: embed(shifted, d), objective, (delta.detach() + 0.5).expand(20, 1, 10, 10)
    )
    torch.testing.assert_close(values.sum(), total.detach())
    for g in grad: torch.testing.assert_close(g, expected)


def test_universal_refuses(net, scene):
    queries, gallery = scene
    with pytest.raises(ValueError, match='found 20 in both'):
        universal(net, ES, X, queries, gallery, learn_x=X, learn_queries=queries, **FINE, **BALL)
    other = dict(learn_x=IMAGES[REST], learn_queries=members(gallery, REST), **FINE, seed=0)
    with pytest.raises(ValueError, match=r'eps must lie in \[0, 0.5\]'):
        universal(net, ES, X, queries, gallery, eps=.6, **other)
    still = universal(net, ES, X, queries, gallery, eps=0., **other).outcome.images
    assert torch.equal(still, X)


# --- transfer
# ------------------------------------------------------------------------------------------------------------------------

def test_transfer_to_the_same_weights_is_the_white_box(net, scene, white):
    for attack in (ES, GTM):
        found = transfer(net, attack, X, *scene, surrogate=subject(trained(0)), **FINE, **BALL)
        assert torch.equal(found.outcome.images, white[attack.name].images) and found.asked == 0
        for name, value in white[attack.name].after.items(): assert torch.equal(found.outcome.after[name], value)


def test_transfer_matrix(net, white):
    subjects = {name: subject(trained(seed)) for seed, name in enumerate('ABC')}
    matrix = transfer_matrix(subjects, ES, X, **FINE, **BALL)
    def harm(source, target): return matrix[source][target].after['ES:D'].mean()
    for target, s in subjects.items():
        floor = random_noise(s.model, ES, X, *s[1:], kind='corner', budget=1, **BALL).outcome.after['ES:D'].mean()
        for source in subjects:
            found = transfer(s.model, ES, X, *s[1:], surrogate=subjects[source], **FINE, **BALL).outcome
            assert torch.equal(found.after['ES:D'], matrix[source][target].after['ES:D'])
            assert source == target or 1.1*floor < harm(source, target) < .8*harm(target, target)
    assert list(matrix) == list(matrix['A']) == list('ABC') and transfer_matrix({}, ES, X, **FINE, **BALL) == {}


def test_transfer_measures_on_the_attacked_model(net, scene):
    other, calls = subject(trained(1)), Spy(net)
    found = transfer(calls, GTM, X, *scene, surrogate=other, **FINE, **BALL).outcome
    assert len(calls.shown) == 1 and torch.equal(calls.shown[0], found.images)
    torch.testing.assert_close(
        found.after['GTM fixed'], measured(net, GTM, found.images, *scene, seed=0).after['GTM fixed']
    )


def test_transfer_refuses_other_images(net, scene):
    other = subject(trained(1), REST)
    with pytest.raises(ValueError, match='different queries'):
        transfer(net, ES, X, *scene, surrogate=other, **FINE, **BALL)
    shuffled = Subject(net, scene[0], Gallery(scene[1].emb, scene[1].label.roll(1)))
    with pytest.raises(ValueError, match='different gallery'):
        transfer_matrix({'A': Subject(net, *scene), 'B': shuffled}, ES, X, **FINE, **BALL)
