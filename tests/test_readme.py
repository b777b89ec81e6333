"""The README's numbers come from committed reports. `python tests/test_readme.py` writes them anew."""
import re
from pathlib import Path

import pytest

from robust_dml.study import experiments
from robust_dml.report import tables
from robust_dml.runs.store import ledger_of, ledger_record, read_results

ROOT = Path(__file__).resolve().parent.parent
README = ROOT/'README.md'
BLOCK = re.compile(r'(<!-- (table|scores|summary|facts): (\S+) -->\n)(.*?)(<!-- end -->)', re.S)


def markdown(kind, results):
    "A block of the README: metrics as rows and defences as columns, or the report's summary."
    if kind == 'facts':
        classes, attack, setting = (
            (results['data'][side]['classes'] for side in ('train', 'test')), results['attack'],
            next(iter(results['settings'].values()))
        )
        queries, seeds = attack['limit'] or results['data']['test']['images'], len(
            {r['seed'] for r in results['records']}
        )
        return (
            '{} classes to train on and {} others to retrieve; '.format(*classes)
            + f"{'one seed' if seeds == 1 else f'{seeds} seeds'}, ε = {255*setting['eps']:g}/255, attacks of"
            f" {attack['steps']} steps on {queries:,} queries.\n"
        )
    if kind == 'summary': return '\n\n'.join(tables.summary(results)) + '\n'
    experiment = results['experiment']
    frame = {'table1': tables.table1, 'table2': tables.table2}[experiment](results)
    text = tables.as_text(frame, experiment).drop(columns=['Setting', 'Seeds']).set_index('Defense').T
    if kind == 'scores':
        text = text.loc[[name for name in text.index if 'ARS' in name or name in ('R@1', 'Mean distance')]]
    arrow = {c.name: {1: ' ↑', -1: ' ↓', 0: ''}[c.better] for c in tables.COLUMNS[experiment]}
    lines = [
        ['', *text.columns], ['---', *['--:'] * len(text.columns)],
        *([name + arrow.get(name, ''), *row] for name, row in zip(text.index, text.values))
    ]
    return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def filled(text):
    "The README with every block made from its committed results."
    return BLOCK.sub(lambda m: m[1] + markdown(m[2], read_results(ROOT/m[3])) + m[5], text)


def test_numbers_come_from_reports():
    text = README.read_text(encoding='utf-8')
    assert len(BLOCK.findall(text)) >= 3
    assert filled(text) == text, 'the README differs from the committed reports: run python tests/test_readme.py'


def test_links_exist():
    links = re.findall(r'\]\((?!http)([^)#]+)\)', README.read_text(encoding='utf-8'))
    assert links and not [link for link in links if not (ROOT/link).exists()]


def test_parameters_and_defences_are_named():
    text = README.read_text(encoding='utf-8')
    assert not [name for name in experiments.PARAMETERS if f'`{name}`' not in text and f'-p {name} ' not in text]


@pytest.mark.parametrize(
    'report_folder', sorted(p.parent for p in ROOT.glob('reports/*/results.json')), ids=lambda p: p.name
)
def test_committed_reports_rest_on_committed_runs(report_folder):
    "Every record of a committed report stands in the store, with its card and the same numbers."
    for record in read_results(report_folder).get('records', ()):
        for part in ('train', 'eval'):
            stored = ledger_record(ledger_of(ROOT/'reports'), record[part]['address'])
            assert stored and stored['result'] == {k: record[part][k] for k in stored['result']}


if __name__ == '__main__': README.write_text(filled(README.read_text(encoding='utf-8')), encoding='utf-8')
