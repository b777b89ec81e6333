"""Run folders shared by processes: locks, their death, and damage to what was stored."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from robust_dml import store
from robust_dml.store import Run, StoreError, append_line, load_tensors, locked, open_run, read_lines, save_tensors

# Adds one to a number in the run folder, slowly, so that two at once would lose a count.
COUNT = '''
import sys, time
from pathlib import Path
from robust_dml.store import Run, locked
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
from robust_dml.store import Run, locked
with locked(Run(Path(sys.argv[1])), beat=float(sys.argv[2])):
    print('held', flush=True)
    time.sleep(60)
'''


def start(code, *arguments): return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hold(folder, beat=10.):
    "A process that holds the run."
    process = start(HOLD, folder, beat)
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
    process = start(HOLD.replace('time.sleep(60)', 'time.sleep(1.5)'), run.folder, 10)
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


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    "A lock, and the file that was to become one, of a process that is no more; those of a living one and of other machines stay."
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    (run.folder/'lock.0123456789ab').write_bytes((run.folder/'lock').read_bytes())
    store.sweep(run)
    assert names(run) == []
    process = hold(run.folder)
    store.sweep(run)
    assert names(run) == ['lock']
    kill(process)
    elsewhere(run, silent=1e6)
    store.sweep(run)
    assert names(run) == ['lock']


def elsewhere(run, silent, **changes):
    "The lock of another machine, last touched `silent` seconds ago."
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder/'lock').write_bytes(store.to_json(dict(pid=os.getpid(), host='far', machine='far//', job='', since='then', token='x') | changes))
    os.utime(run.folder/'lock', (time.time() - silent,)*2)


def test_a_holder_elsewhere_dies_of_silence_only(tmp_path, capsys):
    run = Run(tmp_path/'train-0')
    elsewhere(run, silent=50)
    with locked(run, expiry=40): pass
    assert capsys.readouterr().out == ''
    elsewhere(run, silent=0)
    began = time.monotonic()
    with locked(run, expiry=.5): pass
    assert time.monotonic() - began >= .4 and 'on far since then' in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'', b'{"pid"', b'{}'])
def test_a_damaged_lock_counts_as_dead_when_it_stays_so(tmp_path, content):
    run = Run(tmp_path)
    (run.folder/'lock').write_bytes(content)
    with locked(run, expiry=.3): pass
    assert names(run) == []


def test_signs_of_life(tmp_path):
    "A holder that lives is not taken over, however short the expiry."
    run = Run(tmp_path/'train-0')
    process = hold(run.folder, beat=.05)
    owner = json.loads((run.folder/'lock').read_text())
    for _ in range(8):
        time.sleep(.1)
        probe = run.folder/'now'
        probe.touch()
        assert probe.stat().st_mtime - (run.folder/'lock').stat().st_mtime < .5
    assert store._dead(run.folder/'lock', dict(owner, machine='far//'), (run.folder/'lock').stat().st_mtime, .5) is False
    kill(process)


def test_many_waiting_for_one_dead_lock(tmp_path):
    "Only one of them takes it over at a time: no count is lost."
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    processes = [start(COUNT, run.folder, 4) for _ in range(4)]
    for p in processes: assert p.wait(60) == 0, p.stderr.read()
    assert run.read('n.json') == dict(n=16) and names(run) == ['n.json']


def test_breaking_leaves_a_new_lock_alone(tmp_path):
    "The lock that was found dead is gone and another process holds a new one: it stays."
    run = Run(tmp_path/'train-0')
    elsewhere(run, silent=50, token='dead')
    dead = store._holder(run.folder/'lock')[0]
    elsewhere(run, silent=0, token='new')
    store._break(run.folder/'lock', dead, 40)
    assert store._holder(run.folder/'lock')[0]['token'] == 'new' and names(run) == ['lock']


def test_a_killed_breaker_is_no_obstacle(tmp_path):
    run = Run(tmp_path/'train-0')
    kill(hold(run.folder))
    process = start('', '')
    process.communicate()
    (run.folder/'lock.break').write_bytes(store.to_json(dict(pid=process.pid, machine=store._machine())))
    with locked(run): assert names(run) == ['lock']


def test_a_holder_that_was_taken_over_gives_up(tmp_path):
    run = Run(tmp_path/'train-0')
    with pytest.raises(StoreError, match='found that another process took it over'), locked(run, beat=.05):
        elsewhere(run, silent=0, token='other')
        for _ in range(200): time.sleep(.05)
    assert store._holder(run.folder/'lock')[0]['token'] == 'other'


def test_an_interrupt_of_the_user_stays_one(tmp_path):
    run = Run(tmp_path/'train-0')
    with pytest.raises(KeyboardInterrupt), locked(run): raise KeyboardInterrupt
    assert names(run) == []


def test_file_systems_without_links(tmp_path, monkeypatch):
    def link(*_): raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)
    run = Run(tmp_path/'train-0')
    with locked(run): assert names(run) == ['lock'] and not store._claim(run.folder/'lock', {})
    assert names(run) == []


def test_the_answer_of_a_link_is_lost(tmp_path, monkeypatch):
    "The server made the link and the client hears that the name exists."
    link = os.link
    def twice(*names): link(*names), link(*names)
    monkeypatch.setattr(os, 'link', twice)
    run = Run(tmp_path/'train-0')
    with locked(run): pass
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


def test_results_from_before_there_were_hashes(tmp_path):
    (tmp_path/'r.json').write_text('{"a": 1}')
    (tmp_path/'q').write_text('{"a": 1}\n{"a": 2}\n')
    assert Run(tmp_path).read('r.json', 'a') == dict(a=1) and read_lines(Run(tmp_path), 'q') == [dict(a=1), dict(a=2)]


def test_not_a_number_has_a_hash(tmp_path):
    run = Run(tmp_path)
    run.write('r.json', dict(a=float('nan'), b=(1, 2)))
    append_line(run, 'q', dict(a=float('nan')))
    assert run.read('r.json') == dict(a=None, b=[1, 2]) and str(read_lines(run, 'q')[0]['a']) == 'nan'


def test_tensors_of_another_version_are_named(tmp_path):
    run = open_run(tmp_path, 'eval', dict(a=1))
    digest = save_tensors(run, 'examples.safetensors', {'clean.2': torch.zeros(2)})
    assert load_tensors(run, 'examples.safetensors', digest)['clean.2'].tolist() == [0., 0.]
    with pytest.raises(StoreError, match=f'expected clean, adv in .*examples.safetensors, found none; another version wrote it: delete the folder {run.address} and run again'): load_tensors(run, 'examples.safetensors', digest, 'clean', 'adv')


def test_a_new_holder_clears_what_was_half_written(tmp_path):
    "A pre-empted job gives its lock back and may be killed in the middle of a write; a card may be written by another process just now."
    run = Run(tmp_path/'train-x')
    run.folder.mkdir()
    for name in ('checkpoint-3.safetensors.0a.part', 'result.json.0b.part', 'card.json.0c.part'): (run.folder/name).write_bytes(b'half')
    with locked(run): assert [p.name for p in run.folder.glob('*.part')] == ['card.json.0c.part']
