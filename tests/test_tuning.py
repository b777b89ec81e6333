"""Tuning at smoke size: the test classes stay out of it, the store answers, and the rule decides."""
import csv
import json
import math
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path

import pytest
import torch

from robust_dml.study import experiments, tuning
from robust_dml.data.sets import Split
from robust_dml.defenses import lines
from robust_dml.runs.store import read_results, write_results

ROOT = Path(__file__).resolve().parent.parent


@cache
def smoke(): return tuning.prepare(dict(preset='smoke', tune_limit=12, limit=12))


def asked(out, **changes):
    "A smoke tuning on data that is drawn once; the store lies under `out`."
    base = smoke()
    return replace(
        base, plan=replace(base.plan, reports=Path(out)), held=replace(base.held, reports=Path(out)), **changes
    )


class Untouchable:
    "Images of the right form that may not be read."
    shape, dtype = (4, 1, 28, 28), torch.uint8
    def __len__(self): return 4
    def __getitem__(self, rows): raise AssertionError('test images were read')


def with_untouchable_test(split):
    return Split(
        split.name, split.train,
        replace(split.test, images=Untouchable(), labels=torch.tensor([0, 0, 1, 1]), classes=('x', 'y'))
    )


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A whole tuning and its page."
    tuned = asked(tmp_path_factory.mktemp('tuning'))
    results = tuning.tune(tuned, show=False)
    return tuned, results, tuning.write_tuning(tuned.plan.folder, results)


def stamps(folder): return {p: p.stat().st_mtime_ns for p in Path(folder, 'store').rglob('*') if p.is_file()}


@pytest.mark.parametrize('seed', range(3))
def test_classes_are_disjoint_and_images_keep_their_labels(seed):
    split = smoke().plan.data
    held = tuning.holdout(split, seed=seed)
    names = [{*side.classes} for side in (held.train, held.test)]
    assert (
        not names[0] & names[1]
        and names[0] | names[1] == {*split.train.classes}
        and not (names[0] | names[1]) & {*split.test.classes}
    )
    for side in (held.train, held.test):
        for label, name in enumerate(side.classes):
            mine, theirs = (
                s.pixels((s.labels == s.classes.index(name)).nonzero().flatten()) for s in (side, split.train)
            )
            assert side.classes.index(name) == label and torch.equal(mine, theirs)


def test_the_test_classes_are_never_read(tmp_path):
    plan = smoke().plan
    blind = replace(plan, data=with_untouchable_test(plan.data), reports=tmp_path)
    with pytest.raises(AssertionError, match='test images were read'): blind.data.card()
    held = tuning.held_out_plan(blind, epochs=1, limit=4, draw=0)
    points = tuning.search(tuning.Tuning(replace(blind, defenses=('act',)), held, 2, 0), show=False)
    assert len(points['act']) == 2 and all(0 <= p['r1'] <= 100 for p in points['act'])
    with pytest.raises(AssertionError, match='test images were read'):
        tuning.measure(blind, tuning.cell_of('act', {}, blind, 0), show=False)


@pytest.mark.parametrize('method', tuning.IMAGES)
def test_candidates(method):
    "As many as asked, different, the default first, each within the budget of inner steps."
    plan = smoke().held
    found = tuning.candidates(method, 40, plan=plan, seed=0)
    cells = [tuning.cell_of(method, c, plan, 0) for c in found]
    options = [experiments.defense(cell, plan.recipe).options for cell in cells]
    assert len({json.dumps(o, sort_keys=True) for o in options}) == 40 and not found[0]
    plain = next(
        cell for cell in experiments.cells(replace(plan, defenses=(method,))) if cell.seed == plan.recipe.seeds[0]
    )
    assert experiments.defense(plain, plan.recipe).options == options[0]
    assert max(tuning.IMAGES[method]*o['steps'] for o in options) == 3*plan.recipe.settings[0].steps
    assert len({o['eps'] for o in options}) == 3 and max(o['eps'] for o in options) == plan.recipe.settings[0].eps
    assert tuning.candidates(method, 5, plan=plan, seed=0) == found[:5]
    with pytest.raises(ValueError, match='candidates must lie in'): tuning.candidates(method, 0, plan=plan, seed=0)


@pytest.mark.parametrize('dataset, preset', [('glyphs', 'quick'), ('glyphs', 'paper'), ('cub', 'paper')])
def test_every_value_is_accepted(dataset, preset):
    "Each value of each switch makes a defence, in the small and in the paper's settings."
    plan = replace(smoke().held, recipe=experiments.recipe(preset, dataset))
    for method in tuning.IMAGES:
        for key, values in tuning.space(method, plan.recipe.settings[0]).items():
            for value in values:
                options = experiments.defense(tuning.cell_of(method, {key: value}, plan, 0), plan.recipe).options
                assert key in (*tuning.SCALED, 'profile') or options[key] == value


def test_spent_steps_are_within_the_budget(done):
    tuned, results, _ = done
    assert results['budget'] == 3*4*80*2
    assert (
        [p['image_steps'] for p in results['points'] if p['method'] == 'naive_sip'][0]
        == results['budget']
        >= max(p['image_steps'] for p in results['points'])
        > 0
    )


def test_every_method_gets_the_same(done):
    tuned, results, _ = done
    of = {m: [p for p in results['points'] if p['method'] == m] for m in tuning.IMAGES}
    assert {len(points) for points in of.values()} == {2} and all(
        points[0]['candidate'] == {} for points in of.values()
    )
    assert len({p['train'] for p in results['points']}) == len(results['points'])
    held = json.loads((tuned.plan.reports/'store'/of['hm'][0]['eval']/'card.json').read_text())['config']['protocol']
    assert (held['limit'], held['steps']) == (12, 2) and held['steps']*held['step_size'] >= 2*held['eps'] - 1e-9
    assert results['yardstick'] == of['hm'][0]['r1'] and results['floor'] == results['yardstick'] - 1


def test_the_search_and_the_confirmation_see_their_own_classes(done):
    tuned, results, _ = done
    checksum = {k: results[k]['data']['checksum'] for k in ('search', 'confirmation')}
    for lines, key in ((results['points'], 'search'), (results['confirmed'], 'confirmation')):
        for line in lines:
            assert (
                json.loads((tuned.plan.reports / 'store' / line['train'] / 'card.json').read_text())['config']['data']
                == checksum[key]
            )
    assert checksum['search'] != checksum['confirmation'] == tuned.plan.data.card()['checksum']


def test_the_chosen_settings_are_confirmed_beside_the_defaults(done):
    tuned, results, _ = done
    for method, taken in results['chosen'].items():
        point, eligible = tuning.choose([p for p in results['points'] if p['method'] == method], results['floor'])
        assert taken == dict(candidate=point['candidate'], eligible=eligible)
        found = [line['candidate'] for line in results['confirmed'] if line['method'] == method]
        assert found == ([{}, taken['candidate']] if taken['candidate'] else [{}])
    assert any(
        taken['candidate'] for taken in results['chosen'].values()
    ), 'the fixture must confirm more than defaults'


def test_defaults_are_shared_with_the_tables(done):
    "The confirmation of a default is a row of Table 1."
    tuned, results, _ = done
    plan = replace(tuned.plan, experiment='table1', defenses=('act', 'hm', 'colo_tride'))
    wanted = {
        experiments.find_run(plan.reports, 'train', list(experiments._trainings(plan, cell))[-1][1]).address
        for cell in experiments.cells(plan)
        if cell.profile != 'paper'
    }
    assert wanted == {
        line['train'] for line in results['confirmed'] if not line['candidate'] and line['method'] in plan.defenses
    }


def test_every_seed_is_confirmed(done, monkeypatch):
    tuned, results, _ = done
    monkeypatch.setattr(tuning, 'measure', lambda plan, cell, show: dict(cell=cell.defense, seed=cell.seed))
    several = replace(tuned, plan=replace(tuned.plan, recipe=replace(tuned.plan.recipe, seeds=(0, 3, 5))))
    found = tuning.confirm(several, dict(act=dict(eps=.5), hm={}))
    assert [(line['method'], bool(line['candidate']), line['seed']) for line in found] == [
        (m, c, s) for m, c in (('act', False), ('act', True), ('hm', False)) for s in (0, 3, 5)
    ]


def test_nothing_is_computed_twice(done):
    tuned, results, _ = done
    before = stamps(tuned.plan.reports)
    again = tuning.tune(tuned, show=False)
    assert before == stamps(tuned.plan.reports) and json.dumps(again) == json.dumps(results)


def test_a_killed_search_goes_on(done, tmp_path, monkeypatch):
    tuned = asked(tmp_path)
    whole, calls = experiments.train, []
    def dying(*args, **kw):
        calls.append(kw['run'].address)
        if len(calls) == 4: raise KeyboardInterrupt
        return whole(*args, **kw)
    monkeypatch.setattr(experiments, 'train', dying)
    with pytest.raises(KeyboardInterrupt): tuning.search(tuned, show=False)
    first, before = calls[:3], stamps(tmp_path)
    points = [p for found in tuning.search(tuned, show=False).values() for p in found]
    assert not {*first} & {*calls[4:]} and len(calls) == 4 + 10 - 3
    assert before.items() <= stamps(tmp_path).items()
    same = ('method', 'candidate', 'r1', 'ars', 'ers', 'train', 'eval', 'image_steps')
    assert [[p[k] for k in same] for p in points] == [[p[k] for k in same] for p in done[1]['points']]


def test_the_page(done):
    tuned, results, page = done
    assert {f.name for f in page.parent.iterdir()} == {
        'README.md', 'figures.svg', 'index.html', 'results.json', 'table.csv'
    } and page.parent.name == 'tune-glyphs-smoke'
    text = page.read_text()
    assert (
        escape(tuning.RULE) in text
        and 'its numbers mean nothing' in text
        and text.count('<script') == 1
        and text.count('data:image/png;base64') == 2
    )
    rows = list(csv.DictReader((page.parent/'table.csv').read_text().splitlines()))
    assert len(rows) == len(results['points']) + len(results['confirmed'])
    assert str(tuned.plan.reports) not in (page.parent/'results.json').read_text()
    for method in tuning.IMAGES:
        mine = [row for row in rows if row['method'] == method and row['classes'] == 'held-out']
        assert [row['chosen'] for row in mine].count('yes') == 1 and len(mine) == 2
        points = [p for p in results['points'] if p['method'] == method]
        assert [row['front'] == 'yes' for row in mine] == [p in tuning.front(points) for p in points]
    assert [float(row['R@1']) for row in rows if row['classes'] == 'held-out'] == [
        round(p['r1'], 2) for p in results['points']
    ]


def test_a_front_is_what_brute_force_finds():
    gen = torch.Generator().manual_seed(0)
    points = [
        dict(r1=round(a, 1), ars=round(b, 1), collapsed=c > 0.8)
        for a, b, c in torch.rand(200, 3, generator=gen).tolist()
    ]
    able = [p for p in points if not p['collapsed']]
    kept = [
        p
        for p in able
        if all(p['r1'] > q['r1'] or p['ars'] > q['ars'] or (p['r1'], p['ars']) == (q['r1'], q['ars']) for q in able)
    ]
    assert tuning.front(points) == sorted(kept, key=lambda p: p['r1']) and 1 < len(kept) < len(able)


@pytest.mark.parametrize(
    'points, floor, index, eligible',
    [
        ([(60, 40, 0), (59, 50, 0)], 59, 1, True), ([(60, 40, 0), (58.9, 50, 0)], 59, 0, True),
        ([(60, 40, 0), (62, 40, 0)], 59, 1, True), ([(60, 40, 0), (60, 50, 1)], 59, 0, True),
        ([(60, math.nan, 0), (59, 1, 0)], 59, 1, True), ([(50, 60, 0), (55, 40, 0)], 59, 1, False),
        ([(60, 40, 1), (61, 50, 1)], 59, 0, False)
    ],
)
def test_the_rule(points, floor, index, eligible):
    points = [dict(r1=r, ars=a, collapsed=bool(c)) for r, a, c in points]
    chosen, met = tuning.choose(points, floor)
    assert chosen is points[index] and met is eligible


def test_hm_is_the_yardstick_also_when_it_is_not_tuned(done):
    tuned, results, _ = done
    alone = replace(tuned, plan=replace(tuned.plan, defenses=('act',)))
    assert tuning.tune(alone, show=False)['yardstick'] == results['yardstick']


def test_tuned_settings_are_kept_and_applied(tmp_path, done):
    tuned, results, page = done
    with pytest.raises(ValueError, match='preset is not smoke'): tuning.keep(page.parent, tmp_path/'tuned.json')
    chosen = dict(act=dict(candidate=dict(eps=.5, steps=1.5, miner='softhard'), eligible=True))
    told = read_results(page.parent) | dict(preset='quick', chosen=chosen)
    write_results(tmp_path, told)
    found = lines.tuned('act', tuning.keep(tmp_path, tmp_path/'tuned.json'))
    base = experiments.defense(tuning.cell_of('act', {}, tuned.plan, 0), tuned.plan.recipe).options
    assert tuning.resolve(found, base) == dict(eps=base['eps']/2, steps=6, miner='softhard')
    with pytest.raises(ValueError, match="method must be one of 'act', found 'hm'"):
        lines.tuned('hm', tmp_path/'tuned.json')
    with pytest.raises(FileNotFoundError, match='make it with: make tune'): lines.tuned('act', tmp_path/'absent.json')


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(candidate=3), 'unknown parameter candidate; .* and for tuning candidates, tune_epochs'),
        (dict(defenses='hm:ics=0'), "defenses must be one of 'act'"),
        (dict(candidates='x'), 'candidates must be a whole number'),
        (dict(candidates=10**6), 'candidates must be at most 243 for act'),
        (dict(profile='prose'), 'profile must be one of')
    ],
)
def test_bad_parameters(changes, words):
    with pytest.raises(ValueError, match=words): tuning.prepare(dict(preset='smoke') | changes)


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match='2 training classes to hold out and 2 to train on, found 3'):
        tuning.holdout(
            Split('x', tuning.of_classes(smoke().plan.data.train, [0, 1, 2]), smoke().plan.data.test), seed=0
        )
