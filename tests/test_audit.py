"""Audits of models and folders as strangers bring them: reports, kills, samples, list files, apart queries, and one
sentence for what does not fit."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image
from torch import nn

from robust_dml.audit import measure as module
from robust_dml.audit.measure import audit
from robust_dml.models.networks import checksum
from robust_dml.runs.store import Run

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(size=16, steps=2, limit=6, show=False)


def paint(folder, classes=8, each=5, shift=0, mode='RGB'):
    "A folder of class folders: noisy copies of one random pattern per class."
    gen, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(shift)
    for k in range(classes):
        pattern = torch.rand(3, 16, 16, generator=gen)
        for n in range(each):
            pixels = (255*(.8*pattern + .2*torch.rand(3, 16, 16, generator=noise))).byte().permute(1, 2, 0).numpy()
            (folder/f'class {k}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(folder/f'class {k}'/f'{n}.png')
    return folder


def network(channels=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 16)
        ).eval()


class After(nn.Module):
    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change
    def forward(self, x): return self.change(self.net(x))


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return paint(tmp_path_factory.mktemp('photos')/'photos')


@pytest.fixture(scope='module')
def done(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    return out, audit(network(), photos, out=out, name='toy', **SMALL)


def test_report(done, photos):
    "Order of the sections, self-contained, no path of this machine; numbers in the files are those of the record."
    out, found = done
    page = found.page.read_text()
    assert found.page.parent.parent == out and len(page) < 3e6
    assert found.page.parent.name.startswith('audit-photos-toy-')
    assert (
        page.count('<script') == 1
        and 'http' not in page
        and page.count('data:image/png;base64') == 2
        and str(photos) not in page + json.dumps(found.results)
    )
    heads = [
        'How easily is toy fooled?', found.sentence, 'Can the numbers be believed?', 'Without an attack',
        'Under attack', 'The worst of all attacks', 'Larger changes', 'Queries that were lost',
        'Classes that lose most', 'What it means, and what next', 'Cost', 'Provenance'
    ]
    places = [page.index(f'>{h}') for h in heads]
    assert places == sorted(places)
    results = json.loads((found.page.parent/'results.json').read_text())
    table = {row['attack']: row for row in csv.DictReader((found.page.parent/'attacks.csv').open())}
    assert (
        list(table) == list(module._DONE)
        and float(table['ES:D']['after']) == results['evaluation']['after']['ES:D'] > 0
    )
    rows = list(csv.DictReader((found.page.parent/'queries.csv').open()))
    assert len(rows) == 6 and all((photos/row['file']).parent.name == row['class'] for row in rows)
    hits = sum(min(float(row[f'{h} after']) for h in results['worst']['each']) > 0 for row in rows)
    assert f'after hardly visible changes of at most 8/255 per pixel, {hits} do' in found.sentence and results['worst'][
        'after'
    ] == pytest.approx(100 * hits / 6)
    assert f'Of 6 queries, {sum(float(row["ES:R before"]) > 0 for row in rows)} found' in found.sentence


def test_model_is_left_alone(done, photos, tmp_path):
    "Mode, weights, gradients and flags of a model that came in training mode; the page says what was done."
    model = network().train()
    before = checksum(model)
    page = audit(model, photos, out=tmp_path, **SMALL | dict(attacks='ES', limit=2)).page.read_text()
    assert (
        checksum(model) == before
        and all(m.training for m in model.modules())
        and all(p.requires_grad and p.grad is None for p in model.parameters())
    )
    assert 'came in training mode' in page and 'divided by their length' in page


def test_killed_audit_goes_on(done, photos, tmp_path, monkeypatch):
    "Half of the attacks and one curve are lost; only these are made again, and the numbers are the same."
    out, found = done
    copytree(out, tmp_path/'out')
    run = Run(next((tmp_path/'out'/'store').iterdir()))
    for name in ('evaluation.json', 'curves.json'): (run.folder/name).unlink()
    for name in ('queries.jsonl', 'curve-steps.jsonl'):
        data = (run.folder/name).read_bytes()
        (run.folder/name).write_bytes(data[:len(data)*2//3])
    from robust_dml.metrics import evaluate
    calls, original = [], evaluate._attack_rows
    monkeypatch.setattr(evaluate, '_attack_rows', lambda *a: calls.append(a[4].name) or original(*a))
    again = audit(network(), photos, out=tmp_path/'out', name='toy', **SMALL)
    assert 0 < len(calls) < len(module.ATTACKS)
    for part in ('after', 'before', 'benign', 'intervals', 'flags'):
        assert again.results['evaluation'][part] == found.results['evaluation'][part]
    assert again.results['curves']['lines'] == found.results['curves']['lines'] and again.sentence == found.sentence
    calls.clear()
    audit(network(), photos, out=tmp_path/'out', name='toy', **SMALL)
    assert not calls


def test_other_code_with_the_same_weights_is_measured_anew(photos, tmp_path):
    few = SMALL | dict(attacks='ES', limit=2, out=tmp_path)
    one, two = (audit(After(network(), change), photos, **few).results for change in (lambda z: z, torch.Tensor.cos))
    assert one['run'] != two['run'] and one['evaluation']['after'] != two['evaluation']['after']


def test_list_file_equals_folder(done, photos, tmp_path):
    "The same images by a list give the same numbers."
    files = sorted(photos.glob('*/*.png'))
    path = photos.parent/'list.csv'
    path.write_text('path,label\n' + ''.join(f'{f.relative_to(photos.parent)},{f.parent.name}\n' for f in files))
    found = audit(network(), path, out=tmp_path, **SMALL)
    assert found.results['evaluation']['after'] == done[1].results['evaluation']['after']
    assert found.results['data']['sha256'] == done[1].results['data']['sha256']


def test_queries_apart(photos, tmp_path):
    "Queries of a second folder are searched in the first; the split column of a list says the same."
    paint(tmp_path/'asked', each=2, shift=1)
    found = audit(network(), photos, queries=tmp_path/'asked', out=tmp_path, **SMALL)
    assert (
        found.results['data']['queries'], found.results['data']['images'], found.results['evaluation']['queries']
    ) == (16, 56, 6)
    attacked = list(csv.DictReader((found.page.parent/'queries.csv').open()))
    assert len(attacked) == 6 and all(
        (photos / row['file']).resolve().is_relative_to(tmp_path / 'asked') for row in attacked
    )
    rows = [(f, 'query') for f in sorted((tmp_path / 'asked').glob('*/*.png'))] + [
        (f, 'gallery') for f in sorted(photos.glob('*/*.png'))
    ]
    (tmp_path/'list.txt').write_text(''.join(f'{f}\t{f.parent.name}\t{split}\n' for f, split in rows))
    again = audit(network(), tmp_path/'list.txt', out=tmp_path, **SMALL)
    assert (
        again.results['evaluation']['after'] == found.results['evaluation']['after']
        and again.results['evaluation']['benign'] == found.results['evaluation']['benign']
    )
    assert 'have a copy in the gallery' not in found.page.read_text()
    (tmp_path/'asked'/'class 2'/'0.png').write_bytes((photos/'class 2'/'0.png').read_bytes())
    leaky = audit(network(), photos, queries=tmp_path/'asked', out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert '1 of 16 queries have a copy in the gallery' in leaky.page.read_text()


def test_nothing_to_find(photos, tmp_path):
    "All attacked queries are alone in their class: said in words, and no robustness is claimed."
    copytree(photos, tmp_path/'photos')
    (tmp_path / 'list.csv').write_text(
        ''.join(
            f'photos/class {k}/{n}.png,{name}\n'
            for k in range(7)
            for n in range(5)
            for name in [f'lone {k}{n}' if k else 'pair']
        )
    )
    seed = next(s for s in range(99) if not set(module.query_rows(35, limit=2, seed=s).tolist()) & set(range(5)))
    found = audit(network(), tmp_path/'list.csv', out=tmp_path, **SMALL | dict(attacks='ES', limit=2, seed=seed))
    assert (
        'None of 2 queries has another image of its class' in found.page.read_text()
        and 'No attacked query could find anything' in found.page.read_text()
        and 'right answers withstand' not in found.page.read_text()
    )


def test_fifty_thousand_classes(tmp_path):
    "Two images of each of 50,000 classes: only the sample is opened, clustered and searched."
    (tmp_path/'images').mkdir()
    names = [f'{k//2},{k}.png' for k in range(100_000)]
    (tmp_path/'list.csv').write_text('path,label\n' + ''.join(f'images/{k}.png,{k//2}\n' for k in range(100_000)))
    listed = module.list_images(tmp_path/'list.csv')
    some = module.sampled(listed, 40, seed=0)
    assert len(listed.files) == len(names) and len(some.files) == 40 and len(set(some.labels)) == 20
    for file in some.files:
        Image.new('RGB', (8, 8), (int(some.labels[some.files.index(file)]) % 251, 7, 9)).save(tmp_path/file)
    found = audit(network(), tmp_path/'list.csv', out=tmp_path, **SMALL | dict(gallery=40, attacks='ES', limit=2))
    assert found.results['data']['images'] == 40 and found.results['data']['listed'] == 100_000
    assert 'A sample of 40 from 100,000 listed images was used' in found.page.read_text()


def test_copies_are_flagged(photos, tmp_path):
    copytree(photos, tmp_path/'copies')
    (tmp_path/'copies'/'class 1'/'copy.png').write_bytes((tmp_path/'copies'/'class 1'/'0.png').read_bytes())
    found = audit(network(), tmp_path/'copies', out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    raised = {f['name'] for f in found.results['evaluation']['flags'] if f['raised']}
    page = found.page.read_text()
    assert (
        'duplicates' in raised
        and 'Remove copies from the images' in page
        and f'Settle the flags first ({", ".join(f["name"].replace("_", " ") for f in found.results["evaluation"]["flags"] if f["raised"])})'
        in page
    )


def test_dropout_that_stays_on_is_flagged(photos, tmp_path):
    noisy = After(network(), lambda z: nn.functional.dropout(z, .4, training=True))
    found = audit(noisy, photos, out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert 'nondeterministic' in {f['name'] for f in found.results['evaluation']['flags'] if f['raised']}


def test_damaged_files(photos, tmp_path):
    copytree(photos, tmp_path/'photos')
    (tmp_path/'photos'/'class 0'/'0.png').write_bytes(b'no image')
    few = SMALL | dict(attacks='ES', limit=2, out=tmp_path)
    with pytest.raises(ValueError, match='found 1 that are not: class 0/0.png .not an image.; repair or remove'):
        audit(network(), tmp_path/'photos', **few)
    found = audit(network(), tmp_path/'photos', **few | dict(limit=0), skip_unreadable=True)
    rows = list(csv.DictReader((found.page.parent/'queries.csv').open()))
    assert len(rows) == 39 and all(Path(row['file']).parent.name == row['class'] for row in rows)
    assert (
        found.results['data']['images'] == 39
        and '1 damaged files were left out: class 0/0.png' in found.page.read_text()
    )


@pytest.mark.parametrize('channels', (1, 3))
def test_channels_are_found(channels, photos, tmp_path):
    "Colour files for a grey model and grey files for a colour model."
    folder = photos if channels == 1 else paint(tmp_path/'grey', mode='L')
    found = audit(network(channels), folder, out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert found.results['data']['shape'] == [channels, 16, 16]


def test_colour_comes_first():
    "A model that takes any number of channels gets colours."
    net = nn.Sequential(nn.AdaptiveAvgPool3d((None, 8, 8)), nn.AdaptiveAvgPool3d((1, 8, 8)), nn.Flatten())
    assert module.find_channels(net, size=16) == 3


def test_pictures_are_those_of_the_labels(photos, tmp_path, monkeypatch):
    "Queries apart: results in the strip are gallery images of the class that their frame says."
    paint(tmp_path/'asked', each=2, shift=1)
    seen, original = {}, module.strip
    monkeypatch.setattr(module, 'strip', lambda tensors: seen.update(tensors) or original(tensors))
    audit(
        network(), photos, queries=tmp_path / 'asked', out=tmp_path,
        **SMALL | dict(attacks='ES,LTM nearest', eps=0.3, limit=0)
    )
    assert len(seen['clean']) and 0 < (seen['adv'] - seen['clean']).abs().max() <= .3 + 1e-6
    assert (seen['label_before'][:, 0] == seen['label']).all() and (seen['label_after'][:, 0] != seen['label']).any()
    label_of = {Image.open(f).convert('RGB').tobytes(): int(f.parent.name.split()[1]) for f in photos.glob('*/*.png')}
    for when in ('before', 'after'):
        shown = [
            label_of[picture.permute(1, 2, 0).contiguous().numpy().tobytes()] for picture in seen[when].flatten(0, 1)
        ]
        assert shown == seen[f'label_{when}'].flatten().tolist()


@pytest.mark.parametrize(
    'model, message',
    [
        (lambda: After(network(), lambda z: (z, z)), 'found tuple; wrap it'),
        (lambda: After(network(), lambda z: {'emb': z}), 'found dict; wrap it'),
        (lambda: After(network(), lambda z: z * float('nan')), 'the output of the model must be finite'),
        (
            lambda: After(network(), lambda z: z[:, : 8 + len(z)]),
            'embeddings must have one length for all images, found 9, 16'
        ),
        (lambda: After(network(), torch.Tensor.detach), 'found an output without a gradient'),
        (lambda: network(4), 'found one that takes 4; wrap it'),
        (lambda: network(2), 'with 1 or 3 channels, found an error for both'),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), 'set size to what the model wants'),
        (lambda: nn.Linear(3, 3, device='meta'), 'the weights must all be on one device, found them on meta'),
        (lambda: 'resnet18', 'model must be a torch.nn.Module, found str'),
    ],
    ids=('tuple', 'dict', 'nan', 'lengths', 'gradient', 'four', 'two', 'size', 'device', 'name'),
)
def test_model_that_does_not_fit(model, message, photos, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message): audit(model(), photos, out=tmp_path, **SMALL)
    assert not list(tmp_path.rglob('index.html'))


def test_half_precision_is_computed_in_single(photos, tmp_path):
    half = network().half()
    found = audit(half, photos, out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert 'half precision' in found.page.read_text() and next(half.parameters()).dtype == torch.float16


def test_one_image_per_class(tmp_path):
    with pytest.raises(
        ValueError, match='found one of each of 5: no query can find its own class, and R@1 is undefined'
    ):
        audit(network(), paint(tmp_path/'lone', 5, 1), out=tmp_path, **SMALL)


def test_names_are_escaped(photos, tmp_path):
    copytree(photos, tmp_path/'photos')
    (tmp_path/'photos'/'class 0').rename(tmp_path/'photos'/'<i>class 0')
    page = audit(
        network(), tmp_path / 'photos', out=tmp_path, name='<b>',
        **SMALL | dict(limit=0, eps=1.0, attacks='ES,LTM nearest')
    ).page.read_text()
    assert '<i>' not in page and '&lt;i&gt;class 0' in page and 'is &lt;b&gt; fooled' in page


def test_sealed_files(photos, tmp_path):
    "TorchScript and an exported program give the numbers of the module that they were made of."
    net, x = network(), torch.rand(3, 3, 16, 16)
    torch.jit.trace(net, x).save(tmp_path/'m.pt')
    torch.export.save(
        torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)), tmp_path / 'm.pt2'
    )
    few = SMALL | dict(attacks='ES,LTM nearest')
    want = audit(net, photos, out=tmp_path/'plain', **few).results['evaluation']['after']
    for file in ('m.pt', 'm.pt2'):
        with pytest.raises(ValueError, match='found trust not set'): module.load_model(str(tmp_path/file))
        got = audit(
            module.load_model(str(tmp_path / file), trust=True), photos, out=tmp_path / file[2:], **few
        ).results['evaluation']['after']
        assert got == pytest.approx(want, abs=1e-3)


def test_weights_that_would_run_code_do_not(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'0.weight': Trap()}, tmp_path/'trap.pt')
    with pytest.raises(ValueError, match='cannot be read without running code in it'):
        module.load_model('torchvision:resnet18', weights=str(tmp_path/'trap.pt'))
    assert not (tmp_path/'ran').exists()
    for trust in (False, True):
        with pytest.raises(ValueError, match='a pickled model is not opened'):
            module.load_model(str(tmp_path/'trap.pt'), trust=trust)
    assert not (tmp_path/'ran').exists()


def test_timm_is_optional():
    if module.importlib.util.find_spec('timm'): pytest.skip('timm is installed')
    with pytest.raises(
        ImportError, match='the model timm:vit_tiny_patch16_224 needs timm; install it with: pip install timm'
    ):
        module.load_model('timm:vit_tiny_patch16_224')


def test_random_weights_depend_on_the_seed():
    state = torch.get_rng_state()
    first, again, other = (checksum(module.load_model('torchvision:resnet18', seed=s)) for s in (0, 0, 1))
    assert first == again != other and torch.equal(state, torch.get_rng_state())


def papermill(folder, *arguments):
    return subprocess.run(
        [Path(sys.executable).parent / 'papermill', ROOT / 'nbs' / 'run_audit.ipynb', *arguments], cwd=folder,
        env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True
    )


def test_run_notebook(photos, tmp_path):
    "A constructor of the working directory with weights beside it."
    (tmp_path / 'mine.py').write_text(
        'from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8),'
        ' nn.ReLU(), nn.Flatten(), nn.Linear(8*7*7, 16))\n'
    )
    torch.save(network().state_dict(), tmp_path/'w.pt')
    got = papermill(
        tmp_path, '-p', 'model', 'mine:build', '-p', 'weights', 'w.pt', '-p', 'images', str(photos), '-p', 'size', '16',
        '-p', 'steps', '2', '-p', 'limit', '6', '-p', 'attacks', 'ES', '-p', 'device', 'cpu'
    )
    assert got.returncode == 0, got.stderr[-2000:]
    page, = (tmp_path/'reports').glob('audit-photos-build-*/index.html')
    assert 'How easily is build fooled?' in page.read_text()
    assert json.loads((page.parent/'results.json').read_text())['model']['sha256'] == checksum(network())


def test_run_notebook_refuses_unknown_parameters(tmp_path):
    got = papermill(tmp_path, '-p', 'image', 'photos')
    assert (
        got.returncode == 1
        and 'unknown parameter image; the valid ones are model, weights, images' in got.stderr
        and not (tmp_path / 'reports').exists()
    )


def test_classifier_that_the_model_names():
    "A network in timm's manner says where its classifier is; elsewhere the last linear layer goes."
    class Named(nn.Sequential):
        default_cfg = dict(classifier='1')
        def reset_classifier(self, classes): self[1] = nn.Identity()
    named, plain = Named(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)), nn.Sequential(
        nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)
    )
    heads = module._without_head(named, 'timm:named').heads, module._without_head(plain, 'torchvision:plain').heads
    assert heads == (('1',), ('2',))
    assert [type(m).__name__ for m in (*named, *plain)] == [
        'Linear', 'Identity', 'Linear', 'Linear', 'Linear', 'Identity'
    ]


def test_an_audit_needs_nothing_that_trains():
    "Floors 0, 1 and 3 of the module map are enough; importing the rest would cost every audit its dependencies."
    import subprocess
    import sys
    code = 'import sys, robust_dml.audit.measure; print(*sorted(m for m in sys.modules if m.startswith("robust_dml.")))'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {
        f'robust_dml.{name}' for name in ('defenses', 'tride', 'baselines', 'tuples', 'eat', 'train', 'experiments')
    } & set(loaded)
    assert 'robust_dml.metrics.evaluate' in loaded


# lists and folders as people have them

HEADERS = {
    'path,label': '{file},{label}', 'filename,label': '{file},{label}', 'label,path': '{label},{file}',
    'file;class': '{file};{label}', 'Category\tImage': '{label}\t{file}',
    'id,label,filename,width': '7,{label},{file},640', '': '{file},{label}'
}

@pytest.mark.parametrize('head', HEADERS)
@pytest.mark.parametrize('code', ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'))
def test_lists_by_their_header_and_encoding(photos, tmp_path, head, code):
    names = ['größe' if k < 20 else 'мяч' for k in range(40)]
    files = sorted(photos.glob('*/*.png'))
    lines = [HEADERS[head].format(file=f, label=name) for f, name in zip(files, names)]
    (tmp_path/'list.csv').write_bytes('\r\n'.join([head]*bool(head) + lines).encode(code))
    listed = module.list_images(tmp_path/'list.csv')
    assert listed.labels == tuple(names) and len(listed.files) == 40 and not listed.notes


@pytest.mark.parametrize('code', ('cp1251', 'gbk', 'shift-jis', 'latin-1'))
def test_no_encoding_is_guessed(tmp_path, code):
    "Two names that a lenient reader makes one."
    one, two = {'cp1251': ('мяч', 'куб'), 'gbk': ('球', '书'), 'shift-jis': ('犬', '猫'), 'latin-1': ('é', 'è')}[code]
    (tmp_path/'list.csv').write_bytes(f'a.png,x\na.png,{one}\nb.png,{two}\n'.encode(code))
    with pytest.raises(ValueError, match='a text in UTF-8, or begin with a byte order mark, found a byte in line 2'):
        module.list_images(tmp_path/'list.csv')


@pytest.mark.parametrize('text, message', [
    ('label,class,path\na,b,c.png\n', 'must name each column once, found label, class'),
    ('path,label\na.png\n', "found 'a.png'"), ('a.png,x,train\n', "query or gallery as split, found 'a.png x train'"),
    ('a.png,x\nb.png,x,y,z\n', "found 'b.png x y z'"), ('path,label\n', 'found none'),
    ('a\0.png,x\n', 'the character NUL')
])
def test_lists_that_do_not_say_what_is_what(tmp_path, text, message):
    (tmp_path/'list.csv').write_text(text)
    with pytest.raises(ValueError, match=message): module.list_images(tmp_path/'list.csv')


def test_columns_in_the_other_order_without_a_header(photos, tmp_path):
    (tmp_path/'list.csv').write_text(''.join(f'{f.parent.name},{f}\n' for f in sorted(photos.glob('*/*.png'))[:10]))
    with pytest.raises(ValueError, match='one of each of 10|at least two classes|one label'):
        module.list_images(tmp_path/'list.csv')
    rows = [f'{k}.png,{photos}/class {k%2}/0.png' for k in range(10)]
    (tmp_path/'list.csv').write_text('\n'.join(rows))
    with pytest.raises(FileNotFoundError, match='name the columns label,path in a first line'):
        module.read_images(module.list_images(tmp_path/'list.csv'), size=8, channels=1, show=False)


def test_a_list_has_a_largest_size(tmp_path):
    with open(tmp_path/'list.csv', 'wb') as file: file.truncate(3*2**30)
    with pytest.raises(ValueError, match='list.csv must have at most 67108864 bytes'):
        module.list_images(tmp_path/'list.csv')


def test_each_file_counts_once(photos, tmp_path):
    files = sorted(photos.glob('*/*.png'))[:10]
    (tmp_path/'link.png').symlink_to(files[0]), os.link(files[1], tmp_path/'hard.png')
    lines = [f'{f},{f.parent.name}' for f in files] + [f'{files[3]},class 0', 'link.png,class 0', 'hard.png,class 0']
    (tmp_path/'list.csv').write_text('\n'.join(lines))
    listed = module.list_images(tmp_path/'list.csv')
    assert len(listed.files) == 10 and listed.notes == ('3 images are listed twice, or by a link, and count once.',)
    assert len(module.read_images(listed, size=8, channels=1, show=False).dataset) == 10
    (tmp_path/'list.csv').write_text('\n'.join([*lines, f'{files[0]},class 1']))
    with pytest.raises(ValueError, match="each image must have one label, found .*0.png as 'class 0' and as 'class 1'"):
        module.list_images(tmp_path/'list.csv')


def test_a_query_never_finds_itself(photos, tmp_path):
    "Queries that are the images, and some that are among them."
    same = module.list_images(photos, photos)
    assert same.queries == 0 and same.files == module.list_images(photos).files
    for k in range(3):
        (tmp_path/'asked'/f'class {k}').mkdir(parents=True)
        (tmp_path/'asked'/f'class {k}'/'q.png').symlink_to(photos/f'class {k}'/'0.png')
    some = module.list_images(photos, tmp_path/'asked')
    assert some.queries == 3 and len(some.files) == 40
    asked, shelf = ({module.same_file(some.base/f) for f in part} for part in (some.files[:3], some.files[3:]))
    assert not asked & shelf
    found = audit(network(), photos, queries=tmp_path/'asked', out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert '3 images are queries and are to be searched as well: they ask and are not' in found.page.read_text()
    rows = [(f, f.parent.name, split) for f in sorted(photos.glob('*/*.png')) for split in ('query', 'gallery')]
    (tmp_path/'list.csv').write_text(''.join(','.join(map(str, row)) + '\n' for row in rows))
    assert module.list_images(tmp_path/'list.csv').queries == 0


def test_what_is_left_out_stands_on_the_page(photos, tmp_path):
    copytree(photos, tmp_path/'photos')
    (tmp_path/'photos'/'class 0'/'more').mkdir()
    (tmp_path/'photos'/'class 0'/'0.png').rename(tmp_path/'photos'/'class 0'/'0')
    found = audit(network(), tmp_path/'photos', out=tmp_path, **SMALL | dict(attacks='ES', limit=2))
    assert found.results['data']['images'] == 40
    assert '1 files or folders are not read as images and left out: class 0/more' in found.page.read_text()


def test_a_missing_image_is_left_out_only_if_you_say_so(photos, tmp_path):
    copytree(photos, tmp_path/'photos')
    (tmp_path/'photos'/'class 0'/'9.png').symlink_to(tmp_path/'nowhere.png')
    listed = module.list_images(tmp_path/'photos')
    with pytest.raises(FileNotFoundError, match='found 1 missing: class 0/9.png; correct the list or the links'):
        module.read_images(listed, size=8, channels=1, show=False)
    found = module.read_images(listed, size=8, channels=1, skip_unreadable=True, show=False)
    assert found.skipped == ('class 0/9.png',)


def test_reports_of_other_images_lie_in_other_folders(photos, tmp_path):
    "Folders of one name, names without a readable letter, long names."
    pages = set()
    for place in ('a/images', 'b/images', 'c/фото', 'c/写真', 'd/shop.v1', 'd/shop.v2', 'e/' + 'x'*200):
        copytree(photos, tmp_path/place)
        name = 'модель' if place == 'c/фото' else 'm'*300 if place.startswith('e') else 'model'
        few = SMALL | dict(attacks='ES', limit=1)
        pages.add(audit(network(), tmp_path/place, out=tmp_path/'out', name=name, **few).page)
    assert len(pages) == 7 and all(p.is_file() for p in pages)


def test_an_audit_asks_for_images_as_a_viewer_shows_them(photos, tmp_path):
    "Transparent parts are white, and the camera's orientation is minded."
    copytree(photos, tmp_path/'photos')
    exif = Image.Exif()
    exif[0x112] = 3
    picture = Image.open(photos/'class 0'/'0.png')
    picture.transpose(Image.Transpose.ROTATE_180).save(tmp_path/'photos'/'class 0'/'0.png', exif=exif)
    listed = [module.list_images(folder) for folder in (photos, tmp_path/'photos')]
    found = [module.read_images(some, size=16, channels=3, show=False) for some in listed]
    assert torch.equal(*(f.dataset.images[0] for f in found))


@pytest.mark.parametrize('eps', [.031, 8/255, .3])
def test_a_fraction_where_255ths_are_meant_is_refused(eps):
    "0.031 of 255ths changes nothing, and every query would withstand."
    with pytest.raises(ValueError, match='eps must be in 255ths of the pixel range.*8 means 8/255'):
        module.prepared(dict(eps=eps, images='nowhere'))


def test_no_cell_of_a_csv_is_a_formula():
    rows = [['=HYPERLINK("x")', '+1', '-2+3', '@SUM(A1)', '  =1', 'a-b', -1.5, None, float('nan')]]
    assert next(csv.reader([module._csv(rows).decode()])) == [
        '\'=HYPERLINK("x")', "'+1", "'-2+3", "'@SUM(A1)", "'  =1", 'a-b', '-1.5', '', ''
    ]
