"A user's own attack as a further column of a table, beside an own defense on an own data set."
import csv
import sys

import pytest

from robust_dml.attacks.suite import SUITE, attack_named, further_attacks
from robust_dml.core import ATTACKS
from robust_dml.report import tables
from robust_dml.runs.store import read_lines
from robust_dml.study import experiments

LAB = '''
import torch
from dataclasses import replace
from robust_dml.attacks.suite import Attack, first_hit, hide, own_row
from robust_dml.data.sets import ImageSet, Split
from robust_dml.defenses.base import act
from robust_dml.triplets.distances import paired_distance, pairwise_distance

def side(classes, size, channels, seed):
    gen = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(4)
    images = torch.randint(0, 40, (len(label), channels, size, size), generator=gen) + 20*label[:, None, None, None]
    return ImageSet(images.clamp(max=255).to(torch.uint8), label, tuple(f'bird {k}' for k in range(classes)))

def birds(size, channels): return Split('birds', side(5, size, channels, 0), side(6, size, channels, 1))

def soft(*, eps:float, step_size:float, steps:int, margin:float, lam:float=1.):
    return replace(act(eps=eps, step_size=step_size, steps=steps, margin=margin*lam), name='soft')

def targets(queries, gallery, seed):
    own = own_row(queries, gallery)
    dist = hide(pairwise_distance(queries.emb, gallery.emb), own)
    return dict(own=own, other=dist.masked_fill(gallery.label == queries.label[:, None], torch.inf).argmin(1))

def objective(emb, queries, targets, gallery): return -paired_distance(emb, gallery.emb[targets['other']])
def measure(emb, queries, targets, gallery): return {'Swap': first_hit(emb, queries, targets['own'], gallery)}
def thief_measure(emb, queries, targets, gallery): return {'LTM': first_hit(emb, queries, targets['own'], gallery)}

SAYS = 'R@1 when pulled to the nearest item of another class'
swap = Attack('Swap', targets, objective, measure, ('Swap',), says=SAYS)
def thief(): return Attack('Thief', targets, objective, thief_measure, ('LTM',))
def nothing(): return 3
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def write(text): (tmp_path/'whole_lab.py').write_text(text)
    write(LAB)
    yield write
    sys.modules.pop('whole_lab', None)


def planned(**asked):
    lines = 'natural,whole_lab:soft+lam=2'
    p = dict(dataset='whole_lab:birds', preset='smoke', defenses=lines, backend='torch', out='out')
    return experiments.plan('table1', experiments.parameters(p | asked))


def test_all_of_ones_own_in_one_table(lab):
    "Trained, attacked, stored and shown; the addresses of the ten attacks stay what they are."
    plain, own = planned(), planned(attacks='+whole_lab:swap')
    first, = (cell for cell in experiments.cells(plain) if cell.defense == 'natural')
    address = experiments.evaluate_cell(plain, first, show=False).address
    results = experiments.results(own, show=False)
    page = tables.write_report(own.folder, results)
    rows = list(csv.DictReader((own.folder/'table.csv').open()))
    assert [row['Defense'] for row in rows] == ['Natural', 'whole_lab:soft, lam = 2']
    assert all(0 <= float(row['Swap']) <= 100 for row in rows) and 'Swap ↑' in page.read_text()
    assert 'the nearest item of another class' in page.read_text()
    run = experiments.evaluate_cell(own, first, show=False)
    assert run.address != address == experiments.evaluate_cell(plain, first, show=False).address
    # what was measured before is not measured again
    old, new = (read_lines(experiments.evaluate_cell(p, first, show=False), 'queries.jsonl') for p in (plain, own))
    assert old == new[:len(old)] and {r['attack'] for r in new} - {r['attack'] for r in old} == {'Swap'}
    trained = experiments.trained_as(own, [*experiments.cells(own)][1])
    assert trained.read('card.json', 'config')['config']['defense'] == 'whole_lab:soft'
    lab(LAB + '\n# changed')
    cells = [*experiments.cells(own)]
    assert [experiments.trained_as(own, c).has('result.json') for c in cells] == [True, False]
    assert 'own_attacks' not in experiments.results(plain, show=False)


@pytest.mark.parametrize(
    'text, kind, message',
    [
        ('whole_lab:swap', ValueError, r'attacks must be written with a plus, as in \+whole_lab:swap'),
        ('+LTN', ValueError, "attack must be one of .* found 'LTN'; did you mean 'LTM'"),
        ('+whole_lab:swop', ValueError, "whole_lab must have swop, found no such name; did you mean 'swap'"),
        ('+whole_lab:soft', TypeError, 'soft'),
        ('+whole_lab:nothing', TypeError, 'whole_lab:nothing must be an Attack or return one, found int'),
        ('+whole_lab:thief', ValueError, "names of its own for attack and outcomes, found 'LTM', which is taken"),
        ('+nobody_xyz:swap', ValueError, 'expected a module nobody_xyz, found none'),
    ],
)
def test_attacks_that_do_not_do(lab, text, kind, message):
    with pytest.raises(kind, match=message) as error: further_attacks(text)
    assert '\n' not in str(error.value)


def test_named_attacks():
    assert {*SUITE} < {*ATTACKS} and further_attacks('+OA, +LTM').keys() == {'OA'}
    assert attack_named('LTM') is SUITE['LTM']
