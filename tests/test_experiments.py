"""Every experiment at smoke size: its lines, their switches, its report, and what it shares with the others."""
import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path

import pytest
import test_archives
import test_run_notebooks

from robust_dml.data import archives
from robust_dml.papers import gallery
from robust_dml.study import cost, experiments, fairness
from robust_dml.runs.store import finished_runs, read_results
from robust_dml.defenses.colo_tride import OFFICIAL, PAPER

ROOT = Path(__file__).resolve().parent.parent
STUDIES = experiments.STUDIES
PLAIN = [name for name, study in STUDIES.items() if study.defenses and not study.write]
TABLES = [*PLAIN, 'timing', 'fairness']


@cache
def smoke(): return experiments.plan('table1', experiments.parameters(dict(preset='smoke')))


def planned(name, out, defenses='', profiles=('official', 'paper')):
    "A plan on data that is drawn once."
    wanted, base = STUDIES[name], smoke()
    recipe = replace(
        base.recipe,
        **dict(settings=wanted.settings or base.recipe.settings, limit=16, profiles=profiles) | {**wanted.changes}
    )
    return replace(
        base, experiment=name, defenses=experiments.table_lines(defenses) or wanted.defenses, recipe=recipe,
        reports=Path(out)
    )


@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('reports')


@pytest.mark.parametrize('name', TABLES)
def test_report(name, out):
    plan = planned(name, out)
    found = STUDIES[name].run(plan, show=False)
    page, said = STUDIES[name].page(plan.folder, found).read_text(), STUDIES[name].says(found)
    labels = [cell.label for cell in experiments.cells(plan)]
    assert len(labels) == len(set(labels))*len(plan.recipe.seeds) and said
    assert escape(STUDIES[name].title) in page and all(escape(label) in page for label in labels)
    files = {'README.md', 'index.html', 'results.json'} | ({'figures.svg'} if '<figure' in page else set())
    if name in PLAIN: files |= {'table.csv', 'figures'}
    assert {f.name for f in plan.folder.iterdir()} == files


def test_the_store_answers_a_second_time(out):
    plan = planned('table3', out)
    first = experiments.results(plan, show=False)
    before = sorted(p.stat().st_mtime_ns for p in (out/'store').glob('*/result.json'))
    assert experiments.results(plan, show=False)['records'] == first['records']
    assert before == sorted(p.stat().st_mtime_ns for p in (out/'store').glob('*/result.json'))


def test_fairness_counts_disagreement():
    def record(**cells): return dict(eval=dict(ers_cells={h: cells.get(h, 1.) for h in fairness.HEADINGS}))
    found = fairness.agreement([record(**{'TMA': a, 'LTM': b, 'GTT': None}) for a,b in ((1., 9.), (2., 5.), (3., 7.))])
    assert found['TMA']['LTM'] == pytest.approx(-.5) and found['TMA']['TMA'] == pytest.approx(1.)
    assert math.isnan(found['GTT']['TMA']) and math.isnan(found['CA+']['TMA'])


def test_reports_do_not_overwrite_each_other(out):
    folders = [replace(planned(name, out), preset=preset).folder for name in TABLES for preset in ('smoke', 'quick')]
    assert len(set(folders)) == len(folders)


def test_each_line_of_switches_turns_one_switch(out):
    plan = planned('switches', out)
    first, paper, *others = experiments.cells(plan)
    base = experiments.defense(first, plan.recipe).options
    turned = []
    for cell in others:
        options = experiments.defense(cell, plan.recipe).options
        changed = {key: value for key,value in options.items() if value != base[key]}
        assert len(changed) == 1
        turned.append(changed)
    wanted = {key: value for key,value in PAPER.items() if value != OFFICIAL[key]}
    assert {k: v for d in turned for k,v in d.items()} == wanted and len(turned) == len(wanted)
    assert paper.profile == 'paper'


def test_equal_runs_have_one_address(out):
    "A switch at its own value, or a number written without a point, is no other run."
    plan = planned(
        'table1', out, defenses='colo_tride,colo_tride:profile=official,colo_tride:profile=official+lam=2',
        profiles=('official',)
    )
    addresses = {
        experiments.find_run(plan.reports, 'train', config).address
        for cell in experiments.cells(plan)
        for _, config, _ in experiments._trainings(plan, cell)
    }
    assert len(addresses) == 1


@pytest.mark.parametrize(
    'entry, words',
    [
        ('colo_tride:lambda=3', 'has no switch lambda'), ('hm:phase=cap', 'hm has no switch phase'),
        ('colo_tride:lam', 'lam=10'), ('cola', 'one of natural, act')
    ],
)
def test_bad_lines(entry, words, out):
    with pytest.raises(ValueError, match=words): planned('table1', out, defenses=entry)


def test_a_value_that_no_switch_has_is_found_before_anything_is_trained(out):
    with pytest.raises(ValueError, match="phase must be one of"):
        experiments.results(planned('table3', out/'bad', defenses='natural,colo_tride:phase=capp'), show=False)
    assert not (out/'bad').exists()


def test_committed_tables_are_found_in_the_store():
    "The addresses of committed runs are those that a plan asks for today."
    for path in sorted(ROOT.glob('reports/*-glyphs-*/results.json')):
        results = read_results(path.parent)
        if results.get('experiment') not in TABLES: continue
        plan = experiments.plan(
            results['experiment'], experiments.parameters(dict(preset=results['preset'], out=str(ROOT / 'reports')))
        )
        asked = {
            experiments.find_run(plan.reports, 'train', list(experiments._trainings(plan, cell))[-1][1]).address
            for cell in experiments.cells(plan)
        }
        trainings = results['trainings'] if 'trainings' in results else [r['train'] for r in results['records']]
        assert {r['address'] for r in trainings} <= asked, path.parent.name # a line added since may wait to be computed
        if results['preset'] == 'quick': assert {r['address'] for r in trainings} == asked, path.parent.name


def test_both_readings_of_the_paper_stand_in_the_larger_tables():
    for name in ('table1', 'table2', 'table3', 'table4', 'figure3', 'figure4', 'switches'):
        asked = experiments.parameters(dict(preset='small'))
        plan = replace(
            smoke(), defenses=STUDIES[name].lines('small'), recipe=experiments._recipe(name, asked, 'glyphs')
        )
        labels = {cell.label for cell in experiments.cells(plan)}
        assert any('(paper_range)' in label for label in labels) and any('(paper)' in label for label in labels), name
        assert name == 'switches' or 'COLO-TRIDE (paper, C per step)' in labels, name
    assert experiments.recipe('paper', 'cub').profiles == ('official', 'paper_steps')
    assert 'colo_steps' not in STUDIES['table1'].lines('quick') and 'hm' in STUDIES['figure4'].lines('quick')


@pytest.mark.slow
def test_a_miniature_cub_through_everything(tmp_path):
    """`run_all -p dataset cub -p preset smoke`: the files as their authors distribute them, 32 pixels, no pretrained
    weights, one process."""
    pytest.importorskip('pytorch_metric_learning', reason='the proxy loss of EAT comes from pytorch-metric-learning')
    test_archives.cub(tmp_path, classes=(1, 2, 3, 4, 5, 101, 102, 103), per_class=4)
    asked = experiments.parameters(dict(dataset='cub', root=str(tmp_path), preset='smoke', out=str(tmp_path/'out')))
    with warnings.catch_warnings(record=True): page = gallery.run_all(asked, show=False)
    links = re.findall(r'href="([^"]+)"', page.read_text())
    assert len(links) == len(gallery.in_one_run()) and all((page.parent/link).is_file() for link in links)
    assert 'Beside the paper' in (page.parent.parent/'table1-cub-smoke'/'index.html').read_text()


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    "A miniature In-Shop: three items in query and gallery, one with queries only."
    root = tmp_path_factory.mktemp('shop')
    lines = test_archives.inshop(root, items=(1, 2, 7, 8, 9, 10))/'Eval'/'list_eval_partition.txt'
    lines.write_text(lines.read_text().replace('id_00000010 gallery', 'id_00000010 query'))
    return root


def shop_plan(root, out, experiment='table1'):
    return experiments.plan(
        experiment,
        experiments.parameters(
            dict(dataset='inshop', root=str(root), preset='smoke', defenses='natural,act', out=str(out))
        ),
    )


@pytest.mark.filterwarnings('ignore:.*is not the published set')
def test_a_gallery_of_its_own_through_table1(shop, tmp_path, capsys):
    "Queries are attacked, the gallery is searched, the report says so, and the store answers a second time."
    plan = shop_plan(shop, tmp_path)
    experiments.announce(plan)
    assert 'queries and gallery apart: 10 queries, 6 gallery images\n' in capsys.readouterr().out
    page = experiments.write_table(plan.folder, experiments.results(plan, show=False))
    results = json.loads((plan.folder/'results.json').read_text())
    assert 'queries and gallery apart: 10 queries, 6 gallery images' in page.read_text()
    for r in results['records']:
        assert (r['eval']['queries'], r['eval']['excluded'], r['eval']['before']['GTT']) == (10, 4, 100)
    shown = experiments.example_tensors(plan.reports, results)['A Natural']
    assert (
        len(shown) == 7
        and set(shown['label_before'].unique().tolist()) <= {0, 1, 2}
        and shown['before'].shape[:2] == (4, 5)
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'store').rglob('*')}
    experiments.results(replace(shop_plan(shop, tmp_path), experiment='table2'), show=False)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/'store').rglob('*')}


def test_a_gallery_of_its_own_as_a_user_starts_it(shop, tmp_path):
    done = test_run_notebooks.papermill(
        tmp_path, 'run_table1.ipynb', '-p', 'dataset', 'inshop', '-p', 'root', str(shop), '-p', 'preset', 'smoke', '-p',
        'defenses', 'natural'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        'queries and gallery apart: 10 queries, 6 gallery images' in (
            tmp_path / 'reports' / 'table1-inshop-smoke' / 'index.html'
        ).read_text()
    )


@pytest.mark.filterwarnings('ignore:.*is not the published set')
@pytest.mark.parametrize(
    'was, now, message',
    [
        ('id_0000000[789] gallery', 'id_00000010 gallery', 'a gallery of at least 2 classes, found 1'),
        ('id_0000000([789]) query', 'id_00000010 query', 'a query whose class is in the gallery, found none among 10')
    ],
    ids=('one class', 'no class of the queries'),
)
def test_galleries_that_cannot_be_searched(shop, tmp_path, was, now, message):
    folder = next(shutil.copytree(shop, tmp_path/'shop').iterdir())
    lines = folder/'Eval'/'list_eval_partition.txt'
    lines.write_text(re.sub(was, now, lines.read_text()))
    with pytest.raises(ValueError, match=message): shop_plan(tmp_path/'shop', tmp_path)
    assert not (tmp_path/'store').exists()


@pytest.mark.filterwarnings('ignore:.*is not the published set')
@pytest.mark.parametrize('named', [True, False])
def test_its_cost_is_not_forecast(shop, tmp_path, named):
    "One sentence, whatever the folder is called."
    if named: (tmp_path/'inshop').symlink_to(next(shop.iterdir()))
    asked = experiments.parameters(dict(dataset='inshop', root=str(tmp_path if named else shop), preset='smoke'))
    with pytest.raises(
        ValueError,
        match='found inshop with a gallery of its own; run its table' if named else "found 'inshop'; the cost of"
    ):
        cost.cost_plan(asked)


def test_committed_evaluations_of_a_training_are_of_one_model():
    "Whatever is said of a training was measured on the same weights."
    weights = {}
    for run in finished_runs(ROOT/'reports'):
        if not run.has('result.json'): continue
        config, found = run.read('card.json')['config'], run.read('result.json').get('weights')
        if found and isinstance(config.get('train'), str):
            weights.setdefault(config['train'], {}).setdefault(found, []).append(run.address)
    assert weights and {train: of for train,of in weights.items() if len(of) > 1} == {}


def test_new_fields_enter_a_configuration_only_where_they_change_it():
    "So that every stored address stays."
    plan, new = smoke(), ('optimizer', 'schedule', 'head_lr')
    chosen = experiments.natural(plan.recipe)
    def config(**changes):
        changed = replace(plan, recipe=replace(plan.recipe, **changes))
        return experiments.training_config(changed, chosen, 0, epochs=2)
    assert not config().keys() & {*new} and config(head_lr=plan.recipe.lr) == config()
    for name, value in zip(new, ('sgd', 'cosine', 1e-2)): assert config(**{name: value}) == config() | {name: value}


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(eps=0.031), 'found 0.031, which looks like a fraction of the range: write 7.9'),
        (dict(eps=256), 'from 1 to 255'), (dict(eps=-1), 'from 1 to 255'), (dict(eps=math.nan), 'from 1 to 255'),
        (dict(lr=-1e-3), 'lr must lie in'), (dict(lr=1.5), 'lr must lie in'),
        (dict(head_lr=math.inf), 'head_lr must lie in'), (dict(pairs=1), 'at least 2'),
        (dict(steps=10**6), 'at most 1000'), (dict(steps=-1), 'whole number')
    ],
)
def test_numbers_out_of_range(given, words):
    with pytest.raises(ValueError, match=words) as error: experiments.parameters(given)
    assert '\n' not in str(error.value)


def test_a_budget_that_was_asked_for_is_listed(out):
    "On the page as a difference from the paper, in 255ths; 0 keeps the preset's."
    asked = experiments.parameters(dict(preset='smoke', eps=16, steps=2, pairs=8, lr=.01, out=str(out)))
    recipe = experiments.plan('table1', asked).recipe
    said = experiments.overrides(recipe, experiments.recipe('paper', 'glyphs'))
    assert 'lr: 0.01 (paper: 0.001)' in said and 'pairs: 8 (paper: 128)' in said
    assert any('ε 16/255, steps of 16/255, 2 for ACT and HM, 2 for COLO-TRIDE' in line for line in said)


@pytest.mark.parametrize('name', ('Cars', 'sop', 'CUB', 'Fashion', 'inshop'))
def test_a_folder_that_is_called_like_a_set_is_not_that_set(tmp_path, name, monkeypatch):
    "Neither the paper's λ nor its numbers; and another folder of that name has another report."
    folders = []
    for k, place in enumerate((tmp_path/name, tmp_path/'b'/name)):
        for c in range(4):
            for n in range(3): test_archives.photo(place/f'class {c}'/f'{n}.png', (40*c, 20*n, k))
        plan = experiments.plan('table1', experiments.parameters(
            dict(dataset=str(place), preset='smoke', defenses='natural', out=str(tmp_path/'out'))
        ))
        assert experiments.published(plan.dataset) == []
        assert experiments.recipe('paper', plan.dataset) == experiments.recipe('paper', 'a folder')
        assert plan.dataset not in archives.SETS
        folders.append(plan.folder)
    assert len(set(folders)) == 2


def test_a_folder_with_a_long_name_gets_a_report(tmp_path):
    assert len(experiments.folder_name(Path('x'*250))) == 40
    assert experiments.folder_name(Path('фото 1')) == 'фото-1' and experiments.folder_name(Path('a#b?%20')) == 'a-b-20'


OWN = """
from robust_dml.report.tables import Layout
from robust_dml.study.experiments import Study

mine = Study('mine', 'A table of my own', ('natural', 'act'), layout=Layout('table2'))
"""


def test_a_study_of_ones_own_by_its_place(tmp_path, monkeypatch):
    "Registered by module:study, run and written like the others."
    (tmp_path/'my_study.py').write_text(OWN)
    monkeypatch.chdir(tmp_path)
    asked = dict(study='my_study:mine', preset='smoke', limit=12, out=str(tmp_path/'out'))
    try:
        study, plan = experiments.by_name(asked)
        page = study.page(plan.folder, study.run(plan, show=False))
        lines = (page.parent/'table.csv').read_text().splitlines()
        assert page.parent.name == 'mine-glyphs-smoke' and 'Averaged ARS' in lines[0] and len(lines) == 3
        assert gallery.rewrite(page.parent) == page
    finally: STUDIES.pop('mine', None)


@pytest.mark.parametrize('name, words', [
    ('lamda', "found 'lamda'; did you mean 'lambda'?"), ('tuples', 'run nbs/run_tuples.ipynb or make tuples'),
    ('errata', 'run nbs/run_errata.ipynb'), ('my_study', 'study must be one of table1')])
def test_a_study_that_cannot_be_run_by_name_is_one_sentence(name, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error: experiments.by_name(dict(study=name))
    assert '\n' not in str(error.value)
