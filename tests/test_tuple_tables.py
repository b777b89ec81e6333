"Tables B1 to B5: the numbers by hand, the claims in words, the page, and the smallest run, killed and resumed."
import json
import math

import pytest

from robust_dml.papers import tuples as tuple_tables
from robust_dml.runs.store import Run, StoreError
from robust_dml.papers.tuples import CURVED, LINES, TABLES, Probe, along, both_curves, budget, curve_table, defence
from robust_dml.papers.tuples import fold_of, outcome, prepare, probes, record, results, table, words, write_tuples

EPS, STEPS = .1, 10


def made(line, seed=0, hits=40, clean=90., collapsed=False, steps=(50., 42., 41.), queries=100):
    "A record with the same R@1 under every attack but at other radii and steps."
    def found(name, method, value, eps=EPS, k=STEPS, scope='query'):
        return dict(
            Probe(name, method, eps, k, scope)._asdict(),
            **{'R@1': value, 'mAP@R': value / 2, 'hits': round(value * queries / 100), 'queries': queries}
        )
    measured = [
        found(name, method, hits + (10 if method == 'fgsm' else 0))
        for name in ('selfshift', 'nnpos', 'gap')
        for method in ('fgsm', 'pgd')
    ] + [found('gap', 'pgd', 77.0, scope='all')]
    if line in CURVED:
        measured += [found('gap', 'pgd', 5.0, eps=0.2), found('gap', 'pgd', 60.0, eps=0.05)] + [
            found('gap', 'pgd', v, k=k) for k, v in zip((1, 20, 32), steps)
        ]
    options = dict(defence_options(line), eps=EPS, steps=STEPS)
    log = [
        dict(
            epoch=e, loss=0.2, dist_ap=0.4, dist_an=1.0, separability=0.8, collapseness=-0.5, assisted=0.0,
            nonzero=0.25, cosine=0.1
        )
        for e in range(2)
    ]
    name = 'natural' if line.startswith('natural') else f'tuples:{line}'
    train = dict(address='train-0', seconds=1., config=dict(options=options), log=log, provenance=dict(python='3.11'))
    test = dict(
        address='eval-0', clean={'R@1': clean, 'mAP@R': 50.0}, probes=measured, indicators=dict(mean_distance=1.0),
        collapsed=collapsed, cosine=0.125, queries=queries, excluded=0, backend='exact'
    )
    return dict(
        line=line, defense=name, profile='', label=LINES[line].label, setting='28 x 28', seed=seed,
        place=[*LINES].index(line), train=train, eval=test
    )


def defence_options(line): return dict(dict(loss='triplet', attack_rate=1.), **LINES[line].options)


def four():
    return [
        made('natural_triplet', hits=8), made('tuples_triplet', hits=40), made('natural_contrastive', hits=0),
        made('tuples_contrastive', hits=30)
    ]


def test_lines_differ_in_one_thing():
    "Every model that is no natural twin and no other loss changes one switch of the robust triplet training."
    assert all(len(LINES[line].options) == 1 for line in LINES if line not in ('tuples_triplet', 'natural_contrastive'))
    assert {line for t in TABLES.values() for line in t.lines} == set(LINES)
    plan = prepare(dict(preset='smoke'))
    options = [json.dumps(defence(plan, line).options, sort_keys=True) for line in LINES]
    assert len(set(options)) == len(LINES) and plan.defenses == tuple(LINES)


@pytest.mark.parametrize(
    'preset, size, expected',
    [
        ('paper', 256, (0.01, 5, 0.004)), ('paper', 28, (0.1, 10, 0.02)), ('quick', 32, (0.1, 10, 0.02)),
        ('smoke', 28, (0.1, 2, 0.1))
    ],
)
def test_budgets(preset, size, expected):
    b = budget(preset, size)
    assert (b.setting.eps, b.setting.steps, b.setting.step_size) == pytest.approx(expected) and 1. in b.factors
    assert (b.steps[-1] == 100) == (preset == 'paper')


def test_curves_share_their_point():
    plan = prepare(dict(preset='quick', defenses='natural_triplet,moved_neg'))
    wanted = probes(plan, 'natural_triplet')
    assert len(wanted) == len(set(wanted)) == 7 + 4 + 4 and probes(plan, 'moved_neg') == wanted[:7]
    assert [t.scope for t in wanted].count('all') == 1


def test_outcome_finds_the_measurement():
    r = made('tuples_triplet', hits=40)
    assert [
        outcome(r)['R@1'], outcome(r, 'gap', 'fgsm')['R@1'], outcome(r, scope='all')['R@1'], outcome(r, eps=0.2)['R@1'],
        outcome(r, steps=32)['R@1']
    ] == [40, 50, 77.0, 5.0, 41.0]
    assert outcome(r, steps=99) is None


def test_fold_increase_goes_by_the_loss():
    records = four()
    assert (
        fold_of(records, 'tuples_triplet', 'gap') == '5.0 (40.0/8.0)'
        and fold_of(records, 'tuples_contrastive', 'gap') == '≥ 30.0 (30.0/0.0)'
    )
    assert (
        fold_of(records, 'natural_triplet', 'gap') == '–' == fold_of([made('tuples_triplet')], 'tuples_triplet', 'gap')
    )
    seeds = [made('natural_triplet', s, hits=h) for s, h in ((0, 2), (1, 8))] + [
        made('tuples_triplet', s, hits=h) for s, h in ((0, 30), (1, 50))
    ]
    # 80 hits over 10, not the mean of 15 and 6.25
    assert fold_of(seeds, 'tuples_triplet', 'gap') == '8.0 (40.0/5.0)'


def test_tables_have_every_number():
    b1 = table(four(), 'B1')
    assert b1['Model'].tolist() == [LINES[line].label for line in CURVED]
    one = b1.iloc[1].to_dict()
    assert (
        one['R@1'] == '90.0'
        and one['gap, FGSM: R@1'] == '50.0'
        and one['gap, PGD: R@1'] == '40.0'
        and one['nnpos, PGD: mAP@R'] == '20.0'
        and one['all perturbed: R@1'] == '77.0'
    )
    assert [one[f'Fold increase, {a}'] for a in ('selfshift', 'nnpos', 'gap')] == ['5.0 (40.0/8.0)']*3
    b5 = (
        table([made('jointly', s, hits=h, collapsed=c) for s, h, c in ((0, 10, True), (1, 20, False))], 'B5')
        .iloc[0]
        .to_dict()
    )
    assert (
        b5['gap, PGD: R@1'] == f'15.0 ± {math.sqrt(50):.1f}'
        and b5['Mean cosine'] == '0.125 ± 0.000'
        and b5['Non-zero terms (%)'] == '25.0 ± 0.0'
        and b5['Collapsed'] == '1 of 2'
    )
    assert (
        table([made('moved_anc')], 'B2')['Model'].tolist() == ['Anchor moved']
        and table([made('moved_anc')], 'B3').empty
    )


def test_an_undefined_share_of_terms_is_a_gap():
    r = made('jointly')
    r['train']['log'][-1]['nonzero'] = None
    assert table([r], 'B5')['Non-zero terms (%)'].tolist() == ['0/0']


def test_curves():
    r = made('tuples_triplet', hits=40)
    assert along(r, 'eps') == [(0.05, 60.0), (0.1, 40), (0.2, 5.0)] and along(r, 'steps') == [
        (1, 50.0), (10, 40), (20, 42.0), (32, 41.0)
    ]
    assert curve_table([r], 'steps').iloc[0].tolist() == ['Robust, triplet', '50.0', '40.0', '42.0', '41.0']
    left,right = both_curves([r, made('natural_contrastive')]).axes
    assert (
        list(left.lines[0].get_xdata()) == [0, 0.05, 0.1, 0.2]
        and left.lines[0].get_ydata()[0] == 90.0
        and right.lines[0].get_linestyle() == '-'
        and right.lines[1].get_linestyle() == '--'
    )
    # natural training is grey
    assert right.get_xscale() == 'log' and right.lines[1].get_color() == '#7a7a7a'


def test_words():
    said = words(four() + [made('jointly', collapsed=True)])
    assert (
        said[0]
        == 'Robust, triplet: under gap it answers 5.0 (40.0/8.0) times as many queries as natural training; without an'
        ' attack R@1 is 90.0 against 90.0.'
    )
    assert (
        '≥ 30.0 (30.0/0.0)' in said[1]
        and 'falls by 1.0 points at most' in said[2]
        and said[3] == 'Flagged as collapsed: All images jointly.'
        and 'no effect is claimed' in said[4]
    )
    three = ' '.join(words([made('tuples_triplet', hits=40), made('per_image', hits=20), made('jointly', hits=10)]))
    assert (
        'one element of each tuple moved: 40.0; with one perturbation per image: 20.0; with all images moved jointly:'
        ' 10.0.'
        in three
        and 'jointly: ' not in ' '.join(said)
    )
    steep = [made('tuples_triplet', 0, steps=(50., 42., 41.)), made('natural_triplet', 1, steps=(50., 42., 30.))]
    assert 'falls by 12.0 points at most (Natural, triplet)' in words(steep)[-1]
    assert not any('no effect' in text for text in words(steep))


def test_page(tmp_path):
    whole = dict(
        experiment='tuples', title='<Tuples>', dataset='glyphs', preset='smoke', parameters={}, overrides=[], data={},
        device='cpu', settings={'28 x 28': dict(eps=0.1)}, attack=dict(limit=0), records=four()
    )
    page = write_tuples(tmp_path, whole).read_text()
    assert (
        '<Tuples>' not in page
        and '&lt;Tuples&gt;' in page
        and page.count('<img') == 2
        and 'its numbers mean nothing' in page
        and all(f'<h2>{name}: ' in page for name in TABLES)
    )
    assert (
        '≥ 30.0 (30.0/0.0)' in page
        and json.loads((tmp_path / 'results.json').read_text())['records'][0]['line'] == 'natural_triplet'
    )
    # the wide table in two parts
    assert page.index('class="headline"') < page.index('class="note"') and [
        part.count('<table') for part in page.split('<h2>')[1:3]
    ] == [2, 1]
    alone = write_tuples(tmp_path, dict(whole, records=[made('moved_neg')])).read_text()
    assert alone.count('None of its models was asked for.') == 4


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Two models in the smallest size, undisturbed."
    folder = tmp_path_factory.mktemp('small')
    plan = prepare(dict(preset='smoke', defenses='natural_triplet,moved_neg', limit=20, epochs=1, out=str(folder)))
    return plan, results(plan, show=False)


def test_the_smallest_run(small):
    plan,found = small
    assert [r['line'] for r in found['records']] == ['natural_triplet', 'moved_neg']
    natural,moved = found['records']
    assert natural['eval']['queries'] == 20 and outcome(natural, scope='all')['queries'] == len(plan.data.test)
    assert (
        natural['train']['log'][0]['image_steps'] == 0 < moved['train']['log'][0]['image_steps']
        and natural['train']['config']['defense'] == 'tuples'
    )
    assert all(t['R@1'] <= natural['eval']['clean']['R@1'] for t in natural['eval']['probes'] if t['scope'] == 'query')
    assert any('epochs: 1 (paper: 75)' in text for text in found['overrides']) and not any(
        text.startswith('lam') for text in found['overrides']
    )


def test_a_killed_measurement_goes_on(small, monkeypatch, tmp_path):
    "Killed at the third attack; the second time only what is missing is measured, and nothing is trained."
    plan,found = small
    asked,calls = prepare(dict(plan.parameters, out=str(tmp_path))),[]
    whole = tuple_tables.under_attack
    def dying(*args, **kw):
        calls.append(kw)
        if len(calls) == 3: raise KeyboardInterrupt
        return whole(*args, **kw)
    monkeypatch.setattr(tuple_tables, 'under_attack', dying)
    with pytest.raises(KeyboardInterrupt): record(asked, 'natural_triplet', 0, show=False)
    weights = next(tmp_path.glob('store/train-*/model.safetensors'))
    stamp = weights.stat().st_mtime_ns
    assert record(asked, 'natural_triplet', 0, show=False)['eval']['probes'] == found['records'][0]['eval']['probes']
    assert len(calls) == 3 + len(probes(asked, 'natural_triplet')) - 2 and weights.stat().st_mtime_ns == stamp


def test_finished_work_needs_no_weights_and_other_weights_are_refused(small):
    plan,found = small
    for weights in plan.reports.glob('store/train-*/model.safetensors'): weights.unlink()
    assert results(plan, show=False)['records'] == found['records']
    done = Run(plan.reports/'store'/found['records'][0]['eval']['address'])
    done.write('result.json', dict(done.read('result.json'), weights='0'*64))
    (plan.reports/'store'/found['records'][0]['train']['address']/'result.json').unlink()
    with pytest.raises(StoreError, match='measured on, found others after training again'): results(plan, show=False)


def test_bad_parameters():
    for wrong, said in (
        (dict(defenses='act'), "defenses must be one of 'natural_triplet'"),
        (dict(preset='huge'), 'preset must be one of'), (dict(datset='x'), 'unknown parameter datset'),
        (dict(seeds='one'), 'seeds')
    ):
        with pytest.raises(ValueError, match=said): prepare(wrong)
