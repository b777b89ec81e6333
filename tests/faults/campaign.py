"""Faults in a whole tiny run (data cache, training, attacks, report): after each the table must come out the same,
byte for byte. SIGKILL at random moments, a full disk at every write, damaged files, too little memory, losses and
gradients that are not finite, and workers that die. python tests/faults/campaign.py [--kills 100] [--full every]
[--damage every] [--device every] [--workers-die 8] [--out reports/reliability.json]"""
import os

os.environ |= {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

import argparse
import builtins
import csv
import errno
import io
import json
import math
import mmap
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from safetensors.torch import load_file

from robust_dml.data import archives
from robust_dml.study import experiments
from robust_dml.report import tables
from robust_dml.runs import store
from robust_dml.core import generator
from robust_dml.runs.store import Run, load_tensors, save_tensors

STAGES = ('caching', 'training', 'attacks', 'training', 'attacks', 'report') # of the run, in order
REFUSALS = {'StoreError', 'ValueError', 'FileNotFoundError', 'OSError'}
OPEN = builtins.open # of before any fault
stage = mmap.mmap(-1, 1) # how many stages have begun; a forked process shares it with its parent


PICTURE = b'\x89PNG' + bytes(3000)


def images(root:Path)->None:
    "A miniature CUB: three classes to train on and three to test on, four images each."
    folder, classes = root/'CUB_200_2011', (1, 2, 3, 101, 102, 103)
    rows = [
        (k, c, f'{c:03d}.Some_Bird/Some_Bird_{k:04d}.png')
        for k, c in enumerate((c for c in classes for _ in range(4)), 1)
    ]
    for k, c, file in rows:
        (folder/'images'/file).parent.mkdir(parents=True, exist_ok=True)
        look = (
            torch.rand(32, 32, 3, generator=generator(k, 'look')) * 120
            + torch.rand(3, generator=generator(c, 'class')) * 130
        )
        Image.fromarray(look.byte().numpy()).save(folder/'images'/file)
    for name, column in (('images', 2), ('image_class_labels', 1)):
        (folder/f'{name}.txt').write_text(''.join(f'{row[0]} {row[column]}\n' for row in rows))
    (folder/'train_test_split.txt').write_text(''.join(f'{k} {k%2}\n' for k, *_ in rows))


def job(home:Path, mark:Callable[[], None]=lambda: None, executor:str='inline')->None:
    "Plan, train, attack and report two models; everything lies in one folder."
    archives.cache_folder = lambda *_: home/'cache' # in the same folder, so that faults reach it
    mark()
    plan = experiments.plan(
        'table1',
        experiments.parameters(
            dict(
                dataset='cub', root=str(home / 'images'), preset='smoke', defenses='natural,act', out=str(home / 'out'),
                backend='torch', executor=executor
            )
        ),
    )
    plan = replace(plan, recipe=replace(plan.recipe, dim=8, pairs=4, eval_steps=2, eval_batch=6))
    results = experiments.results(plan, show=False)
    mark()
    # drawing touches no file and would take half of the time
    tables._figures = lambda *_: {'picture.png': tables.Picture(PICTURE, 'A picture.')}
    experiments.write_table(plan.folder, results)


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


def start(
    home: Path, fault: Callable[[], None] = lambda: None, rank: int = 0, launch: dict = MappingProxyType({}),
    executor: str = 'inline'
) -> int:
    """Fork a process that does the job in `home` with a fault prepared. It leaves its error, or the times of its
    stages and what the fault counted."""
    stage[0] = 0
    if pid := os.fork(): return pid
    os.environ |= launch
    with OPEN(home/f'said-{rank}', 'w') as said, redirect_stdout(said), redirect_stderr(said):
        try:
            mark, counted = begun(), fault()
            job(home, mark, executor)
            with OPEN(home/'done', 'w') as file:
                json.dump(dict(times=[*mark.times, time.monotonic()], counted=len(counted or ())), file)
        except BaseException as error:
            if isinstance(error, SystemExit) and error.code == 0: os._exit(0) # the end of every process but the first
            with OPEN(home/f'error-{rank}', 'w') as file: json.dump([type(error).__name__, str(error)], file)
            os._exit(1)
    os._exit(0)


def finish(pid:int, home:Path, rank:int=0)->list[str]:
    "Wait for a process; type and text of its error, ['killed'], or nothing."
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): return ['killed']
    return json.loads((home/f'error-{rank}').read_text()) if status else []


def run(home:Path, fault:Callable[[], None]=lambda: None)->list[str]: return finish(start(home, fault), home)


def two(home:Path)->list[int]:
    "The job in two processes, as torchrun starts them."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        launch = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2')
    return [start(home, rank=rank, launch=launch | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]


def over(pid:int)->bool: return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def run_two(home:Path)->list[str]:
    "Two processes to their end; the error of the first that has one."
    return next((error for error in [finish(pid, home, rank) for rank, pid in enumerate(two(home))] if error), [])


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
    "A folder with the images only."
    home = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(folder/'images', home/'images')
    return home


def finished(home:Path)->dict[str, bytes]:
    return {str(p.relative_to(home)): p.read_bytes() for p in home.glob('out/store/*/result.json')}


def verdict(home:Path, expected:bytes, kept:dict[str, bytes], again:Callable[[Path], list[str]]|None=None)->str:
    """Start again and compare: 'survived', 'wrong' (another table) or 'lost' (no table, or work that was finished was
    done again)."""
    if error := (again or run)(home): return f'lost: started again it ended in {error}'
    if table(home) != expected: return 'wrong: another table'
    twice = [name for name, data in kept.items() if finished(home).get(name) != data]
    rest = [p.name for pattern in ('*.part', 'lock*') for p in (home/'out'/'store').rglob(pattern)]
    return f'lost: {twice} computed again' if twice else f'lost: {rest} left behind' if rest else 'survived'


def killed_in_stage(home:Path, number:int, wait:float)->list[str]:
    "SIGKILL some seconds after a stage has begun."
    pid = start(home)
    while stage[0] < number and not over(pid): time.sleep(.001)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    return finish(pid, home)


def kills(folder:Path, calm:dict, count:int, seed:int)->Iterator[tuple[str, Callable[[], str]]]:
    "SIGKILLs: two thirds at a random moment of a random stage, a third at a random write."
    for i in range(count):
        gen = generator(seed, 'kill', i)
        number, share, n = (
            int(torch.randint(1, len(STAGES) + 1, (), generator=gen)), float(torch.rand((), generator=gen)),
            int(torch.randint(1, calm['flushes'] + 1, (), generator=gen))
        )
        def trial(i=i, number=number, share=share, n=n):
            while True:
                home = begin(folder)
                error = (
                    run(home, kill_at_write(n, after=i % 2 == 0))
                    if i % 3 == 0
                    else killed_in_stage(home, number, share * calm['seconds'][number - 1])
                )
                if error == ['killed']: return verdict(home, calm['table'], finished(home))
                share, n = .8*share, max(1, n-1) # the run was faster this time and had ended
        yield ('kill at a write' if i%3 == 0 else f'kill during {STAGES[number-1]}'), trial


def full(folder:Path, calm:dict, step:int)->Iterator[tuple[str, Callable[[], str]]]:
    "A full disk at every `step`-th write."
    for n in range(1, calm['writes']+1, step):
        def trial(n=n):
            home = begin(folder)
            kind, text = (*run(home, full_disk(home, n)), '', '')[:2]
            if kind not in REFUSALS or 'expected' not in text and 'decoded images' not in text or '\n' in text:
                return f'unclear: write {n}: {kind}: {text}'
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
        first = {'card.json': 'config', 'checkpoint.json': 'state'}.get(
            path.name, 'weights' if 'eval-' in run_folder.address else 'log'
        )
        run_folder.write(path.name, {(f'{k}_2' if k == first else k): v for k, v in value.items()})
    elif path.suffix == '.jsonl':
        lines = store.read_lines(run_folder, path.name)
        path.unlink()
        for line in lines:
            store.append_line(run_folder, path.name, {(f'{k}_2' if k == 'after' else k): v for k, v in line.items()})
    elif path.suffix == '.safetensors':
        digest = save_tensors(run_folder, path.name, {f'{k}.2': v for k, v in load_file(path).items()})
        name, key = (
            ('checkpoint.json', 'sha256')
            if path.name.startswith('checkpoint')
            else ('result.json', 'examples' if path.name.startswith('examples') else 'sha256')
        )
        if run_folder.has(name): run_folder.write(name, run_folder.read(name) | {key: digest})
    else: path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))


def states(folder:Path, calm:Path)->Iterator[tuple[str, Path]]:
    """A finished run, one whose attacks are half done, and one that was killed between two epochs: each reads other
    files."""
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
    from robust_dml.defenses import train
    save = train.save_checkpoint
    def deadly(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    train.save_checkpoint = deadly


def repaired(home:Path, path:Path, calm:dict)->str:
    "Do what the message says: delete the file, or else the run's folder, and start again."
    for doing in (lambda: path.unlink(missing_ok=True), lambda: shutil.rmtree(path.parent)):
        doing()
        if not run(home):
            return (
                'survived' if table(home) == calm['table'] else 'wrong: another table after deleting the damaged file'
            )
    return f'lost: neither without the file nor without its folder: {json.loads((home/"error-0").read_text())}'


def damage(folder:Path, calm:dict, step:int)->Iterator[tuple[str, Callable[[], str]]]:
    "Each file of the run folders and the cache truncated, with one bit flipped, and as another version would write it."
    every = [
        (name, home, path.relative_to(home))
        for name, home in states(folder, calm['home'])
        for pattern in ('out/store/*/*', '**/*.npy')
        for path in sorted(home.glob(pattern))
        if path.name != 'lock'
    ]
    cases = [(*where, change) for where in every for change in (truncate, flip, skew)]
    for state, base, file, change in cases[::step]:
        def trial(state=state, base=base, file=file, change=change):
            home = Path(tempfile.mkdtemp(dir=folder))
            shutil.copytree(base, home, dirs_exist_ok=True)
            (home/'out'/'table1-cub-smoke').exists() and shutil.rmtree(home/'out'/'table1-cub-smoke')
            change(home/file)
            error = run(home)
            if not error:
                return (
                    'survived'
                    if table(home) == calm['table']
                    else f'wrong: {change.__name__} {file} ({state}) was used'
                )
            if error[0] not in REFUSALS or '\n' in error[1]:
                return f'unclear: {change.__name__} {file} ({state}): {error}'
            return repaired(home, home/file, calm)
        yield f'{change.__name__} {"cache" if file.suffix == ".npy" else "run file"}', trial


def small_device(room:int)->Callable[[], None]:
    "A fault: the device has room for so many images at a time, attacked or embedded."
    def fault():
        from robust_dml.metrics import evaluate
        from robust_dml.models import networks
        def small(function):
            def call(model, *args, **options):
                x = next(a for a in args if isinstance(a, torch.Tensor))
                if len(x) > room: raise torch.OutOfMemoryError('CUDA out of memory')
                return function(model, *args, **options)
            return call
        evaluate.run_attack, networks.embed = small(evaluate.run_attack), small(networks.embed)
    return fault


def broken_update(name:str, update:int, breaks:Callable)->Callable[[], None]:
    "A fault: one update of the training with the defence `name` breaks."
    def fault():
        train = experiments.train
        def training(model, dataset, defense, **options):
            def step(model, x, label, *, state, clock, gen):
                out = defense.step(model, x, label, state=state, clock=clock, gen=gen)
                return breaks(out, model) if clock.update == update else out
            return train(model, dataset, replace(defense, step=step) if defense.name == name else defense, **options)
        experiments.train = training
    return fault


def no_loss(out, model): return out._replace(loss=out.loss*math.nan)
def no_room(out, model): raise torch.OutOfMemoryError('CUDA out of memory')


def no_gradient(out, model):
    "A root at zero, of a weight: the loss is the same, and its slope is NaN also where all hinges are slack."
    weight = next(model.parameters()).flatten()[0]
    return out._replace(loss=out.loss + (weight - weight.detach()).abs().sqrt())


def same_numbers(one:bytes, other:bytes)->bool:
    "Two tables with the same words, percentages within half a point and all other numbers within .005."
    rows = [list(csv.reader(text.decode().splitlines())) for text in (one, other)]
    def close(head, a, b):
        try: return abs(float(a) - float(b)) <= (.005 if head in ('TMA', 'ES:D') or abs(float(a)) <= 2 else .5)
        except ValueError: return a == b
    return [len(r) for r in rows[0]] == [len(r) for r in rows[1]] and all(
        close(*three) for a, b in zip(*rows) for three in zip(rows[0][0], a, b)
    )


def halved(folder:Path, calm:dict, room:int)->str:
    "Attacks and embeddings that find too little memory go on in halves, and say so."
    home = begin(folder)
    if error := run(home, small_device(room)): return f'lost: room for {room}: {error}'
    said = (home/'said-0').read_text()
    if not all(f'found too little; they are {done} in halves' in said for done in ('attacked', 'embedded')):
        return f'unclear: room for {room}: no warning'
    return 'survived' if same_numbers(table(home), calm['table']) else f'wrong: room for {room}: another table'


def stopped(folder:Path, calm:dict, name:str, update:int, breaks:Callable)->str:
    """A training that breaks stops with one sentence and the last whole epoch; where numbers are to blame, the update
    is stored."""
    home = begin(folder)
    kind, text = (*run(home, broken_update(name, update, breaks)), '', '')[:2]
    wanted = dict(
        no_room=('RuntimeError', 'expected room for'), no_loss=('NotFinite', 'expected a finite loss'),
        no_gradient=('NotFinite', 'expected a finite gradient')
    )[breaks.__name__]
    if kind != wanted[0] or not text.startswith(wanted[1]) or '\n' in text:
        return f'unclear: {breaks.__name__} in update {update} of {name}: {kind}: {text}'
    where = next(
        Run(p.parent) for p in home.glob('out/store/train-*/card.json') if not (p.parent / 'result.json').exists()
    )
    epoch = where.read('checkpoint.json')['epoch'] if where.has('checkpoint.json') else 0
    if epoch != update//calm['batches']:
        return f'lost: {breaks.__name__} in update {update} of {name}: {epoch} epochs kept'
    if breaks is not no_room:
        fault = where.read('fault.json', 'rows', 'sha256')
        if load_tensors(where, 'fault.safetensors', fault['sha256'])['rows'].tolist() != fault['rows']:
            return f'lost: the batch of update {update} of {name} is not stored'
    return verdict(home, calm['table'], finished(home))


def device(folder:Path, calm:dict, step:int)->Iterator[tuple[str, Callable[[], str]]]:
    "Too little memory, and losses and gradients that are not finite, in every `step`-th place."
    for room in (1, 2, 3, 5)[::step]: yield 'no room for a batch', lambda room=room: halved(folder, calm, room)
    faults = {no_room: 'no room for an update', no_loss: 'loss not finite', no_gradient: 'gradient not finite'}
    places = [
        (name, update, breaks) for breaks in faults for name in ('natural', 'act') for update in range(calm['updates'])
    ]
    for place in places[::step]: yield faults[place[2]], lambda place=place: stopped(folder, calm, *place)


def one_of_two(folder:Path, calm:dict, which:int, number:int, share:float)->str:
    "SIGKILL one of two processes that share a run; the other must end, and two new ones must finish."
    while True:
        home = begin(folder)
        pids = two(home)
        while stage[0] < number and not any(map(over, pids)): time.sleep(.001)
        time.sleep(share*calm['seconds_two'][number-1])
        os.kill(pids[which], signal.SIGKILL)
        end = time.monotonic() + 30
        while not over(pids[1-which]) and time.monotonic() < end: time.sleep(.01)
        if late := not over(pids[1-which]): os.kill(pids[1-which], signal.SIGKILL) # as torchrun does, after as long
        outcome = [finish(pid, home, rank) for rank, pid in enumerate(pids)]
        if outcome[which] == ['killed']: break
        share *= .8 # the run was faster this time and had ended
    if not late and outcome[1-which] and outcome[1-which][0] != 'ProcessLost':
        return f'unclear: the process that was left ended in {outcome[1-which]}'
    return verdict(home, calm['table_two'], finished(home), run_two)


def a_job(folder:Path, calm:dict, kind:str, wait:float)->str:
    """SIGKILL the process of a job of the local executor while it holds a run; the table that asked for it must say
    so, and find the run free."""
    home = begin(folder)
    pid = start(home, executor='local:jobs=1+threads=1')
    while not (lock := next(home.glob(f'out/store/{kind}-*/lock'), None)) and not over(pid): time.sleep(.005)
    try: holder = int(re.search(r'^pid=(\d+)$', lock.read_text(), re.M)[1])
    except (AttributeError, FileNotFoundError, TypeError): holder = 0 # it was faster
    time.sleep(wait)
    if holder: os.kill(holder, signal.SIGKILL)
    name, text = (*finish(pid, home), '', '')[:2]
    if name != 'JobError' or 'it ended without a result' not in text: return f'unclear: {name}: {text}'
    return verdict(home, calm['table'], finished(home))


def workers_die(folder:Path, calm:dict, count:int, seed:int)->Iterator[tuple[str, Callable[[], str]]]:
    "Deaths of one process of several: three quarters of two that share a run, a quarter of jobs."
    for i in range(count):
        gen = generator(seed, 'worker', i)
        number, share = int(torch.randint(2, 6, (), generator=gen)), float(torch.rand((), generator=gen))
        if i%4 == 3:
            yield 'job killed', lambda i=i, share=share: a_job(folder, calm, ('train', 'eval')[i//4%2], .05*share)
        else:
            yield 'one of two killed', lambda i=i, number=number, share=share: one_of_two(
                folder, calm, i % 2, number, share
            )


def undisturbed(folder:Path)->dict:
    "The run without a fault: its table, the seconds of its stages, and how often it writes."
    home = begin(folder)
    assert not (error := run(home, kill_at_write(float('inf')))), error
    done = json.loads((home/'done').read_text())
    writes = begin(folder)
    assert not (error := run(writes, full_disk(writes, float('inf')))), error
    assert table(home) == table(writes), 'two undisturbed runs must end in the same table'
    trained = [json.loads(p.read_text()) for p in home.glob('out/store/train-*/result.json')]
    return dict(
        home=home, table=table(home), seconds=between(done), flushes=done['counted'],
        writes=json.loads((writes / 'done').read_text())['counted'], updates=trained[0]['updates'],
        batches=trained[0]['updates'] // len(trained[0]['log'])
    )


def between(done:dict)->list[float]: return [b - a for a, b in zip(done['times'], done['times'][1:])]


def undisturbed_by_two(folder:Path, one:bytes)->dict:
    "The same by two processes: the table, and the seconds of the stages."
    homes = [begin(folder) for _ in range(2)]
    for home in homes: assert not (error := run_two(home)), error
    assert table(homes[0]) == table(homes[1]) and same_numbers(
        table(homes[0]), one
    ), 'two undisturbed runs of two processes must end in the same table, that of one process up to rounding'
    return dict(table_two=table(homes[0]), seconds_two=between(json.loads((homes[0]/'done').read_text())))


def at_work(trials:list, workers:int, folder:Path, until:float)->list[list[str]]:
    "Fault and outcome of every trial that forked workers begin before `until`."
    global stage
    pids = []
    for k in range(workers):
        if pid := os.fork():
            pids.append(pid)
            continue
        stage = mmap.mmap(-1, 1)
        with OPEN(folder/f'outcomes-{k}', 'w') as file:
            for fault, trial in trials[k::workers]:
                if time.monotonic() > until: break
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


def warm()->None:
    """Do once what every forked process would do again: what Adam imports at its first use, and the versions of all
    packages."""
    import pandas, torch._dynamo # noqa: F401
    known = store.provenance()
    store.provenance = lambda: known


def campaign(
    folder: Path, *, count: int, full_every: int, damage_every: int, device_every: int, workers_count: int, seed: int,
    workers: int, minutes: float
) -> dict:
    "Inject all faults, or as many as the minutes allow: kills first, the others in random order; JSON-able."
    began = time.monotonic()
    warm()
    images(folder/'images')
    calm = undisturbed(folder)
    if workers_count: calm |= undisturbed_by_two(folder, calm['table'])
    others = [
        *(full(folder, calm, full_every) if full_every else ()),
        *(damage(folder, calm, damage_every) if damage_every else ()),
        *(device(folder, calm, device_every) if device_every else ()), *workers_die(folder, calm, workers_count, seed)
    ]
    trials = [
        *kills(folder, calm, count, seed),
        *(others[i] for i in torch.randperm(len(others), generator=generator(seed, 'order')))
    ]
    print(f'{len(trials)} faults', flush=True)
    outcomes = at_work(trials, workers, folder, until=began + 60*minutes if minutes else math.inf)
    assert minutes or len(outcomes) == len(trials), f'expected {len(trials)} outcomes, found {len(outcomes)}'
    return dict(
        faults=summary(outcomes), planned=len(trials), seed=seed, writes=calm['writes'], flushes=calm['flushes'],
        minutes=round((time.monotonic() - began) / 60, 1), workers=workers, load=os.getloadavg()[2],
        other=sorted(f'{fault}: {outcome}' for fault, outcome in outcomes if outcome != 'survived')
    )


def main()->int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument('--kills', type=int, default=100, help='number of SIGKILLs')
    asked.add_argument('--full', type=int, default=1, help='a full disk at every so-manieth write; 0: none')
    asked.add_argument('--damage', type=int, default=1, help='every so-manieth damage of a file; 0: none')
    asked.add_argument(
        '--device', type=int, default=1,
        help='too little memory and numbers that are not finite, in every so-manieth place; 0: none'
    )
    asked.add_argument('--workers-die', type=int, default=8, help='deaths of one process of several')
    asked.add_argument('--seed', type=int, default=0)
    asked.add_argument('--workers', type=int, default=2)
    asked.add_argument('--minutes', type=float, default=0, help='begin no trial after so many minutes; 0: no limit')
    asked.add_argument('--out', type=Path, default=Path('reports/reliability.json'))
    given = asked.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', '.*is not the published set')
    with tempfile.TemporaryDirectory() as tmp:
        found = campaign(
            Path(tmp), count=given.kills, full_every=given.full, damage_every=given.damage, device_every=given.device,
            workers_count=given.workers_die, seed=given.seed, workers=given.workers, minutes=given.minutes
        )
    keys = ('injected', 'survived', 'lost', 'wrong', 'unclear')
    print(f'{"fault":24}' + ''.join(f'{key:>10}' for key in keys))
    for row in found['faults']: print(f'{row["fault"]:24}' + ''.join(f'{row[key]:>10}' for key in keys))
    if (done := found['faults'][-1]['injected']) < found['planned']:
        print(f'{done} of {found["planned"]} planned faults, as many as the minutes allowed')
    for line in found['other']: print(line)
    store.write_atomic(given.out, store.to_json(found))
    return int(found['faults'][-1]['survived'] != found['faults'][-1]['injected'])


if __name__ == '__main__': sys.exit(main())
