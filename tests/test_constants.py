"""Every constant that the papers and their code print, beside what the presets and functions use: a schedule twice too
long or two letters exchanged cannot stand unseen."""
import inspect

import pytest
import torch

from robust_dml.attacks.suite import SUITE, Gallery, es_objective, members, near, suite
from robust_dml.defenses import base, colo_tride
from robust_dml.metrics.scores import constant_before
from robust_dml.neighbors import kmeans
from robust_dml.study.experiments import PAPER_28, PAPER_224, recipe
from robust_dml.triplets.collapse import collapseness
from robust_dml.triplets.mining import distance_weighted, gradual_margin, softhard

# printed table: C2F2 at 28 x 28 pixels, ResNet-18 at 224 x 224
PRINTED = dict(
    model=('c2f2', 'resnet18'), dim=(512, 512), lr=(1e-3, 1e-5), weight_decay=(1e-7, 4e-4),
    epochs=(8, 75), # 16 and 150 of the source, halved: an epoch of pairs shows two images of each draw
    pairs=(128, 56), eval_batch=(128, 112), margin=(.2, .2), channels=(1, 3), size=(28, 256), crop=(0, 224),
    allow_self=(True, True), eval_steps=(32, 32), eval_step_size=(3/255, 3/255), optimizer=('adam', 'adam'),
    schedule=('const', 'const'), precision=('float32', 'float32'), limit=(0, 0), weights=('', 'IMAGENET1K_V1')
)
INNER = dict(eps=(77/255, 8/255), step_size=(3/255, 1/255), steps=(32, 32), colo_steps=(16, 16), warm_epochs=(0, 0))


@pytest.mark.parametrize('name', PRINTED)
def test_the_recipe_of_the_papers(name):
    assert tuple(getattr(r, name) for r in (PAPER_28, PAPER_224)) == PRINTED[name]


@pytest.mark.parametrize('name', INNER)
def test_the_inner_attack_of_the_papers(name):
    (small,), (large,) = PAPER_28.settings, PAPER_224.settings
    assert (getattr(small, name), getattr(large, name)) == INNER[name]


@pytest.mark.parametrize(
    'dataset, lam, ics', [('cub', 10., .5), ('cars', 9.5, .5), ('sop', 2., .05), ('fashion', 10., .5)]
)
def test_what_the_papers_set_by_data_set(dataset, lam, ics):
    r = recipe('paper', dataset)
    assert (r.lam, r.ics) == (lam, ics)


@pytest.mark.parametrize('epoch, expected', [(0, .2), (37, .1135), (74, .0513)])
def test_the_gradual_margin_of_75_epochs(epoch, expected):
    assert gradual_margin(epoch, 75, margin=.2) == pytest.approx(expected, abs=5e-5)


def default(function, name): return inspect.signature(function).parameters[name].default


# function, option, printed value
DEFAULTS = [
    (softhard, 'allow_self', True),     # the fallback of softhard includes the anchor
    (distance_weighted, 'dim', None),   # that of the embedding, 512 in the source
    (kmeans, 'seed', 123), (kmeans, 'niter', 25), (kmeans, 'nredo', 1),
    (suite, 'w', 1), (suite, 'm', 1), (suite, 'gtm_index', 'source'), (suite, 'ltm_exclude_self', False),
    (suite, 'self_exclusion', 'id'),
]


@pytest.mark.parametrize('function, name, value', DEFAULTS, ids=lambda v: getattr(v, '__name__', str(v)))
def test_defaults_that_are_printed(function, name, value): assert default(function, name) == value


def test_the_offset_of_each_coordinate_and_the_ten_numbers():
    assert base.OFFSET == 1e-6
    assert [*SUITE] == ['CA+', 'CA-', 'QA+', 'QA-', 'TMA', 'ES', 'LTM', 'GTM', 'GTT']
    assert sum(len(a.outcomes) for a in SUITE.values()) == 10
    zero = torch.zeros(1, 4)
    class At: emb = zero
    assert es_objective(zero, At, {}, None).item() == pytest.approx(2e-6)


def test_near_is_the_nearest_hundredth():
    emb = torch.nn.functional.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    gallery = Gallery(emb, torch.arange(400) // 2)
    assert near(members(gallery, torch.arange(3)), gallery).shape == (3, 4)


# d_ap, d_an and λ with the weighted means and C, as worked out in the text
D_AP, D_AN = torch.tensor([.30, .60, .90, .20]), torch.tensor([.50, .55, 1.00, .70])


@pytest.mark.parametrize(
    'lam, weighting, expected',
    [(10., 'near', -.302486), (10., 'far', -.094372), (2., 'near', -.250749), (2., 'far', -.118265)]
)
def test_collapseness_of_the_worked_example(lam, weighting, expected):
    assert collapseness(D_AP, D_AN, lam=lam, weighting=weighting).item() == pytest.approx(expected, abs=2e-6)


# switch, the paper, the official code: the table of their differences, row by row
SWITCHES = [
    ('weighting', 'near', 'far'), ('collapse_eval', 'once_clean', 'per_step'), ('adv_distance', 'mean', 'weighted'),
    ('cap_on_collapse', 'assist', 'stop'), ('cap_hinge', False, True), ('anp_main', 'attack', 'assist_only'),
    ('top_term', True, True), ('top_term_on_collapse', False, True), ('top_gain', 'clean', 'per_step'),
    ('top_rank', 'per_step', 'per_step'), ('assist_start_frac', 1/3, 0.), ('disabled_mode', 'clean', 'clean'),
    ('top_loss_in', 'anp', 'both'), ('top_beta', .5, .5), ('top_margin', .04, .04),
    ('step_schedule', 'linear0', 'linear0'),
    ('early_stop', True, True), ('miner', 'semihard', 'semihard'), ('miner_margin', 'gradual', 'gradual'),
    ('phase', 'alternate', 'alternate'), ('orientation', 'colo', 'colo'),
]


@pytest.mark.parametrize('name, paper, official', SWITCHES)
def test_the_two_profiles_of_colo_tride(name, paper, official):
    assert (colo_tride.PAPER[name], colo_tride.OFFICIAL[name]) == (paper, official)


def test_no_switch_of_the_profiles_is_unguarded():
    assert {*colo_tride.PAPER} == {name for name, *_ in SWITCHES} | {'collapse_miner'}


@pytest.mark.parametrize('epoch, expected', [(0, 0.), (15, .2), (74, 74/75)])
def test_the_adversary_grows_from_nothing(epoch, expected):
    assert colo_tride.step_factor(epoch, 75, schedule='linear0') == pytest.approx(expected)


def test_the_constant_values_before_the_attack():
    assert constant_before(53.9) == {
        'CA+': 50., 'CA-': 1., 'QA+': 50., 'QA-': 1., 'ES:R': 53.9, 'LTM': 53.9, 'GTM': 53.9, 'GTT': 100.
    }
