"A user's own data set by module:function."
import sys

import pytest
import torch

from robust_dml.core import DATASETS
from robust_dml.data import archives
from robust_dml.data.sets import QueryGallery
from robust_dml.study import experiments

BIRDS = '''
import torch
from robust_dml.data.sets import ImageSet, QueryGallery, Split

def side(classes, size, channels, seed):
    gen = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(4)
    images = torch.randint(0, 40, (len(label), channels, size, size), generator=gen) + 20*label[:, None, None, None]
    return ImageSet(images.clamp(max=255).to(torch.uint8), label, tuple(f'bird {k}' for k in range(classes)))

def birds(size=28, channels=1): return Split('birds', side(5, size, channels, 0), side(6, size, channels, 1))
def small(): return Split('birds', side(5, 20, 1, 0), side(6, 20, 1, 1))
def nothing(size): return [size]
def halved(*, size, channels, root=None):
    test = side(6, size, channels, 1)
    order = torch.arange(24).view(6, 4).T.flatten()
    test = ImageSet(test.images[order], test.labels[order], test.classes)
    return QueryGallery('halved', side(5, size, channels, 0), test, queries=6)
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'bird_lab.py').write_text(BIRDS)
    yield tmp_path
    sys.modules.pop('bird_lab', None)


def test_an_own_data_set_gets_size_and_limits(lab):
    split = archives.load('bird_lab:birds', size=12, channels=3, train_classes=3, test_classes=2, crop=10)
    assert (split.name, len(split.train), len(split.test), split.test.classes) == ('birds', 12, 8, ('bird 0', 'bird 1'))
    assert tuple(split.train.images.shape[1:]) == (3, 12, 12) and split.train.batch(torch.arange(2)).shape[-1] == 10
    whole = archives.load('bird_lab:birds', size=12)
    assert len(whole.train) == 20 and whole.card()['checksum'] != split.card()['checksum']


def test_queries_of_an_own_data_set_are_counted_again_under_a_limit(lab):
    split = archives.load('bird_lab:halved', size=12, test_classes=2)
    assert isinstance(split, QueryGallery) and split.queries == 2 and len(split.test) == 8


@pytest.mark.parametrize(
    'named, kind, message',
    [
        ('bird_lab:nothing', TypeError, 'bird_lab:nothing must return a Split, found list'),
        ('bird_lab:small', ValueError, 'must return images of 1 x 28 x 28, found 1 x 20 x 20; let it take size'),
        ('bird_lab:bird', ValueError, "bird_lab must have bird, found no such name; did you mean 'birds'"),
        ('nobody_xyz:birds', ValueError, 'expected a module nobody_xyz, found none'),
        ('glyhps', ValueError, "path of a folder of class folders, found 'glyhps'; did you mean 'glyphs'"),
        ('omniglot', ValueError, 'omniglot needs root, the folder that holds'),
    ],
)
def test_data_sets_that_do_not_do(lab, named, kind, message):
    with pytest.raises(kind, match=message) as error: archives.load(named, size=28)
    assert '\n' not in str(error.value)


def test_every_named_set_has_a_record():
    assert {*archives.SETS} == {name for name, source in DATASETS.items() if source.files} == {*archives._LISTS}
    assert {name for name, source in DATASETS.items() if source.drawn} == {'glyphs', 'omniglot', 'mnist', 'fashion'}


def test_a_table_is_planned_on_an_own_data_set(lab):
    p = experiments.parameters(dict(dataset='bird_lab:birds', preset='smoke', backend='torch'))
    plan = experiments.plan('table1', p)
    assert plan.dataset == 'birds' and plan.folder.name == 'table1-birds-smoke' and plan.recipe.channels == 3
    assert tuple(plan.data.train.images.shape) == (20, 3, 32, 32) and len(plan.data.test.classes) == 6
    (lab/'bird_lab.py').write_text(BIRDS.replace('def birds(', 'def glyphs('))
    assert experiments.data_name('bird_lab:glyphs', '') == 'glyphs-own'
