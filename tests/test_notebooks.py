"""The shape of the library notebooks: direction of imports, one title, no machine paths, small outputs."""
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(ROOT.glob('nbs/[0-9][0-9]_*.ipynb'))
NUMBER = {path.stem[3:]: int(path.stem[:2]) for path in LIBRARY}


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_library_notebook(path):
    cells = nbformat.read(path, 4).cells
    prose = [c.source for c in cells if c.cell_type == 'markdown']
    assert re.match(r'# \S.*\n\n> \S', prose[0]), 'the first cell is a title and a one-sentence purpose'
    assert not any(re.search(r'^# ', p, re.M) for p in prose[1:]), 'one first-level heading'
    assert any(p.startswith('## Choices') for p in prose)
    exported = '\n'.join(c.source for c in cells if c.cell_type == 'code' and c.source.startswith('#| export'))
    imported = set(re.findall(r'^\s*from robust_dml\.(\w+) import', exported, re.M))
    assert not [name for name in imported if NUMBER[name] >= int(path.stem[:2])], 'a module imports only from modules with smaller numbers'
    assert all(len(json.dumps(c.get('outputs', []))) < 200_000 for c in cells)


def test_modules_are_in_the_readme():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert not [name for name, n in NUMBER.items() if f'| {n:02d} | `{name}` |' not in text]
