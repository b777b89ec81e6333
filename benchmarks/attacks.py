"The ten attacks (nine optimisations) on a gallery of 2,000 images against the passes that the algorithm needs."
from dataclasses import dataclass

import torch
from common import Item
from robust_dml.attacks.suite import SUITE, Gallery, members, run_attack
from robust_dml.models.networks import build, embed, embed_all, frozen, streamlined


@dataclass(frozen=True)
class Images:
    "Random images of 100 classes: a pattern per class and noise per image."
    x:torch.Tensor
    labels:torch.Tensor

    def __len__(self): return len(self.x)
    def batch(self, rows, device='cpu', dtype=torch.float32): return self.x[rows].to(device, dtype)


def images(count, channels, size):
    gen, labels = torch.Generator().manual_seed(0), torch.arange(count)%100
    pattern = torch.rand(100, channels, size, size, generator=gen)
    return Images(.7*pattern[labels] + .3*torch.rand(count, channels, size, size, generator=gen), labels)


def passes(model, x, steps):
    "Forward and input gradient with frozen weights, again and again: what every attack must do."
    with frozen(model):
        for _ in range(steps):
            z = x.detach().requires_grad_()
            torch.autograd.grad(embed(model, z).sum(), z)


BOUND = (
    'nine optimisations x steps x (forward + input gradient) of the plain network with frozen weights on the same'
    ' images'
)
# network, channels, size, batch, target
SIZES = (('c2f2', 1, 28, 128, 1.35), ('resnet18', 3, 64, 64, 1.15), ('resnet18', 3, 224, 32, None))


def item(name, channels, size, batch, target, *, queries, steps, gallery_size=2000, pairs=5, device='cpu'):
    model, data = build(name, dim=512, size=size, channels=channels, seed=0).to(device).eval(), images(
        gallery_size, channels, size
    )
    gallery = Gallery(embed_all(streamlined(model), data, batch_size=batch, device=device), data.labels.to(device))
    blocks = torch.arange(queries).split(batch)

    def ours():
        fast = streamlined(model)
        # the queries' share of the gallery
        embed_all(fast, Images(data.x[:queries], data.labels[:queries]), batch_size=batch, device=device)
        for attack in SUITE.values():
            for rows in blocks:
                run_attack(
                    fast, attack, data.batch(rows, device), members(gallery, rows.to(device)), gallery, eps=8 / 255,
                    step_size=1 / 255, steps=steps, seed=0
                )

    def bound():
        for rows in blocks: passes(model, data.batch(rows, device), steps*len(SUITE))
    return Item(
        'attacks', f'attack suite, {name}',
        f'{queries:,} of {gallery_size:,} x {channels} x {size} x {size}, {steps} steps', ours, bound, BOUND, target,
        work=queries * steps * len(SUITE), pairs=pairs
    )


def items(*, full:bool):
    for name,channels,size,batch,target in SIZES:
        if size < 224:
            yield item(
                name, channels, size, batch, target, queries=256 if name == 'c2f2' else batch, steps=8 if full else 4
            )
        elif full: yield item(name, channels, size, batch, target, queries=batch, steps=4, gallery_size=256, pairs=3)
