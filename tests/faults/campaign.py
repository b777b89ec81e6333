"""Kills, full disks and damaged files in a whole tiny run (data cache, training, attacks, report): after each fault the table must come out the same, byte for byte.

python tests/faults/campaign.py [--kills 100] [--full every] [--damage every] [--out reports/reliability.json]
"""
import os

os.environ |= {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

import argparse
import builtins
import errno
import io
import json
import mmap
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from robust_dml import experiments, report, store
from robust_dml.core import generator
from robust_dml.store import Run, save_tensors

STAGES = ('caching', 'training', 'attacks', 'training', 'attacks', 'report') # of the run, in order
REFUSALS = {'StoreError', 'ValueError', 'FileNotFoundError', 'OSError'}
OPEN = builtins.open # of before any fault
stage = mmap.mmap(-1, 1) # how many stages have begun; a forked process shares it with its parent


PICTURE = b'\x89PNG' + bytes(3000)


def images(root:Path)->None:
    "A miniature CUB: three classes to train on and three to test on, four images each."
    folder, classes = root/'CUB_200_2011', (1, 2, 3, 101, 102, 103)
    rows = [(k, c, f'{c:03d}.Some_Bird/Some_Bird_{k:04d}.png') for k, c in enumerate((c for c in classes for _ in range(4)), 1)]
    for k, c, file in rows:
        (folder/'images'/file).parent.mkdir(parents=True, exist_ok=True)
        look = torch.rand(32, 32, 3, generator=generator(k, 'look'))*120 + torch.rand(3, generator=generator(c, 'class'))*130
        Image.fromarray(look.byte().numpy()).save(folder/'images'/file)
    for name, column in (('images', 2), ('image_class_labels', 1)): (folder/f'{name}.txt').write_text(''.join(f'{row[0]} {row[column]}\n' for row in rows))
    (folder/'train_test_split.txt').write_text(''.join(f'{k} {k%2}\n' for k, *_ in rows))


def job(home:Path, mark:Callable[[], None]=lambda: None)->None:
    "Plan, train, attack and report two models; everything lies in one folder."
    mark()
    plan = experiments.plan('table1', experiments.parameters(dict(dataset='cub', root=str(home/'images'), preset='smoke', defenses='natural,act', out=str(home/'out'), backend='torch')))
    plan = replace(plan, recipe=replace(plan.recipe, dim=8, pairs=4, eval_steps=2, eval_batch=6))
    results = experiments.results(plan, show=False)
    mark()
    report._figures = lambda *_: {'picture.png': (PICTURE, 'A picture.')} # drawing touches no file and would take half of the time
    report.write_report(plan.folder, results, experiments.example_images(plan, results))


def table(home:Path)->bytes|None:
    path = home/'out'/'table1-cub-smoke'/'table.csv'
    return path.read_bytes() if path.is_file() else None


def begun()->Callable[[], None]:
    "Counts the stages of a run in `stage` and keeps when each began."
    times = []
    def mark():
        times.append(time.monotonic())
        stage[0] = len(times)
    def staged(function):
        def call(*args, **options):
            mark()
            return function(*args, **options)
        return call
    mark.times = times
    experiments.train, experiments.evaluate = staged(experiments.train), staged(experiments.evaluate)
    return mark


def start(home:Path, fault:Callable[[], None]=lambda: None)->int:
    "Fork a process that does the job in `home` with a fault prepared. It leaves its error, or the times of its stages and what the fault counted."
    stage[0] = 0
    if pid := os.fork(): return pid
    with OPEN(home/'said', 'w') as said, redirect_stdout(said), redirect_stderr(said):
        try:
            mark, counted = begun(), fault()
            job(home, mark)
            with OPEN(home/'done', 'w') as file: json.dump(dict(times=[*mark.times, time.monotonic()], counted=len(counted or ())), file)
        except BaseException as error:
            with OPEN(home/'error', 'w') as file: json.dump([type(error).__name__, str(error)], file)
            os._exit(1)
    os._exit(0)


def finish(pid:int, home:Path)->list[str]:
    "Wait for a process; type and text of its error, ['killed'], or nothing."
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): return ['killed']
    return json.loads((home/'error').read_text()) if status else []


def run(home:Path, fault:Callable[[], None]=lambda: None)->list[str]: return finish(start(home, fault), home)


class Full:
    "A file of a disk that is full from the n-th write on; half of that write still fits."
    def __init__(self, file, counted, n): self.file, self.counted, self.n = file, counted, n
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data):
        self.counted.append(1)
        if len(self.counted) < self.n: return self.file.write(data)
        self.file.write(data[:len(data)//2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(home:Path, n:float)->Callable[[], list]:
    "A fault: every write from the n-th on fails."
    def fault():
        counted = []
        def opened(file, mode='r', *args, **options):
            real = OPEN(file, mode, *args, **options)
            return Full(real, counted, n) if set(mode) & set('wax+') and str(file).startswith(f'{home}/') else real
        builtins.open = io.open = opened
        return counted
    return fault


def kill_at_write(n:float, after:bool=False)->Callable[[], list]:
    "A fault: SIGKILL right before or after the n-th time that a file takes its place or is flushed to the disk."
    def fault():
        counted = []
        def deadly(function):
            def call(*args):
                counted.append(1)
                if len(counted) == n and not after: os.kill(os.getpid(), signal.SIGKILL)
                function(*args)
                if len(counted) == n: os.kill(os.getpid(), signal.SIGKILL)
            return call
        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
        return counted
    return fault


def begin(folder:Path)->Path:
    "A folder with the images only, of the same age everywhere, so that a cache stays valid when it is copied."
    home = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(folder/'images', home/'images')
    return home


def finished(home:Path)->dict[str, bytes]: return {str(p.relative_to(home)): p.read_bytes() for p in home.glob('out/store/*/result.json')}


def verdict(home:Path, expected:bytes, kept:dict[str, bytes])->str:
    "Start again and compare: 'survived', 'wrong' (another table) or 'lost' (no table, or work that was finished was done again)."
    if error := run(home): return f'lost: started again it ended in {error}'
    if table(home) != expected: return 'wrong: another table'
    again = [name for name, data in kept.items() if finished(home).get(name) != data]
    rest = [p.name for pattern in ('*.part', 'lock*') for p in (home/'out'/'store').rglob(pattern)]
    return f'lost: {again} computed again' if again else f'lost: {rest} left behind' if rest else 'survived'


def killed_in_stage(home:Path, number:int, wait:float)->list[str]:
    "SIGKILL some seconds after a stage has begun."
    pid = start(home)
    while stage[0] < number and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG): time.sleep(.001)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    return finish(pid, home)


def kills(folder:Path, calm:dict, count:int, seed:int)->Iterator[tuple[str, Callable[[], str]]]:
    "SIGKILLs: two thirds at a random moment of a random stage, a third at a random write."
    for i in range(count):
        gen = generator(seed, 'kill', i)
        number, share, n = int(torch.randint(1, len(STAGES)+1, (), generator=gen)), float(torch.rand((), generator=gen)), int(torch.randint(1, calm['flushes']+1, (), generator=gen))
        def trial(i=i, number=number, share=share, n=n):
            while True:
                home = begin(folder)
                error = run(home, kill_at_write(n, after=i%2 == 0)) if i%3 == 0 else killed_in_stage(home, number, share*calm['seconds'][number-1])
                if error == ['killed']: return verdict(home, calm['table'], finished(home))
                share, n = .8*share, max(1, n-1) # the run was faster this time and had ended
        yield ('kill at a write' if i%3 == 0 else f'kill during {STAGES[number-1]}'), trial


def full(folder:Path, calm:dict, step:int)->Iterator[tuple[str, Callable[[], str]]]:
    "A full disk at every `step`-th write."
    for n in range(1, calm['writes']+1, step):
        def trial(n=n):
            home = begin(folder)
            kind, text = (*run(home, full_disk(home, n)), '', '')[:2]
            if kind not in REFUSALS or 'expected' not in text and 'decoded images' not in text or '\n' in text: return f'unclear: write {n}: {kind}: {text}'
            return verdict(home, calm['table'], finished(home))
        yield 'disk full', trial


def truncate(path:Path)->None: path.write_bytes(path.read_bytes()[:path.stat().st_size//2])


def flip(path:Path)->None:
    data = bytearray(path.read_bytes())
    place = int(torch.randint(len(data), (), generator=generator(0, path.name, len(data))))
    data[place] ^= 1 << place%8
    path.write_bytes(data)


def skew(path:Path)->None:
    "The same as another version would have written it: valid, hashes included, with other names."
    run_folder = Run(path.parent)
    if path.suffix == '.json':
        value = run_folder.read(path.name)
        first = {'card.json': 'config', 'checkpoint.json': 'state'}.get(path.name, 'weights' if 'eval-' in run_folder.address else 'log')
        run_folder.write(path.name, {(f'{k}_2' if k == first else k): v for k, v in value.items()})
    elif path.suffix == '.jsonl':
        lines = store.read_lines(run_folder, path.name)
        path.unlink()
        for line in lines: store.append_line(run_folder, path.name, {(f'{k}_2' if k == 'after' else k): v for k, v in line.items()})
    elif path.suffix == '.safetensors':
        digest = save_tensors(run_folder, path.name, {f'{k}.2': v for k, v in load_file(path).items()})
        name, key = ('checkpoint.json', 'sha256') if path.name.startswith('checkpoint') else ('result.json', 'examples' if path.name.startswith('examples') else 'sha256')
        if run_folder.has(name): run_folder.write(name, run_folder.read(name) | {key: digest})
    else: path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))


def states(folder:Path, calm:Path)->Iterator[tuple[str, Path]]:
    "A finished run, one whose attacks are half done, and one that was killed between two epochs: each reads other files."
    yield 'finished', calm
    half = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(calm, half, dirs_exist_ok=True)
    for result in half.glob('out/store/eval-*/result.json'): result.unlink()
    yield 'attacks', half
    home = begin(folder)
    assert run(home, kill_at_checkpoint) == ['killed']
    yield 'training', home


def kill_at_checkpoint()->None:
    "A fault: SIGKILL when the first epoch is stored."
    from robust_dml import train
    save = train.save_checkpoint
    def deadly(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    train.save_checkpoint = deadly


def repaired(home:Path, path:Path, calm:dict)->str:
    "Do what the message says: delete the file, or else the run's folder, and start again."
    for doing in (lambda: path.unlink(missing_ok=True), lambda: shutil.rmtree(path.parent)):
        doing()
        if not run(home): return 'survived' if table(home) == calm['table'] else 'wrong: another table after deleting the damaged file'
    return f'lost: neither without the file nor without its folder: {json.loads((home/"error").read_text())}'


def damage(folder:Path, calm:dict, step:int)->Iterator[tuple[str, Callable[[], str]]]:
    "Each file of the run folders and the cache truncated, with one bit flipped, and as another version would write it."
    every = [(name, home, path.relative_to(home)) for name, home in states(folder, calm['home']) for pattern in ('out/store/*/*', '**/*.npy') for path in sorted(home.glob(pattern)) if path.name != 'lock']
    cases = [(*where, change) for where in every for change in (truncate, flip, skew)]
    for state, base, file, change in cases[::step]:
        def trial(state=state, base=base, file=file, change=change):
            home = Path(tempfile.mkdtemp(dir=folder))
            shutil.copytree(base, home, dirs_exist_ok=True)
            (home/'out'/'table1-cub-smoke').exists() and shutil.rmtree(home/'out'/'table1-cub-smoke')
            change(home/file)
            error = run(home)
            if not error: return 'survived' if table(home) == calm['table'] else f'wrong: {change.__name__} {file} ({state}) was used'
            if error[0] not in REFUSALS or '\n' in error[1]: return f'unclear: {change.__name__} {file} ({state}): {error}'
            return repaired(home, home/file, calm)
        yield f'{change.__name__} {"cache" if file.suffix == ".npy" else "run file"}', trial


def undisturbed(folder:Path)->dict:
    "The run without a fault: its table, the seconds of its stages, and how often it writes."
    home = begin(folder)
    assert not (error := run(home, kill_at_write(float('inf')))), error
    done = json.loads((home/'done').read_text())
    writes = begin(folder)
    assert not (error := run(writes, full_disk(writes, float('inf')))), error
    assert table(home) == table(writes), 'two undisturbed runs must end in the same table'
    return dict(home=home, table=table(home), seconds=[b - a for a, b in zip(done['times'], done['times'][1:])], flushes=done['counted'], writes=json.loads((writes/'done').read_text())['counted'])


def at_work(trials:list, workers:int, folder:Path)->list[list[str]]:
    "Fault and outcome of every trial, done by forked workers."
    global stage
    pids = []
    for k in range(workers):
        if pid := os.fork():
            pids.append(pid)
            continue
        stage = mmap.mmap(-1, 1)
        with OPEN(folder/f'outcomes-{k}', 'w') as file:
            for fault, trial in trials[k::workers]:
                try: outcome = trial()
                except Exception as error: outcome = f'lost: the trial itself ended in {type(error).__name__}: {error}'
                print(json.dumps([fault, outcome]), file=file, flush=True)
        os._exit(0)
    for pid in pids: os.waitpid(pid, 0)
    return [json.loads(line) for k in range(workers) for line in (folder/f'outcomes-{k}').read_text().splitlines()]


def summary(outcomes:list[list[str]])->list[dict]:
    "A row for each kind of fault."
    kinds = ('survived', 'lost', 'wrong', 'unclear')
    rows = {}
    for fault, outcome in outcomes:
        row = rows.setdefault(fault, dict(fault=fault, injected=0, **dict.fromkeys(kinds, 0)))
        row['injected'] += 1
        row[outcome.partition(':')[0]] += 1
    whole = dict(fault='all', **{key: sum(row[key] for row in rows.values()) for key in ('injected', *kinds)})
    return [*(rows[fault] for fault in sorted(rows)), whole]


def campaign(folder:Path, *, count:int, full_every:int, damage_every:int, seed:int, workers:int)->dict:
    "Inject all faults; JSON-able."
    images(folder/'images')
    calm = undisturbed(folder)
    trials = [*kills(folder, calm, count, seed), *(full(folder, calm, full_every) if full_every else ()), *(damage(folder, calm, damage_every) if damage_every else ())]
    outcomes = at_work(trials, workers, folder)
    assert len(outcomes) == len(trials), f'expected {len(trials)} outcomes, found {len(outcomes)}'
    return dict(faults=summary(outcomes), seed=seed, writes=calm['writes'], flushes=calm['flushes'], other=sorted(f'{fault}: {outcome}' for fault, outcome in outcomes if outcome != 'survived'))


def main()->int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument('--kills', type=int, default=100, help='number of SIGKILLs')
    asked.add_argument('--full', type=int, default=1, help='a full disk at every so-manieth write; 0: none')
    asked.add_argument('--damage', type=int, default=1, help='every so-manieth damage of a file; 0: none')
    asked.add_argument('--seed', type=int, default=0)
    asked.add_argument('--workers', type=int, default=2)
    asked.add_argument('--out', type=Path, default=Path('reports/reliability.json'))
    given = asked.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', '.*is not the published set')
    with tempfile.TemporaryDirectory() as tmp: found = campaign(Path(tmp), count=given.kills, full_every=given.full, damage_every=given.damage, seed=given.seed, workers=given.workers)
    print(f'{"fault":24}' + ''.join(f'{key:>10}' for key in ('injected', 'survived', 'lost', 'wrong', 'unclear')))
    for row in found['faults']: print(f'{row["fault"]:24}' + ''.join(f'{row[key]:>10}' for key in ('injected', 'survived', 'lost', 'wrong', 'unclear')))
    for line in found['other']: print(line)
    store.write_atomic(given.out, store.to_json(found))
    return int(found['faults'][-1]['survived'] != found['faults'][-1]['injected'])


if __name__ == '__main__': sys.exit(main())
