"The baselines against naive re-implementations, and what every defence must leave alone."
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_dml.core import generator
from robust_dml.defenses.base import Clock, act, clean_embedding, embed_together, hm, hm_objective, ics_loss, natural
from robust_dml.defenses.base import perturb, pseudo_hardness, take, training_log, triplet_distances
from robust_dml.triplets.distances import triplet_loss
from robust_dml.triplets.mining import MINERS, Triplets
from robust_dml.models.networks import train_mode

D_AP,D_AN = torch.tensor([.30, .60, .90, .20]),torch.tensor([.50, .55, 1.00, .70])
INNER = dict(eps=.1, step_size=.03, steps=5, margin=.2)
ALL = [natural(margin=.2), act(**INNER), hm(**INNER, ics=.5), hm(**INNER, ics=0., pseudo=None)]


def network(seed=0, batchnorm=False):
    "A small net in float64, deterministic in `seed`."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = [nn.BatchNorm2d(4)] if batchnorm else []
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)).double()
    if batchnorm:
        net[1].running_mean.uniform_(-.1, .1, generator=generator(seed, 'mean'))
        net[1].running_var.uniform_(.5, 1.5, generator=generator(seed, 'var'))
    return net


def batch(seed=0, pairs=8):
    label = torch.arange(pairs).repeat_interleave(2)
    pattern = torch.rand(pairs, 1, 6, 6, generator=generator(seed, 'patterns'), dtype=torch.float64)[label]
    return (pattern + 0.1 * torch.randn(pattern.shape, generator=generator(seed, 'noise'), dtype=torch.float64)).clamp(
        0, 1
    ), label


def run(defence, net, x, label, *, state=None, epoch=3, seed=0):
    state = defence.init() if state is None else state
    return defence.step(net, x, label, state=state, clock=Clock(epoch, 4), gen=generator(seed, 'mine'))


def loop(net, x0, loss, *, eps, step_size, steps, change=None):
    "PGD as the papers write it: minimise `loss` of the embeddings of all images in x0."
    x,last,done = x0.clone(),None,0
    for _ in range(steps):
        x.requires_grad_()
        value = loss(F.normalize(net(x)))
        if change is not None and last is not None and abs(value.item() - last) < change: break
        grad, = torch.autograd.grad(value, x)
        x = torch.min(torch.max(x.detach() - step_size*grad.sign(), x0 - eps), x0 + eps).clamp(0, 1)
        last,done = value.item(),done + 1
    return x.detach(),done


def test_vectors():
    assert triplet_loss(D_AP, D_AN, margin=.2).mean().item() == pytest.approx(.0875, abs=1e-6)
    assert hm_objective(D_AP, D_AN, pseudo_hardness(2., margin=.2, cap=.2)).item() == pytest.approx(-.0225, abs=1e-6)
    assert hm_objective(D_AP, D_AN, pseudo_hardness(.1, margin=.2, cap=.2)).item() == pytest.approx(-.0425, abs=1e-6)


@pytest.mark.parametrize(
    'kind,at_0,at_quarter,at_cap',
    [
        ('gLGA', 0.0, -0.05, -0.2), ('g_B', 0.1, 0.025, -0.2), ('g_2', 0.0, -0.0125, -0.2), ('g_1/2', 0.0, -0.1, -0.2),
        (-0.1, -0.1, -0.1, -0.1), (0.0, 0.0, 0.0, 0.0)
    ],
)
def test_pseudo_hardness_values_and_order(kind, at_0, at_quarter, at_cap):
    values = [pseudo_hardness(v, margin=.2, cap=.2, kind=kind) for v in (-1., 0., .05, .1, .15, .2, 2.)]
    assert values[0] == values[1] == pytest.approx(at_0) and values[-1] == values[-2] == pytest.approx(at_cap)
    assert values[2] == pytest.approx(at_quarter) and values == sorted(values, reverse=True)


def test_act_is_the_papers_loop():
    net,(x,label) = network(),batch()
    trip = MINERS['random'](clean_embedding(net, x), label, gen=generator(0, 'mine'), margin=.2)
    def loss(e): return F.pairwise_distance(*e.chunk(2)).mean()
    adv,_ = loop(net, torch.cat([x[trip.p], x[trip.n]]), loss, eps=.1, step_size=.03, steps=5)
    a,(p,n) = F.normalize(net(x[trip.a])),F.normalize(net(adv)).chunk(2)
    naive = (
        sum(
            max(
                0.0,
                (
                    F.pairwise_distance(a[i : i + 1], p[i : i + 1]) - F.pairwise_distance(a[i : i + 1], n[i : i + 1])
                ).item()
                + 0.2,
            )
            for i in range(8)
        )
        / 8
    )
    out = run(act(**INNER), net, x, label)
    assert out.loss.item() == pytest.approx(naive, abs=1e-9) and out.log['steps_done'] == 5


@pytest.mark.parametrize('ics', [0., .5])
@pytest.mark.parametrize('pseudo,last', [('gLGA', .03), ('g_B', .15), (-.1, 2.), (None, 2.)])
def test_hm_is_the_papers_loop(ics, pseudo, last):
    net,(x,label) = network(),batch()
    gen,emb = generator(0, 'mine'),clean_embedding(net, x)
    trip = MINERS['softhard'](emb, label, gen=gen, margin=.2)
    def hardness(a, p, n): return F.pairwise_distance(a, p) - F.pairwise_distance(a, n)
    goal = (
        hardness(*take(emb, MINERS['semihard'](emb, label, gen=gen, margin=0.2)))
        if pseudo is None
        else pseudo_hardness(last, margin=0.2, cap=0.2, kind=pseudo)
    )
    def loss(e): return torch.clamp(hardness(*e.chunk(3)) - goal, max=0).square().mean()
    adv,done = loop(net, torch.cat(take(x, trip)), loss, eps=.1, step_size=.03, steps=5, change=1e-7)
    a,p,n = F.normalize(net(adv)).chunk(3)
    fit = (hardness(a, p, n) + .2).clamp(min=0).mean()
    clean_a,clean_p,_ = (F.normalize(net(v)) for v in take(x, trip))
    structure = (F.pairwise_distance(clean_a, a) - F.pairwise_distance(clean_a, clean_p)).clamp(min=0).mean()
    naive = fit + ics*structure
    assert structure > .01
    out = run(hm(**INNER, ics=ics, pseudo=pseudo), net, x, label, state=dict(loss=last))
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9)
    assert out.state['loss'] == pytest.approx(fit.item(), abs=1e-9) and out.log['steps_done'] == done
    ours = torch.autograd.grad(out.loss, net.parameters())
    for g,h in zip(ours, torch.autograd.grad(naive, net.parameters())):
        torch.testing.assert_close(g, h, atol=1e-9, rtol=1e-6)


def test_hm_stops_when_nothing_changes():
    net,(x,label) = network(),batch()
    # hardness is never below -2: loss 0 at the first and the second look
    out = run(hm(**INNER, ics=0., pseudo=-3.), net, x, label)
    assert out.log['steps_done'] == 1 and out.log['shift'] == pytest.approx(0., abs=1e-9)


def test_ics_has_gradient_through_clean_and_adversarial():
    a, b, p = (
        F.normalize(torch.randn(5, 4, generator=generator(k), dtype=torch.float64)).requires_grad_() for k in range(3)
    )
    ics_loss(a, b, p).backward()
    assert all(v.grad.abs().sum() > 0 for v in (a, b, p))
    assert torch.autograd.gradcheck(ics_loss, (a, b, p))


@pytest.mark.parametrize('parts', ['a', 'pn', 'apn', 'n'])
def test_perturb_moves_only_its_parts_inside_the_ball(parts):
    net,(x,_) = network(),batch()
    trip = Triplets(torch.arange(0, 16, 2), torch.arange(1, 16, 2), torch.arange(2, 18, 2) % 16)
    def harder(a, p, n): return (lambda ap, an: (ap - an).mean())(*triplet_distances(a, p, n))
    out = perturb(net, x, clean_embedding(net, x), trip, harder, parts=parts, eps=.05, step_size=.02, steps=4)
    for k,adv,clean in zip('apn', out.images, take(x, trip)):
        assert torch.equal(adv, clean) == (k not in parts)
        assert (adv - clean).abs().max() <= .05 + 1e-12 and adv.min() >= 0 and adv.max() <= 1 and not adv.requires_grad


@pytest.mark.parametrize('defence', ALL, ids=lambda d: d.name)
def test_step_leaves_the_rest_alone(defence):
    net,(x,label) = network(batchnorm=True),batch()
    before, weights, flags = (
        x.clone(), {k: v.clone() for k, v in net.state_dict().items()}, [p.requires_grad for p in net.parameters()]
    )
    state = defence.init()
    out = run(defence, net, x, label, state=state)
    assert torch.equal(x, before) and state == defence.init()
    assert all(torch.equal(v, weights[k]) for k,v in net.state_dict().items())  # statistics included
    assert [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert json.loads(json.dumps(out.state)) == out.state
    assert run(defence, net, x, label).loss.item() == out.loss.item()


@pytest.mark.parametrize('defence', ALL, ids=lambda d: d.name)
def test_collapsed_batch_is_finite(defence):
    net,(x,label) = network(),batch()
    with torch.no_grad(): net[-1].weight.zero_()
    out = run(defence, net, x, label)
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    assert out.log['dist_ap'] < 1e-4


def test_no_perturbation_is_the_clean_loss():
    net,(x,label) = network(),batch()
    plain = run(natural(margin=.2), net, x, label)
    for change in (dict(eps=0.), dict(steps=0)):
        out = run(act(**INNER | change), net, x, label)
        assert out.loss.item() == pytest.approx(plain.loss.item(), abs=1e-12)
        assert out.log['steps_done'] == 0 and out.log['shift'] != out.log['shift']


def test_one_forward_equals_many():
    net,(x,_) = network(batchnorm=True),batch()
    net.train()
    both = embed_together(net, x[:5], x[5:])
    train_mode(net)
    torch.testing.assert_close(both[0], F.normalize(net(x[:5])))
    torch.testing.assert_close(torch.cat(both), clean_embedding(net, x))


def test_log_keys_are_shared_and_right():
    net,(x,label) = network(),batch()
    logs = [run(d, net, x, label).log for d in ALL]
    assert len({tuple(log) for log in logs}) == 1 and all(isinstance(v, float) for log in logs for v in log.values())
    emb,trip = clean_embedding(net, x),Triplets(*(torch.arange(3) + k for k in (0, 4, 8)))
    moved = take(F.normalize(emb + .1), trip)
    log = training_log(emb, trip, moved, parts='an', steps=1)
    shift = torch.cat([(moved[k] - take(emb, trip)[k]).norm(dim=1) for k in (0, 2)]).mean()
    assert log['shift'] == pytest.approx(shift.item(), abs=1e-12)
    assert log['adv_hardness'] == pytest.approx(
        (F.pairwise_distance(*moved[:2]) - F.pairwise_distance(*moved[::2])).mean().item(), abs=1e-12
    )


@pytest.mark.parametrize(
    'make,wrong,words',
    [
        (act, dict(eps=8), 'eps'), (act, dict(step_size=0), 'step_size'), (act, dict(steps=-1), 'steps'),
        (act, dict(margin=-0.1), 'margin'), (act, dict(miner='best'), 'miner'),
        (hm, dict(ics=0.5, source='best'), 'source'), (hm, dict(ics=0.5, pseudo='gL'), 'pseudo'),
        (hm, dict(ics=0.5, loss_cap=0.0), 'loss_cap'), (hm, dict(ics=-1.0), 'ics')
    ],
)
def test_wrong_options_are_refused_when_the_defence_is_made(make, wrong, words):
    with pytest.raises(ValueError, match=words): make(**INNER | wrong)


def test_hm_softhard_quirk_is_a_switch():
    "With one pair per class the softhard fallback may pair an anchor with itself; allow_self=False forbids it."
    net,(x,label) = network(),batch()
    triplets = {}
    for allowed in (True, False):
        seen = []
        defence = hm(**INNER, ics=0., allow_self=allowed)
        for seed in range(6):
            seen.append(
                defence.step(net, x, label, state=defence.init(), clock=Clock(0, 1), gen=generator(seed, 'mine')).log[
                    'dist_ap'
                ]
            )
        triplets[allowed] = min(seen)
    assert defence.options['allow_self'] is False and triplets[True] < triplets[False]
