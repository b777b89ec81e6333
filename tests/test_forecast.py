"""The forecast: its counts against real runs, its lines beside finished ones."""

import pytest
import torch

from robust_dml.study import experiments, cost
from robust_dml.report.blocks import words_of
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
    assert (
        training['predicted']
        == training['at_most']
        == pytest.approx(cost.table_costs(rates, workload, plan)[0]['training_seconds'])
    )


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
    def updates(share):
        return cost.training_seconds(rates, plan.recipe, chosen, 'act', images=60, epochs=2, device='cpu', share=share)[
            'updates'
        ]
    steps = 2*60*chosen.options['steps']*.5/2   # pairs x steps x seconds per step and pair
    assert updates(1.) - updates(.5) == pytest.approx(steps/2)


@pytest.mark.parametrize(
    'asked, words',
    [
        (dict(dataset='birds'), "'cub', 'cars', 'sop'"), (dict(dataset='cub', preset='huge'), 'preset'),
        (dict(dataset='cub', device='tpu'), 'device')
    ],
)
def test_bad_requests(asked, words, tmp_path):
    with pytest.raises(ValueError, match=words): cost.cost_plan(experiments.parameters(dict(asked, out=str(tmp_path))))


def test_noise_pretends_its_size():
    images = cost.Noise(60502, (3, 8, 8))
    assert len(images) == 60502 and images.pool.numel() < 60000
    assert not torch.equal(images[torch.tensor([0])], images[torch.tensor([256])])
    assert torch.equal(images[torch.tensor([700])], cost.Noise(60502, (3, 8, 8))[torch.tensor([700])])


def test_flops_of_known_networks():
    """ResNet-18 at 224 x 224 has 1.82 billion multiply-adds; a network by hand; the backward pass costs twice the
    forward pass, less what needs no gradient."""
    import torchvision
    assert cost.forward_flops(torchvision.models.resnet18(), (3, 224, 224))/2e9 == pytest.approx(1.82, rel=.01)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(4*36, 5))
    convolution, product = 2*36*4*9, 2*4*36*5
    assert cost.forward_flops(net, (1, 6, 6)) == convolution + product
    assert cost.counted_flops(lambda: net(torch.rand(1, 1, 6, 6)).sum().backward()) == 2*convolution + 3*product


def test_passes_are_counted_in_a_real_update(finished):
    plan, _, _, _ = finished
    act = experiments.defense(next(experiments.cells(plan)), plan.recipe)
    before = act.options['steps']
    worth = cost.passes(plan.recipe, act, 'act')
    assert worth.step == pytest.approx(4.) and 6 < worth.update < 12  # two moved images, each forward and backward
    assert act.options['steps'] == before


def test_work_of_a_plan(finished):
    "Work by hand from the counts of the cost model, and hours from a rate."
    plan, _, workload, rates = finished
    work = cost.gpu_work({'glyphs': (workload, plan)})['glyphs']
    row, worth = cost.table_costs(rates, workload, plan)[0], cost.passes(
        plan.recipe, experiments.defense(next(experiments.cells(plan)), plan.recipe), 'act'
    )
    one, pairs = 2*work['multiply_adds'], workload.train*plan.recipe.epochs
    assert work['rows'][0]['training'] == pytest.approx(
        one * (pairs * worth.update + row['image_steps'] / 2 * worth.step), rel=1e-6
    )
    assert work['rows'][0]['evaluation'] >= 2*one*row['attack_image_steps']
    assert cost.gpu_hours(3600e12, 1.) == 1.
    with pytest.raises(ValueError, match='above 0 TFLOP/s, found 0'): cost.gpu_hours(1., 0)


def test_cards_have_a_rate_and_a_source():
    cards = cost.gpu_cards()
    assert [card.memory for card in cards] == [24, 80] and all(
        0 < card.fp32 < card.bf16 and len(card.source) > 20 for card in cards
    )


def test_gpu_hours_stand_on_the_page_as_a_forecast(finished):
    plan, _, workload, rates = finished
    rows = {'glyphs': cost.table_costs(rates, workload, plan)}
    results = dict(
        device='cpu', rows=rows,
        gpu=dict(work=cost.gpu_work({'glyphs': (workload, plan)}), cards=[card._asdict() for card in cost.gpu_cards()])
    )
    section = words_of(cost._gpu_section(results))
    assert (
        'not measured' in section
        and 'TFLOP/s in float32' in section
        and 'One GPU of 24 GB, float32' in section
        and 'One GPU of 80 GB, bfloat16' in section
    )
    del results['gpu']
    assert not cost._gpu_section(results)
