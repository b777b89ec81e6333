"What half precision in the search does to each attack: outcomes on models that are trained here."
import time

from robust_dml.data import sets
from robust_dml.metrics.evaluate import evaluate
from robust_dml.models.networks import build
from robust_dml.defenses.train import train
from robust_dml.defenses.colo_tride import make

UNITS = {'TMA': 100, 'ES:D': 50} # both as percent of their range, like the other outcomes


def outcomes(*, device='cpu', epochs=10, steps=32, limit=0)->dict:
    """Outcome of each attack by a search in float32 and in bfloat16, for a natural and an ACT model on glyphs, with
    the seconds of both."""
    split, found = sets.glyphs(), {}
    budget = dict(eps=32/255, step_size=16/255, steps=4, margin=.2)
    for name,defense in {'natural': make('natural', margin=.2, miner='semihard'), 'ACT': make('act', **budget)}.items():
        model = build('small', dim=128, size=28, channels=1, seed=0)
        train(model, split.train, defense, epochs=epochs, pairs=56, lr=1e-3, device=device, show=False)
        runs = {}
        for precision in ('float32', 'bfloat16'):
            began = time.perf_counter()
            result = evaluate(
                model, split.test, eps=32 / 255, step_size=3 / 255, steps=steps, batch_size=512, limit=limit,
                precision=precision, device=device, show=False
            )
            runs[precision] = dict(result.after, seconds=time.perf_counter() - began)
        found[name] = runs
    return found


def table(found:dict)->str:
    """Difference in points (TMA and ES:D in percent of their range) as Markdown; a minus means that half precision did
    not move it as far up."""
    names = [n for n in next(iter(found.values()))['float32'] if n != 'seconds']
    lines = ['| bfloat16 minus float32, points | ' + ' | '.join(names) + ' |', '|---' + '|--:'*len(names) + '|']
    for model,runs in found.items():
        gaps = [UNITS.get(n, 1)*(runs['bfloat16'][n] - runs['float32'][n]) for n in names]
        lines.append(f'| {model} | ' + ' | '.join(f'{round(g, 2) + 0.:+.2f}' for g in gaps) + ' |')
    return '\n'.join(lines) + '\n'
