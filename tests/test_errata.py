"""The errata finder against toy tables: silent where nothing is wrong, and one planted error of each kind is found."""
import csv
import io
import json
import math
import re

import pytest

from robust_dml import core
from robust_dml.papers.colo_tride import errata
from robust_dml.papers.colo_tride.errata import Key
from robust_dml.metrics.scores import ARS_HEADINGS, HEADINGS, ars, ars_cells, constant_before, ers

ROWS = { # benign metrics, then the ten headings; TMA and ES:D with three digits leave little room
    'ACT': (30.3, 41.2, 13.1, 43.7, 15.1, 37.2, 14.6, 31.8, .471, .823, 11.4, 9.7, 15.2, 1.3),
    'HM': (35.2, 46.1, 19.9, 47.3, 17.3, 33.1, 18.2, 28.4, .702, .511, 17.6, 16.8, 26.1, 3.2),
    'Ours': (36.4, 47.8, 21.3, 48.9, 19.8, 25.9, 23.7, 19.3, .913, .152, 21.9, 23.2, 24.4, 6.1)}


def toy():
    "Tables 1 and 2 with scores that follow from the results, and a row of Table 3 that repeats one of Table 2."
    cells = {}
    for defense, values in ROWS.items():
        raw = dict(zip((*errata.BENIGN, *HEADINGS), values))
        before = constant_before(raw['R@1'])
        table1 = raw | {'ERS': ers(raw)}
        table2 = {h: raw[h] for h in errata.BENIGN} | ars_cells(before, raw) | {'Averaged ARS': ars(before, raw)}
        for n, table in ((1, table1), (2, table2)):
            for h, v in table.items():
                cells[Key(n, 'CUB', defense, h)] = f'{v:.3f}' if h in ('TMA', 'ES:D') else f'{v:.1f}'
    again = {
        k: v
        for k, v in cells.items()
        if k.table == 2 and k.defense == 'Ours' and k.heading not in ('R@2', 'mAP', 'NMI')
    }
    return cells | {Key(3, 'CUB', 'COLO-TRIDE', k.heading): v for k, v in again.items()}


def key(defense, heading, table=1): return Key(table, 'CUB', defense, heading)
def outside(cells): return {(l['defense'], l['check']) for l in errata.recompute(cells) if l['verdict'] == 'outside'}


def test_consistent_tables_are_not_accused():
    cells = toy()
    lines = errata.recompute(cells)
    assert len(lines) == 3*(1 + 8 + 2) + 2 and {l['verdict'] for l in lines} == {'consistent'}
    assert (
        errata.order_violations(cells) == []
        and errata.disagreements(cells) == []
        and len(errata.repeated(cells)) == 3 * 5 + 8
    )
    assert all(l['fits'] for l in errata.implied_before(cells))
    assert [errata.repairs(cells, row) for row in errata.rows(cells)] == [([], 0)]*4


def test_recomputed_numbers_are_those_of_scores():
    cells = toy()
    line = next(l for l in errata.recompute(cells) if l['check'] == 'ERS' and l['defense'] == 'HM')
    assert line['computed'] == pytest.approx(ers(dict(zip((*errata.BENIGN, *HEADINGS), ROWS['HM']))))
    assert line['high'] - line['low'] == pytest.approx(2*(2*.1 + 2*.05 + .05 + .025 + 4*.05)/10)


@pytest.mark.parametrize('planted, name', [
    (key('HM', 'ERS'), 'ERS'), (key('HM', 'Averaged ARS', 2), 'mean of the ARS'), (key('HM', 'LTM', 2), 'ARS of LTM'),
    (key('HM', 'QA-'), 'ERS'), (key('HM', 'CA+'), 'ARS of CA+'), (key('HM', 'TMA'), 'ERS')])
def test_a_wrong_cell_is_found_and_mended(planted, name):
    cells = toy()
    right = cells[planted]
    cells[planted] = '0.800' if planted.heading == 'TMA' else f'{float(right) + 2:.1f}'
    assert ('HM', name) in outside(cells) and {row for row, _ in outside(cells)} == {'HM'}
    found, _ = errata.repairs(cells, ('CUB', 'HM'))
    full = {n for row, n in outside(cells)}
    mends = [r for r in found if r.kind == 'replacement' and r.cells == (planted,) and set(r.mends) == full]
    assert len(mends) == 1 and float(mends[0].values[0]) <= float(right) <= float(mends[0].values[1])


def test_a_swap_in_a_row_is_found():
    cells, pair = toy(), (key('HM', 'CA+'), key('HM', 'QA-'))
    swapped = cells | dict(zip(pair, (cells[pair[1]], cells[pair[0]])))
    found, tried = errata.repairs(swapped, ('CUB', 'HM'))
    full = {n for _, n in outside(swapped)}
    assert tried > 100 and len(full) >= 3
    assert [set(r.cells) for r in found if r.kind == 'swap' and set(r.mends) == full] == [set(pair)]


def test_a_swap_with_the_neighbouring_row_is_found():
    cells, pair = toy(), (key('HM', 'QA+'), key('Ours', 'QA+'))
    swapped = cells | dict(zip(pair, (cells[pair[1]], cells[pair[0]])))
    assert {row for row, _ in outside(swapped)} >= {'HM', 'Ours'}
    found, _ = errata.repairs(swapped, ('CUB', 'HM'))
    assert [
        r
        for r in found
        if r.kind == 'swap with neighbour' and set(r.cells) == set(pair) and {'ERS', 'ARS of QA+'} <= set(r.mends)
    ]


def test_swapped_scores_are_found():
    cells, pair = toy(), (key('HM', 'ERS'), key('HM', 'Averaged ARS', 2))
    swapped = cells | dict(zip(pair, (cells[pair[1]], cells[pair[0]])))
    best = max(errata.repairs(swapped, ('CUB', 'HM'))[0], key=lambda r: len(r.mends))
    assert best.kind == 'swap' and set(best.cells) == set(pair) and len(best.mends) == 3


def test_a_repair_breaks_nothing():
    "Every listed change leaves fewer impossible scores, all among those of before."
    cells = toy() | {key('HM', 'QA-'): '31.4'}
    before = outside(cells)
    found, _ = errata.repairs(cells, ('CUB', 'HM'))
    assert found
    for r in found:
        for values in ([r.values] if 'swap' in r.kind else [(v,) for v in set(r.values)]):
            assert outside(cells | dict(zip(r.cells, values))) == before - {('HM', name) for name in r.mends}, r


def test_ranges_by_bisection_are_those_of_trying():
    cells = toy() | {key('HM', 'QA-'): '31.4'}
    for check in errata.row_checks(cells, ('CUB', 'HM')):
        for k in {check.target, *check.sources.values()}:
            texts = errata._printable(cells, k)[::7]
            tried = [i for i, text in enumerate(texts) if errata.verdict(check, cells | {k: text}) == 'consistent']
            assert list(errata._consistent(check, k, texts, cells)) == tried, (check.name, k)


@pytest.mark.parametrize('changes, kind, headings', [
    ({key('HM', 'R@1', 2): '46.7'}, 'order', {'R@1', 'R@2'}), ({key('ACT', 'GTM'): '30.9'}, 'order', {'GTM', 'R@1'}),
    ({key('ACT', 'TMA'): '47.1'}, 'range', {'TMA'}), ({key('ACT', 'CA-', 2): '102.1'}, 'range', {'CA-'})])
def test_order_and_range(changes, kind, headings):
    found = errata.order_violations(toy() | changes)
    assert [(l['kind'], {k.heading for k in l['cells']}) for l in found] == [(kind, headings)]


@pytest.mark.parametrize(
    'change', [key('Ours', 'R@1', 2), Key(3, 'CUB', 'COLO-TRIDE', 'QA+'), key('Ours', 'GTT', 2)],
    ids=lambda k: k.heading
)
def test_two_values_of_one_quantity(change):
    cells = toy()
    cells[change] = f'{float(cells[change]) + .3:.1f}'
    found = errata.disagreements(cells)
    assert len(found) == 1 and change in found[0]
    cells[change] = f'{float(cells[change]) - .3:.0f}'   # fewer digits are no contradiction
    assert errata.disagreements(cells) == []


def test_results_and_resistances_are_different_quantities():
    assert not [
        keys
        for keys in errata.repeated(toy())
        if {k.table for k in keys} >= {1, 2} and keys[0].heading in ('CA+', 'LTM', 'ES:R')
    ]


def test_another_initial_rank_is_implied():
    cells = toy()
    cells[key('Ours', 'CA+', 2)] = f'{100*19.8/52:.1f}'
    line = next(l for l in errata.implied_before(cells) if (l['defense'], l['heading']) == ('Ours', 'CA+'))
    assert not line['fits'] and line['low'] <= 52 <= line['high']


def test_words_and_missing_cells_are_named():
    cells = toy() | {
        key('HM', 'GTT'): '0/0', Key(4, 'CUB', '“assist”-part', 'ERS'): '14.4',
        Key(3, 'CUB', 'COLO-CAP', 'ERS'): '33.0'
    }
    cells |= {Key(3, 'CUB', 'COLO-CAP', h): '10.0' for h in ARS_HEADINGS}
    reasons = {k: reason for k, reason in errata.not_recomputed(cells)}
    assert reasons == {
        key('HM', 'ERS'): 'GTT of the row are not printed',
        Key(4, 'CUB', '“assist”-part', 'ERS'): 'no result of the row is printed',
        Key(3, 'CUB', 'COLO-CAP', 'ERS'): 'TMA and ES:D of the row are not printed'
    }
    assert not [
        l for l in errata.recompute(cells) if l['defense'] == 'HM' and l['check'] in ('ERS', 'ARS from the results')
    ]


CELLS = errata.printed()
VERDICTS = {  # what the reference notes on the claims say
    '1a': 'contradicted',
    '1b': 'holds',
    '2a': 'holds',
    '3a': 'holds',
    '3b': 'holds',
    '4b': 'holds',
    '5a': 'holds',
    '5b': 'contradicted',
    '7a': 'contradicted',
    '7c': 'holds',
    '7g': 'holds',
    '8a': 'holds',
    '8c': 'contradicted',
    '12c': 'holds',
    '12d': 'holds',
}


@pytest.mark.parametrize('number', VERDICTS)
def test_verdicts(number): assert {c.number: c.verdict for c in errata.claims(CELLS)}[number] == VERDICTS[number]


@pytest.mark.parametrize(
    'number, changes',
    [
        ('1a', {Key(1, s, 'Ours', 'ERS'): v for s, v in (('CUB', '38.5'), ('CARS', '49.3'), ('SOP', '65.9'))}),
        ('1b', {Key(2, 'SOP', 'Ours', 'Averaged ARS'): '95.0'}), ('2a', {Key(1, 'SOP', 'N/A', 'LTM'): '7.0'}),
        ('2b', {Key(1, s, 'N/A', 'GTM'): '0.3' for s in errata.SETS}), ('3a', {Key(1, 'CARS', 'ACT', 'ERS'): '46.4'}),
        ('3c', {Key(2, 'SOP', 'Ours', 'R@1'): '43.0'}), ('5a', {Key(1, 'CUB', 'Ours', 'TMA'): '0.70'}),
        ('5b', {Key(1, 'SOP', 'Ours', 'GTM'): '37.0'}), ('7c', {Key(3, 'CUB', 'COLO-CAP', 'R@1'): '34.5'}),
        ('7g', {Key(3, 'CUB', 'COLO-ANP', 'ERS'): '39.0'}),
        ('8a', {Key(3, 'CUB', 'COLO-ANP', h): '1.0' for h in ('QA+', 'QA-', 'GTT')}),
        ('8c', {Key(3, 'CUB', 'COLO-ANP', 'ERS'): '36.5'}), ('12a', {Key(4, 'CUB', '“assist”-full', 'ARS'): '9.0'}),
        ('12d', {Key(4, 'CUB', 'Ours w/o early disabling', 'ERS'): '40.0'}),
        ('13', {Key(1, 'CUB', 'ACT', 'TMA'): '0.99'})
    ],
)
def test_verdicts_follow_the_cells(number, changes):
    "Other cells, other verdict."
    old, new = ({c.number: c.verdict for c in errata.claims(cells)}[number] for cells in (CELLS, CELLS | changes))
    assert {old, new} == {'holds', 'contradicted'}


def test_without_numbers_nothing_is_claimed():
    empty = {k: 'N/A' for k in CELLS}
    assert {c.verdict for c in errata.claims(empty) if c.number not in ('4a', '4b')} == {'cannot be checked'}


def test_known_errors_of_the_paper():
    found, _ = errata.repairs(CELLS, ('CUB', 'N/A'))
    assert any(r.kind == 'swap' and {k.heading for k in r.cells} == {'ERS', 'Averaged ARS'} for r in found)
    twice = {(keys[0].dataset, keys[0].defense, keys[0].heading) for keys in errata.disagreements(CELLS)}
    assert {('CUB', 'N/A', 'R@1'), ('SOP', 'Ours', 'R@1'), ('SOP', 'Ours', 'GTT')} <= twice
    assert not [
        l
        for l in errata.recompute(CELLS)
        if l['defense'] in ('ACT', 'HM')
        and l['verdict'] != 'consistent'
        and (l['dataset'], l['check']) != ('CARS', 'mean of the ARS')
    ]


def test_report(tmp_path):
    results = errata.errata_results()
    page = errata.write_errata(tmp_path, results).read_text()
    assert (
        page.count('<script') == 1 and '<img' in page and not re.search(r'\bnan\b', re.sub(r'base64,[^"]+', '', page))
    )
    assert json.loads((tmp_path/'results.json').read_text())['repeated'] == results['repeated']
    lines = list(csv.DictReader(io.StringIO((tmp_path/'errata.csv').read_text())))
    assert {'score', 'not recomputed', 'initial value', 'replacement', 'swap', 'printed twice', 'sentence'} <= {
        l['kind'] for l in lines
    }
    assert sum(l['kind'] == 'score' for l in lines) == len(results['scores'])


def test_appendix_page(tmp_path):
    results = errata.appendix_results(errata.APPENDIX | dict(seed=1, out=str(tmp_path)), show=False)
    page = errata.write_appendix(tmp_path, results).read_text()
    assert page.count('<figure') == 5 and page.count('<script') == 1
    assert str(tmp_path) not in (tmp_path/'results.json').read_text()
    assert all(
        (tmp_path / 'figures' / name).stat().st_size < 150_000
        for name in ('figure1.png', 'figure5.png', 'ratio.png', 'views.png', 'real.png')
    )
    for line in results['real'] + results['random']:
        assert line['R least'] >= 1.95 and not math.isnan(line['R exact'])
        assert line['exact gain sip'] > max(line['exact gain cap'], line['exact gain anp'])


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(datset='x'), 'unknown parameter datset'), (dict(seed='1'), 'seed must be a whole number'),
        (dict(seed=True), 'seed must be a whole number')
    ],
)
def test_parameters(given, words):
    with pytest.raises(ValueError, match=words): core.given(given, errata.APPENDIX)
