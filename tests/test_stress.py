"Attacks outside the ten on trained models: the same whatever the batch, honest about who knows what."
from dataclasses import replace

import pytest

from robust_dml.study import experiments, stress
from robust_dml.runs.store import read_lines

EFFORT = stress.EFFORTS['smoke']


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    return experiments.plan(
        'stress',
        experiments.parameters(
            dict(preset='smoke', defenses='natural,act', out=str(tmp_path_factory.mktemp('reports')))
        ),
    )


@pytest.fixture(scope='module')
def found(asked):
    first, second = experiments.cells(asked)
    return stress.stress_cell(asked, first, EFFORT, surrogates=[second], show=False).read('result.json')


def test_nothing_depends_on_the_batch(asked, found, tmp_path):
    first, second = experiments.cells(asked)
    small = replace(asked, recipe=replace(asked.recipe, eval_batch=4))
    again = stress.stress_cell(replace(small, reports=tmp_path), first, EFFORT, surrogates=[second], show=False)
    assert {r['start'] for r in read_lines(again, 'queries.jsonl')} == {0, 4}
    assert again.read('result.json') == found


def test_images_made_on_the_same_model_are_white_box(asked):
    cell = next(experiments.cells(asked))
    subject = stress._subject(asked, cell)
    (_, scene), = stress._scenes(asked, cell, EFFORT, subject)
    direct, moved = (
        stress._tried(method, scene)['after'] for method in (stress.METHODS['ES'], stress.made_on('itself', subject))
    )
    assert moved == direct


def test_learning_and_attacked_queries_differ(asked):
    cell = next(experiments.cells(asked))
    (_, scene), = stress._scenes(asked, cell, EFFORT, stress._subject(asked, cell))
    assert len(scene.x) == EFFORT.queries and len(scene.learn_x) == EFFORT.learn
    assert not set(scene.queries.id.tolist()) & set(scene.learn_queries.id.tolist())


def test_a_union_takes_no_fewer_queries_than_its_parts(found):
    for kind in ('white', 'black', 'blind'):
        names = stress.of_kind(found, kind)
        assert names and stress.r_at_1(found, names) <= min(stress.r_at_1(found, [n]) for n in names)


def test_the_whole_is_redone_with_more_effort(asked, found):
    cell = next(experiments.cells(asked))
    more = stress.stress_cell(asked, cell, replace(EFFORT, budget=31), show=False)
    assert {a['asked'] for a in more.read('result.json')['attacks'] if a['name'].startswith('Squares')} == {31}
    assert [a['name'] for a in more.read('result.json')['attacks']] == [*stress.METHODS]


def test_collapsed_models_make_no_statement(found):
    record = dict(label='HM', setting='A', seed=0, eval=dict(collapsed=True), stress=found)
    assert stress.words(dict(records=[record])) == [
        'All models are flagged as collapsed; nothing here measures robustness.'
    ]
    assert stress.exceptions([record]) == []
