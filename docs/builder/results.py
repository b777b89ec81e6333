"""Finished reports, claims, errata and benchmarks as pages; every number is read from a committed file."""
import hashlib
import json
import re
import shutil
from pathlib import Path

from builder.api import escaped
from builder.notebooks import ROOT, heading, run_notebook
from robust_dml.papers import gallery
from robust_dml.runs.store import read_results
from robust_dml.study.experiments import STUDIES

REPORTS = ROOT/'reports'


def experiments()->dict[str, str]:
    "Folders of the reports that have a page, with the name of the run notebook that wrote them."
    return {r['folder']: r['experiment'] for r in gallery.list_reports(REPORTS)}


def folders()->list[str]: return list(experiments())


def _sentences(said:str)->tuple[str, list[str]]:
    "The setting that a paragraph speaks of ('' for none) and its sentences."
    scene, *rest = re.split(r'(?<=\.)\s+(?=[A-Z])', said)
    return (scene, rest) if re.match(r'Setting \w', scene) and len(scene) < 60 else ('', [scene, *rest])


def said(
    name:str, # folder in reports/
)->list[str]:
    "What a report says in words: its head line, then the paragraphs below it."
    return read_results(REPORTS/name).get('said', [])


def sentence_of(
    name:str, # folder in reports/
)->str:
    "What a report found, in its own words: its head line, and which models collapsed."
    first, *rest = said(name) or ['']
    words = [first]
    for paragraph in rest:
        scene, sentences = _sentences(paragraph)
        flags = [s for s in sentences if 'flagged as collapsed' in s and s not in first]
        words += [scene, *flags] if flags else []
    return ' '.join(filter(None, words))


def reports_page()->str:
    "A line for every committed report."
    parts = [
        '# Reports',
        (
            'Finished runs as the library wrote them; each page names its configuration, flags and provenance. The'
            ' sentence is the first finding of the report itself. Small data sets of characters: these are not the'
            ' papers\' numbers, and "not reproduced" is a result. Search them and the runs behind them on <a'
            ' href="reports/index.html">one page</a>; play with a single query in [the explorer](explore.md).'
        ),
    ]
    written = experiments()
    for experiment in dict.fromkeys(written.values()):
        notebook = run_notebook(experiment)
        title = STUDIES[experiment].title if notebook.stem == 'run_ablation' else heading(notebook)[0]
        parts.append(f'## {escaped(title)}\n\nWritten by [{notebook.stem}](nbs/{notebook.name}).')
        for report in (name for name, mine in written.items() if mine == experiment):
            figure = REPORTS/report/'figures.svg'
            image = (
                f' <a href="reports/{report}/index.html"><img class="plot" loading="lazy" alt="Figures of'
                f' {report}" src="reports/{report}/figures.svg" width="320"></a>'
                if figure.is_file()
                else ''
            )
            parts.append(
                f'<a href="reports/{report}/index.html"><b>{report}</b></a>: {escaped(sentence_of(report))}'
                + (f'\n\n{image}' if image else '')
            )
    return '\n\n'.join(parts) + '\n'


def explorers()->str:
    "Links to the explorers among the reports."
    return '\n'.join(
        f'* <a href="reports/{name}/index.html"><b>{name}</b></a>: {escaped(sentence_of(name))}'
        for name, experiment in experiments().items()
        if experiment == 'explore'
    )


def _fingerprint(folder:Path)->str:
    "Changes with whatever a page is built from."
    sources = (ROOT/'robust_dml').rglob('*.*')
    files = [*folder.glob('*'), REPORTS/'runs.jsonl', *(p for p in sources if p.suffix in ('.py', '.css', '.js', '.html'))]
    found = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file() and p.name != 'index.html'): found.update(path.read_bytes())
    return found.hexdigest()


def build_page(
    folder:Path, # copy of a report, beside links to ledger and examples
)->None:
    "Its page."
    gallery.rewrite(folder)


def built(
    name:str,    # folder in reports/
    cache:Path,  # keeps pages between builds
)->Path:         # folder with the report and its page
    "A report with its page, from the cache where nothing has changed."
    folder, mark = cache/name, cache/f'{name}.sha256'
    now = _fingerprint(REPORTS/name)
    if mark.is_file() and mark.read_text() == now and (folder/'index.html').is_file(): return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(REPORTS/name, folder, ignore=shutil.ignore_patterns('*.safetensors', 'index.html', 'figures'))
    build_page(folder)
    mark.write_text(now)
    return folder


def copy_reports(
    target:Path, # folder whose content lies beside the pages
    cache:Path,  # keeps pages between builds
)->None:
    "Every report with its page, and the page that leads to them."
    cache.mkdir(parents=True, exist_ok=True)
    for shared in ('runs.jsonl', 'examples.zip'):
        if not (cache/shared).exists(): (cache/shared).symlink_to(REPORTS/shared)
    for name in folders(): shutil.copytree(built(name, cache), target/'reports'/name)
    gallery.write_gallery(cache)
    shutil.copy(cache/'index.html', target/'reports')


def claims_page()->str:
    "reports/claims/README.md, with claims linked from the table."
    text = (REPORTS/'claims'/'README.md').read_text(encoding='utf-8').partition('\n---\n')[0]
    text = re.sub(r'^<details><summary>Claim (\d+):', r'<details id="claim-\1"><summary>Claim \1:', text, flags=re.M)
    text = re.sub(r'^\| (\d+) \|', r'| <a href="#claim-\1">\1</a> |', text, flags=re.M)
    text = re.sub(r'!\[([^\]]*)\]\(figures\.svg\)', r'<img class="plot" alt="\1" src="reports/claims/figures.svg">', text)
    return re.sub(
        r'^# .*\n',
        '# Claims and verdicts\n\nWhat `make claims` writes into `reports/claims`; with sorting: <a'
        ' href="reports/claims/index.html">the report</a>.\n',
        text,
        count=1,
    )


def _lines(head, rows)->str:
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in (head, ['---']*len(head), *rows))


def errata_page()->str:
    "What the printed tables say against each other and against the text."
    found = read_results(REPORTS/'errata')
    wrong = [s for s in found['scores'] if s['verdict'] == 'outside']
    parts = [
        '# Errata of COLO-TRIDE',
        (
            f'{escaped(sentence_of("errata"))} Everything, with the repairs tried: <a'
            ' href="reports/errata/index.html">the report</a>; how it is computed:'
            ' [36_errata](nbs/papers/colo_tride/01_errata.ipynb).'
        ),
        '## Printed twice, differently',
        '\n'.join(
            '* ' + '; '.join(f'{escaped(c["cell"])}: **{escaped(c["printed"])}**' for c in cells)
            for cells in found['disagreements']
        ),
        '## Scores that other printed numbers exclude',
        'Beyond is the distance to the nearest value that rounding allows.',
        _lines(
            ['table', 'row', 'score', 'printed', 'recomputed', 'beyond'],
            [
                [
                    s['table'], f'{escaped(s["dataset"])} {escaped(s["defense"])}', escaped(s['heading']),
                    escaped(s['printed']), f'{s["computed"]:.2f}', f'{s["beyond"]:.2f}'
                ]
                for s in wrong
            ],
        ),
        '## Sentences against tables',
        _lines(
            ['reading', 'verdict', 'sentence, in our words', 'evidence'],
            [
                [
                    c['number'], c['verdict'], escaped(c['text']),
                    '<br>'.join(('✓ ' if f['holds'] else '✗ ') + escaped(f['text']) for f in c['facts'])
                ]
                for c in found['claims']
            ],
        ),
    ]
    return '\n\n'.join(parts) + '\n'


def _bars(items, picture_title:str)->bytes:
    "Ratios to the least work with their range and target."
    from matplotlib.figure import Figure
    from robust_dml.report.tables import png, theme
    items = [i for i in items if i['unit'] == 'ratio' and i['target']][::-1]
    with theme():
        fig = Figure(figsize=(7, .6 + .27*len(items)), layout='constrained')
        ax = fig.subplots()
        for y, item in enumerate(items):
            ax.plot([item['low'], item['high']], [y, y], color='#7a7a7a', lw=1.5)
            ax.plot(item['median'], y, 'o' if item['met'] else 'X', color='#0072b2' if item['met'] else '#d55e00', ms=6)
            ax.plot(item['target'], y, '|', color='#333333', ms=11, mew=1.6)
        ax.axvline(1, color='#999999', lw=.8)
        ax.set(yticks=range(len(items)), xlabel='time over that of the least work', title=picture_title)
        ax.set_yticklabels([f'{i["name"]} ({i["size"].split(",")[0]})' for i in items], fontsize=7.5)
    return png(fig, dpi=110)


def benchmarks_page(
    target:Path, # folder of the sources
)->str:
    "benchmarks/README.md with its figures drawn."
    text = (ROOT/'benchmarks'/'README.md').read_text(encoding='utf-8')
    for name, command in (('quick', 'make bench'), ('full', 'make bench-full')):
        file = ROOT/'benchmarks'/'results'/f'{name}.json'
        if not file.exists(): continue
        (target / 'pictures' / f'bench-{name}.png').write_bytes(
            _bars(json.loads(file.read_text(encoding='utf-8'))['items'], command)
        )
        image = (
            f'![Ratio to the least work for each item of {command}](pictures/bench-{name}.png)\n\nDot: median, blue if'
            ' it meets the target (stroke), else an orange cross; line: range of the pairs.'
        )
        text = re.sub(rf'^(## `{command}`\n)', lambda m: f'{m[1]}\n{image}\n', text, flags=re.M)
    return re.sub(r'\]\((?!pictures/|#|http)([^)]+)\)', r']', text)
