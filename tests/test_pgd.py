"The attack loop against a literal loop, and the properties every user of it relies on."
import math
from functools import partial

import pytest
import torch
from torch import nn

from robust_dml.models.networks import embed
from robust_dml.attacks.loop import Attacked, autograd_gradient, pgd, project, sign_step

EPS, STEP = .1, .03


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 6)
    ).to(dtype)


def images(count=5, seed=1):
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=gen, dtype=torch.float64)
    x[:, :, 0] = (x[:, :, 0] > .5).double()  # a row of pixels at the ends of the range
    return x


def to_target(emb): return emb @ torch.arange(1., 7, dtype=emb.dtype)


def test_project_is_the_nearest_allowed_value_pixel_by_pixel():
    gen = torch.Generator().manual_seed(3)
    clean, moved = torch.rand(200, generator=gen), 3*torch.rand(200, generator=gen) - 1
    for c, m, p in zip(clean.tolist(), moved.tolist(), project(moved, clean, .2).tolist()):
        low, high = max(0, c - .2), min(1, c + .2)
        assert p == pytest.approx(low if m < low else high if m > high else m, abs=1e-6)


@pytest.mark.parametrize('steps', [1, 2, 7])
def test_matches_a_literal_minimisation_of_the_negated_objective(steps):
    model, x = network(), images()
    model.eval()
    x_adv, alpha = x.clone(), EPS if steps == 1 else STEP
    for _ in range(steps):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(-to_target(torch.nn.functional.normalize(model(x_adv))).mean(), x_adv)
        x_adv = (x_adv - alpha*grad.sign()).detach()
        x_adv = torch.max(torch.min(x_adv, x + EPS), x - EPS).clamp(0, 1)
    found = pgd(model, to_target, x, eps=EPS, step_size=STEP, steps=steps)
    torch.testing.assert_close(found.images, x_adv, rtol=0, atol=1e-12)
    assert found.steps == steps and (found.images - x).abs().max() > .02


@pytest.mark.parametrize('options', [dict(eps=0., steps=5), dict(eps=EPS, steps=0)])
@pytest.mark.parametrize('keep', ['last', 'best'])
def test_no_budget_is_the_identity(options, keep):
    model, x = network(), images()
    found = pgd(model, to_target, x, step_size=STEP, keep=keep, **options)
    assert torch.equal(found.images, x) and found.steps == 0
    torch.testing.assert_close(found.values, to_target(embed(model.eval(), x)).detach())


@pytest.mark.parametrize('keep', ['last', 'best'])
def test_stays_inside_the_ball_and_the_image_range(keep):
    x = images(20)
    found = pgd(network(), to_target, x, eps=EPS, step_size=.07, steps=6, keep=keep)
    assert (found.images - x).abs().max() <= EPS + 1e-15
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert not found.images.requires_grad and not found.values.requires_grad and not found.emb.requires_grad


def best(x=None, **options):
    return pgd(
        network(), to_target, images(12) if x is None else x,
        **{**dict(eps=EPS, step_size=0.09, steps=4, keep='best'), **options}
    )


def test_more_steps_and_a_warm_started_larger_ball_are_never_worse():
    values = [best(steps=t).values for t in (0, 2, 3, 5, 9, 15)]
    for fewer, more in zip(values, values[1:]): assert (more >= fewer).all()
    assert (values[-1] > values[0] + .1).all()
    small = best()
    large = best(eps=2*EPS, start=small.images)
    assert (large.values >= small.values).all() and (large.values > small.values).any()


def test_best_returns_values_and_embeddings_of_the_returned_images():
    model, x = network().eval(), images(12)
    goal = embed(model, (x + .02).clamp(0, 1)).detach()
    def near(emb): return -(emb - goal).square().sum(1)
    found, last = (pgd(network(), near, x, eps=EPS, step_size=.09, steps=4, keep=k) for k in ('best', 'last'))
    emb = embed(model, found.images)
    torch.testing.assert_close(found.emb, emb.detach())
    torch.testing.assert_close(found.values, near(emb).detach())
    assert (found.values > near(embed(model, last.images))).any()  # the coarse step overshoots, so the choice matters


def test_last_reports_the_forward_pass_before_the_final_update():
    three, four = (pgd(network(), to_target, images(), eps=EPS, step_size=STEP, steps=t) for t in (3, 4))
    torch.testing.assert_close(four.emb, embed(network().eval(), three.images).detach())
    torch.testing.assert_close(four.values, to_target(four.emb))


def test_images_do_not_influence_each_other_and_sum_equals_mean():
    model, x = network(), images(6)
    run = partial(pgd, model, eps=EPS, step_size=STEP, steps=5)
    whole = run(to_target, x).images
    torch.testing.assert_close(
        torch.cat([run(to_target, part).images for part in x.split(2)]), whole, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(run(to_target, x.flip(0)).images.flip(0), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(run(lambda emb: to_target(emb).mean(), x).images, whole, rtol=0, atol=1e-12)


def test_stop_sees_each_value_once_and_ends_before_the_update():
    seen = []
    def third(values, previous):
        seen.append((values, previous))
        return len(seen) == 3
    found = pgd(network(), to_target, images(), eps=EPS, step_size=STEP, steps=9, stop=third)
    two = pgd(network(), to_target, images(), eps=EPS, step_size=STEP, steps=2)
    assert found.steps == 2 and torch.equal(found.images, two.images)
    assert seen[0][1] is None and all(torch.equal(b[1], a[0]) for a, b in zip(seen, seen[1:]))
    torch.testing.assert_close(found.emb, embed(network().eval(), found.images).detach())


def test_start_is_projected():
    x = images()
    found = pgd(network(), to_target, x, eps=EPS, step_size=STEP, steps=0, start=x + 5)
    assert torch.equal(found.images, project(x + 5, x, EPS)) and not torch.equal(found.images, x)


@pytest.mark.parametrize('fails', [False, True])
def test_model_and_inputs_are_left_as_they_were(fails):
    model, x = network().train(), images()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    flags, kept = [p.requires_grad for p in model.parameters()], x.clone()
    def objective(emb):
        if fails: raise RuntimeError('broken objective')
        return to_target(emb)
    if fails:
        with pytest.raises(RuntimeError, match='broken'): pgd(model, objective, x, eps=EPS, step_size=STEP, steps=3)
    else: pgd(model, objective, x, eps=EPS, step_size=STEP, steps=3)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight)) and model[1].weight.grad is None
    assert torch.equal(x, kept) and not x.requires_grad


def test_works_inside_no_grad_and_with_an_image_that_carries_a_graph():
    x = images()
    plain = pgd(network(), to_target, x, eps=EPS, step_size=STEP, steps=3).images
    with torch.no_grad():
        assert torch.equal(pgd(network(), to_target, x, eps=EPS, step_size=STEP, steps=3).images, plain)
    carried = pgd(network(), to_target, x.clone().requires_grad_()*1., eps=EPS, step_size=STEP, steps=3)
    assert torch.equal(carried.images, plain) and not carried.images.requires_grad


def test_gradient_is_a_plug():
    def backwards(embed, objective, x):
        values, grad, emb = autograd_gradient(embed, objective, x)
        return values, -grad, emb
    run = partial(pgd, network(), to_target, images(), eps=EPS, step_size=STEP, steps=5)
    up, down = run(), run(gradient=backwards)
    assert isinstance(down, Attacked) and (down.values < up.values).all()


def test_gradient_of_the_network_is_right():
    model, x = network().eval(), images(2)
    values, grad, _ = autograd_gradient(partial(embed, model), to_target, x)
    bump = torch.zeros_like(x)
    bump[1, 0, 3, 4] = 1e-6
    up, down = (to_target(embed(model, x + s*bump)).detach() for s in (1, -1))
    assert ((up - down)/2e-6)[1].item() == pytest.approx(grad[1, 0, 3, 4].item(), rel=1e-5)
    torch.testing.assert_close(values, to_target(embed(model, x)).detach())


@pytest.mark.parametrize('change, message', [
    (dict(eps=8.), 'eps must lie in'), (dict(eps=-.1), 'eps must lie in'), (dict(eps=math.nan), 'eps must lie in'),
    (dict(step_size=3.), 'step_size must lie in'), (dict(step_size=0.), 'above 0'),
    (dict(steps=-1), 'whole number'), (dict(steps=1.5), 'whole number'), (dict(keep='worst'), "'last', 'best'"),
    (dict(start=torch.zeros(1, 1, 8, 8)), 'shape')])
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        pgd(network(), to_target, images(), **{**dict(eps=EPS, step_size=STEP, steps=2), **change})


@pytest.mark.parametrize(
    'x, error',
    [
        (images() * 3, ValueError), (images() * math.nan, ValueError), (images()[0], ValueError),
        ((images() * 255).byte(), TypeError)
    ],
)
def test_bad_images_are_refused(x, error):
    with pytest.raises(error, match='images'): pgd(network(), to_target, x, eps=EPS, step_size=STEP, steps=2)


@pytest.mark.parametrize(
    'objective, message',
    [
        (lambda emb: to_target(emb.detach()), 'depend on emb'), (lambda emb: emb, 'shape'), (lambda emb: 1.0, 'float'),
        (lambda emb: to_target(emb) * math.nan, 'finite gradient'),
        (lambda emb: (emb - emb.detach()).square().sum(1).sqrt(), 'finite gradient')
    ],
)
def test_bad_objectives_are_refused(objective, message):
    with pytest.raises(ValueError, match=message): pgd(network(), objective, images(), eps=EPS, step_size=STEP, steps=2)


def test_sign_step_leaves_pixels_without_gradient():
    assert torch.equal(sign_step(torch.zeros(3), torch.tensor([0., 2., -1e-20]), .5), torch.tensor([0., .5, -.5]))
