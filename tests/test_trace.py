"From a number of a committed report to its runs: every table's numbers, and one sentence for what is not there."
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robust_dml.metrics.scores import HEADINGS
from robust_dml.report import tables
from robust_dml.report.pages import mean_spread
from robust_dml.report.trace import main, trace
from robust_dml.runs.store import StoreError, ledger_of, ledger_record, read_results

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT/'reports'
SMALL = REPORTS/'table1-glyphs-small'


@pytest.mark.parametrize('name', ['table1-glyphs-small', 'table3-omniglot-small', 'figure4-glyphs-small'])
def test_numbers_of_a_table_lead_to_runs(name):
    "The mean of what is found is the number in the table; runs, data and hashes are those of the ledger."
    first, *_, last = csv.DictReader((REPORTS/name/'table.csv').read_text().splitlines())
    for line in (first, last):
        for column in ('R@1', 'Assisted', 'Mean distance'):
            origins = trace(REPORTS/name, line['Defense'], column, setting=line['Setting'])
            assert len(origins) == int(line['Seeds'])
            assert f'{mean_spread([o.value for o in origins])[0]:.2f}' == f'{float(line[column]):.2f}'
            for origin in origins:
                train = origin.sources[-1]
                kept = ledger_record(ledger_of(REPORTS), train.address)
                assert train.config == kept['config'] and train.sha256 == kept['sha256'] and len(train.sha256) == 64
                assert origin.data == kept['config']['data'] and origin.seed == kept['config']['seed']
                assert train.provenance['versions']['torch']


def test_every_column_of_table_1_is_found():
    names = [column.name for column in tables.COLUMNS['table1']]
    assert set(HEADINGS) < set(names)
    for column in names: assert len(trace(SMALL, 'hm', column, setting='A', seed=0)) == 1, column


@pytest.mark.parametrize('name', [p.parent.name for p in REPORTS.glob('*/results.json')])
def test_reports_of_runs_can_be_traced(name):
    "Any of them by the first row, or one sentence that its rows are no runs."
    results = read_results(REPORTS/name)
    rows = results.get('records') or results.get('trainings')
    if not rows: return
    part = next(key for key in ('eval', 'train', 'address') if key in rows[0])
    found = trace(REPORTS/name, rows[0]['label'], 'seconds' if part == 'address' else 'train/seconds')
    assert found and all(source.config and source.provenance for source in found[0].sources)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ((SMALL, 'hmm', 'R@1'), "expected a row of the report, found 'hmm'; its rows are Natural, ACT"),
        ((SMALL, 'act', 'R@7'), "expected a number of the row, found 'R@7'; its numbers are"),
        ((SMALL, 'act', 'R@1', '--setting', 'C'), "expected a setting of the row, found 'C'; there are A, B"),
        ((SMALL, 'act', 'R@1', '--seed', '9'), 'expected a seed of the row, found 9; there are 0, 1, 2'),
        ((REPORTS/'table9', 'act', 'R@1'), 'expected the folder of a report, found no results.json'),
        ((REPORTS/'errata', 'act', 'R@1'), 'expected a report whose rows are runs, found none'),
        ((REPORTS/'eat-glyphs-small', 'eat', 'R@1'), "that are called 'R@1'; name one of eval/"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, capsys):
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1


def test_an_edited_ledger_is_refused_not_explained(tmp_path):
    shutil.copytree(SMALL, tmp_path/SMALL.name, ignore=shutil.ignore_patterns('figures', 'index.html'))
    address = trace(SMALL, 'act', 'R@1')[0].sources[0].address
    lines = (REPORTS/'runs.jsonl').read_bytes().splitlines(keepends=True)
    k, line = next((k, line) for k, line in enumerate(lines) if json.loads(line)['address'] == address)
    lines[k] = line.replace(b'"R@1":', b'"R@1":1', 1)
    assert lines[k] != line
    (tmp_path/'runs.jsonl').write_bytes(b''.join(lines))
    with pytest.raises(StoreError, match='own hash'): trace(tmp_path/SMALL.name, 'act', 'R@1')


def test_the_command(tmp_path):
    command = [sys.executable, '-m', 'robust_dml.report.trace', str(SMALL), 'act', 'R@1', '--setting', 'A']
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'R@1 of act in setting A: ' in said and said.count('training    train-') == 3 and 'torch ' in said
