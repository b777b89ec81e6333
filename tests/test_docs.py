"""The sources of the HTML pages: everything is reachable, every link has an end, and what is read from the library is
the library's. Without Sphinx and Node."""
import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import prepare
from builder import api, catalogues, notebooks, results

from robust_dml.attacks import suite, strong
from robust_dml.core import DEFENSES
from robust_dml.defenses import colo_tride
from robust_dml.defenses.base import make_defense
from robust_dml.metrics import clustering
from robust_dml.papers.colo_tride import guide

ROWS = guide.equations() + guide.attacks() + guide.scores() + guide.robust_tuples() + guide.ensembles()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "All pages, with pictures that are not drawn."
    folder, patch = tmp_path_factory.mktemp('source'), pytest.MonkeyPatch()
    patch.setattr(catalogues.Pictures, '__call__', lambda self, name, draw, alt: f'![{alt}](pictures/{name}.png)')
    patch.setattr(results, 'build_page', lambda folder: (folder/'index.html').write_text('built'))
    prepare.write_pages(folder, tmp_path_factory.mktemp('cache')/'pictures')
    patch.undo()
    return folder


def pages(folder)->dict[str, str]:
    "Markdown of every page by its address without suffix."
    found = {}
    for path in [*folder.rglob('*.md'), *folder.rglob('*.ipynb')]:
        name = path.relative_to(folder)
        if name.parts[0] == '_extra': continue
        text = (
            path.read_text(encoding='utf-8')
            if path.suffix == '.md'
            else '\n\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
        )
        found[str(name.with_suffix(''))] = text
    return found


def described(folder)->set[str]:
    return {
        f'{p.stem}.{name}'
        for p in (folder / 'api').glob('*.md')
        for name in re.findall(r'^`{3,}\{py:(?:function|class|data)\} (\w+)', p.read_text(encoding='utf-8'), re.M)
    }


def test_every_page_is_reachable(source):
    found, reached, todo = pages(source), set(), ['index']
    while todo:
        here = todo.pop()
        reached.add(here)
        for block in re.findall(r'```\{toctree\}\n(.*?)```', found[here], re.S):
            for line in block.splitlines():
                if line and not line.startswith(':'): todo.append(str((Path(here).parent/line)))
    assert reached == set(found)
    assert {
        str(p.relative_to(ROOT).with_suffix(''))
        for p in (ROOT / 'nbs').rglob('*.ipynb')
        if '.ipynb_checkpoints' not in p.parts
    } <= reached | {'nbs/index'}
    assert not (source/'nbs'/'index.ipynb').exists(), 'the start page of JupyterLab is none of these pages'


def test_worked_pages_extend_and_the_others_stand_in_their_folders(source):
    listed = {
        name: re.findall(r'\]\(([\w/]+)\.ipynb\)', (source / 'nbs' / f'{name}.md').read_text(encoding='utf-8'))
        for name in ('extend', 'papers', 'study')
    }
    assert listed['extend'] == ['data/02_add_a_data_set', 'attacks/04_add_an_attack', 'defenses/06_add_a_defense']
    assert 'papers/03_gallery' in listed['papers'] and {'study/06_explore', 'explore'} <= {
        *listed['study']
    }


def test_explorer_and_gallery_are_reached_from_the_start_page(source):
    start, here = (source/'index.md').read_text(encoding='utf-8'), (source/'explore.md').read_text(encoding='utf-8')
    assert '](explore.md)' in start and '\nexplore\n' in start and 'href="reports/index.html"' in start
    for address in ('reports/index.html', 'reports/explorer-glyphs-quick/index.html'):
        assert f'href="{address}"' in here and (source/'_extra'/address).is_file()


def test_links_have_an_end(source):
    found = pages(source)
    labels = {label for text in found.values() for label in re.findall(r'^\(([\w-]+)\)=$', text, re.M)}
    assert len(labels) > 500
    for name, text in found.items():
        for link in re.findall(
            r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)', re.sub(r'```.*?```|`[^`]*`|\$[^$]*\$', '', text, flags=re.S)
        ):
            if link.startswith('#'): assert link[1:] in labels, (name, link)
            elif not link.startswith('http'): assert (source/name).parent.joinpath(link).exists(), (name, link)
        for link in re.findall(r'href="([^"#]+)', text):
            assert (source/'_extra'/Path(name).parent/link).resolve().exists(), (name, link)


def test_links_of_outputs_lead_to_cells_that_export(source):
    cells = {
        p.resolve(): {c.id for c in nbformat.read(p, 4).cells if c.source.startswith('#| export')}
        for p in notebooks.library()
    }
    count = 0
    for path in notebooks.library():
        for output in (o for c in nbformat.read(path, 4).cells for o in c.get('outputs', ())):
            for name, cell in re.findall(
                r'href="([\w./]+)#cell-id=(\w+)"', output.get('data', {}).get('text/html', '')
            ):
                assert (
                    cell in cells[(path.parent / name).resolve()]
                ), f'{path.name} links to a cell that {name} no longer has ({cell}): run it again'
                count += 1
    assert count > 100


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.label} {row.code}')
def test_every_line_of_the_guide_leads_to_a_cell_and_a_signature(source, row):
    table = (source/'equations.md').read_text(encoding='utf-8')
    cell = row.link.split('cell-id=')[1]
    assert f'](#cell-{cell})' in table and catalogues.linked(row.code) in table
    book = nbformat.read(source/'nbs'/row.notebook, 4).cells
    at = next(i for i, c in enumerate(book) if c.cell_type == 'markdown' and c.source == f'(cell-{cell})=')
    assert book[at+1].id == cell and 'export' in book[at+1].metadata['tags']
    if catalogues.linked(row.code).startswith('{py:obj}'): assert row.code in described(source)
    if row.run: assert f'(nbs/{row.run})' in table and (source/'nbs'/row.run).exists()


def test_links_of_pages_to_signatures(source):
    known = described(source)
    asked = {
        code
        for text in pages(source).values()
        for code in re.findall(r'\{py:obj\}`[^<`]*<robust_dml\.([\w.]+)>`', text)
    }
    assert len(asked) > 100 and asked <= known, asked - known


def test_api_has_every_public_name(source):
    for module in guide.modules():
        public = next(
            ast.literal_eval(n.value)
            for n in ast.parse(
                (ROOT / 'robust_dml' / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
            ).body
            if isinstance(n, ast.Assign)
        )
        assert {f'{module}.{name}' for name in public} <= described(source), module


def test_a_table_of_parameters():
    code = (
        'def f(\n    x:Tensor, # (B, D) float: a | b\n    *,\n    eps:float=.5, # radius ε in [0, 1]\n    n:int=3,\n   '
        ' **more, # of `g`\n)->Tensor: # (B,) float\n    "Do."\n'
    )
    rows = api._rows(ast.parse(code).body[0], api.comments(code))
    assert rows == [
        ('x', 'Tensor', '', '(B, D) float: a | b'), ('eps', 'float', '0.5', 'radius ε in [0, 1]'),
        ('n', 'int', '3', ''), ('**more', '', '', 'of `g`'), ('returns', 'Tensor', '', '(B,) float')
    ]
    assert api.table(rows).splitlines()[2] == r'| `x` | `Tensor` |  | (B, D) float: a \| b |'
    one_line = 'def g(a:int, b:int=2)->int: # the sum\n    "Add."\n'
    assert ('b', 'int', '2', 'the sum') in api._rows(ast.parse(one_line).body[0], api.comments(one_line))


def test_outputs_of_notebooks_become_pages():
    assert (
        notebooks.in_pages('<a href="05_collapse.ipynb#cell-id=1a2b">x</a>')
        == '<a href="05_collapse.html#cell-1a2b">x</a>'
    )
    assert (
        notebooks.in_pages('<td>$a_i &lt; b$</td><td>2 $ and</td>')
        == r'<td><span class="math notranslate nohighlight">\(a_i &lt; b\)</span></td><td>2 $ and</td>'
    )
    assert (
        notebooks.links('[x](13_attacks.ipynb#cell-id=ab) [y](../reports/claims/README.md)')
        == '[x](#cell-ab) <a href="../reports/claims/index.html">y</a>'
    )


def test_catalogues_are_complete(source):
    text = (source/'attacks.md').read_text(encoding='utf-8')
    for name in (*suite.SUITE, *suite.FIXED, *strong.BEYOND, *clustering.ATTACKS):
        assert f'### {name}\n' in text and f'pictures/attack {name}.png' in text
    text = (source/'defenses.md').read_text(encoding='utf-8')
    for name in (name for name, of in DEFENSES.items() if of.name == name):
        assert f'pictures/defense {name}.png' in text and f'make_defense({name!r}' in text


def test_switches_are_those_of_the_library():
    lines = {re.match(r'\| `(\w+)`', line)[1]: line for line in catalogues.switches_table().splitlines()[2:]}
    assert set(lines) == set(colo_tride.PAPER)
    for key, line in lines.items(): assert ('**' in line) == (colo_tride.PAPER[key] != colo_tride.OFFICIAL[key]), key
    assert '| `near` | **`far`** |' in lines['weighting'] and 'eq. (6)' in lines['weighting']


@pytest.mark.parametrize('name', results.folders())
def test_sentences_are_those_of_the_reports(name):
    sentence, page = results.sentence_of(name), ' '.join(results.said(name))
    assert len(sentence) > 30 and sentence.endswith('.')
    assert all(part in page for part in re.split(r'(?<=\.)\s+(?=[A-Z])', sentence))
    assert notebooks.run_notebook(results.experiments()[name]).exists()


def test_collapse_is_not_left_out():
    flagged = [
        name for name in results.folders() if any('flagged as collapsed' in text for text in results.said(name)[1:])
    ]
    assert flagged and all('flagged as collapsed' in results.sentence_of(name) for name in flagged)


def test_no_machine_paths(source):
    for path in source.rglob('*'):
        if path.suffix in ('.md', '.ipynb', '.py', '.css'):
            assert not re.search(r'(?<![\w.])/(home|root|tmp|Users|work)/', path.read_text(encoding='utf-8')), path


def test_pages_are_built_once(tmp_path, monkeypatch):
    "And anew when a result changes."
    made = []
    monkeypatch.setattr(results, 'REPORTS', tmp_path/'reports')
    monkeypatch.setattr(results, 'build_page', lambda folder: made.append((folder/'index.html').write_text('x')))
    (tmp_path/'reports'/'a').mkdir(parents=True)
    (tmp_path/'reports'/'runs.jsonl').write_text('')
    (tmp_path/'reports'/'a'/'results.json').write_text('{}')
    (tmp_path/'cache').mkdir()
    for _ in range(2): assert results.built('a', tmp_path/'cache')/'index.html' == tmp_path/'cache'/'a'/'index.html'
    assert len(made) == 1
    (tmp_path/'reports'/'a'/'results.json').write_text('{"b": 1}')
    results.built('a', tmp_path/'cache')
    assert len(made) == 2


def test_unknown_parts_are_refused():
    assert prepare.fill('a {{b}}', dict(b='c')) == 'a c'
    with pytest.raises(ValueError, match='found another in a page'): prepare.fill('{{x}}', dict(b='c'))


def test_without_npm_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match='expected npm, which brings MathJax'):
        prepare.fetch_mathjax(tmp_path/'source', tmp_path/'cache')


def test_unchanged_files_keep_their_time(tmp_path):
    new, old = tmp_path/'new', tmp_path/'old'
    for folder in (new, old): (folder/'sub').mkdir(parents=True)
    for name, before, now in (('same', 'a', 'a'), ('sub/other', 'a', 'b')):
        (old/name).write_text(before), (new/name).write_text(now)
    (old/'gone').write_text('x'), (new/'sub/more').write_text('y')
    time = (old/'same').stat().st_mtime_ns
    prepare.bring(new, old)
    assert {str(p.relative_to(old)): p.read_text() for p in old.rglob('*') if p.is_file()} == {
        'same': 'a', 'sub/other': 'b', 'sub/more': 'y'
    }
    assert (old/'same').stat().st_mtime_ns == time


@pytest.mark.parametrize('name', ['CA+', 'QA-', 'TMA', 'ES', 'LTM', 'GTM', 'GTT'])
def test_way_of_a_query_raises_the_objective(name):
    pictures = pytest.importorskip('builder.pictures')
    gallery = suite.Gallery(pictures._on_circle(pictures.DEGREES), torch.tensor(pictures.LABELS))
    attack, queries = (suite.SUITE | suite.FIXED)['GTM fixed' if name == 'GTM' else name], suite.members(
        gallery, torch.tensor([0])
    )
    places, targets = pictures.way(attack, queries, gallery)
    values = torch.cat([attack.objective(q[None], queries, targets, gallery) for q in places])
    assert values[-1] > values[0] + 0.05 and torch.allclose(
        places.norm(dim=1), torch.ones(len(places), dtype=torch.double)
    )


@pytest.mark.parametrize('name, moves', [('natural', 0), ('naive_anp', 6), ('naive_cap', 12), ('naive_sip', 18)])
def test_pictures_show_the_images_of_the_update(name, moves):
    pictures = pytest.importorskip('builder.pictures')
    gen = torch.Generator().manual_seed(0)
    x, label = torch.rand(12, 1, 28, 28, generator=gen), torch.arange(12)//2
    model = pictures.networks.build('small', dim=8, size=28, channels=1, seed=0)
    options = dict(margin=.2) if name == 'natural' else dict(eps=.1, step_size=.05, steps=2, margin=.2, lam=10.)
    images, = pictures.seen_in_update(make_defense(name, **options), model, x, label)
    apart = (images[:,None] - x).abs().flatten(2).amax(2).amin(1)
    assert int((apart > 1e-4).sum()) == moves and apart.max() <= .1 + 1e-6
