"""Run the benchmarks: `python benchmarks/run.py [--full] [--only GROUP] [--threads N]`; writes results/*.json and
README.md."""
import argparse, json, sys, time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import attacks, memory, mining, precision, search, training
from common import machine, measure

GROUPS = dict(attacks=attacks, training=training, search=search, mining=mining, memory=memory)


def row(r:dict)->str:
    "A line of the table."
    digits = (lambda v: f'{v:.2f}') if r['unit'] == 'ratio' else (lambda v: f'{v:.2f} ms')
    target = '' if r['target'] is None else f"≤ {digits(r['target'])}"
    met = {None: '', True: 'met', False: 'missed'}[r['met']]
    pace = f"{r['image_steps_per_s']:,.0f}" if r['image_steps_per_s'] else ''
    memory = f"{r['extra_mib']:.0f} MiB" if 'extra_mib' in r else ''
    return (
        f"| {r['name']} | {r['size']} | {digits(r['median'])} | {digits(r['low'])} to {digits(r['high'])} | {target} |"
        f" {met} | {pace} | {memory} |"
    )


def table(found:dict)->str:
    "The results of one file as Markdown."
    m = found['machine']
    head = (
        f"{m['cpu']}, {m['threads']} threads, matrix product at {m['gemm_gflops']} GFLOP/s"
        + (f", {m['gpu']}" if m['gpu'] else '')
        + f"; torch {m['torch']}, {sum(found['minutes'].values()):.0f} minutes for all groups."
    )
    lines = [
        '| item | size | median | range of the pairs | target | | images x steps/s | extra memory |',
        '|---|---|--:|--:|--:|---|--:|--:|', *map(row, found['items'])
    ]
    bounds = dict.fromkeys(f"* {r['name']}: {r['bound_is']}." for r in found['items'] if r['bound_is'])
    notes = [f"* {r['name']}, {r['size']}: {r['note'].format(**r)}" for r in found['items'] if r['note']]
    half = (
        [
            '',
            (
                'Half precision in the search, outcome by outcome (positive is not always stronger: see the arrows of'
                ' the tables):'
            ),
            '',
            precision.table(found['half_precision']),
        ]
        if 'half_precision' in found
        else []
    )
    return '\n'.join(
        [head, '', *lines, '', 'The bounds:', '', *bounds, *(['', 'Notes:', '', *notes] if notes else []), *half, '']
    )


def page()->str:
    "README.md of the benchmarks from the committed result files."
    parts = [(HERE/'head.md').read_text()]
    for name,title in (('quick', 'make bench'), ('full', 'make bench-full')):
        if (path := HERE/'results'/f'{name}.json').exists():
            parts += [f'\n## `{title}`\n\n', table(json.loads(path.read_text()))]
    return ''.join(parts)


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--full', action='store_true', help='the sizes of the papers; within an hour for each group')
    ask.add_argument(
        '--only', choices=(*GROUPS, 'precision'), help='one group; its items replace those of the stored file'
    )
    ask.add_argument('--item', default='', help='only items whose name and size contain this text')
    ask.add_argument('--threads', type=int, help='threads of torch (default: its own choice)')
    asked = ask.parse_args()
    if asked.threads: torch.set_num_threads(asked.threads)
    path = HERE/'results'/f"{'full' if asked.full else 'quick'}.json"
    old = json.loads(path.read_text()) if asked.only and path.exists() else {}
    if asked.item and not asked.only: ask.error('--item needs --only')
    kept = [
        r
        for r in old.get('items', ())
        if r['group'] != asked.only or asked.item and asked.item not in r['name'] + r['size']
    ]
    half = {k: v for k,v in old.items() if k == 'half_precision'}
    minutes = old['minutes'] if isinstance(old.get('minutes'), dict) else {}
    found, order, here = [], list(GROUPS), machine()
    path.parent.mkdir(exist_ok=True)
    def write():
        items = sorted(kept + found, key=lambda r: order.index(r['group']))
        path.write_text(json.dumps(dict(machine=here, items=items, **half, minutes=minutes), indent=1) + '\n')
        (HERE/'README.md').write_text(page())
    for group,module in GROUPS.items():
        if asked.only in (None, group):
            began = time.perf_counter()
            for item in module.items(full=asked.full):
                if asked.item not in item.name + item.size: continue
                found.append(measure(item))
                print(row(found[-1]), flush=True)
                if not asked.item: minutes[group] = (time.perf_counter() - began)/60
                write() # a killed run keeps what it measured
    if asked.only == 'precision' or asked.full and not asked.only:
        half['half_precision'] = precision.outcomes()
        write()


if __name__ == '__main__': main()
