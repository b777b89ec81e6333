"""Hostile input for every reader of data, as many inputs as there is time for: lists, folders, archives, images, caches
and names. The outcome must be a good result or one sentence of the package, in bounded time and memory, and nothing
around the files may change. python tests/faults/readers.py [--seconds 600] [--seed 0] [--only folders]"""
import os

os.environ |= {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

import argparse
import faulthandler
import gzip
import io
import json
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import scipy.io
import numpy as np
import torch
from PIL import Image

import robust_dml
import test_fuzz as old
from robust_dml.audit import measure
from robust_dml.data import archives, sets

PACKAGE = Path(robust_dml.__file__).resolve().parent
OURS = (ValueError, TypeError, FileNotFoundError, OSError)
SECONDS, BYTES = 20., 2**31 # of processor time that an input may take; of memory that the whole run may have

TEXTS = ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32', 'cp1251', 'gbk', 'shift-jis', 'latin-1')
WORDS = ('ant', 'bee', 'ant ', ' bee', 'мяч', 'куб', '犬', '猫', 'é', 'e\u0301', 'ANT', 'path', 'query', 'gallery', '"')
NAMES = (
    b'0.png', b'1.jpg', b'x', b'.hidden.png', b'._0.png', b'a b.PNG', b'\xe9.png', b'new\nline.png', b'\x1b[31m.png',
    b'\xd0\xbc.png', b'n' * 250 + b'.png', b'q"uo,te;.png', b'tab\t.png', b'Thumbs.db', b'readme.txt', b'-rf.gif',
    b'x.heic', b'x.svg', b'\xe2\x80\xa8.png', b'CON.bmp', b'%s.tif', b'x.tar.gz', b'..png', b'x.png ', b'x.png.'
)
FOLDERS = (
    b'ant', b'bee', b'cat', b'ant ', b'ANT', b'train', b'test', b'val', b'query', b'gallery', b'lost+found', b'@eaDir',
    b'__MACOSX', b'.git', b'\xe9', b'e\xcc\x81', b'\xc3\xa9', b'new\nline', b'\x1b[2J', b'<b>', b'#', b'%20', b'd' * 255
)


def bytes_of(text:str, rng:Random)->bytes:
    "A text in some encoding, perhaps damaged."
    made = text.encode(rng.choice(TEXTS), 'replace')
    return old.edited(made, rng.getrandbits(32)) if rng.random() < .3 else made


def picture(rng:Random)->bytes:
    "An image, mostly damaged, or something else."
    kind = rng.random()
    if kind < .2: return rng.choice(old.IMAGES)
    if kind < .8: return old.edited(rng.choice(old.IMAGES), rng.getrandbits(32))
    if kind < .9: return rng.randbytes(rng.randint(0, 60))
    return rng.choice(list(old.HUGE.values()))(rng.choice((1, 9000, 65535)), rng.choice((1, 9000, 65535)))


def put(path:bytes, rng:Random)->None:
    "Something in a place: an image, a link of some kind, a pipe, a folder."
    kind = rng.random()
    if os.path.lexists(path): return # opening a pipe to write would wait for a reader
    try:
        if kind < .75:
            with open(path, 'wb') as file: file.write(picture(rng))
        elif kind < .83: os.symlink(rng.choice((b'0.png', b'nowhere', path, b'..', b'/dev/zero', b'../ant/0.png')), path)
        elif kind < .86: os.mkfifo(path)
        elif kind < .94: os.mkdir(path)
        else: os.link(path.rpartition(b'/')[0] + b'/0.png', path)
    except OSError: pass # a name that is too long, or taken


def tree(home:bytes, rng:Random, depth:int=0)->None:
    "Class folders, sides with class folders, and what lies beside them."
    for name in rng.sample(FOLDERS, rng.randint(0, 5)):
        folder = home + b'/' + name
        os.makedirs(folder, exist_ok=True)
        if name in (b'train', b'test', b'val', b'query', b'gallery') and depth == 0: tree(folder, rng, 1)
        if rng.random() < .9:
            for k in range(2): Path(os.fsdecode(folder), f'{k}.gif').write_bytes(rng.choice(old.IMAGES))
        for file in rng.sample(NAMES, rng.randint(0, 4)): put(folder + b'/' + file, rng)
    for file in rng.sample(NAMES, rng.randint(0, 2)): put(home + b'/' + file, rng)


def folders(home:Path, rng:Random)->None:
    "Folders as data sets and as what is audited."
    tree(os.fsencode(home), rng)
    size, skip = 8, rng.random() < .5
    way = rng.choice(('load', 'archives', 'audit', 'queries'))
    if way == 'load': use(sets.load(str(home), size=size, skip_unreadable=skip).card())
    elif way == 'archives': use(archives.load(str(home), size=size, skip_unreadable=skip).card())
    else: audited(measure.list_images(home, home/'query' if way == 'queries' else ''), skip)


def use(card:dict)->None:
    "What a result writes: JSON, with names as they are."
    json.dumps(card)


def audited(listed:measure.Listed, skip:bool)->None:
    "What an audit reads."
    found = measure.read_images(listed, size=8, channels=3, skip_unreadable=skip, show=False)
    assert len(found.dataset) == len(found.files) and found.queries < len(found.files)
    asked = {measure.same_file(listed.base/f) for f in found.files[:found.queries]}
    shelf = {measure.same_file(listed.base/f) for f in found.files[found.queries:]}
    assert not asked & shelf and len(asked) + len(shelf) == len(found.files), 'a query finds itself'


def lists(home:Path, rng:Random)->None:
    "A list of an audit beside a few images."
    for k in range(4): (home/f'{k}.png').write_bytes(old.DRAWING if rng.random() < .8 else picture(rng))
    heads = ('path,label', 'label,path', 'filename,class', 'filename,label,split', 'label,class,path', '')
    head = rng.choice(heads)
    mark = rng.choice(',;\t ')
    lines = [head.replace(',', mark)] + [
        mark.join([f'{row%6}.png', rng.choice(WORDS[:9] if rng.random() < .8 else (old.words(rng), *WORDS))]
                  + [rng.choice(('query', 'gallery', 'x'))]*(rng.random() < .1))
        for row in range(rng.randint(0, 8))
    ]
    path = home/rng.choice(('list.csv', 'list.txt', 'list.tsv'))
    text = rng.choice(('\n', '\r\n', '\r')).join(lines)
    path.write_bytes(text.encode('utf-8', 'surrogatepass') if rng.random() < .5 else bytes_of(text, rng))
    audited(measure.list_images(path), rng.random() < .5)


def set_lists(home:Path, rng:Random)->None:
    "The text lists of the papers' sets."
    name = rng.choice(('cub', 'sop', 'inshop', 'grocery'))
    files = dict(
        cub=('images.txt', 'image_class_labels.txt', 'train_test_split.txt'), sop=('Ebay_train.txt', 'Ebay_test.txt'),
        inshop=('list_eval_partition.txt',), grocery=('train.txt', 'val.txt', 'test.txt', 'classes.csv')
    )[name]
    good = {
        'images.txt': '1 001.A/a.png\n2 101.B/b.png\n', 'image_class_labels.txt': '1 1\n2 101\n',
        'train_test_split.txt': '1 0\n2 1\n', 'Ebay_train.txt': 'image_id class_id super_class_id path\n1 1 1 a.png\n',
        'Ebay_test.txt': 'image_id class_id super_class_id path\n2 11319 1 b.png\n',
        'list_eval_partition.txt': '3\nimage_name item_id evaluation_status\na.png id_1 train\nb.png id_2 query\n'
        'c.png id_2 gallery\n', 'train.txt': 'train/A/a.png, 1, 2\n', 'val.txt': 'val/B/b.png, 1, 2\n',
        'test.txt': 'test/B/c.png, 1, 2\n', 'classes.csv': 'x\n'
    }
    for file in files:
        text = good[file].encode()
        if rng.random() < .6: text = old.edited(text, rng.getrandbits(32)) if rng.random() < .6 else bytes_of(
            good[file].replace('a.png', old.words(rng)), rng
        )
        (home/file).write_bytes(text)
    for image in ('images/001.A/a.png', 'images/101.B/b.png', 'a.png', 'b.png', 'c.png'):
        (home/image).parent.mkdir(parents=True, exist_ok=True)
        (home/image).write_bytes(old.DRAWING)
    use(archives.read(name, home, size=8, show=False, skip_unreadable=rng.random() < .5).card())
    archives.describe(archives.check(name, home))


def cars(home:Path, rng:Random)->None:
    "MATLAB files: of the set, and of its development kit."
    def content():
        if rng.random() < .3: return old.HEAD + old.cells(rng)
        return old.edited(rng.choice((*old.MATS, *KIT)), rng.getrandbits(32))
    kit = ('cars_train_annos.mat', 'cars_test_annos_withlabels.mat', 'cars_meta.mat')
    for name in rng.choice((('cars_annos.mat',), kit)):
        (home/name).write_bytes(content() if rng.random() < .7 else rng.choice(KIT))
    archives.read('cars', home, size=8, show=False)


def _kit(names:tuple[str, ...])->bytes:
    "Annotations in the form of the development kit."
    record = np.zeros((1, len(names)), dtype=[(f, object) for f in ('class', 'fname')])
    record[0] = [(c, name) for c, name in zip((1, 99), names)]
    scipy.io.savemat(file := io.BytesIO(), dict(annotations=record))
    return file.getvalue()

KIT = (_kit(('1.jpg', '2.jpg')), _kit(('../x.jpg', '/etc/passwd')))


def idx(home:Path, rng:Random)->None:
    "The four files of MNIST or Fashion-MNIST."
    for file, content in old.IDX.items():
        made = content if rng.random() < .7 else old.edited(content, rng.getrandbits(32))
        packed = gzip.compress(made, 1)
        if rng.random() < .2: packed = old.edited(packed, rng.getrandbits(32))
        (home/file).write_bytes(packed)
    use(archives.read(rng.choice(('mnist', 'fashion')), home, show=False).card())


def drawings(home:Path, rng:Random)->None:
    "The zip files of Omniglot."
    for stem, members in old.PAIR:
        names = [f'{old.words(rng)[:300]}.png'.encode('utf-8', 'replace').decode() for _ in range(rng.randint(0, 2))]
        more = [(name, picture(rng)) for name in names]
        old.drawings(home, stem, members + more)
        path = home/f'{stem}.zip'
        if rng.random() < .5: path.write_bytes(old.edited(path.read_bytes(), rng.getrandbits(32)))
    use(sets.omniglot(home, skip_unreadable=rng.random() < .5).card())


def packed(home:Path, rng:Random)->None:
    "An archive beside a set that is not there."
    name = rng.choice(('CUB_200_2011.tgz', 'Stanford_Online_Products.zip', 'img.zip', 'car_ims.tgz'))
    content = rng.choice(list(old.PACKED.values()))
    (home/name).write_bytes(old.edited(content, rng.getrandbits(32)) if rng.random() < .8 else rng.randbytes(50))
    archives.read(rng.choice(('cub', 'sop', 'inshop', 'cars')), home, show=False)


def images(home:Path, rng:Random)->None:
    "One image, which is read or is refused for a reason in a few words."
    for k in range(20):
        content, shown = picture(rng), rng.random() < .5
        try: whole = sets.read_image(io.BytesIO(content), channels=rng.choice((1, 3)), shown=shown)
        except Exception as error: assert '\n' not in sets._why(error) and sets._why(error)
        else: assert whole.mode in ('L', 'RGB')


def caches(home:Path, rng:Random)->None:
    "A damaged cache, and damaged hashes: the images come out all the same."
    for k in range(3): Image.new('L', (8, 8), 50*k).save(home/f'{k}.png')
    there, cache = archives.missing(home, ['0.png', '1.png', '2.png'])[0], home/'c'/'c.npy'
    def found(): return archives.decoded(cache, home, there, size=8, channels=1, show=False)
    archives._SETTLED = 0
    want = found()[0].clone()
    for path in (home/'c').iterdir():
        if rng.random() < .7: path.write_bytes(old.edited(path.read_bytes(), rng.getrandbits(32)))
    got, broken = found()
    assert torch.equal(got, want) and not broken, 'other images came out of a cache'


def names(home:Path, rng:Random)->None:
    "Names of data sets and places."
    dataset, root = (rng.choice((old.words(rng), *archives.SETS, '')) for _ in range(2))
    if dataset in ('glyphs', '.', '..', '~', '', '/'): return
    os.chdir(home)
    use(archives.load(dataset, root=root or None, size=8).card())


READERS:dict[str, tuple[Callable[[Path, Random], None], float]] = { # and the share of the time of each
    'folders': (folders, .25), 'lists': (lists, .15), 'lists of sets': (set_lists, .15), 'cars': (cars, .08),
    'idx': (idx, .05), 'drawings': (drawings, .05), 'packed': (packed, .05), 'images': (images, .12),
    'caches': (caches, .05), 'names': (names, .05)
}


def outcome(reader:Callable, home:Path, rng:Random)->str:
    "'good', 'sentence', or what is wrong."
    try: reader(home, rng)
    except OURS as error:
        where, text = Path(traceback.extract_tb(error.__traceback__)[-1].filename), str(error)
        if PACKAGE not in where.parents: return f'{type(error).__name__} from {where.name}: {text[:200]!r}'
        if not text or not text.isprintable() or len(text) > 4000: return f'no sentence: {text[:300]!r}'
        return 'sentence'
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f'{type(error).__name__} from {Path(place.filename).name}:{place.lineno}: {str(error)[:200]!r}'
    return 'good'


def trial(name:str, box:Path, seed:str)->str:
    "One input in a fresh folder; what stands around it must stay."
    home, guard = box/'work', box/'secret.png'
    home.mkdir()
    before = guard.read_bytes()
    began = time.process_time()
    said = outcome(READERS[name][0], home, Random(seed))
    spent = time.process_time()-began
    os.chdir(box)
    shutil.rmtree(os.fsencode(home), ignore_errors=True)
    if spent > SECONDS: return f'took {spent:.0f} s'
    more = {p.name for p in box.iterdir()} - {'secret.png', 'cache', 'work'}
    if more or guard.read_bytes() != before: return 'wrote elsewhere'
    return said


def _peak()->int:
    "Bytes of memory that this process has held at most, whatever it did before."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def run(seconds:float, seed:int, only:str='')->tuple[Counter, dict[str, str]]:
    "Inputs until the time is over: how many ended how, and one seed for each kind of fault."
    counts, faults = Counter(), {}
    box = Path(tempfile.mkdtemp(prefix='readers-'))
    os.environ['XDG_CACHE_HOME'] = str(box/'cache')
    Image.new('RGB', (9, 9), (1, 2, 3)).save(box/'secret.png')
    chosen, before = [only] if only else list(READERS), _peak()
    spent, n, end = dict.fromkeys(chosen, 0.), 0, time.monotonic()+seconds
    while time.monotonic() < end or n < len(chosen): # each once at least
        name = min(chosen, key=lambda name: spent[name]/READERS[name][1]) # each gets its share
        began = time.monotonic()
        faulthandler.dump_traceback_later(60, exit=True)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            said = trial(name, box, f'{seed} {name} {n}')
        counts[name, said if said in ('good', 'sentence') else 'fault'] += 1
        if said not in ('good', 'sentence'): faults.setdefault(f'{name}: {said[:120]}', f'{seed} {name} {n}')
        spent[name] += time.monotonic()-began
        if n % 500 == 0: shutil.rmtree(box/'cache', ignore_errors=True)
        n += 1
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(box, ignore_errors=True)
    grown = _peak() - before
    if grown > BYTES: faults[f'{grown/2**20:.0f} MiB more memory'] = str(seed)
    return counts, faults


def main()->int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=READERS, default='')
    asked = parser.parse_args()
    counts, faults = run(asked.seconds, asked.seed, asked.only)
    for name in READERS:
        row = {said: counts[name, said] for said in ('good', 'sentence', 'fault')}
        if sum(row.values()): print(f'{name:14}', *(f'{said} {n:7}' for said, n in row.items()))
    print(f'{sum(counts.values())} inputs, {sum(n for (_, said), n in counts.items() if said == "fault")} faults')
    for what, seed in sorted(faults.items()): print(f'  {what}   (seed {seed!r})')
    return 1 if faults else 0


if __name__ == '__main__': sys.exit(main())
