"""The shape of the numbered notebooks: one title, one name, short functions, small outputs, one line each in the
README's map."""
import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = sorted(p for p in ROOT.glob('nbs/**/[0-9][0-9]_*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def code(path): return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def exported(path): return [source for source in code(path) if source.startswith('#| export')]


def module(path):
    return next(
        (m[1] for source in code(path) if (m := re.search(r'^#\|\s*default_exp\s+([\w.]+)', source, re.M))), None
    )


# the others are worked pages: they show how to use the library and export nothing
LIBRARY = [path for path in NUMBERED if module(path)]
PAGES = [path for path in NUMBERED if path not in LIBRARY]


def name(path):
    "The module that a notebook should export: its folders and its own name."
    return '.'.join([*path.relative_to(ROOT/'nbs').parts[:-1], path.stem[3:]])


@pytest.mark.parametrize('path', NUMBERED, ids=name)
def test_numbered_notebook(path):
    cells = nbformat.read(path, 4).cells
    prose = [c.source for c in cells if c.cell_type == 'markdown']
    assert re.match(r'# \S.*\n\n> \S', prose[0]), 'the first cell is a title and a one-sentence purpose'
    assert not any(re.search(r'^# ', p, re.M) for p in prose[1:]), 'one first-level heading'
    assert all(len(json.dumps(c.get('outputs', []))) < 200_000 for c in cells)


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_library_notebook(path):
    assert module(path) == name(path), 'a notebook and its module have one name and one folder'
    assert any(c.source.startswith('## Choices') for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    for source in exported(path):
        for node in ast.walk(ast.parse(source)):
            ours = isinstance(node, ast.ImportFrom) and (node.module or '').startswith('robust_dml')
            assert (
                not ours or node.lineno == node.end_lineno
            ), 'nbdev makes imports relative line by line: write two lines instead of parentheses'


def test_numbers_begin_anew_in_each_folder():
    for folder in {path.parent for path in NUMBERED}:
        numbers = [int(path.stem[:2]) for path in NUMBERED if path.parent == folder]
        assert numbers == list(range(len(numbers))), folder


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_worked_page(path):
    assert not exported(path), 'a page exports nothing; a notebook that does says `#| default_exp`'
    assert any('expect_fail' in source for source in code(path)), 'a page shows the error that a newcomer meets'
    assert path.name in (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8') + (ROOT / 'README.md').read_text(
        encoding='utf-8'
    ), 'a page is linked'


def test_the_readme_maps_the_modules():
    "Every module has its line and its notebook, and no line is left of a module that went."
    lines = re.findall(
        r'^\| \[`([\w.]+)`\]\((nbs/[\w/]+\.ipynb)\) \| \S', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M
    )
    assert sorted(lines) == sorted((module(path), str(path.relative_to(ROOT))) for path in LIBRARY)


LONGER = {
    (
        'defenses.train', 'train'
    ): 'one update after the other, with the checkpoint of each epoch and what may go wrong in between'
}


def long_functions(path):
    "Functions of more than 30 statements: (module, name, statements); breaking a line makes none longer."
    for source in exported(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                statements = sum(isinstance(part, ast.stmt) for part in ast.walk(node)) - 1
                if statements > 30: yield module(path), node.name, statements


def test_functions_are_short():
    found = {(where, function): n for path in LIBRARY for where, function, n in long_functions(path)}
    assert found.keys() == LONGER.keys(), (
        'a function has at most 30 statements; split it, or give a reason in LONGER (and take out what is short now)'
    )


def test_no_line_is_longer_than_120():
    "A reader takes in one idea per line; `__all__` is written by nbdev."
    long = [
        (str(path.relative_to(ROOT)), line)
        for path in (ROOT / 'robust_dml').rglob('*.py')
        for line in path.read_text(encoding='utf-8').splitlines()
        if len(line) > 120 and path.name != '_modidx.py' and not line.startswith('__all__ = ')
    ]
    assert not long


EQUATIONS = {
    'triplet_loss': '1', 'hardness': '2', 'pgd': '3', 'collapseness': '5', 'inner_objective': '8', 'update_loss': '9',
    'cap_objective': '10', 'anp_objective': '11', 'top_term': '12', 'top_loss': '13', 'gradual_margin': '32'
}


def test_equation_numbers_in_docstrings():
    "A function that says which equation it is names the paper's number."
    found = {}
    for path in LIBRARY:
        for source in exported(path):
            for node in ast.walk(ast.parse(source)):
                said = isinstance(node, ast.FunctionDef) and ast.get_docstring(node) or ''
                if 'eq. (' in said and node.name in EQUATIONS: found[node.name] = re.findall(r'\((\d+)\)', said)
    assert len(found) > 9 and not {name: numbers for name, numbers in found.items() if EQUATIONS[name] not in numbers}
