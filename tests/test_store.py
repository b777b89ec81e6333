"""Run folders shared by processes: locks, their death, and damage to what was stored."""
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import Timeout

from robust_dml.runs import store
from robust_dml.core import fingerprint
from robust_dml.runs.store import Run, StoreError, append_line, load_tensors, locked, open_run, read_lines, save_tensors

# Adds one to a number in the run folder, slowly, so that two at once would lose a count.
COUNT = '''
import sys, time
from pathlib import Path
from robust_dml.runs.store import Run, locked
run, times = Run(Path(sys.argv[1])), int(sys.argv[2])
for _ in range(times):
    with locked(run):
        n = run.read('n.json')['n'] if run.has('n.json') else 0
        time.sleep(.005)
        run.write('n.json', dict(n=n + 1))
'''
HOLD = '''
import sys, time
from pathlib import Path
from robust_dml.runs.store import Run, locked
with locked(Run(Path(sys.argv[1])), beat=float(sys.argv[2]), expiry=float(sys.argv[3])):
    print('held', flush=True)
    for _ in range(6000): time.sleep(.01)
'''


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def hold(folder, beat=10., expiry=120.):
    "A process that holds the run."
    process = start(HOLD, folder, beat, expiry)
    assert process.stdout.readline() == 'held\n', process.stderr.read()
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def names(run): return sorted(p.name for p in run.folder.iterdir())


def test_no_two_processes_hold_a_run(tmp_path):
    run = Run(tmp_path/'train-0')
    processes = [start(COUNT, run.folder, 5) for _ in range(3)]
    for p in processes: assert p.wait(60) == 0, p.stderr.read()
    assert run.read('n.json') == dict(n=15) and names(run) == ['n.json']


def test_one_sentence_while_waiting(tmp_path, capsys):
    run = Run(tmp_path/'train-0')
    process = start(HOLD.replace('range(6000)', 'range(150)'), run.folder, 10, 120)
    assert process.stdout.readline() == 'held\n'
    with locked(run): pass
    process.communicate()
    assert capsys.readouterr().out.startswith(f'train-0 is computed by process {process.pid} on ') and names(run) == []


def test_a_killed_holder_on_this_machine_is_no_obstacle(tmp_path, capsys):
    "Its lock and its half-written files go; nothing is said and nothing is waited for."
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    (run.folder/'result.json.1.part').write_bytes(b'half')
    assert names(run) == ['lock', 'result.json.1.part']
    with locked(run, expiry=1e6): assert names(run) == ['lock']
    assert capsys.readouterr().out == ''


def move(run):
    "From now on the lock names a process of another machine: nobody here can see whether that process runs."
    lock = run.folder/'lock'
    lock.write_text(re.sub('host=.*', 'host=far', lock.read_text()))


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    "The lock of a process that is no more goes; those of a living one and of other machines stay."
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    store.sweep(run)
    assert names(run) == []
    process = hold(run.folder)
    store.sweep(run)
    assert names(run) == ['lock']
    kill(process)
    move(run)
    store.sweep(run)
    assert names(run) == ['lock']


@pytest.mark.parametrize('ahead', [0, 1e9], ids=['now', 'touched in the future'])
def test_a_holder_elsewhere_dies_of_silence_only(tmp_path, capsys, ahead):
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder, expiry=.5))
    move(run)
    os.utime(run.folder/'lock', (time.time() + ahead,)*2)
    began = time.monotonic()
    with locked(run, expiry=.5): pass
    assert .5 <= time.monotonic() - began < 30
    assert ' on far; waiting for it' in capsys.readouterr().out and names(run) == []


@pytest.mark.parametrize('content', [b'', b'{"pid"'])
def test_a_damaged_lock_counts_as_dead_when_it_stays_so(tmp_path, content):
    run = Run(tmp_path)
    (run.folder/'lock').write_bytes(content)
    with locked(run): pass
    assert names(run) == []


def test_a_lock_with_another_expiry_is_refused_in_a_sentence(tmp_path):
    run = Run(tmp_path/'train-0')
    process = hold(run.folder, expiry=60.)
    with pytest.raises(StoreError, match='every contender for a path must agree'), locked(run): pass
    kill(process)


def test_signs_of_life_and_their_end(tmp_path):
    "A holder on another machine is not taken over while it lives; once stopped it is, and gives up when it wakes."
    run, short = Run(tmp_path/'train-0'), dict(beat=.05, expiry=2.)
    process = hold(run.folder, **short)
    move(run)
    with pytest.raises(Timeout): store._lease(run, **short).acquire(timeout=5)
    process.send_signal(signal.SIGSTOP)
    with locked(run, **short):
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=60)[1]
        assert 'found that another process took it over after 2 s' in said and names(run) == ['lock']
    assert names(run) == []


def test_many_waiting_for_one_dead_lock(tmp_path):
    "Only one of them takes it over at a time: no count is lost."
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    processes = [start(COUNT, run.folder, 4) for _ in range(4)]
    for p in processes: assert p.wait(60) == 0, p.stderr.read()
    assert run.read('n.json') == dict(n=16) and names(run) == ['n.json']


def test_a_holder_that_was_taken_over_gives_up(tmp_path):
    "The lock of the other one stays."
    run = Run(tmp_path/'train-0')
    with pytest.raises(StoreError, match='found that another process took it over'), locked(run, beat=.05):
        other = run.folder/'other'
        other.write_text((run.folder/'lock').read_text())
        other.replace(run.folder/'lock')
        for _ in range(200): time.sleep(.05)
    assert names(run) == ['lock']


def test_an_interrupt_of_the_user_stays_one(tmp_path):
    run = Run(tmp_path/'train-0')
    with pytest.raises(KeyboardInterrupt), locked(run): raise KeyboardInterrupt
    assert names(run) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('no folder')
    with pytest.raises(StoreError, match='expected to write'), locked(Run(tmp_path/'file'/'train-0')): pass


def flips(data, every=1):
    "The same bytes with one bit flipped, at each place in turn."
    for i in range(0, len(data), every): yield i, data[:i] + bytes([data[i] ^ 1 << i%7]) + data[i+1:]


def test_no_flipped_bit_is_read(tmp_path):
    "Refused, or read as what was written: a hash whose own name is damaged is no hash."
    run, value = Run(tmp_path), dict(numbers=[1.25, 2, None], name='eval', nested=dict(a='b'))
    run.write('r.json', value)
    whole = (tmp_path/'r.json').read_bytes()
    for i, data in flips(whole):
        (tmp_path/'r.json').write_bytes(data)
        try: found = run.read('r.json', 'numbers')
        except StoreError: continue
        assert {k: found.get(k) for k in value} == value, (i, found)
    append_line(run, 'q', value)
    for i, data in flips((tmp_path/'q').read_bytes()[:-1]):
        (tmp_path/'q').write_bytes(data + b'\n')
        try: found = read_lines(run, 'q')
        except StoreError: continue
        assert all({k: line.get(k) for k in value} == value for line in found), (i, found)


def test_a_result_without_a_hash_is_refused_in_a_store(tmp_path):
    "Whoever edits a number can delete the line with the hash as well."
    run = open_run(tmp_path, 'eval', dict(seed=0))
    run.write('result.json', dict(r1=38.3))
    append_line(run, 'queries.jsonl', dict(r1=38.3))
    edited = json.loads((run.folder/'result.json').read_text()) | dict(r1=99.9)
    del edited['content']
    (run.folder/'result.json').write_text(json.dumps(edited))
    (run.folder/'queries.jsonl').write_text('{"r1": 99.9}\n')
    with pytest.raises(StoreError, match='with a hash of its content.*found none'): run.read('result.json')
    with pytest.raises(StoreError, match='with a hash of its content.*found none'): store.described(run)
    with pytest.raises(StoreError, match='a line with a hash of its content'): read_lines(run, 'queries.jsonl')
    assert run.read('result.json', unsigned=True) == dict(r1=99.9)


def test_lines_that_two_processes_wrote_count_once(tmp_path):
    run = Run(tmp_path)
    for seconds in (1., 2.): append_line(run, 'q', dict(attack='ES', start=0, after=[1], seconds=seconds))
    append_line(run, 'q', dict(attack='ES', start=8, after=[1], seconds=1.))
    assert [r['start'] for r in read_lines(run, 'q')] == [0, 8]
    append_line(run, 'q', dict(attack='ES', start=0, after=[2], seconds=1.))
    assert [r['after'] for r in read_lines(run, 'q', unique=('attack', 'start'))] == [[1], [1]]
    assert len(read_lines(run, 'q')) == 3


def test_a_file_system_that_may_only_be_read_is_named(tmp_path, monkeypatch):
    "Removing the part that was never written fails as well, and must not hide the sentence."
    def refuse(*_, **__): raise OSError(errno.EROFS, 'Read-only file system')
    monkeypatch.setattr(store.Path, 'unlink', refuse)
    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(StoreError, match='expected to write .*Read-only file system'):
        store.write_atomic(tmp_path/'a.json', b'1')


def test_not_a_number_has_a_hash(tmp_path):
    run = Run(tmp_path)
    run.write('r.json', dict(a=float('nan'), b=(1, 2)))
    append_line(run, 'q', dict(a=float('nan')))
    assert run.read('r.json') == dict(a=None, b=[1, 2]) and str(read_lines(run, 'q')[0]['a']) == 'nan'


def test_tensors_of_another_version_are_named(tmp_path):
    run = open_run(tmp_path, 'eval', dict(a=1))
    digest = save_tensors(run, 'examples.safetensors', {'clean.2': torch.zeros(2)})
    assert load_tensors(run, 'examples.safetensors', digest)['clean.2'].tolist() == [0., 0.]
    with pytest.raises(
        StoreError,
        match=(
            'expected clean, adv in .*examples.safetensors, found none; another version wrote it: delete the folder'
            f' {run.address} and run again'
        ),
    ):
        load_tensors(run, 'examples.safetensors', digest, 'clean', 'adv')


def test_a_new_holder_clears_what_was_half_written(tmp_path):
    """A pre-empted job gives its lock back and may be killed in the middle of a write; a card may be written by
    another process just now."""
    run = Run(tmp_path/'train-x')
    run.folder.mkdir()
    for name in ('checkpoint-3.safetensors.0a.part', 'result.json.0b.part', 'card.json.0c.part'):
        (run.folder/name).write_bytes(b'half')
    with locked(run): assert [p.name for p in run.folder.glob('*.part')] == ['card.json.0c.part']


def finished(reports, seed=0, **result):
    "A finished run of a store."
    run = open_run(reports, 'train', dict(seed=seed))
    run.write('result.json', dict(sha256='ab', log=[dict(loss=.1 + .2, epoch=0), dict(loss=None, epoch=1)]) | result)
    return run


def test_a_ledger_holds_what_the_folders_held(tmp_path):
    runs = [finished(tmp_path, seed) for seed in range(3)]
    before = [store.described(run) for run in runs]
    assert sorted(store.collect(tmp_path)) == sorted(run.address for run in runs)
    data = store.ledger_of(tmp_path).read_bytes()
    assert store.collect(tmp_path) == [] and store.ledger_of(tmp_path).read_bytes() == data
    for run in runs: shutil.rmtree(run.folder)
    assert [store.described(run) for run in runs] == before and [
        run.address for run in store.finished_runs(tmp_path)
    ] == sorted(run.address for run in runs)
    assert store.collect(tmp_path) == [] and data.splitlines() == sorted(data.splitlines())


@pytest.mark.parametrize(
    'edit',
    [
        lambda line: line.replace(b'"sha256":"ab"', b'"sha256":"ac"'),
        lambda line: line.replace(b'0.30000000000000004', b'0.30000000000000005'),
        lambda line: line[: line.rindex(b',"content"')] + b'}\n', lambda line: line.replace(b'"kind"', b' "kind"')
    ],
)
def test_an_edited_line_is_noticed(tmp_path, edit):
    "A digit, the hash taken away, a blank: one sentence, wherever the line is read."
    run = finished(tmp_path)
    store.collect(tmp_path)
    shutil.rmtree(run.folder)
    path = store.ledger_of(tmp_path)
    assert edit(path.read_bytes()) != path.read_bytes()
    path.write_bytes(edit(path.read_bytes()))
    for read in (lambda: run.read('result.json'), lambda: run.read('card.json'), lambda: store.collect(tmp_path)):
        with pytest.raises(StoreError, match='own hash.*runs.jsonl.*from git again'): read()


@pytest.mark.parametrize(
    'edit, words',
    [
        (lambda data: data[: len(data) // 2], 'cut off'),
        (lambda data: data + data[: data.index(b'\n') + 1], 'found two'),
        (lambda data: b'<<<<<<< ours\n' + data, 'line 1')
    ],
)
def test_a_damaged_ledger_is_one_sentence(tmp_path, edit, words):
    runs = [finished(tmp_path, seed) for seed in range(3)]
    store.collect(tmp_path)
    path = store.ledger_of(tmp_path)
    path.write_bytes(edit(path.read_bytes()))
    shutil.rmtree(runs[0].folder)
    with pytest.raises(StoreError, match=words): runs[0].read('result.json')
    assert runs[1].read('result.json')['sha256'] == 'ab' # a folder that is there needs no ledger


def test_a_training_that_ends_in_the_same_weights_is_the_same(tmp_path):
    "Another version of the package may log more; the line in the ledger stays."
    finished(tmp_path)
    store.collect(tmp_path)
    before = store.ledger_of(tmp_path).read_bytes()
    finished(tmp_path, log=[dict(loss=.3, epoch=0, more=1.)])
    assert store.collect(tmp_path) == [] and store.ledger_of(tmp_path).read_bytes() == before
    finished(tmp_path, sha256='ac')
    with pytest.raises(StoreError, match='they differ in sha256'): store.collect(tmp_path)


def test_two_results_for_one_address_are_refused(tmp_path):
    run = finished(tmp_path, seconds=1.)
    store.collect(tmp_path)
    run.write('result.json', dict(run.read('result.json'), seconds=9.))
    assert store.collect(tmp_path) == []
    run.write('result.json', dict(run.read('result.json'), sha256='cd'))
    with pytest.raises(StoreError, match=f'one result for {run.address}.*differ in sha256; delete'):
        store.collect(tmp_path)


def test_other_stores_and_unfinished_runs(tmp_path):
    "Finished runs of another store come in, without weights; a run from before there were hashes only on request."
    run = finished(tmp_path/'far')
    open_run(tmp_path/'far', 'train', dict(seed=7))
    assert store.collect(tmp_path/'near', tmp_path/'far'/'store') == [run.address]
    old = finished(tmp_path/'far', 8)
    text = json.loads((old.folder/'result.json').read_text())
    (old.folder/'result.json').write_text(json.dumps({k: v for k, v in text.items() if k != 'content'}))
    with pytest.raises(StoreError, match='unsigned=True'): store.collect(tmp_path/'near', tmp_path/'far'/'store')
    assert store.collect(tmp_path/'near', tmp_path/'far'/'store', unsigned=True) == [old.address]


def test_two_processes_collect_at_once(tmp_path):
    "Nothing is lost."
    stores = [tmp_path/f'store{i}' for i in range(3)]
    runs = [finished(folder, seed=10*i + seed) for i, folder in enumerate(stores) for seed in range(4)]
    code = 'import sys; from robust_dml.runs import store; store.collect(sys.argv[1], sys.argv[2])'
    processes = [start(code, tmp_path/'all', folder/'store') for folder in stores]
    for p in processes: assert p.wait(60) == 0, p.stderr.read()
    assert [run.address for run in store.finished_runs(tmp_path/'all')] == sorted(run.address for run in runs)


def test_the_committed_ledger_is_whole():
    "Every line with its hash, sorted, and every address that of its configuration."
    path = store.ledger_of(Path(__file__).resolve().parent.parent/'reports')
    addresses = list(store._ledger(path))
    assert addresses and addresses == sorted(addresses)
    for address in addresses:
        record = store.ledger_record(path, address)
        assert address == record['address'] == f"{record['kind']}-{fingerprint(record['config'])[:12]}"


UNDEFINED = dict(ers=math.nan, more=[1., math.nan], holds=None, inner=dict(low=math.nan, limit=None))


def test_undefined_and_nothing_are_two_things(tmp_path):
    "A number that is undefined comes back as NaN and nothing as None, without a list of which is which."
    store.write_results(tmp_path/'report', UNDEFINED)
    text = (tmp_path/'report'/'results.json').read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert repr(store.read_results(tmp_path/'report')) == repr(UNDEFINED)
    store.write_results(tmp_path/'report', store.read_results(tmp_path/'report'))
    assert (tmp_path/'report'/'results.json').read_text() == text


def test_results_from_before_there_were_marks(tmp_path):
    "Null stands for an undefined number where its key has numbers elsewhere, and for nothing everywhere else."
    old = dict(rows=[dict(ers=1.5, holds=True, limit=3), dict(ers=None, holds=None, limit=None)], weights=None)
    (tmp_path/'report').mkdir()
    (tmp_path/'report'/'results.json').write_text(json.dumps(old))
    found = store.read_results(tmp_path/'report', unsigned=True)
    first, second = found['rows']
    assert first == old['rows'][0] and math.isnan(second['ers']) and second['holds'] is second['limit'] is None
    assert found['weights'] is None


def test_results_that_were_edited_are_refused(tmp_path):
    "Another number, and another number with the hash taken away."
    store.write_results(tmp_path/'report', dict(ers=38.3))
    path = tmp_path/'report'/'results.json'
    edited = json.loads(path.read_text()) | dict(ers=99.9)
    path.write_text(json.dumps(edited))
    with pytest.raises(StoreError, match='found a damaged file'): store.read_results(tmp_path/'report')
    path.write_text(json.dumps({key: value for key, value in edited.items() if key != 'content'}))
    with pytest.raises(StoreError, match='expected a file with a hash of its content'):
        store.read_results(tmp_path/'report')


def test_undefined_numbers_of_a_run_stay_with_the_ledger(tmp_path):
    "A run is quoted by its address although its own file has no marks."
    run = finished(tmp_path, ers=math.nan)
    store.collect(tmp_path)
    store.write_results(tmp_path/'report', dict(records=[dict(eval=dict(store.described(run), ers=math.nan), extra=math.nan)]))
    kept = json.loads((tmp_path/'report'/'results.json').read_text())['records'][0]
    assert kept['eval'] == dict(from_run=run.address) and kept['extra'] == {'number': 'NaN'}
    assert store.read_results(tmp_path/'report')['records'][0]['eval']['ers'] is None


def pictured(reports, seed):
    "A run with example images, quoted by a report of table 1."
    run = finished(reports, seed)
    digest = save_tensors(run, 'examples.safetensors', {'clean': torch.full((2,), float(seed))})
    store.write_results(reports/f'table1-{seed}', dict(experiment='table1', records=[dict(eval=store.described(run))]))
    return run, digest


def test_example_images_are_kept_in_one_archive(tmp_path):
    "Read as from their folder, checked by the same hash; the archive has the same bytes whenever it is made."
    runs = [pictured(tmp_path, seed) for seed in range(3)]
    store.share(tmp_path)
    data = (tmp_path/'examples.zip').read_bytes()
    store.share(tmp_path)
    assert (tmp_path/'examples.zip').read_bytes() == data
    for run, _ in runs: shutil.rmtree(run.folder)
    for seed, (run, digest) in enumerate(runs):
        assert run.has('examples.safetensors')
        assert load_tensors(run, 'examples.safetensors', digest, 'clean')['clean'].tolist() == [seed, seed]
        with pytest.raises(ValueError, match='examples.zip.*changed or damaged'):
            load_tensors(run, 'examples.safetensors', runs[seed - 1][1], 'clean')
    (tmp_path/'examples.zip').write_bytes(data[:len(data)//2])
    with pytest.raises(StoreError, match='expected a zip archive of example images.*git checkout'):
        runs[0][0].has('examples.safetensors')


def test_two_processes_share_at_once(tmp_path):
    "No example image is lost."
    runs = [pictured(tmp_path, seed) for seed in range(4)]
    code = 'import sys; from robust_dml.runs import store; store.share(sys.argv[1])'
    processes = [start(code, tmp_path) for _ in range(2)]
    for p in processes: assert p.wait(60) == 0, p.stderr.read()
    assert sorted(store._archived(tmp_path)) == sorted(run.address for run, _ in runs)
