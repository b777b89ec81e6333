"Backbones by name: those of torchvision and timm, and a user's own."
import sys

import pytest
import torch
from torch import nn

from robust_dml.core import BACKBONES
from robust_dml.defenses.base import make_defense
from robust_dml.defenses.train import train
from robust_dml.data.sets import glyphs
from robust_dml.models.networks import IMAGENET, backbone_named, build, embed
from robust_dml.study import experiments

TOWER = '''
from torch import nn

def tower(size, channels): return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
def flat(): return nn.Conv2d(1, 4, 3)
def nothing(): return 3
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'tower_lab.py').write_text(TOWER)
    yield tmp_path
    sys.modules.pop('tower_lab', None)


@pytest.mark.parametrize('name', ['resnet34', 'mobilenet_v3_small', 'regnet_y_400mf'])
def test_any_network_of_torchvision(name):
    nets = [build(f'torchvision:{name}', dim=8, size=64, channels=3, seed=s) for s in (0, 0, 1)]
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    a, b, c = (embed(net.eval(), x) for net in nets)
    assert a.shape == (2, 8) and torch.equal(a, b) and not torch.allclose(a, c)
    # a network in training is the one that the attack saw but for BatchNorm: nothing is drawn
    chance = [m for m in nets[0].modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    assert not chance and torch.allclose(nets[0].mean.flatten(), torch.tensor(IMAGENET[0]))


def test_any_network_of_timm():
    pytest.importorskip('timm')
    net = build('timm:resnet10t', dim=8, size=64, channels=1, seed=0)
    assert embed(net.eval(), torch.rand(2, 1, 64, 64)).shape == (2, 8) and net.head.in_features == 512
    assert backbone_named('timm:vit_tiny_patch16_224').constants == ((.5,)*3, (.5,)*3)
    with pytest.raises(ValueError, match="timm must have the network, found no 'resnet10x'; did you mean"):
        build('timm:resnet10x', dim=8, size=64, channels=3, seed=0)


def test_an_own_backbone_trains_and_its_source_is_in_the_address(lab):
    split = glyphs(train_classes=4, test_classes=4, per_class=4)
    net = build('tower_lab:tower', dim=8, size=28, channels=1, seed=0)
    train(net, split.train, make_defense('natural', margin=.2), epochs=1, pairs=8, lr=1e-3, show=False)
    p = dict(preset='smoke', backbone='tower_lab:tower', backend='torch', defenses='natural')
    plan = experiments.plan('table1', experiments.parameters(p))
    cell = next(experiments.cells(plan))
    before = experiments.trained_as(plan, cell).address
    (lab/'tower_lab.py').write_text(TOWER + '\n#')
    assert experiments.trained_as(plan, cell).address != before and backbone_named('small').code == ''


@pytest.mark.parametrize(
    'name, kind, message',
    [
        ('resnet81', ValueError, "backbone must be one of small, c2f2, .* found 'resnet81'; did you mean 'resnet18'"),
        ('torchvision:resnet43', ValueError, "torchvision must have the network, found no 'resnet43'; did you mean"),
        ('torchvision:alexnet', ValueError, 'torchvision:alexnet must take images of 1 x 28 x 28, found RuntimeError'),
        ('tower_lab:towers', ValueError, "tower_lab must have towers, found no such name; did you mean 'tower'"),
        ('tower_lab:flat', ValueError, r'flat must give features of shape \(2, F\) .* found shape \(2, 4, 26'),
        ('tower_lab:nothing', TypeError, 'tower_lab:nothing must return a torch.nn.Module .* found int'),
        ('nobody_xyz:tower', ValueError, 'expected a module nobody_xyz, found none'),
    ],
)
def test_backbones_that_do_not_do(lab, name, kind, message):
    with pytest.raises(kind, match=message) as error: build(name, dim=8, size=28, channels=1, seed=0)
    assert '\n' not in str(error.value)


def test_the_named_ones():
    assert BACKBONES.names()[:3] == ('small', 'c2f2', 'resnet18') and BACKBONES['convnext_tiny'].least == 32
