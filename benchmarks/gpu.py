"""Suite, training step, half precision, faiss and utilisation on a CUDA GPU in under 8 minutes: `python
benchmarks/gpu.py`; writes results/gpu.json."""
import argparse, json, subprocess, sys, threading, time
from contextlib import nullcontext
from pathlib import Path

import torch
import precision
from attacks import images, passes
from common import Item, machine, measure, seconds
from search import embeddings
from training import KINDS

from robust_dml.data import sets
from robust_dml.attacks.suite import SUITE, Gallery, members, run_attack
from robust_dml.defenses.base import Clock
from robust_dml.models.networks import build, channels_last, embed, embed_all, streamlined, train_mode
from robust_dml.neighbors import kmeans, knn
from robust_dml.defenses.train import train
from robust_dml.defenses.colo_tride import make

HERE = Path(__file__).parent


def half(device, on): return torch.autocast(torch.device(device).type, torch.bfloat16) if on else nullcontext()


def suite(device, size, batch, steps, kind, compiled):
    "The ten attacks on one batch, the bound in the same precision."
    model, pool = build('resnet18', dim=512, size=size, channels=3, seed=0).to(device).eval(), images(2*batch, 3, size)
    fast, rows = streamlined(model, compiled=compiled), torch.arange(batch)
    gallery = Gallery(embed_all(streamlined(model), pool, batch_size=batch, device=device), pool.labels.to(device))
    x, queries = pool.batch(rows, device), members(gallery, rows.to(device))

    def ours():
        for attack in SUITE.values():
            run_attack(
                fast, attack, x, queries, gallery, eps=8 / 255, step_size=1 / 255, steps=steps, seed=0, precision=kind
            )

    def bound():
        with half(device, kind == 'bfloat16'), channels_last(model): passes(model, x, steps*len(SUITE))
    return Item(
        'gpu', f'attack suite, {kind}{", compiled" if compiled else ""}',
        f'{batch} x 3 x {size} x {size}, {steps} steps', ours, bound,
        'nine optimisations x steps x (forward + input gradient) of the plain network, channels last, in the same'
        ' precision',
        1.2,
        work=batch * steps * len(SUITE),
    )


def step(device, kind, size, pairs, steps, number):
    "One update of a defence."
    moving, seen, make_defense = KINDS[kind]
    model, pool, defense = (
        build('resnet18', dim=512, size=size, channels=3, seed=0).to(device), images(2 * pairs, 3, size),
        make_defense(steps)
    )
    model.to(memory_format=torch.channels_last)
    x, label = pool.x.to(device), torch.arange(pairs, device=device).repeat_interleave(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0., fused=True)

    def update(make_loss):
        with half(device, number == 'bfloat16'): loss = make_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def ours():
        update(
            lambda: defense.step(
                model, x, label, state=defense.init(), clock=Clock(0, 1), gen=torch.Generator().manual_seed(0)
            ).loss
        )

    def bound():
        copies = lambda count: x[torch.arange(count*pairs, device=device)%len(x)]
        with half(device, number == 'bfloat16'): passes(model, copies(moving), steps)
        train_mode(model)
        update(lambda: embed(model, copies(seen)).sum())
    return Item(
        'gpu', f'{kind} step, {number}', f'{pairs} triplets x 3 x {size} x {size}, {steps} steps', ours, bound,
        'the inner passes, then one forward and backward with weight gradients, channels last, in the same precision',
        1.2, work=moving * pairs * steps
    )


def utilisation(device, size, pairs, steps):
    "GPU utilisation, sampled by nvidia-smi ten times a second, while a training loop runs on cropped images."
    pixels = torch.randint(
        256, (8 * pairs, 3, size + 32, size + 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(len(pixels))//4
    pool = sets.ImageSet(pixels, labels, tuple(map(str, range(len(pixels)//4))), crop=size)
    model, samples, over = build('resnet18', dim=512, size=size, channels=3, seed=0), [], threading.Event()

    def sample():
        while not over.wait(.1):
            shown = subprocess.run(
                ['nvidia-smi', '--query-gpu=utilization.gpu', '--format=csv,noheader,nounits'], capture_output=True,
                text=True
            ).stdout
            samples.append(float(shown.split()[0]))
    options = dict(pairs=pairs, lr=1e-5, precision='bfloat16', device=device, show=False)
    defense = make('hm', eps=8/255, step_size=1/255, steps=steps, margin=.2, ics=.5, pseudo=2.)
    train(model, pool, defense, epochs=1, **options)
    if torch.device(device).type == 'cuda': threading.Thread(target=sample, daemon=True).start()
    done = train(model, pool, defense, epochs=4, seed=1, **options)
    over.set()
    return dict(
        mean_pct=sum(samples) / len(samples) if samples else None, samples=len(samples), seconds=done['seconds'],
        parts=done['parts'], target_pct=90
    )


def neighbours(device, rows, classes):
    "Search and k-means by PyTorch and by faiss on the same device."
    emb = embeddings(rows, classes)[0].to(device)
    return {
        f'{name}, {backend}': seconds(lambda: call(backend))
        for backend in ('torch', 'faiss')
        for name, call in (
            ('kNN, k=10', lambda b: knn(emb, emb, k=10, rows=torch.arange(rows, device=device), backend=b)),
            ('k-means', lambda b: kmeans(emb, k=classes, backend=b))
        )
    }


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--device', default='cuda')
    ask.add_argument('--tiny', action='store_true', help='sizes that only test the script; nothing is written')
    asked = ask.parse_args()
    if asked.device == 'cuda' and not torch.cuda.is_available():
        sys.exit(
            'benchmarks/gpu.py needs a CUDA GPU that torch can use, found none; --device cpu --tiny tests the script'
        )
    began, device = time.perf_counter(), asked.device
    size, batch, steps, rows, classes = (32, 8, 2, 500, 50) if asked.tiny else (224, 112, 8, 60_000, 11_316)
    items = [suite(device, size, batch, steps, 'float32', False), suite(device, size, batch, steps, 'bfloat16', False)]
    if device == 'cuda': items.append(suite(device, size, batch, steps, 'bfloat16', True))
    items += [step(device, kind, size, batch//2, steps, p) for p in ('float32', 'bfloat16') for kind in KINDS]
    found = dict(machine=machine(), items=[])
    for entry in items:
        found['items'].append(measure(entry))
        print(found['items'][-1]['name'], f"{found['items'][-1]['median']:.2f}", flush=True)
    for name, call in dict(
        half_precision=lambda: precision.outcomes(
            device=device, **dict(epochs=1, steps=2, limit=60) if asked.tiny else {}
        ),
        utilisation=lambda: utilisation(device, size, batch // 2, steps),
        search=lambda: neighbours(device, rows, classes),
    ).items():
        found[name] = call()
        print(name, found[name], flush=True)
    found['minutes'] = (time.perf_counter() - began)/60
    if not asked.tiny: (HERE/'results'/'gpu.json').write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()
