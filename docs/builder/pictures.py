"""Small pictures of attacks and defences: the library itself on a circle and on twelve glyphs."""
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor, nn

from robust_dml.attacks import blackbox
from robust_dml.data import sets
from robust_dml.defenses import eat, train
from robust_dml.models import networks
from robust_dml.attacks.suite import SUITE, Attack, Gallery, Queries, members
from robust_dml.core import DEFENSES, generator
from robust_dml.defenses.base import Clock, make_defense
from robust_dml.triplets.distances import normalise
from robust_dml.models.networks import embed
from robust_dml.report.tables import png, theme

COLOURS, SHAPES = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#7a7a7a'), 'os^Dvp'
ATTACK = '#d55e00'
EPS = 48/255
DEGREES = (0, 18, 40, 75, 100, 120, 150, 190, 215, 250, 285, 320) # places on the circle; the query is the first
LABELS = (0, 0, 1, 0, 1, 1, 2, 2, 0, 2, 1, 2)


def _on_circle(degrees)->Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.double))
    return torch.stack([angle.cos(), angle.sin()], 1)


def _figure(width:float, height:float, columns:int=1)->tuple[Figure, list[Axes]]:
    fig = Figure(figsize=(width, height), layout='constrained')
    axes = fig.subplots(1, columns, squeeze=False)[0]
    for ax in axes: ax.set_axis_off()
    return fig, list(axes)


def way(
    attack:Attack,
    queries:Queries,  # one query on the circle
    gallery:Gallery,  # on the circle
    *,
    reach:float=75.,  # degrees that the query may travel
    steps:int=50,
)->tuple[Tensor, dict]: # (steps + 1, 2) places of the query, targets of the attack
    "The query follows the attack's own objective along the circle."
    targets, places = attack.targets(queries, gallery, 0), [queries.emb]
    length = reach/steps
    for _ in range(steps):
        q = places[-1].detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            attack.objective(normalise(q), queries, targets, gallery).sum(), q, allow_unused=True
        )
        tangent = torch.stack([-q[:,1], q[:,0]], 1).detach()
        along = 0. if slope is None else float((slope*tangent).sum())
        if abs(along) < 1e-9: break
        turn = torch.deg2rad(torch.tensor(length if along > 0 else -length, dtype=q.dtype))
        places.append(turn.cos()*q.detach() + turn.sin()*tangent)
    return torch.cat(places), targets


def _chosen(targets:dict, gallery:Gallery)->list[int]:
    "Rows of the gallery that an attack aims at, where it aims at single ones."
    if 'row' in targets and targets['row'].numel() == 1: return targets['row'].flatten().tolist()
    if set(targets) == {'emb'}: return [int((gallery.emb - targets['emb'].reshape(1, -1)).norm(dim=1).argmin())]
    return []


def attack_picture(
    attack:Attack,
)->bytes: # PNG
    "Where an attack takes a query, on a circle of twelve images."
    gallery = Gallery(_on_circle(DEGREES), torch.tensor(LABELS))
    places, targets = way(attack, members(gallery, torch.tensor([0])), gallery)
    with theme():
        fig, (ax,) = _figure(2.6, 2.6)
        ax.set(xlim=(-1.32, 1.32), ylim=(-1.32, 1.32), aspect='equal')
        turn = torch.linspace(0, 2*torch.pi, 200)
        ax.plot(turn.cos(), turn.sin(), color='#dddddd', lw=1, zorder=0)
        for label in range(3):
            own = [i for i, y in enumerate(LABELS) if y == label]
            ax.plot(*gallery.emb[own].T, SHAPES[label], color=COLOURS[label], ms=6, zorder=2)
        for centre in targets.get('centre', ()): ax.plot(*centre, 'x', color='#333333', ms=7, mew=1.6)
        for row in _chosen(targets, gallery): ax.plot(*gallery.emb[row], 'o', mfc='none', mec='#333333', ms=13, mew=1.4)
        ax.plot(*(1.14*places).T, color=ATTACK, lw=1.6, zorder=3)
        if len(places) > 2:
            ax.add_patch(
                FancyArrowPatch(
                    *(1.14 * places[[-6, -1]]).tolist(), arrowstyle='-|>', mutation_scale=12, color=ATTACK, shrinkA=0,
                    shrinkB=0
                )
            )
        ax.plot(*(1.14 * places[0]), '*', color='#333333', ms=9), ax.plot(
            *(places[-1]), '*', color=ATTACK, ms=12, zorder=4
        )
    return png(fig, dpi=110)


@lru_cache(maxsize=None)
def _glyphs()->sets.Split: return sets.glyphs(train_classes=6, test_classes=6, per_class=8)


@lru_cache(maxsize=None)
def _learned(seed:int, epochs:int=20)->nn.Module:
    "A small network after a little training without attack, so that classes have a place."
    model = networks.build('small', dim=16, size=28, channels=1, seed=seed)
    train.train(
        model, _glyphs().train, make_defense('natural', margin=0.2), epochs=epochs, pairs=12, lr=1e-3, show=False
    )
    return model


def _network(defense)->nn.Module:
    "What a defence trains: a network, or an ensemble of them with proxies."
    if not isinstance(defense, eat.ProxyDefense): return _learned(0)
    proxies = [
        nn.Parameter(torch.randn(6, 16, generator=generator(m, 'proxies'))) for m in range(defense.shared.members)
    ]
    return eat.Ensemble([deepcopy(_learned(m)) for m in range(defense.shared.members)], proxies)


def seen_in_update(
    defense,           # any defence
    model:nn.Module,   # not changed
    x:Tensor,          # (12, 1, 28, 28)
    label:Tensor,      # (12,)
    steps:int=1,       # batches; 2 shows both phases of methods that alternate
)->list[Tensor]:       # images of each update
    "Images from which a defence learns, read at the network's door."
    model, found, state = deepcopy(model), [], defense.init()
    net = model.members[0] if isinstance(model, eat.Ensemble) else model
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) if torch.is_grad_enabled() else None)
    for i in range(steps):
        seen.clear()
        state = defense.step(
            model, x, label, state=state, clock=Clock(15, 20, 300 + i), gen=generator(0, 'picture', i)
        ).state
        # the search asks for gradients of the images, the update does not, except in free training
        learned = [s for s in seen if not s.requires_grad] or seen[-1:]
        found.append(torch.cat(learned).detach())
    return found


def _arrows(ax, spots, before, images, x, colour)->None:
    "From the clean place of an image to that of its perturbed copy; copies farther than ε are mixed images."
    apart = (images[:,None] - x[None]).abs().flatten(2).amax(2)
    far, row = apart.min(1)
    for place, d, i in zip(spots(images), far.tolist(), row.tolist()):
        if d > EPS + 1e-4: ax.plot(*place, 'P', color=colour, ms=5, zorder=3)
        elif d > 1e-4:
            ax.annotate(
                '', place.tolist(), before[i].tolist(),
                arrowprops=dict(arrowstyle='-|>', color=colour, lw=1.3, shrinkA=3, shrinkB=0, mutation_scale=9),
                zorder=3
            )


def defense_picture(
    name:str, # of a defense
)->bytes:     # PNG
    "Where a defence takes the images of one batch before it learns from them."
    options = dict(eps=EPS, step_size=EPS/4, steps=8, lam=10., ics=.5, profile='official', top=.5)
    if not eat.has_proxies(name): options |= dict(margin=1. if name == 'topweighted' else .2)
    if name == 'library_loss': options |= dict(loss='ContrastiveLoss')
    asked = {k: v for k, v in options.items() if k in DEFENSES[name].options and (k, name) != ('lam', 'pal_alp')}
    defense = make_defense(name, **asked)
    model, rows = _network(defense), torch.arange(12)//2*8 + torch.arange(12)%2
    x, label = _glyphs().train.batch(rows), _glyphs().train.labels[rows]
    batches = seen_in_update(defense, model, x, label, steps=dict(colo_tride=2, naive_tride=2, free=4).get(name, 1))
    net = model.members[0] if isinstance(model, eat.Ensemble) else model
    with torch.no_grad(): clean = embed(net, x)
    axes = torch.linalg.svd(clean - clean.mean(0), full_matrices=False).Vh[:2].T
    def spots(images):
        with torch.no_grad(): return (embed(net, images) - clean.mean(0))@axes if len(images) else torch.zeros(0, 2)
    with theme():
        fig, (ax,) = _figure(2.8, 2.6)
        before = spots(x)
        for y in range(6): ax.plot(*before[label == y].T, SHAPES[y], color=COLOURS[y], ms=6, ls='-', lw=.8, zorder=2)
        for images, colour in zip(batches[-1:] if name == 'free' else batches, (ATTACK, '#444444')):
            _arrows(ax, spots, before, images, x, colour)
        ax.margins(.12)
    return png(fig, dpi=110)


def black_boxes()->dict[str, Callable]: # name -> (model, x, queries, gallery) -> attacked images
    "Attacks without gradients, with small budgets."
    es = SUITE['ES']
    def asked(method, **options):
        return lambda m, x, q, g: method(m, es, x, q, g, eps=EPS, seed=0, **options).outcome.images
    return dict(
        nes=asked(blackbox.nes, step_size=EPS / 4, samples=20, sigma=0.01, budget=400),
        random_noise=asked(blackbox.random_noise, kind='corner', budget=100), square=asked(blackbox.square, budget=300),
        topk=asked(blackbox.topk, k=10, budget=300)
    )


def black_box_picture(
    name:str, # key of `black_boxes`
)->bytes:     # PNG
    "An image before and after an attack without gradients, and the difference."
    model, split = _learned(0), _glyphs()
    x = split.test.batch(torch.arange(len(split.test)))
    with torch.no_grad(): gallery = Gallery(embed(model, x), split.test.labels)
    rows = torch.tensor([9])
    attacked = black_boxes()[name](model, x[rows], members(gallery, rows), gallery)
    with theme():
        fig, axes = _figure(3.3, 1.25, 3)
        for ax, image, title, low in zip(
            axes, (x[rows], attacked, attacked - x[rows]), ('clean', 'attacked', 'difference'), (0, 0, -EPS)
        ):
            ax.imshow(
                image[0, 0].numpy(), cmap='gray' if low == 0 else 'coolwarm', vmin=low, vmax=1 if low == 0 else EPS
            )
            ax.set_title(title, fontsize=8, weight='normal', loc='center')
    return png(fig, dpi=110)
