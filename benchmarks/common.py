"What every benchmark shares: interleaved pairs of our code and its lower bound, and the description of the machine."
import os, platform, statistics, subprocess, time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from robust_dml.core import kept_memory


class Seconds(float):
    "The time that a call measured itself, for example in a process of its own."


@dataclass(frozen=True)
class Item:
    "One comparison: the same work by our code and by the least that the algorithm needs."
    group:str            # 'attacks', 'training', 'search', 'mining', 'memory'
    name:str
    size:str             # for the table, for example '256 x 1 x 28 x 28'
    ours:Callable[[], object] # what it returns counts only if it is `Seconds`
    bound:Callable[[], object]|None # None: an absolute time is the target
    bound_is:str         # the bound in words
    target:float|None    # largest ratio (or milliseconds without a bound) that counts as met; None: only reported
    work:int = 0         # images x steps of one call; 0: not counted
    extra:Callable[[], dict]|None = None # further figures, taken once after the timing
    pairs:int = 5        # interleaved pairs
    note:str = ''        # why a target is missed, measured by a profile


def seconds(call:Callable[[], object])->float:
    "Wall-clock seconds of one call, or what it says itself."
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    own = call()
    wait()
    return own if isinstance(own, Seconds) else time.perf_counter() - began


def measure(item:Item)->dict:
    "Times of `ours` and `bound` in turn after one warm-up each, and their ratio pair by pair."
    calls = dict(ours=item.ours) | (dict(bound=item.bound) if item.bound else {})
    with kept_memory(): # as `train` and `evaluate` work
        return _measure(item, calls)


def _measure(item:Item, calls:dict)->dict:
    for call in calls.values(): call()
    rounds = [
        {name: seconds(call) for name, call in (reversed(calls.items()) if i % 2 else calls.items())}
        for i in range(item.pairs)
    ]
    figures = {f'{name}_s': [r[name] for r in rounds] for name in calls}
    value = [r['ours']/r['bound'] for r in rounds] if item.bound else [1000*r['ours'] for r in rounds]
    middle = statistics.median(value)
    return dict(
        group=item.group, name=item.name, size=item.size, bound_is=item.bound_is, unit='ratio' if item.bound else 'ms',
        median=middle, low=min(value), high=max(value), target=item.target,
        met=None if item.target is None else middle <= item.target,
        image_steps_per_s=item.work / statistics.median(figures['ours_s']) if item.work else None, note=item.note,
        **figures, **(item.extra() if item.extra else {})
    )


def machine()->dict:
    "What the figures were taken on."
    cpu = (
        next(
            (
                line.split(':', 1)[1].strip()
                for line in Path('/proc/cpuinfo').read_text().splitlines()
                if line.startswith('model name')
            ),
            '',
        )
        if Path('/proc/cpuinfo').exists()
        else platform.processor()
    )
    a = torch.randn(1024, 1024)
    flops = 2*1024**3/min(seconds(lambda: a@a) for _ in range(20))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return dict(
        cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gemm_gflops=round(flops / 1e9), gpu=gpu,
        torch=torch.__version__, python=platform.python_version(), commit=commit
    )
