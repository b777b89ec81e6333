"""Five kills of the fault campaign (`make faults` runs all of it), and what its table counts."""
import json
import subprocess
import sys
from pathlib import Path

from robust_dml.data import sets

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import campaign, readers


def test_five_kills(tmp_path):
    "Each ends, started again, in the table of an undisturbed run."
    done = subprocess.run(
        [
            sys.executable, campaign.__file__, '--kills', '5', '--full', '0', '--damage', '0', '--device', '0',
            '--workers-die', '0', '--out', tmp_path / 'r.json'
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((tmp_path/'r.json').read_text())
    assert (
        found['faults'][-1] == dict(fault='all', injected=5, survived=5, lost=0, wrong=0, unclear=0)
        and found['other'] == []
    )


def test_another_table_is_wrong_and_work_done_twice_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, 'run', lambda home: [])
    (tmp_path/'out'/'table1-cub-smoke').mkdir(parents=True)
    (tmp_path/'out'/'table1-cub-smoke'/'table.csv').write_bytes(b'1')
    assert (
        campaign.verdict(tmp_path, b'2', {}).startswith('wrong') and campaign.verdict(tmp_path, b'1', {}) == 'survived'
    )
    assert campaign.verdict(tmp_path, b'1', {'out/store/eval-0/result.json': b'x'}).startswith('lost')
    (tmp_path/'out'/'store'/'eval-0').mkdir(parents=True)
    (tmp_path/'out'/'store'/'eval-0'/'lock').touch()
    assert campaign.verdict(tmp_path, b'1', {}).startswith('lost')
    monkeypatch.setattr(campaign, 'run', lambda home: ['StoreError', 'expected'])
    assert campaign.verdict(tmp_path, b'1', {}).startswith('lost')


def test_tables_that_differ_by_rounding_only():
    table = b'Defense,R@1,TMA\nACT,50.0,0.900\n'
    assert campaign.same_numbers(table, b'Defense,R@1,TMA\nACT,50.4,0.904\n')
    for other in (
        b'Defense,R@1,TMA\nACT,50.6,0.900\n', b'Defense,R@1,TMA\nACT,50.0,0.910\n', b'Defense,R@1,TMA\nHM,50.0,0.900\n',
        b'Defense,R@1,TMA\n', table + b'HM,50.0,0.900\n'
    ):
        assert not campaign.same_numbers(table, other)


def test_rows_add_up():
    rows = campaign.summary(
        [['disk full', 'survived'], ['kill', 'wrong: another table'], ['disk full', 'unclear: write 3']]
    )
    assert rows[-1] == dict(fault='all', injected=3, survived=1, lost=0, wrong=1, unclear=1) and [
        r['fault'] for r in rows
    ] == ['disk full', 'kill', 'all']


def test_hostile_data_for_every_reader(monkeypatch, tmp_path):
    "A few of the inputs that `make faults` tries for minutes."
    monkeypatch.chdir(tmp_path)                        # both are the program's own business, and as before for the
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)) # tests that follow
    counts, faults = readers.run(5., 11)
    assert not faults and {name for name, _ in counts} == readers.READERS.keys()


def test_what_is_no_sentence_counts_as_a_fault(tmp_path):
    def broken(home, rng): raise KeyError('x')
    def late(home, rng): raise ValueError('not of the package')
    def fine(home, rng): sets.load('nowhere')
    said = [readers.outcome(reader, tmp_path, None) for reader in (broken, late, fine)]
    assert said[0].startswith('KeyError') and said[1].startswith('ValueError from test_faults.py') and said[2] == 'sentence'
