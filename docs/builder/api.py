"""API pages from the sources: signatures, and the comment behind each parameter as its meaning, shape and unit."""
import ast
import io
import re
import tokenize
from pathlib import Path

from builder.notebooks import ROOT, address, heading, library, module_of, toctree

PACKAGE = ROOT/'robust_dml'
_SPECIAL = re.compile(r'([\\*_$<>|\[\]{}~^])')


def escaped(
    text:str, # a comment; `code` stays code
)->str:
    "Text that Markdown shows as it is, inside a table too."
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(p.replace('|', r'\|') if p.startswith('`') else _SPECIAL.sub(r'\\\1', p) for p in parts)


def comments(
    source:str, # of a module
)->dict[int, str]: # line, 1-based -> text behind the code of this line
    "Trailing comments."
    lines, found = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0]-1][:token.start[1]].strip():
            found[token.start[0]] = token.string.lstrip('# ').strip()
    return found


def signature(
    node:ast.FunctionDef,
    skip:int=0, # leading arguments to leave out: 1 for a method
)->str:
    "Arguments and result as Python writes them, without comments."
    args = node.args
    args.args = args.args[skip:]
    return f'({ast.unparse(args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')


def _rows(node:ast.FunctionDef, says:dict[int, str])->list[tuple[str, str, str, str]]:
    "Name, type, default and meaning of every argument, then of the result."
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = dict(zip(plain[len(plain) - len(a.defaults) :], a.defaults)) | {
        k: v for k, v in zip(a.kwonlyargs, a.kw_defaults) if v is not None
    }
    starred = [(x, mark) for x, mark in ((a.vararg, '*'), (a.kwarg, '**')) if x]
    everything = [*((x, '') for x in plain + a.kwonlyargs), *starred]
    last = {
        max((x.end_lineno, x.end_col_offset) for x, _ in everything if x.end_lineno == line)
        for line in {x.end_lineno for x, _ in everything}
    }
    rows = []
    for x, mark in everything:
        default = defaults.get(x)
        text = says.get((default or x).end_lineno, '') if (x.end_lineno, x.end_col_offset) in last else ''
        rows.append(
            (
                mark + x.arg, ast.unparse(x.annotation) if x.annotation else '',
                ast.unparse(default) if default else '', text
            )
        )
    if (
        node.returns
        and (text := says.get(node.returns.end_lineno))
        and not any(x.end_lineno == node.returns.end_lineno for x, _ in everything)
    ):
        rows.append(('returns', ast.unparse(node.returns), '', text))
    return rows


def table(
    rows:list[tuple[str, str, str, str]],
)->str:
    "Parameters as a Markdown table; columns that nothing fills are left out."
    keep = [i for i in range(4) if i == 0 or any(r[i] for r in rows)]
    if len(keep) == 1 or not any(r[3] for r in rows): return ''
    def cell(i, text): return '' if not text else escaped(text) if i == 3 else f'`{text}`'.replace('|', r'\|')
    lines = [
        [('name', 'type', 'default', 'meaning')[i] for i in keep], ['---'] * len(keep),
        *([cell(i, r[i]) if (i, r[0]) != (0, 'returns') else '*returns*' for i in keep] for r in rows)
    ]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def directive(
    kind:str,  # function, class, method, data
    name:str,
    content:list[str],
    depth:int=3, # backticks
)->str:
    "A described Python object."
    fence = '`'*depth
    return '\n'.join([f'{fence}{{py:{kind}}} {name}', '', '\n\n'.join(c for c in content if c), fence, ''])


def _doc(node)->str: return escaped(' '.join((ast.get_docstring(node) or '').split()))


def _function(node, says, kind='function', depth=3, where='', skip=0)->str:
    "A function: what it does, its parameters, its cell."
    rows = [r for r in _rows(node, says) if not (skip and r[0] in ('self', 'cls'))]
    return directive(kind, node.name + signature(node, skip), [_doc(node), table(rows), where], depth)


def _class(node, says, where)->str:
    "A class: its fields or constructor, and its public methods."
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((m for m in methods if m.name == '__init__'), None)
    if init: call, rows = signature(init, 1).removesuffix(' -> None'), [r for r in _rows(init, says) if r[0] != 'self']
    else:
        rows = [
            (
                f.target.id, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else '',
                says.get(f.end_lineno, '')
            )
            for f in fields
        ]
        call = '(' + ', '.join(f'{n}: {t}' + (f' = {d}' if d else '') for n, t, d, _ in rows) + ')' if rows else ''
    public = [_function(m, says, 'method', 4, skip=1) for m in methods if not m.name.startswith('_')]
    return directive('class', node.name + call, [_doc(node), table(rows), where, *public], 5)


def _data(node, name:str, says, where)->str:
    "A constant with its value where that is short."
    value = ast.unparse(node.value)
    return directive(
        'data', name,
        [
            escaped(says.get(node.lineno, says.get(node.end_lineno, ''))),
            f'`{value}`' if len(value) <= 160 and '`' not in value else '', where
        ],
    )


def described(
    module:str,    # name of a module
    notebook:Path, # that exports it
)->list[str]:      # a directive for each public name, in order
    "Every public definition of a module."
    source = (PACKAGE/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
    tree, says, lines, found = ast.parse(source), comments(source), source.splitlines(), []
    public = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), []
    )
    for node in tree.body:
        cell = next(
            (m[1] for line in lines[node.lineno - 1 :: -1] if (m := re.match(r'# %% (?:\.\./)+nbs/\S+ #(\w+)', line))),
            ''
        )
        where = f'*Explained in [{address(notebook)}](#cell-{cell}).*' if cell else ''
        if isinstance(node, ast.FunctionDef) and node.name in public: found.append(_function(node, says, where=where))
        elif isinstance(node, ast.ClassDef) and node.name in public: found.append(_class(node, says, where))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [
                n.id
                for t in getattr(node, 'targets', [getattr(node, 'target', None)])
                for n in ast.walk(t)
                if isinstance(n, ast.Name) and n.id in public
            ]
            found += [_data(node, name, says, where) for name in names]
    return found


def write(
    target:Path, # folder of the sources
)->None:
    "A page for each module and one for all."
    (target/'api').mkdir(parents=True)
    modules = {module_of(p): p for p in library() if module_of(p)}
    for module, path in modules.items():
        title, purpose = heading(path)
        head = (
            f'# {module}\n\n```{{py:module}} robust_dml.{module}\n```\n\n{purpose}\n\nThe notebook'
            f' [{address(path)}](../nbs/{address(path)}.ipynb) explains and checks what is listed here.\n'
        )
        (target/'api'/f'{module}.md').write_text('\n'.join([head, *described(module, path)]), encoding='utf-8')
    intro = (
        'Signatures of all modules. The last column of each table is the comment behind the parameter: shape, data'
        ' type, unit and range. Shapes: `B` images or triplets of a batch, `N` rows of a gallery, `D` dimensions of an'
        ' embedding, `C, H, W` channels, height and width. Images lie in [0, 1]; ε and α are in the same unit.'
    )
    lines = [f'* [{module}]({module}.md): {heading(path)[1]}' for module, path in modules.items()]
    (target / 'api' / 'index.md').write_text(
        '\n\n'.join(['# API', intro, '\n'.join(lines), toctree(modules)]), encoding='utf-8'
    )
