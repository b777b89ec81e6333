"The attack loop against foolbox: the same objective, ball and steps give the same images."
import pytest
import torch
from torch import nn

from robust_dml.models.networks import embed
from robust_dml.attacks.loop import pgd
from robust_dml.attacks.strong import BALLS, Ascent

foolbox, eagerpy = (
    pytest.importorskip(name, reason=f'{name} is among the development requirements') for name in ('foolbox', 'eagerpy')
)


def network():
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 6))
        .double()
        .eval()
    )


def images(): return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def farther(model, x):
    "Squared distance of an embedding to the clean one of the next image, whose gradient does not vanish at the start."
    goal = embed(model, x).detach().roll(1, 0)
    return lambda emb: (emb - goal).square().sum(1)


def loss_of(model, objective):
    return lambda inputs: eagerpy.astensor(objective(nn.functional.normalize(model(inputs).raw)).sum())


def run(attack, model, x, *, eps, step_size, steps):
    "What foolbox finds."
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    return attack(abs_stepsize=step_size, steps=steps, random_start=False).run(
        theirs, x, foolbox.criteria.Misclassification(torch.zeros(len(x), dtype=torch.long)), epsilon=eps
    )


@pytest.mark.parametrize('eps, step_size, steps', [(8/255, 8/255, 1), (8/255, 3/255, 5), (.1, .03, 12), (.5, .2, 4)])
def test_sign_steps_in_the_cube(eps, step_size, steps):
    model, x = network(), images()
    objective = farther(model, x)

    class Attack(foolbox.attacks.LinfProjectedGradientDescentAttack):
        def get_loss_fn(self, model, labels): return loss_of(model, objective)

    theirs = run(Attack, model, x, eps=eps, step_size=step_size, steps=steps)
    ours = pgd(model, objective, x, eps=eps, step_size=step_size, steps=steps)
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-6)
    assert (ours.images - x).abs().max() == pytest.approx(eps)


def test_gradient_steps_in_the_euclidean_ball():
    model, x = network(), .3 + .4*images()   # far enough from 0 and 1 that only the ball counts
    objective = farther(model, x)

    class Attack(foolbox.attacks.L2ProjectedGradientDescentAttack):
        def get_loss_fn(self, model, labels): return loss_of(model, objective)

    theirs = run(Attack, model, x, eps=.25, step_size=.06, steps=8)
    ours = pgd(
        model, objective, x, eps=1.0, step_size=1.0, steps=8,
        move=Ascent(x, ball=BALLS['l2'], eps=0.25, step_size=0.06, steps=8)
    )
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close((ours.images - x).flatten(1).norm(dim=1), torch.full((5,), .25, dtype=torch.float64))
