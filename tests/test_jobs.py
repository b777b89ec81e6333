"""Cells as jobs: processes of this machine, a SLURM cluster of one node, ends by signals, and what is said of
failures."""
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from robust_dml.study import experiments
from robust_dml.runs import jobs

ENV = os.environ | {'OMP_NUM_THREADS': '1'}
pytest.importorskip('submitit', reason='jobs need submitit')

TABLE = '''
import sys
from robust_dml.study import experiments
plan = experiments.plan('table1', experiments.parameters(dict(preset='smoke', defenses='natural,act', limit=16, out=sys.argv[1], executor=sys.argv[2])))
experiments.write_table(plan.folder, experiments.results(plan, show=False))
'''


def table(out, executor):
    return subprocess.run([sys.executable, '-c', TABLE, out, executor], env=ENV, capture_output=True, text=True)


def files(out):
    "The table as it is stored, and what its results say without times and machines."
    folder, = out.glob('table1-glyphs-smoke')
    found = json.loads((folder/'results.json').read_text())
    return (
        (folder/'table.csv').read_bytes(),
        [
            (r['train']['address'], r['train']['sha256'], r['eval']['after'], r['eval']['examples'])
            for r in found['records']
        ],
        found['parameters'] | dict(out=''),
    )


@pytest.fixture(scope='module')
def inline(tmp_path_factory):
    "The table as one process computes it."
    out = tmp_path_factory.mktemp('inline')
    assert (done := table(out, 'inline')).returncode == 0, done.stderr[-2000:]
    return out


def test_processes_of_this_machine_give_the_same_bytes(inline, tmp_path):
    done = table(tmp_path, 'local:jobs=2+threads=1')
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(tmp_path) == files(inline)
    assert not [*tmp_path.rglob('*.pkl'), *tmp_path.rglob('lock*'), *tmp_path.rglob('*.part')]
    assert (
        stat.S_IMODE((tmp_path / 'store' / '.jobs').stat().st_mode) == 0o700
        and (tmp_path / 'store' / '.jobs' / '.gitignore').read_text() == '*\n'
    )


def planned(out, **changes):
    return experiments.plan(
        'table1',
        experiments.parameters(
            dict(preset='smoke', defenses='natural', limit=16, out=str(out), executor='local') | changes
        ),
    )


def test_finished_cells_are_not_submitted(inline, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, 'run_jobs', lambda calls, *_, **__: asked.extend(calls))
    experiments.compute_elsewhere(planned(inline))
    assert asked == []
    experiments.compute_elsewhere(planned(inline, defenses='natural,hm'))
    assert asked == ['A HM, seed 0']
    experiments.compute_elsewhere(planned(inline, defenses='natural,hm', executor='inline'))
    assert asked == ['A HM, seed 0']


def test_a_finished_run_needs_no_lock(inline, tmp_path, capsys):
    "Tables are read from a store in which others are at work."
    shutil.copytree(inline, tmp_path/'out')
    for folder in tmp_path.glob('out/store/*-*'): (folder/'lock').write_text('{"machine": "far//", "host": "far"}')
    found = experiments.results(planned(tmp_path/'out'), show=False)
    assert (
        len(found['records']) == 1
        and 'executor' not in found['parameters']
        and 'is computed by' not in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    'text, words',
    [
        ('cluster', "executor must be one of 'inline', 'local', 'slurm', found 'cluster'"),
        ('slurm:queue=gpu', 'slurm has no option queue'), ('local:jobs=two', 'option jobs, must be a whole number'),
        ('local:jobs', 'must be written as in')
    ],
)
def test_executors_that_do_not_exist(text, words, tmp_path):
    with pytest.raises(ValueError, match=words): planned(tmp_path, executor=text)


def test_slurm_without_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='executor slurm needs the command sbatch'):
        jobs.run_jobs({'a': int}, jobs.executor('slurm'), tmp_path, show=False)


def test_failures_are_named_and_the_rest_is_kept(tmp_path):
    "An error, a killed process and a call that works."
    calls = {
        'cell one': partial(int, 'one'), 'cell two': partial(exec, 'import os; os.kill(os.getpid(), 9)'),
        'cell three': partial(Path.write_text, tmp_path / 'three', 'done')
    }
    with pytest.raises(jobs.JobError) as caught:
        jobs.run_jobs(calls, jobs.executor('local:jobs=3+threads=1'), tmp_path, show=False, every=.2)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith('2 of 3 jobs failed') and (tmp_path/'three').read_text() == 'done'
    said = dict(line.split(' failed: ') for line in lines)
    assert said['cell one'].startswith("ValueError: invalid literal for int() with base 10: 'one'; log: ") and said[
        'cell two'
    ].startswith('it ended without a result')
    for line in lines: assert Path(line.rpartition('log: ')[2]).is_file()


def test_other_images_on_the_other_machine(tmp_path):
    plan = planned(tmp_path)
    with pytest.raises(ValueError, match='expected the images of the plan'):
        experiments.compute_cell(
            replace(plan, data=None, card=plan.card | dict(checksum='0' * 64)), next(experiments.cells(plan))
        )


# One defence for many epochs; prints the epochs that it begins with.
LONG = '''
import sys
from robust_dml.study import experiments
plan = experiments.plan('table1', experiments.parameters(dict(preset='smoke', defenses='natural', epochs=12, limit=16, out=sys.argv[1], executor=sys.argv[2])))
experiments.results(plan, show=False)
'''


def until(ready, seconds=300):
    end = time.monotonic() + seconds
    while not (found := ready()): assert time.monotonic() < end and not time.sleep(.02)
    return found


def lock_of(out, kind): return next(iter(out.glob(f'store/{kind}-*/lock')), None)


def holder(out):
    "Number of the process that holds a training of this store; 0 when none does."
    try: return int(re.search(r'^pid=(\d+)$', lock_of(out, 'train').read_text(), re.M)[1])
    except (AttributeError, FileNotFoundError, TypeError): return 0


def queued(env):
    "Numbers of the jobs that the cluster knows."
    return subprocess.run(['squeue', '-h', '-o', '%A'], env=env, check=True, capture_output=True, text=True).stdout.split()


def epoch(out):
    return max([json.loads(p.read_text())['epoch'] for p in out.glob('store/train-*/checkpoint.json')], default=0)


def test_sigterm_ends_cleanly(tmp_path):
    "The lock is given back, the last whole epoch is kept, and the next run goes on from it."
    process = subprocess.Popen(
        [sys.executable, '-c', LONG, tmp_path, 'inline'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True
    )
    until(lambda: epoch(tmp_path) >= 2)
    process.terminate()
    assert process.wait(300) == 128 + signal.SIGTERM, process.stderr.read()
    assert 2 <= epoch(tmp_path) < 12 and not [*tmp_path.rglob('lock*'), *tmp_path.rglob('*.part')]


def test_a_requeued_job_goes_on(tmp_path):
    "The cluster's warning puts the call back; the second start begins at the last checkpoint, in another process."
    process = subprocess.Popen(
        [sys.executable, '-c', LONG, tmp_path, 'local:jobs=1+threads=1'], env=ENV, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True
    )
    until(lambda: epoch(tmp_path) >= 2)
    first = until(lambda: holder(tmp_path))
    os.kill(first, signal.SIGUSR1)
    second = until(lambda: (pid := holder(tmp_path)) != first and pid)
    assert epoch(tmp_path) >= 2 and second != first
    assert process.wait(300) == 0, process.stderr.read()[-2000:]
    result, = (json.loads(p.read_text()) for p in tmp_path.glob('store/train-*/result.json'))
    assert [row['epoch'] for row in result['log']] == list(range(12)) and not [*tmp_path.rglob('lock*')]


def test_two_runs_of_one_table_share_the_work(inline, tmp_path):
    "Started together they compute each cell once, one waits for the other, and both end in the same table."
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', TABLE, tmp_path, 'inline'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=500) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert files(tmp_path) == files(inline) and not [*tmp_path.rglob('lock*')]
    assert re.search(r'eval-\w+ is computed by process \d+ on ', said[0][0] + said[1][0])
    for path in tmp_path.glob('store/eval-*/queries.jsonl'):
        keys = [(r['attack'], r['start']) for r in map(json.loads, path.read_text().splitlines())]
        assert len(keys) == len(set(keys))


CONF = '''
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
ReturnToService=2
KillWait=2
MinJobAge=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=grid Nodes=ALL Default=YES State=UP MaxTime=INFINITE
'''


def free_ports(n):
    import socket
    open_now = [socket.socket() for _ in range(n)]
    for s in open_now: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in open_now]
    for s in open_now: s.close()
    return ports


@pytest.fixture(scope='module')
def cluster():
    "A SLURM cluster of this one machine in a folder of its own; it ends with the tests."
    if absent := [name for name in ('munged', 'slurmctld', 'slurmd', 'sbatch') if shutil.which(name) is None]:
        pytest.skip(f'no SLURM here: {", ".join(absent)} not found (Debian: slurm-wlm and munge)')
    if os.getuid(): pytest.skip('the daemons of SLURM need root')
    import platform
    import tempfile
    root, host = Path(tempfile.mkdtemp(prefix='slurm-')), platform.node().partition('.')[0]
    for folder in ('state', 'spool'): (root/folder).mkdir()
    (root/'key').write_bytes(os.urandom(128))
    (root/'key').chmod(0o600)
    (root/'slurm.conf').write_text(CONF.format(root=root, host=host, ports=free_ports(2), cpus=os.cpu_count()))
    env = os.environ | {'SLURM_CONF': str(root/'slurm.conf')}
    munge = [
        f'--{name}={root}/{file}'
        for name, file in (
            ('socket', 'munge.socket'), ('key-file', 'key'), ('pid-file', 'munge.pid'), ('log-file', 'munge.log'),
            ('seed-file', 'seed')
        )
    ]
    with open(root/'daemons.log', 'w') as log: # setpriv: they end even when the tests are killed
        started = [
            subprocess.Popen(['setpriv', '--pdeathsig', 'TERM', *command], env=env, stdout=log, stderr=log)
            for command in (
                ['munged', '--foreground', '--force', *munge], ['slurmctld', '-D'], ['slurmd', '-D', '-N', host]
            )
        ]
    try:
        def idle():
            return (
                'idle' in subprocess.run(
                    ['sinfo', '--noheader', '--format=%t'], env=env, capture_output=True, text=True
                ).stdout
            )
        until(idle)
        yield {'SLURM_CONF': str(root/'slurm.conf')}
    finally:
        subprocess.run(['scancel', '--user=root'], env=env, capture_output=True)
        for process in reversed(started): process.terminate()
        for process in started:
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()
        shutil.rmtree(root, ignore_errors=True)


SLURM = 'slurm:partition=grid+cpus=1+minutes=30'


def test_a_real_cluster_gives_the_same_bytes(cluster, inline, tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, 'SLURM_CONF', cluster['SLURM_CONF'])
    done = table(tmp_path, SLURM)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(tmp_path) == files(inline) and not [*tmp_path.rglob('*.pkl'), *tmp_path.rglob('lock*')]


@pytest.mark.parametrize('warning', ['USR2', 'USR1'])
def test_a_cluster_takes_a_job_away_and_it_goes_on(cluster, tmp_path, warning):
    "The warning puts the job back; its second start goes on from the checkpoint of the first."
    env = ENV | cluster
    process = subprocess.Popen(
        [sys.executable, '-c', LONG, tmp_path, SLURM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True
    )
    until(lambda: epoch(tmp_path) >= 2)
    first, (job,) = until(lambda: holder(tmp_path)), queued(env)
    subprocess.run(['scancel', f'--signal={warning}', job], env=env, check=True)
    until(lambda: holder(tmp_path) != first)
    assert epoch(tmp_path) >= 2
    assert process.wait(300) == 0, process.stderr.read()[-2000:]
    result, = (json.loads(p.read_text()) for p in tmp_path.glob('store/train-*/result.json'))
    assert [row['epoch'] for row in result['log']] == list(range(12))


def test_a_cluster_that_needs_the_machine_starts_the_job_again(cluster, tmp_path):
    "Pre-emption with requeue: SIGTERM, the lock is given back, and the same job goes on from the last whole epoch."
    env = ENV | cluster
    process = subprocess.Popen(
        [sys.executable, '-c', LONG, tmp_path, SLURM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True
    )
    until(lambda: epoch(tmp_path) >= 2)
    first, jobs = until(lambda: holder(tmp_path)), queued(env)
    subprocess.run(['scontrol', 'requeue', *jobs], env=env, check=True)
    until(lambda: holder(tmp_path) != first)
    kept = epoch(tmp_path)
    assert 2 <= kept < 12
    again = until(lambda: holder(tmp_path))
    assert queued(env) == jobs and again != first and epoch(tmp_path) >= kept
    assert process.wait(300) == 0, process.stderr.read()[-2000:]
    result, = (json.loads(p.read_text()) for p in tmp_path.glob('store/train-*/result.json'))
    assert [row['epoch'] for row in result['log']] == list(range(12)) and not [
        *tmp_path.rglob('lock*'), *tmp_path.rglob('*.part')
    ]


def test_a_cancelled_job_is_named_and_stays_away(cluster, tmp_path):
    "Also on a cluster that keeps no accounts."
    env = ENV | cluster
    process = subprocess.Popen(
        [sys.executable, '-c', LONG, tmp_path, SLURM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True
    )
    until(lambda: epoch(tmp_path) >= 1)
    subprocess.run(['scancel', json.loads(lock_of(tmp_path, 'train').read_text())['job']], env=env, check=True)
    assert process.wait(300) == 1
    said = process.stderr.read()
    assert 'JobError: 1 of 1 jobs failed' in said and re.search(
        r'A Natural, seed 0 failed: it ended without a result .*; log: /\S+', said.splitlines()[-1]
    )
    assert epoch(tmp_path) >= 1 and not [*tmp_path.rglob('lock*')]


@pytest.mark.parametrize('name', ['a\nb', 'a\n#SBATCH --account=x', 'a%j', 'a`id`', '$(id)', "a'b", 'a"b', 'a\x1b[2J'])
def test_a_folder_cannot_write_into_the_script_of_a_job(tmp_path, name, monkeypatch):
    monkeypatch.setattr(jobs.shutil, 'which', lambda _: '/bin/true')
    with pytest.raises(ValueError, match='must be free of line breaks') as caught:
        jobs._engine(None, jobs.executor('slurm'), tmp_path/name)
    assert str(caught.value).isprintable()
