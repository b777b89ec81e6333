"""Notebooks as pages: directives become tags, cells get addresses, links lead to pages."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
FLOORS = { # tens digit of the notebook, or what the last ones are for: page, title, purpose
    '0': ('ground', 'Ground', 'Images, distances, networks, triplets, collapse: what everything else stands on.'),
    '1': ('measuring', 'Measuring robustness', 'One loop, ten attacks and many more, and the scores made of them.'),
    '2': ('training', 'Training for it', 'Defences of three papers as rules for one training step.'),
    '3': ('running', 'Running and reporting', 'From a table of an experiment to finished runs, and from these to a page.'),
    '4': ('studies', 'Studies', 'Audits, comparisons and experiments beyond the tables of the papers.'),
    'readers': ('readers', 'For readers', 'The page that leads to all reports, one search under attack to play with, everything in one run.'),
    'extend': ('extend', 'Extend it', 'Your own data set, attack or defence, each as a worked page.')}


def library()->list[Path]:
    "Notebooks that are read: those with a number."
    return sorted(NBS.glob('[0-9]*.ipynb'))


def forms()->list[Path]:
    "Notebooks to play with; index.ipynb is the start page of JupyterLab, and these pages have one of their own."
    return sorted(p for p in NBS.glob('*.ipynb') if p not in library() and not p.stem.startswith('run_') and p.stem != 'index')


def runs()->list[Path]:
    "Notebooks that are run by papermill."
    return sorted(NBS.glob('run_*.ipynb'))


def heading(
    path:Path, # notebook
)->tuple[str, str]: # title, one sentence of purpose ('' for none)
    "What the first heading of a notebook and the quote below it say."
    prose = '\n\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    title, purpose = re.search(r'^# (.+)$', prose, re.M), re.search(r'^> ([^\n]+(?:\n(?:> )?[^\n]+)*)', prose, re.M)
    return title[1] if title else path.stem, ' '.join(purpose[1].replace('\n> ', ' ').split()) if purpose else ''


def section(
    path:Path,
    title:str, # of a second-level heading
)->str:        # Markdown below it, without the heading; '' where there is none
    "A section of a notebook's prose."
    prose = '\n\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    found = re.search(rf'^## {re.escape(title)}\s*\n(.*?)(?=^## |\Z)', prose, re.M | re.S)
    return found[1].strip() if found else ''


def in_pages(
    html:str, # output of a cell
)->str:
    "Links to notebooks lead to pages and their cells, formulas are marked for MathJax."
    html = re.sub(r'href="([\w./-]+)\.ipynb(?:#cell-id=(\w+))?"', lambda m: f'href="{m[1]}.html' + (f'#cell-{m[2]}' if m[2] else '') + '"', html)
    return re.sub(r'\$([^$<>]+(?:&\w+;[^$<>]*)*)\$', r'<span class="math notranslate nohighlight">\\(\1\\)</span>', html)


def links(
    text:str, # Markdown of a page one folder deep
)->str:
    "The same for Markdown: Sphinx knows cells by their label, and reports are not its pages."
    text = re.sub(r'\]\((?:[\w./-]+\.ipynb)#cell-id=(\w+)\)', r'](#cell-\1)', text)
    return re.sub(r'\[([^\]]+)\]\((?:\.\./)+(reports/[^)]+)\)', r'<a href="../\2">\1</a>', text)


def _first_words(prose:str)->str:
    "A plain sentence for the picture below it."
    text = re.sub(r'[*_`#>|$\\\[\]]', '', re.sub(r'\]\([^)]*\)', '', prose)).strip().replace('\n', ' ')
    return re.split(r'(?<=[.:?])\s', text)[0][:160] if text else 'Figure'


def _code(cell, prose:str)->list:
    "A code cell without its directives; exported ones can be linked to and are marked."
    directives = re.findall(r'^#\|\s*(\w+)', cell.source, re.M)
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    if not cell.source: return []
    tags = {'export'} if 'export' in directives else {'hide-input'} if 'hide' in directives else set()
    cell.metadata['tags'] = sorted({*cell.metadata.get('tags', []), *tags})
    for output in cell.outputs:
        data = output.get('data', {})
        if 'text/html' in data: data['text/html'] = in_pages(data['text/html'])
        if 'image/png' in data:
            data.pop('text/plain', None)
            cell.metadata['mystnb'] = {'image': {'alt': _first_words(prose)}}
    return [nbformat.v4.new_markdown_cell(f'(cell-{cell.id})=', id=f'at-{cell.id}'), cell] if 'export' in tags else [cell]


def page(
    path:Path,     # notebook
    below:str='',  # Markdown under title and purpose
)->nbformat.NotebookNode:
    "A notebook as Sphinx should see it."
    book, cells, prose = nbformat.read(path, 4), [], ''
    for cell in book.cells:
        if cell.cell_type == 'raw': continue
        if cell.cell_type == 'code':
            cells += _code(cell, prose)
            continue
        cell.source = re.sub(r'^####+ ', '### ', links(cell.source), flags=re.M)
        prose = cell.source
        if below and cell.source.startswith('# '):
            head, *rest = re.split(r'\n\n(?!>)', cell.source, maxsplit=1)
            cell.source, below = '\n\n'.join([head, below, *rest]), ''
        cells.append(cell)
    book.cells = cells
    return book


def module_of(
    path:Path, # notebook
)->str:        # '' where it exports none
    "Name of the module that a notebook exports."
    found = re.search(r'^#\|\s*default_exp\s+(\w+)', '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code'), re.M)
    return found[1] if found else ''


def floor_of(
    path:Path, # notebook of `library` or `forms`
)->str:        # key of FLOORS
    "Where a notebook is listed."
    if path.stem[0] in FLOORS: return path.stem[0]
    return 'extend' if path.stem[0].isdigit() and not module_of(path) else 'readers'


def _above(path:Path, reports:dict[str, str])->str:
    "What stands under the title: the module's page, or the finished reports of a run notebook."
    if module := module_of(path): return f'*Module [`robust_dml.{module}`](../api/{module}.md). Cells with a bar on the left are the module; the others check it. Run it: `make lab`, then `{path.name}`.*'
    mine = [name for name, experiment in reports.items() if path.stem == f'run_{experiment}']
    found = ', '.join(f'<a href="../reports/{name}/index.html">{name}</a>' for name in mine)
    if path.stem.startswith('run_'): return f'*Committed reports of this experiment: {found}.*' if found else '*No report of this experiment is committed yet: run it.*'
    return f'*Run it: `make lab`, then `{path.name}`.*'


def write(
    target:Path,           # folder of the sources
    reports:dict[str, str], # folders in reports/ and their experiments
)->None:
    "All notebooks, a page for each floor and one for all."
    (target/'nbs').mkdir(parents=True)
    read = library() + forms()
    for path in read + runs(): nbformat.write(page(path, _above(path, reports)), target/'nbs'/path.name)
    for key, (name, title, purpose) in FLOORS.items(): (target/'nbs'/f'{name}.md').write_text(_floor(title, purpose, [p for p in read if floor_of(p) == key]), encoding='utf-8')
    lines = [f'* [{title}]({name}.md): {purpose}' for name, title, purpose in FLOORS.values()]
    intro = 'Each notebook is a chapter: the equation, the code, a number that must come out, and a picture. The tens digit is the floor of the house; a module imports only from smaller numbers.'
    (target/'nbs'/'index.md').write_text('\n\n'.join(['# Notebooks', intro, '\n'.join(lines), toctree(name for name, *_ in FLOORS.values())]), encoding='utf-8')
    (target/'nbs'/'runs.md').write_text(_floor('Run notebooks', 'Every table and figure, and every audit, is one of these, executed by `make NAME` or papermill.', runs()), encoding='utf-8')


def extend()->str:
    "Links to the notebooks on adding something of one's own, and to the interfaces that these use."
    names = [p for p in library() if floor_of(p) == 'extend'] + [p for p in library() if p.stem in ('01_data', '13_attacks', '21_defenses')]
    return ', '.join(f'[{heading(p)[0]}](nbs/{p.name})' for p in names)


def toctree(names)->str:
    "A hidden table of contents."
    return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```', ''])


def _floor(title:str, intro:str, paths:list[Path])->str:
    "A page that leads to some notebooks."
    lines = []
    for path in paths:
        name, purpose = heading(path)
        number = f'{path.stem[:2]} ' if path.stem[0].isdigit() else ''
        lines.append(f'* [{number}{name}]({path.name}): {links(purpose)}')
    return '\n\n'.join([f'# {title}', intro, '\n'.join(lines), toctree([p.stem for p in paths])])
