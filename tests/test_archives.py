"""The sets from miniature archives in their real formats: reading, the cache of decoded images, checks, and what users
get wrong."""
import gzip, json, os, signal, struct, subprocess, sys, tarfile, time, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from robust_dml.data import archives, sets
from robust_dml.data.archives import QueryGallery, SETS, check, describe, read

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ('cub', 'cars', 'sop', 'inshop')
pytestmark = pytest.mark.filterwarnings('ignore:.*is not the published set')


# miniature archives: file names and formats of the real ones

def photo(path, value, mode='RGB', size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, quality=100)


def cub(root, classes=(1, 2, 101, 102), per_class=2):
    "Image numbers run against the order of the lines."
    folder = root/'CUB_200_2011'
    rows = [
        (k, c, f'{c:03d}.Some_Bird/Some_Bird_{k:04d}_{9000-k}.jpg')
        for k, c in enumerate((c for c in classes for _ in range(per_class)), 1)
    ]
    for k, c, file in rows: photo(folder/'images'/file, (c, 10*k, 0))
    for name, column in (('images', 2), ('image_class_labels', 1)):
        (folder/f'{name}.txt').write_text(''.join(f'{row[0]} {row[column]}\n' for row in reversed(rows)))
    (folder/'train_test_split.txt').write_text(''.join(f'{k} {k%2}\n' for k, *_ in rows))
    return folder


def cars(root, classes=(98, 1, 99, 196)):
    "The struct array of cars_annos.mat, not in the order of the paths."
    folder = root/'cars'
    fields = ('relative_im_path', 'bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'test')
    rows = [
        (f'car_ims/{k:06d}.jpg', 1, 2, 300, 200, c, k % 2)
        for k, c in zip((5, 6, 1, 2, 8, 7, 4, 3), np.repeat(classes, 2).tolist())
    ]
    for file, *_, c, _ in rows: photo(folder/file, (c, 0, 100))
    record = np.zeros((1, len(rows)), dtype=[(f, object) for f in fields])
    record[0] = rows
    names = np.array([[f'Make Model {k%2}' for k in range(1, 197)]], dtype=object)
    scipy.io.savemat(folder/'cars_annos.mat', dict(annotations=record, class_names=names))
    return folder


def sop(root, classes=((1, 2), (11319, 11320))):
    folder, k = root/'Stanford_Online_Products', 0
    for side, some in zip(('train', 'test'), classes):
        lines = ['image_id class_id super_class_id path']
        for c in some:
            for view in (0, 1):
                k += 1
                lines.append(f'{k} {c} 1 bicycle_final/{111085122871+c}_{view}.JPG')
                photo(folder/lines[-1].split()[-1], (k, c%256, 0))
        folder.mkdir(exist_ok=True)
        (folder/f'Ebay_{side}.txt').write_text('\r\n'.join(lines))
    return folder


def inshop(root, old=False, items=(1, 2, 7, 8)):
    "Query and gallery lines alternate; older copies have no folders Eval and Img."
    folder = root/('In-shop' if old else 'In-shop Clothes Retrieval Benchmark')
    rows = [
        (
            f'img/WOMEN/Dresses/id_{i:08d}/0{k}_1_front.jpg', f'id_{i:08d}',
            'train' if i < 3 else ('query', 'gallery')[k % 2]
        )
        for i in items
        for k in range(4)
    ]
    for k, (file, *_) in enumerate(rows): photo(folder/('' if old else 'Img')/file, (k, 0, 0))
    path = folder/('' if old else 'Eval')/'list_eval_partition.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'{len(rows)}\nimage_name item_id evaluation_status\n' + ''.join(f'{f:60} {i} {s}\n' for f, i, s in rows)
    )
    return folder


def idx(array):
    return (
        struct.pack('>HBB', 0, 8, array.ndim)
        + struct.pack(f'>{array.ndim}I', *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def mnist(root, name='MNIST', pack=True, classes=10):
    "30 training and 20 test images; image k has value k everywhere and class 7k mod 10."
    folder = root/name/'raw'
    folder.mkdir(parents=True)
    for stem, n in (('train', 30), ('t10k', 20)):
        images = np.arange(n).reshape(-1, 1, 1)*np.ones((1, 28, 28))
        for kind, array in (('images-idx3', images), ('labels-idx1', np.arange(n)*7%classes)):
            path, content = folder/f'{stem}-{kind}-ubyte', idx(array)
            if pack: path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(content))
            else: path.write_bytes(content)
    return folder


def fashion(root): return mnist(root, 'FashionMNIST')


def photographs(folder, names):
    "Small photographs, each of one colour, by path."
    for k, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (12, 10), (k % 256, 40, 90)).save(folder/name)


def grocery(root, products=43, lists=True):
    "A miniature GroceryStoreDataset, as its repository lays it out or as one list in In-Shop's form."
    home = root/'GroceryStoreDataset'/'dataset' if lists else root/'grocery'
    files = {
        part: [f'Fruit/P{p:02d}/P{p:02d}_{k}.jpg' for p in range(products) for k in range(2)]
        for part in ('train', 'val', 'test')
    }
    if lists:
        photographs(home, [f'{part}/{file}' for part, some in files.items() for file in some])
        for part, some in files.items():
            (home/f'{part}.txt').write_text(''.join(f'{part}/{file}, 1, 2\n' for file in some))
        (home/'classes.csv').write_text('Class Name (str),Class ID (int)\n')
        return home
    rows = sorted(
        (Path(file).parent.name, f'{part}_{Path(file).name}', part) for part, some in files.items() for file in some
    )
    photographs(home, [f'{product}/{file}' for product, file, _ in rows])
    side = lambda product, part: 'train' if product < 'P40' else 'query' if part == 'test' else 'gallery'
    text = ''.join(f'{product}/{file} {product} {side(product, part)}\n' for product, file, part in rows)
    (home/'list_eval_partition.txt').write_text(f'{len(rows)}\nimage_name item_id evaluation_status\n{text}')
    return home


MAKE = dict(cub=cub, cars=cars, sop=sop, inshop=inshop, grocery=grocery, mnist=mnist, fashion=fashion)


def small(name, root, **options):
    return read(
        name, root, **dict(dict(size=SETS[name].size if name in ('mnist', 'fashion') else 16, show=False), **options)
    )


@pytest.fixture
def no_decoding(monkeypatch):
    "From the call on, opening an image is an error."
    def refuse(*_, **__): raise AssertionError('an image was opened')
    return lambda: monkeypatch.setattr(archives, 'read_image', refuse)


# reading

@pytest.mark.parametrize('name', SETS)
def test_root_is_the_folder_or_its_parent(tmp_path, name):
    folder = MAKE[name](tmp_path)
    split = small(name, tmp_path)
    assert split.name == name and split.card() == small(name, folder).card() == small(name, str(folder)).card()
    assert type(split) is (QueryGallery if name in ('inshop', 'grocery') else sets.Split)


def test_cub_in_the_order_of_the_image_numbers(tmp_path):
    cub(tmp_path)
    split = small('cub', tmp_path)
    assert split.train.classes == ('001.Some_Bird', '002.Some_Bird') and split.test.classes == (
        '101.Some_Bird', '102.Some_Bird'
    )
    assert split.train.labels.tolist() == split.test.labels.tolist() == [0, 0, 1, 1]
    # JPEG
    assert torch.cat([split.train.images, split.test.images])[:, 1, 0, 0].tolist() == pytest.approx(
        [10 * k for k in range(1, 9)], abs=2
    )


def test_cars_sorted_by_path(tmp_path):
    cars(tmp_path)
    split = small('cars', tmp_path)
    assert split.train.classes == ('001 Make Model 1', '098 Make Model 0') and split.test.classes == (
        '099 Make Model 1', '196 Make Model 0'
    )
    # images 1, 2, 5, 6 and 3, 4, 7, 8
    assert split.train.labels.tolist() == [0, 0, 1, 1] and split.test.labels.tolist() == [1, 1, 0, 0]
    assert split.test.images[:, 0, 0, 0].tolist() == pytest.approx([196, 196, 99, 99], abs=2)


def test_sop_as_listed(tmp_path):
    sop(tmp_path)
    split = small('sop', tmp_path)
    assert split.train.classes == ('1', '2') and split.test.classes == ('11319', '11320')
    assert torch.cat([split.train.images, split.test.images])[:, 0, 8, 8].tolist() == pytest.approx(range(1, 9), abs=2)


@pytest.mark.parametrize('old', (False, True))
def test_inshop_queries_come_first(tmp_path, old):
    inshop(tmp_path, old)
    split = small('inshop', tmp_path)
    assert (split.queries, len(split.train), len(split.test)) == (4, 8, 8)
    assert split.test.images[:, 0, 0, 0].tolist() == pytest.approx([8, 10, 12, 14, 9, 11, 13, 15], abs=1)
    assert split.test.labels.tolist() == [0, 0, 1, 1]*2 and split.test.classes == ('id_00000007', 'id_00000008')
    card = split.card()
    assert (card['queries'], card['gallery'], card['search']) == (
        4, 4, 'queries and gallery apart: 4 queries, 4 gallery images'
    ) and card['checksum'] != sets.Split.card(split)['checksum']
    one = small('inshop', tmp_path, test_classes=1)
    assert (one.queries, one.test.classes) == (2, ('id_00000007',))


def test_a_broken_query_is_no_query(tmp_path):
    folder = inshop(tmp_path)
    (folder/'Img/img/WOMEN/Dresses/id_00000007/00_1_front.jpg').write_bytes(b'')
    split = small('inshop', tmp_path, skip_unreadable=True)
    assert (split.queries, len(split.test), split.test.labels.tolist()) == (3, 7, [0, 1, 1, 0, 0, 1, 1])
    assert split.skipped == ('Img/img/WOMEN/Dresses/id_00000007/00_1_front.jpg',)


@pytest.mark.parametrize('pack', (True, False))
def test_ten_classes_on_both_sides(tmp_path, pack):
    mnist(tmp_path, pack=pack)
    split = read('mnist', tmp_path)
    assert split.train.images.shape == (30, 1, 28, 28) and split.train.classes == split.test.classes == tuple(
        '0123456789'
    )
    assert split.train.images[:, 0, 0, 0].tolist() == list(range(30)) and split.train.labels.tolist() == [
        7 * k % 10 for k in range(30)
    ]
    few = read('mnist', tmp_path, train_classes=3, test_classes=2)
    assert few.train.classes == ('0', '1', '2') and few.test.images[:, 0, 0, 0].tolist() == [0, 3, 10, 13]
    assert read('mnist', tmp_path, size=32, channels=3).test.batch([19]).mul(255).unique().tolist() == [19.]


def test_fashion_names(tmp_path):
    fashion(tmp_path)
    assert read('fashion', tmp_path/'FashionMNIST').train.classes[::9] == ('T-shirt/top', 'Ankle boot')
    with pytest.raises(FileNotFoundError, match='mnist needs'): read('mnist', tmp_path/'FashionMNIST')


def test_the_other_ten_classes_are_recognised(tmp_path):
    "Full size and equally many of each class: Fashion-MNIST, whatever the folder is called."
    for stem in ('train', 't10k'):
        for kind, array in (('images-idx3', np.zeros((60000, 28, 28), np.uint8)), ('labels-idx1', np.arange(60000)%10)):
            (tmp_path/f'{stem}-{kind}-ubyte').write_bytes(idx(array))
    with pytest.raises(ValueError, match='must hold MNIST, .* found the other set of the two'):
        archives.listing('mnist', tmp_path)
    assert len(archives.listing('fashion', tmp_path).sides['train']) == 60000


@pytest.mark.parametrize('mode, value', [('L', 90), ('P', 3), ('CMYK', (10, 200, 30, 40)), ('RGB', (1, 2, 3))])
def test_every_mode_becomes_rgb_and_is_resized_exactly(tmp_path, mode, value):
    folder = cub(tmp_path)
    file = folder/'images/001.Some_Bird/Some_Bird_0001_8999.jpg'
    image = Image.fromarray(
        np.random.default_rng(0)
        .integers(0, 256, (33, 21, len(mode) if mode in ('RGB', 'CMYK') else 1), np.uint8)
        .squeeze(),
        'L' if mode == 'P' else mode,
    )
    with open(file, 'wb') as out:
        (image.quantize(16) if mode == 'P' else image).save(out, 'png' if mode == 'P' else 'jpeg')
    with Image.open(file) as again:
        expected = np.asarray(again.convert('RGB').resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(small('cub', tmp_path, size=24).train.images[0].permute(1, 2, 0).numpy(), expected)
    assert small('cub', tmp_path, channels=1).train.images.shape == (4, 1, 16, 16)


def test_options(tmp_path):
    cub(tmp_path, classes=(1, 2, 3, 101, 102, 103))
    split = small('cub', tmp_path, size=24, crop=20, train_classes=2, test_classes=1)
    assert (split.train.classes, split.test.classes, split.test.batch([0]).shape) == (
        ('001.Some_Bird', '002.Some_Bird'), ('101.Some_Bird',), (1, 3, 20, 20)
    )
    for options, message in (
        (dict(size=7), 'size must lie in'), (dict(channels=2), 'channels must be one of 1, 3'),
        (dict(crop=17), 'crop must lie in'), (dict(train_classes=0), 'train_classes must lie in')
    ):
        with pytest.raises(ValueError, match=message): small('cub', tmp_path, **options)
    with pytest.raises(ValueError, match="dataset must be one of 'cub', .*, found 'birds'"): read('birds', tmp_path)


def test_a_smaller_set_is_never_read_in_silence(tmp_path):
    cub(tmp_path)
    with pytest.warns(
        UserWarning, match='train has 4 images of 2 classes instead of 5864 of 100; train lacks the classes 3, 4'
    ):
        small('cub', tmp_path)


def test_published_counts():
    assert {name: tuple(about.counts.values()) for name, about in SETS.items()} == dict(
        cub=((5864, 100), (5924, 100)), cars=((8054, 98), (8131, 98)), sop=((59551, 11318), (60502, 11316)),
        inshop=((25882, 3997), (14218, 3985), (12612, 3985)), grocery=((2493, 40), (1371, 41), (1557, 41)),
        mnist=((60000, 10), (10000, 10)), fashion=((60000, 10), (10000, 10))
    )
    for name in ('cub', 'cars', 'sop'):
        assert [high - low + 1 for low, high in SETS[name].ranges.values()] == [
            classes for _, classes in SETS[name].counts.values()
        ]
    assert sum(images for images, _ in SETS['inshop'].counts.values()) == 52712


# the cache

def cache_of(folder):
    "The first cache of a set."
    return next(archives.cache_folder(cache_name(folder), folder).glob('*.npy'))


def cache_name(folder): return next(name for name in SETS if archives.locate(name, folder))


def caches(folder):
    "The names of the files in the cache of a set, without its hashes."
    return sorted(p.name for p in archives.cache_folder(cache_name(folder), folder).iterdir() if p.suffix != '.json')


@pytest.mark.parametrize('name', PHOTOS)
def test_a_second_start_opens_no_image(tmp_path, name, no_decoding, capsys):
    folder = MAKE[name](tmp_path)
    card = small(name, tmp_path).card()
    no_decoding()
    split = small(name, tmp_path)
    assert split.card() == card and capsys.readouterr().out == ''
    assert cache_of(folder).name == f'{name}-16-rgb.npy' and np.array_equal(
        np.load(cache_of(folder))[: len(split.train)], split.train.images.numpy()
    )


def test_images_are_a_map_of_the_file_without_a_copy(tmp_path):
    folder = cub(tmp_path)
    split = small('cub', tmp_path)
    assert (
        split.train.images.dtype == torch.uint8
        and split.test.images.data_ptr() == split.train.images.data_ptr() + split.train.images.nbytes
    )
    if not Path('/proc/self/maps').is_file(): return
    maps = [
        line.split()
        for line in Path('/proc/self/maps').read_text().splitlines()
        if line.endswith(str(cache_of(folder).resolve()))
    ]
    inside = [
        mode
        for span, mode, *_ in maps
        if int(span.split('-')[0], 16) <= split.train.images.data_ptr() < int(span.split('-')[1], 16)
    ]
    assert inside == ['r--s']


def test_a_cut_cache_is_made_anew(tmp_path, capsys):
    folder = cub(tmp_path)
    card, path = small('cub', tmp_path).card(), cache_of(folder)
    whole = path.read_bytes()
    for length in (0, 50, 128, len(whole)//2, len(whole)-300, len(whole)-1):
        path.write_bytes(whole[:length])
        assert small('cub', tmp_path).card() == card and path.read_bytes() == whole
        assert capsys.readouterr().out == 'The cache cub-16-rgb.npy is cut or damaged and is made anew.\n'


def test_other_contents_make_another_cache(tmp_path, capsys, monkeypatch):
    folder = cub(tmp_path)
    file = folder/'images/001.Some_Bird/Some_Bird_0001_8999.jpg'
    small('cub', tmp_path)
    with monkeypatch.context() as m:
        m.setattr(archives, 'FORMAT', 0)
        small('cub', tmp_path)
    small('cub', tmp_path)
    assert capsys.readouterr().out.count('was written by another version and is made anew.\n') == 2
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns+1))
    small('cub', tmp_path)
    assert not capsys.readouterr().out                          # another time, the same content
    file.write_bytes(file.read_bytes()+b' ')
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns+1))
    small('cub', tmp_path)
    assert capsys.readouterr().out.count('was made of other files and is made anew.\n') == 1
    small('cub', tmp_path, size=17), small('cub', tmp_path, channels=1), small('cub', tmp_path, test_classes=1)
    names = ['cub-16-grey.npy', 'cub-16-rgb-all-1.npy', 'cub-16-rgb.npy', 'cub-17-rgb.npy']
    assert caches(folder) == names and not capsys.readouterr().out


def test_rows_keep_their_order_with_several_threads(tmp_path, monkeypatch):
    cub(tmp_path)
    alone = small('cub', tmp_path, cache=tmp_path/'a')
    def slow(path, **options):
        time.sleep(.002*(8-int(Path(path).stem.split('_')[2])))
        return plain(path, **options)
    plain = archives.decode
    monkeypatch.setattr(archives, 'decode', slow)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    assert small('cub', tmp_path, cache=tmp_path/'b').card() == alone.card()


KILLED = '''
import sys, time
from robust_dml.data import archives
plain = archives.decode
def slow(path, **options):
    if '0007' in str(path): open(sys.argv[1]+'/seventh', 'w').close(); time.sleep(60)
    return plain(path, **options)
archives.decode = slow
archives.read('cub', sys.argv[1], size=16, show=False)
'''


def test_a_killed_run_leaves_no_cache(tmp_path):
    folder = cub(tmp_path)
    run = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', KILLED, str(tmp_path)], env=os.environ | {'OMP_NUM_THREADS': '1'}
    )
    end = time.monotonic()+60
    while not (tmp_path/'seventh').exists() and run.poll() is None and time.monotonic() < end: time.sleep(.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    left, = archives.cache_folder('cub', folder).iterdir()
    # it might be another run's
    assert left.suffix == '.part' and small('cub', tmp_path).card()['test']['images'] == 4 and left.exists()
    os.utime(left, (0, 0))
    small('cub', tmp_path)
    assert caches(folder) == ['cub-16-rgb.npy']


def test_an_error_while_decoding_leaves_nothing(tmp_path, monkeypatch):
    folder = cub(tmp_path)
    def fail(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(archives, 'read_image', fail)
    with pytest.raises(KeyboardInterrupt): small('cub', tmp_path)
    assert not caches(folder)


def test_a_cache_appears_whole_and_at_once(tmp_path, monkeypatch):
    folder = cub(tmp_path)
    plain, seen = os.replace, []
    def replace(part, path):
        if Path(path).suffix == '.npy': seen.append((Path(path).exists(), np.load(part).shape))
        plain(part, path)
    monkeypatch.setattr(os, 'replace', replace)
    small('cub', tmp_path)
    assert seen == [(False, (8, 3, 16, 16))]
    def fail(*_): raise OSError('disk gone')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk gone'): small('cub', tmp_path, size=17)
    assert caches(folder) == ['cub-16-rgb.npy']


def test_a_cache_of_another_transform_under_the_same_name(tmp_path):
    there, _ = archives.missing(cub(tmp_path), ['images/001.Some_Bird/Some_Bird_0001_8999.jpg'])
    for size, channels in ((16, 3), (17, 3), (17, 1)):
        images, _ = archives.decoded(
            tmp_path / 'c.npy', tmp_path / 'CUB_200_2011', there, size=size, channels=channels, show=False
        )
        assert images.shape == (1, channels, size, size)


def test_where_the_cache_goes(tmp_path, monkeypatch):
    "To the user's cache, never beside the images, which are left as they are."
    folder = cub(tmp_path)
    before = sorted(folder.rglob('*'))
    small('cub', tmp_path, cache=tmp_path/'mine'/'deep')
    assert 'cub-16-rgb.npy' in [p.name for p in (tmp_path/'mine'/'deep').iterdir()]
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    small('cub', tmp_path)
    found, = (tmp_path/'xdg'/'robust_dml').iterdir()
    assert found.name.startswith('cub-') and 'cub-16-rgb.npy' in [p.name for p in found.iterdir()]
    assert sorted(folder.rglob('*')) == before
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    for said in (None, '', 'relative/path'):
        monkeypatch.delenv('XDG_CACHE_HOME') if said is None else monkeypatch.setenv('XDG_CACHE_HOME', said)
        assert archives.cache_folder('cub', folder).parent == tmp_path/'home'/'.cache'/'robust_dml'


def test_without_a_cache_that_can_be_written_images_go_to_a_passing_folder(tmp_path):
    "A home that is a file: nothing can be made in it, by root neither."
    cub(tmp_path)
    (tmp_path/'home').write_text('no folder')
    code = """
from robust_dml.data import archives
split = archives.read('cub', r'%s', size=16, show=False)
print(archives.user_cache(), split.train.images.sum().item() > 0)
""" % tmp_path
    environment = {**os.environ, 'HOME': str(tmp_path/'home'), 'XDG_CACHE_HOME': '', 'TMPDIR': str(tmp_path)}
    def run(): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=environment, capture_output=True,
                                     text=True)
    done = run()
    assert done.returncode == 0 and 'No cache of yours can be written, so decoded images go to' in done.stdout
    place, seen = done.stdout.splitlines()[-1].split()
    assert Path(place).parent == tmp_path and seen == 'True' and not Path(place).exists()
    environment['TMPDIR'] = environment['TEMP'] = environment['TMP'] = str(tmp_path/'home')
    real = "import tempfile; tempfile._candidate_tempdir_list = lambda: [r'%s']" % (tmp_path/'home')
    code = f'{real}\n{code}'
    assert 'decoded images need a folder, found none that can be written' in run().stderr.splitlines()[-1]


def exchange(one, two):
    "The contents of two files, with sizes and times as they were."
    times = [(p.stat().st_atime_ns, p.stat().st_mtime_ns) for p in (one, two)]
    first, second = one.read_bytes(), two.read_bytes()
    longer = max(len(first), len(second))
    for p, content, ns in zip((one, two), (second, first), times):
        p.write_bytes(content.ljust(longer, b'\0'))
        os.utime(p, ns=ns)


@pytest.mark.parametrize('how', ('contents', 'names'))
def test_files_exchanged_with_equal_sizes_and_times_are_noticed(tmp_path, how, monkeypatch):
    monkeypatch.setattr(archives, '_SETTLED', 0)                # so that the hashes are remembered at once
    folder = cub(tmp_path)
    one, two = (next(folder.glob(f'images/{c}.Some_Bird/*')) for c in ('001', '101'))
    exchange(one, two), exchange(one, two)                      # of one length from here on
    os.utime(one, ns=(0, 0)), os.utime(two, ns=(0, 0))
    before = small('cub', tmp_path).train.images.clone()
    assert json.loads(next(cache_of(folder).parent.glob('hashes-*.json')).read_text())
    if how == 'contents': exchange(one, two)
    else: one.rename(tmp_path/'x'), two.rename(one), (tmp_path/'x').rename(two)
    after = small('cub', tmp_path).train.images
    assert not torch.equal(before, after)
    assert torch.equal(after, small('cub', tmp_path, cache=tmp_path/'fresh').train.images)


def test_a_file_changed_a_moment_ago_is_read_again(tmp_path):
    folder = cub(tmp_path)
    small('cub', tmp_path)
    path = archives.cache_folder('cub', folder)
    assert not list(path.glob('hashes-*.json'))


def test_a_cache_that_came_with_the_images_is_not_believed(tmp_path, monkeypatch):
    "Neither where caches once lay, nor without the hash of its pixels in a folder that the user names."
    folder = cub(tmp_path)
    true = small('cub', tmp_path, cache=tmp_path/'mine').train.images.clone()
    path = tmp_path/'mine'/'cub-16-rgb.npy'
    whole = path.read_bytes()
    false = bytearray(whole)
    false[128:128+3*256] = bytes(3*256)
    (folder/'.robust_dml-cache').mkdir()
    (folder/'.robust_dml-cache'/'cub-16-rgb.npy').write_bytes(false)
    assert torch.equal(small('cub', tmp_path).train.images, true)
    at = false.rindex(b'{"format"')
    end = {k: v for k, v in json.loads(false[at:]).items() if k != 'sha256'}
    path.write_bytes(bytes(false[:at]) + json.dumps(end).encode())
    assert torch.equal(small('cub', tmp_path, cache=tmp_path/'mine').train.images, true)


def test_a_planted_link_is_not_written_through(tmp_path):
    folder = cub(tmp_path)
    victim, elsewhere = tmp_path/'victim', tmp_path/'elsewhere'
    victim.write_text('keep'), elsewhere.mkdir()
    (folder/'.robust_dml-cache').symlink_to(elsewhere)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'cub-16-rgb.npy').symlink_to(victim)
    small('cub', tmp_path, cache=tmp_path/'mine'), small('cub', tmp_path)
    assert victim.read_text() == 'keep' and not list(elsewhere.iterdir())
    assert not (tmp_path/'mine'/'cub-16-rgb.npy').is_symlink()


def test_an_image_listed_twice_is_one_sentence(tmp_path):
    folder = cub(tmp_path)
    there, _ = archives.missing(folder, [str(next(folder.glob('images/*/*')).relative_to(folder))]*2)
    with pytest.raises(ValueError, match='each image must be listed once, found images/.*jpg twice; remove a line'):
        archives.decoded(tmp_path/'c.npy', folder, there, size=8, channels=1, show=False)


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    cub(tmp_path)
    monkeypatch.setattr(archives.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(OSError, match='decoded images take 0.0 GiB .* set cache to another folder .* XDG_CACHE_HOME'):
        small('cub', tmp_path)


# broken images

def test_broken_images(tmp_path, no_decoding, monkeypatch):
    folder = cub(tmp_path)
    cut, page = (folder/f'images/{c:03d}.Some_Bird/Some_Bird_{k:04d}_{9000-k}.jpg' for c, k in ((1, 2), (102, 8)))
    cut.write_bytes(cut.read_bytes()[:200])
    page.write_text('<html>')
    with pytest.raises(
        ValueError,
        match=(
            r'all 8 images of cub must be readable, found 2 that are not: images/001.*0002.*, images/102.*0008.* \(not'
            r' an image\); .*skip_unreadable=True'
        ),
    ):
        small('cub', tmp_path)
    split = small('cub', tmp_path, skip_unreadable=True)
    assert (
        split.skipped == (str(cut.relative_to(folder)), str(page.relative_to(folder))) == tuple(split.card()['skipped'])
    )
    assert (split.train.labels.tolist(), split.test.labels.tolist(), len(split.test)) == ([0, 1, 1], [0, 0, 1], 3)
    assert split.train.images[:, 1, 0, 0].tolist() == pytest.approx([10, 30, 40], abs=2)
    opened = []
    plain = archives.decode
    monkeypatch.setattr(
        archives, 'decode', lambda path, **options: opened.append(Path(path)) or plain(path, **options)
    )
    small('cub', tmp_path, skip_unreadable=True)
    assert opened == [cut, page]                                # tried again, and none of the good ones


def test_an_image_that_was_unreadable_once_is_not_lost(tmp_path, monkeypatch, capsys):
    cub(tmp_path)
    def flaky(path, **options):
        if '_0003_' in str(path): raise OSError('Input/output error')
        return plain(path, **options)
    plain = archives.decode
    with monkeypatch.context() as m:
        m.setattr(archives, 'decode', flaky)
        with pytest.raises(ValueError, match='found 1 .*Input/output error'): small('cub', tmp_path)
    assert small('cub', tmp_path).skipped == () and 'lacks images that can be read now' in capsys.readouterr().out


def test_a_side_without_any_readable_image(tmp_path):
    folder = cub(tmp_path)
    for file in folder.glob('images/10*/*'): file.write_bytes(b'')
    with pytest.raises(ValueError, match='each side of a split needs a readable image'):
        small('cub', tmp_path, skip_unreadable=True)
    for file in folder.glob('images/*/*'): file.write_bytes(b'')
    with pytest.raises(ValueError, match='each side of a split needs a readable image'):
        small('cub', tmp_path, skip_unreadable=True)


def test_huge_images_count_as_broken(tmp_path, monkeypatch):
    "The warning of Pillow is an error in every thread, and is as before afterwards."
    cub(tmp_path, per_class=4)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    before = list(archives.warnings.filters)
    with pytest.raises(ValueError, match='found 16 that are not: .*exceeds limit'): small('cub', tmp_path)
    assert archives.warnings.filters == before


def test_the_warning_of_pillow_is_an_error_before_a_thread_asks_for_it(tmp_path, monkeypatch):
    "Threads that set and restore filters at the same time may undo each other's."
    cub(tmp_path)
    monkeypatch.setattr(
        archives, 'read_image',
        lambda path, **options: archives.warnings.warn('too large', Image.DecompressionBombWarning)
    )
    with pytest.raises(ValueError, match=r'found 8 that are not: .*\(too large\)'): small('cub', tmp_path)


# what users get wrong

def write(path, text): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
def edit(path, old, new): assert old in path.read_text(); path.write_text(path.read_text().replace(old, new, 1))
def drop(folder, pattern): [file.unlink() for file in folder.glob(pattern)]

def mat(folder, **variables): scipy.io.savemat(folder/'cars_annos.mat', variables)
def kit(folder): # cars_train_annos.mat of the development kit
    record = np.zeros(
        (1, 1), dtype=[(f, object) for f in ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')]
    )
    record[0, 0] = (1, 2, 3, 4, 14, '00001.jpg')
    mat(folder, annotations=record)


WRONG = {
    'empty list': (
        'cub', lambda f: write(f / 'images.txt', ''), ValueError,
        'images.txt must list images, found an empty list; unpack the archive again'
    ),
    'empty product list': (
        'sop', lambda f: write(f / 'Ebay_test.txt', 'image_id class_id super_class_id path\n'), ValueError,
        'Ebay_test.txt must list images, found an empty list'
    ),
    'blank line for a header': (
        'sop', lambda f: edit(f / 'Ebay_train.txt', 'image_id class_id super_class_id path\n1 1', '\n1 22222'),
        ValueError, 'from 1 to 11318, found 22222'
    ),
    'list without header': (
        'sop', lambda f: edit(f / 'Ebay_train.txt', 'image_id class_id super_class_id path\n', ''), ValueError,
        'line 1 of .*Ebay_train.txt must name the columns, found .1 1 1 bicycle_final'
    ),
    'page for a list': (
        'cub', lambda f: write(f / 'image_class_labels.txt', '<!DOCTYPE html>\n<html>'), ValueError,
        'image_class_labels.txt must be a list of images, found an HTML page'
    ),
    'cut line': (
        'sop', lambda f: edit(f / 'Ebay_test.txt', ' 1 bicycle_final/111085134191_1.JPG', ''), ValueError,
        (
            "each line of .*Ebay_test.txt must hold number, number, number, text, found '8 11320'; unpack the archive"
            " again"
        ),
    ),
    'cut list': (
        'cub', lambda f: write(f / 'image_class_labels.txt', '1 1\n2 1\n'), ValueError,
        'must list the same images, found 8, 2 and 8'
    ),
    'lists of two versions': (
        'cub', lambda f: edit(f / 'image_class_labels.txt', '3 2\n', '3 1\n'), ValueError,
        'found class 1 for 002.Some_Bird/Some_Bird_0003'
    ),
    'absent list': (
        'cub', lambda f: (f / 'images.txt').unlink(), FileNotFoundError,
        'CUB_200_2011 must hold images.txt, found no such file; unpack'
    ),
    'absent mat': (
        'cars', lambda f: (f / 'cars_annos.mat').unlink(), FileNotFoundError,
        'cars must hold cars_annos.mat, found no such file; download it from https://ai.stanford.edu'
    ),
    'class out of range': (
        'sop', lambda f: edit(f / 'Ebay_test.txt', ' 11320 ', ' 22635 '), ValueError,
        'Ebay_test.txt in .* must number the test classes from 11319 to 22634, found 22635;'
    ),
    'train class in the test list': (
        'sop', lambda f: edit(f / 'Ebay_test.txt', ' 11320 ', ' 2 '), ValueError, 'from 11319 to 22634, found 2;'
    ),
    'no test classes': (
        'cars', lambda f: cars(f.parent, (1, 2, 3, 4)), ValueError,
        'must list images for train, test, found none for test'
    ),
    'car 197': (
        'cars', lambda f: cars(f.parent, (1, 2, 99, 197)), ValueError,
        'must number the test classes from 99 to 196, found 197'
    ),
    'item on both sides': (
        'inshop', lambda f: edit(f / 'Eval/list_eval_partition.txt', 'id_00000007 query', 'id_00000001 query'),
        ValueError, 'no class both to train and to test on, found 1: id_00000001'
    ),
    'cut partition': (
        'inshop', lambda f: edit(f / 'Eval/list_eval_partition.txt', '16', '52712'), ValueError,
        'as many images as its first line says, 52712, found 16'
    ),
    'strange status': (
        'inshop', lambda f: edit(f / 'Eval/list_eval_partition.txt', 'gallery', 'galery'), ValueError,
        "train, query or gallery, found 'galery' for img/WOMEN"
    ),
    'no mat file': (
        'cars', lambda f: write(f / 'cars_annos.mat', '<html>'), ValueError,
        'cars_annos.mat must be a MATLAB file, found one that cannot be read'
    ),
    'cut mat file': (
        'cars', lambda f: (f / 'cars_annos.mat').write_bytes((f / 'cars_annos.mat').read_bytes()[:900]), ValueError,
        'cars_annos.mat must be a MATLAB file, found one that cannot be read'
    ),
    'empty mat file': (
        'cars', lambda f: write(f / 'cars_annos.mat', ''), ValueError,
        'cars_annos.mat must be a MATLAB file, found one that cannot be read'
    ),
    'mat of the kit': (
        'cars', kit, ValueError,
        (
            'relative_im_path and class, found bbox_x1, .*, class, fname; take cars_annos.mat, not a file of the'
            ' development kit'
        ),
    ),
    'mat of names': (
        'cars', lambda f: mat(f, class_names=['a', 'b']), ValueError, 'relative_im_path and class, found class_names;'
    ),
    'missing images': (
        'sop', lambda f: drop(f, 'bicycle_final/*_1.JPG'), FileNotFoundError,
        (
            'must hold 8 listed images of sop, found 4 missing: bicycle_final/111085122872_1.JPG, .*; download'
            ' Stanford_Online_Products.zip'
        ),
    ),
    'no images at all': (
        'inshop', lambda f: drop(f, 'Img/img/*/*/*/*'), FileNotFoundError,
        'must hold 16 listed images of inshop, found 16 missing: Img/img/WOMEN/Dresses/id_00000001/00_1_front.jpg, '
    ),
    'cut idx': (
        'mnist',
        lambda f: (f / 't10k-images-idx3-ubyte.gz').write_bytes((f / 't10k-images-idx3-ubyte.gz').read_bytes()[:-9]),
        ValueError,
        (
            't10k-images-idx3-ubyte.gz must be a whole gzip file, found one that is cut or damaged; delete it and'
            ' download it again'
        ),
    ),
    'page for idx': (
        'fashion', lambda f: write(f / 'train-labels-idx1-ubyte.gz', '<html>'), ValueError,
        'found one that is an HTML page and no archive; delete it'
    ),
    'cut unpacked idx': (
        'mnist',
        lambda f: (
            (f / 'train-images-idx3-ubyte').write_bytes(
                gzip.decompress((f / 'train-images-idx3-ubyte.gz').read_bytes())[:-1]
            ),
            (f / 'train-images-idx3-ubyte.gz').unlink(),
        ),
        ValueError,
        'as many as its header says, found 23535 bytes beginning with 00000803',
    ),
    'images for labels': (
        'mnist',
        lambda f: (f / 'train-labels-idx1-ubyte.gz').write_bytes((f / 'train-images-idx3-ubyte.gz').read_bytes()),
        ValueError, 'IDX file of bytes in 1 dimensions'
    ),
    'labels of the other side': (
        'mnist',
        lambda f: (f / 'train-labels-idx1-ubyte.gz').write_bytes((f / 't10k-labels-idx1-ubyte.gz').read_bytes()),
        ValueError, r'a label for each image of 28 x 28 pixels, found images \(30, 28, 28\) and 20 labels of train'
    ),
    'absent idx': (
        'mnist', lambda f: (f / 't10k-labels-idx1-ubyte.gz').unlink(), FileNotFoundError,
        'must hold t10k-labels-idx1-ubyte.gz, found no such file'
    ),
    'label 10': (
        'mnist', lambda f: (f / 'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(idx(np.arange(30) % 11))),
        ValueError, 'must number the train classes from 0 to 9, found 10'
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_files_give_one_sentence(tmp_path, case):
    name, spoil, error, message = WRONG[case]
    spoil(MAKE[name](tmp_path))
    with pytest.raises(error, match=message) as told: small(name, tmp_path)
    assert '\n' not in str(told.value)
    report = check(name, tmp_path)
    assert not report['complete'] and (
        report['problem'] == str(told.value) or report['missing'] and 'listed images are missing' in report['problem']
    )
    assert json.loads(json.dumps(report)) == report


def test_wrong_nesting_names_the_folder(tmp_path):
    folder = cub(tmp_path/'sets'/'unpacked'/'CUB_200_2011')
    for root in (tmp_path, tmp_path/'sets', folder.parent.parent, folder/'images'):
        with pytest.raises(
            FileNotFoundError, match='cub needs images.txt in .* found the files in .*; set root to '
        ) as told:
            small('cub', root)
        assert str(told.value).endswith(f'set root to {folder}')
    with pytest.raises(
        FileNotFoundError, match='found no folder .*nowhere; set root to the folder that holds CUB_200_2011'
    ):
        small('cub', tmp_path/'nowhere')


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda path: tar(path), 'unpack .*CUB_200_2011.tgz again, all of it'),
        (
            lambda path: path.write_bytes(tar(path).read_bytes()[:-20]),
            'CUB_200_2011.tgz is cut or damaged: download it again from https://data.caltech.edu'
        ),
        (
            lambda path: path.write_text('\n <!doctype html>'),
            'CUB_200_2011.tgz is an HTML page and no archive: download it again'
        ),
        (
            lambda path: path.write_bytes(b'\xef\xbb\xbf<html>'),
            'CUB_200_2011.tgz is an HTML page and no archive: download it again'
        ),
        (
            lambda path: path.with_suffix('.tar').write_bytes(gzip.decompress(tar(path).read_bytes())[:700])
            and path.unlink(),
            'CUB_200_2011.tar is cut or damaged',
        ),
    ],
    ids=('whole', 'cut', 'page', 'page with a mark', 'cut tar'),
)
@pytest.mark.parametrize('half', (False, True))
def test_an_archive_beside(tmp_path, make, message, half):
    "Before anything was unpacked, and when images are missing."
    make(tmp_path/'CUB_200_2011.tgz')
    if half: drop(cub(tmp_path), 'images/102*/*')
    with pytest.raises(FileNotFoundError, match=message): small('cub', tmp_path)


def tar(path):
    with tarfile.open(path, 'w:gz') as archive: archive.add(__file__)
    return path


def test_a_cut_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'Stanford_Online_Products.zip', 'w') as archive: archive.write(__file__)
    assert archives.state(tmp_path/'Stanford_Online_Products.zip') == 'whole'
    (tmp_path/'Stanford_Online_Products.zip').write_bytes((tmp_path/'Stanford_Online_Products.zip').read_bytes()[:-30])
    with pytest.raises(FileNotFoundError, match='Stanford_Online_Products.zip is cut or damaged: download it again'):
        small('sop', tmp_path)


@pytest.mark.parametrize('compress', (False, True))
def test_the_matlab_reader_against_scipy(tmp_path, compress):
    cars(tmp_path)
    path = tmp_path/'cars'/'cars_annos.mat'
    whole = scipy.io.loadmat(path)
    scipy.io.savemat(
        path,
        {key: whole[key] for key in ('class_names', 'annotations')}
        | dict(more=np.arange(6.0).reshape(2, 3), empty=np.zeros((0, 0)), text='größer', flag=np.array([True])),
        do_compression=compress,
    )
    found, plain = archives._mat(path), scipy.io.loadmat(path, squeeze_me=True)
    assert {*found} == {key for key in plain if key[0] != '_'}
    assert found['annotations']['relative_im_path'] == plain['annotations']['relative_im_path'].tolist()
    for field in ('class', 'bbox_x1', 'test'):
        assert [v.item() for v in found['annotations'][field]] == plain['annotations'][field].tolist()
    assert found['class_names'] == plain['class_names'].tolist() and found['text'] == plain['text']
    assert (
        found['more'].tolist() == plain['more'].flatten(order='F').tolist()
        and found['empty'].size == 0
        and found['flag'] == [1]
    )


# checks

@pytest.fixture
def published(monkeypatch):
    "The miniature is the published set."
    for name, counts, ranges in (
        ('cub', dict(train=(4, 2), test=(4, 2)), dict(train=(1, 2), test=(101, 102))),
        ('inshop', dict(train=(8, 2), query=(4, 2), gallery=(4, 2)), {}),
        ('mnist', dict(train=(30, 10), test=(20, 10)), None)
    ):
        monkeypatch.setitem(
            SETS, name, replace(SETS[name], counts=counts, **({} if ranges is None else dict(ranges=ranges)))
        )


@pytest.mark.parametrize('name', ('cub', 'inshop', 'mnist'))
def test_check_of_a_whole_set(tmp_path, name, published, no_decoding):
    MAKE[name](tmp_path)
    report = check(name, tmp_path)
    assert (
        report['complete']
        and not (report['differences'] or report['missing'] or report['problem'])
        and report['unreadable'] == ({} if name == 'mnist' else None)
    )
    full = check(name, tmp_path, size=28, full=True, show=False)
    assert full == dict(report, unreadable={}) and describe(full).endswith(f'{name}: complete')
    no_decoding()
    small(name, tmp_path, size=28)                              # the check has filled the cache


def test_check_names_what_is_wrong(tmp_path, published):
    folder = cub(tmp_path, classes=(1, 101, 102))
    broken = next(folder.glob('images/101*/*'))
    broken.write_bytes(b'')
    report = check('cub', tmp_path, size=16, full=True, show=False)
    assert (
        report['sides']
        == dict(train=dict(images=2, classes=1, first=1, last=1), test=dict(images=4, classes=2, first=101, last=102))
        and not report['complete']
    )
    assert report['differences'] == ['train has 2 images of 1 classes instead of 4 of 2', 'train lacks the classes 2']
    assert report['unreadable'] == {
        str(broken.relative_to(folder)): 'not an image'
    } and f'{broken.relative_to(folder)}: not an image' in describe(report)
    drop(folder, 'images/102*/*')
    report = check('cub', tmp_path, full=True)
    assert (
        [f.split('/')[1] for f in report['missing']] == ['102.Some_Bird'] * 2
        and report['unreadable'] is None
        and 'missing: 2 files: images/102' in describe(report)
    )


def test_one_broken_image_is_not_complete(tmp_path, published):
    folder = cub(tmp_path)
    next(folder.glob('images/101*/*')).write_bytes(b'')
    assert check('cub', tmp_path)['complete'] and describe(check('cub', tmp_path)).endswith('cub: all files are there')
    assert not check('cub', tmp_path, full=True, show=False)['complete']


def test_check_of_queries_without_gallery(tmp_path, published):
    folder = inshop(tmp_path)
    path = folder/'Eval/list_eval_partition.txt'
    path.write_text(path.read_text().replace('id_00000007 gallery', 'id_00000008 gallery'))
    assert '1 items have a query and nothing in the gallery: id_00000007' in check('inshop', tmp_path)['differences']


def test_check_of_nothing(tmp_path):
    report = check('fashion', tmp_path)
    assert (report['folder'], report['sides'], report['complete']) == (None, {}, False)
    text = describe(report)
    assert (
        f"torchvision.datasets.FashionMNIST('{tmp_path}', download=True)" in text
        and f'{tmp_path}/FashionMNIST/raw/t10k-labels-idx1-ubyte.gz' in text
        and text.endswith('fashion: no files')
    )


@pytest.mark.parametrize('name', SETS)
def test_the_layout_of_the_instructions_is_the_one_that_is_read(tmp_path, name):
    "A file that the instructions name is recognised where they put it."
    path = [Path(line.strip()) for line in archives.instructions(name, tmp_path).splitlines() if line.startswith('  ')]
    assert path[0].is_relative_to(tmp_path)
    for file in path: (file.parent.mkdir(parents=True, exist_ok=True), '*' in file.name or file.touch())
    assert archives.locate(name, tmp_path) is not None


# by name

def test_load_takes_sets_folders_and_everything_else(tmp_path):
    cub(tmp_path)
    assert archives.load('cub', root=tmp_path, size=16, channels=3, seed=3).card() == small('cub', tmp_path).card()
    for c in 'ab': photo(tmp_path/'cars'/c/'0.png', 0)
    # a folder of class folders
    assert archives.load('cars', root=tmp_path, size=16, channels=3).train.classes == ('a',)
    cars(tmp_path)
    assert archives.load('cars', root=tmp_path, size=16, channels=3).name == 'cars' and archives.is_archive(
        'cars', tmp_path
    )
    with pytest.raises(ValueError, match='omniglot needs root'): archives.load('omniglot')
    with pytest.raises(FileNotFoundError, match='sop needs'): archives.load('sop', root=tmp_path)
    with pytest.raises(
        ValueError, match='must be a folder of class folders, found the files of cub; set dataset to cub and root to'
    ):
        archives.load('CUB_200_2011', root=tmp_path, size=16)
    with pytest.raises(ValueError, match='found .glyph.'): archives.load('glyph')


def test_sets_are_as_other_sets(tmp_path):
    "Training batches and the end of a run: what comes from a map is copied when asked for."
    cub(tmp_path)
    split = small('cub', tmp_path, crop=12)
    x, label = next(
        iter(sets.training_batches(split.train, [torch.tensor([3, 0])], gen=torch.Generator().manual_seed(0)))
    )
    assert x.shape == (2, 3, 12, 12) and label.tolist() == [1, 0]
    split.train.pixels([0]).fill_(0)
    assert split.train.pixels([0]).max() > 0


def test_run_notebook(tmp_path):
    MAKE['mnist'](tmp_path)
    def papermill(*arguments):
        return subprocess.run(
            [Path(sys.executable).parent / 'papermill', ROOT / 'nbs' / 'run_data.ipynb', *arguments], cwd=tmp_path,
            env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    done = papermill('-p', 'dataset', 'mnist', '-p', 'root', str(tmp_path))
    assert (
        done.returncode == 0 and 'train: 30 images of 10 classes, 0 to 9 (published: 60000 of 10)' in done.stdout
    ), done.stderr[-2000:]


def test_parameters_of_the_run_notebook():
    cells = json.loads((ROOT/'nbs'/'run_data.ipynb').read_text(encoding='utf-8'))['cells']
    cell, = (c for c in cells if 'parameters' in c['metadata'].get('tags', []))
    names = {}
    exec(''.join(cell['source']), {}, names)
    assert names == archives.PARAMETERS


def test_grocery_is_split_alike_from_both_forms(tmp_path):
    with pytest.warns(UserWarning, match='not the published set'):
        first, second = (
            read('grocery', grocery(tmp_path / str(form), lists=form).parent, size=8) for form in (True, False)
        )
    assert isinstance(first, QueryGallery) and first.queries == second.queries == 3*2
    assert first.train.classes == second.train.classes and len(first.train.classes) == 40
    assert first.test.classes == second.test.classes == ('P40', 'P41', 'P42')
    assert torch.equal(first.test.labels, second.test.labels) and torch.equal(first.train.labels, second.train.labels)


@pytest.mark.parametrize('line', ['', 'classes.csv, 1, 2\n', 'x\n'])
def test_a_list_of_grocery_that_names_no_image_is_refused_in_a_sentence(tmp_path, line):
    home = grocery(tmp_path)
    (home/'val.txt').write_text(line)
    with pytest.raises(ValueError, match='must begin with the path of an image'): read('grocery', home, size=8)


SHARED = Path(__file__).parents[2]/'shared'/'data'


@pytest.mark.skipif(not (SHARED/'grocery').is_dir(), reason='needs the photographs of Grocery')
def test_the_published_grocery_set_has_its_counts():
    report = check('grocery', SHARED)
    assert report['differences'] == [] and report['sides']['query'] == dict(
        images=1371, classes=41, first='Green-Bell-Pepper', last='Zucchini'
    )


def test_fashion_is_found_where_a_package_of_the_system_puts_it(tmp_path, monkeypatch, capsys):
    place = tmp_path/'share'
    place.mkdir()
    (place/'t10k-labels-idx1-ubyte.gz').write_bytes(b'')
    monkeypatch.setitem(SETS, 'fashion', replace(SETS['fashion'], places=(str(tmp_path/'nowhere'), str(place))))
    monkeypatch.chdir(tmp_path)
    assert archives.find('fashion', '.') == place and f'fashion is read from {place}' in capsys.readouterr().out
    # a root that was given is the user's word
    with pytest.raises(FileNotFoundError, match='apt-get install dataset-fashion-mnist'):
        archives.find('fashion', Path(sys.prefix)/'bin')


@pytest.fixture
def packaged_fashion(tmp_path, monkeypatch):
    "A system whose package has put Fashion-MNIST into a folder; the current folder is empty."
    place = fashion(tmp_path/'system')
    monkeypatch.setitem(SETS, 'fashion', replace(SETS['fashion'], places=(str(tmp_path/'nowhere'), str(place))))
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    return place


@pytest.mark.parametrize('root', ['', '.'])
def test_a_check_without_a_root_looks_where_the_package_puts_fashion(packaged_fashion, root):
    report = check('fashion', root)
    assert report['folder'] == str(packaged_fashion) and report['sides'].keys() == {'train', 'test'}
    # a root that was given is the user's word
    assert check('fashion', packaged_fashion.parent.parent/'other')['folder'] is None


def test_the_users_own_fashion_comes_before_that_of_the_system(packaged_fashion, capsys):
    own = fashion(Path.cwd())
    assert (
        archives.find('fashion', '').resolve() == own
        and f'fashion is read from {Path("FashionMNIST/raw")}' in capsys.readouterr().out
    )
    assert check('fashion', '')['folder'] == str(own)


@pytest.mark.parametrize('spoil', [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_incomplete_fashion_files_name_the_package(tmp_path, spoil):
    spoil(fashion(tmp_path)/'t10k-images-idx3-ubyte.gz')
    with pytest.raises(
        (FileNotFoundError, ValueError), match='apt-get install --reinstall dataset-fashion-mnist'
    ) as caught:
        read('fashion', tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and '\n' not in str(caught.value)


def test_incomplete_mnist_files_do_not_name_the_package_of_the_other_set(tmp_path):
    (mnist(tmp_path)/'t10k-images-idx3-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match='download it again$'): read('mnist', tmp_path)


@pytest.mark.parametrize('folder', ('/usr/share/sets', '/usr/local/sets', '/data/usr'))
def test_no_cache_goes_beside_the_images(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(os, 'access', lambda path, mode: True) # as root
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert archives.cache_folder('grocery', Path(folder)).parent == tmp_path/'robust_dml'


# what people have

@pytest.mark.parametrize('name', ('cub', 'sop', 'inshop'))
def test_lists_that_begin_with_a_byte_order_mark(tmp_path, name):
    folder = MAKE[name](tmp_path)
    card = small(name, tmp_path).card()
    for path in (p for p in folder.rglob('*.txt')): path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert small(name, tmp_path).card() == card


def test_names_in_another_encoding_are_not_made_one(tmp_path):
    folder = cub(tmp_path)
    path = folder/'images.txt'
    path.write_bytes(path.read_bytes().replace(b'Some_Bird_0001', b'Some_Bird_\xe9'))
    with pytest.raises(ValueError, match='images.txt must be a text in UTF-8, or begin with a byte order mark, found a'):
        small('cub', tmp_path)


@pytest.mark.parametrize('name', ('cub', 'cars', 'sop', 'inshop', 'grocery'))
def test_a_list_names_each_image_once(tmp_path, name, monkeypatch):
    "In every reader of a list: the second line of an image is refused before anything is decoded."
    MAKE[name](tmp_path)
    read_list = archives._LISTS[name]
    def doubled(folder):
        found = read_list(folder)
        last = list(found.sides)[-1]
        return replace(found, sides={**found.sides, last: found.sides[last] + found.sides[last][:1]})
    monkeypatch.setitem(archives._LISTS, name, doubled)
    with pytest.raises(ValueError, match='must list each image once, found 1 more than once: '): small(name, tmp_path)


def test_a_query_that_is_in_the_gallery_as_well_is_refused(tmp_path):
    folder = inshop(tmp_path)
    path = folder/'Eval/list_eval_partition.txt'
    lines = path.read_text().splitlines()
    query = next(line for line in lines if line.endswith('query'))
    text = '\n'.join([str(int(lines[0])+1), *lines[1:], query.replace(' query', ' gallery')])
    path.write_text(text)
    with pytest.raises(ValueError, match='must list each image once, found 1 more than once: Img/img'):
        small('inshop', tmp_path)


def cars_kit(root, nested=False, inside=False):
    "The same cars as the development kit has them: two folders, whose numbers begin anew."
    whole = cars(root/'whole')
    rows = archives._car_rows(whole/'cars_annos.mat', 'relative_im_path', '')
    folder = root/'stanford_cars'
    (folder/'devkit').mkdir(parents=True)
    for part, some in (('train', rows[::2]), ('test', rows[1::2])):
        record = np.zeros((1, len(some)), dtype=[(f, object) for f in ('bbox_x1', 'class', 'fname')])
        record[0] = [(1, c, f'{k:05d}.jpg') for k, (_, c) in enumerate(some, 1)]
        for k, (_, c) in enumerate(some, 1):
            photo(folder/f'cars_{part}'/(f'cars_{part}' if nested else '')/f'{k:05d}.jpg', (c, 0, 100))
        inner = folder/'devkit' if part == 'train' or inside else folder
        name = 'cars_train_annos.mat' if part == 'train' else 'cars_test_annos_withlabels.mat'
        scipy.io.savemat(inner/name, dict(annotations=record))
    names = np.array([[f'Make Model {k%2}' for k in range(1, 197)]], dtype=object)
    scipy.io.savemat(folder/'devkit'/'cars_meta.mat', dict(class_names=names))
    return folder


@pytest.mark.parametrize('nested', (False, True))
@pytest.mark.parametrize('inside', (False, True))
def test_cars_from_the_development_kit(tmp_path, nested, inside):
    folder = cars_kit(tmp_path, nested, inside)
    kit, whole = small('cars', tmp_path), small('cars', tmp_path/'whole')
    for side in ('train', 'test'):
        one, other = getattr(kit, side), getattr(whole, side)
        assert one.classes == other.classes and one.labels.bincount().tolist() == other.labels.bincount().tolist()
        colours = [{(label, *pixel.tolist()) for label, pixel in zip(s.labels.tolist(), s.images[:, :, 3, 3])}
                   for s in (one, other)]
        assert colours[0] == colours[1]
    next(folder.rglob('cars_test_annos_withlabels.mat')).unlink()
    with pytest.raises(FileNotFoundError, match='must hold cars_test_annos_withlabels.mat, found no such file'):
        small('cars', tmp_path)


def test_inshop_images_that_were_unpacked_beside_the_folder_img(tmp_path):
    folder = inshop(tmp_path)
    card = small('inshop', tmp_path).card()
    (folder/'Img'/'img').rename(folder/'img')
    assert small('inshop', tmp_path).card() == card


def test_a_packed_inshop_is_to_be_unpacked_not_downloaded(tmp_path):
    folder = inshop(tmp_path)
    drop(folder, 'Img/img/*/*/*/*')
    with zipfile.ZipFile(folder/'Img'/'img.zip', 'w') as archive: archive.write(__file__)
    with pytest.raises(FileNotFoundError, match='unpack .*Img/img.zip again, all of it'): small('inshop', tmp_path)


def test_a_set_of_the_same_form_is_told_by_its_items(tmp_path):
    "Grocery's list in a folder that is called as In-Shop's may be."
    grocery(tmp_path, lists=False).rename(tmp_path/'inshop')
    with pytest.raises(ValueError, match='must list items of In-Shop .* set dataset to grocery'):
        small('inshop', tmp_path)


@pytest.mark.parametrize('said, meant', (('CUB', 'cub'), ('Sop', 'sop'), ('Glyphs', 'glyphs')))
def test_the_lower_case_name_is_meant(tmp_path, said, meant):
    with pytest.raises(ValueError, match=f"dataset must be .*, found {said!r}; did you mean {meant!r}.$"):
        archives.load(said, root=tmp_path)
