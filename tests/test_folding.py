"""Networks that people have and that are not what their list of layers says: what runs faster must be the same
function with the same gradient, and the caller's object must stay as it was."""
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from robust_dml.core import generator
from robust_dml.data.sets import ImageSet
from robust_dml.defenses.base import act
from robust_dml.defenses.train import train
from robust_dml.metrics.evaluate import evaluate
from robust_dml.models import networks
from robust_dml.models.networks import EmbeddingNet, build, embed, frozen, gap, proven, settled, streamlined

pytestmark = pytest.mark.filterwarnings('ignore')


class Base(nn.Module):
    "Two convolutions, each with a BatchNorm; subclasses do something with them."
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8*5*5, 16)
        self.more()
    def more(self): pass
    def end(self, x): return self.head(torch.relu(x).flatten(1))
    def forward(self, x): return self.end(self.bn2(self.conv2(torch.relu(self.bn(self.conv(x))))))


class Hook(Base):
    def more(self): self.conv.register_forward_hook(lambda m, i, o: o*2)
class PreHook(Base):
    def more(self): self.bn.register_forward_pre_hook(lambda m, i: (i[0]+1,))
class NormHook(Base):
    def more(self): self.bn2.register_forward_hook(lambda m, i, o: o.abs())
class BackwardHook(Base):
    def more(self): self.bn2.register_full_backward_hook(lambda m, i, o: tuple(3*g for g in i))
class Tied(Base):
    def more(self): self.other = self.conv2
    def forward(self, x): return self.end(self.bn2(self.other(torch.relu(self.bn(self.conv(x))))))
class TiedNorm(Base):
    def more(self): self.other = self.bn2
    def forward(self, x): return self.end(self.other(self.conv2(torch.relu(self.bn(self.conv(x))))))
class Listed(Base):
    def more(self): self.norms = [self.bn, self.bn2]
    def forward(self, x): return self.end(self.norms[1](self.conv2(torch.relu(self.norms[0](self.conv(x))))))
class Nested(Base):
    def more(self): self.norms = {'a': (self.bn, [self.bn2])}
    def forward(self, x):
        first, (second,) = self.norms['a']
        return self.end(second(self.conv2(torch.relu(first(self.conv(x))))))
class ByMode(Base):
    "AdvProp: a BatchNorm of its own in training; the model comes in training mode."
    def more(self):
        self.adv = nn.BatchNorm2d(8)
        self.train()
    def forward(self, x):
        return self.end((self.adv if self.training else self.bn2)(self.conv2(torch.relu(self.bn(self.conv(x))))))
class NoStatistics(Base):
    def more(self): self.bn = nn.BatchNorm2d(8, track_running_stats=False)
class Twice(Base):
    def forward(self, x):
        y = self.conv(x)
        return self.end(self.bn2(self.conv2(torch.relu(self.bn(y) + y))))
class Kept(Base):
    "The features are kept by a hook and read afterwards."
    def more(self): self.bn2.register_forward_hook(lambda m, i, o: setattr(self, 'kept', o))
    def forward(self, x):
        super().forward(x)
        return self.end(self.kept)
class KeptByMethod(Kept):
    def more(self): self.bn2.register_forward_hook(self.keep)
    def keep(self, m, i, o): self.kept = o
class Patched(Base):
    def more(self):
        plain = self.conv.forward
        self.conv.forward = lambda x: plain(x).abs()
class Bound(Base):
    def more(self): self.steps = [self.conv.forward, self.bn.forward]
    def forward(self, x):
        for step in self.steps: x = step(x)
        return self.end(self.bn2(self.conv2(torch.relu(x))))
class Closure(Base):
    def more(self):
        norm = self.bn2
        self.after = lambda x: norm(x)
    def forward(self, x): return self.end(self.after(self.conv2(torch.relu(self.bn(self.conv(x))))))
class ReadsStatistics(Base):
    def forward(self, x): return super().forward(x)*self.bn2.running_mean.abs().mean()
class ReadsWeights(Base):
    def forward(self, x): return super().forward(x) + self.conv2.weight.mean()
class NewSpectralNorm(Base):
    def more(self): parametrizations.spectral_norm(self.conv)
class NewWeightNorm(Base):
    def more(self): parametrizations.weight_norm(self.conv)
class OldSpectralNorm(Base):
    def more(self): nn.utils.spectral_norm(self.conv)
class OldWeightNorm(Base):
    def more(self): nn.utils.weight_norm(self.conv)
class Pruned(Base):
    def more(self): prune.l1_unstructured(self.conv, 'weight', .5)
class NormInTraining(Base):
    "A BatchNorm that stays in training mode, whatever is asked."
    def train(self, mode=True):
        super().train(mode)
        self.bn2.training = True
        return self
class AbsNorm(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x).abs()
class Subclass(Base):
    def more(self): self.bn = AbsNorm(8)
class Compiled(Base):
    def __new__(cls): return torch.compile(spread_out(Base()), backend='eager')


KINDS = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, Base)]


def spread_out(net):
    "Statistics and weights of the BatchNorms far from the identity."
    gen = generator(0, 'statistics')
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d) or m.running_mean is None: continue
        m.running_mean.copy_(.5*torch.randn(8, generator=gen))
        m.running_var.copy_(.2 + 2*torch.rand(8, generator=gen))
        m.weight.data.copy_(.5 + torch.rand(8, generator=gen))
    return net


def made(kind):
    torch.manual_seed(0)
    return spread_out(kind())


def looks(n=6): return torch.rand(n, 3, 16, 16, generator=generator(0, 'looks'))


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_what_runs_is_the_function_that_was_given(kind):
    "Embeddings and gradients, by the proof and without it, and the caller's object afterwards."
    x, given = looks(), made(kind)
    true, modes = networks._answers(made(kind), x), [m.training for m in given.modules()]
    weights = networks.checksum(given)
    found = proven(given, x)
    assert max(gap(true, networks._answers(found.model, x))) < 1e-4
    assert (found.folded > 0) == (found.model is not given)
    assert [m.training for m in given.modules()] == modes
    assert networks.checksum(given) == weights or kind is NormInTraining # which counts whatever it sees
    assert gap(true, networks._answers(given, x)) == (0, 0)
    assert all(p.requires_grad and p.grad is None for p in given.parameters())
    assert '_robust_dml_folds' not in vars(given)
    if kind is ReadsStatistics:
        assert 'fails (AttributeError)' in found.note
    else:
        assert max(gap(true, networks._answers(streamlined(given), x))) < 1e-4


def test_a_look_alone_would_not_do(monkeypatch):
    "Without the look at the layers the proof alone finds every network that folding changes."
    monkeypatch.setattr(networks, 'obstacle', lambda net: '')
    monkeypatch.setattr(networks, '_folds_into', lambda conv, norm: True)
    changed = 0
    for kind in (Hook, PreHook, NormHook, Tied, TiedNorm, Patched, BackwardHook, NoStatistics, Kept):
        given = made(kind)
        found, true = proven(given, looks()), networks._answers(made(kind), looks())
        assert max(gap(true, networks._answers(found.model, looks()))) < 1e-4, kind
        changed += 'so it would be another one' in found.note
    assert changed >= 5


def test_an_agreeing_network_is_folded_and_a_slightly_wrong_one_is_not(monkeypatch):
    "Rounding passes, in networks where ReLUs flip as well; a scale that is a thousandth off does not."
    net, x = build('resnet18', dim=16, size=64, channels=3, seed=0), torch.rand(4, 3, 64, 64)
    assert proven(net, x).folded == 20
    fuse = networks.fuse_conv_bn_eval
    def off(conv, norm):
        conv = fuse(conv, norm)
        conv.weight.data *= 1.001
        return conv
    monkeypatch.setattr(networks, 'fuse_conv_bn_eval', off)
    found = proven(net, x)
    assert found.model is net and 'moves embeddings by up to' in found.note


def photos():
    gen = generator(0, 'photos')
    tint = torch.randint(128, (6, 3, 1, 1), generator=gen).repeat_interleave(4, 0)
    pixels = tint + torch.randint(128, (24, 3, 16, 16), generator=gen)
    return ImageSet(pixels.to(torch.uint8), torch.arange(6).repeat_interleave(4), tuple('abcdef'))


@pytest.mark.parametrize('kind', [ReadsStatistics, Listed, ByMode])
def test_evaluate_attacks_the_given_network(kind, monkeypatch):
    "The same numbers as when nothing may be folded."
    given = dict(eps=.05, step_size=.02, steps=3, backend='torch', show=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = evaluate(made(kind), photos(), **given)
    assert any('is run as it was given' in str(w.message) for w in said) == (kind is not ByMode)
    monkeypatch.setattr(networks, '_folds', lambda model: ())
    true = evaluate(made(kind), photos(), **given)
    for moment in ('before', 'after'):
        assert getattr(found, moment) == pytest.approx(getattr(true, moment), abs=1e-3, nan_ok=True)


def test_training_searches_in_the_given_network(monkeypatch):
    "What may be folded is proved once, before the training, and forgotten after it."
    calls, original = [], networks.foldable
    monkeypatch.setattr(networks, 'foldable', lambda net: calls.append(net) or original(net))
    log = {}
    for name in ('found', 'true'):
        if name == 'true': monkeypatch.setattr(networks, '_folds', lambda model: ())
        net = made(ReadsStatistics).eval()
        log[name] = train(
            net, photos(), act(eps=.1, step_size=.05, steps=2, margin=1.), epochs=1, pairs=6, lr=1e-4, show=False
        )['log']
        assert '_robust_dml_folds' not in vars(net)
    assert len(calls) == 2 and log['found'] == log['true'] # once by `settled` and once by `proven` within it


def test_settled_leaves_the_models_as_they_were():
    net = EmbeddingNet(made(Base), nn.Identity(), mean=(0.,)*3, std=(1.,)*3)
    with settled(net, x=looks()): assert len(net.folds) == 2
    assert 'folds' not in vars(net) and len(net.folds) == 2
    with pytest.raises(ZeroDivisionError), settled(net, x=looks()): raise ZeroDivisionError
    assert len(vars(net)['folds']) == 2


def test_unit_embeddings_are_compared_where_lengths_differ():
    with frozen(made(Base)) as net, torch.no_grad(): assert embed(net, looks()).norm(dim=1).sub(1).abs().max() < 1e-5
