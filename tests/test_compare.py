"""Paired comparison: enumerated permutations, other libraries' intervals, torn stores, the words, and the score that a
collapse does not raise."""
import itertools
import json
import math
from dataclasses import replace
from html import escape

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn

from robust_dml.study import compare
from robust_dml.data.archives import QueryGallery
from robust_dml.triplets.collapse import is_collapsed
from robust_dml.study.compare import KEYS, METRICS, answers, attack_again, check_same, comparison, differences, holm
from robust_dml.study.compare import kept, pairs, per_query, plane, query_interval, retained_robustness
from robust_dml.study.compare import seed_interval, stored, suite_line, swap_test, words, write_compare
from robust_dml.core import generator
from robust_dml.data.sets import glyphs
from robust_dml.defenses.base import act, natural
from robust_dml.metrics.evaluate import evaluate
from robust_dml.study.experiments import by_name, cells
from robust_dml.models.networks import build
from robust_dml.metrics.scores import ARS_HEADINGS, HEADINGS, ars, ers
from robust_dml.runs.store import Run, StoreError, append_line, read_lines, to_json
from robust_dml.defenses.train import train

LTM, TMA = (METRICS.index(h) for h in ('LTM', 'TMA'))


def table(key, trainings=1, queries=8, keeps=.5):
    "Plausible outcomes of every query, from a generator."
    gen, values = generator(0, key), torch.zeros(trainings, queries, len(KEYS), dtype=torch.float64)
    for i,(moment, h) in enumerate(KEYS):
        drawn = torch.rand(trainings, queries, generator=gen).double()
        if h in ('TMA', 'ES:D'): values[..., i] = drawn
        elif h[:2] in ('CA', 'QA'): values[..., i] = 50 + 10*drawn if moment == 'before' else 40*drawn
        else: values[..., i] = 100.*(drawn < (.9 if moment == 'before' else keeps))
    return values


def metrics(means):
    "The metrics of one row of means, written out."
    of = dict(zip(KEYS, means.tolist()))
    before, after = (
        {h: of[moment, h] for h in names} for moment, names in (('before', ARS_HEADINGS), ('after', HEADINGS))
    )
    return [before['ES:R'], *after.values(), ers(after), ars(before, after), of['after', 'suite']]


def difference(first, second):
    return (
        torch.tensor(
            [[a - b for a, b in zip(metrics(x.nanmean(0)), metrics(y.nanmean(0)))] for x, y in zip(first, second)]
        )
        .double()
        .mean(0)
    )


@pytest.mark.parametrize('trainings', [1, 2])
def test_swap_test_is_the_enumeration_of_all_swaps(trainings):
    """Rows of a query are exchanged between the models, for all trainings at once, in all 2^8 ways; four standard
    errors of 20000 draws."""
    first, second = table('a', trainings), table('b', trainings, keeps=.2)
    found, hits = difference(first, second).abs(), torch.zeros(len(METRICS))
    for pattern in itertools.product((False, True), repeat=8):
        swap = torch.tensor(pattern)[None, :, None]
        hits += difference(second.where(swap, first), first.where(swap, second)).abs() >= found - 1e-9
    exact, p = hits/2**8, swap_test(first, second, seed=0, draws=20000)
    assert ((p - exact).abs() <= 4*(exact*(1 - exact)/20000).sqrt() + 2e-4).all(), (p, exact)
    assert len({round(v, 4) for v in p.tolist()}) > 6


def test_swap_test_of_a_mean_is_scipys_sign_test():
    first, second = table('a', queries=40), table('b', queries=40, keeps=.3)
    d = (first - second)[0, :, KEYS.index(('after', 'LTM'))].numpy()
    other = stats.permutation_test(
        (d,), lambda v, axis: v.mean(axis), permutation_type='samples', n_resamples=9999, rng=0
    )
    assert swap_test(first, second, seed=0, draws=9999)[LTM].item() == pytest.approx(other.pvalue, abs=.02)


def test_p_is_never_zero_and_blocks_do_not_matter():
    first, second = table('a', queries=60, keeps=1.), table('b', queries=60, keeps=0.)
    p = swap_test(first, second, seed=0, draws=99)
    assert p[LTM] == 1/100 and torch.equal(p, swap_test(first, second, seed=0, draws=99, block=7))
    assert set(swap_test(first, first, seed=0, draws=99).tolist()) == {1.}


def test_interval_sees_the_same_queries_under_both_models():
    "A difference that is the same for every query has no spread, however much the queries differ."
    first, i = table('a', trainings=2), KEYS.index(('after', 'TMA'))
    second = first.clone()
    second[..., i] -= .25
    low, high = query_interval(first, second, seed=0)
    assert low[TMA].item() == pytest.approx(.25) == high[TMA].item() and low[LTM] == high[LTM] == 0
    assert 0 < query_interval(first, table('b', trainings=2), seed=0).diff(dim=0)[0, TMA]


def test_interval_is_scipys_bootstrap():
    first, second = table('a', queries=300), table('b', queries=300, keeps=.3)
    d = (first - second)[0, :, KEYS.index(('after', 'LTM'))].numpy()
    other = stats.bootstrap(
        (d,), lambda v, axis: v.mean(axis), method='percentile', n_resamples=4000, rng=0
    ).confidence_interval
    assert query_interval(first, second, seed=0, draws=4000)[:, LTM].tolist() == pytest.approx(
        [other.low, other.high], abs=1.0
    )


def test_interval_of_a_score_is_over_the_mean_of_the_trainings():
    "Fifty resamples, drawn by hand and scored training by training."
    first, second = table('a', trainings=2), table('b', trainings=2, keeps=.2)
    picked = torch.randint(8, (50, 8), generator=generator(0, 'bootstrap'))
    by_hand = torch.stack([difference(first[:, rows], second[:, rows]) for rows in picked])
    found = query_interval(first, second, seed=0, draws=50)
    assert torch.allclose(found, torch.quantile(by_hand, torch.tensor([.025, .975]).double(), dim=0))


def test_undefined_queries_are_left_out_in_both():
    first, second = table('a', queries=12), table('b', queries=12)
    first[0, :4], second[0, 2:6] = math.nan, math.nan
    one, two = (compare.Answers(name, {}, v, ()) for name,v in (('One', first), ('Two', second)))
    for whole, cut in zip(
        differences(one, two, draws=199),
        differences(one._replace(values=first[:, 6:]), two._replace(values=second[:, 6:]), draws=199)
    ):
        assert whole['values'] == pytest.approx(cut['values']) and whole['difference'] == pytest.approx(
            cut['difference']
        )
    assert swap_test(first, torch.full_like(second, math.nan), seed=0, draws=9).isnan().all()


def test_seed_interval_is_scipys():
    values = [1.2, .4, 2.2, 1.9]
    other = stats.ttest_1samp(values, 0).confidence_interval(.95)
    assert seed_interval(values) == pytest.approx([other.low, other.high])
    assert seed_interval([*values, math.nan]) == pytest.approx([other.low, other.high]) and all(
        map(math.isnan, seed_interval([3.0]))
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm_rejects_as_the_step_down_procedure(p, random):
    "Sorted p-values against 0.05/m, 0.05/(m - 1), ... until the first that fails."
    rejected = set()
    for place,i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i]*(len(p) - place) >= .05: break
        rejected.add(i)
    adjusted, order = holm(p), random.sample(range(len(p)), len(p))
    assert {i for i,v in enumerate(adjusted) if v < .05} == rejected
    assert holm([p[i] for i in order]) == [adjusted[i] for i in order] and all(a >= v for a,v in zip(adjusted, p))


def records(values, batch=3, weights='w'):
    "Lines of a file of queries for a table of one training."
    of, found = dict(zip(KEYS, values.T)), []
    for start in range(0, len(values), batch):
        def part(moment, h): return [None if math.isnan(v) else v for v in of[moment, h][start:start + batch].tolist()]
        for attack in (*(h for h in HEADINGS if not h.startswith('ES')), 'LTM fixed', 'GTM fixed', 'ES'):
            plain = attack.removesuffix(' fixed')
            if attack == 'ES':
                before, after = {'ES:R': part('before', 'ES:R'), 'ES:D': part('after', 'ES:D')}, {
                    h: part('after', h) for h in ('ES:D', 'ES:R')
                }
            else:
                before, after = {attack: part('before', plain) if plain != 'TMA' else part('after', 'TMA')}, {
                    attack: part('after', plain)
                }
            found.append(
                dict(
                    attack=attack, start=start, queries=len(part('after', 'LTM')), weights=weights, before=before,
                    after=after
                )
            )
    return found


def test_rows_are_queries_in_order():
    values = table('a', queries=7, keeps=.8)[0]
    values[2] = math.nan
    lines = records(values)
    found = per_query(lines[::-1])
    assert torch.allclose(found[:, :-1], values[:, :-1], equal_nan=True)
    survives = values[:, [KEYS.index(('after', h)) for h in ('ES:R', 'LTM', 'GTM')]].amin(1)
    assert torch.allclose(found[:, -1], survives, equal_nan=True) and 0 < survives.nanmean() < 100
    with pytest.raises(ValueError, match='the same queries under all ten attacks'):
        per_query([r for r in lines if (r['attack'], r['start']) != ('CA+', 3)])


SETUP = dict(data='abc', size=28, eps=.1, step_size=.01, steps=3, seed=0, limit=0, self_exclusion='id')


@pytest.mark.parametrize(
    'change',
    [dict(data='abd'), dict(size=32), dict(eps=0.2), dict(seed=1), dict(limit=5), dict(self_exclusion='drop_first')],
    ids=lambda c: next(iter(c))
)
def test_unlike_measurements_are_refused(change):
    lines = records(table('a')[0])
    one, two = answers('One', {0: lines}, **SETUP), answers('Two', {0: lines}, **(SETUP | change))
    check_same(one, one._replace(label='Other'))
    with pytest.raises(ValueError, match=f'found {next(iter(change))} .* for One and .* for Two'):
        differences(one, two, draws=9)
    with pytest.raises(ValueError, match='seeds of training'): check_same(one, answers('Two', {1: lines}, **SETUP))
    with pytest.raises(ValueError, match='found queries 8 for One and 7 for Two'):
        check_same(one, answers('Two', {0: records(table('a', queries=7)[0])}, **SETUP))
    with pytest.raises(ValueError, match='found attacks'):
        check_same(one, answers('Two', {0: [r for r in lines if r['attack'] != 'GTM fixed']}, **SETUP))
    with pytest.raises(ValueError, match='same queries in every training'):
        answers('Two', {0: lines, 1: records(table('a', queries=7)[0])}, **SETUP)


def model(name, keeps, trainings=1, queries=150):
    "A model whose trainings differ by nothing but their draws."
    return answers(
        name, {s: records(table(f'{name} {s}', queries=queries, keeps=keeps)[0], batch=50) for s in range(trainings)},
        **SETUP
    )


def test_marks_need_both_noises():
    many = {
        (l['first'], l['second'], l['metric']): l
        for l in pairs([model('Weak', 0.2, 3), model('Strong', 0.7, 3), model('Twin', 0.7, 3)], draws=1999)
    }
    assert (
        len(many) == 3 * 14
        and many['Weak', 'Strong', 'LTM']['mark'] == '●'
        and many['Weak', 'Strong', 'LTM']['better'] == 'Strong'
    )
    assert {many['Strong', 'Twin', m]['mark'] for m in METRICS} == {'○'} and many['Strong', 'Twin', 'LTM'][
        'better'
    ] == ''
    once = {l['metric']: l for l in pairs([model('Weak', .2), model('Strong', .7)], draws=999)}
    assert once['LTM']['mark'] == '◐' and once['LTM']['trainings'] == 1 and math.isnan(once['LTM']['seeds'][0])
    low, high = many['Weak', 'Strong', 'LTM']['seeds']
    assert low < many['Weak', 'Strong', 'LTM']['difference'] < high < 0
    with pytest.raises(ValueError, match='needs more than 280 draws'):
        pairs([model('Weak', .2), model('Strong', .7)], draws=279)


def test_one_training_that_turns_the_sign_takes_the_full_mark_away():
    "The mean difference is far from chance over the queries, but the trainings disagree."
    first = torch.cat(
        [table('x', queries=150, keeps=0.9), table('y', queries=150, keeps=0.9), table('z', queries=150, keeps=0.1)]
    )
    second = torch.cat(
        [table('u', queries=150, keeps=0.1), table('v', queries=150, keeps=0.1), table('w', queries=150, keeps=0.9)]
    )
    one, two = (
        answers(name, {s: records(v) for s, v in enumerate(t)}, **SETUP)
        for name, t in (('One', first), ('Two', second))
    )
    line = next(l for l in pairs([one, two], draws=999) if l['metric'] == 'LTM')
    assert (
        line['holm'] < 0.05
        and line['seeds'][0] < 0 < line['seeds'][1]
        and line['mark'] == '◐'
        and line['better'] == 'One'
    )


def test_better_follows_the_direction_of_the_metric():
    first, second = table('a', queries=150), table('a', queries=150)
    second[..., KEYS.index(('after', 'TMA'))] *= .5
    one, two = (answers(name, {0: records(t[0])}, **SETUP) for name,t in (('One', first), ('Two', second)))
    by = {l['metric']: l['better'] for l in pairs([one, two], draws=999)}
    assert (by['TMA'], by['ERS'], by['LTM']) == ('Two', 'Two', '')


def test_suite_is_the_mean_of_the_trainings():
    line = suite_line(model('Weak', .6, 2))
    assert (
        line['suite'] == pytest.approx(sum(p[1] for p in line['points']) / 2) and line['points'][0] != line['points'][1]
    )
    assert line['interval'][0] < line['suite'] < line['interval'][1] and line['suite'] < min(line['each'].values())
    queries = model('Weak', .6, 2).values[..., -1].mean(0).numpy()
    other = stats.bootstrap(
        (queries,), lambda v, axis: v.mean(axis), method='percentile', n_resamples=4000, rng=0
    ).confidence_interval
    assert suite_line(model('Weak', .6, 2), samples=4000)['interval'] == pytest.approx([other.low, other.high], abs=.7)


def part(marks='●', trainings=3, collapsed=()):
    names = ('One', 'Two', 'Three')
    lines = [
        dict(
            first=a, second=b, metric=m, mark=marks, trainings=trainings, values=[9.0, 7.5], difference=1.5,
            queries=[1.0, 2.0], seeds=[0.5, 2.5], p=0.001, holm=0.01, better=a
        )
        for a, b in itertools.combinations(names, 2)
        for m in METRICS
    ]
    suite = [
        dict(
            label=n, before=60.0, each={'LTM': 20.0, 'GTM': 30.0}, suite=9.0 - 1.5 * i, interval=[5.0, 10.0],
            points=[[60.0, 9.0 - 1.5 * i]] * trainings
        )
        for i, n in enumerate(names)
    ]
    own = [
        dict(
            label=n, collapsed=trainings * (n in collapsed), r_at_1=[60.0] * trainings, gap=[0.3] * trainings,
            ers=[40.0] * trainings, ars=[50.0] * trainings, retained=[45.0] * trainings
        )
        for n in names
    ]
    return dict(setting='A', draws=999, pairs=lines, suite=suite, own=own)


@pytest.mark.parametrize(
    'mark, trainings, said',
    [
        ('●', 3, 'the difference of 1.5 points is larger than the noise of queries and trainings.'),
        ('○', 3, 'the difference of 1.5 points is within noise.'),
        ('◐', 3, 'is larger than the noise of queries, but not than that of the trainings.'),
        ('◐', 1, 'with one training of each, the noise of the training is not known.')
    ],
)
def test_words_claim_what_the_mark_says(mark, trainings, said):
    text = words(part(mark, trainings))
    assert said in text and 'One keeps most: 9.0 % (5.0 to 10.0) of 60.0 % without attack. Two keeps 7.5 %' in text
    assert ('trainings' in text.split('Of 42 differences')[1]) == (trainings > 1)


def test_words_do_not_praise_a_collapsed_model():
    text = words(part(collapsed=('One',)))
    assert (
        'Two keeps most' in text
        and 'Three keeps 6.0 %' in text
        and text.endswith('One: flagged as collapsed, so attack scores of these models do not mean robustness.')
    )
    assert 'keeps most' not in words(part(collapsed=('One', 'Three')))


def test_figure_draws_collapsed_models_hollow():
    made = {n: [dict(defense='hm', label=n, place=0, eval=dict(collapsed=n == 'Two'))] for n in ('One', 'Two', 'Three')}
    ax = plane(part(trainings=1)['suite'], made)
    marks = {c.get_label(): c for c in ax.collections if c.get_label() and not c.get_label().startswith('_')}
    assert list(marks) == ['One', 'Two, collapsed', 'Three']
    assert (
        marks['One'].get_offsets().tolist() == [[60.0, 9.0]]
        and len(marks['One'].get_facecolor()) == 1
        and len(marks['Two, collapsed'].get_facecolor()) == 0
    )


@pytest.mark.parametrize(
    'resists, r_at_1, same, other, score',
    [
        (100.0, 60.0, 0.4, 1.2, 100.0), (100.0, 90.0, 0.4, 1.2, 100.0), (100.0, 30.0, 0.4, 1.2, 50.0),
        (40.0, 60.0, 0.4, 0.405, 10.0), (40.0, 60.0, 0.0, 0.0, 0.0), (40.0, 60.0, 0.5, 0.4, 0.0),
        (-5.0, 60.0, 0.4, 1.2, 0.0)
    ],
)
def test_own_score_by_hand(resists, r_at_1, same, other, score):
    "ARS, times the share of a natural R@1 of 60, times the gap in units of 0.02."
    assert retained_robustness(
        resists, r_at_1=r_at_1, natural=60.0, indicators=dict(same_distance=same, other_distance=other)
    ) == pytest.approx(score)


@given(st.floats(-50, 100), st.floats(0, 100), st.floats(.1, 100), st.floats(0, 1.9), st.floats(0, 2))
def test_own_score_has_its_range(resists, r_at_1, reference, same, other):
    score = retained_robustness(
        resists, r_at_1=r_at_1, natural=reference, indicators=dict(same_distance=same, other_distance=other)
    )
    assert 0 <= score <= max(0., resists) and (score == 0 or other > same)
    assert score <= retained_robustness(
        resists, r_at_1=min(100.0, r_at_1 + 1), natural=reference,
        indicators=dict(same_distance=same, other_distance=min(2.0, other + 0.01))
    )


class Pulled(nn.Module):
    "A net whose embeddings lie around one point, or in it."
    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        emb = nn.functional.normalize(self.net(x), dim=1)
        return nn.functional.one_hot(torch.zeros(len(emb), dtype=torch.long), emb.shape[1]) + self.scale*emb


def test_own_score_orders_what_ers_and_ars_do_not():
    "Constant: 0, below natural, below robust; ARS has the constant first, and ERS has it before natural."
    split, found = glyphs(train_classes=12, test_classes=6, per_class=10), {}
    def trained(defense):
        net = build('small', dim=32, size=28, channels=1, seed=0)
        train(net, split.train, defense, epochs=8, pairs=32, lr=1e-3, weight_decay=1e-4, show=False)
        return net.eval()
    plain = trained(natural(margin=.2, miner='semihard'))
    nets = dict(
        natural=plain, robust=trained(act(margin=0.2, eps=32 / 255, step_size=16 / 255, steps=4)),
        shrunken=Pulled(plain, 0.001).eval(), constant=Pulled(plain, 0.0).eval()
    )
    for name,net in nets.items():
        found[name] = evaluate(net, split.test, eps=16/255, step_size=4/255, steps=5, show=False, backend='torch')
    own = {
        n: retained_robustness(
            e.ars, r_at_1=e.benign['R@1'], natural=found['natural'].benign['R@1'], indicators=e.indicators
        )
        for n, e in found.items()
    }
    assert own['constant'] == 0 < own['shrunken'] < .1*own['natural'] < own['natural'] < .7*own['robust']
    assert max(found, key=lambda n: found[n].ars) == 'constant' and found['constant'].ers > found['natural'].ers
    assert [n for n,e in found.items() if is_collapsed(e.indicators)] == ['shrunken', 'constant']


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Two models, compared in the smallest size."
    out = str(tmp_path_factory.mktemp('compare'))
    asked = dict(study='compare', preset='smoke', defenses='natural,act', limit=30, seeds='0,1', out=out)
    plan = by_name(asked)[1]
    return plan, comparison(plan, show=False)


def test_comparison_agrees_with_the_table(smoke):
    plan, found = smoke
    assert plan.folder.name == 'compare-glyphs-smoke' and [len(p['pairs']) for p in found['comparisons']] == [14]
    by = {line['metric']: line for line in found['comparisons'][0]['pairs']}
    for heading in ('LTM', 'CA+'):
        first, second = (
            [r['eval']['after'][heading] for r in found['records'] if r['label'] == label]
            for label in ('Natural', 'ACT')
        )
        assert by[heading]['values'] == pytest.approx([sum(first) / 2, sum(second) / 2]) and by[heading][
            'difference'
        ] == pytest.approx(sum(first) / 2 - sum(second) / 2)
    for score in ('ers', 'ars'):
        first = [r['eval'][score] for r in found['records'] if r['label'] == 'Natural']
        assert by[score.upper()]['values'][0] == pytest.approx(sum(first)/2)
    assert by['LTM']['trainings'] == 2 and to_json(comparison(plan, show=False)) == to_json(found)


def test_lost_outcomes_are_made_again(smoke, capsys):
    plan, found = smoke
    files = [plan.reports/'store'/r['eval']['address']/'queries.jsonl' for r in found['records']]
    whole, result = [read_lines(Run(f.parent), f.name) for f in files], files[0].with_name(
        'result.json'
    ).stat().st_mtime_ns
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:2000])
    others = [dict(whole[2][0], weights='0'*64, before=whole[2][1]['before']), dict(whole[2][0], attack='another')]
    # lines of other weights and attacks are left alone
    for line in others: append_line(Run(files[2].parent), files[2].name, line)
    capsys.readouterr()
    assert to_json(comparison(plan, show=False)) == to_json(found)
    said = capsys.readouterr().out
    assert (
        said.count('attacking again') == 2 == len(said.splitlines())
        and files[0].parent.name in said
        and result == files[0].with_name('result.json').stat().st_mtime_ns
    )
    for f,lines in zip(files, whole):
        assert [(r['before'], r['after']) for r in kept(Run(f.parent))] == [(r['before'], r['after']) for r in lines]


def test_outcomes_against_a_gallery_of_its_own_are_made_again(smoke, tmp_path):
    "The first fifty test images are queries only, the others are searched."
    plan, _ = smoke
    apart = replace(
        plan, data=QueryGallery(plan.data.name, plan.data.train, plan.data.test, queries=50), reports=tmp_path,
        recipe=replace(plan.recipe, seeds=(0,))
    )
    found = comparison(apart, show=False)
    for f in tmp_path.glob('store/*/queries.jsonl'): f.unlink()
    assert to_json(comparison(apart, show=False)) == to_json(found)


def test_stores_that_do_not_fit_are_refused(smoke, tmp_path):
    plan, found = smoke
    from shutil import copytree
    copytree(plan.reports/'store', tmp_path/'store')
    runs = {(r['label'], r['seed']): Run(tmp_path/'store'/r['eval']['address']) for r in found['records']}
    assert stored('Natural', [runs['Natural', 0], runs['Natural', 1]]).values.shape == (2, 30, 19)
    with pytest.raises(ValueError, match='once and in the same way for every seed'):
        stored('Both', [runs['Natural', 0], runs['ACT', 0]])
    card = runs['ACT', 1].read('card.json')
    card['config']['protocol']['steps'] += 1
    runs['ACT', 1].write('card.json', card)
    with pytest.raises(ValueError, match='in the same way for every seed'):
        stored('ACT', [runs['ACT', 0], runs['ACT', 1]])
    with pytest.raises(ValueError, match='found steps 3 for Natural and 4 for ACT'):
        check_same(stored('Natural', [runs['Natural', 1]]), stored('ACT', [runs['ACT', 1]]))
    (runs['Natural', 0].folder/'queries.jsonl').unlink()
    with pytest.raises(StoreError, match='expected the outcome of every query in .*queries.jsonl'):
        stored('Natural', [runs['Natural', 0]])
    cell = next(iter(cells(plan)))
    other = dict(found['records'][0], eval=dict(found['records'][0]['eval'], weights='0'*64))
    runs['Natural', 0].write('result.json', dict(runs['Natural', 0].read('result.json'), weights='0'*64))
    with pytest.raises(StoreError, match='expected the weights that eval-'):
        attack_again(replace(plan, reports=tmp_path), cell, other, show=False)


def test_one_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match='needs two models at least, found ACT'):
        by_name(dict(study='compare', preset='smoke', defenses='act', out=str(tmp_path)))
    with pytest.raises(ValueError, match='unknown parameter datset'): by_name(dict(study='compare', datset='glyphs'))


def test_page(smoke, tmp_path):
    _, found = smoke
    page = write_compare(tmp_path, dict(found, title='<b>Smoke</b>')).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'compare.csv', 'figures.svg', 'index.html', 'results.json']
    assert (
        '&lt;b&gt;Smoke' in page
        and page.count('<script') == 1
        and 'http' not in page
        and page.count('data:image/png') == 1
    )
    assert 'its numbers mean nothing' in page and page.index('class="headline"') < page.index('All pairs') < page.index(
        'The worst of the suite'
    ) < page.index(escape("This project's own score"))
    lines = (tmp_path/'compare.csv').read_text().splitlines()
    assert len(lines) == 1 + 14 and lines[0].startswith('Setting,First,Second,Metric,Of first,Of second,Difference,')
    assert len(json.loads((tmp_path/'results.json').read_text())['comparisons'][0]['pairs']) == 14


def test_page_without_natural_training_has_no_own_score(smoke, tmp_path):
    _, found = smoke
    pieces = [dict(p, own=[dict(line, retained=[]) for line in p['own']]) for p in found['comparisons']]
    assert (
        'needs natural training among the models' in write_compare(
            tmp_path, dict(found, comparisons=pieces)
        ).read_text()
    )
    assert 'needs natural training' not in write_compare(tmp_path, found).read_text()
    renamed = [dict(r, defense='hm') for r in found['records']]
    assert all(line['retained'] == [] for line in compare.own_lines(compare.by_setting(renamed)['A']))
