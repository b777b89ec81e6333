"""The guide: nothing of the paper is missing, every place exists and says what it holds, formulas of scores are the
code's, the figure is legible."""
import importlib
import inspect
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest

from robust_dml.attacks import suite as attacks
from robust_dml.metrics import clustering, scores
from robust_dml.core import DEFENSES
from robust_dml.defenses import tuples
from robust_dml.papers.colo_tride import guide

NBS = Path(__file__).resolve().parent.parent/'nbs'
OTHERS = guide.robust_tuples() + guide.ensembles()
ROWS = guide.equations() + guide.attacks() + guide.scores() + OTHERS
NUMBERS = [f'({n})' for n in range(1, 33) if n != 29] # the paper has no (29)


def labels(rows): return [label for row in rows for label in row.label.split(', ')]


def test_the_paper_is_complete():
    others = ['Algorithm 1', *(f'Figure {n}' for n in range(1, 6)), *(f'Table {n}' for n in range(1, 5))]
    assert labels(guide.equations()) == NUMBERS + others


@pytest.mark.parametrize('row', guide.equations(), ids=lambda row: row.label)
def test_function_names_what_it_implements(row):
    "Imported and read by `inspect`, which knows nothing of cells."
    module, _, name = row.code.rpartition('.')
    thing = getattr(importlib.import_module(f'robust_dml.{module}'), name)
    source = inspect.getsource(thing if callable(thing) else importlib.import_module(f'robust_dml.{module}'))
    assert set(labels([row])) <= guide.mentions(source)


def test_sources_name_nothing_that_the_paper_lacks():
    known = set(labels(guide.equations()))
    named = {p.code: p.names - known for module in guide.modules() for p in guide._module(module).values()}
    assert not {
        code: names for code, names in named.items() if names and not code.startswith('papers.colo_tride.guide.')
    }
    assert {p.code for p in guide.named_in('(1)')} >= {
        'triplets.distances.triplet_loss', 'defenses.colo_tride.update_loss'
    }


def test_every_place_that_names_an_equation_is_listed():
    listed = {label: {row.code, *row.also} for row in guide.equations() for label in row.label.split(', ')}
    for module in set(guide.modules()) - {*guide._SPEAKERS}:
        for p in guide._module(module).values(): assert all(p.code in listed[label] for label in p.names), p


def test_links_lead_to_the_cell_that_defines():
    cells = {}
    for code, link in {(row.code, row.link) for row in ROWS} | {
        (code, guide.place(code).link) for row in ROWS for code in row.also
    }:
        file, cell = re.fullmatch(r'\.\./\.\./((?:\w+/)*\d\d_\w+\.ipynb)#cell-id=(\w+)', link).groups()
        book = cells.setdefault(
            file, {c['id']: ''.join(c['source']) for c in json.loads((NBS / file).read_text(encoding='utf-8'))['cells']}
        )
        assert re.search(rf'^(def |class |){code.rpartition(".")[2]}\b(\(|:| =)', book[cell], re.M), code
    assert all((NBS/row.notebook).exists() and (NBS/row.run).exists() for row in ROWS)
    assert {row.run for row in guide.equations() if row.label.startswith('Table')} == {
        f'run_table{n}.ipynb' for n in range(1, 5)
    }


def test_the_other_papers_are_complete():
    "Every defence, attack, role, self-transfer and score that is theirs has a line, whose function is there."
    labels, codes = [row.label for row in OTHERS], {row.code for row in OTHERS}
    assert len(set(labels)) == len(labels) and {
        *clustering.ATTACKS, 'proxy', 'F1', 'AMI', 'Hungarian accuracy', 'A1 to A9', 'B1 to B5'
    } <= {*labels}
    assert {f'defenses.eat.{name}' for name in DEFENSES.names('defenses.eat') if not DEFENSES[name].fixed} | {
        f'defenses.tuples.{f.__name__}' for f in tuples.GRANULARITIES.values()
    } <= codes
    assert {row.run for row in OTHERS} - {''} == {'run_tuples.ipynb', 'run_eat.ipynb'} and all(
        row.notebook and row.says for row in OTHERS
    )


@pytest.mark.parametrize(
    'text, found',
    [
        ('eq. (1)', {'(1)'}), ('eqs. (18) and (22).', {'(18)', '(22)'}), ('eq. (5) to (7)', {'(5)', '(6)', '(7)'}),
        ('eq. (23); eq. (19) at', {'(23)', '(19)'}),
        ('Tables 1 to 3, Figure 5 (a)', {'Table 1', 'Table 2', 'Table 3', 'Figure 5'}),
        ('eqs. (14), (28), and\n    (30)', {'(14)', '(28)', '(30)'}), ('equal (3), 3 tables', set()),
        ('eqs. (4) and (5) of the HM paper', set()),
        ('eqs. (4) and (5) of COLO-TRIDE, Table 1 of\nthe paper', {'(4)', '(5)', 'Table 1'})
    ],
)
def test_mentions(text, found): assert guide.mentions(text) == found


@pytest.mark.parametrize(
    'code', ['collapse', 'triplets.collapse.nothing', 'collapse.collapseness', 'triplets.collapse.torch', '']
)
def test_unknown_places_are_refused(code):
    with pytest.raises(ValueError, match='correct the index'): guide.place(code)


def test_attacks_follow_the_suite():
    assert [row.label for row in guide.attacks()] == [*scores.HEADINGS, *attacks.FIXED]
    for row in guide.attacks():
        attack = next(a for a in (*attacks.SUITE.values(), *attacks.FIXED.values()) if row.label in a.outcomes)
        used = [getattr(f, 'func', f) for f in (attack.objective, attack.targets, attack.measure)]
        assert [getattr(attacks, code.removeprefix('attacks.suite.')) for code in (row.code, *row.also)] == used


def test_cells_of_scores_are_those_of_the_code():
    "The formulas of the table, evaluated, give what `scores` gives."
    gen, high = random.Random(0), {'TMA': 1., 'ES:D': 2.}
    before = {
        h: gen.uniform(60 if h not in ('CA-', 'QA-') else 0, 70 if h not in ('CA-', 'QA-') else 10)
        for h in scores.ARS_HEADINGS
    } | {'GTT': 100.0}
    after = {h: gen.uniform(20, 50)/100*high.get(h, 100) for h in scores.HEADINGS}
    for name, of, cells in (
        ('ERS', guide._ERS, scores.ers_cells(after)), ('ARS', guide._ARS, scores.ars_cells(before, after))
    ):
        headings = [h for group in of for h in group.split(', ')]
        assert sorted(headings) == sorted(cells)
        for group, latex in of.items():
            for h in group.split(', '):
                assert eval(latex.replace(r'\,', '*'), {}, {'v_1': after[h], 'v_0': before.get(h)}) == pytest.approx(
                    cells[h]
                ), (name, h)


def test_html_has_all_rows_and_links():
    page = guide.html(ROWS)
    assert page.count('<tr>') == len(ROWS) + 1 and all(
        f'href="{row.link}"' in page and f'<b style="white-space:nowrap">{row.label}</b>' in page for row in ROWS
    )
    assert all(
        row.latex.count('{') == row.latex.count('}') and row.latex.count(r'\bigl') == row.latex.count(r'\bigr')
        for row in ROWS
    )
    assert '<b>' not in guide.html([ROWS[0]._replace(says='a <b> & c')]) and '&lt;b&gt; &amp; c' in guide.html(
        [ROWS[0]._replace(says='a <b> & c')]
    )


def test_pipeline_is_legible():
    """At 7 inches: no small print, nothing over the edge, no two texts on each other, every text wholly in its box or
    outside all."""
    agg = pytest.importorskip('matplotlib.backends.backend_agg')
    patches = pytest.importorskip('matplotlib.patches')
    figure = guide.pipeline()
    renderer = agg.FigureCanvasAgg(figure).get_renderer()
    assert figure.get_size_inches()[0] == 7
    texts = [t for t in figure.axes[0].texts if t.get_text()]
    assert len(texts) > 30 and min(t.get_fontsize() for t in texts) >= 8
    extents = {t: t.get_window_extent(renderer) for t in texts}
    assert all(e.x0 > 0 and e.y0 > 0 and e.x1 < figure.bbox.x1 and e.y1 < figure.bbox.y1 for e in extents.values())
    assert not [
        (a.get_text(), b.get_text()) for a, b in itertools.combinations(texts, 2) if extents[a].overlaps(extents[b])
    ]
    boxes = [p.get_window_extent(renderer) for p in figure.axes[0].patches if isinstance(p, patches.FancyBboxPatch)]
    for t, e in extents.items():
        for box in boxes:
            assert not box.overlaps(e) or (
                box.x0 < e.x0 and e.x1 < box.x1 and box.y0 < e.y0 and e.y1 < box.y1
            ), t.get_text()
    shown = {f'({n})' for t in texts for n in re.findall(r'\((\d+)\)', t.get_text())}
    assert shown == {f'({n})' for n in (*range(3, 14), 32)}


@pytest.mark.parametrize('moved', ['pn', 'a'])
def test_arrows_of_a_sketch_change_the_hardness(moved):
    """Solid ones, applied to the drawn points, make the triplet harder, dashed ones easier; only the images of the
    phase have any."""
    ax, to_hex = (
        pytest.importorskip('matplotlib.figure').Figure().subplots(), pytest.importorskip('matplotlib.colors').to_hex
    )
    guide._sketch(ax, 0., 0., moved)
    at = dict(zip('apn', [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == 'o']))
    def hardness(points): return math.dist(points['a'], points['p']) - math.dist(points['a'], points['n'])
    for colour, sign in ((guide._ATTACK, 1), (guide._ASSIST, -1)):
        ways = {t.xyann: t.xy for t in ax.texts if t.arrow_patch and to_hex(t.arrow_patch.get_edgecolor()) == colour}
        assert {name for name in at if at[name] in ways} == set(moved) and len(ways) == len(moved)
        assert sign*(hardness({name: ways.get(xy, xy) for name, xy in at.items()}) - hardness(at)) > .1
