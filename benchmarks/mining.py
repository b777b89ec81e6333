"The miners at the batch size of the papers: 56 pairs."
import torch
from common import Item
from robust_dml.triplets.distances import normalise
from robust_dml.triplets.mining import MINERS, gradual_margin


def items(*, full:bool):
    gen = torch.Generator().manual_seed(0)
    emb, label = normalise(torch.randn(112, 512, generator=gen)), torch.randint(
        0, 40, (56,), generator=gen
    ).repeat_interleave(2)
    calls = {name: (lambda mine=mine: mine(emb, label, gen=gen, margin=.2)) for name,mine in MINERS.items()}
    calls['gradual semihard'] = lambda: MINERS['semihard'](emb, label, gen=gen, margin=gradual_margin(3, 10, margin=.2))
    for name,call in calls.items():
        yield Item('mining', f'miner {name}', '112 x 512', ours=call, bound=None, bound_is='', target=2., pairs=200)
