"COLO-TRIDE against a literal re-implementation of the official loop and of the paper's equations, and every switch."
import json
import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_dml.triplets.collapse import collapseness
from robust_dml.core import DEFENSES, generator
from robust_dml.defenses.base import Clock, Step, clean_embedding, make_defense as make, perturb, take, triplet_distances
from robust_dml.triplets.mining import MINERS, gradual_margin
from robust_dml.defenses.colo_tride import CHOICES, NAIVE, PAPER, PROFILES, Switches, anp_objective
from robust_dml.defenses.colo_tride import cap_objective, direction, inner_objective, naive, nearest_half
from robust_dml.defenses.colo_tride import reaction, stop_rule, switches, top_gain, top_loss, top_term, tride
from robust_dml.defenses.colo_tride import update_loss

D_AP,D_AN = torch.tensor([.30, .60, .90, .20]),torch.tensor([.50, .55, 1.00, .70])
INNER = dict(eps=.1, step_size=.03, steps=6, margin=.2, lam=4.)


def network(seed=0, scale=1.):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)).double()
    with torch.no_grad(): net[-1].weight.mul_(scale)
    return net


def batch(seed=0, pairs=8, noise=.2):
    "Pairs that share a pattern, so that semihard mining finds healthy triplets."
    label = torch.arange(pairs).repeat_interleave(2)
    pattern = torch.rand(pairs, 1, 6, 6, generator=generator(seed, 'patterns'), dtype=torch.float64)[label]
    return (
        pattern + noise * torch.randn(pattern.shape, generator=generator(seed, 'noise'), dtype=torch.float64)
    ).clamp(0, 1), label


def run(defence, net, x, label, *, state=None, epoch=3, seed=0):
    state = defence.init() if state is None else state
    return defence.step(net, x, label, state=state, clock=Clock(epoch, 4), gen=generator(seed, 'mine'))


def triplets_of(net, x, label, *, miner='semihard', epoch=3, seed=0):
    emb = clean_embedding(net, x)
    return emb,MINERS[miner](emb, label, gen=generator(seed, 'mine'), margin=gradual_margin(epoch, 4, margin=.2))


def literal(net, images, phase, loss, *, eps, step_size, steps, stop=0.):
    """The papers' PGD: minimise loss(dist_ap, dist_an, shift) of one phase; returns the three images and the updates
    done."""
    moving = dict(cap=[1, 2], anp=[0], sip=[0, 1, 2])[phase]
    clean = [F.normalize(net(v)).detach() for v in images]
    x0 = torch.cat([images[k] for k in moving])
    x,done = x0.clone(),0
    for _ in range(steps):
        x.requires_grad_()
        e = list(clean)
        for k,part in zip(moving, F.normalize(net(x)).chunk(len(moving))): e[k] = part
        value = loss(
            F.pairwise_distance(e[0], e[1]), F.pairwise_distance(e[0], e[2]), F.pairwise_distance(e[0], clean[0])
        )
        if value.item() < stop: break
        grad, = torch.autograd.grad(value, x)
        x,done = (x.detach() - step_size*grad.sign()).clamp(x0 - eps, x0 + eps).clamp(0, 1),done + 1
    out = list(images)
    for k,part in zip(moving, x.detach().chunk(len(moving))): out[k] = part
    return out,done


def far_mean(d, lam): return (torch.exp(lam*(d - d.max()))*d).sum()/torch.exp(lam*(d - d.max())).sum()

def official_loss(phase, lam):
    "Section by section what the official code minimises."
    def cap(d_ap, d_an, shift): return torch.clamp(far_mean(d_an, lam) - far_mean(d_ap, lam), min=0)
    def anp(d_ap, d_an, shift):
        P,N = far_mean(d_ap, lam),far_mean(d_an, lam)
        g = math.exp(-max(0., (N - P).item()))
        return torch.clamp(P - N, min=0) + g*torch.clamp(d_an.sort().values[:len(d_an)//2].mean() - shift.mean(), min=0)
    return dict(cap=cap, anp=anp)[phase]


def hinge(d_ap, d_an): return (d_ap - d_an + .2).clamp(min=0).mean()

def l_top(d_ap, d_an):
    k = len(d_ap)//2
    return .5*torch.clamp(d_ap.sort().values[:k].mean() - d_an.sort().values[:k].mean() + .04, min=0)


# ---- equations

def test_vectors():
    near = collapseness(D_AP, D_AN, lam=10.)
    assert top_gain(near).item() == pytest.approx(.738979, abs=2e-6)
    assert top_term(D_AN, torch.full((4,), .1), gain=top_gain(near)).item() == pytest.approx(.314066, abs=2e-6)
    assert top_loss(D_AP, D_AN, beta=.5, margin=.04).item() == 0
    J = -collapseness(D_AP, D_AN, lam=10., weighting='far')
    top = top_term(D_AN, torch.full((4,), .1), gain=top_gain(-J, rule='per_step'))
    assert -cap_objective(J, torch.tensor(-1.), hinge=True).item() == pytest.approx(.094372, abs=2e-6)
    assert -anp_objective(J, torch.tensor(-1.0), top, main='assist_only', keep_top=True).item() == pytest.approx(
        0.386726, abs=2e-6
    )


def test_official_oracle_has_the_vectors_too():
    assert official_loss('cap', 10.)(D_AP, D_AN, None).item() == pytest.approx(.094372, abs=2e-6)
    assert official_loss('anp', 10.)(D_AP, D_AN, torch.full((4,), .1)).item() == pytest.approx(.386726, abs=2e-6)


@pytest.mark.parametrize('seed', range(5))
def test_top_terms_are_permutation_invariant_and_match_sorting(seed):
    d_ap,d_an,shift = torch.rand(3, 9, generator=generator(seed), dtype=torch.float64)
    order = torch.randperm(9, generator=generator(seed, 'order'))
    g = torch.tensor(.7)
    assert top_term(d_an, shift, gain=g).item() == pytest.approx(
        0.7 * max(0, d_an.sort().values[:4].mean().item() - shift.mean().item()), abs=1e-7
    )
    assert top_loss(d_ap, d_an, beta=.5, margin=.04).item() == pytest.approx(l_top(d_ap, d_an).item(), abs=1e-12)
    assert top_loss(d_ap[order], d_an[order.flip(0)], beta=0.5, margin=0.04).item() == pytest.approx(
        top_loss(d_ap, d_an, beta=0.5, margin=0.04).item(), abs=1e-12
    )
    assert nearest_half(d_an).sort().values.tolist() == sorted(d_an.argsort()[:4].tolist())


def test_losses_have_right_gradients():
    d = [(torch.rand(6, generator=generator(k), dtype=torch.float64) + .2*(k == 0)).requires_grad_() for k in range(2)]
    def update(ap, an): return update_loss(ap, an, phase='anp', margin=.2, in_phase='anp', beta=.5, top_margin=.04)
    assert torch.autograd.gradcheck(update, d)
    def top(an, s): return top_term(an, .1*s, gain=torch.tensor(.7, dtype=torch.float64))
    assert torch.autograd.gradcheck(top, d)


# ---- the inner maximisation against the literal loops

@pytest.mark.parametrize('lam', [2., 10.])
@pytest.mark.parametrize('miner', ['semihard', 'hardest'])  # C < 0 and C >= 0 at the start
@pytest.mark.parametrize('phase', ['cap', 'anp'])
def test_official_profile_is_the_official_loop(phase, miner, lam):
    net,(x,label) = network(),batch(noise=.1 if miner == 'semihard' else .4)
    emb,trip = triplets_of(net, x, label, miner=miner)
    inner = dict(eps=.1, step_size=.03, steps=6)
    images,done = literal(net, take(x, trip), phase, official_loss(phase, lam), **inner, stop=1e-5)
    s, C = switches('official', **inner, margin=0.2, lam=lam), collapseness(
        *triplet_distances(*take(emb, trip)), lam=lam, weighting='far'
    )
    assert (C < 0) == (miner == 'semihard')
    signs = []
    ours = perturb(
        net, x, emb, trip, inner_objective(s, phase, reaction(phase, Clock(0, 4), s), C, emb[trip.a], D_AN, signs),
        parts=dict(cap='pn', anp='a')[phase], **inner, stop=stop_rule(s, phase)
    )
    for u,v in zip(ours.images, images): torch.testing.assert_close(u, v, atol=1e-12, rtol=0)
    assert ours.steps == done
    if phase == 'cap' and miner == 'hardest': assert done == 0  # the official CAP does not assist
    if phase == 'anp': assert done > 0


@pytest.mark.parametrize('phase', ['cap', 'anp'])
@pytest.mark.parametrize('epoch', [1, 3])
def test_official_step_is_the_official_step(phase, epoch):
    net,(x,label) = network(),batch()
    _,trip = triplets_of(net, x, label, epoch=epoch)
    images, done = literal(
        net, take(x, trip), phase, official_loss(phase, 4.0), eps=0.1, step_size=0.03 * epoch / 4, steps=6, stop=1e-5
    )
    a,p,n = (F.normalize(net(v)) for v in images)
    d_ap,d_an = F.pairwise_distance(a, p),F.pairwise_distance(a, n)
    naive_loss = hinge(d_ap, d_an) + l_top(d_ap, d_an)  # L_top in both phases
    out = run(tride(**INNER, profile='official'), net, x, label, state=dict(phase=phase), epoch=epoch)
    assert out.loss.item() == pytest.approx(naive_loss.item(), abs=1e-9) and out.log['steps_done'] == done
    assert out.log['adv_hardness'] == pytest.approx((d_ap - d_an).mean().item(), abs=1e-9)
    for g,h in zip(torch.autograd.grad(out.loss, net.parameters()), torch.autograd.grad(naive_loss, net.parameters())):
        torch.testing.assert_close(g, h, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize('phase', ['cap', 'anp'])
@pytest.mark.parametrize('miner', ['semihard', 'hardest'])
def test_paper_step_is_algorithm_1(phase, miner):
    net,(x,label) = network(),batch(noise=.2 if miner == 'semihard' else .4)
    emb,trip = triplets_of(net, x, label, miner=miner)
    d_ap,d_an = triplet_distances(*take(emb, trip))
    w_ap,w_an = torch.exp(-4*(d_ap - d_ap.min())),torch.exp(-4*(d_an - d_an.min()))
    C = ((w_ap*d_ap).sum()/w_ap.sum() - (w_an*d_an).sum()/w_an.sum()).item()
    sign = -1 if C < 0 else 1
    assert sign == (-1 if miner == 'semihard' else 1)
    def loss(d_ap, d_an, shift):
        J = d_an.mean() - d_ap.mean()
        top = (
            math.exp(-abs(C)) * torch.clamp(d_an.sort().values[:4].mean() - shift.mean(), min=0)
            if phase == 'anp' and sign < 0
            else 0.0
        )
        return -sign*J + top if sign > 0 else J + top
    images,_ = literal(net, take(x, trip), phase, loss, eps=.1, step_size=.03*3/4, steps=6, stop=-10.)
    a,p,n = (F.normalize(net(v)) for v in images)
    d_ap,d_an = F.pairwise_distance(a, p),F.pairwise_distance(a, n)
    out = run(tride(**INNER, miner=miner), net, x, label, state=dict(phase=phase))
    assert out.loss.item() == pytest.approx(
        (hinge(d_ap, d_an) + (l_top(d_ap, d_an) if phase == 'anp' else 0)).item(), abs=1e-9
    )
    assert out.log['assisted'] == (sign > 0) and out.log['steps_done'] == 6
    assert (out.log['adv_hardness'] > out.log['hardness']) == (sign < 0)


@pytest.mark.parametrize('profile', ['paper', 'official'])
@pytest.mark.parametrize(
    'name,phase', [('naive_cap', 'cap'), ('naive_anp', 'anp'), ('naive_sip', 'sip'), ('naive_tride', 'cap')]
)
def test_naive_attacks_even_a_collapsing_batch(name, phase, profile):
    net,(x,label) = network(),batch(noise=.4)
    out = run(naive(name, **INNER, miner='hardest', profile=profile), net, x, label, epoch=0)
    assert out.log['steps_done'] == INNER['steps'] and out.log['collapsing'] == 1
    assert out.log['hardness'] > 0 and out.log['adv_hardness'] > out.log['hardness'] and out.log['assisted'] == 0
    emb = clean_embedding(net, x)
    trip = MINERS['hardest'](emb, label)
    def loss(d_ap, d_an, shift): return (d_an - d_ap).mean()
    images,_ = literal(net, take(x, trip), phase, loss, eps=.1, step_size=.03, steps=6, stop=-10.)
    a,p,n = (F.normalize(net(v)) for v in images)
    hard = (F.pairwise_distance(a, p) - F.pairwise_distance(a, n)).mean().item()
    if profile == 'official': return # the weighted distances of its J have no such simple oracle
    plain = run(naive(name, **INNER, miner='hardest', top_term=False), net, x, label, epoch=0)
    assert plain.log['adv_hardness'] == pytest.approx(hard, abs=1e-9)


# ---- switches

def outcome(options, *, state=None, epoch=3, noise=.3, seed=0):
    "Loss and steps of one batch, as a fingerprint of what the switches decide."
    net,(x,label) = network(),batch(seed, noise=noise)
    out = run(tride(**INNER | options), net, x, label, state=state, epoch=epoch, seed=seed)
    return out.loss.item(),out.log['steps_done']

HEALTHY,SICK = dict(miner='semihard'),dict(miner='hardest')   # C < 0 and C >= 0 on the clean batch
CAP,ANP = dict(phase='cap'),dict(phase='anp')
EVERY = [  # switch, its other value, the situation in which it matters
    ('weighting', 'far', HEALTHY | CAP | dict(adv_distance='weighted'), 3),
    ('weighting', 'uniform', HEALTHY | ANP, 3),
    ('collapse_eval', 'per_step', HEALTHY | CAP, 3),
    ('collapse_miner', 'hardest', HEALTHY | CAP, 3),
    ('adv_distance', 'weighted', HEALTHY | CAP, 3),
    ('cap_on_collapse', 'stop', SICK | CAP, 3),
    ('cap_hinge', True, HEALTHY | CAP, 3),
    ('anp_main', 'assist_only', HEALTHY | ANP, 3),
    ('top_term', False, HEALTHY | ANP, 3),
    ('top_term_on_collapse', True, SICK | ANP, 3),
    ('top_gain', 'per_step', HEALTHY | ANP, 3),
    ('top_rank', 'clean', HEALTHY | ANP, 3),
    ('assist_start_frac', 1.0, SICK | CAP, 3),
    ('disabled_mode', 'attack', SICK | CAP, 1),
    ('top_loss_in', 'both', SICK | CAP | dict(top_margin=0.5), 3),
    ('top_beta', 0.0, SICK | ANP | dict(top_margin=0.5), 3),
    ('top_margin', 0.6, SICK | ANP, 3),
    ('step_schedule', 'linear1', HEALTHY | CAP, 2),
    ('step_schedule', 'const', HEALTHY | CAP, 2),
    (
        'early_stop', False,
        HEALTHY | CAP | dict(cap_hinge=True, adv_distance='weighted', collapse_eval='per_step', cap_on_collapse='stop'),
        3
    ),
    ('miner', 'random', HEALTHY | CAP, 3),
    ('miner_margin', 'linear', HEALTHY | CAP, 3),
    ('miner_margin', 'const', HEALTHY | CAP, 3),
    ('phase', 'anp', HEALTHY, 3),
    ('phase', 'sip', HEALTHY, 3),
    ('orientation', 'attack', SICK | CAP, 3),
    ('orientation', 'assist', HEALTHY | CAP, 3),
    ('orientation', 'assist_else_clean', HEALTHY | CAP, 3),
]

@pytest.mark.parametrize('key,value,options,epoch', EVERY, ids=lambda v: str(v) if isinstance(v, str) else '')
def test_every_switch_matters(key, value, options, epoch):
    assert any(
        outcome(options, epoch=epoch, seed=seed) != outcome(options | {key: value}, epoch=epoch, seed=seed)
        for seed in range(4)
    )


def test_no_switch_is_forgotten():
    assert {key for key,*_ in EVERY} == set(PAPER) and set(CHOICES) <= set(PAPER)
    assert set(PROFILES['official']) == set(PAPER) == {f.name for f in fields(Switches)} - set(INNER)


@pytest.mark.parametrize('profile', ['paper', 'official'])
def test_first_epoch_is_clean(profile):
    net,(x,label) = network(),batch()
    out = run(tride(**INNER, profile=profile), net, x, label, epoch=0)
    assert (
        out.log['steps_done'] == 0
        and math.isnan(out.log['shift'])
        and out.log['adv_hardness'] == pytest.approx(out.log['hardness'], abs=1e-9)
    )
    assert out.state == dict(phase='anp')  # the phases go on all the same


def test_assist_waits_for_its_epoch():
    net,(x,label) = network(),batch(noise=.4)
    logs = [
        run(tride(**INNER, miner='hardest', phase='cap', assist_start_frac=0.5), net, x, label, epoch=e).log
        for e in range(4)
    ]
    assert [log['steps_done'] for log in logs] == [0, 0, 6, 6] and [log['assisted'] for log in logs] == [0, 0, 1, 1]


def test_direction_table():
    C = torch.tensor([-.1, 0., .1])
    table = {
        ('colo', 1): [-1, 1, 1], ('colo', 0): [-1, 0, 0], ('colo', -1): [-1, -1, -1], ('attack', 1): [-1] * 3,
        ('assist', 0): [1] * 3, ('assist_else_clean', -1): [0, 1, 1]
    }
    for (orientation,react),expected in table.items():
        assert direction(C, orientation=orientation, on_collapse=react).tolist() == expected


@pytest.mark.parametrize(
    'options',
    [
        dict(weighting='close'), dict(profile='code'), dict(eps=8), dict(lam=-1.0), dict(phase='CAP'),
        dict(assist_start_frac=1.5), dict(top_beta=-1.0), dict(steps=1.5), dict(top_term='yes')
    ],
)
def test_wrong_values_are_refused(options):
    with pytest.raises(ValueError): tride(**INNER | options)


# ---- the state, all defences by name

METHODS = ('natural', 'act', 'hm', 'colo_tride', *NAIVE)
NAMES = {
    name: {k: v for k, v in INNER.items() if k in DEFENSES[name].options} | (dict(ics=0.5) if name == 'hm' else {})
    for name in METHODS
}

@pytest.mark.parametrize('name', NAMES)
def test_made_again_from_its_options(name):
    defence = make(name, **NAMES[name])
    again = make(defence.name, **json.loads(json.dumps(defence.options)))
    assert (again.name,again.options,again.init()) == (name,defence.options,defence.init())
    net,(x,label) = network(),batch()
    first,second = run(defence, net, x, label),run(again, net, x, label)
    assert (
        isinstance(first, Step)
        and first.loss.item() == second.loss.item()
        and first.log.keys() - {'own_collapseness', 'collapsing'}
        == run(make('natural', margin=0.2), net, x, label).log.keys()
    )


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match='colo_tride'): make('colo')
    with pytest.raises(TypeError, match='lam'): make('act', **INNER)
    with pytest.raises(TypeError, match='unknown option alpha|no option alpha'): make('colo_tride', **INNER, alpha=1)


def train(defence, net, updates, *, start=0, state=None):
    state = defence.init() if state is None else state
    optimiser = torch.optim.SGD(net.parameters(), .1)
    for u in range(start, updates):
        x,label = batch(u)
        out = defence.step(net, x, label, state=state, clock=Clock(1 + u//3, 4, u), gen=generator(0, 'mine', u))
        optimiser.zero_grad(); out.loss.backward(); optimiser.step()
        state = out.state
    return state


@pytest.mark.parametrize('name', NAMES)
def test_resume_from_a_json_state(name):
    defence = make(name, **NAMES[name])
    whole,parts = network(),network()
    end = train(defence, whole, 6)
    middle = json.loads(json.dumps(train(defence, parts, 3)))
    assert train(make(name, **NAMES[name]), parts, 6, start=3, state=middle) == end
    assert all(torch.equal(u, v) for u,v in zip(whole.parameters(), parts.parameters()))


@pytest.mark.parametrize('profile', ['paper', 'official'])
@pytest.mark.parametrize('phase', ['cap', 'anp', 'sip'])
def test_collapsed_and_tiny_batches_are_finite(profile, phase):
    for net,pairs in ((network(scale=0.), 8), (network(), 1), (network(), 2)):
        x,label = batch(pairs=pairs)
        out = run(tride(**INNER, profile=profile, phase=phase), net, x, label)
        out.loss.backward()
        assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_naive_and_presets_cover_the_tables():
    assert set(NAIVE) == {'naive_cap', 'naive_anp', 'naive_tride', 'naive_sip'} == {
        name for name in DEFENSES.names('defenses.colo_tride') if name.startswith('naive')
    }
    setting_a = tride(eps=32/255, step_size=16/255, steps=4, margin=.2, lam=2., profile='official').options
    assert (
        setting_a['weighting'], setting_a['cap_on_collapse'], setting_a['top_beta'], setting_a['step_schedule'],
        setting_a['miner_margin']
    ) == ('far', 'stop', 0.5, 'linear0', 'gradual')


@pytest.mark.parametrize('when, seen', [('once_clean', 'hardness'), ('per_step', 'adv_hardness')])
def test_own_collapseness_is_what_the_defence_watches(when, seen):
    "With λ = 0 the collapseness is the mean hardness, of the clean or of the perturbed triplets."
    net,(x,label) = network(),batch()
    log = run(
        make('colo_tride', **NAMES['colo_tride'] | dict(lam=0.0, collapse_eval=when, orientation='attack')), net, x,
        label
    ).log
    assert log['own_collapseness'] == pytest.approx(log[seen], abs=1e-6) and log['hardness'] != pytest.approx(
        log['adv_hardness'], abs=1e-3
    )


def test_early_stop_threshold():
    "The official code ends PGD below a loss of 1e-5."
    stop = stop_rule(switches('official', **INNER), 'cap')
    assert stop(torch.tensor(-9e-6), None) and not stop(torch.tensor(-2e-5), None)
    assert stop_rule(switches('paper', **INNER), 'cap') is None
