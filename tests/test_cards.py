"""Model cards of committed runs: every one can be written, and says what its files say."""
from pathlib import Path

import pytest

from robust_dml.audit.cards import TEMPLATE, model_card, of_run, rows
from robust_dml.runs.store import Run, StoreError, finished_runs, open_run

STORE = Path(__file__).resolve().parent.parent/'reports'/'store'
CONFIGS = {
    run.folder: run.read('card.json')['config']
    for run in finished_runs(STORE.parent)
    if run.address.startswith('eval-')
}
# of the ten attacks
PAIRS = [(STORE/config['train'], folder) for folder, config in CONFIGS.items() if 'kind' not in config]
PAIRS = [(train, folder) for train, folder in PAIRS if Run(train).has('result.json') and Run(folder).has('result.json')]
SECTIONS = [line for line in TEMPLATE.splitlines() if line.startswith('## ')]


def card_of(train, evaluation): return model_card(of_run(Run(train), Run(evaluation)))


def tables(text):
    "Every table of the page as a list of its lines' cells."
    return [
        [line.strip('| ').split(' | ') for line in block.splitlines()]
        for block in text.split('\n\n')
        if block.startswith('| ')
    ]


@pytest.mark.parametrize('train,evaluation', PAIRS[::8], ids=lambda p: p.name)
def test_committed_runs(train, evaluation):
    text, result, found = (
        card_of(train, evaluation), Run(train).read('result.json'), Run(evaluation).read('result.json')
    )
    assert [line for line in text.splitlines() if line.startswith('## ')] == SECTIONS
    assert result['sha256'] in text and train.name in text
    attacks = next({cells[0]: cells[1:] for cells in t[2:]} for t in tables(text) if t[0][0] == 'attack')
    assert attacks.keys() == found['after'].keys()
    assert all(
        float(cells[1]) == pytest.approx(found['after'][name], rel=1e-3, abs=1e-3) for name, cells in attacks.items()
    )
    assert all((f"* Flag *{flag['name'].replace('_', ' ')}*:" in text) == flag['raised'] for flag in found['flags'])
    assert ('have collapsed' in text) == found['collapsed']
    assert all(len({len(cells) for cells in table}) == 1 for table in tables(text)), 'ragged tables are shown as text'


def test_there_are_runs(): assert len(PAIRS) > 50


def test_another_models_evaluation_is_refused():
    train, other = PAIRS[0][0], next(e for t, e in PAIRS if t != PAIRS[0][0])
    with pytest.raises(ValueError, match=f'must be one of {train.name}'): card_of(train, other)


def test_an_evaluation_of_another_kind_is_refused():
    evaluation, config = next((folder, config) for folder, config in CONFIGS.items() if config.get('kind') == 'tuples')
    with pytest.raises(StoreError, match='protocol'): card_of(STORE/config['train'], evaluation)


def test_a_training_that_is_not_finished(tmp_path):
    run = open_run(tmp_path, 'train', dict(format=1, model='small'))
    with pytest.raises(StoreError, match='result.json'): of_run(run)


@pytest.mark.parametrize('hostile', ('a|b', 'a\n| b', '{title}', '<script>'))
def test_names_break_no_table(hostile):
    lines = rows(('a', 'b'), [(hostile, 1)]).splitlines()
    assert len(lines) == 3 and len(lines[2].replace('\\|', '').split('|')) == 4


def test_no_fact_of_a_card_is_markup():
    names = {part.split('}')[0] for part in TEMPLATE.split('{')[1:]}
    card = model_card({name: '<script>alert(1)</script> <img src=x>' for name in names})
    assert '<script' not in card and '<img' not in card and '&lt;script>' in card
