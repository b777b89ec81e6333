"""Finished reports, claims, errata and benchmarks as pages; every number is read from a committed file."""
import html
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


def plain(fragment:str)->str:
    "Text of a piece of HTML."
    return ' '.join(html.unescape(re.sub(r'<[^>]+>', '', fragment)).split())


def _page(name:str)->str: return (REPORTS/name/'index.html').read_text(encoding='utf-8')


def _sentences(body:str)->tuple[str, list[str]]:
    "The setting that a paragraph speaks of ('' for none) and its sentences."
    scene, *rest = re.split(r'(?<=\.)\s+(?=[A-Z])', plain(body))
    return (scene, rest) if re.match(r'Setting \w', scene) and len(scene) < 60 else ('', [scene, *rest])


def sentence_of(
    name:str, # folder in reports/
)->str:
    "What a report found, in its own words: its head line, and which models collapsed."
    page = _page(name)
    words = [plain(gallery.said_first(page))]
    for body in re.findall(r'<p class="lead">(.*?)</p>', page, re.S):
        scene, sentences = _sentences(body)
        flags = [s for s in sentences if 'flagged as collapsed' in s and s not in words[0]]
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
            figures = sorted((REPORTS/report/'figures').glob('*.png'))
            image = (
                f' <a href="reports/{report}/index.html"><img class="plot" loading="lazy" alt="First figure of'
                f' {report}" src="reports/{report}/figures/{figures[0].name}" width="320"></a>'
                if figures
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


def copy_reports(
    target:Path, # folder whose content lies beside the pages
)->None:
    "Reports as they are, page, figures and tables, and the page that leads to them."
    (target/'reports').mkdir(parents=True)
    shutil.copy(REPORTS/'index.html', target/'reports')
    for name in folders():
        shutil.copytree(
            REPORTS / name, target / 'reports' / name, ignore=shutil.ignore_patterns('*.safetensors', '*.jsonl'),
            dirs_exist_ok=True
        )


def claims_page()->str:
    "reports/claims.md, with claims linked from the table."
    text = (REPORTS/'claims.md').read_text(encoding='utf-8')
    text = re.sub(r'^## Claim (\d+):', r'(claim-\1)=\n\n## Claim \1:', text, flags=re.M)
    text = re.sub(r'^\| (\d+) \|', r'| [\1](#claim-\1) |', text, flags=re.M)
    text = re.sub(
        r'^# .*\n',
        '# Claims and verdicts\n\nThe file `reports/claims.md`, which `make claims` writes; with figures: <a'
        ' href="reports/claims/index.html">the report</a>.\n',
        text,
        count=1,
    )
    return re.sub(r'<(?!/?(?:a|details|summary)\b)', r'\\<', text)


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
