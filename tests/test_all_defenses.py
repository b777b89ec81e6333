"""One table for the defences of three papers: every line trains, is attacked both ways, and nothing depends on the
batch."""
import math
from dataclasses import replace

import pytest
from PIL import Image

from robust_dml.papers import all_defenses
from robust_dml.study import experiments
from robust_dml.runs.store import read_lines


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    return experiments.plan(
        'all_defenses', experiments.parameters(dict(preset='smoke', out=str(tmp_path_factory.mktemp('reports'))))
    )


@pytest.fixture(scope='module')
def found(asked):
    pytest.importorskip('pytorch_metric_learning', reason='the proxy loss of EAT comes from pytorch-metric-learning')
    return all_defenses.all_results(asked, show=False)


def test_every_defence_has_all_numbers(asked, found):
    table = all_defenses.means(found['records'])
    assert {r['defense'] for r in found['records']} == set(asked.defenses)
    for label, row in table.items():
        assert all(not math.isnan(mean) for mean, _ in row.values()), label
        assert all(row[f'{k} attacked'][0] <= row[f'{k} clean'][0] + 1e-6 for k in ('R@1', 'centre'))


def test_unfit_data_is_refused_or_met_before_anything_is_trained(tmp_path):
    "A test class of one image cannot have a centre; a training class of two images is absent for a member of EAT."
    for c, count in enumerate((2, 4, 4, 4, 4, 1)):
        (tmp_path/'cut'/f'class{c}').mkdir(parents=True)
        for i in range(count): Image.new('RGB', (32, 32), (40*c, 20*i, 90)).save(tmp_path/'cut'/f'class{c}'/f'{i}.png')
    asked = experiments.parameters(dict(preset='smoke', dataset=str(tmp_path/'cut'), out=str(tmp_path/'out')))
    with pytest.raises(ValueError, match='every class needs 2 images for centre accuracy'):
        experiments.plan('all_defenses', asked)
    Image.new('RGB', (32, 32), (200, 20, 90)).save(tmp_path/'cut'/'class5'/'1.png')
    lines = experiments.plan('all_defenses', asked).defenses
    assert 'eat:absent=negative' in lines and not (tmp_path/'out').exists()


def test_the_page_names_every_defence(asked, found):
    page = all_defenses.write_all(asked.folder, found)
    text = page.read_text()
    assert all(r['label'] in text for r in found['records'])
    assert len((page.parent/'table.csv').read_text().splitlines()) == 1 + len({r['label'] for r in found['records']})


def test_nothing_depends_on_the_batch(asked, found, tmp_path):
    cell = next(experiments.cells(asked))
    small = replace(asked, reports=tmp_path, recipe=replace(asked.recipe, eval_batch=5))
    again = all_defenses.cluster_cell(small, cell, show=False)
    assert {r['queries'] for r in read_lines(again, 'queries.jsonl')} <= {5, 2}
    for scope, row in again.read('result.json')['worst'].items():
        assert row == pytest.approx(found['records'][0]['cluster']['worst'][scope], abs=1e-6)


def test_no_order_without_a_spread_and_none_of_collapsed_models():
    def record(label, ars, collapsed=False, seed=0, defense='act'):
        return dict(
            label=label, setting='A', seed=seed, defense=defense,
            eval=dict(benign={'R@1': 50.0}, ers=ars, ars=ars, collapsed=collapsed, indicators=dict(mean_distance=1.0)),
            cluster=dict(
                clean=dict.fromkeys(all_defenses.SHOWN, 50.0),
                worst={s: dict.fromkeys(all_defenses.SHOWN, ars / 2) for s in ('query', 'all')}
            ),
        )
    assert 'no order is claimed' in all_defenses.words([record('a', 40.), record('b', 30.)])[-1]
    said = all_defenses.words(
        [
            record('a', 40.0), record('a', 41.0, seed=1), record('b', 30.0), record('b', 31.0, seed=1),
            record('c', 99.0, True)
        ]
    )
    assert not any('no order' in text for text in said)
    assert said[0].startswith('Highest of 2: a in ERS (40.5), ARS (40.5), R@1 with attacked queries (20.2)') and said[
        -1
    ].endswith('left out of these sentences: c.')
    once = all_defenses.words(
        [record('a', 40.0), record('a', 41.0, seed=1), record('c', 99.0), record('c', 99.0, True, seed=1)]
    )
    assert once[0].startswith('Highest of 1: a in ERS') and once[-1].endswith('left out of these sentences: c.')
    both = [
        record('a', 40.0), record('a', 42.0, seed=1), record('b', 60.0, defense='eat:members=2'),
        record('b', 62.0, seed=1, defense='eat:members=2'), record('c', 99.0, True, defense='pal_at')
    ]
    lines = {
        line['Score']: (line['Made for retrieval'], line['Made for clustering'])
        for line in all_defenses.leaders(both).to_dict('records')
    }
    assert lines['ARS'] == ('a (41.0)', 'b (61.0)') and lines['centre accuracy with attacked queries'] == (
        'a (20.5)', 'b (30.5)'
    )
    assert set(all_defenses.leaders(both[:2])['Made for clustering']) == {'none'}
    rank = all_defenses.words([record(label, ars) for label, ars in (('a', 1.), ('b', 2.), ('c', 3.), ('d', 4.))])[1]
    assert 'correlation of ARS and centre accuracy under attack is 1.00' in rank
