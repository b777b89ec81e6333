"""Old numbers for a changed model, and models in forms that people have: no number of another function, and a true
sentence for what cannot be measured."""
import copy
import json

import pytest
import torch
from test_audit import SMALL, After, network, paint
from torch import nn

from robust_dml.audit import measure
from robust_dml.audit.hardening import harden
from robust_dml.audit.measure import audit
from robust_dml.core import fingerprint, generator
from robust_dml.data.sets import ImageSet
from robust_dml.metrics.evaluate import evaluate
from robust_dml.models.identity import behaviour, code_of, differs, has_own_code
from robust_dml.models.networks import build, checksum, embed, frozen
from robust_dml.runs import store
from robust_dml.runs.store import Run, find_run

pytestmark = pytest.mark.filterwarnings('ignore')
FEW = SMALL | dict(attacks='ES,LTM nearest', steps=4, limit=0)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return paint(tmp_path_factory.mktemp('photos')/'photos')


def looks(n=4, size=16): return torch.rand(n, 3, size, size, generator=generator(0, 'looks'))


class Rounded(nn.Module):
    "Rounds its images; the gradient gets through or does not."
    def __init__(self, passes):
        super().__init__()
        self.net, self.passes = network(), passes
    def forward(self, x):
        rounded = (32*x).round()/32
        return self.net(x + (rounded - x).detach() if self.passes else rounded + 0*x)


class Straight(torch.autograd.Function):
    "What `Rounded` does, out of sight: the gradient is scaled by a number that is not in the code of the model."
    scale = 0.
    @staticmethod
    def forward(ctx, x): return (32*x).round()/32
    @staticmethod
    def backward(ctx, grad): return grad*Straight.scale


def test_a_settled_gradient_is_measured_anew(photos, tmp_path):
    "As the page advises: the flag zero_grad was raised, the gradient was mended, the weights are the same."
    blind = audit(Rounded(False), photos, out=tmp_path, **FEW).results
    mended = audit(Rounded(True), photos, out=tmp_path, **FEW)
    assert any(f['name'] == 'zero_grad' and f['raised'] for f in blind['evaluation']['flags'])
    assert mended.results['run'] != blind['run'] and mended.results['worst']['after'] < blind['worst']['after']
    assert 'are quoted' not in mended.page.read_text()


def test_a_gradient_that_changed_out_of_sight_is_measured_anew(photos, tmp_path, monkeypatch):
    "Code, weights and embeddings are the same; only the gradient is not, and the page says so."
    model = After(network(), lambda z: z)
    monkeypatch.setattr(measure, 'code_of', lambda model, x: 'the same')
    first = audit(nn.Sequential(Image(), model), photos, out=tmp_path, **FEW).results
    monkeypatch.setattr(Straight, 'scale', 1.)
    again = audit(nn.Sequential(Image(), model), photos, out=tmp_path, **FEW)
    assert again.results['run'] != first['run']
    assert 'behaved otherwise (gradients that differ by 100 % of their length' in again.page.read_text()
    once_more = audit(nn.Sequential(Image(), model), photos, out=tmp_path, **FEW)
    assert once_more.results['run'] == again.results['run'] and 'are quoted' in once_more.page.read_text()


class Image(nn.Module):
    def forward(self, x): return Straight.apply(x)


def test_quoted_numbers_are_called_so(photos, tmp_path):
    "When and by what they were measured, and how to measure anew; the same numbers."
    few = SMALL | dict(attacks='ES', limit=2, out=tmp_path)
    first = audit(network(), photos, **few)
    fresh, note = first.page.read_text(), f'are quoted from {first.results["run"]}'
    again = audit(network(), photos, **few)
    assert note not in fresh and note in again.page.read_text()
    assert f'delete the folder {first.results["run"]} in the store' in again.page.read_text()
    assert again.results['measured'] == first.results['measured']
    assert 'Software of the measurement, finished on' in fresh
    for part in ('after', 'before', 'benign'):
        assert again.results['evaluation'][part] == first.results['evaluation'][part]


def test_a_new_version_of_the_method_finds_no_old_numbers(photos, tmp_path, monkeypatch):
    "Its addresses are others; those of the papers' tables are what they were."
    few = SMALL | dict(attacks='ES', limit=2, out=tmp_path)
    first, cell = audit(network(), photos, **few).results['run'], find_run(tmp_path, 'eval', dict(seed=0)).address
    monkeypatch.setattr(store, 'METHODS', dict(store.METHODS, audit=99))
    assert audit(network(), photos, **few).results['run'] != first
    assert find_run(tmp_path, 'eval', dict(seed=0)).address == cell == f'eval-{fingerprint(dict(seed=0))[:12]}'
    monkeypatch.setattr(store, 'METHODS', dict(store.METHODS, eval=2))
    assert find_run(tmp_path, 'eval', dict(seed=0)).address != cell


def test_embeddings_are_compared_by_their_distance():
    "No coordinate of 2,048 moves by .01, and the embedding by .2."
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 2048))
    other = After(net, lambda z: z + .2*z.norm(dim=1, keepdim=True)/2048**.5*(torch.arange(2048)%2*2 - 1))
    one, two = behaviour(net, looks()), behaviour(other, looks())
    moved = torch.tensor(one['emb']) - torch.tensor(two['emb'])
    assert moved.abs().max() < .01 and moved.norm(dim=1).min() > .15
    assert 'embeddings 0.' in differs(one, two)


def test_rounding_is_no_change():
    "Another order of the sums and the last digit of the weights."
    net = build('resnet18', dim=16, size=64, channels=3, seed=0).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters(): p.mul_(1 + 1e-7)
    x = looks(size=64)
    assert differs(behaviour(net, x), behaviour(other.to(memory_format=torch.channels_last), x)) == ''


def test_chance_is_no_change(photos, tmp_path):
    "A model that depends on chance is known again, so that a killed audit can go on."
    noisy = After(network(), lambda z: nn.functional.dropout(z, .2, training=True))
    runs = {audit(noisy, photos, out=tmp_path, **SMALL | dict(attacks='ES', limit=2)).results['run'] for _ in range(2)}
    assert len(runs) == 1


SHIFT = 0.


def helper(z): return z + SHIFT


CHANGES = dict(
    code=lambda: After(network(), lambda z: z + 1), attribute=lambda: with_attribute(),
    hook=lambda: hooked(), buffer=lambda: with_buffer(2.), tensor=lambda: with_tensor(2.),
    stride=lambda: dilated(), bound=lambda: After(network(), Shifting(1.).shifted),
)


class Shifting:
    def __init__(self, by): self.by = by
    def shifted(self, z): return z + self.by


def with_attribute():
    net = After(network(), helper)
    net.temperature = 2.
    return net


def hooked():
    net = After(network(), helper)
    net.net[0].register_forward_pre_hook(lambda m, i: (i[0]*.5,))
    return net


def with_buffer(value):
    net = After(network(), helper)
    net.register_buffer('scale', torch.tensor(value), persistent=False)
    return net


def with_tensor(value):
    net = After(network(), helper)
    net.scales = [torch.tensor(value)]
    return net


def dilated():
    net = After(network(), helper)
    net.net[0].padding_mode = 'reflect'
    return net


@pytest.mark.parametrize('name', CHANGES)
def test_what_is_not_in_the_weights_is_in_the_code(name):
    plain = code_of(After(network(), helper), looks())
    assert plain == code_of(After(network(), helper), looks()) != code_of(CHANGES[name](), looks())


def test_constants_that_a_function_names_are_code(monkeypatch):
    plain = code_of(After(network(), helper), looks())
    monkeypatch.setitem(globals(), 'SHIFT', 1.)
    assert code_of(After(network(), helper), looks()) != plain


def test_what_running_changes_is_no_code():
    "A counter, and what was seen last."
    class Counts(After):
        seen = 0
        def forward(self, x):
            self.seen += len(x)
            self.last = super().forward(x)
            return self.last
    net = Counts(network(), helper)
    codes = {code_of(net, looks()) for _ in range(3)}
    assert len(codes) == 1 and has_own_code(net) and not has_own_code(network())


def test_evaluations_of_other_code_are_not_gone_on_with(tmp_path):
    "A run folder that holds the batches of a model before its code was changed."
    pixels = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator(0, 'pixels'))
    images = ImageSet(pixels, torch.arange(12)//3, tuple('abcd'))
    given = dict(eps=.1, step_size=.05, steps=3, backend='torch', show=False, run=Run(tmp_path/'run'))
    blind, mended = evaluate(Rounded(False), images, **given), evaluate(Rounded(True), images, **given)
    del given['run']
    assert mended.after == evaluate(Rounded(True), images, **given).after != blind.after


def test_a_hardening_of_other_code_is_not_quoted(photos, tmp_path):
    few = dict(size=16, steps=2, limit=4, attacks='ES', epochs=1, pairs=4, inner_steps=1, show=False, out=tmp_path)
    found = {}
    for passes in (False, True):
        done = harden(Rounded(passes), photos, **few)
        found[passes] = json.loads((done.page.parent/'results.json').read_text())['run'], checksum(done.model)
    assert found[False][0] != found[True][0] and found[False][1] != found[True][1]


class InPlace(nn.Module):
    "Standardises its images where they are."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.sub_(.5).div_(.25))


class Standard(InPlace):
    def forward(self, x): return self.net((x - .5)/.25)


def test_a_model_that_changes_its_images_in_place_gets_a_copy(photos, tmp_path):
    found = audit(InPlace(network()), photos, out=tmp_path/'a', **FEW)
    true = audit(Standard(network()), photos, out=tmp_path/'b', **FEW)
    assert found.results['evaluation']['after'] == pytest.approx(true.results['evaluation']['after'], abs=1e-4)
    assert found.results['worst'] == true.results['worst']
    assert 'changes its images in place' in found.page.read_text()
    x = looks()
    before = x.clone()
    embed(InPlace(network()), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize('length', [1e20, 1e25, 1e36])
def test_long_embeddings_have_a_direction(length, photos, tmp_path):
    "The same numbers as at an ordinary length, gradients included."
    true, far = network(), After(network(), lambda z: z*length)
    x = looks()
    with torch.no_grad(): torch.testing.assert_close(embed(far, x), embed(true, x), rtol=0, atol=1e-5)
    found = [audit(m, photos, out=tmp_path/str(k), **FEW).results for k, m in enumerate((true, far))]
    assert found[1]['evaluation']['after'] == pytest.approx(found[0]['evaluation']['after'], abs=.01)


def test_short_embeddings_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match='long enough to be compared in single precision'):
        audit(After(network(), lambda z: z*1e-30), photos, out=tmp_path, **SMALL)


def script(freeze=False):
    net = torch.jit.script(network())
    return torch.jit.freeze(net) if freeze else net


def made_for_inference():
    with torch.inference_mode(): return network()


FORMS = dict(
    script=script, frozen=lambda: script(True), nested=lambda: nn.Sequential(script(), nn.Identity()),
    nested_frozen=lambda: nn.Sequential(script(True), nn.Identity()),
    compiled=lambda: torch.compile(network(), backend='eager'), inference=made_for_inference,
    parametrized=lambda: weight_normed(),
)


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_a_model_gives_its_numbers(form, photos, tmp_path):
    "And is left as it was."
    few = SMALL | dict(attacks='ES,LTM nearest')
    model = FORMS[form]()
    true = audit(network(), photos, out=tmp_path/'true', **few).results['evaluation']['after']
    with torch.no_grad(): before = model(looks())
    found = audit(model, photos, out=tmp_path/'found', **few).results['evaluation']['after']
    assert found == pytest.approx(true, abs=1e-2)
    with torch.no_grad(): assert torch.equal(model(looks()), before)


def weight_normed():
    net = network()
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def test_two_frozen_scripts_are_two_models():
    "Their weights are no state; they are in the graph."
    one, two = (torch.jit.freeze(torch.jit.script(network(seed=s))) for s in (0, 1))
    assert checksum(one) == checksum(two) and code_of(one, looks()) != code_of(two, looks())


def test_layers_that_wait_for_an_image_are_named(photos, tmp_path):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r'found 2 that wait for a first image \(1.weight'):
        audit(lazy, photos, out=tmp_path, **SMALL)
    assert isinstance(lazy[1], nn.LazyLinear)


def test_quantised_layers_have_no_gradient(photos, tmp_path):
    net = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
    with pytest.raises(ValueError, match='model must be differentiable by its images'):
        audit(net, photos, out=tmp_path, **SMALL)


class Closed(nn.Module):
    "Keeps its features by a closure: a copy would read those of the original."
    def __init__(self):
        super().__init__()
        self.net = network()
        self.net.register_forward_hook(lambda m, i, o: setattr(self, 'kept', o))
    def forward(self, x):
        self.net(x)
        return self.kept*1


def test_a_copy_that_is_another_function_is_refused(photos, tmp_path):
    "Measured as it is, but neither trained nor widened."
    assert audit(Closed(), photos, out=tmp_path, **SMALL | dict(attacks='ES', limit=2)).page.is_file()
    few = dict(size=16, steps=2, limit=4, attacks='ES', epochs=1, pairs=4, inner_steps=1, show=False, out=tmp_path)
    with pytest.raises(ValueError, match='a copy of the model must be the same function|can be copied'):
        harden(Closed(), photos, **few)
    with pytest.raises(ValueError, match='a copy of the model must be the same function|can be copied'):
        audit(Closed().half(), photos, out=tmp_path/'half', **SMALL)


@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_norms_can_be_hardened(norm, photos, tmp_path):
    net = network()
    norm(net[0])
    net(looks()).sum().backward() # leaves a weight that is no leaf
    few = dict(size=16, steps=2, limit=4, attacks='ES', epochs=1, pairs=4, inner_steps=1, show=False, out=tmp_path)
    assert harden(net, photos, **few).weights.is_file()


def test_frozen_takes_scripts_and_refuses_inference_weights():
    net = script()
    with frozen(net): assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match='made under torch.inference_mode'), frozen(made_for_inference()): pass
