"""Weight files as trainers leave them, and networks of torchvision and timm with a last layer of the user's own."""
import argparse
import os
import pathlib
from collections import OrderedDict

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from robust_dml.audit import measure
from robust_dml.audit.hardening import portable
from robust_dml.audit.measure import load_model, notes_of
from robust_dml.core import generator
from robust_dml.models.weights import fill, kind_of, read_checkpoint


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def prefixed(state, prefix): return {f'{prefix}{k}': v for k, v in state.items()}


STATE = small().state_dict()
FILES = {
    'plain': STATE,
    'container': dict(epoch=3, state_dict=STATE, optimizer=dict(state={}, lr=.1)),
    'model': dict(model=STATE, best=numpy.float64(.5), scores=numpy.ones(3), args=argparse.Namespace(lr=1)),
    'model_state_dict': dict(model_state_dict=STATE, out=pathlib.PurePosixPath('/x')),
    'net': dict(net=prefixed(STATE, 'module.')),
    'averaged only': dict(state_dict_ema=STATE, epoch=1),
    'nested': dict(model=dict(state_dict=prefixed(STATE, 'backbone.'))),
    'lightning': dict(state_dict=prefixed(STATE, 'model.'), hyper_parameters=dict(lr=.1), loops={'fit': {}}),
    'parallel': prefixed(STATE, 'module.'),
    'compiled': prefixed(STATE, '_orig_mod.'),
    'both': prefixed(STATE, 'module._orig_mod.'),
    'compiled part': {k.replace('norm.', 'norm._orig_mod.'): v for k, v in STATE.items()},
    'own name': prefixed(STATE, 'image_tower.trunk.'),
    'with a loss': prefixed(STATE, 'model.') | {'criterion.proxies': torch.rand(7, 2)},
    'no counters': {k: v for k, v in STATE.items() if 'num_batches' not in k},
}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('suffix, old', [('.pth', False), ('.ckpt', True), ('.safetensors', False)])
def test_checkpoints_of_trainers(name, suffix, old, tmp_path):
    "Whatever it is called and whatever holds it; what was found where is said."
    torch.save(FILES[name], tmp_path/f'w{suffix}', _use_new_zipfile_serialization=not old)
    net = small(1)
    notes = fill(net, tmp_path/f'w{suffix}')
    assert same(net, small()) and bool(notes) == (name not in ('plain', 'compiled', 'compiled part', 'no counters'))


def test_safetensors_by_any_name(tmp_path):
    save_file(prefixed(STATE, 'model.'), tmp_path/'w.pt')
    net = small(1)
    fill(net, tmp_path/'w.pt')
    assert same(net, small()) and kind_of(tmp_path/'w.pt') == 'safetensors'


@pytest.mark.parametrize(
    'value, message',
    [
        (prefixed(STATE, 'backbone.') | {'head.weight': torch.rand(8, 2)}, 'it is another function'),
        (prefixed(STATE, 'query.') | prefixed(STATE, 'key.'), "'key.' and 'query.'"),
        (STATE | {'more.weight': torch.rand(2)}, 'found 1 missing, unknown or misshaped'),
        (dict(epoch=3, optimizer=dict(lr=.1)), 'found a dict without any'),
        ([1, 2], 'found a list without any'),
        ({'w': torch.ones(1).expand(10**8)}, 'stands for 400,000,000'),
    ],
    ids=('head', 'two', 'unknown', 'no tensors', 'list', 'repeats'),
)
def test_what_does_not_fit_is_refused(value, message, tmp_path):
    torch.save(value, tmp_path/'w.pth')
    net = small(1)
    with pytest.raises(ValueError, match=message): fill(net, tmp_path/'w.pth')
    assert same(net, small(1))


@pytest.mark.parametrize('where', ['value', 'beside', 'namespace', 'array'])
def test_nothing_in_a_file_is_run(where, tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    values = dict(
        value=Trap(), beside=dict(state_dict=STATE, extra=Trap()),
        namespace=dict(state_dict=STATE, args=argparse.Namespace(x=Trap())),
        array=dict(state_dict=STATE, args=numpy.array([Trap()], dtype=object))
    )
    torch.save(values[where], tmp_path/'w.pth')
    with pytest.raises(ValueError, match='cannot be read without running code in it'): read_checkpoint(tmp_path/'w.pth')
    assert not (tmp_path/'ran').exists()


def test_a_layer_that_changed_its_form_goes_by_its_version(tmp_path):
    "MNASNet asks in which version its weights were saved."
    net = models.mnasnet0_5(weights=None)
    for k, v in net.named_buffers():
        if k.endswith('running_var'): v.uniform_(.5, 2)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path/'w.safetensors')
    for name in ('w.pth', 'w.safetensors'):
        got = load_model('torchvision:mnasnet0_5', weights=str(tmp_path/name))
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in got.backbone.state_dict().items())


def resnet(length=64, **options):
    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    net.fc = nn.Linear(512, length, **options)
    return net.eval()


@pytest.mark.parametrize('options', [{}, dict(bias=False)])
def test_the_users_embedding_layer_is_kept(options, tmp_path):
    "Embeddings of its length; weights that come back fit strictly."
    net, x = resnet(**options), torch.rand(2, 3, 64, 64, generator=generator(0, 'x'))
    torch.save(dict(state_dict=prefixed(net.state_dict(), 'module.')), tmp_path/'w.pth')
    got = load_model('torchvision:resnet18', weights=str(tmp_path/'w.pth'), normalise='none')
    with torch.no_grad(): torch.testing.assert_close(got(x), net(x), rtol=0, atol=1e-6)
    assert 'The last layer fc of the weights, 64 numbers long, is kept' in ' '.join(notes_of(got))
    save_file({k: v.contiguous() for k, v in portable(got).state_dict().items()}, tmp_path/'back.safetensors')
    resnet(**options).load_state_dict(load_file(tmp_path/'back.safetensors'), strict=True)


def test_the_shipped_classifier_is_left_out_and_said(tmp_path):
    torch.save(resnet(1000).state_dict(), tmp_path/'w.pth')
    got = load_model('torchvision:resnet18', weights=str(tmp_path/'w.pth'))
    assert got(torch.rand(1, 3, 64, 64)).shape == (1, 512)
    assert 'The classifier in the weights was left out (fc.weight, fc.bias)' in ' '.join(notes_of(got))


@pytest.mark.parametrize(
    'head, message',
    [
        (nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64)), 'found fc.0.weight'),
        (nn.Linear(256, 64), r'found fc.weight \(64, 256\)'),
    ]
)
def test_a_head_of_several_layers_is_not_guessed(head, message, tmp_path):
    net = resnet()
    net.fc = head
    torch.save(net.state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match=message): load_model('torchvision:resnet18', weights=str(tmp_path/'w.pth'))


@pytest.mark.parametrize('name', ['vgg11', 'vit_b_32', 'mobilenet_v2', 'densenet121'])
def test_last_layers_of_torchvision(name, tmp_path):
    "Wherever the last layer is."
    net = getattr(models, name)(weights=None).eval()
    place, last = measure._named(net, nn.Linear)[-1]
    measure._replace(net, place, nn.Linear(last.in_features, 8))
    torch.save(net.state_dict(), tmp_path/'w.pth')
    x = torch.rand(1, 3, 224, 224)
    got = load_model(f'torchvision:{name}', weights=str(tmp_path/'w.pth'), normalise='none')
    with torch.no_grad(): assert torch.equal(got(x), net(x))


@pytest.mark.parametrize('name', ['googlenet', 'inception_v3'])
def test_networks_that_standardise_once_more_do_so_with_weights_of_a_file(name, tmp_path):
    "Auxiliary classifiers are left out; what torchvision does to the images of its own weights is done."
    net = getattr(models, name)(weights=None, init_weights=False)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    got = load_model(f'torchvision:{name}', weights=str(tmp_path/'w.pth'))
    assert got.backbone.transform_input and not any('aux' in k.lower() for k in got.state_dict())
    assert 'was left out' in ' '.join(notes_of(got))


class Distilled(nn.Module):
    "A network in timm's manner with two classifiers."
    default_cfg = dict(classifier=('head', 'head_dist'))
    pretrained_cfg = dict(mean=(.5, .4, .3), std=(.5, .4, .3))
    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
        self.reset_classifier(classes)
    def reset_classifier(self, classes):
        self.head, self.head_dist = (nn.Linear(6, classes) if classes else nn.Identity() for _ in range(2))
    def forward(self, x): return (self.head(self.body(x)) + self.head_dist(self.body(x)))/2


@pytest.mark.parametrize('length, kept', [(10, False), (4, True)])
def test_two_classifiers(length, kept, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, x = Distilled(length), torch.rand(2, 3, 8, 8)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    monkeypatch.setattr(measure, '_created', lambda *_: (Distilled(), False))
    got = load_model('timm:distilled', weights=str(tmp_path/'w.pth'), normalise='none')
    with torch.no_grad(): assert torch.allclose(got(x), net(x) if kept else net.body(x))
    assert ('head and head_dist' if kept else 'head.weight, head.bias, head_dist.weight') in ' '.join(notes_of(got))


def test_constants_are_those_of_the_network(monkeypatch):
    "Mean and standard deviation of its own configuration, said; ImageNet's only when asked for."
    monkeypatch.setattr(measure, '_created', lambda *_: (Distilled(), False))
    own, asked = load_model('timm:distilled'), load_model('timm:distilled', normalise='imagenet')
    assert own.mean.flatten().tolist() == pytest.approx([.5, .4, .3])
    assert own.std.flatten().tolist() == pytest.approx([.5, .4, .3])
    assert asked.mean.flatten().tolist() == pytest.approx([.485, .456, .406])
    assert 'mean 0.5, 0.4, 0.3 and standard deviation 0.5, 0.4, 0.3, as timm notes' in ' '.join(notes_of(own))


@pytest.mark.parametrize(
    'name, mean, length',
    [('vit_tiny_patch16_224', .5, 192), ('deit_tiny_distilled_patch16_224', .485, 192), ('levit_128s', .485, 384),
     ('resnet18.a1_in1k', .485, 512)]
)
def test_networks_of_timm(name, mean, length, tmp_path):
    timm = pytest.importorskip('timm')
    got = load_model(f'timm:{name}')
    assert got.mean.flatten()[0].item() == pytest.approx(mean)
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad(): assert got(x).shape == (2, length)
    for classes in (None, 32):
        net = timm.create_model(name, **({} if classes is None else dict(num_classes=classes))).eval()
        torch.save(dict(state_dict=net.state_dict()), tmp_path/'w.pth')
        got = load_model(f'timm:{name}', weights=str(tmp_path/'w.pth'), normalise='none')
        with torch.no_grad():
            assert got(x).shape == (2, classes or length)
            if classes: torch.testing.assert_close(got(x), net(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['m.pt', 'm.pth', 'm', 'm.torchscript'])
def test_scripts_are_known_by_their_content(name, tmp_path):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), torch.rand(2, 3, 2, 2)
    torch.jit.trace(net, x).save(tmp_path/name)
    with pytest.raises(ValueError, match='found trust not set'): load_model(str(tmp_path/name))
    assert torch.allclose(load_model(str(tmp_path/name), trust=True)(x), net(x))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.export.save(program, tmp_path/'e.pt2')
    (tmp_path/'e.pt2').rename(tmp_path/f'e-{name}')
    assert torch.allclose(load_model(str(tmp_path/f'e-{name}'), trust=True)(x), net(x))
    torch.save(net.state_dict(), tmp_path/name)
    with pytest.raises(ValueError, match='weights alone'): load_model(str(tmp_path/name), trust=True)
