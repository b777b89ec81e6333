"""Curves, indexes and layouts of `scale`, and its report at smoke size."""
import json
import math

import pytest
import torch

from robust_dml.study import scale
from robust_dml.core import generator
from robust_dml.triplets.distances import normalise
from robust_dml.study.scale import Attacked, Index, Job


def job(**changes):
    return Job(
        **(
            dict(
                name='x', images=112, steps=16, weights=10**7, dim=512, pixels=3 * 224 * 224, seconds=1e-3, updates=1000
            )
            | changes
        )
    )


def clustered(classes=40, each=50, dim=32):
    gen = generator(0, 'scale test')
    centres = normalise(torch.randn(classes, dim, generator=gen)).repeat_interleave(each, 0)
    return normalise(centres + 0.1 * torch.randn(len(centres), dim, generator=gen)), torch.arange(
        classes
    ).repeat_interleave(each)


def test_a_curve_knows_its_error():
    line = scale.curve([1000, 2000, 4000, 8000], [.011, .021, .041, .081])
    assert (
        line.base == pytest.approx(0.001)
        and line.slope == pytest.approx(1e-5)
        and line.held == pytest.approx(0, abs=1e-9)
    )
    assert scale.curve([1000, 2000, 4000], [.01, .02, .08]).held == pytest.approx(-.5)
    assert scale.curve([10, 20, 30], [1., 3., 5.]).base == 0 and math.isnan(scale.curve([1, 2], [1., 2.]).held)
    with pytest.raises(ValueError, match='two sizes'): scale.curve([1, 2], [0., 1.])


@pytest.mark.parametrize('kind', ['exact', 'ivf', 'ivf_pq'])
def test_a_query_never_finds_itself(kind):
    emb, _ = clustered()
    rows = torch.arange(0, 2000, 13)
    found = scale.searcher(emb, kind)(emb[rows], rows, 10)
    assert (found != rows).all() and found.shape == rows.shape


def test_more_probes_come_closer_to_exact_search():
    emb, label = clustered()
    rows = torch.arange(0, 2000, 7)
    found = Attacked(emb, label, rows, dict(clean=emb[rows], ES=normalise(emb[rows] + .1)))
    lines = scale.under_indexes(
        found, [Index('exact'), Index('ivf', 1), Index('ivf', 8), Index('ivf', scale.lists(2000)), Index('ivf_pq', 8)]
    )
    same = [line['same'] for line in lines]
    assert same[0] == 100 and same[1] <= same[2] <= same[3] == 100 and same[4] < 100
    wanted = torch.cdist(emb[rows], emb).scatter(1, rows[:,None], math.inf).argmin(1)
    assert lines[0]['r1']['clean'] == pytest.approx(100*(label[wanted] == label[rows]).double().mean().item())
    assert lines[0]['bytes'] == 128 and lines[4]['bytes'] < 40


def test_an_empty_answer_is_a_miss(monkeypatch):
    emb, label = clustered()
    monkeypatch.setattr(
        scale, 'searcher', lambda gallery, kind, parts=0: lambda query, rows, probes: torch.full_like(rows, -1)
    )
    # the last row of the gallery has their class
    line, = scale.under_indexes(Attacked(emb, label, torch.arange(20) + 1980, dict(clean=emb[-20:])), [Index('ivf', 1)])
    assert line['r1']['clean'] == 0


def test_time_of_an_update():
    slow = dict(bandwidth=1e9, latency=1e-4)
    assert scale.update_seconds(job(), 1, **slow)['total'] == pytest.approx(112*17*1e-3)
    eight = scale.update_seconds(job(), 8, **slow)
    assert (
        eight['compute'] == pytest.approx(14 * 17 * 1e-3)
        and eight['weights'] == pytest.approx(2 * (4e7 * 7 / 8 / 1e9 + 3e-4))
        and eight['embeddings'] == pytest.approx(17 * (4 * 112 * 512 * 7 / 8 / 1e9 + 3e-4))
    )
    assert scale.update_seconds(job(), 64, **slow)['efficiency'] < eight['efficiency'] < 1
    assert (
        scale.bottleneck(scale.update_seconds(job(seconds=1e-6), 8, **slow)) == 'gathering image gradients'
        and scale.bottleneck(eight) == 'gathering image gradients'
    )
    assert scale.bottleneck(scale.update_seconds(job(seconds=1.), 8, **slow)) == 'the network'
    for bad in (dict(gpus=0), dict(bandwidth=0.), dict(latency=-1.)):
        with pytest.raises(ValueError, match=f'{[*bad][0]} must'):
            scale.update_seconds(job(), bad.pop('gpus', 1), **dict(slow, **bad))


def test_layouts_use_what_there_is():
    free = dict(bandwidth=1e18, latency=0.)
    for gpus in (1, 5, 12, 24, 100):
        found = scale.layout(job(), gpus, 12, **free)
        assert (
            found['each'] * found['at_once'] <= gpus
            and found['rounds'] == math.ceil(12 / found['at_once'])
            and 0 < found['efficiency'] <= 1 + 1e-9
        )
        everything = [
            math.ceil(12 / min(12, gpus // each)) * 1000 * math.ceil(112 / each) * 17e-3 / 3600
            for each in range(1, min(gpus, 112) + 1)
        ]
        assert found['hours'] == pytest.approx(min(everything))


def test_the_best_index_is_near_and_small():
    def row(kind, probes, size, clean, es):
        return dict(kind=kind, probes=probes, bytes=size, r1=dict(clean=clean, ES=es), index=f'{kind} {probes}')
    rows = [
        row('exact', 0, 512, 70.0, 10.0), row('ivf', 16, 520, 70.2, 10.0), row('ivf_pq', 16, 40, 69.8, 11.0),
        row('ivf_pq', 64, 40, 69.8, 10.3)
    ]
    assert scale.best_index(rows)['index'] == 'ivf_pq 64' # the other one flatters under attack
    assert (
        scale.best_index(rows[:3])['index'] == 'ivf 16' and scale.best_index([rows[0], rows[2]])['index'] == 'exact 0'
    )


def test_processes_are_held_against_one():
    "Each round has all three ways, and the efficiencies are ratios of one round."
    line, = scale.process_scaling(works=[dict(network='small', size=28, channels=1, images=8, steps=1)], rounds=3)
    assert [r.keys() for r in line['rounds']] == [{'alone', 'shared', 'apart'}]*3 and line['processes'] == 2
    training, attacks = (
        sorted(100 * r['alone'] / r[way] / n for r in line['rounds']) for way, n in (('shared', 2), ('apart', 1))
    )
    assert [line['training_pct'][k] for k in ('low', 'median', 'high')] == pytest.approx(training) and [
        line['attacks_pct'][k] for k in ('low', 'median', 'high')
    ] == pytest.approx(attacks)
    with pytest.raises(RuntimeError, match='expected 2 processes to measure an update, found a launch that failed'):
        scale.process_scaling(works=[dict(network='none', size=28, channels=1, images=8, steps=1)], rounds=1)


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(images=100), 'images must'), (dict(speed=-1.0), 'speed must'),
        (dict(speed='fast'), 'parameter speed must be a number'), (dict(gpu=3), 'unknown parameter gpu'),
        (dict(bandwidth=0.0), 'bandwidth must')
    ],
)
def test_bad_parameters_are_named(given, message):
    with pytest.raises(ValueError, match=message): scale.checked(given)


@pytest.mark.slow
def test_the_report_at_smoke_size(tmp_path):
    results = scale.measure(
        scale.checked(
            dict(
                images=4000, queries=20, preset='smoke', gpus=64, speed=500.0, processes=1, device='cpu',
                out=str(tmp_path)
            )
        ),
        show=False,
    )
    assert (
        results['processes'] == []
        and 'Several processes on this machine' not in scale.write_scale(tmp_path / 'scale', results).read_text()
    )
    results['processes'] = scale.process_scaling(
        works=[dict(network='small', size=28, channels=1, images=8, steps=1)], rounds=3
    )
    assert [m['label'] for m in results['models']] == ['Natural', 'HM'] and results['images'] == 4000
    assert results['models'][0]['indexes'][0]['same'] == 100 and results['job']['seconds'] == 1/500
    assert max(u['gpus'] for u in results['updates']) == 64 and {g['images'] for g in results['galleries']} == {
        60_000, 1_000_000, 10_000_000
    }
    html = scale.write_scale(tmp_path/'scale', results).read_text()
    assert all(
        text in html
        for text in (
            'Approximate search under attack', 'IVF-PQ, 16 probes', 'Several processes on this machine',
            *map(lambda w: w.replace('&', '&amp;').split(':')[0], scale.words(results))
        )
    )
    assert json.loads((tmp_path/'scale'/'results.json').read_text())['search']['sizes'][-1] == 4000
