"""Notebooks as pages: directives become tags, cells get addresses, links lead to pages."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
FOLDERS = {  # folder of the notebooks, or what pages without a module are for: page, title, purpose
    '.': ('ground', 'Ground', 'Argument checks and random numbers; exact search and k-means.'),
    'triplets': (
        'triplets', 'Triplets', 'Distances and hardness, which triplets are taken, and when embeddings collapse.'
    ),
    'data': ('data', 'Data', 'Image sets, splits and batches; the benchmark sets from their authors\' files.'),
    'models': ('models', 'Models', 'Networks with an embedding head.'),
    'runs': ('running', 'Runs', 'Where results are kept, and how work is dealt out to processes and clusters.'),
    'attacks': ('attacks', 'Attacks', 'One loop, ten attacks, and those beyond the ten.'),
    'metrics': ('metrics', 'Metrics', 'Retrieval, clustering, scores of robustness, and when not to believe them.'),
    'defenses': (
        'defenses', 'Defenses', 'Defences of three papers as rules for one training step, and the training loop.'
    ),
    'report': ('report', 'Reports', 'From results to tables, figures and pages.'),
    'audit': ('audit', 'Audit', 'Your own model on your own images: measured, and hardened.'),
    'study': ('study', 'Studies', 'The grid behind a table, and questions that no single table answers.'),
    'papers/colo_tride': (
        'colo_tride', 'The paper on COLO-TRIDE', 'Its theory, its printed tables, and where each equation stands.'
    ),
    'papers/claims': (
        'judged', 'What the papers claim',
        'Every claim of the three papers: the rule that judges it, and its graded verdict.'
    ),
    'papers': (
        'papers', 'The papers together',
        'Tables of the other two papers, all defences side by side, everything in one run.'
    ),
    'extend': ('extend', 'Extend it', 'Your own data set, attack or defence, each as a worked page.'),
}



def folder_of(
    path:Path, # notebook
)->str:        # key of FOLDERS
    "Folder of a notebook below nbs/."
    return str(path.parent.relative_to(NBS))


def address(
    path:Path, # notebook
)->str:        # 'attacks/00_loop'
    "A notebook seen from nbs/."
    return str(path.relative_to(NBS).with_suffix(''))


def library()->list[Path]:
    "Notebooks that are read: those with a number."
    return sorted(
        (p for p in NBS.rglob('[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts),
        key=lambda p: ([*FOLDERS].index(folder_of(p)), p.name)
    )


def forms()->list[Path]:
    "Notebooks to play with; index.ipynb is the start page of JupyterLab, and these pages have one of their own."
    return sorted(
        p for p in NBS.glob('*.ipynb') if p not in library() and not p.stem.startswith('run_') and p.stem != 'index'
    )


def runs()->list[Path]:
    "Notebooks that are run by papermill."
    return sorted(NBS.glob('run_*.ipynb'))


def run_notebook(
    experiment:str, # of a report
)->Path:
    "The notebook that wrote a report: one of its own, or that of all ablations."
    own = NBS/f'run_{experiment}.ipynb'
    return own if own.is_file() else NBS/'run_ablation.ipynb'


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
    html = re.sub(
        r'href="([\w./-]+)\.ipynb(?:#cell-id=(\w+))?"',
        lambda m: f'href="{m[1]}.html' + (f'#cell-{m[2]}' if m[2] else '') + '"', html
    )
    return re.sub(
        r'\$([^$<>]+(?:&\w+;[^$<>]*)*)\$', r'<span class="math notranslate nohighlight">\\(\1\\)</span>', html
    )


def links(
    text:str,    # Markdown of a page
    depth:int=1, # folders that the page is deep
)->str:
    "The same for Markdown: Sphinx knows cells by their label, and reports are not its pages."
    text = re.sub(r'\]\((?:[\w./-]+\.ipynb)#cell-id=(\w+)\)', r'](#cell-\1)', text)
    text = re.sub(r'(\]\((?:\.\./)+reports/[^)]*)README\.md\)', r'\1index.html)', text) # here its page lies beside it
    return re.sub(r'\[([^\]]+)\]\((?:\.\./)+(reports/[^)]+)\)', rf'<a href="{"../"*depth}\2">\1</a>', text)


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
    return (
        [nbformat.v4.new_markdown_cell(f'(cell-{cell.id})=', id=f'at-{cell.id}'), cell] if 'export' in tags else [cell]
    )


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
        cell.source = re.sub(
            r'^####+ ', '### ', links(cell.source, 1 + len(path.parent.relative_to(NBS).parts)), flags=re.M
        )
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
    found = re.search(
        r'^#\|\s*default_exp\s+([\w.]+)',
        '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code'), re.M
    )
    return found[1] if found else ''


def listed_in(
    path:Path, # notebook of `library` or `forms`
)->str:        # key of FOLDERS
    "The page that lists a notebook."
    if not path.stem[0].isdigit(): return 'study'
    return folder_of(path) if module_of(path) else 'extend'


def _above(path:Path, reports:dict[str, str])->str:
    "What stands under the title: the module's page, or the finished reports of a run notebook."
    up = '../'*(1 + len(path.parent.relative_to(NBS).parts))
    if module := module_of(path):
        return (
            f'*Module [`robust_dml.{module}`]({up}api/{module}.md). Cells with a bar on the left are the module; the'
            f' others check it. Run it: `make lab`, then `{address(path)}.ipynb`.*'
        )
    mine = [name for name, experiment in reports.items() if path == run_notebook(experiment)]
    found = ', '.join(f'<a href="../reports/{name}/index.html">{name}</a>' for name in mine)
    if path.stem.startswith('run_'):
        return (
            f'*Committed reports of this notebook: {found}.*'
            if found
            else '*No report of this notebook is committed yet: run it.*'
        )
    return f'*Run it: `make lab`, then `{path.name}`.*'


def write(
    target:Path,           # folder of the sources
    reports:dict[str, str], # folders in reports/ and their experiments
)->None:
    "All notebooks, a page for each folder and one for all."
    (target/'nbs').mkdir(parents=True)
    read = library() + forms()
    for path in read + runs():
        (target/'nbs'/address(path)).parent.mkdir(exist_ok=True, parents=True)
        nbformat.write(page(path, _above(path, reports)), target/'nbs'/f'{address(path)}.ipynb')
    for key, (name, title, purpose) in FOLDERS.items():
        listed = [p for p in read if listed_in(p) == key]
        (target/'nbs'/f'{name}.md').write_text(_list(title, purpose, listed), encoding='utf-8')
    lines = [f'* [{title}]({name}.md): {purpose}' for name, title, purpose in FOLDERS.values()]
    intro = (
        'Each notebook is a chapter: the equation, the code, a number that must come out, and a picture. The folders'
        ' stand in the order in which they build on each other; the numbers in a folder give the order of reading.'
    )
    (target / 'nbs' / 'index.md').write_text(
        '\n\n'.join(['# Notebooks', intro, '\n'.join(lines), toctree(name for name, *_ in FOLDERS.values())]),
        encoding='utf-8'
    )
    (target / 'nbs' / 'runs.md').write_text(
        _list(
            'Run notebooks',
            'Every table and figure, and every audit, is one of these, executed by `make NAME` or papermill.', runs()
        ),
        encoding='utf-8',
    )


def extend()->str:
    "Links to the notebooks on adding something of one's own, and to the interfaces that these use."
    names = [p for p in library() if listed_in(p) == 'extend'] + [
        p for p in library() if address(p) in ('data/00_sets', 'attacks/01_suite', 'defenses/00_base')
    ]
    return ', '.join(f'[{heading(p)[0]}](nbs/{address(p)}.ipynb)' for p in names)


def toctree(names)->str:
    "A hidden table of contents."
    return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```', ''])


def _list(title:str, intro:str, paths:list[Path])->str:
    "A page that leads to some notebooks."
    lines = []
    for path in paths:
        name, purpose = heading(path)
        number = f'{path.stem[:2]} ' if path.stem[0].isdigit() else ''
        lines.append(f'* [{number}{name}]({address(path)}.ipynb): {links(purpose)}')
    return '\n\n'.join([f'# {title}', intro, '\n'.join(lines), toctree([address(p) for p in paths])])
