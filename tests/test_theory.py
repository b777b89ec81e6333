"""Appendix A: the reference table, exact geometry against formulas and against searches that know nothing of them."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from robust_dml.papers.colo_tride import theory
from robust_dml.core import generator
from robust_dml.triplets.distances import normalise

TABLE = [  # degrees, shifts of ANP, CAP, SIP over h, exact R
    (180, 0.5, 0.5, 0.25, 2.0),
    (150, 0.5176, 0.5, 0.2543, 2.0006),
    (120, 0.5774, 0.5, 0.2679, 2.0104),
    (90, 0.7071, 0.5, 0.2929, 2.0607),
    (60, 1.0, 0.5, 0.3333, 2.25),
    (30, 1.9319, 0.5, 0.3972, 3.0613),
    (10, 5.7369, 0.5, 0.4599, 6.7804),
]


def triplets(space, count=40, dim=64, seed=0):
    gen = generator(seed, 'triplets', space)
    points = [torch.randn(count, dim, generator=gen).double() for _ in range(3)]
    return theory.Points(*(map(normalise, points) if space == 'sphere' else points))


@pytest.mark.parametrize('row, reference', list(zip(theory.angle_table(), TABLE)), ids=[f'{row[0]}' for row in TABLE])
def test_reference_table(row, reference):
    exact = [row[k] for k in ('theta', 'anp', 'cap', 'sip', 'R exact')]
    assert exact == pytest.approx(reference, abs=2e-4)    # four printed digits, and a next order of about h = 1e-4
    assert row['R formula'] == pytest.approx(reference[-1], abs=6e-5)


def test_special_angle():
    assert [
        float(f) for f in (theory.anp_shift(1.0, math.pi), theory.cap_shift(1.0), theory.sip_shift(1.0, math.pi))
    ] == pytest.approx([0.5, 0.5, 0.25])


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_ratio_is_never_below_two(k_anp, k_cap):
    assert 0 < theory.evenness(k_anp, k_cap) <= 1 + 1e-12 and theory.shift_ratio(k_anp, k_cap) >= 2 - 1e-12
    assert theory.shift_ratio(k_anp, k_anp) == pytest.approx(2)
    shifts = theory.Schemes(1/k_anp, 1/k_cap, 1/theory.sip_gain(k_anp, k_cap))
    assert theory.ratio_of(shifts) == pytest.approx(theory.shift_ratio(k_anp, k_cap))


@pytest.mark.parametrize('space', ('plane', 'sphere'))
def test_small_exact_shifts_are_the_predicted_ones(space):
    t = triplets(space)
    for scheme, k in theory.gains(t, space=space)._asdict().items():
        s = theory.exact_shift(t, scheme, 1e-5, space=space, furthest=1e-3)
        assert torch.allclose(s*k, torch.full_like(s, 1e-5), rtol=1e-4)
        assert torch.allclose(theory.exact_gain(t, scheme, s, space=space), torch.full_like(s, 1e-5), rtol=1e-8)


@pytest.mark.parametrize('space', ('plane', 'sphere'))
@pytest.mark.parametrize('scheme', theory.MOVED)
def test_no_random_direction_gains_more(space, scheme):
    "The best direction is the best of many: moves of equal length, drawn at random."
    t, s = triplets(space, count=5, dim=3), 1e-4
    best = theory.exact_gain(t, scheme, s, space=space)
    gen = generator(0, 'directions')
    for _ in range(300):
        moved = {}
        for name, x in zip('apn', t):
            way = torch.randn(x.shape, generator=gen).double()
            if space == 'sphere': way = way - (way*x).sum(1, keepdim=True)*x
            way = normalise(way)
            moved[name] = (
                (x + s * way if space == 'plane' else x * math.cos(s) + way * math.sin(s))
                if name in theory.MOVED[scheme]
                else x
            )
        gain = theory.triplet_hardness(theory.Points(**moved)) - theory.triplet_hardness(t)
        assert (gain <= best + 1e-7).all()                # second order: s**2


def test_moves_have_their_length_and_leave_the_rest():
    t = triplets('sphere')
    for scheme, names in theory.MOVED.items():
        moved = theory.move(t, scheme, .3, space='sphere')
        for name, x, y in zip('apn', t, moved):
            assert torch.allclose(y.norm(dim=1), torch.ones(len(y), dtype=torch.double))
            arc = torch.acos((x*y).sum(1).clamp(-1, 1))
            assert torch.allclose(arc, torch.full_like(arc, .3 if name in names else 0.), atol=1e-7)


@pytest.mark.parametrize('space', ('plane', 'sphere'))
def test_invariance_to_rotation(space):
    t = triplets(space, dim=8)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator(0, 'turn')).double())[0]
    turned = theory.Points(*(x @ turn for x in t))
    for k, again in zip(theory.gains(t, space=space), theory.gains(turned, space=space)):
        assert torch.allclose(k, again, atol=1e-12)
    assert torch.allclose(theory.angle(t, space=space), theory.angle(turned, space=space), atol=1e-10)


def test_fixed_target_and_fixed_budget_differ():
    check = theory.check_triplets(triplets('sphere'), h=.05, shift=.05)
    s, g = check.exact_shift, check.exact_gain
    assert (s.sip < torch.minimum(s.anp, s.cap)).all() and (g.sip > torch.maximum(g.anp, g.cap)).all()
    assert torch.allclose(theory.ratio_of(check.exact_shift), theory.ratio_of(check.predicted_shift), rtol=.02)


def test_out_of_reach_is_nan():
    t = theory.planar([1., 3.])                           # p and n are 0.96 and 1.99 apart: the anchor cannot gain more
    assert theory.exact_shift(t, 'anp', 1.2, space='plane', furthest=50.).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    'change, error, words',
    [
        (lambda t: t._replace(p=t.a), ValueError, 'different points'),
        (lambda t: t._replace(n=2 * t.n), ValueError, 'unit length'),
        (lambda t: theory.Points(*(x.float() for x in t)), TypeError, 'double'),
        (lambda t: t._replace(a=t.a[:3]), ValueError, 'match'),
        (lambda t: t._replace(a=t.a * math.nan), ValueError, 'NaN')
    ],
)
def test_bad_triplets_are_refused(change, error, words):
    with pytest.raises(error, match=words): theory.gains(change(triplets('sphere')), space='sphere')


def test_figures_are_drawn_to_scale():
    "The arrow of a panel is as long as the exact shift."
    figure = pytest.importorskip('matplotlib.figure').Figure()
    ax = figure.subplots()
    theory.draw_scheme(ax, math.pi, 'anp', h=.6)
    arrow = next(a for a in ax.texts if getattr(a, 'arrow_patch', None) is not None)
    assert math.dist(arrow.xy, arrow.xyann) == pytest.approx(.3)
