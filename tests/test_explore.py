"""The explorer: what the page says is what a direct attack does; it needs no other file; bad choices are refused in a
sentence."""
import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
import PIL.Image
import pytest
import torch

from robust_dml.study import experiments, explore
from robust_dml.attacks.suite import SUITE, members, run_attack
from robust_dml.core import generator
from robust_dml.data.sets import ImageSet
from robust_dml.models.networks import build, embed
from robust_dml.neighbors import knn
from robust_dml.runs.store import read_results

ROOT = Path(__file__).resolve().parent.parent
GRID = explore.Grid(2, (0, 51), (1, 4))


@pytest.fixture(scope='module')
def s():
    "Random weights on noise: 40 images of 8 classes."
    images = (torch.rand(40, 1, 28, 28, generator=generator(0, 'test explore'))*255).to(torch.uint8)
    return explore.searched(
        build('small', dim=16, size=28, channels=1, seed=0), ImageSet(images, torch.arange(40) // 5, tuple('abcdefgh'))
    )


@pytest.fixture(scope='module')
def found(s): return explore.precompute(s.model, s.dataset, torch.tensor([3, 17]), GRID, step_size=.03)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    plan = experiments.plan(
        'explore',
        experiments.parameters(
            dict(preset='smoke', defenses='natural,act', out=str(tmp_path_factory.mktemp('reports')))
        ),
    )
    return explore.explore_results(plan, show=False)


@pytest.mark.parametrize('attack', [*explore.GOALS])
def test_records_are_direct_attacks(s, found, attack):
    "Outcome, attacked pixels and distance moved of every record, from `run_attack` on the same two queries."
    numbers, images = found
    mine = [(k, r) for k, r in enumerate(numbers['records']) if r['attack'] == attack]
    assert len(mine) == 8
    both = members(s.gallery, torch.tensor([3, 17]))
    for (first, r), (second, other) in zip(mine[::2], mine[1::2]):
        out = run_attack(
            s.model, SUITE[attack], s.dataset.batch(both.row), both, s.gallery, eps=r['eps'] / 255, step_size=0.03,
            steps=r['steps'], seed=0
        )
        assert torch.equal(images[[first, second]], (out.images*255).round().to(torch.uint8))
        with torch.no_grad(): apart = (embed(s.model, out.images) - both.emb).norm(dim=1)
        for i, record in enumerate((r, other)):
            assert record['outcome'] == pytest.approx({h: v[i].item() for h, v in out.after.items()}, abs=1e-4)
            assert record['moved'] == pytest.approx(apart[i].item(), abs=1e-3)


def test_lists_are_nearest_neighbours(s, found):
    "The first results of an attacked query are those of an exact search without its own image."
    numbers, images = found
    for k, r in enumerate(numbers['records']):
        if r['attack'] in explore._ASKED_BY_OTHERS or not r['eps']: continue
        row = torch.tensor([[3, 17][r['query']]])
        with torch.no_grad(): emb = embed(s.model, images[k][None].float()/255)
        near = knn(emb, s.gallery.emb, k=8, rows=row)[1][0].tolist()
        # pixels are rounded for the page, which may swap neighbours at the end of the list
        assert len({*near} & {*r['top']}) >= 7


def test_places_are_consistent(s, found):
    "Both lists tell the same story: an image that is in both has the places that each of them says."
    before = {(b['query'], b['attack']): b for b in found[0]['searches']}
    for r in found[0]['records']:
        b = before[r['query'], r['attack']]
        assert b['place'] != 39 and len({*r['top']}) == 8
        for place, image in enumerate(r['top']):
            if image in b['top']:
                assert (r['came'][place], b['top'].index(image)) == (b['top'].index(image), r['came'][place]) and r[
                    'went'
                ][b['top'].index(image)] == place
        if b['watched'] in r['top']: assert r['place'] == r['top'].index(b['watched'])
        if b['watched'] in b['top']: assert b['place'] == b['top'].index(b['watched'])
        if not r['eps']: assert (r['top'], r['place'], r['moved']) == (b['top'], b['place'], 0)


def test_wanted_direction(s):
    "A large budget moves the watched image where the attacker wants it."
    for attack in ('CA+', 'CA-', 'QA+', 'QA-', 'TMA', 'GTT'):
        t = explore.tried(s, attack, torch.arange(20), eps=.5, step_size=.05, steps=20)
        moved = sum(r['place'] - b['place'] for b, r in zip(t.searches, t.records))
        assert moved < 0 if explore.GOALS[attack].wants == 'up' else moved > 0, attack


def test_first_result_is_r_at_1(s):
    t = explore.tried(s, 'ES', torch.arange(40), eps=.1, step_size=.03, steps=4)
    for q, (b, r) in enumerate(zip(t.searches, t.records)):
        for part in (b, r): assert part['outcome']['ES:R'] == 100*(part['top'][0]//5 == q//5)
    assert explore.r_at_1(s) == pytest.approx(sum(b['outcome']['ES:R'] for b in t.searches)/40)


def test_asking_image_is_not_in_its_results(s, found):
    for b in found[0]['searches']:
        asks = [3, 17][b['query']] if b['asks'] is None else b['asks']
        assert asks not in b['top'] or b['watched'] == asks # CA+ may draw the image itself


def test_bad_choices(s):
    budget = dict(eps=.1, step_size=.1, steps=1)
    with pytest.raises(ValueError, match="attack must be one of 'CA\\+'.*found 'PGD'"):
        explore.show(s, query=0, attack='PGD', eps=.1, steps=1)
    with pytest.raises(ValueError, match=r'query must lie in \[0, 39\], found 40'):
        explore.tried(s, 'ES', [40], **budget)
    with pytest.raises(ValueError, match='count must lie in'): explore.tried(s, 'ES', [0], count=40, **budget)
    with pytest.raises(ValueError, match=r'eps'): explore.tried(s, 'ES', [0], eps=2., step_size=.1, steps=1)
    with pytest.raises(ValueError, match='a grid needs a query'): explore.Grid(0, (8,), (1,))
    with pytest.raises(ValueError, match='CA\\+ needs queries that are in the gallery'):
        explore.tried(s._replace(first=20), 'CA+', [0], **budget)
    with pytest.raises(ValueError, match='expected what explore_results returns, found no title'):
        explore.write_explorer(Path('nowhere'), {})
    assert not Path('nowhere').exists()


def test_queries_with_a_gallery_of_their_own(s):
    "Queries first, gallery behind them: all images are named by their place in the set."
    images = torch.cat([s.dataset.images[::2], s.dataset.images[1::2]])
    parted = explore.searched(
        s.model, ImageSet(images, torch.cat([s.dataset.labels[::2], s.dataset.labels[1::2]]), s.dataset.classes),
        queries=20
    )
    t = explore.tried(parted, 'QA-', [0, 7], eps=.1, step_size=.03, steps=2)
    assert all(20 <= image < 40 for r in (*t.searches, *t.records) for image in r['top']) and all(
        b['watched'] >= 20 for b in t.searches
    )


def test_chosen_queries_can_find_something():
    labels = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    assert {labels[q].item() for q in explore.chosen(labels, 2)} == {1, 3}
    with pytest.raises(ValueError, match='expected 3 classes.*found 2'): explore.chosen(labels, 3)


def test_page_is_self_contained(results, tmp_path):
    hostile = dict(results, title='</script><img src=http://x onerror=alert(1)>', dataset='<b>')
    page = explore.write_explorer(tmp_path/'e', hostile).read_text(encoding='utf-8')
    assert sorted(p.name for p in (tmp_path/'e').iterdir()) == ['README.md', 'index.html', 'results.json']
    assert page.count('</script>') == 2 and '<img' not in page and '<b>,' not in page
    assert not re.search(r'<(link|script|img|iframe)[^>]*(src|href)', page) and "default-src 'none'" in page
    assert json.loads(re.search(r'id="found">(.*?)</script>', page, re.S)[1]) == json.loads(json.dumps(hostile))
    kept = read_results(tmp_path/'e')
    assert {k: v for k, v in kept.items() if k != 'said'} == json.loads(json.dumps(hostile))
    assert explore.write_explorer(tmp_path/'again', kept).read_text(encoding='utf-8') == page # built from its results


def test_sheets_hold_what_the_page_looks_up(results):
    "Picture k of the first sheet is image k of the list; picture k of a model's sheet belongs to its record k."
    plan = experiments.plan('explore', experiments.parameters(dict(preset='smoke')))
    sheets = [PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in results['sheets']]
    def tile(sheet, k): return sheet.crop((k%32*28, k//32*28, k%32*28 + 28, k//32*28 + 28)).tobytes()
    for k, image in enumerate(results['images']):
        assert tile(sheets[0], k) == plan.data.test.images[image].numpy().tobytes()
    assert results['labels'] == plan.data.test.labels[results['images']].tolist()
    for sheet, m in zip(sheets[1:], results['models']):
        for k, r in enumerate(m['records']):
            apart = (
                torch.frombuffer(bytearray(tile(sheet, k)), dtype=torch.uint8).int()
                - plan.data.test.images[results['queries'][r['query']]].flatten().int()
            )
            # a goal that is reached leaves the image as it is
            assert apart.abs().max() <= r['eps'] and (apart.any() or not r['moved'])
    assert len(sheets) == 3 and results['models'][0]['eval'] is None # nothing was evaluated here, and the page says so


def test_form_with_and_without_widgets(s, monkeypatch):
    live = explore.form(s, steps=1)
    assert [c.description for c in live.children[:4]] == ['query', 'attack', 'ε (1/255)', 'steps']
    with pytest.raises(Exception): live.children[1].value = 'PGD'
    monkeypatch.setattr(explore, 'find_spec', lambda name: None)
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    assert explore.form(s, steps=1).data.startswith(b'\x89PNG')


def test_start_page_leads_to_every_notebook():
    text = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells if c.cell_type == 'markdown')
    links = set(re.findall(r'\]\(([^)]+)\)', text))
    assert not {
        str(p.relative_to(ROOT / 'nbs')) for p in ROOT.glob('nbs/**/*.ipynb') if '.ipynb_checkpoints' not in p.parts
    } - links - {'index.ipynb'} and not [link for link in links if not (ROOT / 'nbs' / link).exists()]


def test_committed_page_shows_the_models_of_table_1(built_page):
    "Weights and R@1 are those that the table quotes, and no page is larger than promised."
    folder = built_page('explorer-glyphs-quick').parent
    found, table = (read_results(ROOT/'reports'/name) for name in ('explorer-glyphs-quick', 'table1-glyphs-quick'))
    records = {r['label']: r for r in table['records']}
    assert [m['label'] for m in found['models']] == ['Natural', 'HM', 'COLO-TRIDE (official)'] and {
        *found['grid']['attacks']
    } == {*SUITE}
    for m in found['models']:
        r = records[m['label']]
        assert (m['train'], m['eval'], m['weights']) == (
            r['train']['address'], r['eval']['address'], r['eval']['weights']
        ) and m['r_at_1'] == pytest.approx(r['eval']['benign']['R@1'])
    assert (folder/'index.html').stat().st_size < 3_000_000 and (folder/'results.json').stat().st_size < 2_000_000
