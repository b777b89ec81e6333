"""The forecast: its counts against real runs, its lines beside finished ones."""

import pytest
import torch

from robust_dml.study import experiments, cost
from robust_dml.runs.store import Run

ONE = dict(preset='smoke', defenses='act', epochs=2)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A plan whose runs stand in the store, and rates of constant size."
    plan = experiments.plan('table1', experiments.parameters(dict(ONE, out=str(tmp_path_factory.mktemp('reports')))))
    results = experiments.results(plan, show=False)
    workload = cost.cases(plan)['glyphs'][0]
    probes = cost.all_probes({'glyphs': (workload, plan)}, Run(plan.folder))
    rates = {probe.key: cost.Line(.25, .5, max(1, probe.least)) for probe in probes}
    return plan, results, workload, rates


def test_counts_are_those_of_the_run(finished):
    plan, results, workload, rates = finished
    row, record = cost.table_costs(rates, workload, plan)[0], results['records'][0]
    assert (row['updates'], row['image_steps']) == (record['train']['updates'], record['train']['image_steps'])
    assert row['attack_image_steps'] == record['eval']['image_steps']
    assert set(row['evaluation']) - {'examples'} == set(record['eval']['parts'])


def test_finished_runs_stand_beside_the_forecast(finished):
    plan, results, workload, rates = finished
    training, attacks = cost.recorded(rates, plan, workload)
    record = results['records'][0]
    assert (training['measured'], attacks['measured']) == (record['train']['seconds'], record['eval']['seconds'])
    assert training['predicted'] == training['at_most'] == pytest.approx(cost.table_costs(rates, workload, plan)[0]['training_seconds'])


def test_runs_of_other_machines_are_left_out(finished):
    plan, results, workload, rates = finished
    path = plan.reports/'store'/results['records'][0]['train']['address']/'card.json'
    whole = path.read_text()
    card = Run(path.parent).read('card.json')
    card['provenance']['cores'] += 1
    Run(path.parent).write('card.json', card)
    try: assert len(cost.recorded(rates, plan, workload)) == 1
    finally: path.write_text(whole)


def test_steps_that_were_left_out_cost_nothing(finished):
    plan, _, workload, rates = finished
    cell = next(experiments.cells(plan))
    chosen = experiments.defense(cell, plan.recipe)
    def updates(share): return cost.training_seconds(rates, plan.recipe, chosen, 'act', images=60, epochs=2, device='cpu', share=share)['updates']
    steps = 2*60*chosen.options['steps']*.5/2   # pairs x steps x seconds per step and pair
    assert updates(1.) - updates(.5) == pytest.approx(steps/2)


@pytest.mark.parametrize('asked, words', [(dict(dataset='birds'), "'cub', 'cars', 'sop'"), (dict(dataset='cub', preset='huge'), 'preset'), (dict(dataset='cub', device='tpu'), 'device')])
def test_bad_requests(asked, words, tmp_path):
    with pytest.raises(ValueError, match=words): cost.cost_plan(experiments.parameters(dict(asked, out=str(tmp_path))))


def test_noise_pretends_its_size():
    images = cost.Noise(60502, (3, 8, 8))
    assert len(images) == 60502 and images.pool.numel() < 60000
    assert not torch.equal(images[torch.tensor([0])], images[torch.tensor([256])])
    assert torch.equal(images[torch.tensor([700])], cost.Noise(60502, (3, 8, 8))[torch.tensor([700])])
