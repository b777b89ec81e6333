"""Committed reports: small, complete in themselves, equal to their results; the page that leads to them; what its
script does in a browser."""
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from robust_dml.papers import gallery
from robust_dml.report import blocks, tables
from robust_dml.study.experiments import STUDIES
from robust_dml.runs.store import Run, read_results, to_json

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT/'reports'
FOLDERS = [p for p in gallery.report_folders(REPORTS) if not p.name.endswith('-smoke')]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def committed():
    "Files of reports/ that git keeps."
    if not (ROOT/'.git').exists(): pytest.skip('no checkout')
    names = subprocess.run(
        ['git', 'ls-files', '-z', 'reports'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split('\0')
    return [path for name in names if name and (path := ROOT/name).is_file()]


def test_committed_reports_are_small():
    files = committed()
    assert sum(p.stat().st_size for p in files) < 20e6 and len(files) < 200
    assert not [str(p) for p in files if REPORTS/'store' in p.parents or p.suffix in ('.html', '.png')], 'git rm them'
    assert {p.parent for p in files if p.name == 'results.json'} <= {p.parent for p in files if p.name == 'README.md'}


class Links(HTMLParser):
    "What a page refers to."
    def __init__(self, text):
        super().__init__()
        self.ids, self.found, self.tags = set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == 'id': self.ids.add(value)
            if name in ('src', 'href', 'srcset', 'action', 'data', 'poster', 'xlink:href', 'formaction'):
                self.found.append((name, value))
            if name == 'style': self.found += [('style', url) for url in re.findall(r'url\(([^)]*)\)', value or '')]


def outside(page, folder):
    "Everything that a page would have to fetch, or that leads nowhere."
    links, styles = Links(page), ''.join(re.findall(r'<style>(.*?)</style>', page, re.S))
    wrong = sorted(links.tags & {'link', 'iframe', 'object', 'embed', 'base'}) + re.findall(
        r'url\([^)]*\)|@import', styles
    )
    for name, value in links.found:
        if value.startswith('data:image/png;base64,') and name != 'href': continue
        if name == 'href' and value.startswith('#') and value[1:] in links.ids: continue
        if (
            name == 'href'
            and not re.match(r'[a-z]+:|//|/', value)
            and (folder / value).resolve().is_file()
            and REPORTS in (folder / value).resolve().parents
        ):
            continue
        wrong.append(f'{name} {value[:80]}')
    return wrong




@pytest.mark.parametrize(
    'body',
    [
        '<img src="a.png">', '<a href="https://x.org">', '<a href="#nowhere">', '<link rel="stylesheet" href="x">',
        '<style>@import "x"</style>', '<i style="background:url(x.png)"></i>', '<a href="../../README.md">'
    ],
)
def test_outside_is_seen(body): assert outside(body, REPORTS/'errata')


def plain(folder):
    "Whether a report is a table without a page of its own."
    study = STUDIES.get(folder.name.partition('-')[0])
    return study is not None and not study.write


@pytest.mark.parametrize('folder', [f for f in FOLDERS if plain(f)], ids=lambda p: p.name)
def test_tables_are_what_results_say(folder):
    results = read_results(folder)
    columns = tables.layout_of(results).columns
    table = tables._table(results, columns)
    assert tables.to_csv(table, columns) == (folder/'table.csv').read_bytes()


def smallest():
    "One committed report of each kind."
    of = {}
    for folder in sorted(FOLDERS, key=lambda f: (f/'README.md').stat().st_size):
        results = read_results(folder)
        kind = results.get('experiment') or folder.name.partition('-')[0]
        if kind in STUDIES: of.setdefault(kind, folder)
    return list(of.values())


@pytest.mark.parametrize('folder', smallest(), ids=lambda p: p.name)
def test_reports_are_what_results_say(folder, built_page):
    "Built again from results.json and the ledger, text, table and results are the committed ones, byte for byte."
    page = built_page(folder.name)
    for path in (p for p in folder.iterdir() if p.suffix in ('.csv', '.md', '.json')):
        assert (page.parent/path.name).read_bytes() == path.read_bytes(), f'{path}: run make reports'
    assert (page.parent/'figures.svg').is_file() == (folder/'figures.svg').is_file()


@pytest.mark.parametrize('folder', smallest(), ids=lambda p: p.name)
def test_pages_refer_to_nothing_outside(folder, built_page):
    page = built_page(folder.name)
    assert outside(page.read_text(encoding='utf-8'), page.parent) == []


@pytest.fixture(scope='module')
def all_reports(tmp_path_factory):
    "The page that leads to all committed reports, and what it was made of."
    home = tmp_path_factory.mktemp('gallery')
    for path in REPORTS.iterdir():
        if path.name not in ('index.html', 'README.md'): (home/path.name).symlink_to(path)
    return gallery.write_gallery(home)


def test_the_list_of_reports_is_the_committed_one(all_reports):
    text = (REPORTS/'README.md').read_text(encoding='utf-8')
    assert (all_reports.parent/'README.md').read_text(encoding='utf-8') == text, 'run make reports'
    assert not [folder.name for folder in FOLDERS if f']({folder.name}/README.md)' not in text]


def test_every_report_and_run_is_listed(all_reports):
    page = all_reports.read_text(encoding='utf-8')
    listed = gallery.list_reports(REPORTS)
    assert not [folder.name for folder in FOLDERS if f'href="{folder.name}/index.html"' not in page]
    runs = gallery.list_runs(REPORTS, listed)
    by = {run['address']: run for run in runs}
    for r in listed:
        for record in read_results(REPORTS/r['folder']).get('records', ()):
            run, seen = by[record['eval']['address']], record['eval']
            assert (run['r1'], run['ers'], run['ars'], run['collapsed']) == (
                (seen.get('benign') or {}).get('R@1'), seen.get('ers'), seen.get('ars'), seen.get('collapsed')
            )
            assert (
                run['seed'] == record['seed']
                and r['folder'] in run['folders']
                and f'<code>{run["address"]}</code>' in page
            )


def made_up_reports(folder):
    "A report and two runs, one of which no report quotes."
    for name, config, result in (
        (
            'train-1', dict(data='abcdef0123', defense='hm', seed=3, epochs=2, options=dict(eps=32 / 255, steps=4)),
            dict(log=[])
        ),
        (
            'eval-1', dict(train='train-1', protocol=dict(eps=16 / 255, steps=8)),
            dict(benign={'R@1': 50.04}, ers=12.34, ars=None, collapsed=True)
        ),
        ('train-2', dict(data='9876543210', defense='act|x', seed=0), dict(log=[])),
    ):
        run = Run(folder/'store'/name)
        run.write('card.json', dict(kind=name.split('-')[0], config=config))
        run.write('result.json', result)
    (folder/'store'/'eval-2').mkdir()
    (folder/'store'/'eval-2'/'result.json').write_text('{')  # damaged
    blocks.publish(
        folder / 'table1-a-smoke',
        dict(
            title='<b>Mine', experiment='table1', dataset='glyphs', preset='smoke',
            records=[dict(label='HM', train=dict(address='train-1'), eval=dict(address='eval-1'))]
        ),
        blocks.opening('<b>Mine', '', ['HM & others are 50 % right.']),
    )


def test_runs_and_reports_of_a_folder(tmp_path):
    made_up_reports(tmp_path)
    listed = gallery.list_reports(tmp_path)
    assert [(r['folder'], r['title'], r['said'], r['defences']) for r in listed] == [
        ('table1-a-smoke', '<b>Mine', 'HM & others are 50 % right.', ['HM'])
    ]
    quoted, alone = gallery.list_runs(tmp_path, listed)
    assert (
        quoted['address'], quoted['defence'], quoted['dataset'], quoted['seed'], quoted['r1'], quoted['ars'],
        quoted['collapsed'], quoted['presets']
    ) == ('eval-1', 'HM', 'glyphs', 3, 50.04, None, True, ['smoke'])
    assert 'trained at ε 32/255' in quoted['settings'] and 'attacked at ε 16/255' in quoted['settings']
    assert (alone['address'], alone['defence'], alone['dataset'], alone['folders']) == (
        'train-2', 'act|x', '98765432', []
    )
    text = gallery.refresh(tmp_path/'table1-a-smoke'/'index.html').read_text(encoding='utf-8')
    assert (
        '&lt;b&gt;Mine' in text
        and '<b>Mine' not in text
        and text.count('class="run"') == 2
        and text.count('class="card"') == 1
    )
    assert gallery.write_gallery(tmp_path).read_text(encoding='utf-8') == text  # no date, no order of the disk


def in_browser(page, tmp_path):
    "The page after its scripts have run, as text."
    path = tmp_path/'page.html'
    path.write_text(page, encoding='utf-8')
    flags = (
        '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
        ' --disable-component-update --disable-sync --dump-dom'.split()
    )
    return subprocess.run(
        [CHROMIUM, *flags, f'--user-data-dir={tmp_path/"profile"}', path.as_uri()], capture_output=True, text=True,
        timeout=120
    ).stdout


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium')
def test_headers_sort(tmp_path):
    def row(name, *cells, kind=''): return blocks.table_row([name, *cells], kind=kind)
    rows = [
        row('Setting A', '', '', kind='setting'), row('b', blocks.number_cell('9.0 ± 1'), 'x'),
        row('a', '−1,200.5', 'y'), row('c', '–', 'z'), row('d', '10.5', 'w'),
        row('Setting B', '', '', kind='setting'), row('f', '2', 'x'), row('e', '1', 'y')
    ]
    body = [
        blocks.table_box(blocks.table_row(['Name', 'Score', 'Word'], head=True), rows),
        blocks.table_box(blocks.table_row(['Name', 'Score'], head=True), rows, 'fixed')
    ]
    def after(*presses):
        done = in_browser(
            blocks.document(
                'made up', body,
                script=''.join(f"document.querySelectorAll('th button')[{k}].click();" for k in presses)
            ),
            tmp_path,
        )
        return (
            re.findall(r'<th class="who" scope="row">(?:Setting )?(.*?)</th>', done.split('<table>')[1]),
            re.findall(r'aria-sort="(\w+)"', done), done.count('<button')
        )
    assert after() == (list('AbacdBfe'), [], 3)
    # numbers, thousands and minus signs; what is missing stays last
    assert after(1) == (list('AabdcBef'), ['ascending'], 3)
    assert after(1, 1) == (list('AdbacBfe'), ['descending'], 3)
    assert after(1, 1, 1) == (list('AbacdBfe'), [], 3)            # as it was
    assert after(1, 2) == (list('AdbacBfe'), ['ascending'], 3)    # words


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium')
def test_filters_narrow_reports_and_runs(tmp_path):
    made_up_reports(tmp_path)
    page = gallery.write_gallery(tmp_path).read_text(encoding='utf-8')
    def after(script):
        done = in_browser(page.replace('</script>', script + '</script>'), tmp_path)
        return re.findall(r'data-count="[^"]*">([^<]*)<', done)
    assert after('') == ['1 of 1', '2 of 2']
    assert after("fields.dataset.value='glyphs';fields.dataset.oninput()") == ['1 of 1', '1 of 2']
    assert after("fields.experiment.value='table1';fields.defence.value='act x';show()") == ['0 of 1', '0 of 2']
    assert after("words.value='act TRAIN-2';show()") == ['0 of 1', '1 of 2']


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium')
def test_slider_mixes_clean_and_attacked(tmp_path):
    body = blocks.tag('div', blocks.tag('div', kind='set'), kind='query')
    done = in_browser(
        blocks.document('made up', body, script="const s=document.querySelector('input');s.value=25;s.oninput();"),
        tmp_path
    )
    assert (
        'style="--share: 0.25' in done.replace('--share:0.25', '--share: 0.25')
        and 'type="range"' in done
        and '>25 %<' in done
    )


@pytest.mark.parametrize(
    'text', [
        '', '{', '[]', '[1]', '3', 'null', '"a"', '{"records": 3}', '{"records": [{"label": 3}]}', '{"records": "abc"}',
        '{"said": 3}', '{"said": [3]}', '{"title": []}', '{"dataset": {}}', '{"experiment": 7}', '{"points": [[1]]}',
        '{"records": [{"label": "a", "train": {"address": []}}]}', '{"from_run": "eval-9"}', '{"content": "0"}',
        '{"records": [{"from_run": 3}]}', '{"a":' * 2000, '\ufeff{}', '{"dataset": "\\ud800"}',
    ],
)
def test_a_damaged_or_foreign_folder_does_not_break_the_last_cell(tmp_path, text):
    made_up_reports(tmp_path)
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'results.json').write_text(text, encoding='utf-8')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        page = gallery.write_gallery(tmp_path)
    assert 'table1-a-smoke' in page.read_text()
    left = [str(w.message) for w in said if 'is left out of the list' in str(w.message)]
    assert all('other' in sentence for sentence in left)


@pytest.mark.parametrize(
    'card', [3, [], {}, dict(kind=3, config=[]), dict(kind='train', config=dict(data=[], options=3))]
)
@pytest.mark.parametrize('result', [3, [], {}, dict(benign=3, ers='a'), dict(benign={'R@1': 'x'}, ars=[])])
def test_a_foreign_run_does_not_break_the_list(tmp_path, card, result):
    made_up_reports(tmp_path)
    for name in ('train-9', 'eval-9'):
        run = Run(tmp_path/'store'/name)
        for file, value in (('card.json', card), ('result.json', result)):
            if isinstance(value, dict): run.write(file, value)
            else:
                run.folder.mkdir(parents=True, exist_ok=True)
                (run.folder/file).write_bytes(to_json(value))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert 'table1-a-smoke' in gallery.write_gallery(tmp_path).read_text()
