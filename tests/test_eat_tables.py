"""Tables A1 to A9: the numbers by hand, the claims and when they are made, the page, and the smallest run, killed and
resumed."""
import csv
import io
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from robust_dml.papers import eat as eat_tables
from robust_dml.metrics.clustering import class_rows, clustered
from robust_dml.data.sets import ImageSet
from robust_dml.defenses.eat import transfer_matrix
from robust_dml.papers.eat import CLAIMS, CURVED, LINES, MAIN, TABLES, along, beside, borrowed, both_curves, cell_of
from robust_dml.papers.eat import claim_table, claim_text, class_map, curve_table, flattened, from_outside, gradient_of
from robust_dml.papers.eat import headline, judged, matrices, measured_apart, memory, paired, part_of, pictures
from robust_dml.papers.eat import plan_of, points, prepare, protocol, record, results, switch, table, task_of, to_csv
from robust_dml.papers.eat import trained_as, verdict, words, write_eat
from robust_dml.study.experiments import cells, defense, parameters, plan, train_cell
from robust_dml.runs.store import Run, StoreError

EPS, STEPS = .1, 10
SCORES = ('R@1', 'centre', 'NMI', 'AMI', 'F1', 'Hungarian')


def made(
    line, seed=0, attacked=40.0, clean=90.0, collapsed=False, matrix=((40.0, 60.0), (70.0, 50.0)),
    steps=(50.0, 42.0, 40.0), outside=((1.0, 55.0), (60.0, 45.0)), **options
):
    "A record whose scores under attack are all the same."
    ensemble = line not in ('pal_natural', 'at_long', 'tuples', 'colo_tride', *eat_tables.ADAPTED)
    options = dict(dict(eps=EPS, members=3 if ensemble else 1, combine='full'), **options)
    at = [
        dict(
            eps=e, steps=k,
            worst={scope: dict.fromkeys(SCORES, v if scope == 'query' else v + 1) for scope in ('query', 'all')}
        )
        for e, k, v in (
            (0.05, STEPS, 60.0), (0.2, STEPS, 5.0), (EPS, STEPS, steps[-1]), (EPS, 1, steps[0]), (EPS, 5, steps[1])
        )
    ]
    log = [
        dict(epoch=e, loss=0.2, dist_ap=0.4, dist_an=1.0, separability=0.8, collapseness=-0.5, assisted=0.0, cosine=0.1)
        for e in range(2)
    ]
    train = dict(
        address='train-0', seconds=1.0, image_steps=600, config=dict(options=options, dim=32, defense=line), log=log,
        provenance=dict(python='3.11')
    )
    test = dict(
        address='eval-0', clean=dict.fromkeys(SCORES, clean),
        worst={
            'all': dict.fromkeys(SCORES, attacked),
            'query': dict(dict.fromkeys(SCORES, attacked), **{'R@1': attacked - 10})
        },
        curves=at if line in CURVED else [],
        protocol=dict(eps=EPS, steps=STEPS),
        matrix=[*map(list, matrix)] if ensemble else None,
        indicators=dict(mean_distance=1.0),
        collapsed=collapsed,
        seconds=2.0,
        image_steps=70,
        members=options['members'],
        length=32 * options['members'],
        examples='',
        queries=100,
        excluded=0,
        backend='torch',
    )
    name = {'pal_natural': 'natural', 'colo_tride': 'colo_tride'}.get(line, f'eat:{line}')
    return dict(
        line=line, defense=name, profile='', label=LINES[line].label, setting='A', seed=seed,
        place=[*LINES].index(line), outside=None if line == 'pal_natural' else outside,
        memory=dict(training=250_000_000, attack=120_000_000), train=train, eval=test
    )


def seeds(line, *attacked, **kw): return [made(line, s, attacked=v, **kw) for s,v in enumerate(attacked)]


@pytest.fixture(scope='module')
def quick(): return prepare(dict(preset='quick'))


def options_of(plan, line): return defense(cell_of(own := plan_of(plan, line), line, 0), own.recipe).options


def test_claims_compare_models_that_differ_in_what_they_are_about(quick):
    "The split: nothing but `combine`; self-transfer: nothing but `self_transfer`; the rest of the ablation likewise."
    def apart(a, b):
        return {
            key
            for key in options_of(quick, a).keys() & options_of(quick, b).keys()
            if options_of(quick, a)[key] != options_of(quick, b)[key]
        }
    assert (
        apart('ensemble_at', 'eat_none') == {'combine'}
        and apart('eat', 'eat_none') == {'self_transfer'}
        and apart('eat', 'eat_full') == {'combine'}
        and apart('joint_at', 'eat_ensemble') == {'combine'}
    )
    assert (
        apart('eat', 'eat_unclean') == {'w_clean', 'w_transfer'}
        and apart('eat', 'eat_class') == {'split_unit'}
        and apart('eat', 'eat_five') == {'members'}
        and apart('pal_at', 'ensemble_at') == {'members'}
    )
    assert options_of(quick, 'eat_unclean')['w_transfer'] == .5 and apart('eat', 'eat_narrow') == set()
    assert {line for t in TABLES.values() for line in t.lines} == set(LINES) and {
        line for c in CLAIMS for line in (c.line, *c.controls)
    } <= set(MAIN)


def test_trainings_are_those_of_the_experiments(quick):
    """A model that another table has trained with this budget is found; only the longer and the narrower one are this
    table's own."""
    other = plan(
        'baselines',
        parameters(dict(preset='quick', defenses='eat,pal_at,ensemble_at,eat_none,colo_tride', profile='official'))
    )
    other = replace(other, recipe=replace(other.recipe, settings=quick.recipe.settings))
    known = {c.defense: trained_as(other, c).address for c in cells(other)}
    mine = {line: trained_as(own := plan_of(quick, line), cell_of(own, line, 0)).address for line in LINES}
    assert {line: mine[line] for line in known} == known and len(set(mine.values())) == len(LINES)
    assert (plan_of(quick, 'at_long').recipe.epochs, plan_of(quick, 'eat_narrow').recipe.dim) == (
        3 * quick.recipe.epochs, quick.recipe.dim // 3
    )


def test_the_recipe_for_photographs(tmp_path):
    for k in range(4):
        (tmp_path/f'kind{k}').mkdir()
        for i in range(3): Image.new('RGB', (30, 30), (60*k, 80*i, 9)).save(tmp_path/f'kind{k}'/f'{i}.png')
    paper = prepare(dict(preset='paper', dataset=str(tmp_path), out=str(tmp_path/'out')))
    (s,), r = paper.recipe.settings, paper.recipe
    assert (s.eps, s.step_size, s.steps) == pytest.approx((8 / 255, 2 / 255, 10)) and (
        r.model, r.dim, r.epochs, r.pairs, r.lr, r.weight_decay, r.crop, r.allow_self
    ) == ('resnet50', 512, 30, 60, 1e-4, 1e-4, 224, False)
    assert protocol(paper)['restarts'] == 5 and (
        protocol(paper)['step_size'], protocol(paper)['steps']
    ) == pytest.approx((1 / 255, 32))
    assert [options_of(paper, 'pal_at')[key] for key in ('warm_epochs', 'decay_every')] == [3, 5] and options_of(
        replace(paper, dataset='cub'), 'pal_at'
    )['decay_every'] == 2.5
    assert (
        options_of(paper, 'eat')['absent'] == 'refuse'
        and options_of(paper, 'eat_five')['absent'] == 'negative'
        and options_of(paper, 'eat_two')['absent'] == 'refuse'
        and options_of(paper, 'colo_tride')['eps'] == pytest.approx(8 / 255)
    )
    assert (
        prepare(dict(preset='paper', dataset=str(tmp_path), backbone='resnet18', epochs=3)).recipe.model == 'resnet18'
    )


def test_curves_share_their_point_to_the_last_bit(quick):
    wanted, p = points(quick, 'eat'), protocol(quick)
    assert [(round(q['eps'] / p['eps'], 6), q['steps']) for q in wanted] == [(f, 32) for f in (0.5, 1, 2)] + [
        (1, 1), (1, 10)
    ]
    assert {key: wanted[1][key] for key in p} == p and all(
        q['step_size'] * q['steps'] / q['eps'] == pytest.approx(p['step_size'] * p['steps'] / p['eps']) for q in wanted
    )
    # a radius ends at the whole pixel range
    assert (
        len(points(prepare(dict(preset='small')), 'eat')) == 5 + 5
        and points(quick, 'adp') == []
        and points(prepare(dict(preset='paper')), 'eat')[4]['eps'] == 1.0
    )


def test_quick_has_the_controls_and_little_work(quick):
    "Nine models: what the first paragraph and the figures need."
    assert {c for claim in CLAIMS[:3] for c in (claim.line, *claim.controls)} <= set(quick.defenses) and len(
        quick.defenses
    ) == 9
    assert (quick.recipe.limit, quick.recipe.settings[0].steps, quick.recipe.settings[0].step_size) == (
        400, 4, 0.05
    ) and prepare(dict(preset='quick', limit=80)).recipe.limit == 80
    small = prepare(dict(preset='small'))
    assert (
        small.recipe.limit == 500
        and len(small.defenses) == 14
        and {line for claim in CLAIMS for line in (claim.line, *claim.controls)} <= set(small.defenses)
    )


def test_part_of_a_set():
    data = ImageSet(
        torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]),
        ('a', 'b', 'c')
    )
    part = part_of(data, torch.tensor([0, 2, 3, 5]))
    assert (
        part.labels.tolist() == [0, 1, 0, 1]
        and part.classes == ('a', 'c')
        and part.images[:, 0, 0, 0].tolist() == [0, 2, 3, 5]
    )
    assert part_of(data, torch.arange(6)) is data


def test_tables_have_every_number():
    one = table([made('pal_natural', attacked=30.), made('eat')], 'A1').iloc[0].to_dict()
    assert (
        one['Model'] == 'Natural'
        and one['R@1, clean'] == '90.0'
        and one['F1, all'] == '30.0'
        and one['R@1, query'] == '20.0'
        and one['Centre, query'] == '30.0'
    )
    assert one['Collapsed (% of seeds)'] == '0' and table(
        [made('eat', s, collapsed=c) for s, c in ((0, True), (1, False))], 'A1'
    )['Collapsed (% of seeds)'][0].startswith('50 ±')
    assert table(seeds('eat', 10., 20.), 'A1')['NMI, all'][0] == f'15.0 ± {math.sqrt(50):.1f}'
    assert table([made('eat')], 'A5').iloc[0].tolist() == [
        'EAT (our reconstruction)', '45.0', '65.0', '20.0', '55.0', '45.0'
    ]
    assert table([made('colo_tride')], 'A5').iloc[0].tolist() == [
        'COLO-TRIDE', '–', '–', '–', '55.0', '45.0'
    ] and table([made('eat', outside=None)], 'A5').iloc[0].tolist()[4:] == ['–', '–']
    assert table([made('eat')], 'A8').iloc[0].tolist() == [
        'EAT (our reconstruction)', '1.0', '2.0', '600', '70', '250', '120', '3', '96'
    ]
    assert table([made('pal_at')], 'A2').empty


def test_switches_that_a_defence_lacks():
    assert table(
        [made('ensemble_at'), made('eat', combine='leave_one_out', self_transfer='rotate'), made('joint_at')], 'A2'
    ).iloc[:, 1:3].values.tolist() == [['full', 'none'], ['leave one out', 'rotate'], ['full', 'ensemble']]
    assert (
        switch(made('colo_tride'), 'w_clean') == '–'
        and switch(made('pal_at'), 'members') == '1'
        and switch(made('eat', w_clean=0.0), 'w_clean') == '0.0'
        and switch(made('eat'), 'dim') == '32'
    )


def test_beside_the_diagonal():
    assert beside(made('eat')) == 65 and beside(made('eat'), diagonal=True) == 45 and math.isnan(beside(made('pal_at')))


def test_a_verdict_needs_an_interval_clear_of_zero_against_every_control():
    assert (
        verdict([[3.0, 3.1, 2.9]]) == 'held'
        and verdict([[-3.0, -3.1, -2.9]]) == 'reversed'
        and verdict([[1.0, 3.0, -1.0]]) == 'not shown' == verdict([[3.0]])
    )
    assert (
        verdict([[3.0, 3.1, 2.9], [1.0, 3.0, -1.0]]) == 'not shown'
        and verdict([[3.0, 3.1, 2.9], [-3.0, -3.1, -2.9]]) == 'reversed'
    )


def test_trainings_of_equal_seed_are_paired():
    records = [made('eat', 5, attacked=50.), *seeds('eat', 41., 44., 47.), *seeds('eat_none', 40., 42., 44.)[::-1]]
    assert paired(records, 'eat', 'eat_none', lambda r: r['eval']['worst']['all']['F1']) == [1., 2., 3.]


def test_claims_need_three_seeds_and_every_control():
    whole = CLAIMS[2]
    records = seeds('eat', 50., 52., 54.) + seeds('ensemble_at', 40.1, 42., 43.9)
    assert judged(
        records, whole
    ) == {} and 'is not judged: that needs 3 seeds of EAT (our reconstruction), Ensemble-AT and Joint ensemble AT' in claim_text(
        whole, {}
    )
    assert judged(records + seeds('joint_at', 40., 42.), whole) == {}
    found = judged(records + seeds('joint_at', 49., 52., 55.), whole)
    assert (
        {name for name, _ in found.values()} == {'not shown'}
        and all(mean == pytest.approx(0.0) for _, mean in found.values())
        and 'no more than the noise of the seeds' in claim_text(whole, found)
    )
    assert {name for name,_ in judged(records + seeds('joint_at', 45., 47.1, 49.), whole).values()} == {'held'}
    behind = judged(records + seeds('joint_at', 55., 57.1, 59.), whole)
    assert (
        {name for name, _ in behind.values()} == {'reversed'}
        and 'reversed for NMI (−5.0 points)' in claim_text(whole, behind)
        and 'noise' not in claim_text(whole, behind)
    )


def test_claim_table():
    shown = claim_table(seeds('eat', 43., 44., 45.) + seeds('eat_none', 40., 42., 44.) + seeds('pal_at', 40., 41.))
    assert shown.values.tolist() == [['EAT (our reconstruction) − EAT, split only', '3', *['2.0 [−0.5, 4.5]']*4]]
    assert claim_table([made('eat')]).empty


def test_words():
    low = [made('pal_natural', attacked=2.), made('eat', collapsed=True)]
    first,*said = words(low)
    assert (
        first == headline(low)
        and said[0]
        == 'Natural training: AMI, which is 0 for random clusters, falls from 90.0 to 2.0 when all images are attacked.'
        and 'EAT has R@1 90.0' in said[1]
    )
    assert (
        'falls by 2.0 points at most' in said[2]
        and 'at the largest radius, ε = 0.200, at most 5.0 are left' in said[2]
        and said[3].startswith('Images made against natural training hurt no model')
        and said[4] == 'Flagged as collapsed: EAT (our reconstruction).'
        and 'no effect is claimed' in said[5]
        and len(said) == 6
    )
    assert 'gallery falls by 0.0 points at most' in words([made('pal_at', steps=(50., 40., 42.))])[0]
    assert any(
        '1 step does more than 10 steps, by over a point of R@1, to AT' in text
        for text in words([made('pal_at', steps=(30.0, 42.0, 40.0))])
    )
    three = seeds('eat_none', 50., 50., 50., matrix=((40., 70.), (70., 50.))) + seeds('ensemble_at', 40., 40.1, 39.9)
    said = ' '.join(words(three))
    assert (
        'The split (EAT, split only against Ensemble-AT, mean difference in brackets): held for NMI (10.0 points)'
        in said
        and 'Self-transfer is not judged' in said
        and 'no effect' not in said
    )
    assert (
        'made against another differs by 5.0 points between the split only and Ensemble-AT; that the split makes these'
        ' images transfer less: held.'
        in said
    )


def test_the_first_paragraph_names_the_controls_that_match():
    "Whatever else is on the page: a control of the same cost that does as well comes first."
    eat, near = seeds('eat', 50., 52., 54.), seeds('joint_at', 49., 52., 55.)
    first = words(eat + seeds('ensemble_at', 40.1, 42., 43.9) + near + seeds('pal_natural', 1., 2., 3.))[0]
    assert (
        'EAT is ahead of Ensemble-AT in NMI (10.0), F1 (10.0), Centre (10.0) and R@1 (10.0). Joint ensemble AT matches'
        ' EAT within the noise of the seeds in NMI (0.0)'
        in first
    )
    assert 'Ensemble-AT is ahead of EAT in NMI (−5.0)' in words(eat + seeds('ensemble_at', 55., 57.1, 59.) + near)[0]
    few = words([made('eat', attacked=50.), made('ensemble_at')])[0]
    assert (
        few.startswith('Whether EAT is better than a control of the same cost is not judged: that needs 3 seeds')
        and 'NMI 50.0 for EAT and 40.0 for Ensemble-AT' in few
    )
    assert headline([made('pal_at')]) == ''


def test_a_white_box_that_is_weaker_than_borrowed_images_is_suspicious():
    assert (
        borrowed(made('eat')) == 55
        and borrowed(made('eat'), white=True) == 45
        and math.isnan(borrowed(made('pal_natural')))
    )
    said = ' '.join(words([made('eat', outside=((1., 40.), (60., 45.))), made('pal_at')]))
    assert (
        'Suspicious: images made against natural training hurt more than the own white box, by over a point of R@1: EAT'
        ' (our reconstruction). A sign'
        in said
    )
    assert 'hurt no model' in ' '.join(
        words([made('eat', outside=((1.0, 44.5), (60.0, 45.0)))])
    ) and 'from natural' not in ' '.join(words([made('pal_natural')]))


def test_csv():
    rows = [*csv.DictReader(io.StringIO(to_csv(seeds('eat', 10., 20.) + [made('pal_at')]).decode()))]
    mine = {(r['table'], r['line'], r['column']): r for r in rows}
    assert (
        (r := mine['A1', 'eat', 'F1, all'])['mean'] == '15.0'
        and float(r['sd']) == pytest.approx(math.sqrt(50))
        and r['seeds'] == '2'
        and mine['A3', 'pal_at', 'F1, all']['sd'] == ''
    )
    assert {r['table'] for r in rows} == {'A1', 'A2', 'A3', 'A4', 'A5', 'A7'}


def test_curves():
    r = made('pal_natural')
    assert along(r, 'eps', 'F1') == [(0.05, 61.0), (0.1, 41.0), (0.2, 6.0)] and along(r, 'steps', 'R@1') == [
        (1, 50.0), (5, 42.0), (10, 40.0)
    ]
    assert curve_table([r], 'eps', 'F1').to_dict('records') == [
        {'Model': 'Natural', 'F1, all, ε = 0.050': '61.0', 'F1, all, ε = 0.100': '41.0', 'F1, all, ε = 0.200': '6.0'}
    ]
    f1_eps,f1_steps,*_ = axes = both_curves([r, made('eat')]).axes
    assert (
        len(axes) == 4
        and list(f1_eps.lines[0].get_xdata()) == [0, 0.05, 0.1, 0.2]
        and f1_eps.lines[0].get_ydata()[0] == 90.0
        and f1_eps.lines[0].get_color() == '#7a7a7a'
        and f1_steps.get_xscale() == 'log'
    )


def test_matrices_are_means_over_seeds():
    fig = matrices(
        [
            made('eat'), made('eat', 1, matrix=((60.0, 60.0), (70.0, 50.0))),
            *(made(line) for line in ('adp', 'gal', 'dverge', 'ensemble_at', 'joint_at'))
        ]
    )
    first = next(ax for ax in fig.axes if ax.get_title(loc='left') == 'EAT (our reconstruction)')
    assert (
        [t.get_text() for t in first.texts] == ['50', '60', '70', '50']
        and len(fig.axes) == 10
        and sum(ax.axison for ax in fig.axes) == 6
    )


def test_a_map_keeps_classes_together():
    label = torch.arange(3).repeat_interleave(12)
    emb = torch.eye(8)[label] + .05*torch.randn(36, 8, generator=torch.Generator().manual_seed(0))
    flat = flattened(emb.half())
    near = torch.cdist(flat, flat).fill_diagonal_(math.inf).argmin(1)
    assert flat.shape == (36, 2) and (label[near] == label).all() and torch.equal(flat, flattened(emb.half()))
    assert [
        ax.get_title(loc='left') for ax in class_map(dict(eat=dict(clean=emb, attacked=emb, label=label))).axes
    ] == ['EAT (our reconstruction)\nclean', 'EAT (our reconstruction)\nattacked']


def whole(records):
    return dict(
        experiment='eat', title='<EAT>', dataset='glyphs', preset='smoke', parameters={}, overrides=[], data={},
        device='cpu', settings={'A': dict(eps=0.1)}, attack=dict(limit=0), records=records
    )


def test_page(tmp_path, monkeypatch):
    records = seeds('pal_natural', 1., 2., 3.) + seeds('eat', 50., 50., 50.) + seeds('eat_none', 40., 40., 40.)
    shown = dict(eat=dict(clean=torch.eye(12), attacked=torch.eye(12), label=torch.arange(12) % 3))
    page = write_eat(tmp_path, whole(records), shown).read_text()
    assert (
        page.index('Whether EAT is better') < page.index('Natural training: AMI')
        and '<EAT>' not in page
        and '&lt;EAT&gt;' in page
        and page.count('<img') == 4
        and 'its numbers mean nothing' in page
        and all(f'<h2>{name}: ' in page for name in TABLES)
    )
    assert (
        'our reconstruction' in page
        and '<h2>Attribution</h2>' in page
        and '10.0 [10.0, 10.0]' in page
        and 'held for' in page
        and 'nothing on this page is compared with printed numbers' in page
    )
    assert len(json.loads((tmp_path / 'results.json').read_text())['records']) == 9 and (
        tmp_path / 'table.csv'
    ).read_bytes() == to_csv(records)
    monkeypatch.setitem(sys.modules, 'sklearn', None)                                              # not installed
    monkeypatch.setitem(sys.modules, 'sklearn.manifold', None)
    without = write_eat(tmp_path, whole(records), shown).read_text()
    assert without.count('<img') == 3 and 'Left out: the t-SNE figure needs sklearn' in without
    alone = write_eat(tmp_path, whole([made('eat_class')])).read_text()
    assert (
        alone.count('None of its models was asked for.') == 7
        and '<h2>Training' not in alone
        and '<h2>Attribution' not in alone
    )


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Two models in the smallest size, undisturbed."
    folder = tmp_path_factory.mktemp('small')
    plan = prepare(dict(preset='smoke', defenses='pal_natural,eat', limit=40, epochs=1, out=str(folder)))
    return plan, results(plan, show=False)


def test_the_smallest_run(small):
    plan,found = small
    natural,eat = found['records']
    assert (natural['train']['config']['defense'], eat['train']['config']['defense']) == (
        'pal_natural', 'eat'
    ) and natural['train']['log'][0]['image_steps'] == 0 < eat['train']['log'][0]['image_steps']
    assert (
        natural['eval']['matrix'] is None
        and len(eat['eval']['matrix']) == 3
        and eat['eval']['queries'] == 40
        and (natural['eval']['members'], eat['eval']['members']) == (1, 3)
    )
    for r in found['records']:
        scores = r['eval']['attacked']['all']
        assert (
            set(scores) == {'selfshift', 'nnpos', 'gap', 'centre'}
            and r['eval']['worst']['all']['F1'] == min(s['F1'] for s in scores.values())
            and r['eval']['worst']['query']['R@1'] <= r['eval']['clean']['R@1']
        )
        assert (
            all(t['worst']['query']['R@1'] <= r['eval']['clean']['R@1'] for t in r['eval']['curves'])
            and len(r['eval']['curves']) == 3
        )
    assert any('epochs: 1 (paper: 8)' in text for text in found['overrides'])
    assert (
        natural['outside'] is None
        and eat['memory']['training'] > natural['memory']['training'] > 10**6
        and eat['memory']['attack'] > 10**6
    )


def test_the_model_from_outside_is_natural_training(small):
    plan,found = small
    models = [train_cell(own := plan_of(plan, line), cell_of(own, line, 0), show=False)[0] for line in plan.defenses]
    part = part_of(plan.data.test, class_rows(plan.data.test.labels, limit=40, seed=0))
    budget = {k: protocol(plan)[k] for k in ('eps', 'step_size', 'steps', 'batch_size')}
    kept = found['records'][1]['outside']
    assert (
        torch.tensor(kept) == pytest.approx(transfer_matrix(models, part, **budget), abs=1e-4)
        and kept[0][1] != kept[1][1]
    )
    assert (
        from_outside(replace(plan, defenses=('eat',)), 'eat', 0) is None
        and from_outside(plan, 'pal_natural', 0) is None
    )


def test_the_peak_is_that_of_what_is_held(small):
    """A batch four times as large needs more than three times the memory; members that are attacked one after the
    other need little more than one alone."""
    plan, base = small[0], dict(images=1024, gallery=1024, model='small', dim=32, shape=[1, 28, 28])
    tasks = [
        task_of(plan, line, 'attack') | base | more
        for line, more in (
            ('pal_natural', dict(images=256, gallery=512)), ('pal_natural', {}), ('eat', dict(preset='smoke')),
            ('eat', dict(preset='paper'))
        )
    ]
    few, one, joint, apart = (found for _,found in measured_apart(tasks))
    assert one > 3*few and apart < 1.4*one < joint, (few, one, joint, apart)


def test_a_failed_measurement_leaves_a_gap(small, tmp_path):
    plan = replace(small[0], reports=tmp_path)
    good, bad = task_of(plan, 'pal_natural', 'attack'), dict(task_of(plan, 'eat', 'attack'), model='none')
    with pytest.warns(UserWarning, match='measurement that failed: .*none.*the table of the cost has gaps'):
        found = [*measured_apart([good, bad, good])]
    assert [task for task,_ in found] == [good]
    # a line without a place in A8
    assert set(memory(replace(plan, defenses=('eat_five',)))) == set()


def test_deep_ensembles_are_attacked_member_by_member(small):
    own = plan_of(small[0], 'eat')
    model,_ = train_cell(own, cell_of(own, 'eat', 0), show=False)
    ways = [
        gradient_of(preset, net) for preset, net in (('quick', model), ('paper', model), ('paper', model.members[0]))
    ]
    assert ways[0] is ways[2] is eat_tables.autograd_gradient is not ways[1]
    data, p = small[0].data.test, dict(protocol(small[0]), modes=('retrieval',), scopes=('query',), limit=40)
    joint, apart = (clustered(model, data, show=False, gradient=way, **p).attacked['query'] for way in ways[:2])
    assert {k: v['R@1'] for k,v in apart.items()} == pytest.approx({k: v['R@1'] for k,v in joint.items()}, abs=2.6)


def test_what_is_kept_is_what_is_measured(small):
    "Scores, transfer matrix and embeddings of the stored record against the modules that make them."
    plan,found = small
    own = plan_of(plan, 'eat')
    model,_ = train_cell(own, cell_of(own, 'eat', 0), show=False)
    p, kept = protocol(plan), found['records'][1]['eval']
    direct = clustered(model, plan.data.test, backend=plan.backend, show=False, **p)
    assert direct.clean == kept['clean'] and direct.attacked == kept['attacked']
    part = part_of(plan.data.test, class_rows(plan.data.test.labels, limit=40, seed=0))
    assert (
        len(part) == 40
        and kept['matrix']
        == transfer_matrix(
            model.members, part, **{k: p[k] for k in ('eps', 'step_size', 'steps', 'batch_size')}
        ).tolist()
    )
    shown = pictures(plan.reports, found)['eat']
    assert (
        shown['label'].bincount().tolist() == [20, 20]
        and shown['clean'].shape == (40, 96)
        and (shown['clean'] - shown['attacked']).norm(dim=1).min() > 0
    )


def test_batches_are_made_once_and_the_common_point_costs_nothing(small):
    plan,found = small
    lines = [
        json.loads(text)
        for text in (
            (plan.reports / 'store' / found['records'][1]['eval']['address'] / 'queries.jsonl').read_text().splitlines()
        )
    ]
    # three points, one of which is that of the tables
    assert len(lines) == len({r['key'] for r in lines}) == 7 + 2*3


def test_a_killed_measurement_goes_on(small, monkeypatch, tmp_path):
    "Killed when the fifth batch is kept; the second time only what is missing is attacked, and nothing is trained."
    plan,found = small
    asked,calls = prepare(dict(plan.parameters, out=str(tmp_path))),[]
    kept = eat_tables.append_line
    def dying(*args):
        calls.append(args)
        if len(calls) == 5: raise KeyboardInterrupt
        return kept(*args)
    monkeypatch.setattr(eat_tables, 'append_line', dying)
    with pytest.raises(KeyboardInterrupt): record(asked, 'eat', 0, show=False)
    weights = next(tmp_path.glob('store/train-*/model.safetensors'))
    stamp = weights.stat().st_mtime_ns
    again = record(asked, 'eat', 0, show=False)['eval']
    assert {k: again[k] for k in ('clean', 'attacked', 'curves', 'matrix', 'examples')} == {
        k: found['records'][1]['eval'][k] for k in ('clean', 'attacked', 'curves', 'matrix', 'examples')
    }
    assert len(calls) == 5 + 13 - 4 and weights.stat().st_mtime_ns == stamp


def test_finished_work_needs_no_weights_and_other_weights_are_refused(small):
    plan,found = small
    for weights in plan.reports.glob('store/train-*/model.safetensors'): weights.unlink()
    assert results(plan, show=False)['records'] == found['records']
    first = found['records'][0]
    done,trained = (Run(plan.reports/'store'/first[part]['address']) for part in ('eval', 'train'))
    stamp = (done.folder/'result.json').stat().st_mtime_ns
    # a lost training is made again, and its measurement stays
    (trained.folder/'result.json').unlink()
    assert (
        record(plan, 'pal_natural', 0, show=False)['eval'] == first['eval']
        and (done.folder / 'result.json').stat().st_mtime_ns == stamp
    )
    done.write('result.json', dict(done.read('result.json'), weights='0'*64))
    (trained.folder/'result.json').unlink()
    with pytest.raises(StoreError, match='measured on, found others after training again'): results(plan, show=False)


def test_bad_input_is_refused_before_anything_is_trained(tmp_path):
    for wrong, said in (
        (dict(defenses='act'), "defenses must be one of 'pal_natural'"), (dict(preset='huge'), 'preset must be one of'),
        (dict(datset='x'), 'unknown parameter datset'), (dict(seeds='one'), 'seeds')
    ):
        with pytest.raises(ValueError, match=said): prepare(wrong)
    asked = prepare(dict(preset='smoke', defenses='eat', limit=10**6, out=str(tmp_path)))
    test = asked.data.test
    lone = replace(
        asked,
        data=replace(
            asked.data,
            test=replace(
                test, images=test.images[:101],
                labels=torch.cat([test.labels[:20] * 0 + k for k in range(5)] + [torch.tensor([5])])
            ),
        ),
    )
    with pytest.raises(ValueError, match='every class needs 2 images for centre accuracy'): results(lone, show=False)
    assert not (tmp_path/'store').exists()
