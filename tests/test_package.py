"""The wheel: built without notebooks, tests and reports, installed elsewhere, it holds everything that it needs. One
version everywhere."""
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(str(path.relative_to(ROOT/'robust_dml')) for path in ROOT.glob('robust_dml/**/*.py'))
MODULES = [name.removesuffix('.py').replace('/', '.') for name in FILES if not Path(name).name.startswith('_')]
PAPER = sorted(path.name for path in ROOT.glob('robust_dml/paper_tables/*'))


def run(*command, **kw):
    "Standard output of a program; what it said, should it fail."
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the files that packaging needs and nothing else."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('pyproject.toml', 'setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE'):
        copy(ROOT/name, source)
    copytree(ROOT/'robust_dml', source/'robust_dml', ignore=ignore_patterns('__pycache__'))
    run('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', out, source)
    found, = out.glob('robust_dml-*.whl')
    return found


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A folder with the installed wheel; the project itself is out of reach."
    target = tmp_path_factory.mktemp('installed')
    run('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--no-compile', '--target', target, wheel)
    return target


def isolated(installed, code):
    "What `code` prints in a Python that sees the installed package only, in a folder without the project."
    start = (
        f'import sys; sys.path.insert(0, {str(installed)!r})\nimport robust_dml\nassert'
        f' robust_dml.__file__.startswith({str(installed)!r}), robust_dml.__file__\n'
    )
    return run('-I', '-c', start + code, cwd=installed)


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name.removeprefix('robust_dml/') for name in names if name.startswith('robust_dml/')}
    assert len(MODULES) > 40 and len(PAPER) >= 5
    static = {f'report/static/{name}.{kind}' for name in ('page', 'list', 'explorer') for kind in ('css', 'js')}
    expected = {*FILES, 'py.typed', 'gpu_cards.csv'} | static | {f'paper_tables/{p}' for p in PAPER}
    assert package - {'tuned.json'} == expected
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {
        'robust_dml'
    }, 'no tests, notebooks or reports in a wheel'
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z: text = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
    needed = {
        line.split(':')[1].strip()
        for line in text.splitlines()
        if line.startswith('Requires-Dist:') and 'extra ==' not in line
    }
    assert {n.split('>')[0] for n in needed} == {'torch', 'torchvision', 'numpy', 'safetensors', 'filelock', 'tqdm'}
    extras = [line.split(':')[1].strip() for line in text.splitlines() if line.startswith('Provides-Extra:')]
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    assert extras and not [
        name for name in extras if f'| `{name}` |' not in readme
    ], 'every extra has a line in the README'


def test_every_module_can_be_imported(installed):
    code = f'import importlib\nfor name in {MODULES}: importlib.import_module("robust_dml." + name)\nprint("all")'
    assert isolated(installed, code).strip() == 'all'


def test_tables_of_the_paper_are_there(installed):
    code = 'from robust_dml.metrics import scores\nfor table in (1, 2, 3, 4): print(len(scores.paper_table(table)))'
    printed = [
        len((ROOT / 'robust_dml' / 'paper_tables' / f'table{n}.csv').read_text(encoding='utf-8').splitlines()) - 1
        for n in (1, 2, 3, 4)
    ]
    assert min(printed) > 10 and [int(count) for count in isolated(installed, code).split()] == printed


EVALUATION = '''
import sys
for absent in ('faiss', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'seaborn', 'fastcore', 'nbdev', 'papermill', 'IPython'): sys.modules[absent] = None
import torch
from robust_dml import core
from robust_dml.data import sets
from robust_dml.metrics import evaluate, scores
from robust_dml.models import networks
images = (torch.rand(24, 1, 28, 28, generator=core.generator(0, 'wheel'))*255).to(torch.uint8)
dataset = sets.ImageSet(images, torch.arange(24)//4, tuple('abcdef'))
result = evaluate.evaluate(networks.build('small', dim=16, size=28, channels=1, seed=0), dataset, eps=.1, step_size=.05, steps=2, show=False)
print(set(scores.HEADINGS) - set(result.after), 0 < result.ers < 100)
'''


def test_evaluation_needs_no_extra(installed):
    "The ten numbers of a tiny model, with torch, torchvision, numpy, safetensors and tqdm only."
    assert isolated(installed, EVALUATION).strip() == 'set() True'


def test_one_version_everywhere():
    version = re.search(r'^version = (\S+)', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert f'\nversion: {version}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')
    assert f'\n## {version}' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'"{version}"' in (ROOT/'robust_dml'/'__init__.py').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', ('CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md'))
def test_links_exist(name):
    links = re.findall(r'\]\((?!http)([^)#]+)\)', (ROOT/name).read_text(encoding='utf-8'))
    assert not [link for link in links if not (ROOT/link).exists()]


def test_commands_exist():
    "Every target that CONTRIBUTING names is one of the Makefile."
    named = set(re.findall(r'make ([\w-]+)', (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')))
    targets = set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))
    assert len(named) > 5 and not named - targets
