"""Local against global resistance: the numbers by hand, the claims in words, the page, and the whole sweep in the
smallest size."""
import json
import math

import pytest

from robust_dml.study import experiments
from robust_dml.study.locality import plane, points, resistances, table, words, write_locality

BEFORE = {'CA+': 50., 'CA-': 2., 'QA+': 48., 'QA-': .4, 'ES:R': 80., 'LTM': 80., 'GTM': 80., 'GTT': 100.}


def record(top, seed, near=40., wide=30., collapsed=False, **other):
    "A record whose GTM in its sound form is `near` and whose QA+ is `wide`."
    after = {
        'CA+': 30.0, 'CA-': 12.0, 'QA+': wide, 'QA-': 10.36, 'TMA': 0.6, 'ES:D': 0.4, 'ES:R': 40.0, 'LTM': 40.0,
        'GTM': 60.0, 'GTM fixed': near, 'LTM fixed': 38.0, 'GTT': 30.0
    }
    log = [
        dict(epoch=e, loss=0.2, dist_ap=0.4, dist_an=1.0, separability=0.8, collapseness=-0.5, assisted=0.0)
        for e in range(2)
    ]
    options = {} if top is None else dict(top=top)
    train = dict(address='train-0', config=dict(defense='x', options=options), log=log, provenance=dict(python='3.11'))
    test = dict(
        address='eval-0', benign={'R@1': 80.0}, before=BEFORE, after=after, ars_cells={h: 50.0 for h in BEFORE},
        indicators=dict(mean_distance=1.0), collapsed=collapsed, queries=10, excluded=0, backend='torch'
    )
    return (
        dict(
            setting='A', defense='natural' if top is None else f'topweighted:top={top}', profile='',
            label='<Natural>' if top is None else f'Top-weighted, top = {top}', seed=seed, place=0, train=train,
            eval=test
        )
        | other
    )


def results(records):
    return dict(
        experiment='locality', title='<Sweep>', device='cpu', dataset='glyphs', preset='smoke', parameters={},
        overrides=[], data={}, settings={'A': dict(eps=0.1)}, attack=dict(steps=3), records=records
    )


def sweep(first, last):
    return points([record(0., s, *v) for s,v in enumerate(first)] + [record(1., s, *v) for s,v in enumerate(last)])


def test_resistances_are_cells_of_ars():
    "GTM 80 -> 40 keeps half; QA+ 48 -> 30 keeps 30/48; QA- 0.4 -> 10.36 of the way to 100 loses a tenth."
    near,wide = resistances(record(0., 0))
    assert near == pytest.approx(50.) and wide == pytest.approx((100*30/48 + 90)/2)
    assert (
        resistances(record(0.0, 0, near=20.0))[0] == pytest.approx(25.0)
        and resistances(record(0.0, 0, near=20.0))[1] == wide
    )


def test_points_follow_w_and_others_come_last():
    found = points(
        [record(None, 0), record(1.0, 1), record(1.0, 0, collapsed=True), record(0.0, 0, near=20.0), record(0.5, 0)]
    )
    assert [p.top for p in found] == [0., .5, 1., None] and found[0].near == (25.,)
    assert [len(p.records) for p in found] == [1, 1, 2, 1] and [p.collapsed for p in found] == [0, 0, 1, 0]


@pytest.mark.parametrize('first, last, claimed', [
    ([(40., 30.), (42., 30.5)], [(60., 20.), (61., 20.5)], (True, True)),    # both beyond the spread
    ([(40., 30.), (60., 30.5)], [(50., 20.), (61., 20.5)], (False, True)),   # the seeds of GTM differ as much
    ([(40., 30.)], [(60., 20.)], (False, False))])                          # one seed
def test_words_claim_no_more_than_the_spread(first, last, claimed):
    said, = words(sweep(first, last))
    local,world = said.split('Global resistance')
    assert ('by more than the spread' in local, 'by more than the spread' in world) == claimed
    assert ('no effect is claimed' in local, 'no effect is claimed' in world) == tuple(not c for c in claimed)


def test_words_without_a_sweep():
    assert words(points([record(.5, 0)])) == [] == words(points([record(None, 0)]))
    assert words(points([record(0.5, 0, collapsed=True)])) == [
        'Flagged as collapsed, so that their resistance means nothing: Top-weighted, top = 0.5.'
    ]


def test_figure_shows_means_in_the_order_of_w():
    ax = plane(points([record(1., 0, 60., collapsed=True), record(0., 0, 20.), record(0., 1, 40.), record(None, 0)]))
    path, = ax.lines
    assert list(path.get_xdata()) == pytest.approx([37.5, 75.0]) and [t.get_text() for t in ax.texts] == [
        'w = 0', 'w = 1', '<Natural>'
    ]
    strong = [c for c in ax.collections if c.get_sizes()[0] == 52]
    assert [len(c.get_facecolors()) for c in strong] == [1, 0, 1]  # the collapsed one is hollow
    assert len(plane(points([record(None, 0)])).lines) == 0


def test_table_has_every_number():
    shown = table(points([record(0., 0, 40., 30.), record(0., 1, 48., 30.), record(None, 0)]))
    assert shown['Local'].tolist() == [f'55.0 ± {math.sqrt(50):.1f}', '50.0'] and shown['GTM fixed after'].tolist() == [
        f'44.0 ± {math.sqrt(32):.1f}', '40.0'
    ]
    assert {'R@1', 'QA+ after', 'QA- after', 'GTM after', 'GTT after', 'Mean distance', 'Global', 'Collapsed'} | {
        f'{h} resistance' for h in BEFORE
    } <= set(shown)
    undefined = record(0., 0)
    undefined['eval']['ars_cells']['CA-'] = None
    assert table(points([undefined]))['CA- resistance'].tolist() == ['0/0']


def test_page(tmp_path):
    page = write_locality(
        tmp_path, results([record(0.0, 0), record(1.0, 0, collapsed=True), record(None, 0)])
    ).read_text()
    assert '<Sweep>' not in page and '&lt;Sweep&gt;' in page and '<Natural>' not in page and page.count('<img') == 2
    assert 'a construction of this project' in page and 'its numbers mean nothing' in page and '1 of 1' in page
    assert json.loads((tmp_path/'results.json').read_text())['records'][0]['label'] == 'Top-weighted, top = 0.0'


def test_a_record_without_the_sound_form_is_named():
    lacking = record(0., 0)
    del lacking['eval']['after']['GTM fixed']
    with pytest.raises(ValueError, match="found no 'GTM fixed'; evaluate it again"): resistances(lacking)


def test_the_whole_sweep(tmp_path):
    "Two weights in the smallest size: trained, attacked, drawn; the second time nothing is computed."
    asked = experiments.parameters(
        dict(preset='smoke', defenses='topweighted:top=0,topweighted:top=1', limit=20, out=str(tmp_path))
    )
    plan = experiments.plan('locality', asked)
    found = experiments.results(plan, show=False)
    assert [p.top for p in points(found['records'])] == [0.0, 1.0] and len(
        experiments.STUDIES['locality'].defenses
    ) == 5
    assert found['records'][0]['eval']['after'] != found['records'][1]['eval']['after']
    assert write_locality(plan.folder, found) == tmp_path/'locality-glyphs-smoke'/'index.html'
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('store/*/*')}
    assert experiments.results(plan, show=False)['records'] == found['records'] and before == {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob('store/*/*')
    }
