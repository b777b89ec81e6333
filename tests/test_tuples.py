"Robust optimisation of tuples against naive loops in float64, against a library, and trained, killed and resumed."
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_dml.data import sets
from robust_dml.attacks.suite import Gallery, Queries, members
from robust_dml.metrics.clustering import ATTACKS
from robust_dml.core import DEFENSES, generator
from robust_dml.data.sets import ImageSet
from robust_dml.defenses.base import Clock, Defense, clean_embedding, make_defense as make
from robust_dml.triplets.distances import paired_distance
from robust_dml.study.cost import noise_set
from robust_dml.triplets.mining import Triplets
from robust_dml.models.networks import build, embed, embed_all
from robust_dml.runs.store import Run, to_json
from robust_dml.defenses.train import train
from robust_dml.defenses.tuples import GRANULARITIES, LOSSES, ROLES, craft, find, fold_increase, mean_cosine, mine
from robust_dml.defenses.tuples import on_batch, per_image, per_tuple, retrieved, surrogate, tuple_loss, tuple_terms
from robust_dml.defenses.tuples import tuples, under_attack

BALL = dict(eps=.1, step_size=.04, steps=5)
INNER = dict(BALL, margin=.2)
TERMS = dict(margin=.2, apart=1.)


def network(seed=0, batchnorm=True):
    "A small net in float64, deterministic in `seed`."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), *[nn.BatchNorm2d(4)] * batchnorm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)
        ).double()
        if batchnorm: net[1].running_mean.copy_(torch.rand(4)), net[1].running_var.copy_(1 + torch.rand(4))
        return net


def batch(seed=0, classes=6, each=2):
    label = torch.arange(classes).repeat_interleave(each)
    pattern = torch.rand(classes, 1, 6, 6, generator=generator(0, 'patterns'), dtype=torch.float64)[label]
    return (pattern + 0.1 * torch.randn(pattern.shape, generator=generator(seed, 'noise'), dtype=torch.float64)).clamp(
        0, 1
    ), label


def run(defence, net, x, label, seed=0):
    return defence.step(net, x, label, state={}, clock=Clock(0, 1), gen=generator(seed, 'mine'))


def dist(u, v): return (u - v + 1e-6).square().sum().sqrt()


def naive_loss(emb, trip, loss, margin=.2, apart=1.):
    "One tuple after the other; each kind of term averaged over those that are not zero."
    def mean(values): return sum(values)/max(1, sum(v.item() > 0 for v in values))
    pairs = [(dist(emb[a], emb[p]), dist(emb[a], emb[n])) for a,p,n in zip(*(t.tolist() for t in trip))]
    if loss == 'triplet': return mean([(ap - an + margin).clamp(min=0) for ap,an in pairs])
    return mean([ap for ap,_ in pairs]) + mean([(apart - an).clamp(min=0) for _,an in pairs])


def naive_aim(emb, clean, trip, role):
    "What one tuple's adversary maximises, by the table of the notebook."
    a,p,n = (t.item() for t in trip)
    return {'pos': dist(emb, clean[a]), 'neg': -dist(emb, clean[a]), 'anc': dist(emb, clean[p]) - dist(emb, clean[n])}[
        role
    ]


def parts(seed=0):
    net,(x,label) = network().eval(),batch(seed)
    emb = clean_embedding(net, x)
    return net,x,label,emb,mine(emb, label, gen=generator(seed, 'mine'))


# ---- mining

def naive_weights(emb, label, i, cutoff, far):
    "Probability of each row to be the negative of row i."
    found,dim = [],emb.shape[1]
    for j in range(len(emb)):
        d = float((emb[i] - emb[j]).norm())
        e = max(d, cutoff)
        found.append(0. if label[j] == label[i] or d >= far else e**(2 - dim)*(1 - e*e/4)**(-(dim - 3)/2))
    return torch.tensor(found)/max(sum(found), 1e-30)


@pytest.mark.parametrize('cutoff, far', [(.5, 1.4), (.9, 1.1)])
def test_negatives_follow_the_density(cutoff, far):
    emb, label = F.normalize(0.7 + torch.randn(8, 4, generator=generator(1, 'emb'), dtype=torch.float64)), torch.tensor(
        [0, 0, 0, 1, 1, 2, 2, 2]
    )
    count = torch.zeros(8, 8)
    for i in range(1500):
        a,p,n = mine(emb, label, gen=generator(i, 'draw'), cutoff=cutoff, far=far)
        assert (label[p] == label[a]).all() and (p != a).all()
        count[a,n] += 1
    # three standard deviations
    for i in range(8):
        torch.testing.assert_close(count[i]/1500, naive_weights(emb, label, i, cutoff, far), atol=.04, rtol=0)


def test_positives_are_uniform_and_never_the_anchor():
    emb,label = F.normalize(torch.randn(6, 3, generator=generator(1, 'emb'))),torch.tensor([0, 0, 0, 0, 1, 1])
    drawn = torch.stack([mine(emb, label, gen=generator(i, 'draw'), far=2.).p[0] for i in range(900)])
    assert drawn.unique().tolist() == [1, 2, 3] and all(abs((drawn == k).float().mean() - 1/3) < .05 for k in (1, 2, 3))


def test_an_anchor_without_a_near_negative_has_no_tuple():
    emb = F.normalize(torch.tensor([[1., 0, 0], [1., .1, 0], [-1., 0, 0], [-1., .2, 0], [1., .1, .1], [1., 0, .1]]))
    assert mine(emb, torch.tensor([0, 0, 1, 1, 2, 2]), gen=generator(0)).a.tolist() == [0, 1, 4, 5]


def test_mining_refuses_batches_without_tuples():
    emb = F.normalize(torch.randn(4, 3, generator=generator(0)))
    with pytest.warns(UserWarning, match='at least 2 classes in a batch, found 1 in one of 4 images'):
        assert len(mine(emb, torch.zeros(4).long(), gen=generator(0)).a) == 0
    with pytest.raises(
        ValueError, match='found 1 of class 9: it has no positive; draw batches with data.sets.pair_batches'
    ):
        mine(emb, torch.tensor([3, 3, 3, 9]), gen=generator(0))


@pytest.mark.parametrize(
    'options',
    [
        dict(attack_rate=0.0), dict(loss='contrastive', attack_rate=0.0), {}, dict(loss='contrastive'),
        dict(granularity='image'), dict(granularity='batch')
    ],
    ids=str,
)
def test_a_last_batch_of_one_class_does_not_end_the_training(options):
    "Seventeen images in batches of 16 pairs: the rest is one pair, which teaches nothing."
    images = noise_set(17, 4, (1, 28, 28))
    net, defence = build('small', dim=8, size=28, channels=1, seed=0), tuples(
        eps=0.1, step_size=0.05, steps=1, margin=0.2, **options
    )
    with pytest.warns(UserWarning, match='it has no negative, so no tuple'):
        train(net, images, defence, epochs=1, pairs=16, lr=1e-3, weight_decay=0., seed=0, allow_self=False, show=False)
    assert all(p.isfinite().all() for p in net.parameters())


# ---- losses

@pytest.mark.parametrize('loss', LOSSES)
def test_loss_is_the_loop_and_the_library(loss):
    _,_,label,emb,trip = parts()
    emb = emb.clone().requires_grad_()
    value = tuple_loss(tuple_terms(F.normalize(emb), trip, loss=loss, **TERMS))           # the library normalises, too
    torch.testing.assert_close(value, naive_loss(emb, trip, loss), atol=1e-12, rtol=0)
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    theirs = (losses.TripletMarginLoss(margin=0.2) if loss == 'triplet' else losses.ContrastiveLoss())(
        emb, label, tuple(trip)
    )
    # our distances have an offset of 1e-6
    torch.testing.assert_close(value, theirs, atol=1e-5, rtol=0)
    for ours,other in zip(torch.autograd.grad(value, emb), torch.autograd.grad(theirs, emb)):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('loss', LOSSES)
def test_loss_of_a_collapsed_batch_has_a_finite_gradient(loss):
    emb = torch.ones(6, 4, dtype=torch.float64).requires_grad_()
    trip = Triplets(*torch.tensor([[0, 1], [2, 3], [4, 5]]))
    value = tuple_loss(tuple_terms(F.normalize(emb), trip, loss=loss, **TERMS))
    assert value.item() == pytest.approx(.2 if loss == 'triplet' else 1., abs=1e-5)
    assert torch.autograd.grad(value, emb)[0].isfinite().all()


# ---- what is perturbed

@pytest.mark.parametrize('role', ROLES)
def test_one_row_per_attacked_tuple(role):
    emb, trip = torch.randn(9, 3, generator=generator(0)), Triplets(
        *torch.tensor([[0, 1, 2, 0], [3, 3, 3, 4], [5, 6, 5, 5]])
    )
    chosen = torch.tensor([True, False, True, True])
    aim = per_tuple(emb, trip, chosen, role=role)
    assert aim.rows.tolist() == trip[ROLES[role]][chosen].tolist()
    for k,name in enumerate(('anc', 'pos', 'neg')):
        expected = trip[k].clone()
        if name == role: expected[chosen] = torch.tensor([9, 10, 11])
        assert aim.tuples[k].tolist() == expected.tolist()


def test_whole_images_are_redirected_in_every_role():
    emb,trip = torch.randn(6, 3, generator=generator(0)),Triplets(*torch.tensor([[0, 1], [1, 0], [3, 4]]))
    chosen = torch.tensor([True, False, False, True, False, False])
    for aim in (per_image(emb, trip, chosen), on_batch(emb, trip, chosen, terms=None)):
        assert aim.rows.tolist() == [0, 3] and [t.tolist() for t in aim.tuples] == [[6, 1], [1, 6], [7, 4]]


@pytest.mark.parametrize('role', ROLES)
def test_role_objective_is_the_table(role):
    _,_,_,emb,trip = parts()
    moved = F.normalize(torch.randn(len(trip.a), 8, generator=generator(3), dtype=torch.float64))
    naive = torch.stack([naive_aim(moved[i], emb, [t[i] for t in trip], role) for i in range(len(trip.a))])
    torch.testing.assert_close(
        per_tuple(emb, trip, torch.ones(len(trip.a)).bool(), role=role).objective(moved), naive, atol=1e-12, rtol=0
    )


def test_image_objective_is_the_sum_over_its_tuples():
    _,_,_,emb,trip = parts()
    chosen = torch.arange(12) % 3 != 0
    moved = F.normalize(torch.randn(int(chosen.sum()), 8, generator=generator(3), dtype=torch.float64))
    naive = []
    for place,i in enumerate(chosen.nonzero()[:,0].tolist()):
        naive.append(
            sum(
                (
                    naive_aim(moved[place], emb, [t[k] for t in trip], role)
                    for role, r in ROLES.items()
                    for k in range(len(trip.a))
                    if trip[r][k] == i
                ),
                torch.zeros(()).double(),
            )
        )
    torch.testing.assert_close(per_image(emb, trip, chosen).objective(moved), torch.stack(naive), atol=1e-12, rtol=0)


@pytest.mark.parametrize('loss', LOSSES)
def test_batch_objective_is_the_loss_with_the_chosen_images_moved(loss):
    _,_,_,emb,trip = parts()
    chosen = torch.arange(12) % 3 != 0
    moved = F.normalize(torch.randn(int(chosen.sum()), 8, generator=generator(3), dtype=torch.float64))
    whole = emb.clone()
    whole[chosen] = moved
    found = on_batch(emb, trip, chosen, terms=lambda e, t: tuple_terms(e, t, loss=loss, **TERMS)).objective(moved)
    torch.testing.assert_close(found, naive_loss(whole, trip, loss), atol=1e-12, rtol=0)


@pytest.mark.parametrize('role', ROLES)
def test_crafting_is_pgd_from_a_random_start(role):
    "Tuple by tuple, with the loop written out."
    net,x,_,emb,trip = parts()
    aim = per_tuple(emb, trip, torch.ones(len(trip.a)).bool(), role=role)
    found = craft(net, x, aim, gen=generator(5, 'start'), **BALL)
    x0 = x[aim.rows]
    start = (x0 + .1*(2*torch.rand(x0.shape, generator=generator(5, 'start'), dtype=torch.float64) - 1)).clamp(0, 1)
    for i in range(len(x0)):
        z = start[i:i+1]
        for _ in range(5):
            z = z.detach().requires_grad_()
            grad, = torch.autograd.grad(naive_aim(F.normalize(net(z))[0], emb, [t[i] for t in trip], role), z)
            z = torch.min(torch.max(z + .04*grad.sign(), x0[i] - .1), x0[i] + .1).clamp(0, 1)
        torch.testing.assert_close(found[i:i+1], z.detach(), atol=1e-9, rtol=0)
    before, after = (
        surrogate(e, tuple(emb[t] for t in trip), role) for e in (emb[aim.rows], embed(net, found).detach())
    )
    assert after.mean() > before.mean() + .02


@pytest.mark.parametrize('how', GRANULARITIES)
def test_rows_are_coupled_only_by_the_joint_attack(how):
    "Another image in row 0 of what is perturbed changes no other row, unless the batch is attacked as a whole."
    net,x,_,emb,trip = parts()
    def terms(e, t): return tuple_terms(e, t, loss='triplet', margin=2., apart=1.)
    aim = GRANULARITIES[how](emb, trip, torch.ones(12).bool(), role='pos', terms=terms)
    other = x.clone()
    other[aim.rows[0]] = x.flip(0)[aim.rows[0]]
    mine_,theirs = (craft(net, images, aim, gen=generator(5, 'start'), **BALL) for images in (x, other))
    same = aim.rows != aim.rows[0]
    assert torch.equal(mine_[same], theirs[same]) == (how != 'batch') and not torch.equal(mine_[~same], theirs[~same])


# ---- the step

def watched(net):
    "Rows of every forward of `net` and of its copies, with the mode it ran in."
    seen,forward = [],type(net).forward
    class Watched(type(net)):
        def forward(self, x):
            seen.append((len(x), self.training, torch.is_grad_enabled()))
            return forward(self, x)
    net.__class__ = Watched
    return seen


@pytest.mark.parametrize('how', GRANULARITIES)
def test_one_forward_for_the_loss(how):
    net,(x,label) = network(),batch()
    seen = watched(net)
    run(tuples(**INNER, granularity=how), net, x, label)
    # 12 images and 12 adversarial ones, together
    assert [n for n,training,_ in seen if training] == [24]
    assert [n for n,training,_ in seen if not training] == [12]*6                         # mining and five steps
    seen.clear()
    run(tuples(**INNER, attack_rate=0.), net, x, label)
    assert seen == [(12, True, True)]


@pytest.mark.parametrize('how', GRANULARITIES)
@pytest.mark.parametrize('loss', LOSSES)
def test_without_a_radius_it_is_the_natural_loss(how, loss):
    net,(x,label) = network(),batch()
    natural = run(tuples(**INNER, loss=loss, attack_rate=0.), net, x, label)
    still = run(tuples(**INNER | dict(eps=0.), loss=loss, granularity=how), net, x, label)
    torch.testing.assert_close(still.loss, natural.loss, atol=1e-6, rtol=0)
    for g,h in zip(*(torch.autograd.grad(out.loss, net.parameters()) for out in (still, natural))):
        torch.testing.assert_close(g, h, atol=1e-6, rtol=0)
    assert run(tuples(**INNER, loss=loss, granularity=how), net, x, label).loss > natural.loss + .01


@pytest.mark.parametrize('loss', LOSSES)
def test_rate_zero_is_natural_training_bit_for_bit(loss):
    "Six updates against a loop that knows nothing of attacks, with one generator for all."
    def steps(step):
        net,gen = network(),generator(0, 'mine')
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for u in range(6):
            value = step(net, *batch(u), gen)
            optimiser.zero_grad(); value.backward(); optimiser.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    def natural(net, x, label, gen):
        net.train(); net[1].eval()
        emb = embed(net, x)
        a,p,n = (emb[rows] for rows in mine(emb, label, gen=gen))
        ap,an = paired_distance(a, p, offset=1e-6),paired_distance(a, n, offset=1e-6)
        terms = [(ap - an + .2).relu()] if loss == 'triplet' else [ap, (1 - an).relu()]
        return sum(t.sum()/(t > 0).sum().clamp(min=1) for t in terms)
    ours = steps(
        lambda net, x, label, gen: tuples(**INNER, loss=loss, attack_rate=0.0)
        .step(net, x, label, state={}, clock=Clock(0, 1), gen=gen)
        .loss
    )
    assert torch.equal(ours, steps(natural))
    assert not torch.equal(
        ours,
        steps(
            lambda net, x, label, gen: tuples(**INNER, loss=loss, attack_rate=0.5)
            .step(net, x, label, state={}, clock=Clock(0, 1), gen=gen)
            .loss
        ),
    )


@pytest.mark.parametrize('how', GRANULARITIES)
def test_attack_rate_is_the_share_that_is_attacked(how):
    net,(x,label) = network(),batch()
    counts = [
        run(tuples(**INNER, granularity=how, attack_rate=0.25), net, x, label, seed=s).log['image_steps'] / 5
        for s in range(60)
    ]
    # three standard deviations: .048
    assert abs(sum(counts)/60/12 - .25) < .05 and len(set(counts)) > 2


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('role', ROLES)
def test_gradients_flow_through_all_members(loss, role):
    "The update is that of the naive loss on clean and adversarial images, nothing detached."
    net,(x,label) = network(),batch()
    out = run(tuples(**INNER, loss=loss, role=role), net, x, label)
    emb,gen = clean_embedding(net, x),generator(0, 'mine')
    trip = mine(emb, label, gen=gen)
    aim = per_tuple(emb, trip, torch.ones(12).bool(), role=role)
    net.eval()
    adv = craft(net, x, aim, gen=gen, **BALL)
    naive = naive_loss(F.normalize(net(torch.cat([x, adv]))), aim.tuples, loss)
    torch.testing.assert_close(out.loss, naive, atol=1e-9, rtol=0)
    for g,h in zip(torch.autograd.grad(out.loss, net.parameters()), torch.autograd.grad(naive, net.parameters())):
        torch.testing.assert_close(g, h, atol=1e-8, rtol=1e-6)


def test_a_step_leaves_weights_statistics_and_inputs_alone():
    net,(x,label) = network(),batch()
    before,images = {k: v.clone() for k,v in net.state_dict().items()},x.clone()
    run(tuples(**INNER), net, x, label)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items()) and torch.equal(x, images)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_log():
    net,(x,label) = network(),batch()
    natural,robust = (run(tuples(**INNER, attack_rate=rate), net, x, label).log for rate in (0., 1.))
    assert set(natural) == set(robust) >= {'hardness', 'dist_ap', 'shift', 'image_steps', 'cosine', 'nonzero'}
    assert (
        math.isnan(natural['shift'])
        and natural['image_steps'] == 0
        and robust['image_steps'] == 60
        and 0 < robust['shift'] < 2
    )
    emb = clean_embedding(net, x)
    pairs = [float(emb[i]@emb[j]) for i in range(12) for j in range(12) if i != j]
    assert robust['cosine'] == pytest.approx(sum(pairs)/len(pairs), abs=1e-9) == mean_cosine(emb).item()
    terms, = tuple_terms(emb, mine(emb, label, gen=generator(0, 'mine')), loss='triplet', **TERMS)
    assert natural['nonzero'] == pytest.approx((terms > 0).double().mean().item())


def test_a_batch_with_nothing_to_do():
    "Negatives all beyond the cut-off: a loss of 0 with a gradient of 0, and gaps in the log, with and without attack."
    net,(x,label) = network(),batch()
    for rate in (0., 1.):
        out = run(tuples(**INNER, attack_rate=rate, cutoff=1e-6, far=1e-6), net, x, label)
        assert out.loss.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(out.loss, net.parameters()))
        assert (
            all(math.isnan(out.log[key]) for key in ('hardness', 'collapseness', 'shift', 'nonzero'))
            and out.log['image_steps'] == 0
        )


def few(): return sets.glyphs(train_classes=6, test_classes=3, per_class=6)


@pytest.mark.parametrize(
    'options', [{}, dict(loss='contrastive', attack_rate=0.5), dict(granularity='batch')],
    ids=('tuple', 'rate', 'batch')
)
def test_a_killed_training_ends_in_the_same_weights(options, tmp_path):
    "Cut off in the third epoch, then resumed from the store."
    robust,asked = tuples(**INNER | dict(steps=2), **options),dict(epochs=3, pairs=12, lr=1e-3, seed=0, show=False)
    def fresh(): return build('small', dim=8, size=28, channels=1, seed=0)
    def dying(model, x, label, *, clock, **kw):
        if clock.update == 7: raise KeyboardInterrupt
        return robust.step(model, x, label, clock=clock, **kw)
    whole,net = fresh(),fresh()
    log = train(whole, few().train, robust, **asked)['log']
    with pytest.raises(KeyboardInterrupt):
        train(net, few().train, Defense(robust.name, robust.options, robust.init, dying), run=Run(tmp_path), **asked)
    again = fresh()
    assert (
        to_json(train(again, few().train, robust, run=Run(tmp_path), **asked)['log']) == to_json(log) and len(log) == 3
    )
    assert all(torch.equal(a, b) for a,b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_options():
    d = make('tuples', **INNER, role='anc', attack_rate=.5)
    assert (
        d.name == 'tuples'
        and make(d.name, **json.loads(json.dumps(d.options))).options == d.options
        and set(d.options) == set(DEFENSES['tuples'].options)
    )
    for wrong, said in (
        (dict(role='a'), "role must be one of 'anc', 'pos', 'neg'"),
        (dict(loss='pairs'), "loss must be one of 'triplet', 'contrastive'"),
        (dict(granularity='all'), 'granularity must be'), (dict(attack_rate=-0.1), r'attack_rate must lie in \[0, 1\]'),
        (dict(attack_rate=float('nan')), 'attack_rate'), (dict(apart=3.0), 'apart'), (dict(cutoff=0.6, far=0.5), 'far'),
        (dict(eps=8.0), 'eps')
    ):
        with pytest.raises(ValueError, match=said): tuples(**INNER | wrong)
    with pytest.raises(TypeError, match='tuples has no option gamma; it has eps'): make('tuples', **INNER, gamma=1)


# ---- attacks and scores

def scene(seed=0, each=4):
    "A small net, a test set of noisy patterns as stored images, and the two sides of retrieval."
    net,(x,label) = network(seed),batch(9, each=each)
    tests = ImageSet((x*255).round().byte(), label, tuple('abcdef'))
    shelf = Gallery(embed_all(net.eval(), tests, batch_size=50), label)
    return net,tests,shelf,members(shelf, torch.arange(len(label)))


def naive_value(name, z, i, emb, label):
    "The objective of one query, item by item."
    mates = [j for j in range(len(emb)) if j != i and label[j] == label[i]]
    near = min(mates, key=lambda j: float((emb[j] - emb[i]).norm()))
    def square(v): return (z - v).square().sum()
    if name == 'selfshift': return dist(z, emb[i])
    if name == 'nnpos': return dist(z, emb[near])
    if name == 'gap': return square(emb[near]) - min(square(emb[j]) for j in range(len(emb)) if label[j] != label[i])
    centres = {k: F.normalize(emb[label == k].mean(0), dim=0) for k in label.unique().tolist()}
    return square(centres[label[i].item()]) - min(square(c) for k,c in centres.items() if k != label[i])


@pytest.mark.parametrize('name', ATTACKS)
def test_objectives_are_the_table(name):
    net,_,shelf,asked = scene()
    z = F.normalize(torch.randn(shelf.emb.shape, generator=generator(4), dtype=torch.float64)).requires_grad_()
    attack = ATTACKS[name]
    value = attack.objective(z, asked, attack.targets(asked, shelf, 0), shelf)
    naive = torch.stack([naive_value(name, z[i], i, shelf.emb, shelf.label) for i in range(len(z))])
    torch.testing.assert_close(value, naive, atol=1e-5, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z)[0] for v in (value, naive)), atol=1e-5, rtol=1e-4)


def attacked(net, tests, asked, shelf, name='gap', **kw):
    return under_attack(
        net, tests, ATTACKS[name], asked, shelf, **dict(dict(method='pgd', eps=0.1, steps=4, seed=0), **kw)
    )


@pytest.mark.parametrize('name', ATTACKS)
@pytest.mark.parametrize('scope', ['query', 'all'])
def test_gated_attack_never_helps(name, scope):
    net,tests,shelf,asked = scene()
    clean = retrieved(asked.emb, asked, shelf)
    for method in ('fgsm', 'pgd'):
        found = attacked(net, tests, asked, shelf, name, method=method, scope=scope)
        assert found['R@1'] <= clean['R@1'] and found['R@1'] == pytest.approx(100*found['hits']/found['queries'])
    assert attacked(net, tests, asked, shelf, 'gap', eps=.3)['hits'] < clean['hits']


def naive_hits(emb, items, label, rows):
    "Whether the nearest item, without the query's own row, is of its class."
    return [
        label[min((j for j in range(len(items)) if j != i), key=lambda j: float((z - items[j]).norm()))] == label[i]
        for z, i in zip(emb, rows)
    ]


@pytest.mark.parametrize('scope', ['query', 'all'])
def test_scores_are_the_loop(scope):
    _,_,shelf,asked = scene(each=3)
    adv = F.normalize(shelf.emb + .05*torch.randn(shelf.emb.shape, generator=generator(4), dtype=torch.float64))
    rows = range(len(adv))
    now = naive_hits(adv, shelf.emb if scope == 'query' else adv, shelf.label, rows)
    before = naive_hits(shelf.emb, shelf.emb, shelf.label, rows)
    assert retrieved(adv, asked, shelf, scope=scope, gate='off')['hits'] == sum(map(int, now))
    gated = retrieved(adv, asked, shelf, scope=scope)['hits']
    assert gated == sum(int(a and b) for a,b in zip(now, before)) < sum(map(int, now))    # some are right by accident
    order = torch.tensor([3, 0, 2, 1, *range(4, len(adv))])
    turned = Queries(asked.emb[order], asked.label[order], asked.row[order], asked.id[order])
    assert retrieved(adv[order], turned, shelf, scope=scope) == retrieved(adv, asked, shelf, scope=scope)


def test_map_at_r_is_not_gated():
    _,_,shelf,asked = scene(each=3)
    adv = F.normalize(shelf.emb + .05*torch.randn(shelf.emb.shape, generator=generator(4), dtype=torch.float64))
    assert retrieved(adv, asked, shelf)['mAP@R'] == retrieved(adv, asked, shelf, gate='off')['mAP@R']


@pytest.mark.parametrize('method', ['fgsm', 'pgd'])
def test_batch_size_changes_nothing(method):
    net,tests,shelf,asked = scene()
    images = tests.batch(asked.id, device='cpu', dtype=torch.float64)
    whole = find(net, ATTACKS['gap'], images, asked, shelf, method=method, eps=.1, steps=4, seed=0, restarts=2)
    def some(i): return Queries(asked.emb[i], asked.label[i], asked.row[i], asked.id[i])
    split = [
        find(net, ATTACKS['gap'], images[i], some(i), shelf, method=method, eps=0.1, steps=4, seed=0, restarts=2)
        for i in torch.arange(24).split(5)
    ]
    torch.testing.assert_close(torch.cat(split), whole, atol=1e-9, rtol=0)
    assert (whole - images).abs().max() <= .1 + 1e-9 and 0 <= whole.min() and whole.max() <= 1
    assert attacked(net, tests, asked, shelf, method=method, batch_size=5) == attacked(
        net, tests, asked, shelf, method=method, batch_size=24
    )


def test_more_restarts_and_steps_never_lower_an_objective():
    net,tests,shelf,asked = scene()
    images = tests.batch(asked.id, device='cpu', dtype=torch.float64)
    def value(**kw):
        found = find(
            net, ATTACKS['gap'], images, asked, shelf, **dict(dict(method='pgd', eps=0.1, steps=4, seed=0), **kw)
        )
        return (
            ATTACKS['gap'].objective(embed(net, found), asked, ATTACKS['gap'].targets(asked, shelf, 0), shelf).detach()
        )
    one,three,fgsm = value(),value(restarts=3),value(method='fgsm')
    assert (three >= one - 1e-12).all() and three.mean() > one.mean() and one.mean() > fgsm.mean()
    assert not torch.equal(value(seed=1), one)


def test_no_radius_no_attack():
    net,tests,shelf,asked = scene()
    for method in ('fgsm', 'pgd'):
        assert attacked(net, tests, asked, shelf, eps=0., method=method) == retrieved(shelf.emb, asked, shelf)


def test_what_cannot_be_measured():
    net,tests,shelf,asked = scene()
    part = Queries(asked.emb[:5], asked.label[:5], asked.row[:5], asked.id[:5])
    with pytest.raises(
        ValueError, match="scope='all' needs every item of the gallery among the queries, found 5 queries and 24 items"
    ):
        attacked(net, tests, part, shelf, scope='all')
    lonely = Gallery(shelf.emb, torch.arange(24))
    with pytest.raises(ValueError, match='another image of its class in the gallery, found none of 24'):
        retrieved(shelf.emb, members(lonely, torch.arange(24)), lonely)
    with pytest.raises(ValueError, match="'fgsm', 'pgd'"): attacked(net, tests, asked, shelf, method='cw')
    with pytest.raises(ValueError, match='gate'): attacked(net, tests, asked, shelf, gate='on')
    with pytest.raises(ValueError, match='restarts'): attacked(net, tests, asked, shelf, restarts=0)


def test_fold_increase():
    def of(hits, queries=400): return {'R@1': 100*hits/queries, 'hits': hits, 'queries': queries}
    assert (
        fold_increase(of(300), of(40))[:2] == (7.5, False) and fold_increase(of(300), of(40)).text == '7.5 (75.0/10.0)'
    )
    floor = fold_increase(of(300), of(0))
    assert (
        floor[:2] == (300.0, True)
        and floor.value == pytest.approx(0.75 / (1 / 400))
        and floor.text == '≥ 300.0 (75.0/0.0)'
    )
    assert math.isnan(fold_increase(of(0), of(0)).value)
    with pytest.raises(ValueError, match='same queries'): fold_increase(of(1), of(1, 300))


def test_robust_training_resists():
    """On patterns with noise the robust model keeps several times more of its answers than the natural one, and the
    joint attack collapses."""
    x,label = batch(9, each=4)
    def trained(**options):
        net,gen = network(batchnorm=False),generator(0, 'mine')
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for u in range(120):
            out = tuples(eps=0.12, step_size=0.06, steps=4, margin=0.2, **options).step(
                net, *batch(100 + u), state={}, clock=Clock(0, 1), gen=gen
            )
            optimiser.zero_grad(); out.loss.backward(); optimiser.step()
        tests = ImageSet((x*255).round().byte(), label, tuple('abcdef'))
        shelf = Gallery(embed_all(net, tests, batch_size=50), label)
        return attacked(net, tests, members(shelf, torch.arange(24)), shelf, eps=.12, steps=10),out.log['cosine']
    (natural,_),(robust,spread),(_,joint) = trained(attack_rate=0.),trained(),trained(granularity='batch')
    assert fold_increase(robust, natural).value > 1.3 and joint > .8 > .6 > spread


def test_an_identical_pair_does_not_dilute_the_mean():
    "Its distance is nothing but the offset of 1e-6 a coordinate, and the term of the contrastive loss is zero."
    emb = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    emb[1] = emb[0]
    def near(rows):
        pair = Triplets(*torch.tensor([(0, 1, 4), (2, 3, 5)])[rows].T)
        return tuple_terms(emb, pair, loss='contrastive', margin=.2, apart=0.)
    terms = near([0, 1])
    assert terms[0][0] == 0 and tuple_loss(terms) == tuple_loss(near([1])) > .1
