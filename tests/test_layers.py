"""Who may import whom, folder by folder: the plan of the house, held against the exported modules."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'robust_dml'
MAY = { # a folder or a module of its own, in the order of reading: what it may import, besides itself
    'core': '',
    'triplets': 'core',
    'data': 'core',
    'models': 'core triplets data',
    'neighbors': 'core triplets',
    'runs': 'core',
    'attacks': 'core triplets data models neighbors',
    'metrics': 'core triplets data models neighbors runs attacks',
    'defenses': 'core triplets data models neighbors runs attacks metrics',
    'report': 'core runs metrics',
    'audit': 'core triplets data models neighbors runs attacks metrics defenses report',
    'study': 'core triplets data models neighbors runs attacks metrics defenses report',
    'papers': 'core triplets data models neighbors runs attacks metrics defenses report study'}
LEFT:set[tuple[str, str]] = set() # what still stands against the plan: nothing


def module_files()->dict[str, Path]:
    "Name and file of every exported module."
    files = (f for f in PACKAGE.rglob('*.py') if f.name not in ('__init__.py', '_modidx.py'))
    return {str(f.relative_to(PACKAGE).with_suffix('')).replace('/', '.'): f for f in sorted(files)}


MODULES = module_files()


def folder(module:str)->str:
    "The folder of a module, or the module itself."
    return module.partition('.')[0]


def imported(module:str)->set[str]:
    "Modules of this package that a module imports, at its head or inside a function."
    found, inside = set(), ['robust_dml', *module.split('.')][:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom): continue
        base = inside[:len(inside) - node.level + 1] if node.level else []
        path = '.'.join([*base, *filter(None, [node.module])])
        if path.split('.')[0] != 'robust_dml': continue
        names = {f'{path}.{alias.name}'.partition('.')[2] for alias in node.names}
        whole = path.partition('.')[2]
        found |= names & MODULES.keys() or {whole} & MODULES.keys()
    return found


ARROWS = {module: imported(module) for module in MODULES}


def reached(start:str)->set[str]:
    "Everything that an import of a module brings in."
    found, todo = set(), [start]
    while todo:
        here = todo.pop()
        if here in found: continue
        found.add(here)
        todo += ARROWS[here]
    return found


def test_every_module_stands_in_a_folder_of_the_plan(): assert {folder(module) for module in MODULES} == set(MAY)


def test_folders_import_what_the_plan_allows():
    against = {(a, b) for a in ARROWS for b in ARROWS[a] if folder(b) not in (folder(a), *MAY[folder(a)].split())}
    assert against == LEFT, (
        'a folder imports only what MAY says; move the code, or, if the plan is wrong, change the plan here and in the'
        ' README'
    )


def test_the_plan_has_no_circle():
    order = list(MAY)
    for name, allowed in MAY.items():
        assert all(order.index(other) < order.index(name) for other in allowed.split()), name


def test_modules_import_in_no_circle():
    for module in MODULES:
        assert module not in {further for other in ARROWS[module] for further in reached(other)}, module


def test_the_arrows_are_read_right():
    "Against what Python loads: an import of the loop of attacks brings its arrows and no other module."
    code = (
        'import sys, robust_dml.attacks.loop; print(*[name for name in sys.modules if name.startswith("robust_dml.")])'
    )
    loaded = {
        name.partition('.')[2]
        for name in subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    }
    assert loaded & MODULES.keys() == reached('attacks.loop')


@pytest.mark.parametrize('module', [m for m in MODULES if folder(m) in ('audit', 'defenses')])
def test_audits_and_defenses_reach_no_study(module):
    assert not {m for m in reached(module) if folder(m) in ('study', 'papers')}


FACE = (
    "import sys, robust_dml; print('torch' in sys.modules); from robust_dml import load_data, build_model,"
    " make_defense, train, evaluate, harden; print(*sorted(robust_dml.__all__))"
)


def test_the_face_is_lazy_and_complete():
    done = subprocess.run([sys.executable, '-c', FACE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        'False', 'audit', 'build_model', 'evaluate', 'harden', 'load_data', 'make_defense', 'train'
    ]


def test_audit_is_one_thing_by_both_names():
    "The function from the face; after its package was imported, the package, which is called like it."
    code = (
        "import robust_dml; first = robust_dml.audit; from robust_dml.audit import audit, load_model; import"
        " robust_dml.audit.measure as m\nprint(first is audit is m.audit, callable(robust_dml.audit), load_model is"
        " m.load_model)\nm.audit = lambda *a, **k: (a, k)\nprint(robust_dml.audit(1, size=2) == ((1,), dict(size=2)))"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        == ['True'] * 4
    )


def test_an_unknown_name_is_refused():
    import robust_dml
    with pytest.raises(AttributeError, match="module 'robust_dml' has no attribute 'audits'"): getattr(robust_dml, 'audits')
    with pytest.raises(AttributeError, match="has no attribute 'measures'"): getattr(robust_dml.audit, 'measures')


def test_the_readme_shows_the_plan():
    "The table of folders in the README is the one of this file."
    table = (
        (ROOT / 'README.md')
        .read_text(encoding='utf-8')
        .partition('| folder | holds | may import |')[2]
        .partition('\n\n')[0]
    )
    rows = re.findall(r'^\| `(\w+)` \| [^|]+ \| ([^|]*) \|', table, re.M)
    assert {name: ' '.join(re.findall(r'\w+', allowed)) for name, allowed in rows} == MAY
