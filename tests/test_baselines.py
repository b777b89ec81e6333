"The further baselines against naive loops in float64, and each of them trained, killed and resumed."
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_dml.defenses import baselines, base as defenses
from robust_dml.data import sets
from robust_dml.defenses.baselines import away_from, est, free, library_loss, minmax
from robust_dml.defenses.baselines import multi_similarity, multi_similarity_loss, pack, robust_loss, ses
from robust_dml.defenses.baselines import topweighted, topweighted_loss, unpack
from robust_dml.core import DEFENSES, generator
from robust_dml.defenses.colo_tride import naive
from robust_dml.defenses.base import Clock, Defense, clean_embedding, hm, hm_objective, make_defense as make
from robust_dml.defenses.base import natural, pseudo_hardness, take
from robust_dml.triplets.mining import MINERS
from robust_dml.models.networks import build
from robust_dml.runs.store import Run, to_json
from robust_dml.defenses.train import train

BALL = dict(eps=.1, step_size=.03, steps=5)
INNER = dict(BALL, margin=.2)
FREE = dict(eps=.1, step_size=.03, margin=1.)  # a margin that no triplet of the small batches satisfies


def contrast(emb, label):
    "A loss of nobody's: partners near, the next pair far."
    return ((emb[::2] - emb[1::2]).square().sum(1) - (emb[::2] - emb[1::2].roll(1, 0)).square().sum(1)).exp().mean()


DEFENCES = dict(
    est=est(**INNER), ses=ses(**INNER), minmax=minmax(**INNER), free=free(**FREE),
    multi_similarity=multi_similarity(**BALL), first=multi_similarity(**BALL, moved='first', clean_weight=0.5),
    own=robust_loss(contrast, name='own', **BALL), topweighted=topweighted(**INNER, top=0.25)
)
OPTIONS_OF = dict(
    est=INNER, ses=INNER, minmax=INNER, free=FREE, multi_similarity=BALL, topweighted=dict(INNER, top=0.75),
    library_loss=dict(BALL, loss='CircleLoss', miner='MultiSimilarityMiner')
)


def network(seed=0, batchnorm=False):
    "A small net in float64, deterministic in `seed`."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = [nn.BatchNorm2d(4)] if batchnorm else []
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)).double()


def batch(seed=0, pairs=8):
    label = torch.arange(pairs).repeat_interleave(2)
    pattern = torch.rand(pairs, 1, 6, 6, generator=generator(0, 'patterns'), dtype=torch.float64)[label]
    return (pattern + 0.1 * torch.randn(pattern.shape, generator=generator(seed, 'noise'), dtype=torch.float64)).clamp(
        0, 1
    ), label


def run(defence, net, x, label, *, state=None, seed=0):
    state = defence.init() if state is None else state
    return defence.step(net, x, label, state=state, clock=Clock(3, 4), gen=generator(seed, 'mine'))


def walk(net, x0, loss, *, eps=.1, step_size=.03, steps=5):
    "PGD as the papers write it: minimise `loss(embeddings, number of the step)` of all images in x0."
    x = x0.clone()
    for k in range(steps):
        x.requires_grad_()
        grad, = torch.autograd.grad(loss(F.normalize(net(x)), k), x)
        x = torch.min(torch.max(x.detach() - step_size*grad.sign(), x0 - eps), x0 + eps).clamp(0, 1)
    return x.detach()


def triplet_hinges(emb, triplets, margin=.2):
    "The triplet loss, one triplet after the other."
    def d(i, j): return (emb[i] - emb[j] + 1e-6).square().sum().sqrt()
    return sum(
        torch.clamp(d(a, p) - d(a, n) + margin, min=0) for a, p, n in zip(*(t.tolist() for t in triplets))
    ) / len(triplets.a)


def close_gradients(loss, naive, net):
    for g,h in zip(torch.autograd.grad(loss, net.parameters()), torch.autograd.grad(naive, net.parameters())):
        torch.testing.assert_close(g, h, atol=1e-9, rtol=1e-6)


# ---- EST and SES

def shifted_by_hand(net, x, gen):
    "Images driven away from themselves, image by image; the target is displaced at the first step."
    emb = clean_embedding(net, x)
    noise = 1e-7*torch.randint(-1, 2, emb.shape, generator=gen).double()
    def loss(e, k):
        return -sum(
            (e[i] - (emb[i] + noise[i] if k == 0 else emb[i]) + 1e-6).square().sum().sqrt() for i in range(len(e))
        )
    return walk(net, x, loss)


def test_est_is_the_papers_loop():
    net,(x,label),gen = network(),batch(),generator(0, 'mine')
    after = F.normalize(net(shifted_by_hand(net, x, gen)))
    naive = triplet_hinges(after, MINERS['semihard'](after, label, gen=gen, margin=.2))
    out = run(est(**INNER, miner='semihard'), net, x, label)
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9) and out.loss > .01
    close_gradients(out.loss, naive, net)
    shift = (after - F.normalize(net(x))).norm(dim=1).mean().item()
    assert (
        out.log['shift'] == pytest.approx(shift, abs=1e-9)
        and out.log['steps_done'] == 5
        and out.log['image_steps'] == 5 * 16
    )


@pytest.mark.parametrize('weight', [1., .3])
def test_ses_is_the_papers_loop(weight):
    net,(x,label),gen = network(),batch(),generator(0, 'mine')
    adv = shifted_by_hand(net, x, gen)
    clean,after = F.normalize(net(x)),F.normalize(net(adv))
    drift = sum((u - v + 1e-6).square().sum().sqrt() for u,v in zip(after, clean))/16
    naive = triplet_hinges(clean, MINERS['random'](clean, label, gen=gen, margin=.2)) + weight*drift
    out = run(ses(**INNER, weight=weight), net, x, label)
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9) and drift > .01
    close_gradients(out.loss, naive, net)  # through clean and adversarial embeddings


def test_only_the_first_look_is_displaced():
    emb = F.normalize(torch.randn(6, 8, generator=generator(0), dtype=torch.float64))
    looks = [
        (lambda d: d.norm(dim=1))(
            emb - emb - 1e-7 * torch.randint(-1, 2, emb.shape, generator=generator(1)).double() + 1e-6
        ),
        F.pairwise_distance(emb, emb),
        F.pairwise_distance(emb, emb),
    ]
    far = away_from(emb, generator(1))
    for expected in looks: torch.testing.assert_close(far(emb), expected, atol=1e-12, rtol=0)


def test_est_lets_batchnorm_follow_its_batches():
    "Train-mode statistics of the adversarial batch, one update with momentum 0.1; frozen: none."
    for frozen in (False, True):
        net,(x,label) = network(batchnorm=True),batch()
        twin = network(batchnorm=True)
        adv = shifted_by_hand(twin.eval(), x, generator(0, 'mine'))
        out = run(est(**INNER, freeze_batchnorm=frozen), net, x, label)
        twin.train(not frozen)
        after = F.normalize(twin(adv))
        assert (after - F.normalize(twin.eval()(x))).norm(dim=1).mean().item() > .01
        assert out.log['image_steps'] == 80 and all(
            torch.allclose(u, v) for u, v in zip(net.buffers(), twin.buffers(), strict=True)
        )
        assert net[1].num_batches_tracked == (0 if frozen else 1)
    assert not est(**INNER).options['freeze_batchnorm']


def test_shifts_stay_in_the_ball(monkeypatch):
    seen,inside = [],baselines.pgd
    def spy(*args, **kw): seen.append((args[2], inside(*args, **kw))); return seen[-1][1]
    monkeypatch.setattr(baselines, 'pgd', spy)
    net,(x,label) = network(),batch()
    for defence in (est(**INNER), ses(**INNER)): run(defence, net, x, label)
    run(multi_similarity(**BALL), net, x, label)
    assert len(seen) == 3
    for clean,found in seen:
        assert (
            torch.equal(clean, x)
            and 0.099 < (found.images - x).abs().max() <= 0.1 + 1e-12
            and found.images.min() >= 0
            and found.images.max() <= 1
        )
        assert found.steps == 5 and not found.images.requires_grad


# ---- min-max

def test_minmax_is_the_papers_loop():
    net,(x,label) = network(),batch()
    triplets = MINERS['semihard'](clean_embedding(net, x), label, gen=generator(0, 'mine'), margin=.2)
    def loss(e, k): return sum((u - w + 1e-6).norm() - (u - v + 1e-6).norm() for u,v,w in zip(*e.chunk(3)))/8
    adv = walk(net, torch.cat(take(x, triplets)), loss)
    rows = type(triplets)(*torch.arange(24).chunk(3))
    naive = triplet_hinges(F.normalize(net(adv)), rows)
    out = run(minmax(**INNER, miner='semihard'), net, x, label)
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9) and naive > .05
    close_gradients(out.loss, naive, net)
    assert out.log['steps_done'] == 5 and out.log['image_steps'] == 5*24


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('miner', MINERS)
def test_minmax_is_hm_with_hardness_two(monkeypatch, miner, seed):
    "The same adversarial images, bit by bit, and the same loss; no triplet of unit vectors reaches hardness 2."
    found,perturb = [],defenses.perturb
    def spy(*args, **kw):
        found.append(perturb(*args, **kw))
        return found[-1]
    for module in (baselines, defenses): monkeypatch.setattr(module, 'perturb', spy)
    net,(x,label) = network(seed),batch(seed)
    mine = run(minmax(**INNER, miner=miner), net, x, label, seed=seed)
    theirs = run(hm(**INNER, ics=0., pseudo=2., source=miner), net, x, label, seed=seed)
    assert (
        all(torch.equal(u, v) for u, v in zip(found[0].images, found[1].images))
        and found[0].steps == found[1].steps == 5
    )
    assert mine.loss.item() == theirs.loss.item() and json.dumps(mine.log) == json.dumps(theirs.log)
    moved = torch.stack(found[0].images) - torch.stack(
        take(x, MINERS[miner](clean_embedding(net, x), label, gen=generator(seed, 'mine'), margin=0.2))
    )
    assert (
        0.099 < moved.abs().max() <= 0.1 + 1e-12
        and min(i.min() for i in found[0].images) >= 0
        and max(i.max() for i in found[0].images) <= 1
    )


def test_minmax_is_the_naive_simultaneous_perturbation():
    net,(x,label) = network(),batch()
    assert run(minmax(**INNER), net, x, label).loss.item() == pytest.approx(
        run(naive('naive_sip', **INNER, lam=1.0, miner='random'), net, x, label).loss.item(), abs=1e-12
    )


# ---- free adversarial training

def train_free(defence, net, batches):
    "Plain gradient descent over batches, one call of `step` each; the states on the way."
    states,optimiser = [defence.init()],torch.optim.SGD(net.parameters(), .1)
    for u,(x,label) in enumerate(batches):
        out = defence.step(
            net, x, label, state=json.loads(json.dumps(states[-1])), clock=Clock(0, 1, u), gen=generator(0, 'mine', u)
        )
        optimiser.zero_grad(); out.loss.backward(); optimiser.step()
        states.append(out.state)
    return states


def free_by_hand(net, batches, repeats, *, eps=.1, step_size=.03):
    """The papers' loop: every batch that is used is repeated, one optimiser for the network, one rule for the
    perturbation."""
    optimiser = torch.optim.SGD(net.parameters(), .1)
    sigma = torch.zeros(3, max(len(x) for x,_ in batches)//2, 1, 6, 6, dtype=torch.float64)
    for u in range(0, len(batches), repeats):
        x,label = batches[u]
        images = torch.stack(
            take(x, MINERS['random'](clean_embedding(net, x), label, gen=generator(0, 'mine', u), margin=0.2))
        )
        b = images.shape[1]
        for _ in range(min(repeats, len(batches) - u)):
            own = sigma[:, :b].clone().requires_grad_()
            a,p,n = (F.normalize(net((clean + shift).clamp(0, 1))) for clean,shift in zip(images, own))
            loss = (F.pairwise_distance(a, p) - F.pairwise_distance(a, n) + 1).clamp(min=0).mean()
            optimiser.zero_grad(); loss.backward(); optimiser.step()
            sigma[:, :b] = (own.detach() + step_size*own.grad.sign()).clamp(-eps, eps)
    return sigma


@pytest.mark.parametrize('repeats', [1, 3, 4])
def test_free_is_the_papers_loop(repeats):
    """Eleven updates over batches of 8 and 3 pairs: the smaller ones move their part of the buffer only, a group may
    cross any border."""
    batches = [batch(u, pairs=3 if u % 5 == 4 or u == 3 else 8) for u in range(11)]
    mine,theirs = network(),network()
    states = train_free(free(**FREE, repeats=repeats), mine, batches)
    sigma = free_by_hand(theirs, batches, repeats)
    found = unpack(states[-1]['sigma'], batches[0][0])
    assert torch.equal(found, sigma) and found.abs().max() == .1
    for u,v,start in zip(mine.parameters(), theirs.parameters(), network().parameters()):
        torch.testing.assert_close(u, v, atol=1e-12, rtol=0)
        assert not torch.equal(u, start)
    assert [s['done'] for s in states] == [u % repeats for u in range(12)]
    assert all((s['images'] == '') == (s['done'] == 0) for s in states)


def test_free_repeats_the_kept_batch_alone():
    """After the first call neither the images nor the generator handed over matter; the clean values are known in the
    first alone."""
    net,(x,label) = network(),batch()
    defence = free(**FREE)
    first = run(defence, net, x, label)
    again,other = run(defence, net, x, label, state=first.state),run(defence, net, *batch(5), state=first.state, seed=7)
    assert again.loss.item() == other.loss.item() != first.loss.item() and again.state == other.state
    assert first.log['hardness'] == first.log['hardness'] and again.log['hardness'] != again.log['hardness']
    assert again.log['adv_hardness'] > first.log['adv_hardness'] and again.log['image_steps'] == 24


def test_free_grows_its_buffer():
    "A larger batch than all before gets zeros for what is new."
    net,small,large = network(),batch(0, pairs=3),batch(1, pairs=8)
    states = train_free(free(**FREE, repeats=1), net, [small, large])
    before,after = (unpack(s['sigma'], small[0]) for s in states[1:])
    assert (
        before.shape[1] == 3
        and before.abs().max() > 0
        and torch.equal(after, free_by_hand(network(), [small, large], 1))
    )


def test_free_gives_the_loops_backward_pass_its_gradients():
    net,(x,label) = network(),batch()
    out = run(free(**FREE), net, x, label)
    images = torch.stack(take(x, MINERS['random'](clean_embedding(net, x), label, gen=generator(0, 'mine'), margin=.2)))
    a,p,n = F.normalize(net(images.flatten(0, 1))).chunk(3)
    naive = (F.pairwise_distance(a, p) - F.pairwise_distance(a, n) + 1).clamp(min=0).mean()
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-12)
    close_gradients(out.loss, naive, net)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_packing_keeps_every_bit(dtype):
    values = torch.randn(3, 4, 1, 2, 2, generator=generator(0), dtype=dtype)
    assert torch.equal(unpack(json.loads(json.dumps(pack(values))), values[0]), values)


# ---- HM with other miners and destinations

D_AP,D_AN = torch.tensor([.30, .60, .90, .20]),torch.tensor([.50, .55, 1.00, .70])

@pytest.mark.parametrize('last, goal, loss', [(2., -.2, .0225), (.1, -.1, .0425)])
def test_hm_vectors(last, goal, loss):
    assert pseudo_hardness(last, margin=0.2, cap=0.2) == pytest.approx(goal) and hm_objective(
        D_AP, D_AN, goal
    ).item() == pytest.approx(-loss, abs=1e-6)


@pytest.mark.parametrize('source', MINERS)
@pytest.mark.parametrize('destination', MINERS)
def test_hm_takes_every_pair_of_miners(source, destination):
    net,(x,label),gen = network(),batch(),generator(0, 'mine')
    emb = clean_embedding(net, x)
    triplets,others = (MINERS[m](emb, label, gen=gen, margin=.2) for m in (source, destination))
    def d(i, j): return F.pairwise_distance(emb[i], emb[j])
    goal = d(others.a, others.p) - d(others.a, others.n)
    def loss(e, k):
        return (
            sum(
                torch.clamp((u - v + 1e-6).norm() - (u - w + 1e-6).norm() - h, max=0) ** 2
                for u, v, w, h in zip(*e.chunk(3), goal)
            )
            / 8
        )
    out = run(hm(**INNER, ics=0., pseudo=None, source=source, destination=destination), net, x, label)
    adv = (
        torch.cat(take(x, triplets))
        if source == destination
        else walk(net, torch.cat(take(x, triplets)), loss, steps=int(out.log['steps_done']))
    )
    rows = type(triplets)(*torch.arange(24).chunk(3))
    assert out.loss.item() == pytest.approx(triplet_hinges(F.normalize(net(adv)), rows).item(), abs=1e-9)


@pytest.mark.parametrize(
    'kind, goal',
    [
        ('gLGA', -0.15), ('g_B', -0.125), ('g_2', -0.1125), ('g_1/2', -0.2 * 0.75**0.5), (0.0, 0.0), (-0.1, -0.1),
        (-0.2, -0.2)
    ],
)
def test_hm_goes_to_its_pseudo_hardness(kind, goal):
    """With a last loss of 0.15, three quarters of the cap; small steps come near the goal for all triplets that start
    below."""
    assert pseudo_hardness(.15, margin=.2, cap=.2, kind=kind) == pytest.approx(goal)
    net,(x,label) = network(),batch()
    out = run(
        hm(eps=0.5, step_size=0.005, steps=200, margin=0.2, ics=0.0, pseudo=kind, source='random'), net, x, label,
        state=dict(loss=0.15)
    )
    assert out.log['hardness'] < goal - .05 and abs(out.log['adv_hardness'] - goal) < .05


# ---- any loss

def multi_similarity_by_hand(emb, label, alpha, beta, base):
    total = 0.
    for i in range(len(emb)):
        mates = [torch.exp(-alpha*(emb[i] @ emb[k] - base)) for k in range(len(emb)) if k != i and label[k] == label[i]]
        others = [torch.exp(beta*(emb[i] @ emb[k] - base)) for k in range(len(emb)) if label[k] != label[i]]
        total = (
            total
            + torch.log(1 + sum(mates) + emb.new_zeros(())) / alpha
            + torch.log(1 + sum(others) + emb.new_zeros(())) / beta
        )
    return total/len(emb)


@pytest.mark.parametrize('label', [[0, 0, 1, 1, 2, 2, 0, 0], [0]*8, list(range(8))])
def test_multi_similarity_is_its_formula(label):
    "Also with one class, and with no positives."
    emb, label = F.normalize(
        torch.randn(8, 5, generator=generator(0), dtype=torch.float64)
    ).requires_grad_(), torch.tensor(label)
    for options in (dict(alpha=2., beta=50., base=.5), dict(alpha=18., beta=3., base=.8)):
        ours,naive = multi_similarity_loss(emb, label, **options),multi_similarity_by_hand(emb, label, **options)
        assert ours.item() == pytest.approx(naive.item(), abs=1e-12) and ours > .01
        torch.testing.assert_close(*(torch.autograd.grad(v, emb)[0] for v in (ours, naive)), atol=1e-12, rtol=0)


def test_multi_similarity_of_the_library():
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    emb, label = F.normalize(torch.randn(8, 5, generator=generator(0), dtype=torch.float64)), torch.tensor(
        [0, 0, 1, 1, 2, 2, 0, 0]
    )
    assert losses.MultiSimilarityLoss(alpha=3.0, beta=20.0, base=0.4)(emb, label).item() == pytest.approx(
        multi_similarity_loss(emb, label, alpha=3.0, beta=20.0, base=0.4).item(), abs=1e-12
    )


@pytest.mark.parametrize('moved, clean_weight', [('all', 0.), ('first', 0.), ('all', 1.5), ('first', .5)])
def test_robust_loss_is_its_formula(moved, clean_weight):
    net,(x,label) = network(),batch()
    emb = clean_embedding(net, x)
    if moved == 'all': adv = walk(net, x, lambda e, k: -multi_similarity_by_hand(e, label, 2., 50., .5))
    else:
        adv = x.clone()
        adv[::2] = walk(
            net, x[::2],
            lambda e, k: -multi_similarity_by_hand(torch.stack([e, emb[1::2]], 1).flatten(0, 1), label, 2.0, 50.0, 0.5)
        )
    naive = multi_similarity_by_hand(
        F.normalize(net(adv)), label, 2.0, 50.0, 0.5
    ) + clean_weight * multi_similarity_by_hand(F.normalize(net(x)), label, 2.0, 50.0, 0.5)
    out = run(multi_similarity(**BALL, moved=moved, clean_weight=clean_weight), net, x, label)
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9) and (adv - x).abs().max() > .099
    close_gradients(out.loss, naive, net)
    rows = slice(None, None, 1 if moved == 'all' else 2)
    shift = (F.normalize(net(adv)) - emb)[rows].norm(dim=1).mean().item()
    assert out.log['shift'] == pytest.approx(shift, abs=1e-9) and out.log['image_steps'] == 5*len(x[rows])


def topweighted_by_hand(emb, label, top, margin=.2):
    "Anchor by anchor: the nearest image of another class, then all the others."
    total = 0.
    for a in range(0, len(emb), 2):
        far = sorted(
            (((emb[a] - emb[n]).norm(), n) for n in range(len(emb)) if label[n] != label[a]),
            key=lambda pair: pair[0].item()
        )
        hinges = [torch.clamp((emb[a] - emb[a + 1]).norm() - d + margin, min=0) for d,_ in far]
        total = total + top*hinges[0] + (1 - top)*sum(hinges[1:])/max(1, len(hinges) - 1)
    return total/(len(emb)//2)


@pytest.mark.parametrize('top', [0., .3, 1.])
@pytest.mark.parametrize('label', [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 0, 0, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
def test_topweighted_loss_is_its_formula(label, top):
    "Also where two pairs share a class, and where most anchors have two negatives only."
    emb, label = F.normalize(
        torch.randn(8, 5, generator=generator(0), dtype=torch.float64)
    ).requires_grad_(), torch.tensor(label)
    ours,naive = topweighted_loss(emb, label, top=top, margin=.8),topweighted_by_hand(emb, label, top, .8)
    assert ours.item() == pytest.approx(naive.item(), abs=1e-9) and ours > .01
    torch.testing.assert_close(*(torch.autograd.grad(v, emb)[0] for v in (ours, naive)), atol=1e-8, rtol=0)


def test_topweighted_by_default_moves_anchors_and_adds_the_clean_loss():
    assert topweighted(**INNER, top=.5).options == dict(INNER, top=.5, moved='first', clean_weight=1.)


def test_topweighted_without_negatives():
    emb = F.normalize(torch.randn(4, 5, generator=generator(0), dtype=torch.float64)).requires_grad_()
    loss = topweighted_loss(emb, torch.zeros(4, dtype=torch.long), top=.5, margin=.2)
    assert loss.item() == 0 and not torch.autograd.grad(loss, emb)[0].any()


@pytest.mark.parametrize('moved, clean_weight, top', [('first', 1., .25), ('first', 0., 1.), ('all', .5, 0.)])
def test_topweighted_moves_anchors_against_its_own_loss(moved, clean_weight, top):
    net,(x,label) = network(),batch()
    emb,rows = clean_embedding(net, x),slice(None, None, 2 if moved == 'first' else 1)
    def whole(e): return e if moved == 'all' else torch.stack([e, emb[1::2]], 1).flatten(0, 1)
    adv = x.clone()
    adv[rows] = walk(net, x[rows], lambda e, k: -topweighted_by_hand(whole(e), label, top))
    naive = topweighted_by_hand(F.normalize(net(adv)), label, top) + clean_weight * topweighted_by_hand(
        F.normalize(net(x)), label, top
    )
    out = run(topweighted(**INNER, top=top, moved=moved, clean_weight=clean_weight), net, x, label)
    assert (
        out.loss.item() == pytest.approx(naive.item(), abs=1e-8)
        and naive > 0.01
        and (adv - x)[rows].abs().max() > 0.099
    )
    close_gradients(out.loss, naive, net)


@pytest.mark.parametrize(
    'loss, miner',
    [
        ('ContrastiveLoss', 'PairMarginMiner'), ('ContrastiveLoss', 'MultiSimilarityMiner'),
        ('TripletMarginLoss', 'TripletMarginMiner'), ('NPairsLoss', 'BatchHardMiner'),
        ('MultiSimilarityLoss', 'MultiSimilarityMiner'), ('ContrastiveLoss', ''), ('NPairsLoss', ''),
        ('SupConLoss', '')
    ],
)
@pytest.mark.parametrize('moved', ['all', 'first'])
def test_losses_and_miners_of_the_library_by_hand(loss, miner, moved):
    "Mined once on the clean embeddings; the same pairs or triplets in every step of the search and in the update."
    losses,miners = (pytest.importorskip(f'pytorch_metric_learning.{kind}') for kind in ('losses', 'miners'))
    net,(x,label) = network(),batch()
    emb,theirs,rows = clean_embedding(net, x),getattr(losses, loss)(),slice(None, None, 2 if moved == 'first' else 1)
    found = getattr(miners, miner)()(emb, label) if miner else None
    def whole(e): return e if moved == 'all' else torch.stack([e, emb[1::2]], 1).flatten(0, 1)
    adv = x.clone()
    adv[rows] = walk(net, x[rows], lambda e, k: -theirs(whole(e), label, found))
    naive = theirs(F.normalize(net(adv)), label, found)
    out = run(library_loss(loss=loss, miner=miner, moved=moved, **BALL), net, x, label)
    assert out.loss.item() == pytest.approx(naive.item(), abs=1e-9) and naive > theirs(emb, label, found)
    close_gradients(out.loss, naive, net)


def test_objects_of_the_library_go_into_robust_loss():
    "With a distance and a reducer, which JSON cannot hold."
    pytest.importorskip('pytorch_metric_learning')
    from pytorch_metric_learning import distances, losses, miners, reducers
    cosine = distances.CosineSimilarity()
    loss = losses.ContrastiveLoss(pos_margin=1., neg_margin=0., distance=cosine, reducer=reducers.MeanReducer())
    miner = miners.TripletMarginMiner(margin=.1, distance=cosine)
    net,(x,label) = network(),batch()
    values = [
        run(robust_loss(loss, name='own', miner=miner, **BALL | dict(steps=k)), net, x, label).loss.item()
        for k in (0, 5)
    ]
    emb = clean_embedding(net, x)
    assert (
        values[0] == pytest.approx(loss(emb, label, miner(emb, label)).item(), abs=1e-12)
        and values[1] > 1.05 * values[0]
    )


DRAWING = [
    dict(loss='ContrastiveLoss', miner='DistanceWeightedMiner'),
    dict(loss='TripletMarginLoss', loss_options=dict(triplets_per_anchor=2))
]

@pytest.mark.parametrize('drawing', DRAWING, ids=('miner', 'loss'))
def test_the_generator_decides_what_the_library_draws(drawing, images, tmp_path):
    "Whatever the global state is, which stays as it was; a resumed training draws what an undisturbed one does."
    pytest.importorskip('pytorch_metric_learning')
    defence,net,(x,label) = library_loss(**drawing, **BALL),network(),batch()
    values = []
    for seed,global_seed in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            values.append(run(defence, net, x, label, seed=seed).loss.item())
            assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1] != values[2]
    resumes(defence, images, tmp_path)


def test_losses_of_the_library():
    pytest.importorskip('pytorch_metric_learning')
    net,(x,label) = network(),batch()
    theirs = library_loss(loss='MultiSimilarityLoss', loss_options=dict(alpha=2, beta=50, base=.5), **BALL)
    assert run(theirs, net, x, label).loss.item() == pytest.approx(
        run(multi_similarity(**BALL), net, x, label).loss.item(), abs=1e-9
    )
    for name in ('AngularLoss', 'CircleLoss', 'ContrastiveLoss', 'MarginLoss', 'NTXentLoss', 'TripletMarginLoss'):
        out,clean = (run(library_loss(loss=name, **BALL | dict(steps=k)), net, x, label).loss.item() for k in (5, 0))
        assert out > 1.05*clean
    with pytest.raises(ValueError, match='no weights of its own'):
        library_loss(loss='ProxyNCALoss', loss_options=dict(num_classes=8, embedding_size=8), **BALL)
    with pytest.raises(ValueError, match="loss must be one of .*'CircleLoss'"): library_loss(loss='Circle', **BALL)
    with pytest.raises(TypeError, match='loss_options must be keywords of CircleLoss'):
        library_loss(loss='CircleLoss', loss_options=dict(radius=1), **BALL)
    with pytest.raises(TypeError, match='loss_options must be keywords of SubCenterArcFaceLoss'):
        library_loss(loss='SubCenterArcFaceLoss', **BALL)
    with pytest.raises(ValueError, match='no memory of its own, found DynamicSoftMarginLoss'):
        library_loss(loss='DynamicSoftMarginLoss', **BALL)
    with pytest.raises(ValueError, match="miner must be one of .*'PairMarginMiner'.*found 'BaseMiner'"):
        library_loss(loss='CircleLoss', miner='BaseMiner', **BALL)
    with pytest.raises(TypeError, match='miner_options must be keywords of PairMarginMiner'):
        library_loss(loss='CircleLoss', miner='PairMarginMiner', miner_options=dict(radius=1), **BALL)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pytorch_metric_learning.losses', None)
    with pytest.raises(ImportError, match='library_loss needs pytorch_metric_learning; install it with'):
        library_loss(loss='CircleLoss', **BALL)
    run(multi_similarity(**BALL), network(), *batch())


def test_a_loss_of_the_wrong_shape_is_named():
    for wrong,found in ((lambda e, y: e.sum(1), r'\(16,\)'), (lambda e, y: 1., 'float')):
        with pytest.raises(ValueError, match=rf'must return a tensor of shape \(\), found {found}'):
            run(robust_loss(wrong, name='wrong', **BALL), network(), *batch())


def test_losses_are_computed_in_full_precision():
    seen = []
    def loss(emb, label):
        seen.append((emb.dtype, (emb @ emb.T).dtype))
        return (emb @ emb.T).sum()
    net,(x,label) = network().float(),batch()
    with torch.autocast('cpu', torch.bfloat16): run(robust_loss(loss, name='seen', **BALL), net, x.float(), label)
    assert set(seen) == {(torch.float32, torch.float32)} and len(seen) == 6


# ---- names

@pytest.mark.parametrize('name', DEFENSES.names('defenses.baselines'))
def test_made_again_from_its_options(name):
    if name == 'library_loss': pytest.importorskip('pytorch_metric_learning')
    defence = make(name, **OPTIONS_OF[name])
    again = make(defence.name, **json.loads(json.dumps(defence.options)))
    assert (again.name, again.options, again.init()) == (name, defence.options, defence.init()) and set(
        defence.options
    ) == set(DEFENSES[name].options)
    net,(x,label) = network(),batch()
    assert run(again, net, x, label).loss.item() == run(defence, net, x, label).loss.item()


def test_names_and_options_that_are_not_there():
    with pytest.raises(ValueError, match="act.*est.*found 'EST'; did you mean"): make('EST', **INNER)
    with pytest.raises(TypeError, match='est has no option lam; it has eps'): make('est', **INNER, lam=1.)
    with pytest.raises(TypeError, match='act has no option lam'): make('act', **INNER, lam=1.)


# ---- what every defence must do

@pytest.mark.parametrize('name', DEFENCES)
def test_step_leaves_the_rest_alone_and_repeats(name):
    defence,net,(x,label) = DEFENCES[name],network(),batch()
    before,weights,state = x.clone(),{k: v.clone() for k,v in net.state_dict().items()},defence.init()
    out = run(defence, net, x, label, state=state)
    assert torch.equal(x, before) and state == defence.init()
    assert all(torch.equal(v, weights[k]) for k,v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    assert json.loads(json.dumps(out.state)) == out.state
    assert out.log.keys() == run(natural(margin=0.2), net, x, label).log.keys() and all(
        isinstance(v, float) for v in out.log.values()
    )
    again,other = run(defence, net, x, label),run(defence, net, x, label, seed=1)
    assert again.loss.item() == out.loss.item() and json.dumps(again.log) == json.dumps(out.log)
    assert json.dumps(other.log) != json.dumps(out.log)  # the generator is what decides


@pytest.mark.parametrize('name', DEFENCES)
def test_collapsed_and_tiny_batches_are_finite(name):
    for pairs,collapsed in ((8, True), (2, False), (1, False)):
        net,(x,label) = network(),batch(pairs=pairs)
        if collapsed:
            with torch.no_grad(): net[-1].weight.zero_()
        out = run(DEFENCES[name], net, x, label)
        out.loss.backward()
        assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


@pytest.fixture(scope='module')
def images(): return sets.glyphs(train_classes=6, test_classes=2, per_class=6).train

OPTIONS = dict(epochs=3, pairs=16, lr=1e-3, seed=0, show=False)  # 36 images: batches of 16, 16 and 4 pairs
def fresh(): return build('small', dim=8, size=28, channels=1, seed=0)


def failing(defence, at):
    "The same defence, failing at update `at`."
    def step(model, x, label, *, state, clock, gen):
        if clock.update == at: raise KeyboardInterrupt
        return defence.step(model, x, label, state=state, clock=clock, gen=gen)
    return Defense(name=defence.name, options=defence.options, init=defence.init, step=step)


def watched(defence, states):
    "The same defence; what it hands to the next batch is appended to `states`."
    def step(*args, **kw):
        out = defence.step(*args, **kw)
        states.append(out.state)
        return out
    return Defense(name=defence.name, options=defence.options, init=defence.init, step=step)


def resumes(defence, images, folder, make=fresh):
    """Train whole, and train again with a kill in the third epoch: the same weights, log and state, bit by bit;
    returns the last state."""
    whole,resumed,states,again = make(),make(),[],[]
    expected = train(whole, images, watched(defence, states), **OPTIONS)
    with pytest.raises(KeyboardInterrupt): train(make(), images, failing(defence, 7), run=Run(folder), **OPTIONS)
    assert Run(folder).read('checkpoint.json')['epoch'] == 2
    found = train(resumed, images, watched(defence, again), run=Run(folder), **OPTIONS)
    assert (
        to_json(found['log']) == to_json(expected['log'])
        and again == states[6:]
        and found['updates'] == len(states) == 9
    )
    assert all(
        torch.equal(u, v) for u, v in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert not any(torch.equal(u, v) for u,v in zip(whole.parameters(), make().parameters()))
    return again[-1]


@pytest.mark.parametrize('name', DEFENCES)
def test_trains_and_resumes_bit_by_bit(name, images, tmp_path):
    """Nine updates: the kill comes in the middle of a group of four repetitions of `free`, and so does the checkpoint
    before it."""
    state = resumes(DEFENCES[name], images, tmp_path)
    assert name != 'free' or state['done'] == 1 and unpack(state['sigma'], torch.zeros(1, 1, 28, 28)).shape[1] == 16


@pytest.mark.parametrize('name', DEFENCES)
def test_half_precision_trains(name, images):
    full, half = (
        train(fresh(), images, DEFENCES[name], precision=p, **OPTIONS | dict(epochs=1))['log'][0]['loss']
        for p in ('float32', 'bfloat16')
    )
    assert full != half and half == pytest.approx(full, rel=.1)


def test_est_resumes_with_its_statistics(images, tmp_path):
    def normed():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)
            )
    resumes(DEFENCES['est'], images, tmp_path, normed)


@pytest.mark.parametrize(
    'make, base, wrong, words',
    [
        (est, INNER, dict(eps=8), 'eps must lie in .* 8/255'), (est, INNER, dict(miner='best'), 'miner must be one of'),
        (ses, INNER, dict(steps=1.5), 'steps must be a whole number'),
        (ses, INNER, dict(weight=-1.0), 'weight must lie in'),
        (minmax, INNER, dict(step_size=0), 'step_size must be positive'),
        (minmax, INNER, dict(margin=-1), 'margin must lie in'),
        (free, FREE, dict(repeats=0), 'repeats must be a whole number >= 1, found 0'),
        (free, FREE, dict(repeats=2.5), 'repeats must be'), (free, FREE, dict(eps=2.0), 'eps'),
        (free, FREE, dict(miner='x'), 'miner must be one of'),
        (multi_similarity, BALL, dict(moved='anchor'), "moved must be one of 'all', 'first', found 'anchor'"),
        (multi_similarity, BALL, dict(clean_weight=-0.1), 'clean_weight must lie in'),
        (multi_similarity, BALL, dict(alpha=0.0), 'alpha and beta must be positive'),
        (multi_similarity, BALL, dict(eps=8), '8/255'),
        (topweighted, dict(INNER, top=0.5), dict(top=-0.1), 'top must lie in'),
        (topweighted, dict(INNER, top=0.5), dict(moved='query'), 'moved must be one of')
    ],
)
def test_wrong_options_are_refused_when_the_defence_is_made(make, base, wrong, words):
    with pytest.raises(ValueError, match=words) as caught: make(**base | wrong)
    assert '\n' not in str(caught.value)
