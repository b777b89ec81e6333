"What `core.kept_memory` saves: the same passes in a process that keeps what it frees and in one that gives it back."
import subprocess, sys

from common import Item, Seconds

SIZES = (('small', 1, 28, 512, 30), ('resnet18', 3, 64, 64, 6)) # network, channels, size, batch, passes

CODE = '''
import sys, time, torch
from contextlib import nullcontext
from robust_dml.core import kept_memory
from robust_dml.models.networks import build, frozen
name, channels, size, batch, count, threads, keep = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model, x = build(name, dim=128, size=size, channels=channels, seed=0).eval(), torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
def passes():
    for _ in range(count):
        z = x.detach().requires_grad_()
        torch.autograd.grad(model(z).sum(), z)
with frozen(model), kept_memory() if keep else nullcontext():
    passes()
    began = time.perf_counter()
    passes()
    print(time.perf_counter() - began)
'''


def child(*args)->Seconds:
    return Seconds(
        subprocess.run([sys.executable, '-c', CODE, *map(str, args)], capture_output=True, text=True, check=True).stdout
    )


def item(name, channels, size, batch, count):
    import torch
    args = name, channels, size, batch, count, torch.get_num_threads()
    return Item(
        'memory', f'freed memory kept, {name}', f'{batch} x {channels} x {size} x {size}', ours=lambda: child(*args, 1),
        bound=lambda: child(*args, 0),
        bound_is=(
            'the same passes in a process that gives freed memory back at once, as C programs do unless told otherwise'
        ),
        target=None,
        work=batch * count,
    )


def items(*, full:bool):
    for size in SIZES: yield item(*size)
