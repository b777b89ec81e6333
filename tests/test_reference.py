"Fashion-MNIST beside printed numbers: what is gathered, what is claimed, what the page says, in the smallest size."
import json
from dataclasses import replace
from pathlib import Path

import pytest

from robust_dml.study import experiments, reference
from robust_dml.papers import gallery
from robust_dml.metrics.scores import HEADINGS, reference_table
from robust_dml.runs.store import read_results

REPORTS = Path(__file__).resolve().parent.parent/'reports'
BENIGN = ('R@1', 'R@2', 'mAP', 'NMI')
LABELS = dict(natural='Natural', act='ACT', est='EST', hm='HM')
ROWS = [
    ('Natural', 'natural', ''), ('ACT', 'act', ''), ('EST', 'est', ''),
    ('COLO-TRIDE (paper_range)', 'colo_tride', 'paper_range'), ('HM', 'hm', '')
]


def record(defense, seed, shift=0., collapsed=False, **after):
    "A record whose numbers are those printed for `defense` (ACT's where none are), the benign ones moved by `shift`."
    printed = reference_table().get(defense) or reference_table()['act']
    train = dict(
        address=f'train-{seed}', config=dict(epochs=8, defense=defense, options={}), provenance=dict(python='3.11')
    )
    test = dict(
        address=f'eval-{seed}', benign={h: printed[h] + shift for h in BENIGN},
        after={h: printed[h] for h in HEADINGS} | after, collapsed=collapsed, queries=2000, excluded=0, backend='torch'
    )
    return dict(
        setting='28', defense=defense, profile='', label=LABELS[defense], seed=seed, place=0, train=train, eval=test
    )


def results(records, limit=2000, overrides=('seeds: 0, 1, 2 (paper: 0)', 'limit: 2000 (paper: 0)')):
    "What `study.reference.reference` gives for these records."
    seeds = {label: [r['seed'] for r in records if r['label'] == label] for label, _, _ in ROWS}
    rows = [dict(label=label, defense=defense, profile=profile, seeds=seeds[label]) for label, defense, profile in ROWS]
    return dict(
        experiment='reference', title='<Beside>', dataset='fashion', preset='paper', device='cpu',
        parameters=dict(limit=limit), overrides=[*overrides], data=dict(test=dict(images=10000)),
        settings={'28': dict(eps=77 / 255)}, attack=dict(steps=32, step_size=3 / 255, limit=limit), records=records,
        rows=rows
    )


def three(defense, *shifts, **after):
    return [record(defense, seed, shift, **after) for seed, shift in enumerate(shifts)]


def test_all_within_the_spread():
    said = reference.reference_words(results(three('natural', -1., 0., 1.)))
    assert said[0] == 'Natural: 14 of 14 printed numbers lie within two standard deviations of our three seeds.'
    assert (
        said[1] == 'Natural: no printed number lies beyond.'
        and said[-1] == 'Not computed yet: ACT, EST, COLO-TRIDE (paper_range) and HM.'
    )


def test_what_lies_beyond_is_listed_with_its_difference():
    said = reference.reference_words(results(three('natural', 4., 5., 6., LTM=1.5, TMA=.987)))
    assert said[0].startswith('Natural: 8 of 14') and 'R@1 92.6 (printed 87.6, +5.0)' in said[1]
    assert (
        'LTM 1.5 (printed 0.0, +1.5)' in said[1]
        and 'TMA 0.987 (printed 0.990, −0.003)' in said[1]
        and 'GTM' not in said[1]
    )


def test_several_rows_are_summed():
    said = reference.reference_words(results(three('natural', 4., 5., 6.) + three('act', -1., 0., 1.)))
    assert (
        said[0]
        == '24 of 28 printed numbers lie within two standard deviations of our seeds: Natural 10 of 14 and ACT 14'
        ' of 14.'
    )


@pytest.mark.parametrize('records, overrides', [
    (three('natural', 0., 1.), ()),                                              # two seeds
    (three('hm', 0., 1., 2.), ()),                                               # nothing is printed for HM
    (three('natural', 0., 1., 2.), ('epochs: 1 (paper: 8)',))])                  # another protocol
def test_nothing_is_claimed(records, overrides):
    said = ' '.join(reference.reference_words(results(records, overrides=overrides)))
    assert 'nothing is claimed' in said and 'within two standard deviations' not in said
    assert not any(row.judged for row in reference.reference_rows(results(records, overrides=overrides)))


def test_binomial_interval():
    "Wilson's interval by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²))/(1 + z²/n)."
    assert reference.binomial_interval(50., 100) == pytest.approx((40.383, 59.617), abs=.001)
    assert reference.binomial_interval(12., 2000) == pytest.approx((10.648, 13.498), abs=.002)
    low, high = reference.binomial_interval(100., 10)
    assert high == pytest.approx(100.) and low == pytest.approx(72.246, abs=.001)
    for share, trials in ((101., 10), (-1., 10), (50., 0)):
        with pytest.raises(ValueError, match='share of 0 to 100'): reference.binomial_interval(share, trials)


def test_commands_name_what_lacks():
    found = results(three('natural', 0., 1.))
    commands = {row['label']: reference.reference_command(found, row) for row in found['rows']}
    assert commands['Natural'] == "make reference P='-p defenses natural -p seeds 2 -p limit 2000'"
    assert (
        commands['COLO-TRIDE (paper_range)']
        == "make reference P='-p defenses colo_tride -p profile paper_range -p seeds 0,1,2 -p limit 2000'"
    )
    assert (
        reference.reference_command(results([], limit=0), found['rows'][4])
        == "make reference P='-p defenses hm -p seeds 0,1,2'"
    )


def test_page(tmp_path):
    page = reference.write_reference(
        tmp_path, results(three('natural', 4.0, 5.0, 6.0) + [record('hm', 0, collapsed=True)])
    ).read_text(encoding='utf-8')
    assert '<Beside>' not in page and '&lt;Beside&gt;' in page and page.count('<img') == 1
    assert page.index('class="headline">Natural: 10 of 14') < page.index('<h2>')
    # GTM 12.6 of 2,000 queries
    assert '2,000 random test images of 10,000 are attacked' in page and '11.2 to 14.1' in page
    assert (
        'HM, seed 0: flagged as collapsed' in page
        and 'Rows without printed numbers' in page
        and '-p defenses act -p seeds 0,1,2' in page
    )
    assert 'robrank' in page and json.loads((tmp_path/'results.json').read_text())['records'][0]['label'] == 'Natural'


def test_page_of_all_queries_has_no_interval(tmp_path):
    whole = results(three('natural', 0., 1., 2.), limit=0)
    for r in whole['records']: r['eval']['queries'] = 10000
    page = reference.write_reference(tmp_path, whole).read_text(encoding='utf-8')
    assert 'All 10,000 test images are attacked' in page and ' to 14.1' not in page and page.count('>all 10,000<') == 14


def test_page_is_written_again(tmp_path):
    folder = tmp_path/'reference-fashion-paper'
    first = reference.write_reference(folder, results([record('natural', 0, LTM=None)])).read_text(encoding='utf-8')
    assert gallery.rewrite(folder).read_text(encoding='utf-8') == first and '0/0' in first


@pytest.mark.parametrize('dataset, preset', [('glyphs', 'paper'), ('fashion', 'quick')])
def test_other_data_and_presets_are_refused(dataset, preset, tmp_path):
    plan = replace(smallest(tmp_path), dataset=dataset, preset=preset)
    with pytest.raises(ValueError, match=f'found {dataset} and {preset}'): reference.reference(plan, show=False)
    assert not (tmp_path/'store').exists()


def smallest(out, **other):
    "A plan of glyphs that passes for Fashion-MNIST."
    asked = experiments.parameters(dict(preset='smoke', defenses='natural', limit=16, out=str(out)) | other)
    return replace(experiments.plan('table1', asked), experiment='reference', dataset='fashion', preset='paper')


def test_finished_cells_of_the_same_protocol_are_gathered(tmp_path):
    """Seeds 0 and 5 with 16 queries, and seed 0 with 8: a page shows the seeds of its own number of queries, and
    computes nothing twice."""
    reference.reference(smallest(tmp_path, seeds='5'), show=False)
    other = reference.reference(smallest(tmp_path, limit=8), show=False)
    assert [(r['seed'], r['eval']['queries']) for r in other['records']] == [(0, 8)]
    found = reference.reference(smallest(tmp_path), show=False)
    assert [(r['label'], r['seed'], r['eval']['queries']) for r in found['records']] == [
        ('Natural', 0, 16), ('Natural', 5, 16)
    ]
    # the preset's, then the plan's
    profiles = dict.fromkeys((*experiments.recipe('paper', 'fashion').profiles, *smallest(tmp_path).recipe.profiles))
    assert [row['label'] for row in found['rows']] == [
        'Natural', 'ACT', 'EST', *(f'COLO-TRIDE ({p})'.replace('paper_steps', 'paper, C per step') for p in profiles),
        'HM'
    ]
    page = reference.write_reference(tmp_path/'page', found).read_text(encoding='utf-8')
    assert 'nothing is claimed' in page and 'epochs: 2 (paper: 8)' in page
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('store/*/*')}
    assert reference.reference(smallest(tmp_path), show=False)['records'] == found['records']
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('store/*/*')}


@pytest.mark.skipif(not (REPORTS/'reference-fashion-paper').is_dir(), reason='no committed report')
def test_committed_page_claims_what_its_seeds_allow(tmp_path):
    "Made from the committed results alone; a head line with a count needs three seeds of a printed row."
    found = read_results(REPORTS/'reference-fashion-paper')
    page = reference.write_reference(tmp_path, found).read_text(encoding='utf-8')
    seeds = {row['defense']: len(row['seeds']) for row in found['rows'] if row['defense'] in reference_table()}
    enough = max(seeds.values()) >= 3
    assert (
        seeds['natural']
        and ('nothing is claimed' in page) == (not enough)
        and ('of 14 printed numbers' in page) == enough
    )
    assert not reference.changed_protocol(found) and found['data']['test']['images'] == 10000
