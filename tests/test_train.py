"Training: seconds and their parts, resuming, failures that leave nothing running."
import itertools, math, threading

import numpy as np
import pytest
import torch

from robust_dml import core
from robust_dml.data import sets as data
from robust_dml.defenses import train as module
from robust_dml.core import generator
from robust_dml.defenses.base import Defense
from robust_dml.models.networks import build
from robust_dml.runs.store import Run, StoreError, load_tensors, save_tensors
from robust_dml.defenses.train import replay, train
from robust_dml.defenses.base import make_defense as make

OPTIONS = dict(epochs=3, pairs=12, lr=1e-3, seed=0, show=False)  # 36 images: three batches in an epoch


@pytest.fixture(scope='module')
def images(): return data.glyphs(train_classes=6, test_classes=2, per_class=6).train


@pytest.fixture
def ticking(monkeypatch):
    "A clock that goes on by a second whenever it is read: seconds count readings, on every machine alike."
    now = itertools.count()
    monkeypatch.setattr(
        module, 'Stopwatch',
        lambda device, seconds: core.Stopwatch(device, seconds=seconds, clock=lambda: float(next(now)))
    )


def fresh(): return build('small', dim=8, size=28, channels=1, seed=0)
def robust(): return make('hm', eps=.1, step_size=.05, steps=2, margin=.2, ics=.5)


def failing(defense, at, error=KeyboardInterrupt):
    "The same defence, failing at update `at`."
    def step(model, x, label, *, state, clock, gen):
        if clock.update == at: raise error
        return defense.step(model, x, label, state=state, clock=clock, gen=gen)
    return Defense(name=defense.name, options=defense.options, init=defense.init, step=step)


def test_parts_without_a_run(images, ticking):
    "Nine updates; each epoch also waits once for a batch that does not come."
    done = train(fresh(), images, robust(), **OPTIONS)
    assert done['parts'] == {'data': 9. + 3., 'defence': 9., 'update': 9.}
    assert done['seconds'] == 2*sum(done['parts'].values()) + 3  # a lap reads twice, an epoch's `seconds` once more


def test_parts_of_a_run(images, ticking, tmp_path):
    "A checkpoint after every epoch and the final weights."
    done = train(fresh(), images, robust(), run=Run(tmp_path), **OPTIONS)
    assert done['parts'] == {'data': 12., 'defence': 9., 'update': 9., 'checkpoint': 3. + 1.}
    assert Run(tmp_path).read('result.json')['parts'] == done['parts']
    # finished: nothing is added
    assert train(fresh(), images, robust(), run=Run(tmp_path), **OPTIONS)['parts'] == done['parts']
    assert sum(done['parts'].values()) < done['seconds'] < 2.2*sum(done['parts'].values()) + 2


def test_a_resumed_training_adds_up(images, ticking, tmp_path):
    """Killed in the third epoch: two epochs from the checkpoint and one new one; the second checkpoint's own lap is
    not in its file."""
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt): train(fresh(), images, failing(robust(), 7), run=run, **OPTIONS)
    kept = run.read('checkpoint.json')
    assert kept['epoch'] == 2 and kept['parts'] == {'data': 8., 'defence': 6., 'update': 6., 'checkpoint': 1.}
    done = train(fresh(), images, robust(), run=run, **OPTIONS)
    assert done['parts'] == {'data': 12., 'defence': 9., 'update': 9., 'checkpoint': 3.}
    assert done['seconds'] > kept['seconds'] + 6


def test_a_checkpoint_of_an_older_version_goes_on(images, tmp_path):
    "Without parts: the new ones are counted, the weights are those of an undisturbed training."
    run, whole, resumed = Run(tmp_path), fresh(), fresh()
    train(whole, images, robust(), **OPTIONS)
    with pytest.raises(KeyboardInterrupt): train(fresh(), images, failing(robust(), 7), run=run, **OPTIONS)
    kept = run.read('checkpoint.json')
    del kept['parts']
    run.write('checkpoint.json', kept)
    done = train(resumed, images, robust(), run=run, **OPTIONS)
    assert set(done['parts']) == {'data', 'defence', 'update', 'checkpoint'}
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()): assert torch.equal(a, b)


def test_fused_adam_is_adam(images):
    """Against the textbook update in float64 (L2 in the gradient, bias-corrected moments); 1e-9 is rounding of nine
    updates."""
    net, slow = fresh().double(), fresh().double()
    natural = make('natural', margin=.2, miner='semihard')
    train(net, images, natural, **OPTIONS, weight_decay=1e-2)
    moments, t = [[torch.zeros_like(p), torch.zeros_like(p)] for p in slow.parameters()], 0
    for epoch in range(3):
        draws = generator(0, 'defense', epoch)
        for rows in data.pair_batches(images.labels, pairs=12, gen=generator(0, 'pairs', epoch)):
            step = natural.step(
                slow, images.batch(rows, dtype=torch.float64), images.labels[rows], state={}, clock=None, gen=draws
            )
            grads, t = torch.autograd.grad(step.loss, list(slow.parameters())), t+1
            with torch.no_grad():
                for p, g, m in zip(slow.parameters(), grads, moments):
                    g = g + 1e-2*p
                    m[0], m[1] = .9*m[0] + .1*g, .999*m[1] + .001*g*g
                    p -= 1e-3*(m[0]/(1 - .9**t))/((m[1]/(1 - .999**t)).sqrt() + 1e-8)
    for a, b in zip(net.state_dict().values(), slow.state_dict().values()): assert (a - b).abs().max() < 1e-9


def mapped(images, folder):
    "The same images in a file, with a crop: batches are prepared ahead."
    pixels = np.memmap(folder/'pixels', np.uint8, 'w+', shape=tuple(images.images.shape))
    pixels[:] = images.images.numpy()
    return data.ImageSet(pixels, images.labels, images.classes, crop=24)


def test_preparing_ahead_changes_nothing(images, tmp_path):
    "Random windows, and a defence that draws in every step: equal bits with the images in memory and in a file."
    sets = mapped(images, tmp_path), data.ImageSet(images.images, images.labels, images.classes, crop=24)
    nets = [build('small', dim=8, size=24, channels=1, seed=0) for _ in sets]
    logs = [train(net, s, robust(), **OPTIONS)['log'] for net, s in zip(nets, sets)]
    assert logs[0] == logs[1]
    for a, b in zip(*(net.state_dict().values() for net in nets)): assert torch.equal(a, b)


def test_windows_do_not_depend_on_the_defence(images):
    "Augmentation has a stream of its own: a defence that draws more sees the same images."
    crops = data.ImageSet(images.images, images.labels, images.classes, crop=20)
    def seen(draws):
        found, natural = [], make('natural', margin=.2)
        def step(model, x, label, *, state, clock, gen):
            torch.rand(draws, generator=gen)
            found.append(x)
            return natural.step(model, x, label, state=state, clock=clock, gen=gen)
        train(build('small', dim=8, size=20, channels=1, seed=0), crops, Defense('greedy', {}, dict, step), **OPTIONS)
        return torch.cat(found)
    expected = []
    for epoch in range(3):
        looks = generator(0, 'augment', epoch)
        expected += [
            crops.augment(rows, looks)
            for rows in data.pair_batches(crops.labels, pairs=12, gen=generator(0, 'pairs', epoch))
        ]
    assert torch.equal(seen(0), torch.cat(expected)) and torch.equal(seen(5), torch.cat(expected))


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_failures_leave_no_thread(images, tmp_path, error):
    with pytest.raises(error) as caught:
        train(
            build('small', dim=8, size=24, channels=1, seed=0), mapped(images, tmp_path), failing(robust(), 1, error),
            **OPTIONS
        )
    assert 'prefetch' not in [t.name for t in threading.enumerate()], caught  # also while the traceback is held


def test_a_loss_that_is_not_finite_stops_before_the_update(images):
    net, whole = fresh(), fresh()
    natural = make('natural', margin=.2)
    def step(model, x, label, *, state, clock, gen):
        found = natural.step(model, x, label, state=state, clock=clock, gen=gen)
        return found._replace(loss=found.loss*(torch.inf if clock.update else 1))
    with pytest.raises(FloatingPointError, match='expected a finite loss, found inf at epoch 0, batch 1 of broken'):
        train(net, images, Defense('broken', {}, dict, step), **OPTIONS)
    with pytest.raises(KeyboardInterrupt): train(whole, images, failing(natural, 1), **OPTIONS)
    for a, b in zip(net.state_dict().values(), whole.state_dict().values()): assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_deep_network_resumes_bit_by_bit_and_keeps_its_memory_layout(images, tmp_path, precision):
    "Weights and moments of a network with BatchNorm live with the channels last while it trains."
    def deep(): return build('resnet18', dim=8, size=28, channels=1, seed=0)
    options = dict(OPTIONS, epochs=2, pairs=18, precision=precision)
    whole, broken = deep(), deep()
    train(whole, images, make('act', eps=.1, step_size=.05, steps=2, margin=.2), **options)
    with pytest.raises(KeyboardInterrupt):
        train(
            broken, images, failing(make('act', eps=0.1, step_size=0.05, steps=2, margin=0.2), 3), run=Run(tmp_path),
            **options
        )
    assert all(p.is_contiguous() for p in broken.parameters())
    resumed = deep()
    train(resumed, images, make('act', eps=.1, step_size=.05, steps=2, margin=.2), run=Run(tmp_path), **options)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in resumed.parameters())


def test_half_precision_trains_and_an_unknown_one_is_refused(images):
    full, half = (
        train(fresh(), images, robust(), precision=p, **OPTIONS)['log'][-1]['loss'] for p in ('float32', 'bfloat16')
    )
    assert full != half and half == pytest.approx(full, rel=.1)
    with pytest.raises(ValueError, match="'float32', 'bfloat16', found 'half'"):
        train(fresh(), images, robust(), precision='half', **OPTIONS)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_the_update_that_broke_is_kept_and_repeats(images, tmp_path, what):
    "The batch, the weights and the random numbers of the failure are stored; the epochs before it stay."
    def step(model, x, label, *, state, clock, gen):
        out = robust().step(model, x, label, state=state, clock=clock, gen=gen)
        lucky = torch.rand((), generator=gen)
        if clock.update < 4: return out
        return out._replace(
            loss=(
                out.loss * math.nan
                if what == 'loss'
                else out.loss * 0 + (out.loss - out.loss.detach()).abs().sqrt() * lucky
            )
        )
    broken, run, net = Defense('broken', {}, robust().init, step), Run(tmp_path), fresh()
    with pytest.raises(FloatingPointError, match=f'expected a finite {what}, found'):
        train(net, images, broken, run=run, **OPTIONS)
    fault = run.read('fault.json', 'rows', 'clock', 'message')
    assert (
        fault['clock']['update'] == 4
        and f'finite {what}' in fault['message']
        and all(0 <= r < len(images) for r in torch.tensor(fault['rows']).flatten().tolist())
    )
    loss, norm = replay(run, fresh(), broken)
    assert math.isnan(loss) if what == 'loss' else math.isfinite(loss) and not math.isfinite(norm)
    assert run.read('checkpoint.json')['epoch'] == 4//math.ceil(len(images)/OPTIONS['pairs'])
    # the next training goes on from the whole epoch, and clears up
    assert math.isfinite(train(fresh(), images, robust(), run=run, **OPTIONS)['log'][-1]['loss']) and not run.has(
        'fault.json'
    )


def test_weights_of_another_model_are_refused(images, tmp_path):
    "A file with a valid hash and other names."
    run = Run(tmp_path)
    done = train(fresh(), images, robust(), run=run, **OPTIONS)
    run.write(
        'result.json',
        dict(run.read('result.json'), sha256=save_tensors(run, 'model.safetensors', {'other': torch.zeros(2)}))
    )
    with pytest.raises(StoreError, match='expected the weights of this model in .*found other names or shapes'):
        train(fresh(), images, robust(), run=run, **OPTIONS)
    assert done['log']


def test_too_little_memory_says_what_to_do(images, tmp_path):
    run = Run(tmp_path)
    with pytest.raises(
        RuntimeError, match='expected room for 12 pairs of images on cpu, found too little; take fewer pairs'
    ):
        train(fresh(), images, failing(robust(), 4, torch.OutOfMemoryError('full')), run=run, **OPTIONS)
    assert run.read('checkpoint.json')['epoch'] == 1


@pytest.mark.parametrize('optimizer', ['adam', 'adamw', 'sgd'])
@pytest.mark.parametrize('schedule', ['const', 'cosine'])
def test_every_optimiser_resumes_bit_by_bit(images, tmp_path, optimizer, schedule):
    "Cut off in the third epoch: the moments and the rates of both parameter groups are those of an undisturbed run."
    options = dict(OPTIONS, optimizer=optimizer, schedule=schedule, head_lr=5e-3, weight_decay=1e-3)
    run, whole, resumed = Run(tmp_path), fresh(), fresh()
    train(whole, images, robust(), **options)
    with pytest.raises(KeyboardInterrupt): train(fresh(), images, failing(robust(), 7), run=run, **options)
    train(resumed, images, robust(), run=run, **options)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()): assert torch.equal(a, b)


def test_the_head_has_a_rate_of_its_own(images):
    "With a rate of zero below the head only the head moves; the same rate for both changes nothing."
    still, moved, both, plain = fresh(), fresh(), fresh(), fresh()
    train(moved, images, robust(), **dict(OPTIONS, lr=0.), head_lr=1e-3)
    for (name, a), b in zip(still.named_parameters(), moved.parameters()):
        assert torch.equal(a, b) != name.startswith('head')
    train(both, images, robust(), **OPTIONS, head_lr=OPTIONS['lr'])
    train(plain, images, robust(), **OPTIONS)
    for a, b in zip(both.parameters(), plain.parameters()): assert torch.equal(a, b)


def test_a_checkpoint_with_the_older_names_goes_on(images, tmp_path):
    "Moments were once called adam.*."
    run, whole, resumed = Run(tmp_path), fresh(), fresh()
    train(whole, images, robust(), **OPTIONS)
    with pytest.raises(KeyboardInterrupt): train(fresh(), images, failing(robust(), 7), run=run, **OPTIONS)
    kept = run.read('checkpoint.json')
    tensors = load_tensors(run, kept['file'], kept['sha256'])
    older = {('adam' + k.removeprefix('optimizer') if k.startswith('optimizer.') else k): v for k, v in tensors.items()}
    run.write('checkpoint.json', dict(kept, sha256=save_tensors(run, kept['file'], older)))
    train(resumed, images, robust(), run=run, **OPTIONS)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()): assert torch.equal(a, b)
