"""Several processes against one: trainings, evaluations, searches and faults of two real processes.

Started by `torchrun`, this file is the program of the processes: it does the work of `REMOTE` and writes what it found.
"""
import json, os, signal, socket, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from robust_dml.data import sets as data
from robust_dml.defenses import eat
from robust_dml.runs import processes
from robust_dml.attacks.suite import SUITE
from robust_dml.core import generator
from robust_dml.defenses.base import Clock, Defense, make_defense as make
from robust_dml.metrics.evaluate import evaluate
from robust_dml.metrics.parallel import knn_together
from robust_dml.neighbors import knn
from robust_dml.models.networks import build, embed, streamlined, train_mode
from robust_dml.runs.store import Run, read_lines
from robust_dml.defenses.train import train

INNER = dict(eps=.1, step_size=.05, steps=2, margin=.2)
# most gradients are clipped
PROXIES = dict(eps=.1, step_size=.05, steps=2, warm_epochs=0, clean_epochs=0, ramp_epochs=0, clip=.01)
DEFENSES = dict(
    natural=lambda: make('natural', margin=0.2, miner='semihard'), hm=lambda: make('hm', ics=0.5, **INNER),
    official=lambda: make('colo_tride', lam=2.0, profile='official', step_schedule='const', **INNER),
    paper=lambda: make('colo_tride', lam=2.0, profile='paper', step_schedule='const', **INNER),
    free=lambda: make('free', eps=0.1, step_size=0.05, margin=0.2, repeats=2),
    # nine images are moved
    library=lambda: make(
        'library_loss', loss='MultiSimilarityLoss', eps=0.1, step_size=0.05, steps=2, moved='first', clean_weight=0.5
    ),
    tuples=lambda: make('tuples', attack_rate=0.5, **INNER),
    eat=lambda: make('eat', members=2, split_unit='class', **PROXIES),
    gal=lambda: make('gal', members=2, **PROXIES),  # with gradients of gradients
)
OPTIONS = dict(pairs=9, lr=1e-3, seed=0, show=False)    # 18 images: two batches in an epoch


def images():
    "Noisy copies of random patterns: 18 for training, 12 for tests."
    gen = generator(0, 'ranks')
    kinds = torch.randint(256, (10, 1, 28, 28), generator=gen).repeat_interleave(3, 0)
    pixels = (.5*kinds + 60*torch.randn(30, 1, 28, 28, generator=gen) + 60).clamp(0, 255).to(torch.uint8)
    return data.Split(
        'patterns',
        *(
            data.ImageSet(pixels[rows], torch.arange(n).repeat_interleave(3), tuple('abcdef'[:n]))
            for rows, n in ((slice(18), 6), (slice(18, None), 4))
        ),
    )


def network(defense):
    if isinstance(defense, eat.ProxyDefense):
        return eat.ensemble('small', members=2, classes=6, dim=8, size=28, channels=1, seed=0).double()
    return build('small', dim=8, size=28, channels=1, seed=0).double()


def trained(name, **options):
    "Embeddings of the test images after a training, and its log."
    defense, sets = DEFENSES[name](), images()
    net = network(defense)
    done = train(net, sets.train, defense, **{**OPTIONS, 'epochs': 1, **options})
    with torch.no_grad(): emb = embed(net.eval(), sets.test.batch(torch.arange(len(sets.test)), dtype=torch.float64))
    return dict(emb=emb.tolist(), log=done['log'], updates=done['updates'])


def failing(defense, at, who=None):
    "The same defence, failing at update `at`, in all processes or in one."
    def step(model, x, label, *, state, clock, gen):
        if clock.update == at and who in (None, processes.process_index()):
            raise ZeroDivisionError('a fault of the test')
        return defense.step(model, x, label, state=state, clock=clock, gen=gen)
    return Defense(name=defense.name, options=defense.options, init=defense.init, step=step)


def cut_off(folder):
    "A training of three epochs that all processes lose in the third."
    defense = DEFENSES['hm']()
    try: train(network(defense), images().train, failing(defense, 5), run=Run(folder/'cut'), epochs=3, **OPTIONS)
    except ZeroDivisionError: return sorted(p.name for p in (folder/'cut').iterdir())


def stored(folder):
    "A training with a run folder, asked for twice."
    train(network(DEFENSES['hm']()), images().train, DEFENSES['hm'](), run=Run(folder/'stored'), epochs=1, **OPTIONS)
    again = network(DEFENSES['hm']())
    log = train(again, images().train, DEFENSES['hm'](), run=Run(folder/'stored'), epochs=1, **OPTIONS)['log']
    return dict(files=sorted(p.name for p in (folder/'stored').iterdir()), log=log)


def deep(x, shared):
    """Embedding and gradients of a network with BatchNorm, in training mode and folded, in the memory layout of
    training."""
    net = build('resnet18', dim=8, size=32, channels=1, seed=0).double().to(memory_format=torch.channels_last)
    with processes.spread(*[net]*shared):
        emb = embed(train_mode(net), x)
        grads = torch.autograd.grad(emb.square().matmul(torch.arange(8.).double()).sum(), list(net.parameters()))
        folded = streamlined(net)
        assert len(folded.folds) > 10 and type(folded) is type(net)
        return [emb, embed(folded, x), *grads]


ATTACK = dict(
    attacks={name: SUITE[name] for name in ('ES', 'CA+', 'LTM')}, eps=32 / 255, step_size=8 / 255, steps=2, show=False,
    backend='torch'
)


def evaluated(run=None, batch_size=5, dtype=torch.float64):
    "All that does not depend on the clock."
    # twelve queries in three batches
    found = asdict(evaluate(network(None).to(dtype), images().test, run=run, batch_size=batch_size, **ATTACK))
    return {k: v for k, v in found.items() if k not in ('seconds', 'parts')}


def counted():
    "Bytes that a process receives in one update of ACT with sixteen images, and what `traffic` says."
    net, sent, plain = network(None), dict(all_gather=0, all_reduce=0), (dist.all_gather, dist.all_reduce)
    def gather(out, part):
        sent['all_gather'] += sum(o.nbytes for o in out) - part.nbytes
        return plain[0](out, part)
    def reduce(value):
        sent['all_reduce'] += value.nbytes    # twice half of it
        return plain[1](value)
    x, label = images().train.batch(torch.arange(16), dtype=torch.float64), torch.arange(8).repeat_interleave(2)
    try:
        dist.all_gather, dist.all_reduce = gather, reduce
        with processes.spread(net):
            step = make('act', **INNER).step(net, x, label, state={}, clock=Clock(0, 1), gen=generator(0, 'draw'))
            step.loss.backward()
    finally: dist.all_gather, dist.all_reduce = plain
    moved = round(step.log['image_steps']/2)
    said = processes.traffic(
        clean=16, moved=moved, update=3 * moved // 2, steps=2, dim=8, pixels=28 * 28,
        weights=sum(p.numel() for p in net.parameters()), processes=2, itemsize=8
    )
    return [sent['all_gather'], said['embeddings'] + said['images'], sent['all_reduce'], said['weights']]


def refusals():
    "What several processes do not do."
    net, found = build('resnet18', dim=8, size=32, channels=1, seed=0), []
    with processes.spread(net):
        try: net.train()(torch.zeros(4, 1, 32, 32))
        except ValueError as error: found.append(str(error))
    other = build('small', dim=8, size=28, channels=1, seed=processes.process_index())
    try: train(other, images().train, DEFENSES['natural'](), epochs=1, **OPTIONS)
    except RuntimeError as error: found.append(str(error))
    return found


def work(folder):
    "What the two processes do; process 0 writes it."
    with processes.joined('cpu', processes=2, only_first=True):
        found = dict(
            index=processes.everyone([processes.process_index(), processes.process_count(), processes.leads()]),
            agreed=processes.everyone(processes.agreed(processes.process_index())),
            parts=processes.everyone(
                processes.gathered(
                    torch.full((2 + processes.process_index(), 2), processes.process_index()), [2, 3]
                ).tolist()
            ),
        )
        found |= {name: trained(name) for name in DEFENSES}
        found |= dict(cut_off=cut_off(folder), stored=processes.everyone(stored(folder)), refusals=refusals())
        x = torch.rand(5, 1, 32, 32, generator=generator(0, 'x'), dtype=torch.float64)
        found['deep'] = max((a - b).abs().max().item() for a, b in zip(deep(x, 0), deep(x, 1)))
        found |= dict(
            evaluated=evaluated(Run(folder / 'eval')), one_batch=evaluated(batch_size=50),
            single=evaluated(dtype=torch.float32), counted=counted()
        )
        emb = torch.randn(23, 4, generator=generator(0, 'shards'), dtype=torch.float64)
        found['search'] = knn_together(emb, emb.split([20, 3])[processes.process_index()], k=5, rows=torch.arange(23))[
            1
        ].tolist()
        found['same'] = processes.everyone(found)
    found['threads'] = [task.read_text().strip() for task in Path('/proc/self/task').glob('*/comm')]
    first, second = found.pop('same')
    # process 1 has ended
    (folder/'found.json').write_text(json.dumps(found | dict(same=first == second, left=processes.process_count())))


def fault(folder):
    "One of two processes fails in the second epoch."
    with processes.joined('cpu', processes=2):
        defense = DEFENSES['natural']()
        train(
            network(defense), images().train, failing(defense, 3, who=1), run=Run(folder / 'fault'), epochs=3, **OPTIONS
        )


def launched(folder):
    "In each of two processes that accelerate has started."
    with processes.joined('cpu', processes=2):
        (folder / f'launched.{processes.process_index()}').write_text(
            json.dumps(processes.everyone(processes.process_index()))
        )


# the tests

ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('ranks')


@pytest.fixture(scope='module')
def found(folder):
    "What two processes found, started once."
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', __file__, str(folder)
    ]
    made = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr[-3000:]
    return json.loads((folder/'found.json').read_text())


def close(a, b, within=1e-10): return (torch.tensor(a).double() - torch.tensor(b).double()).abs().max() < within


def test_processes_know_each_other(found):
    assert found['index'] == [[0, 2, True], [1, 2, False]] and found['agreed'] == [0, 0]
    assert found['parts'] == [[[0, 0]]*2 + [[1, 1]]*3]*2


@pytest.mark.parametrize('name', DEFENSES)
def test_two_processes_train_as_one(found, name):
    "Embeddings after two updates in float64, and the log."
    one, two = trained(name), found[name]
    assert close(one['emb'], two['emb']) and two['updates'] == 2
    for a, b in zip(one['log'], two['log']):
        assert a.keys() == b.keys()
        for key in a: assert b[key] == pytest.approx(a[key], abs=1e-9, nan_ok=True), key
    untrained = network(DEFENSES[name]())
    with torch.no_grad(): before = embed(untrained, images().test.batch(torch.arange(12), dtype=torch.float64))
    assert not close(before.tolist(), two['emb'], 1e-4)


def test_every_process_has_the_same_results(found): assert found['same']


def test_only_the_first_goes_on(found): assert found['left'] == 1


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='this system does not list the threads of a process')
def test_no_thread_of_the_connection_outlives_it(found):
    "One that did would end the program with an abort, by chance, while Python shuts down."
    assert found['threads'] and not [name for name in found['threads'] if 'gloo' in name]


def test_a_gallery_in_two_processes(found):
    "Five neighbours of which the smaller part of the gallery has three."
    emb = torch.randn(23, 4, generator=generator(0, 'shards'), dtype=torch.float64)
    assert found['search'] == knn(emb, emb, k=5, rows=torch.arange(23))[1].tolist()


def test_resume_with_another_number_of_processes(found, folder):
    "Two processes lose the third epoch, one process makes it."
    assert found['cut_off'] == ['checkpoint-2.safetensors', 'checkpoint.json']
    whole, resumed = (network(DEFENSES['hm']()) for _ in range(2))
    log = train(whole, images().train, DEFENSES['hm'](), epochs=3, **OPTIONS)['log']
    done = train(resumed, images().train, DEFENSES['hm'](), run=Run(folder/'cut'), epochs=3, **OPTIONS)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()): assert close(a.tolist(), b.tolist())
    assert [row['loss'] for row in done['log']] == pytest.approx([row['loss'] for row in log], abs=1e-10)


def test_one_process_writes_and_all_read(found):
    assert found['stored'][0] == found['stored'][1] and found['stored'][0]['files'] == [
        'model.safetensors', 'result.json'
    ]


def test_deep_networks(found): assert 0 <= found['deep'] < 1e-9


def test_refusals(found):
    batch, weights = found['refusals']
    assert 'fixed statistics, found statistics of the batch' in batch
    assert weights.startswith(
        'initial weights and training labels must be the same in all processes, found others in process 1 than in'
        ' process 0'
    )


def test_traffic_is_what_travels(found):
    assert found['counted'][::2] == found['counted'][1::2] and min(found['counted']) > 0


def test_two_processes_evaluate_as_one(found, folder):
    "The same records in the same order, with batches for all and with one batch for two."
    one = evaluated(Run(folder/'alone'))
    assert json.loads(json.dumps(one)) == found['evaluated']
    assert json.loads(json.dumps(evaluated(batch_size=50))) == found['one_batch']
    records, alone = (read_lines(Run(folder/name), 'queries.jsonl') for name in ('eval', 'alone'))
    for r in (*records, *alone): assert r.pop('seconds') > 0
    assert records == alone and [(r['attack'], r['start']) for r in records] == [
        (a, i) for a in ATTACK['attacks'] for i in (0, 5, 10)
    ]


def test_two_processes_evaluate_as_one_in_single_precision(found):
    "Percentages within half a point, all other numbers within .005; the targets are the same."
    one, two = evaluated(dtype=torch.float32), found['single']
    for part in ('benign', 'before', 'after'):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert two[part][name] == pytest.approx(value, abs=.005 if name in ('TMA', 'ES:D') else .5), (part, name)


def test_one_process_goes_on_with_an_evaluation_of_two(found, folder):
    "The last records are lost in the middle of a line."
    path = folder/'eval'/'queries.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    assert json.loads(json.dumps(evaluated(Run(folder/'eval')))) == found['evaluated']
    # what was there is not measured again
    assert path.read_bytes().startswith(whole[:whole[:len(whole)//2].rindex(b'\n')])


def test_a_fault_in_one_process_ends_both(folder):
    "Without a launcher that would end the others: the one that waits is told, and the last whole epoch is kept."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2')
    made = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), 'fault'], env=ENVIRONMENT | address | dict(RANK=str(i)),
            stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in made]
    assert all(process.returncode for process in made)
    assert (
        'ProcessLost: expected an answer from every process of this run' in said[0]
        and 'ZeroDivisionError: a fault of the test' in said[1]
    )
    assert Run(folder/'fault').read('checkpoint.json')['epoch'] == 1


def test_launch_from_a_notebook(folder):
    pytest.importorskip('accelerate', reason='the launch from a notebook needs accelerate')
    made = subprocess.run(
        [sys.executable, __file__, str(folder), 'launch'], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert [json.loads((folder/f'launched.{i}').read_text()) for i in range(2)] == [[0, 1], [0, 1]], made.stderr[-3000:]


def test_a_launcher_that_starts_one_process_is_noticed(monkeypatch):
    "The function is not called, also when it does not ask for a number of processes itself."
    accelerate = pytest.importorskip('accelerate', reason='the launch from a notebook needs accelerate')
    called = []
    monkeypatch.setattr(accelerate, 'notebook_launcher', lambda function, args, **_: function(*args))
    with pytest.raises(RuntimeError, match='expected 2 processes, found 1'):
        processes.launch(called.append, 1, processes=2)
    assert not called
    processes.launch(called.append, 1, processes=1)
    assert called == [1]


if __name__ == '__main__':
    asked, place = sys.argv[2:], Path(sys.argv[1])
    processes.launch(launched, place, processes=2) if asked == ['launch'] else fault(place) if asked else work(place)


def test_a_process_that_waits_for_a_peer_hears_signals_and_says_so():
    code = (
        'import functools, signal, sys, robust_dml.runs.processes as p\n'
        'signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n' # heard between two steps of Python alone
        'p._meet = functools.partial(p._meet, patience=.2)\n'
        'with p.joined(): pass'
    )
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2', RANK='0')
    waits = subprocess.Popen(
        [sys.executable, '-c', code], env=ENVIRONMENT | address, stderr=subprocess.PIPE, text=True
    )
    for line in waits.stderr:
        if 'waiting at 127.0.0.1' in line: break
    waits.send_signal(signal.SIGTERM)
    assert waits.wait(30) == 3
