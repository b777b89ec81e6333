"A user's own defenses, attacks, data sets and backbones wherever a name is accepted."
import sys

import pytest

from robust_dml.audit.hardening import chosen_defense
from robust_dml.core import DEFENSES
from robust_dml.defenses.base import Defense, make_defense, method
from robust_dml.defenses.lines import Setting, defense_of, table_lines, table_row, versions
from robust_dml.report.pages import look
from robust_dml.study import experiments, tuning

SOFT = '''
from robust_dml.defenses.base import act
from dataclasses import replace

def soft(*, eps:float, step_size:float, steps:int, margin:float, lam:float=1., kind:str='a'):
    "ACT with a forgotten option."
    return replace(act(eps=eps, step_size=step_size, steps=steps, margin=margin*lam), name='soft')

def demanding(*, eps:float, weight:float): return soft(eps=eps, step_size=eps, steps=1, margin=weight)
def wrong(**options): return 3
half = .5
'''
BUDGET = Setting('A', eps=.1, step_size=.05, steps=4, colo_steps=2)
FIXED = dict(profile='official', margin=.2, lam=7., ics=.5, natural_miner='random')


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "Writes a module of a user into the working directory."
    monkeypatch.chdir(tmp_path)
    def write(text, name='own_lab'): (tmp_path/f'{name}.py').write_text(text)
    write(SOFT)
    yield write
    sys.modules.pop('own_lab', None)


def test_an_own_defense_is_a_line_of_a_table(lab):
    assert table_lines('act,own_lab:soft+lam=2') == ('act', 'own_lab:soft+lam=2')
    row = table_row('own_lab:soft+lam=2')
    assert row == ('own_lab:soft, lam = 2', 'own_lab:soft', dict(lam=2.0))
    assert versions(row, ('official', 'paper')) == [('', row.label)]
    made = defense_of(row, BUDGET, **FIXED)
    assert isinstance(made, Defense) and made.name == 'own_lab:soft' and len(made.code) == 16
    # the table gives what the function requires, not the λ of COLO; what the function forgot is kept
    assert made.options == dict(eps=.1, step_size=.05, steps=4, margin=.4, lam=2.0) | made.options
    given = {k: made.options[k] for k in ('eps', 'step_size', 'steps', 'margin')}
    assert make_defense(made.name, **given).code == made.code
    assert look(dict(defense='own_lab:soft', place=1)) != look(dict(defense='own_lab:soft', place=2))


def test_the_source_of_an_own_defense_goes_into_its_code(lab):
    first = defense_of(table_row('own_lab:soft'), BUDGET, **FIXED)
    lab(SOFT + '\n# another comment')
    assert defense_of(table_row('own_lab:soft'), BUDGET, **FIXED).code != first.code
    assert make_defense('act', eps=.1, step_size=.05, steps=4, margin=.2).code == ''


@pytest.mark.parametrize(
    'entry, kind, message',
    [
        ('own_lab:sofd', ValueError, "own_lab must have sofd, found no such name; did you mean 'soft'"),
        ('nobody_xyz:soft', ValueError, 'expected a module nobody_xyz, found none'),
        ('own_lab:half', TypeError, 'own_lab:half must be a function, found float'),
        ('own_lab:soft+lam=many', TypeError, "lam must be a number, found 'many'"),
        ('own_lab:soft+lamb=2', ValueError, 'own_lab:soft has no switch lamb, found in'),
        ('own_lab:soft+lam', ValueError, 'switches must be written as in'),
        ('own_lab', ValueError, "defense must be one of natural, act, .* found 'own_lab'"),
        ('act:steps=2.5', TypeError, 'steps must be a whole number, found 2.5'),
        ('eat:members=many', TypeError, "members must be a whole number, found 'many'"),
        ('colo_tride:top_term=1', TypeError, 'top_term must be true or false, found 1'),
    ],
)
def test_lines_that_do_not_do(lab, entry, kind, message):
    with pytest.raises(kind, match=message) as error: table_lines(entry)
    assert '\n' not in str(error.value)


def test_an_own_defense_that_asks_for_more_or_returns_something_else(lab):
    with pytest.raises(TypeError, match='own_lab:demanding needs a value for weight, found none; give it as weight='):
        defense_of(table_row('own_lab:demanding'), BUDGET, **FIXED)
    with pytest.raises(TypeError, match='own_lab:wrong must return a Defense, found int'): make_defense('own_lab:wrong')


def test_an_own_defense_hardens(lab):
    made = chosen_defense('own_lab:soft+lam=2', eps=8/255, inner_steps=3)
    assert made.name == 'own_lab:soft' and made.options['steps'] == 3


def test_a_registered_defense_outside_the_package_has_its_source_in_the_address(lab):
    head = 'from robust_dml.defenses.base import registered\n'
    lab(head + SOFT.replace('def soft', "@registered('Soft!')\ndef soft", 1))
    try:
        assert method('own_lab:soft').label == DEFENSES['soft'].label == 'Soft!' and len(DEFENSES['soft'].code) == 16
        lab(head + '@registered("Mine")\ndef act(*, eps:float): ...\n')
        with pytest.raises(ValueError, match="found ValueError: each defense must have a name of its own, found 'act'"):
            method('own_lab:act')
    finally: DEFENSES._records.pop('soft', None)


def test_every_record_makes_its_defense():
    "Variants as well; the record says all options, and no two look alike."
    usual = dict(eps=.2, step_size=.05, steps=4, margin=.2, lam=2., ics=.5)
    for name, of in DEFENSES.items():
        made = make_defense(name, **{k: usual[k] for k in of.required if k not in of.fixed})
        assert made.name == of.name and set(made.options) <= set(of.options)
        assert of.label and (of.source or name == 'natural')
        assert all(made.options[k] == v for k, v in of.fixed.items() if k != 'profile')
    # one version of COLO-TRIDE has two names, and one look
    looks = [look for n, of in DEFENSES.items() for p, look in of.looks.items() if (n, p) != ('colo_steps', 'paper')]
    assert len(set(looks)) == len(looks) > 30


def test_an_own_defense_is_tuned_with_the_same_budget(lab):
    parameters = dict(preset='smoke', dataset='glyphs', backend='torch', out='out')
    plan = experiments.plan('table1', experiments.parameters(parameters))
    found = tuning.candidates('own_lab:soft', 4, plan=plan, seed=0)
    drawn = {key for candidate in found for key in candidate}
    assert found[0] == {} and len(found) == 4 and drawn <= {'eps', 'step_size', 'steps', 'margin'}
    cell = tuning.cell_of('own_lab:soft', found[1], plan, 0)
    assert cell.defense.startswith('own_lab:soft+') and experiments.defense(cell, plan.recipe).name == 'own_lab:soft'
    assert tuning.longest('own_lab:soft', plan.recipe.settings[0]) == tuning.longest('hm', plan.recipe.settings[0])
    with pytest.raises(ValueError, match="defenses must be one of 'act', 'hm'"): tuning.moved_images('est')
    with pytest.raises(ValueError, match="own_lab must have sofd"): tuning.moved_images('own_lab:sofd')
