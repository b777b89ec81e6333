"Image sets, the three sources, broken input, pair batches and batches prepared ahead."
import functools, io, itertools, json, signal, threading, time, traceback, warnings, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_dml.data import sets as data
from robust_dml.core import generator
from robust_dml.metrics import retrieval as metrics

FOUND = functools.cache(data.characters)
SEARCH = data.characters
OMNIGLOT = Path(__file__).parents[2]/'shared'/'data'/'omniglot'


def write(path, value=0, mode='L', size=(10, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    "Four classes; class c holds c+1 images of value 10c+k."
    for c in range(4):
        for k in range(c+1): write(tmp_path/'set'/f'class{c}'/f'{k}.png', 10*c+k)
    return tmp_path/'set'


@pytest.fixture(autouse=True)
def search_characters_once(monkeypatch):
    "The search takes most of the time of a small set; its own tests do it again."
    monkeypatch.setattr(data, 'characters', FOUND)


@pytest.fixture(scope='module')
def glyphs(): return data.glyphs(train_classes=4, test_classes=6)


# image sets

def make(n=7, size=6, **options):
    pixels = torch.randint(256, (n, 3, size, size), generator=generator(0, 'pixels')).byte()
    return data.ImageSet(pixels, torch.arange(n)//2, tuple('abcd'[:(n+1)//2]), **options)


def test_batch_is_exactly_the_bytes():
    s, rows = make(), torch.tensor([5, 0, 5])
    for dtype in (torch.float32, torch.float64):
        x = s.batch(rows, dtype=dtype)
        assert x.dtype == dtype and torch.equal(x, s.images[rows].to(dtype)/255)
    assert s.batch(rows).min() >= 0 and s.batch(rows).max() <= 1


def test_memory_mapped_images(tmp_path):
    s = make(crop=4)
    mapped = np.memmap(tmp_path/'pixels', np.uint8, 'w+', shape=tuple(s.images.shape))
    mapped[:] = s.images.numpy()
    m, rows = replace(s, images=mapped), torch.tensor([6, 2])
    assert torch.equal(m.batch(rows), s.batch(rows)) and m.checksum() == s.checksum() and m.summary() == s.summary()
    assert torch.equal(m.augment(rows, generator(0)), s.augment(rows, generator(0)))


def test_crops():
    s = make(crop=3)
    assert torch.equal(s.batch([1]), s.images[[1], :, 1:4, 1:4]/255)
    rows = torch.tensor([3]*400)
    windows = [
        w
        for i, j in itertools.product(range(4), range(4))
        for w in (s.images[3, :, i : i + 3, j : j + 3], s.images[3, :, i : i + 3, j : j + 3].flip(-1))
    ]
    drawn = (s.augment(rows, generator(0, 'crop'))*255).round().byte()
    count = torch.tensor([sum(torch.equal(w, d) for d in drawn) for w in windows])
    assert count.sum() == 400 and count.min() > 0 and count.max() < 30 # mean 12.5, standard deviation 3.5
    assert torch.equal(s.augment(rows, generator(1)), s.augment(rows, generator(1)))
    assert torch.equal(make().augment(rows, generator(1)), make().batch(rows))


@pytest.mark.parametrize('shape, size', [((6, 3, 9, 7), 5), ((6, 1, 4, 4), 4), ((1, 2, 5, 8), 1)])
@pytest.mark.parametrize('kind', [torch.uint8, torch.float64])
def test_random_crop_against_indexing_every_pixel(shape, size, kind):
    x = (torch.rand(shape, generator=generator(0, 'crop'))*255).to(kind)
    gen = generator(1, 'crop')
    top, left, flip = (
        torch.randint(n, (len(x), 1), generator=gen).flatten().tolist()
        for n in (shape[2] - size + 1, shape[3] - size + 1, 2)
    )
    expected = x.new_empty(*shape[:2], size, size)
    for b, c, i, j in itertools.product(*map(range, expected.shape)):
        expected[b, c, i, j] = x[b, c, top[b]+i, left[b]+(size-1-j if flip[b] else j)]
    assert torch.equal(data.random_crop(x, size, generator(1, 'crop')), expected)


@pytest.mark.parametrize(
    'change',
    [
        lambda s: replace(s, classes=('a', 'b', 'c', 'D')),
        lambda s: replace(s, labels=torch.tensor([0, 0, 1, 1, 2, 3, 3])), lambda s: replace(s, images=s.images.flip(0)),
        lambda s: replace(s, images=s.images.flip(-1))
    ],
)
def test_checksum_sees_every_part(change): assert change(make()).checksum() != make().checksum() == make().checksum()


def test_checksum_is_over_all_images():
    s = data.ImageSet(torch.zeros(600, 1, 2, 2, dtype=torch.uint8), torch.zeros(600, dtype=torch.long), ('a',))
    last = s.images.clone(); last[-1, 0, 1, 1] = 1
    assert replace(s, images=last).checksum() != s.checksum()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(images=torch.zeros(7, 6, 6)), r'\(N, C, H, W\)'),
        (dict(images=torch.zeros(0, 3, 6, 6), labels=torch.zeros(0).long()), 'N > 0'),
        (dict(labels=torch.zeros(6).long()), r'shape \(7,\)'), (dict(labels=torch.arange(7).float()), 'type long'),
        (dict(classes=('a', 'b', 'c')), 'each of 0 to 2'), (dict(classes=tuple('abcde')), 'each of 0 to 4'),
        (dict(crop=7), r'crop must lie in \[1, 6\]'), (dict(crop=0), 'crop must')
    ],
)
def test_image_set_refuses(change, message):
    with pytest.raises(ValueError, match=message): replace(make(), **change)


# glyphs

def test_glyphs_counts_and_disjoint_classes():
    split = data.glyphs(size=8, per_class=1)
    assert (
        len(split.train.classes) == 150
        and len(split.test.classes) == 100
        and not set(split.train.classes) & set(split.test.classes)
    )
    assert json.loads(json.dumps(split.card())) == split.card()


def test_glyphs_are_determined_by_the_seed(glyphs):
    assert data.glyphs(train_classes=4, test_classes=6).card() == glyphs.card()
    assert data.glyphs(train_classes=4, test_classes=6, seed=1).card() != glyphs.card()


def test_limits_do_not_change_what_remains(glyphs):
    few = data.load('glyphs', train_classes=2, test_classes=3)
    assert few.train.classes == glyphs.train.classes[:2] and torch.equal(few.train.images, glyphs.train.images[:40])
    assert few.test.classes == glyphs.test.classes[:3] and torch.equal(few.test.images, glyphs.test.images[:60])
    assert torch.equal(data.load('glyphs', test_classes=3, train_classes=9).test.images, few.test.images)


def test_an_image_depends_on_its_own_key_only(glyphs):
    few = data.glyphs(train_classes=4, test_classes=6, per_class=3)
    assert torch.equal(few.test.images, glyphs.test.images.unflatten(0, (6, 20))[:, :3].flatten(0, 1))


def test_samples_take_turns_with_the_fonts(monkeypatch):
    used, draw = [], data._glyph
    monkeypatch.setattr(data, '_glyph', lambda font, *rest: used.append(Path(font.path).stem) or draw(font, *rest))
    names = data.characters()['A']
    data._draw_set({'A': names}, size=8, channels=1, seed=0, per_class=25)
    assert len(names) == 21 and used == names+names[:4]


@pytest.mark.parametrize('size, channels', [(28, 1), (32, 3), (64, 1)])
def test_ink_is_bright_on_dark(size, channels):
    x = data.glyphs(size=size, channels=channels, train_classes=10, test_classes=10).test.images.float()/255
    assert x.shape[1:] == (channels, size, size)
    corner, peak = x[..., 0, 0].mean(1), x.mean(1).amax((-1, -2))
    # the paper's and the ink's ranges do not meet
    assert corner.max() < .3 and peak.min() > .5 and (peak-corner).min() > .35
    assert x.mean() < .3
    assert channels == 1 or (x[:, 0]-x[:, 1]).abs().mean() > .03


def test_samples_of_a_class_differ(glyphs):
    flat = glyphs.test.images.flatten(1).float()
    apart = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert apart.min() > 100
    nearest = glyphs.test.labels[apart.argmin(1)] == glyphs.test.labels
    assert nearest.float().mean() > .5 # a class is a class already for pixels


def test_no_homoglyphs_no_boxes_and_own_fonts():
    found = SEARCH()
    assert found == SEARCH() and len(found) >= 300 and list(found) == sorted(found)
    for twins in ('AΑА', 'EΕЕ', 'HΗН', 'KΚК', 'oοо', 'cс', 'PΡРр', 'XΧХx', '/∕'):
        assert sum(c in found for c in twins) <= 1, twins
    assert all(c in found for c in 'AFKXZ@&Ω√∞')
    assert not any(
        name.startswith('cm')
        for char, names in found.items()
        for name in names
        if not (char.isascii() and char.isalnum())
    )
    assert all(len(names) >= 10 for names in found.values())


def test_a_missing_character_is_noticed():
    font = data.load_fonts(32)['DejaVuSans']
    # no Chinese, no blank, no dot
    assert list(data._covered(font, ['A', '\u4e2d', '\uffff', ' ', '.', '∑'])) == ['A', '∑']


def test_difference_against_a_loop():
    maps = torch.rand(3, 4, 9, generator=generator(0, 'maps')); maps[1, 2] = 0; maps[2, 0] = 0
    for i, j in itertools.product(range(4), range(4)):
        fonts = [f for f in range(3) if maps[f, i].any() and maps[f, j].any()]
        num, den = sum(((maps[f, i] - maps[f, j]) ** 2).sum() for f in fonts), sum(
            (maps[f, i] ** 2 + maps[f, j] ** 2).sum() for f in fonts
        )
        assert torch.isclose(data.difference(maps)[i, j], num/den, atol=1e-6) # float32 rounding


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(channels=4), 'channels must be one of 1, 3'), (dict(size=4), 'size must lie in'),
        (dict(train_classes=0), 'train_classes'), (dict(test_classes=400), 'test_classes'),
        (dict(per_class=0), 'per_class')
    ],
)
def test_glyphs_refuse(options, message):
    with pytest.raises(ValueError, match=message): data.glyphs(**options)


# omniglot

def archive(path, alphabets, drawings=3, stem=None):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('__MACOSX/x/y/._a.png', b'no image')
        for a, c, k in itertools.product(alphabets, (1, 2), range(drawings)):
            image = Image.new('1', (105, 105), 1)
            image.paste(0, (10+k, 10, 11+k, 95))
            image.save(file := io.BytesIO(), 'png')
            z.writestr(f'{stem or path.stem}/{a}/character0{c}/000{c}_0{k}.png', file.getvalue())


def test_small_archives_drop_known_alphabets(tmp_path):
    archive(tmp_path/'images_background_small1.zip', ('Greek', 'Balinese'))
    archive(tmp_path/'images_background_small2.zip', ('Tagalog', 'Greek'))
    split = data.load('omniglot', root=tmp_path, size=32, channels=3)
    assert split.name == 'omniglot_small' and split.test.classes == ('Tagalog/character01', 'Tagalog/character02')
    assert split.train.classes[0] == 'Balinese/character01' and split.train.images.shape == (12, 3, 32, 32)
    x = split.train.images[0]
    assert x.max() == 255 and x[:, :, -10:].max() == 0 and torch.equal(x[0], x[2])
    few = data.omniglot(tmp_path, train_classes=1)
    assert few.train.classes == ('Balinese/character01',) and len(few.test) == 6
    assert data.omniglot(tmp_path, test_classes=9).card() == data.omniglot(tmp_path).card()
    with pytest.raises(ValueError, match='test_classes must lie in'): data.omniglot(tmp_path, test_classes=0)
    # nothing unpacked
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'images_background_small1.zip', 'images_background_small2.zip'
    ]


def test_large_archives_come_first_and_must_be_complete(tmp_path):
    archive(tmp_path/'images_background_small1.zip', ('Greek',))
    archive(tmp_path/'images_background_small2.zip', ('Tagalog',))
    archive(tmp_path/'images_background.zip', ('Latin',))
    with pytest.raises(FileNotFoundError, match='omniglot needs images_evaluation.zip in') as err:
        data.omniglot(tmp_path)
    assert 'images_background.zip' not in str(err.value).split(' in ')[0]
    archive(tmp_path/'images_evaluation.zip', ('Tengwar',))
    split = data.omniglot(tmp_path)
    assert (split.name, split.train.classes[0], split.test.classes[0]) == (
        'omniglot', 'Latin/character01', 'Tengwar/character01'
    )


@pytest.mark.parametrize(
    'there, absent',
    [
        ((), 'images_background.zip and images_evaluation.zip'),
        (('images_background_small1',), 'images_background_small2.zip'),
        (('images_evaluation',), 'images_background.zip')
    ],
)
def test_missing_archive_is_named(tmp_path, there, absent):
    for stem in there: archive(tmp_path/f'{stem}.zip', ('Greek',))
    with pytest.raises(FileNotFoundError) as err: data.omniglot(tmp_path)
    assert f'omniglot needs {absent} in {tmp_path}' in str(err.value) and 'github.com/brendenlake/omniglot' in str(
        err.value
    )


def test_damaged_archives_are_named(tmp_path):
    archive(tmp_path/'images_background.zip', ('Greek',)); archive(tmp_path/'images_evaluation.zip', ('Tagalog',))
    whole = (tmp_path/'images_evaluation.zip').read_bytes()
    (tmp_path/'images_evaluation.zip').write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='images_evaluation.zip must be a zip archive'): data.omniglot(tmp_path)
    hit = whole.index(b'IDAT')+10
    (tmp_path/'images_evaluation.zip').write_bytes(whole[:hit]+b'\0\1\2\3'+whole[hit+4:])
    with pytest.raises(ValueError, match='found 1 that are not: images_evaluation/Tagalog/character01/0001_00.png'):
        data.omniglot(tmp_path)
    with zipfile.ZipFile(tmp_path/'images_evaluation.zip', 'w') as z: z.writestr('readme.txt', 'x')
    with pytest.raises(ValueError, match='must hold folder/Alphabet/character'): data.omniglot(tmp_path)


@pytest.mark.skipif(
    not (OMNIGLOT / 'images_background_small2.zip').is_file(), reason=f'no Omniglot archives in {OMNIGLOT}'
)
def test_the_real_small_archives():
    split = data.omniglot(OMNIGLOT)
    assert (len(split.train.classes), len(split.test.classes), len(split.train), len(split.test)) == (
        136, 106, 2720, 2120
    )
    assert {c.split('/')[0] for c in split.test.classes} == {'Japanese_(katakana)', 'Sanskrit', 'Tagalog'}
    assert torch.equal(split.train.labels.bincount(), torch.full((136,), 20))
    ink = split.test.images.float()/255
    assert (ink.amax((1, 2, 3)) == 1).all() and .05 < ink.mean() < .3


# folders

def test_folder_halves_and_values(folder):
    split = data.load(str(folder), size=8, channels=1)
    assert (
        split.name == 'set'
        and split.train.classes == ('class0', 'class1')
        and split.test.classes == ('class2', 'class3')
    )
    assert split.train.images[:, 0, 3, 3].tolist() == [0, 10, 11] and split.test.images[:, 0, 0, 0].tolist() == [
        20, 21, 22, 30, 31, 32, 33
    ]
    assert split.train.summary()['singles'] == 1 and split.card()['train']['singles'] == 1


def test_odd_number_of_classes(folder):
    write(folder/'class4'/'a.png')
    split = data.image_folder(folder, size=8)
    assert (len(split.train.classes), len(split.test.classes)) == (2, 3)


def test_formats_colours_and_ignored_files(folder):
    write(folder/'class0'/'b.JPG', (200, 10, 10), 'RGB', format='jpeg')
    write(folder/'class0'/'c.gif', 7, 'P'); write(folder/'class0'/'d.png', (9, 80), 'LA')
    write(folder/'class0'/'e.bmp', (0, 0, 255), 'RGB'); write(folder/'class0'/'f.webp', (5, 5, 5), 'RGB', lossless=True)
    for name in ('notes.txt', '.hidden.png', 'labels.csv', 'Thumbs.db'): (folder/'class0'/name).write_text('no image')
    (folder/'.git').mkdir(); (folder/'readme.md').write_text('x'); (folder/'class0'/'deeper.png').mkdir()
    with pytest.warns(UserWarning, match='3 files or folders are not read as images and left out: class0/deeper.png, '):
        x = data.image_folder(folder, size=8).train.images[:6]
    assert (x[1, :, 4, 4].float()-torch.tensor([200., 10, 10])).abs().max() <= 3 # JPEG
    assert (
        x[3, :, 0, 0].tolist() == [178, 178, 178]             # on white paper
        and x[4, :, 0, 0].tolist() == [0, 0, 255]
        and x[5, :, 0, 0].tolist() == [5, 5, 5]
    )


def test_resizing_ignores_the_aspect_ratio(tmp_path):
    wide = Image.new('L', (40, 10)); wide.paste(255, (20, 0, 40, 10))
    for c in 'ab':
        (tmp_path/c).mkdir(); wide.save(tmp_path/c/'0.png')
    x = data.image_folder(tmp_path, size=16, channels=1, crop=12).test
    assert x.images.shape == (1, 1, 16, 16) and x.batch([0]).shape == (1, 1, 12, 12)
    assert x.images[0, 0, :, :7].max() == 0 and x.images[0, 0, :, 9:].min() == 255


def test_broken_images_are_counted_and_named(folder):
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8))
    big.save(folder/'class2'/'0.png'); whole = (folder/'class2'/'0.png').read_bytes()
    (folder/'class2'/'0.png').write_bytes(whole[:len(whole)//2])
    (folder/'class0'/'0.png').write_text('<html>')
    (folder/'class3'/'1.png').write_bytes(b'')
    with pytest.raises(ValueError, match='all 10 images of set must be readable, found 3 that are not') as err:
        data.image_folder(folder, size=8)
    for name in ('class0/0.png (not an image)', 'class2/0.png (', 'class3/1.png (', 'skip_unreadable=True'):
        assert name in str(err.value)
    split = data.image_folder(folder, size=8, channels=1, skip_unreadable=True)
    assert split.skipped == ('class0/0.png', 'class2/0.png', 'class3/1.png') and split.card()['skipped'] == list(
        split.skipped
    )
    # the only image of class0 is gone; class2 does not move over
    assert split.train.classes == ('class1',) and split.train.labels.tolist() == [0, 0]
    assert split.test.classes == ('class2', 'class3') and split.test.images[:, 0, 0, 0].tolist() == [21, 22, 30, 32, 33]
    assert data.load(str(folder), skip_unreadable=True).skipped == split.skipped


def test_many_broken_images_are_cut_short(folder):
    for k in range(9): (folder/'class1'/f'x{k}.jpg').write_bytes(b'zero')
    with pytest.raises(ValueError, match=r'found 9 that are not: .*x4.jpg \(not an image\), \.\.\.;') as err:
        data.image_folder(folder, size=8)
    assert 'x5.jpg' not in str(err.value)


def test_nothing_readable_on_one_side(folder):
    for file in (*folder.glob('class0/*'), *folder.glob('class1/*')): file.write_text('x')
    with pytest.raises(ValueError, match='needs a readable image, found none among 3 files'):
        data.image_folder(folder, size=8, skip_unreadable=True)


@pytest.mark.parametrize('factor', [1.5, 3.]) # Pillow warns at once, refuses at twice the limit
def test_decompression_bombs_are_unreadable(folder, monkeypatch, factor):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', int(10*8/factor)+1)
    write(folder/'class1'/'0.png', size=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='found 9 that are not: class0/0.png .*decompression bomb'):
            data.image_folder(folder, size=8)


def test_deep_pixels_are_refused(folder):
    write(folder/'class0'/'0.png', 40000, 'I;16')
    with pytest.raises(ValueError, match='class0/0.png .*8 bits per channel expected, found mode I;16'):
        data.image_folder(folder, size=8)


def test_folder_errors(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match='found nothing of that kind at'):
        data.image_folder(tmp_path/'nowhere', size=8)
    with pytest.raises(ValueError, match='one folder per class, at least two, found 0'):
        data.image_folder(folder/'class3', size=8)
    with pytest.raises(ValueError, match='at least two, found 1'): data.image_folder(tmp_path, size=8)
    with pytest.raises(ValueError, match=r'crop must lie in \[1, 8\], found 9'):
        data.image_folder(folder, size=8, crop=9)
    (folder/'empty').mkdir()
    with pytest.raises(ValueError, match='must hold an image, found none in .*empty; remove or fill it'):
        data.image_folder(folder, size=8)


@pytest.mark.parametrize('name', ['cubs', 'Glyphs', ''])
def test_unknown_data_set_lists_the_valid_ones(name):
    with pytest.raises(
        ValueError, match="dataset must be 'glyphs', 'omniglot' or the path of a folder of class folders, found"
    ):
        data.load(name)


def test_a_file_is_no_data_set(folder):
    with pytest.raises(ValueError, match='dataset must be'): data.load(str(folder/'class0'/'0.png'))


def test_crop_by_name():
    assert data.load('glyphs', crop=20, train_classes=1, test_classes=1).test.batch([0]).shape == (1, 1, 20, 20)


# pair batches

@pytest.mark.parametrize('allow_self', [False, True])
def test_pair_batches(allow_self):
    label = torch.randint(12, (101,), generator=generator(0, 'labels')); label[50] = 12 # one class of one image
    batches = list(pair for pair in data.pair_batches(label, pairs=8, gen=generator(1), allow_self=allow_self))
    assert [len(b) for b in batches] == [16]*12+[10]
    rows = torch.cat(batches)
    first, second = rows[::2], rows[1::2]
    assert first.sort().values.equal(torch.arange(101)) and label[first].equal(label[second])
    same = first == second
    assert same[first == 50].all()
    assert (same.sum() > 1) if allow_self else (same.sum() == 1)


@pytest.mark.parametrize('allow_self', [False, True])
def test_partners_are_uniform(allow_self):
    label = torch.tensor([0, 1, 0, 2, 0, 1, 0])
    count = torch.zeros(7, 7)
    for k in range(4000): count[torch.arange(7), data.partners(label, gen=generator(0, k), allow_self=allow_self)] += 1
    for i, j in itertools.product(range(7), range(7)):
        choices = [m for m in range(7) if label[m] == label[i] and (allow_self or m != i)] or [i]
        expected = 4000/len(choices) if j in choices else 0
        assert abs(count[i, j]-expected) <= (160 if 0 < expected < 4000 else 0), (i, j) # 5 standard deviations


def test_pair_batches_come_from_the_generator():
    label = torch.arange(40)//4
    def epoch(*key, pairs=8): return torch.cat(list(data.pair_batches(label, pairs=pairs, gen=generator(*key))))
    assert (
        epoch(0, 1).equal(epoch(0, 1))
        and epoch(0, 1).equal(epoch(0, 1, pairs=13))
        and not epoch(0, 1).equal(epoch(0, 2))
    )


@pytest.mark.parametrize(
    'images', [torch.rand(4, 1, 8, 8), torch.zeros(4, 1, 8, 8, dtype=torch.int16)], ids=('float', 'int16')
)
def test_images_are_stored_as_bytes(images):
    with pytest.raises(ValueError, match='stored as uint8 in 0 to 255'):
        data.ImageSet(images, torch.tensor([0, 0, 1, 1]), ('a', 'b'))


def test_damaged_drawing_can_be_skipped(tmp_path):
    archive(tmp_path/'images_background_small1.zip', ('Greek',))
    archive(tmp_path/'images_background_small2.zip', ('Tagalog',))
    with zipfile.ZipFile(tmp_path/'images_background_small2.zip', 'a') as z:
        z.writestr('images_background_small2/Tagalog/character01/9999_99.png', b'no image')
    with pytest.raises(ValueError, match='9999_99.png'): data.load('omniglot', root=tmp_path)
    split = data.load('omniglot', root=tmp_path, skip_unreadable=True)
    assert len(split.skipped) == 1 and split.skipped[0].endswith('9999_99.png')


# batches prepared ahead

def threads(): return [t for t in threading.enumerate() if t.name == 'prefetch']


@pytest.fixture
def no_thread_left():
    yield
    assert threads() == []


@pytest.mark.parametrize('depth', [1, 3, 50])
@pytest.mark.parametrize('count', [0, 1, 7, 40])
def test_prefetch_keeps_order(no_thread_left, depth, count):
    assert list(data.prefetch((k*k for k in range(count)), depth=depth)) == [k*k for k in range(count)]


@pytest.mark.parametrize('depth', [1, 2])
def test_prefetch_works_ahead_and_not_too_far(no_thread_left, depth):
    "While the caller holds an item, the next `depth` are made, in another thread, and no more."
    made = [threading.Semaphore(0) for _ in range(20)]
    makers = []
    def items():
        for k in range(20):
            makers.append(threading.current_thread())
            made[k].release()
            yield k
    found = data.prefetch(items(), depth=depth)
    assert makers == []  # nothing starts before the first item is asked for
    assert next(found) == 0
    for k in range(depth+1): assert made[k].acquire(timeout=10)  # those ahead come without being asked for
    assert not made[depth+1].acquire(timeout=.2)
    assert next(found) == 1 and made[depth+1].acquire(timeout=10)
    assert threading.main_thread() not in makers
    found.close()
    assert len(makers) <= depth+3


def test_prefetch_hands_over_the_error(no_thread_left):
    def where_it_breaks(): raise OSError('disk gone')
    def items():
        yield 1
        where_it_breaks()
    found = data.prefetch(items())
    assert next(found) == 1
    with pytest.raises(OSError, match='disk gone') as error: next(found)
    assert 'where_it_breaks' in [frame.name for frame in traceback.extract_tb(error.tb)]
    with pytest.raises(StopIteration): next(found)


def test_prefetch_ends_with_its_caller(no_thread_left):
    "Closed, left by an exception, or never begun: no thread stays."
    found = data.prefetch(itertools.count())
    assert [next(found), next(found)] == [0, 1]
    found.close()
    for _ in zip(range(3), data.prefetch(itertools.count())): pass
    data.prefetch(itertools.count())
    with pytest.raises(ZeroDivisionError):
        for k in data.prefetch(itertools.count()): 1/(3-k)


def test_prefetch_can_be_interrupted(no_thread_left):
    "Ctrl-C while the caller waits for an item that takes long."
    waiting, enough = threading.Event(), threading.Event()
    def items():
        yield 0
        waiting.wait(10)
        time.sleep(.3)  # the caller waits by now
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        enough.wait(10)
        yield 1
    found = data.prefetch(items())
    assert next(found) == 0
    threading.Timer(1., enough.set).start()
    # a shell ignores it in what it runs in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            waiting.set()
            next(found)
    finally: signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('crop', [None, 4])
def test_training_batches_are_the_same_ahead(no_thread_left, crop):
    "Same images, labels and draws, whatever else is drawn meanwhile from the global generator."
    s = make(crop=crop)
    def epoch(ahead):
        rows = data.pair_batches(s.labels, pairs=3, gen=generator(0, 'pairs'))
        found = []
        for x, label in data.training_batches(s, rows, gen=generator(0, 'augment'), dtype=torch.float64, ahead=ahead):
            torch.rand(3)
            found.append((x, label))
        return found
    plain, ahead, gen = epoch(False), epoch(True), generator(0, 'augment')
    assert len(plain) == len(ahead) == 3
    for rows, a, b in zip(data.pair_batches(s.labels, pairs=3, gen=generator(0, 'pairs')), plain, ahead):
        assert torch.equal(a[0], s.augment(rows, gen, dtype=torch.float64)) and torch.equal(a[1], s.labels[rows])
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].dtype == b[0].dtype == torch.float64


@pytest.mark.parametrize('mapped', [False, True])
def test_images_outside_of_memory_are_read_ahead(no_thread_left, mapped):
    s, readers = make(), set()
    class Watched:
        shape, dtype = s.images.shape, s.images.dtype
        def __len__(self): return len(s.images)
        def __getitem__(self, rows):
            readers.add(threading.current_thread() is threading.main_thread())
            return s.images[rows]
    if not mapped:  # a tensor in memory is read where it is needed
        Watched = type(
            'Watched', (torch.Tensor,),
            {
                '__getitem__': lambda self, rows: (
                    readers.add(threading.current_thread() is threading.main_thread()), s.images[rows]
                )[1]
            },
        )
        images = s.images.as_subclass(Watched)
    else: images = Watched()
    list(data.training_batches(replace(s, images=images), torch.arange(7).split(2), gen=generator(0)))
    assert readers == {not mapped}


def side_folders(root, **sides):
    "Two grey images in each class folder of each side."
    for side, names in sides.items():
        for name in names:
            for k in range(2): write(root/side/name/f'{k}.png', 20*k+ord(name))
    return root


@pytest.mark.parametrize('sides', [dict(train='ab', test='cd'), dict(train='ab', query='cd', gallery='cd')])
def test_a_folder_that_is_split_already_says_how_it_was_read(tmp_path, capsys, sides):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split = data.load(str(side_folders(tmp_path/'set', **sides)), size=8, channels=1)
    assert split.train.classes == ('a', 'b') and split.test.classes == ('c', 'd')
    assert isinstance(split, data.QueryGallery) == ('query' in sides)
    said = capsys.readouterr().out
    assert 'is read as split already: train (4 images), ' in said and all(
        f'{side} (4 images)' in said for side in sides
    )


def test_queries_that_can_find_nothing_are_left_out_as_the_warning_says(tmp_path):
    folder = side_folders(tmp_path/'set', train='ab', query='cde', gallery='cd')
    with pytest.warns(UserWarning, match=r'1 classes that are not in its gallery \(e, .*R@1 and mAP leave them out'):
        split = data.load(str(folder), size=8, channels=1)
    emb, asked = torch.eye(5)[split.test.labels], split.queries
    row = metrics.benign(
        emb[:asked], split.test.labels[:asked], emb[asked:], split.test.labels[asked:], backend='torch'
    )
    assert row['undefined'] == 2 and row['R@1'] == 100


def test_queries_none_of_which_can_find_anything_are_refused(tmp_path):
    folder = side_folders(tmp_path/'set', train='ab', query='cd', gallery='ef')
    with pytest.raises(ValueError, match='in both query and gallery, found none'):
        data.load(str(folder), size=8, channels=1)


def test_classes_on_both_sides_give_a_warning(tmp_path):
    folder = side_folders(tmp_path/'set', train='ab', test='bc')
    with pytest.warns(UserWarning, match='trains and tests on 1 of the same classes'):
        data.load(str(folder), size=8, channels=1)


def test_training_and_validation_alone_are_refused_with_advice(tmp_path):
    folder = side_folders(tmp_path/'set', train='ab', val='cd')
    with pytest.raises(ValueError, match='found train and val; rename val to test if its classes are to be tested on'):
        data.load(str(folder), size=8, channels=1)


# what people have

def oriented(path, number, mode='RGB'):
    "A file whose rows are stored as orientation `number` says; a viewer shows the same picture for each."
    shown = np.zeros((12, 16, 3), np.uint8)
    shown[:6], shown[:, :4, 1] = 200, 90
    back = (None, None, 0, 3, 1, 5, 2, 6, 4)[number] # how an upright picture becomes the stored one
    image = Image.fromarray(shown)
    if back is not None: image = image.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x112] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, exif=exif)


@pytest.mark.parametrize('suffix', ('png', 'tif', 'webp'))
@pytest.mark.parametrize('number', range(1, 9))
def test_images_are_read_as_a_viewer_shows_them(tmp_path, suffix, number):
    oriented(tmp_path/f'x.{suffix}', 1), oriented(tmp_path/f'y.{suffix}', number)
    upright, turned = (np.asarray(data.read_image(tmp_path/f'{n}.{suffix}', channels=3, shown=True)) for n in 'xy')
    assert upright.shape == turned.shape and np.abs(upright.astype(int) - turned).mean() < 9


@pytest.mark.parametrize('mode, value', [
    ('RGBA', (0, 0, 0, 0)), ('LA', (0, 0)), ('P', 0), ('RGB', (3, 4, 5)), ('L', 7), ('1', 0)
])
def test_what_is_transparent_is_white(tmp_path, mode, value):
    "In every way that a PNG can say so; the stored pixels are dark."
    key = dict(transparency=value) if mode in ('P', 'RGB', 'L', '1') else {}
    image = Image.new(mode, (8, 8), value)
    if mode == 'P': image.putpalette([0, 0, 0] + [9, 9, 9]*255)
    image.save(tmp_path/'x.png', **key)
    shown = np.asarray(data.read_image(tmp_path/'x.png', channels=3, shown=True))
    assert (shown == 255).all() and np.asarray(data.read_image(tmp_path/'x.png', channels=3)).max() < 20


def test_damaged_exif_data_do_no_harm(tmp_path):
    Image.new('L', (8, 6), 50).save(tmp_path/'x.png', exif=b'Exif\0\0' + b'\xff'*30)
    assert data.read_image(tmp_path/'x.png', channels=1, shown=True).size == (8, 6)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    Image.new('RGB', (2000, 2000), (120, 130, 140)).save(file := io.BytesIO(), 'JPEG', progressive=True, quality=5)
    whole = file.getvalue()
    last = whole[whole.rfind(b'\xff\xda'):-2]
    (tmp_path/'x.jpg').write_bytes(whole[:-2] + 3000*last + whole[-2:])
    began = time.monotonic()
    with pytest.raises(ValueError, match='scans of 2000 x 2000 pixels would take too long'):
        data.read_image(tmp_path/'x.jpg', channels=3)
    assert time.monotonic()-began < 2
    (tmp_path/'y.jpg').write_bytes(whole)
    assert data.read_image(tmp_path/'y.jpg', channels=3).size == (2000, 2000)


def test_a_file_of_gigabytes_is_no_image(tmp_path):
    with open(tmp_path/'x.jpg', 'wb') as file: file.truncate(2**33)
    with pytest.raises(ValueError, match='at most 268435456 bytes expected'):
        data.read_image(tmp_path/'x.jpg', channels=3)


@pytest.mark.parametrize('name, kind', [
    ('x', 'PNG'), ('x.jfif', 'JPEG'), ('x.jpe', 'JPEG'), ('x.dib', 'BMP'), ('x.apng', 'PNG'), ('x.photo', 'WEBP'),
    ('x.JPG.1', 'JPEG'), ('x.txt', 'GIF'), ('IMG 7', 'TIFF')
])
def test_the_content_says_what_an_image_is(folder, name, kind):
    write(folder/'class1'/name, 66, format=kind)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split = data.image_folder(folder, size=8, channels=1)
    assert len(split.train) == 4 and 66 in split.train.images[:, 0, 4, 4].tolist()


def test_what_is_no_image_is_counted_and_named(folder):
    write(folder/'beside.png'), write(folder/'class1'/'deeper'/'0.png'), write(folder/'class1'/'.hidden.png')
    (folder/'class1'/'raw.heic').write_bytes(b'\0\0\0\x18ftypheic')
    (folder/'class1'/'notes').write_text('no image')
    (folder/'class1'/'gone').symlink_to(folder/'nowhere')
    (folder/'class1'/'circle').symlink_to(folder/'class1'/'circle')
    with pytest.warns(UserWarning, match='7 files or folders are not read as images and left out: beside') as said:
        assert len(data.image_folder(folder, size=8).train) == 3
    assert 'class1/.hidden.png, class1/circle, class1/deeper, class1/gone, ...' in str(said[0].message)


def test_a_broken_link_to_an_image_is_no_silence(folder):
    (folder/'class1'/'9.jpg').symlink_to(folder/'nowhere.jpg')
    with pytest.raises(ValueError, match='found 1 that are not: class1/9.jpg .no such file or directory.'):
        data.image_folder(folder, size=8)
    assert data.image_folder(folder, size=8, skip_unreadable=True).skipped == ('class1/9.jpg',)


def test_what_systems_put_everywhere_is_no_class(folder):
    for name in ('lost+found', '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', '__MACOSX', '.git'):
        (folder/name).mkdir()
    (folder/'class1'/'@eaDir').mkdir()
    (folder/'class1'/'Thumbs.db').write_bytes(b'x')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split = data.image_folder(folder, size=8)
    assert split.train.classes + split.test.classes == tuple(f'class{k}' for k in range(4))


def test_a_class_whose_name_begins_with_two_strokes_is_a_class(folder):
    write(folder/'__class'/'0.png')
    assert '__class' in data.image_folder(folder, size=8).train.classes


def test_empty_classes_and_deeper_folders_get_advice(folder, tmp_path):
    (folder/'empty').mkdir(), (folder/'void').mkdir()
    with pytest.raises(ValueError, match=r'found none in 2 of them .empty, void.; remove or fill it'):
        data.image_folder(folder, size=8)
    for side in ('train', 'val'):
        for name in 'ab': write(tmp_path/'split'/side/name/'0.png')
    with pytest.raises(ValueError, match='val holds folders: give .*split/val if they are the classes'):
        data.image_folder(tmp_path/'split', size=8)


def test_a_folder_that_cannot_be_read_is_one_sentence(folder, monkeypatch):
    real = data.os.scandir
    def scandir(path):
        if str(path).endswith('class2'): raise PermissionError(13, 'Permission denied')
        return real(path)
    monkeypatch.setattr(data.os, 'scandir', scandir)
    with pytest.raises(ValueError, match='class2 must be a folder that can be read, found: Permission denied'):
        data.image_folder(folder, size=8)


def test_class_names_that_look_alike_are_told_apart_and_said(folder):
    for name in ('class1 ', 'Class1', 'caf\u00e9', 'cafe\u0301'): write(folder/name/'0.png')
    with pytest.warns(UserWarning, match='3 classes differ from another only in case, blanks or the form of a letter'):
        split = data.image_folder(folder, size=8)
    assert len(split.train.classes + split.test.classes) == 8


def test_a_query_that_is_linked_into_the_gallery_is_refused(tmp_path):
    folder = side_folders(tmp_path/'set', train='ab', query='cd', gallery='cd')
    (folder/'gallery'/'c'/'link.png').symlink_to(folder/'query'/'c'/'0.png')
    with pytest.raises(ValueError, match='must hold different files, found 1 in both: query/c/0.png; a query would'):
        data.load(str(folder), size=8, channels=1)


CALTECH = Path(__file__).parents[2]/'shared'/'data'/'caltech101_mini'


@pytest.mark.skipif(not CALTECH.is_dir(), reason='needs the photographs of ../shared/data/caltech101_mini')
def test_photographs_in_class_folders():
    split = data.load(str(CALTECH), size=64, channels=3)
    assert (len(split.train), len(split.test), split.train.images.shape[1:]) == (360, 360, (3, 64, 64))
    assert len(split.train.classes) == len(split.test.classes) == 30 and not {*split.train.classes} & {
        *split.test.classes
    }
    # no blank image
    assert 40 < split.test.images.float().mean() < 215 and split.test.images.float().flatten(1).std(1).min() > 1
