"""Proxies and ensembles against naive loops in float64, splits, the memory of one member, and every defence killed and
resumed."""
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import nn
from torch.nn import functional as F

from robust_dml.data import sets
from robust_dml.defenses import eat as module
from robust_dml.attacks.suite import SUITE
from robust_dml.core import DEFENSES, generator
from robust_dml.defenses.base import Clock, make_defense as make
from robust_dml.defenses.eat import Batch, Ensemble, Parts, Shared, adp_term, ensemble, everything, gal_term
from robust_dml.defenses.eat import joined, network, pal, pal_sample, peers, sequential_gradient, split
from robust_dml.defenses.eat import strength, transfer_matrix
from robust_dml.metrics.evaluate import Protocol, attack_batches, evaluate, mean_outcomes, queries_and_gallery
from robust_dml.models.networks import checksum, embed, embed_all, frozen
from robust_dml.attacks.loop import autograd_gradient, pgd
from robust_dml.metrics.scores import HEADINGS
from robust_dml.runs.store import Run, to_json
from robust_dml.defenses.train import train

PROXY = tuple(name for name in DEFENSES.names('defenses.eat') if not DEFENSES[name].fixed)

BALL = dict(eps=.1, step_size=.03, steps=4)
AT_ONCE = dict(BALL, warm_epochs=0, clean_epochs=0, ramp_epochs=0, clip=1e9)
# 36 images: three batches in an epoch
OPTIONS = dict(epochs=3, pairs=12, lr=1e-3, weight_decay=1e-2, seed=0, show=False)


@pytest.fixture(scope='module')
def images(): return sets.glyphs(train_classes=6, test_classes=4, per_class=6)


def fresh(defence, classes=6): return network(defence, 'small', classes=classes, dim=8, size=28, channels=1, seed=0)
def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def failing(defence, at, error=KeyboardInterrupt):
    "The same defence, failing at update `at`."
    def step(*args, clock, **kw):
        if clock.update == at: raise error
        return defence.step(*args, clock=clock, **kw)
    return replace(defence, step=step)


class Net(nn.Module):
    "A convolution and a head, in float64."
    def __init__(self, seed, norm=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()
            )
            self.head = nn.Linear(64, 5)
        self.double()

    def forward(self, x): return self.head(self.backbone(x))


def toy(members, classes=6, norm=False):
    return Ensemble(
        [Net(m, norm) for m in range(members)],
        [
            nn.Parameter(torch.randn(classes, 5, generator=generator(m, 'p'), dtype=torch.float64))
            for m in range(members)
        ],
    )


LABEL = torch.arange(6).repeat_interleave(2)
X = torch.rand(12, 1, 6, 6, generator=generator(0, 'x'), dtype=torch.float64)


def one(defence, net, *, update=0, parts=None, x=X, seed=0):
    return defence.step(
        net, x, LABEL, state=defence.init(), clock=Clock(0, 9, update), gen=generator(seed, 'step'), parts=parts
    )


def naive_pal(emb, label, proxies, a=32., m=.1):
    "The formula, proxy by proxy."
    s, near, far = F.normalize(emb)@F.normalize(proxies).T, [], []
    for k in range(len(proxies)):
        positive, negative = [s[i, k] for i in range(len(label)) if label[i] == k], [
            s[i, k] for i in range(len(label)) if label[i] != k
        ]
        if positive: near.append(torch.log(1 + sum(torch.exp(-a*(v - m)) for v in positive)))
        far.append(torch.log(1 + sum(torch.exp(a*(v + m)) for v in negative)) if negative else s.new_zeros(()))
    return torch.stack(near).mean() + torch.stack(far).mean()


def naive_search(net, x, proxies, start, steps=4, eps=.1, alpha=.03, label=None):
    "PGD on the loss of each image, from `start`."
    label = LABEL if label is None else label
    x_adv, found = start, F.normalize(proxies.detach())
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        s = F.normalize(net(x_adv))@found.T
        own = F.one_hot(label, len(found)).bool()
        value = torch.log(1 + torch.exp(-32 * (s[own] - 0.1))) + torch.log(1 + torch.exp(32 * (s + 0.1))).masked_fill(
            own, 0
        ).sum(1) / len(found)
        grad, = torch.autograd.grad(value.sum(), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + alpha*grad.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def starts(count, gen, x=X, eps=.1):
    "Random starts in the order of the members."
    return [
        torch.min(torch.max(x + eps * (2 * torch.rand(x.shape, generator=gen) - 1).to(x), x - eps), x + eps).clamp(0, 1)
        for _ in range(count)
    ]


def drawn(seed=0): return generator(seed, 'step')  # rules draw before the log does


def test_the_loss_is_the_formula_and_the_librarys():
    emb, proxies = F.normalize(torch.randn(12, 5, generator=generator(0, 'e'), dtype=torch.float64)), torch.randn(
        7, 5, generator=generator(1, 'e'), dtype=torch.float64
    )
    found = pal(emb, LABEL, proxies, scale=32., margin=.1)
    theirs = ProxyAnchorLoss(num_classes=7, embedding_size=5)
    theirs.proxies.data = proxies
    assert found.item() == pytest.approx(naive_pal(emb, LABEL, proxies).item(), abs=1e-10)
    assert found.item() == pytest.approx(theirs(emb, LABEL).item(), abs=1e-12)
    known = torch.tensor([True]*6 + [False])
    assert pal(emb, LABEL, proxies, scale=32.0, margin=0.1, known=known).item() == pytest.approx(
        naive_pal(emb, LABEL, proxies[:6]).item(), abs=1e-10
    )


def test_the_loss_draws_nothing_and_gives_proxies_their_gradient():
    emb, proxies = F.normalize(torch.randn(12, 5, generator=generator(0, 'e'), dtype=torch.float64)), torch.randn(
        6, 5, generator=generator(1, 'e'), dtype=torch.float64, requires_grad=True
    )
    before = torch.get_rng_state()
    assert torch.autograd.gradcheck(lambda p: pal(emb, LABEL, p, scale=4., margin=.1), proxies)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_the_loss_ignores_autocast(half):
    emb, proxies = F.normalize(torch.randn(12, 5, generator=generator(0, 'e'))), torch.randn(
        6, 5, generator=generator(1, 'e')
    )
    plain = pal(emb, LABEL, proxies, scale=32., margin=.1)
    with torch.autocast('cpu', half): assert torch.equal(pal(emb, LABEL, proxies, scale=32., margin=.1), plain)
    assert plain.dtype == torch.float32
    one_by_one = pal_sample(emb, LABEL, proxies, known=torch.ones(6, dtype=torch.bool), scale=32., margin=.1)
    with torch.autocast('cpu', half), frozen(nn.Identity()):
        _, _, seen = autograd_gradient(
            lambda x: x.flatten(1),
            partial(
                pal_sample, label=LABEL, proxies=proxies, known=torch.ones(6, dtype=torch.bool), scale=32.0, margin=0.1
            ),
            emb,
        )
    assert one_by_one.isfinite().all() and torch.equal(seen, emb)


def test_adversarial_training_is_the_naive_loop():
    "Two updates of AT: own PGD, formula and textbook AdamW; 1e-9 is rounding."
    defence, net, slow = make('pal_at', **AT_ONCE), toy(1), toy(1)
    fast = defence.optimizer(net, lr=1e-2, weight_decay=.1)
    plain = torch.optim.AdamW(
        [dict(params=slow.members.parameters()), dict(params=list(slow.proxies), lr=1.0)], lr=1e-2, weight_decay=0.1
    )
    for u in range(2):
        fast.zero_grad(), plain.zero_grad()
        step = one(defence, net, update=u, seed=u)
        step.loss.backward()
        adv = naive_search(slow.members[0], X, slow.proxies[0], starts(1, drawn(u))[0])
        loss = sum(.5*naive_pal(slow.members[0](v), LABEL, slow.proxies[0]) for v in (adv, X))
        loss.backward()
        assert step.loss.item() == pytest.approx(loss.item(), abs=1e-9)
        fast.step(), plain.step()
        for a, b in zip(net.parameters(), slow.parameters()): assert (a - b).abs().max() < 1e-9


def test_one_member_without_split_and_transfer_is_at_bit_for_bit(images):
    options = dict(BALL, warm_epochs=1, clean_epochs=0, ramp_epochs=2)
    a, b = make('eat', **options, members=1, combine='full', self_transfer='none'), make('pal_at', **options)
    nets = [fresh(d) for d in (a, b)]
    logs = [train(net, images.train, d, **OPTIONS)['log'] for net, d in zip(nets, (a, b))]
    assert same(*nets) and logs[0] == logs[1]
    assert logs[0][-1]['image_steps'] > 0 and not same(nets[0], fresh(a))


@pytest.mark.parametrize('rule', ['none', 'rotate', 'all'])
@pytest.mark.parametrize('update', [0, 1])
def test_eat_is_the_naive_algorithm(rule, update):
    "Section by section: parts, own images, other members' images, three weights."
    net, parts = toy(3), split(LABEL.repeat_interleave(1), classes=6, members=3, combine='leave_one_out', seed=3)
    step = one(make('eat', **AT_ONCE, self_transfer=rule), net, update=update, parts=parts)
    gen, adv = drawn(), []
    for m in range(3):
        rows = parts.seen[m] if rule == 'none' else torch.ones(12, dtype=torch.bool)
        found = X.clone()
        found[rows] = naive_search(
            net.members[m], X[rows], net.proxies[m], starts(1, gen, X[rows])[0], label=LABEL[rows]
        )
        adv.append(found)
    losses = []
    for m in range(3):
        others = {'none': [], 'rotate': [(m + 1 + update % 2) % 3], 'all': [k for k in range(3) if k != m]}[rule]
        views = [(.5, X), (.5 if rule == 'none' else .25, adv[m]), *((.25/len(others), adv[k]) for k in others)]
        losses.append(
            sum(w * naive_pal(net.members[m](v[parts.seen[m]]), LABEL[parts.seen[m]], net.proxies[m]) for w, v in views)
        )
    assert step.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)
    found, expected = (torch.autograd.grad(loss, list(net.parameters())) for loss in (step.loss, sum(losses)))
    for a, b in zip(found, expected): assert (a - b).abs().max() < 1e-9
    assert step.log['image_steps'] == 4*(parts.seen.sum() if rule == 'none' else 36)


def test_every_other_member_is_met():
    for count in (2, 3, 5):
        assert sorted(peers('rotate', count, u)[0] for u in range(10, 10 + count - 1)) == list(range(1, count))


def test_the_shared_images_are_made_against_all_members():
    net = toy(2)
    step = one(make('eat', **AT_ONCE, members=2, combine='full', self_transfer='ensemble'), net)
    x_adv, = starts(1, drawn())
    for _ in range(4):
        x_adv = x_adv.detach().requires_grad_()
        value = sum(
            pal_sample(
                F.normalize(m(x_adv)), LABEL, p.detach(), known=torch.ones(6, dtype=torch.bool), scale=32.0, margin=0.1
            ).sum()
            for m, p in zip(net.members, net.proxies)
        )
        grad, = torch.autograd.grad(value, x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + .03*grad.sign(), X - .1), X + .1).clamp(0, 1)
    expected = sum(.5*naive_pal(m(v), LABEL, p) for m, p in zip(net.members, net.proxies) for v in (X, x_adv))/2
    assert step.loss.item() == pytest.approx(expected.item(), abs=1e-9) and step.log['image_steps'] == 2*4*12


def test_distillation_adds_the_difference_of_relations():
    net, (light, heavy) = toy(3), (
        make('eat', **AT_ONCE, combine='full', self_transfer='distil', relation=w) for w in (0.0, 2.0)
    )
    adv = [naive_search(net.members[m], X, net.proxies[m], s) for m, s in enumerate(starts(3, drawn()))]
    off, extra = ~torch.eye(12, dtype=torch.bool), 0.
    for m in range(3):
        embs = [F.normalize(net.members[j](adv[m])) for j in range(3)]
        goal = sum(e@e.T for e in embs).detach()/3
        extra = extra + 2*(embs[m]@embs[m].T - goal)[off].square().mean()
    losses = [one(d, net).loss for d in (light, heavy)]
    assert (losses[1] - losses[0]).item() == pytest.approx(extra.item()/3, abs=1e-10)
    for a, b, c in zip(
        *(torch.autograd.grad(v, list(net.members.parameters())) for v in (*losses, extra)), strict=True
    ):
        assert (b - a - c).abs().max() < 1e-9


def test_mixup_is_the_mixed_loss():
    net, gen = toy(1), drawn()
    lam, order = torch.rand((), generator=gen).item(), torch.randperm(12, generator=gen)
    adv = naive_search(net.members[0], X, net.proxies[0], starts(1, gen)[0])
    def mixed(v):
        emb = net.members[0](lam*v + (1 - lam)*v[order])
        return lam*naive_pal(emb, LABEL, net.proxies[0]) + (1 - lam)*naive_pal(emb, LABEL[order], net.proxies[0])
    assert one(make('pal_mixup', **AT_ONCE), net).loss.item() == pytest.approx(mixed(X).item(), abs=1e-9)
    assert one(make('pal_mixup_at', **AT_ONCE), net).loss.item() == pytest.approx(
        0.5 * (mixed(X) + mixed(adv)).item(), abs=1e-9
    )


@pytest.mark.parametrize('name', ['pal_trades', 'pal_alp'])
def test_pairing_is_the_formula(name):
    net = toy(1)
    f, clean = net.members[0], F.normalize(net.members[0](X)).detach()
    start = starts(1, drawn())[0]
    if name == 'pal_alp': x_adv = naive_search(f, X, net.proxies[0], start)
    else:
        x_adv = start
        for _ in range(4):
            x_adv = x_adv.detach().requires_grad_()
            grad, = torch.autograd.grad((1 - (F.normalize(f(x_adv))*clean).sum(1)).sum(), x_adv)
            x_adv = torch.min(torch.max(x_adv.detach() + .03*grad.sign(), X - .1), X + .1).clamp(0, 1)
    a, b = F.normalize(f(x_adv)), F.normalize(f(X))
    task = [naive_pal(e, LABEL, net.proxies[0]) for e in (a, b)]
    expected = (
        task[1] + 6 * (1 - (a * b).sum(1)).mean()
        if name == 'pal_trades'
        else 0.5 * sum(task) + 0.5 * (a - b).square().sum(1).mean()
    )
    step = one(make(name, **AT_ONCE), net)
    assert step.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for u, v in zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (step.loss, expected))):
        assert (u - v).abs().max() < 1e-9


def test_dverge_teaches_what_the_other_member_mistakes():
    net = toy(2)
    order = torch.randperm(12, generator=drawn())
    x_adv, goal = X, F.normalize(net.members[1](X)).detach()[order]
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        grad, = torch.autograd.grad((F.normalize(net.members[1](x_adv)) - goal).square().sum(), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() - .007*grad.sign(), X - .07), X + .07).clamp(0, 1)
    step = one(make('dverge', **AT_ONCE, members=2, w_clean=0.), net)
    expected = naive_pal(net.members[0](x_adv), LABEL, net.proxies[0])
    for a, b in zip(*(torch.autograd.grad(loss, list(net.members[0].parameters())) for loss in (step.loss, expected))):
        assert (a - b).abs().max() < 1e-9


def batch(net):
    return Batch(
        net, X, LABEL, everything(net, LABEL), [], 1.0, Shared(**BALL, members=len(net.members)), generator(0), 0
    )


def test_adp_is_the_naive_loop():
    net = toy(3)
    with torch.no_grad():
        chance = torch.stack(
            [(32 * F.normalize(m(X)) @ F.normalize(p).T).softmax(1) for m, p in zip(net.members, net.proxies)]
        )
    entropy, volume = 0., 0.
    for i in range(12):
        mean = chance[:, i].mean(0)
        entropy -= (mean*mean.log()).sum()/12
        wrong = F.normalize(torch.stack([torch.cat([c[i, :LABEL[i]], c[i, LABEL[i] + 1:]]) for c in chance]))
        volume += torch.logdet(wrong@wrong.T + 1e-6*torch.eye(3))/12
    assert adp_term(net, batch(net), entropy=2.0, diversity=0.5).item() == pytest.approx(
        -(2 * entropy + 0.5 * volume).item(), abs=1e-8
    )


def test_gal_is_the_naive_loop_and_differentiable_twice():
    net, slopes = toy(3), []
    for m, p in zip(net.members, net.proxies):
        x = X.clone().requires_grad_()
        value = pal_sample(
            F.normalize(m(x)), LABEL, p.detach(), known=torch.ones(6, dtype=torch.bool), scale=32.0, margin=0.1
        ).sum()
        slopes.append(torch.autograd.grad(value, x)[0].flatten(1))
    cosines = torch.stack([F.cosine_similarity(slopes[i], slopes[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert gal_term(net, batch(net), weight=0.5).item() == pytest.approx(
        0.5 * cosines.exp().sum(0).log().mean().item(), abs=1e-9
    )
    weight, h = net.members[0].head.bias, 1e-6
    slope, ends = torch.autograd.grad(gal_term(net, batch(net), weight=.5), weight)[0][0], []
    for sign in (1, -1):
        with torch.no_grad(): weight[0] += sign*h
        ends.append(gal_term(net, batch(net), weight=.5).item())
        with torch.no_grad(): weight[0] -= sign*h
    assert slope.item() == pytest.approx((ends[0] - ends[1])/(2*h), rel=1e-4, abs=1e-7)


def test_joint_terms_enter_with_their_gradient():
    net = toy(2)
    step = one(make('gal', **AT_ONCE, members=2), net)
    expected = [naive_pal(m(X), LABEL, p) for m, p in zip(net.members, net.proxies)]
    term = gal_term(net, batch(net), weight=.5)
    assert step.loss.item() == pytest.approx((sum(expected)/2 + term).item(), abs=1e-9)
    for a, b in zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (step.loss, sum(expected) + term))):
        assert (a - b).abs().max() < 1e-8


def test_gradients_are_clipped_value_by_value():
    plain, clipped = (
        torch.autograd.grad(
            one(make('pal_natural', **AT_ONCE | dict(clip=c)), net := toy(1)).loss, list(net.parameters())
        )
        for c in (1e9, 0.05)
    )
    assert max(g.abs().max() for g in plain) > .05
    for a, b in zip(plain, clipped): assert torch.equal(a.clamp(-.05, .05), b)


def test_crafting_leaves_no_trace_and_stays_in_the_ball():
    net = toy(2, norm=True).train()
    for p in net.parameters(): p.grad = torch.ones_like(p)
    clean = [F.normalize(m(X)).detach() for m in net.members]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    def crafted(seed):
        return module.craft(
            Batch(net, X, LABEL, everything(net, LABEL), clean, 1.0, Shared(**BALL, members=2), generator(seed), 0), 0
        )[0]
    found = [crafted(s) for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert (
        (found[0] - X).abs().max() <= 0.1 + 1e-12
        and found[0].min() >= 0
        and found[0].max() <= 1
        and not found[0].requires_grad
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all((p.grad == 1).all() and p.requires_grad for p in net.parameters()) and all(
        m.training for m in net.modules()
    )


def test_an_image_does_not_depend_on_its_batch():
    net = toy(1)
    objective = partial(
        pal_sample, proxies=net.proxies[0].detach(), known=torch.ones(6, dtype=torch.bool), scale=32.0, margin=0.1
    )
    whole = pgd(net.members[0], partial(objective, label=LABEL), X, **BALL).images
    alone = pgd(net.members[0], partial(objective, label=LABEL[5:6]), X[5:6], **BALL).images
    assert torch.equal(whole[5:6], alone)


@pytest.mark.parametrize(
    'objective',
    [
        lambda z: (z - z[:1].detach()).norm(dim=1), lambda z: (z @ z.T).exp().sum(),
        lambda z: torch.cdist(z, -z.detach()).amin(1)
    ],
)
def test_the_sequential_gradient_is_the_joint_one(objective):
    net = toy(3)
    with frozen(net):
        joint, apart = (g(partial(embed, net), objective, X) for g in (autograd_gradient, sequential_gradient(net)))
    for a, b in zip(joint, apart): assert (a - b).abs().max() < 1e-12
    assert joint[1].abs().max() > 0
    assert torch.equal(
        *(pgd(net, objective, X, **BALL, gradient=g).images for g in (autograd_gradient, sequential_gradient(net)))
    )


def kept(work):
    "Largest number of bytes that graphs hold at once while `work` runs."
    alive, most = {}, [0]
    class Held:
        def __init__(self, t): self.t, alive[id(self)] = t, t.nbytes; most[0] = max(most[0], sum(alive.values()))
        def __del__(self): alive.pop(id(self), None)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.t): work()
    return most[0]


def test_the_sequential_gradient_keeps_one_member():
    one_of, net = Ensemble([Net(0)]), toy(4)
    def away(z): return z.sum(1)
    def measured(model, gradient):
        with frozen(model): return kept(lambda: gradient(partial(embed, model), away, X))
    single, apart, joint = (
        measured(one_of, autograd_gradient), measured(net, sequential_gradient(net)), measured(net, autograd_gradient)
    )
    assert joint > 3.5*single and apart < 1.2*single


def test_the_update_keeps_one_member():
    "The step differentiates member by member; what is left for the loop's backward pass are the weights."
    def measured(members): return kept(lambda: one(make('pal_natural', **AT_ONCE, members=members), toy(members)))
    assert measured(4) < measured(1) + 4*8*sum(p.numel() for p in toy(4).parameters())


@pytest.mark.parametrize('combine,share', [('full', 5), ('leave_one_out', 4), ('focus', 1), ('r_of_n', 2)])
def test_parts(combine, share):
    label = torch.randint(9, (300,), generator=generator(0, 'labels'))
    parts = split(label, classes=9, members=5, combine=combine, seed=1)
    assert (parts.seen.sum(0) == share).all() and parts.known.all()
    for k in range(9):
        counts = parts.seen[:, label == k].sum(1)
        assert counts.min() > 0 and counts.max() - counts.min() <= (1 if combine in ('focus', 'leave_one_out') else 2)
    assert torch.equal(parts.seen, split(label, classes=9, members=5, combine=combine, seed=1).seen)
    if combine != 'full':
        assert not torch.equal(parts.seen, split(label, classes=9, members=5, combine=combine, seed=2).seen)
    rows = torch.tensor([7, 0])
    assert torch.equal(parts.of(rows).seen, parts.seen[:, [7, 0]])


def test_whole_classes_can_be_dealt_out():
    parts = split(LABEL, classes=6, members=3, combine='leave_one_out', seed=0, unit='class')
    assert torch.equal(parts.seen, parts.known[:, LABEL]) and parts.known.sum(1).tolist() == [4, 4, 4]
    net = toy(3)
    step = one(make('eat', **AT_ONCE, split_unit='class'), net, parts=parts)
    grads = torch.autograd.grad(step.loss, list(net.proxies))
    for m in range(3): assert torch.equal(grads[m].abs().sum(1) > 0, parts.known[m])


def test_a_split_that_cannot_be_is_refused(images):
    lonely = torch.tensor([0, 0, 0, 1])
    with pytest.raises(ValueError, match='found class 1 with 1 images and none of them among those of member'):
        split(lonely, classes=2, members=3, combine='leave_one_out', seed=0)
    assert split(lonely, classes=2, members=3, combine='leave_one_out', seed=0, absent='negative').known.all()
    defence = make('eat', **BALL, members=7, combine='focus')
    with pytest.raises(
        ValueError, match='with 6 images and none of them among those of member .* of 7; use fewer members'
    ):
        train(fresh(defence), images.train, defence, **OPTIONS)


def test_rows_of_others_give_no_gradient():
    net, parts = toy(2), Parts(torch.arange(12) % 2 == torch.tensor([[0], [1]]), torch.ones(2, 6, dtype=torch.bool))
    changed = torch.where(parts.seen[0][:, None, None, None], X, 1 - X)
    defence = make('eat', **AT_ONCE, members=2, self_transfer='rotate', combine='focus')
    found = [
        torch.autograd.grad(one(defence, net, parts=parts, x=x).loss, [*net.members[0].parameters(), net.proxies[0]])
        for x in (X, changed)
    ]
    for a, b in zip(*found): assert torch.equal(a, b)


def test_a_batch_without_images_of_a_member_leaves_it_alone():
    net, parts = toy(2), Parts(
        torch.stack([torch.ones(12), torch.zeros(12)]).bool(), torch.ones(2, 6, dtype=torch.bool)
    )
    for rule in ('none', 'rotate'):
        grads = torch.autograd.grad(
            one(make('eat', **AT_ONCE, members=2, self_transfer=rule), net, parts=parts).loss, list(net.parameters()),
            allow_unused=True
        )
        used = dict(zip([name for name, _ in net.named_parameters()], [g is not None for g in grads]))
        assert used == {name: name.startswith(('members.0', 'proxies.0')) for name in used}


SMALL = {
    name: dict(
        dict(members=2) if name in ('eat', 'ensemble_at', 'joint_at', 'adp', 'gal', 'dverge') else {}, eps=0.1,
        step_size=0.05, steps=2, warm_epochs=1, clean_epochs=0, ramp_epochs=1, decay_every=1
    )
    for name in PROXY
}


@pytest.mark.parametrize('name', PROXY)
def test_killed_and_resumed_equals_undisturbed(name, images, tmp_path):
    "Weights, proxies, log and monitor; killed in the third epoch, in the middle of it."
    defence = make(name, **SMALL[name])
    whole, resumed, run = fresh(defence), fresh(defence), Run(tmp_path)
    log = train(whole, images.train, defence, **OPTIONS)['log']
    with pytest.raises(KeyboardInterrupt): train(fresh(defence), images.train, failing(defence, 7), run=run, **OPTIONS)
    assert run.read('checkpoint.json')['epoch'] == 2
    done = train(resumed, images.train, defence, run=run, **OPTIONS)
    assert same(whole, resumed) and json.loads(to_json(done['log'])) == json.loads(to_json(log))
    loaded = fresh(defence)
    train(loaded, images.train, defence, run=run, **OPTIONS)
    assert same(whole, loaded) and all(not torch.equal(a, b) for a, b in zip(whole.proxies, fresh(defence).proxies))


def test_the_warm_up_holds_the_backbones(images):
    defence = make('eat', **SMALL['eat'])
    net = fresh(defence)
    train(net, images.train, defence, **OPTIONS | dict(epochs=1))
    for member, start in zip(net.members, fresh(defence).members):
        assert same(member.backbone, start.backbone) and not same(member.head, start.head)
    assert all(p.requires_grad for p in net.parameters())


def test_the_rate_decays(images):
    "With a decay to nothing the second epoch changes no weight."
    defence = make('pal_natural', **SMALL['pal_natural'] | dict(decay=0., warm_epochs=0))
    nets = [fresh(defence) for _ in range(2)]
    for net, epochs in zip(nets, (1, 2)): train(net, images.train, defence, **OPTIONS | dict(epochs=epochs))
    assert same(*nets) and not same(nets[0], fresh(defence))


def test_proxies_that_are_not_finite_lose_no_epoch(images, tmp_path):
    defence, run = make('pal_at', **SMALL['pal_at']), Run(tmp_path)
    def step(model, *args, clock, **kw):
        if clock.update == 4: model.proxies[0].data[0] = torch.nan
        return defence.step(model, *args, clock=clock, **kw)
    with pytest.raises(
        FloatingPointError,
        match=(
            r"expected finite proxies, found NaN or infinity in those of member 0; .* \(the last whole epoch is kept\)"
        ),
    ):
        train(fresh(defence), images.train, replace(defence, step=step), run=run, **OPTIONS)
    assert run.read('checkpoint.json')['epoch'] == 1
    whole, resumed = fresh(defence), fresh(defence)
    train(whole, images.train, defence, **OPTIONS), train(resumed, images.train, defence, run=run, **OPTIONS)
    assert same(whole, resumed)


def test_half_precision_trains(images):
    defence = make('eat', **SMALL['eat'])
    full, half = (
        train(fresh(defence), images.train, defence, precision=p, **OPTIONS)['log'][-1]['loss']
        for p in ('float32', 'bfloat16')
    )
    assert full != half and half == pytest.approx(full, rel=.1)


def test_a_step_draws_from_its_generator_alone(images):
    before = torch.get_rng_state()
    for name in PROXY:
        defence = make(name, **AT_ONCE)
        one(defence, toy(defence.shared.members))
    assert torch.equal(torch.get_rng_state(), before)


def test_collapse_halves_the_radius_once_per_epoch(images):
    "Members whose embeddings are all alike, made so by a head that only knows its bias."
    defence = make('pal_at', eps=.1, step_size=.05, steps=1, warm_epochs=0, clean_epochs=1, ramp_epochs=0)
    net = fresh(defence)
    with torch.no_grad(): net.members[0].head.weight.mul_(1e-4), net.members[0].head.bias.fill_(1.)
    with pytest.warns(UserWarning, match='the embeddings collapse'):
        done = train(net, images.train, defence, **OPTIONS | dict(epochs=4, lr=1e-9))
    assert [row['eps'] for row in done['log']] == pytest.approx([0., .1, .05, .025]) and done['state']['radius'] == .25
    ignored = replace_option(defence, on_collapse='ignore')
    assert train(net, images.train, ignored, **OPTIONS | dict(epochs=3, lr=1e-9))['log'][-1]['eps'] == pytest.approx(.1)


def replace_option(defence, **options): return make(defence.name, **defence.options | options)


def test_schedule():
    s = Shared(**BALL, warm_epochs=1, clean_epochs=2, ramp_epochs=4)
    assert [strength(s, e) for e in range(9)] == [0, 0, 0, .25, .5, .75, 1, 1, 1]


def test_an_ensemble_is_evaluated_like_a_network(images):
    defence = make('eat', **SMALL['eat'])
    net = fresh(defence)
    found = evaluate(
        net, images.test, **vars(Protocol(eps=0.1, step_size=0.05, steps=2, batch_size=24)), backend='torch', show=False
    )
    assert 0 <= found.benign['R@1'] <= 100 and set(HEADINGS) <= found.after.keys()
    z = embed_all(net, images.test, batch_size=7)
    assert z.shape == (len(images.test), 16) and torch.allclose(z.norm(dim=1), torch.ones(len(z)))
    members = [embed_all(m, images.test, batch_size=7) for m in net.members]
    assert torch.allclose(torch.cdist(z, z).square(), sum(torch.cdist(e, e).square() for e in members)/2, atol=1e-5)
    assert torch.allclose(z, joined(members), atol=1e-6)


def test_one_member_embeds_as_its_network(images):
    net = ensemble('small', members=1, classes=6, dim=8, size=28, channels=1, seed=0)
    assert torch.allclose(
        embed_all(net, images.test, batch_size=8), embed_all(net.members[0], images.test, batch_size=8), atol=1e-6
    )
    assert checksum(net) == checksum(ensemble('small', members=1, classes=6, dim=8, size=28, channels=1, seed=0))


def test_transfer_matrix(images):
    """The diagonal is the evaluation's own white box; block size changes nothing; a model against itself transfers
    fully."""
    nets = [Net28(s) for s in range(2)]
    budget = dict(eps=.1, step_size=.03, steps=3)
    table = transfer_matrix([*nets, nets[0]], images.test, batch_size=24, **budget)
    for i, net in enumerate(nets):
        emb = embed_all(net, images.test, batch_size=24)
        records = attack_batches(
            net, images.test, queries_and_gallery(emb, images.test.labels)[1], {'ES': SUITE['ES']}, Protocol(**budget),
            show=False
        )
        assert table[i, i].item() == pytest.approx(mean_outcomes(records, 'after')['ES:R'])
    assert torch.equal(table[0], table[2]) and torch.equal(table[:, 0], table[:, 2])
    assert torch.equal(table, transfer_matrix([*nets, nets[0]], images.test, batch_size=5, **budget))
    assert table[0, 1] > table[1, 1]


def Net28(seed): return ensemble('small', members=1, classes=2, dim=8, size=28, channels=1, seed=seed).members[0]


@pytest.mark.parametrize('name', PROXY)
def test_options_make_the_same_defence(name):
    d = make(name, **BALL, scale=16.)
    again = make(name, **json.loads(json.dumps(d.options)))
    assert (again.name, again.options, again.shared) == (d.name, d.options, d.shared) and d.shared.scale == 16
    with pytest.raises(TypeError, match='has no option colour'): make(name, **BALL, colour=1)


@pytest.mark.parametrize(
    'options,words',
    [
        (dict(eps=8.0), '8/255 is 0.031'), (dict(combine='some'), "combine must be one of 'full'"),
        (dict(members=0), 'members must be a whole number'),
        (dict(members=1, self_transfer='none'), 'leave_one_out needs at least 2 members'),
        (dict(members=2, combine='r_of_n', r=3), r'r must lie in \[1, members\], found 3 of 2'),
        (dict(scale=0.0), 'scale, proxy_lr and clip must be positive'),
        (dict(self_transfer='some'), "self_transfer must be one of 'none'"),
        (dict(members=1, combine='full'), 'needs at least 2 members, found 1'),
        (dict(w_clean=0.9), 'w_transfer must lie in'),
        (dict(split_unit='class', craft_loss='proxy_margin'), 'lacks the proxies'),
        (dict(warm_epochs=-1), 'warm_epochs must lie in')
    ],
)
def test_bad_switches_are_refused(options, words):
    with pytest.raises(ValueError, match=words): make('eat', **BALL | options)


def test_bad_models_are_refused(images):
    defence = make('eat', **BALL, members=2)
    with pytest.raises(
        TypeError,
        match=(
            'trains an Ensemble with proxies for each member, found EmbeddingNet; make one with defenses.eat.ensemble'
        ),
    ):
        train(Net28(0), images.train, defence, **OPTIONS)
    with pytest.raises(ValueError, match='must have members=2, as its defence has, found 3'):
        train(fresh(make('eat', **BALL)), images.train, defence, **OPTIONS)
    with pytest.raises(ValueError, match='proxies for the 6 training classes, found 5'):
        train(fresh(defence, classes=5), images.train, defence, **OPTIONS)
    with pytest.raises(ValueError, match='set warm_epochs=0'):
        defence.optimizer(
            Ensemble([nn.Flatten(), nn.Flatten()], [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]), lr=1.0,
            weight_decay=0.0
        )
    with pytest.raises(ValueError, match='at least 1 member'): Ensemble([])


def test_an_image_of_an_unknown_class_is_not_scored_as_its_neighbour():
    proxies, known = torch.randn(4, 5), torch.tensor([True, False, True, True])
    emb = F.normalize(torch.randn(3, 5), dim=1)
    with pytest.raises(ValueError, match='classes that are known, found 1 of 3 images of others'):
        pal(emb, torch.tensor([0, 1, 2]), proxies, scale=32., margin=.1, known=known)
