"Hardening: nothing of what judges is trained on, a killed run goes on, the weights fit the model that they came from."
import csv
import os
import json

import pytest
from PIL import Image
from torch import nn

from robust_dml.audit.measure import load_model
from robust_dml.data.sets import glyphs
from robust_dml.audit.hardening import chosen_defense, divided, harden, portable, prepared, write_list
from robust_dml.models.networks import build, checksum

SETTINGS = dict(size=28, epochs=2, pairs=8, lr=1e-3, inner_steps=2, steps=2, limit=6, show=False)


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    "Eight characters as class folders."
    box, shapes = tmp_path_factory.mktemp('letters'), glyphs(size=28, train_classes=2, test_classes=8, per_class=4).test
    for k, label in enumerate(shapes.labels.tolist()):
        path = box/f'{label:02}'/f'{k}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(shapes.images[k, 0].numpy()).save(path)
    return box


def net(): return build('small', dim=16, size=28, channels=1, seed=0).eval()


def test_a_list_file_is_divided_and_keeps_its_queries(letters, tmp_path):
    rows = [
        (str(p), p.parent.name, 'query' if k % 4 == 0 else 'gallery')
        for k, p in enumerate(sorted(letters.rglob('*.png')))
    ]
    (tmp_path/'list.csv').write_text(''.join(','.join(row) + '\n' for row in rows))
    own, judged = divided(tmp_path/'list.csv')
    assert set(own.labels) == {'00', '01', '02', '03'} and set(judged.labels) == {'04', '05', '06', '07'}
    assert (own.queries, judged.queries) == (0, 4)      # what is marked as a query may be trained on in the first half
    lines = list(csv.DictReader(write_list(tmp_path/'there'/'held.csv', judged).open()))
    assert [r['split'] for r in lines] == ['query']*4 + ['gallery']*12


def test_a_killed_training_goes_on(letters, tmp_path, monkeypatch):
    whole = harden(net(), letters, out=tmp_path/'a', **SETTINGS)
    from robust_dml.defenses import train
    real, calls = train.train_epoch, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **options)
    monkeypatch.setattr(train, 'train_epoch', killed)
    with pytest.raises(KeyboardInterrupt): harden(net(), letters, out=tmp_path/'b', **SETTINGS)
    again = harden(net(), letters, out=tmp_path/'b', **SETTINGS)
    assert len(calls) == 3 and checksum(again.model) == checksum(whole.model)
    assert again.after.results['evaluation']['after'] == whole.after.results['evaluation']['after']


def test_weights_fit_where_they_came_from(tmp_path):
    model = load_model('torchvision:resnet18', seed=3)
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in portable(model).state_dict().items()}, tmp_path/'w.safetensors')
    assert checksum(load_model('torchvision:resnet18', weights=str(tmp_path/'w.safetensors'))) == checksum(model)
    other = nn.Linear(2, 2)
    assert portable(other) is other


@pytest.mark.parametrize(
    'line, steps, step_size', [('hm', 4, 2.5 * 8 / 255 / 4), ('act', 1, 8 / 255), ('colo_tride:lam=5', 8, 2.5 / 255)]
)
def test_the_inner_search_can_cross_the_ball(line, steps, step_size):
    options = chosen_defense(line, eps=8/255, inner_steps=steps).options
    assert options['steps'] == steps and options['step_size'] == pytest.approx(step_size) and options['eps'] == 8/255


def test_results_say_what_was_trained(letters, tmp_path):
    found = harden(net(), letters, out=tmp_path, name='<b>net', **SETTINGS)
    results = json.loads((found.page.parent/'results.json').read_text())
    assert results['train']['images'] == 16 and results['defense']['options']['eps'] == pytest.approx(8/255)
    assert '<b>net' not in found.page.read_text()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(epochs=0), 'at least 1 epoch'), (dict(inner_steps=0), 'inner_steps must be at least 1'),
        (dict(defense='none'), 'one of natural, act, hm, .* found .none.'), (dict(images='absent'), 'found nothing of that kind')
    ],
)
def test_bad_input(letters, tmp_path, change, message):
    given = dict(SETTINGS, images=letters, out=tmp_path) | change
    with pytest.raises((ValueError, FileNotFoundError), match=message): harden(net(), **given)


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match='unknown parameter epoch; the valid ones are model'): prepared(dict(epoch=3))


def test_names_that_differ_by_a_blank_or_are_not_utf_8_stay_what_they_are(letters, tmp_path):
    "Classes `x` and `x `, and a file whose name is bytes in another encoding."
    for k, folder in enumerate(sorted(letters.iterdir())):
        place = os.path.join(os.fsencode(tmp_path), b'set', (b'a', b'b', b'c', b'd', b'x', b'x ', b' x', b'\xe9')[k])
        os.makedirs(place)
        for file in folder.iterdir():
            with open(os.path.join(place, b'\xe4' + os.fsencode(file.name)), 'wb') as out: out.write(file.read_bytes())
    found = harden(net(), tmp_path/'set', out=tmp_path/'out', **SETTINGS)
    assert found.before.results['data']['classes'] == found.after.results['data']['classes'] == 4
    assert found.page.is_file() and found.page.parent.name.startswith('harden-set-')
