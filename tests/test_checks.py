"""Every flag of `checks` has a model, a gallery or an attack that is broken in just that way, and a healthy model
raises none."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_dml.metrics import flags as checks
from robust_dml.attacks.suite import Gallery, members
from robust_dml.triplets.collapse import indicators
from robust_dml.core import generator
from robust_dml.data.sets import ImageSet, glyphs
from robust_dml.models.networks import build, embed_all

GIVEN = dict(eps=32/255, step_size=3/255, steps=32)


class Around(nn.Module):
    "A model with something before and after it."
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x): return self.after(self.net(self.before(x)))


class Reversed(torch.autograd.Function):
    "The identity with a gradient of the wrong sign."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return -grad


def fitted(images, prepare=lambda x: x):
    "A small network trained on prepared images."
    net = build('small', dim=32, size=28, channels=images.images.shape[1], seed=0)
    optimiser, gen = torch.optim.Adam(net.parameters(), lr=2e-3), generator(0, 'healthy')
    for _ in range(150):
        rows = torch.randint(len(images), (120,), generator=gen)
        emb, label = F.normalize(net(prepare(images.batch(rows)))), images.labels[rows]
        loss = F.binary_cross_entropy_with_logits(8*(emb@emb.T) - 4, (label[:, None] == label).float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


@pytest.fixture(scope='module')
def split(): return glyphs(train_classes=30, test_classes=20)


@pytest.fixture(scope='module')
def trained(split): return SimpleNamespace(net=fitted(split.train), images=split.test)


def flags(model, images, **options):
    gallery = Gallery(embed_all(model, images, batch_size=100), images.labels)
    signs = indicators(gallery.emb, gallery.label, gen=generator(0, 'test'))
    return {
        f.name: f
        for f in checks.checks(
            model, images, members(gallery, torch.arange(len(images))), gallery, signs, **{**GIVEN, **options}
        )
    }


def raised(*args, **options): return {name for name, flag in flags(*args, **options).items() if flag.raised}


def test_healthy_model_raises_none(trained):
    found = flags(trained.net, trained.images)
    assert list(found) == [
        'range', 'nondeterministic', 'zero_grad', 'blackbox_stronger', 'not_converged', 'restart_gain', 'eps_no_effect',
        'collapsed', 'duplicates'
    ]
    assert not [f for f in found.values() if f.raised]
    assert all(f.says.endswith('.') and '{' not in f.says and not math.isnan(f.value) for f in found.values())


def test_range(split):
    """A network that learned on standardised colour images is handed images in [0, 1]; the wrapper that the flag asks
    for ends it."""
    colour = {
        name: ImageSet(part.images.repeat(1, 3, 1, 1), part.labels, part.classes)
        for name, part in (('train', split.train), ('test', split.test))
    }
    net = fitted(colour['train'], checks.standardised)
    flag = checks.check_range(net, colour['test'])
    assert flag.raised and 'standardised' in flag.says
    assert not checks.check_range(Around(net, before=checks.standardised), colour['test']).raised


@pytest.mark.parametrize(
    'broken',
    [
        dict(after=lambda z: F.dropout(z, 0.2, training=True)),
        dict(after=lambda z: F.batch_norm(z, None, None, training=True))
    ],
    ids=('dropout left on', 'statistics of the batch'),
)
def test_nondeterministic(trained, broken):
    assert 'nondeterministic' in raised(Around(trained.net, **broken), trained.images)


@pytest.mark.parametrize(
    'broken',
    [
        dict(after=lambda z: (8 * F.normalize(z)).round() + 1e-3), dict(before=torch.Tensor.detach),
        dict(before=lambda x: (4 * x).round() / 4), dict(after=lambda z: (1e4 * z).sigmoid())
    ],
    ids=('rounded output', 'no graph', 'input quantiser', 'saturated head'),
)
def test_zero_gradient(trained, broken): assert 'zero_grad' in raised(Around(trained.net, **broken), trained.images)


def test_blackbox_stronger(trained):
    "The gradient points the wrong way, so chance does better; nothing else looks wrong with the gradient."
    found = raised(Around(trained.net, before=Reversed.apply), trained.images)
    assert 'blackbox_stronger' in found and 'zero_grad' not in found


def test_input_quantiser_hides_the_gradient_from_all_but_the_black_box(trained):
    assert {'zero_grad', 'blackbox_stronger', 'eps_no_effect'} <= raised(
        Around(trained.net, before=lambda x: (4 * x).round() / 4), trained.images
    )


def test_not_converged(trained):
    "An attack that is cut short."
    assert 'not_converged' in raised(trained.net, trained.images, step_size=1/255, steps=4)


def test_restart_gain(trained):
    "A flat spot around every clean image: a start elsewhere is needed."
    steps = Around(trained.net, before=lambda x: x + .02*torch.sin(300*x))
    assert 'restart_gain' in raised(steps, trained.images)


def test_no_effect_of_the_budget(trained):
    "Whatever is done to an image, the network sees it through a window of four grey levels without slope."
    assert 'eps_no_effect' in raised(Around(trained.net, before=lambda x: (x > .5).float()), trained.images)


def test_collapsed(trained):
    shrunk = Around(trained.net, after=lambda z: F.normalize(z)*1e-3 + torch.eye(32)[0])
    assert 'collapsed' in raised(shrunk, trained.images)
    constant = Around(trained.net, after=lambda z: 0*z + torch.eye(32)[0])
    assert {'collapsed', 'duplicates', 'zero_grad'} <= raised(constant, trained.images)


def test_duplicates(trained):
    images = trained.images
    rows = torch.cat([torch.arange(len(images)), torch.arange(3)])
    doubled = ImageSet(images.images[rows], images.labels[rows], images.classes)
    flag = flags(trained.net, doubled)['duplicates']
    assert flag.raised and flag.value == pytest.approx(100*6/len(doubled))


def test_twins_against_all_pairs():
    emb = F.normalize(torch.randn(60, 3, generator=generator(0, 'x')).double())
    emb[7], emb[30], emb[31] = emb[2], emb[11], emb[11]
    plain = ((torch.cdist(emb, emb, compute_mode='donot_use_mm_for_euclid_dist') < 1e-6).sum(1) > 1)
    assert torch.equal(checks.twins(emb), plain)


def test_sample_keeps_to_its_size():
    label = torch.arange(50).repeat_interleave(7)
    rows = checks.sample_of_classes(label, size=41)
    assert (
        len(rows) == 41 == len(rows.unique())
        and label[rows].bincount().max() == 4
        and (label[rows].bincount() > 0).sum() == 11
    )


def test_costs_at_most_a_tenth(trained):
    "Images shown to the model, counted: against the suite of 2,000 queries with as many steps."
    seen = 0
    def count(x):
        nonlocal seen
        seen += len(x)
        return x
    flags(Around(trained.net, before=count), trained.images)
    assert seen < .1*11*GIVEN['steps']*2000
