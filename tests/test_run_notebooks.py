"""The run notebooks as a user starts them: parameters, reports, kills, damaged stores, full disks, bare machines."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import parameters
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob('nbs/run_*.ipynb'))
OMNIGLOT = ROOT.parent/'shared'/'data'/'omniglot'
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

# What a run notebook does, without the kernel: for tests that kill or starve it.
SCRIPT = '''
import sys
from robust_dml.study import experiments
plan = experiments.plan('table1', experiments.parameters(dict(preset='smoke', defenses='natural,hm', out=sys.argv[1])))
results = experiments.results(plan, show=False)
print(experiments.write_table(plan.folder, results))
'''


def papermill(folder, notebook, *arguments):
    "Run a notebook from `folder`, as a user would, without an output path."
    return subprocess.run(
        [Path(sys.executable).parent / 'papermill', ROOT / 'nbs' / notebook, *arguments], cwd=folder, env=ENV,
        capture_output=True, text=True
    )


def script(out, **options):
    return subprocess.run([sys.executable, '-c', SCRIPT, out], env=ENV, capture_output=True, text=True, **options)


def parameters_cell(path):
    "The only cell that is tagged so."
    mine, = (c for c in nbformat.read(path, 4).cells if 'parameters' in c.metadata.get('tags', []))
    return mine


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path):
    "Skipped by nbdev_test, parameters as the one list has them, no functions, no outputs in git."
    cells = nbformat.read(path, 4).cells
    assert cells[0].cell_type == 'raw' and 'skip_exec: true' in cells[0].source
    assert parameters_cell(path).source == parameters.cell(path.stem.removeprefix('run_')), (
        'run python tests/parameters.py'
    )
    assert not any('def ' in c.source or c.outputs for c in cells if c.cell_type == 'code')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_the_help_shows_every_parameter(path):
    "`papermill --help-notebook`, whose reader leaves out a line with a second equals sign."
    from papermill.translators import PythonTranslator
    names = {}
    exec(parameters_cell(path).source, {}, names)
    shown = PythonTranslator.inspect(parameters_cell(path))
    assert [p.name for p in shown] == [*names] and all(p.help for p in shown)


def test_the_help_hides_a_line_with_two_equals_signs():
    from papermill.translators import PythonTranslator
    assert PythonTranslator.inspect(dict(source="a = 1 # as in b=2")) == []


def test_defaults_are_those_of_the_modules():
    from robust_dml.audit import hardening, measure
    from robust_dml.papers import gallery
    from robust_dml.papers.colo_tride import errata
    from robust_dml.study import scale, tuning
    from robust_dml.study.experiments import PARAMETERS
    others = dict(
        scale=scale.PARAMETERS, audit=measure.PARAMETERS, harden=hardening.PARAMETERS, errata=errata.ERRATA,
        claims=errata.ERRATA, appendix_a=errata.APPENDIX, tune=PARAMETERS | tuning.OWN,
        ablation=PARAMETERS | dict(study='lambda'),
        reference=PARAMETERS | dict(dataset='fashion', preset='paper', seeds='0,1,2')
    )
    for name, listed in parameters.LISTS.items():
        if name == 'data': continue # names the arguments of a function
        wanted = others.get(name, PARAMETERS)
        names = {}
        exec(parameters.cell(name), {}, names)
        assert names.items() <= wanted.items() and {*wanted} - {*names} <= {'executor'}, name
    assert {p.stem.removeprefix('run_') for p in NOTEBOOKS} == {*parameters.LISTS}
    assert {*parameters.STUDIES.split(', ')} == {
        name for name, study in gallery.STUDIES.items()
        if study.defenses and not study.prepare and not (ROOT/'nbs'/f'run_{name}.ipynb').is_file()
    }


def test_the_comments_name_what_there_is():
    from robust_dml.data.archives import SETS
    from robust_dml.defenses.colo_tride import PROFILES
    from robust_dml.core import BACKBONES
    from robust_dml.study.experiments import BUILT_IN, PRESETS
    for name, known in (('dataset', (*BUILT_IN, *SETS)), ('profile', (*PROFILES, 'tuned')), ('preset', PRESETS),
                        ('backbone', BACKBONES.names())):
        assert {*known} <= {*re.findall(r'\w+', parameters.TABLE[name][1])}, name


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Table 1 by papermill, in a folder that is no checkout."
    folder = tmp_path_factory.mktemp('undisturbed')
    done = papermill(
        folder, 'run_table1.ipynb', '-p', 'dataset', 'glyphs', '-p', 'preset', 'smoke', '-p', 'defenses', 'natural,hm'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_report_without_output_path(undisturbed):
    report = undisturbed/'reports'/'table1-glyphs-smoke'
    assert {'index.html', 'table.csv', 'README.md', 'figures.svg', 'results.json', 'figures'} <= {p.name for p in report.iterdir()}
    page = (report/'index.html').read_text()
    assert page.count('<script') == 1 and 'src="http' not in page and 'data:image/png;base64' in page
    results = json.loads((report/'results.json').read_text())
    assert [r['label'] for r in results['records']] == ['Natural', 'HM']
    assert len(results['data']['checksum']) == 64 and str(undisturbed) not in json.dumps(results)


def test_table2_trains_nothing(undisturbed):
    store = undisturbed/'reports'/'store'
    before = {p: p.stat().st_mtime_ns for p in store.rglob('*')}
    done = papermill(
        undisturbed, 'run_table2.ipynb', 'executed.ipynb', '-p', 'preset', 'smoke', '-p', 'defenses', 'natural,hm'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {p: p.stat().st_mtime_ns for p in store.rglob('*')}
    assert (undisturbed / 'reports' / 'table2-glyphs-smoke' / 'table.csv').is_file() and (
        undisturbed / 'executed.ipynb'
    ).is_file()


@pytest.mark.parametrize('arguments, message', [
    (('-p', 'datset', 'glyphs'), 'unknown parameter datset; the valid ones are dataset, root, preset'),
    (('-p', 'preset', 'huge'), "'photos96', 'paper', found 'huge'"),
    (('-p', 'skip_unreadable', 'false'), 'skip_unreadable must be True or False')], ids=('name', 'value', 'type'))
def test_wrong_parameters_fail(tmp_path, arguments, message):
    done = papermill(tmp_path, 'run_table1.ipynb', *arguments)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path/'reports').exists()


def kill_when(out, ready, limit=60):
    "Start the run and kill it with SIGKILL as soon as `ready()`; False when it was over before."
    process = subprocess.Popen(
        [sys.executable, '-c', SCRIPT, out], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + limit
    while process.poll() is None and not ready() and time.monotonic() < end: time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(undisturbed, tmp_path):
    "Killed in training, in the attacks of the first model and in those of the second; the table does not tell."
    def lines(n):
        return lambda: sum(len(p.read_bytes().splitlines()) for p in tmp_path.glob('store/*/queries.jsonl')) >= n
    moments = [lambda: any(tmp_path.glob('store/*/checkpoint.json')), lines(3), lines(14)]
    assert [kill_when(tmp_path, ready) for ready in moments] == [True]*3
    assert not (tmp_path/'table1-glyphs-smoke').exists()
    assert script(tmp_path).returncode == 0
    kept = undisturbed/'reports'/'table1-glyphs-smoke'/'table.csv'
    assert (tmp_path/'table1-glyphs-smoke'/'table.csv').read_bytes() == kept.read_bytes()
    assert not list(tmp_path.rglob('*.part')) + list(tmp_path.rglob('checkpoint*'))


def test_damaged_weights_are_named(undisturbed, tmp_path):
    "Weights with one flipped byte and no evaluation yet: refused by their hash."
    from shutil import copytree, rmtree
    copytree(undisturbed/'reports'/'store', tmp_path/'store')
    for folder in (tmp_path/'store').glob('eval-*'): rmtree(folder)
    weights = next((tmp_path/'store').glob('train-*/model.safetensors'))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    done = script(tmp_path)
    assert done.returncode == 1 and weights.parent.name in done.stderr and 'sha256' in done.stderr.splitlines()[-1]


def test_pickle_is_refused(undisturbed, tmp_path):
    import torch
    pickled = tmp_path/'weights.safetensors'
    torch.save({'w': torch.zeros(2)}, pickled)
    done = papermill(tmp_path, 'run_table1.ipynb', '-p', 'preset', 'smoke', '-p', 'weights', str(pickled))
    assert done.returncode == 1 and 'expected a safetensors file, found a pickle' in done.stderr


def test_full_disk_is_one_sentence(tmp_path):
    "A limit of 20 kB per file stands for a full disk: the first weights do not fit, and nothing half-written stays."
    done = script(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1].startswith('robust_dml.runs.store.StoreError: expected to write')
        and 'what was finished before is kept' in done.stderr
    )
    assert not list(tmp_path.rglob('*.part')) and not list(tmp_path.rglob('*.safetensors'))


def test_unwritable_reports(tmp_path):
    (tmp_path/'file').write_text('no folder')
    done = script(tmp_path/'file')
    assert done.returncode == 1 and 'StoreError: expected to write' in done.stderr.splitlines()[-1]


def photos(folder, classes=4, images=4):
    "Noise with a colour per class."
    from robust_dml.core import generator
    import torch
    for c in range(classes):
        for i in range(images):
            x = torch.rand(40, 36, 3, generator=generator(c, i))*100 + torch.tensor([50*c, 20*i, 90])
            (folder/f'class{c}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.clamp(0, 255).byte().numpy()).save(folder/f'class{c}'/f'{i}.png')


def test_folder_of_the_name_of_a_set(tmp_path):
    "A folder of photographs named cub, with one damaged file, is not compared with the paper's numbers for CUB."
    photos(tmp_path/'cub')
    (tmp_path/'cub'/'class3'/'3.png').write_bytes(b'no image')
    arguments = ('-p', 'dataset', str(tmp_path/'cub'), '-p', 'preset', 'smoke', '-p', 'defenses', 'natural,act')
    refused = papermill(tmp_path, 'run_table1.ipynb', *arguments)
    assert refused.returncode == 1 and 'class3/3.png' in refused.stderr and 'skip_unreadable=True' in refused.stderr
    done = papermill(tmp_path, 'run_table1.ipynb', *arguments, '-p', 'skip_unreadable', 'True')
    assert done.returncode == 0, done.stderr[-2000:]
    report, = (tmp_path/'reports').glob('table1-cub-folder-*-smoke')
    results = json.loads((report/'results.json').read_text())
    assert results['data']['skipped'] == ['class3/3.png'] and results['data']['test']['images'] == 7
    assert str(tmp_path) not in json.dumps(results)
    assert results['published'] == [] and 'Beside the paper' not in (report/'index.html').read_text()


def test_omniglot(tmp_path):
    if not OMNIGLOT.is_dir(): pytest.skip('the Omniglot archives are not beside the checkout (../shared/data/omniglot)')
    done = papermill(
        tmp_path, 'run_table1.ipynb', '-p', 'dataset', 'omniglot', '-p', 'root', str(OMNIGLOT), '-p', 'preset', 'smoke',
        '-p', 'defenses', 'natural'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path/'reports'/'table1-omniglot-smoke'/'index.html').is_file()


BARE = '''
import sys
for absent in ('faiss', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'seaborn', 'fastcore', 'nbdev', 'papermill', 'IPython'): sys.modules[absent] = None
import torch
from robust_dml import core, neighbors
from robust_dml.data import sets as data
from robust_dml.triplets import distances, mining, collapse
from robust_dml.models import networks
from robust_dml.attacks import loop, suite
from robust_dml.metrics import retrieval, scores, evaluate
from robust_dml.defenses import base, colo_tride, train
from robust_dml.runs import store
gen = core.generator(0, 'bare')
images = (torch.rand(24, 1, 28, 28, generator=gen)*255).to(torch.uint8)
dataset = data.ImageSet(images, torch.arange(24)//4, tuple('abcdef'))
model = networks.build('small', dim=16, size=28, channels=1, seed=0)
robust = base.make_defense('colo_tride', eps=.1, step_size=.05, steps=2, margin=.2, lam=2., profile='official')
train.train(model, dataset, robust, epochs=2, pairs=8, lr=1e-3, show=False)
result = evaluate.evaluate(model, dataset, eps=.1, step_size=.05, steps=2, show=False)
print(result.backend, 0 < result.ers < 100)
try: data.glyphs()
except ImportError as error: print(error)
'''


def test_bare_machine():
    "torch, torchvision, numpy, safetensors and tqdm suffice to train, attack and score; what is missing is named."
    done = subprocess.run([sys.executable, '-c', BARE], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'torch True', 'the data set glyphs needs matplotlib; install it with: pip install matplotlib'
    ]
