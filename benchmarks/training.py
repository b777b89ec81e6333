"One training step of each defence against its inner passes plus one forward and backward for the update."
import torch
from attacks import images, passes
from common import Item, seconds
from robust_dml.defenses.base import Clock, act, hm
from robust_dml.models.networks import build, embed, streamlined, train_mode
from robust_dml.defenses.colo_tride import make

EPS = dict(eps=8/255, step_size=1/255, margin=.2)
KINDS = { # images that move and images that the update sees, in units of the number of triplets
    'ACT': (2, 3, lambda steps: act(steps=steps, **EPS)),
    'HM': (3, 5, lambda steps: hm(steps=steps, ics=.5, pseudo=2., **EPS)), # a destination out of reach: no early stop
    'CAP': (2, 3, lambda steps: make('naive_cap', profile='paper', steps=steps, lam=10., step_schedule='const', **EPS)),
    'ANP': (1, 3, lambda steps: make('naive_anp', profile='paper', steps=steps, lam=10., step_schedule='const', **EPS))}
# network, channels, size, images of a batch (two per triplet)
SIZES = (('c2f2', 1, 28, 128), ('resnet18', 3, 64, 64), ('resnet18', 3, 224, 32))


def item(kind, name, channels, size, batch, *, steps, pairs=5, device='cpu'):
    moving, seen, make_defense = KINDS[kind]
    model, data = build(name, dim=512, size=size, channels=channels, seed=0).to(device), images(batch, channels, size)
    half, defense = batch//2, make_defense(steps)
    label, x = torch.arange(half, device=device).repeat_interleave(2), data.x.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.) # weights stay where they are: every round does the same work

    def update(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def ours():
        step = defense.step(
            model, x, label, state=defense.init(), clock=Clock(0, 1), gen=torch.Generator().manual_seed(0)
        )
        assert step.log['steps_done'] == steps, step.log # no speed-up by doing less
        update(step.loss)

    def bound():
        copies = lambda count: x[torch.arange(count*half, device=device)%batch]
        passes(model, copies(moving), steps)
        train_mode(model)
        update(embed(model, copies(seen)).sum())
    def clean():
        with torch.no_grad(): embed(streamlined(model), x)
    extra = lambda: dict(clean_pct=100*min(seconds(clean) for _ in range(5))/min(seconds(bound) for _ in range(3)))
    note = (
        'mining embeds the clean batch once, which the bound leaves out: {clean_pct:.0f} % of it here, less with more'
        ' inner steps.'
    )
    return Item(
        'training', f'{kind} step, {name}', f'{half} triplets x {channels} x {size} x {size}, {steps} steps', ours,
        bound,
        f'{steps} x (forward + input gradient) of {moving} images a triplet, then one forward and backward with weight'
        f' gradients of {seen}',
        1.15,
        work=moving * half * steps,
        pairs=pairs,
        **(dict(note=note, extra=extra) if kind == 'ANP' else {}),
    )


def items(*, full:bool):
    for name,channels,size,batch in SIZES:
        for kind in KINDS:
            steps = {'ACT': 32, 'HM': 32}.get(kind, 16) if full else 4
            if size < 224: yield item(kind, name, channels, size, batch, steps=steps)
            elif full: yield item(kind, name, channels, size, batch, steps=4, pairs=3)
