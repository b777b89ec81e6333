"""Equations, attacks, defences and switches as pages, read from the library."""
import ast
import hashlib
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from builder.api import PACKAGE, comments, escaped
from builder.notebooks import address, folder_of, library, links, section
from robust_dml.attacks import suite, strong
from robust_dml.core import DEFENSES
from robust_dml.defenses import colo_tride as tride
from robust_dml.metrics import clustering
from robust_dml.papers.colo_tride import guide


def linked(
    code:str, # module.name, as in the guide
)->str:
    "Name of a function that leads to its signature; private ones lead to their cell."
    module, _, name = code.rpartition('.')
    return (
        f'[`{code}`](#cell-{guide.place(code).link.split("cell-id=")[1]})'
        if name.startswith('_') or name not in import_module(f'robust_dml.{module}').__all__
        else f'{{py:obj}}`{code} <robust_dml.{code}>`'
    )


def cell_link(code:str)->str:
    return f'[{guide.place(code).notebook.removesuffix(".ipynb")}](#cell-{guide.place(code).link.split("cell-id=")[1]})'


def formula(latex:str)->str: return f'${latex}$'.replace('|', r'\vert ').replace(r'\\vert', r'\Vert') if latex else ''


def rows_table(
    rows:list[guide.Row],
    head:tuple[str, ...]=('Item', 'Says', 'Formula', 'Function', 'Explained in', 'Run'),
)->str:
    "Lines of the guide as a Markdown table whose links stay inside these pages."
    def line(r:guide.Row)->list[str]:
        run = f'[{r.run.removesuffix(".ipynb")}](nbs/{r.run})' if r.run else ''
        return [
            f'<b class="nowrap">{escaped(r.label)}</b>', escaped(r.says), formula(r.latex), linked(r.code),
            cell_link(r.code), run
        ]
    lines = [list(head), ['---']*len(head), *map(line, rows)]
    keep = [i for i in range(len(head)) if i < 2 or any(l[i] for l in lines[2:])]
    return '\n'.join('| ' + ' | '.join(l[i] for i in keep) + ' |' for l in lines)


def equations_page()->str:
    "Every equation, algorithm, figure, table, attack and score."
    parts = [
        '# Find an equation',
        (
            'The number in the paper, what it says, the function that holds it and the cell that explains it. The same'
            ' tables stand in [the guide](nbs/papers/colo_tride/02_guide.ipynb), with the pipeline drawn.'
        ),
        '## Equations of COLO-TRIDE',
        (
            r'$D$ is a mean distance over the triplets of a batch, a star marks perturbed images, $T$ is a triplet.'
            r' There is no equation (29). Symbols: [glossary](glossary.md).'
        ),
        rows_table(guide.equations()),
        '## Attacks',
        rows_table(guide.attacks()),
        '## Scores',
        rows_table(guide.scores()),
        '## Robust optimisation of tuples',
        rows_table(guide.robust_tuples()),
        '## EAT, its ensembles, and inference by clustering',
        rows_table(guide.ensembles()),
    ]
    return '\n\n'.join(parts) + '\n'


class Pictures:
    "Draws pictures, or takes those of an earlier build from unchanged sources."
    def __init__(
        self,
        target:Path, # folder of the sources
        cache:Path,  # folder that outlives a build
    ):
        files = [*sorted(PACKAGE.rglob('*.py')), Path(__file__).with_name('pictures.py')]
        self.key = hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()[:12]
        self.target, self.cache = target/'pictures', cache
        for folder in (self.target, cache): folder.mkdir(parents=True, exist_ok=True)
        for old in cache.glob('*.png'):
            if not old.name.startswith(self.key): old.unlink()

    def __call__(self, name:str, draw:Callable[[], bytes], alt:str)->str:
        "An image tag."
        slug = name.replace('+', '-plus').replace(' ', '-').lower()
        kept = self.cache/f'{self.key}-{slug}.png'
        if not kept.exists(): kept.write_bytes(draw())
        (self.target/f'{slug}.png').write_bytes(kept.read_bytes())
        return f'![{alt}](pictures/{slug}.png)'


def beside(picture:str, *text:str)->str:
    "A picture and what it shows."
    return '\n\n'.join(
        [
            '::::{container} with-picture', f':::{{container}} picture\n{picture}\n:::',
            ':::{container} text\n' + '\n\n'.join(t for t in text if t) + '\n:::', '::::'
        ]
    )


def code_of(f)->str:
    "module.name of a function, also inside a partial."
    f = getattr(f, 'func', f)
    return f'{f.__module__.removeprefix("robust_dml.")}.{f.__name__}'


def _attack_section(attack, says:dict[str, guide.Row], pictures:Pictures)->str:
    from builder.pictures import attack_picture
    rows = [says[o] for o in attack.outcomes if o in says]
    doc = getattr(attack.objective, 'func', attack.objective).__doc__
    text = [f'**{r.label}**: {escaped(r.says)}.' for r in rows] or [escaped(doc)]
    maximised = f'Made large: {formula(rows[0].latex)}' if rows and rows[0].latex else ''
    parts = (
        f'Targets {linked(code_of(attack.targets))}, objective {linked(code_of(attack.objective))}, outcome'
        f' {linked(code_of(attack.measure))}; explained in {cell_link(code_of(attack.objective))}.'
    )
    picture = pictures(
        f'attack {attack.name}', lambda: attack_picture(attack), f'Way of a query under {attack.name} on the circle'
    )
    return f'### {attack.name}\n\n' + beside(picture, '\n\n'.join(text), maximised, parts)


def attacks_page(pictures:Pictures)->str:
    "Every attack with its picture."
    from builder.pictures import black_box_picture, black_boxes
    says = {r.label: r for r in (*guide.attacks(), *guide.ensembles())}
    groups = (
        ('The suite', 'Nine optimisations with ten outcomes; their names are the headings of the tables.', suite.SUITE),
        (
            'Sound forms',
            (
                'The reference code of LTM and GTM has a quirk each (see [paper and code](paper_and_code.md)); these'
                ' are free of it and stand beside the others in every table.'
            ),
            suite.FIXED,
        ),
        (
            'Beyond the suite', 'Stronger or different aims, in [attacks/02_strong](nbs/attacks/02_strong.ipynb).',
            strong.BEYOND
        ),
        (
            'Clustering and retrieval, by EAT and the tuple paper',
            (
                'Aims of inference by neighbours, centres and clusters, in'
                ' [metrics/02_clustering](nbs/metrics/02_clustering.ipynb).'
            ),
            clustering.ATTACKS,
        ),
    )
    parts = [
        '# Attacks',
        (
            'Each picture is made by the library: twelve images of three classes (colour and shape) lie on the unit'
            ' circle, the query is the black star, and the arrow is the way on which its objective leads it, at most 75'
            ' degrees. A ring marks the image aimed at, crosses are class centres. Arrows are where the objective'
            ' pulls; how far an attack comes is a matter of ε, steps and the model.'
        ),
    ]
    for title, intro, some in groups:
        parts += [f'## {title}', intro, *(_attack_section(a, says, pictures) for a in some.values())]
    parts += [
        '## Black boxes',
        (
            'Attacks that see no gradient, in [17_blackbox](nbs/attacks/03_blackbox.ipynb). Below, each pushes a glyph'
            ' away from its place (ES) in a network trained for a moment, with a small budget of questions; white in'
            ' the difference is no change, red brighter, blue darker.'
        ),
    ]
    for name in black_boxes():
        doc = getattr(import_module('robust_dml.attacks.blackbox'), name).__doc__
        parts.append(
            f'### {name.replace("_", " ")}\n\n'
            + beside(
                pictures(f'blackbox {name}', lambda: black_box_picture(name), f'An image before and after {name}'),
                escaped(doc),
                f'{linked("attacks.blackbox." + name)}, explained in {cell_link("attacks.blackbox." + name)}.'
            )
        )
    parts.append(
        'Further ones without a picture of their own: '
        + ', '.join(
            f'{linked(c)}'
            ' ('
            f'{escaped(getattr(import_module("robust_dml." + c.rpartition(".")[0]), c.rpartition(".")[2]).__doc__.rstrip(".").lower())})'
            for c in (
                'attacks.blackbox.universal', 'attacks.blackbox.transfer', 'attacks.strong.adaptive',
                'metrics.clustering.proxy'
            )
        )
        + '.'
    )
    return '\n\n'.join(parts) + '\n'


def _defense_section(name:str, made, label:str, pictures:Pictures)->str:
    from builder.pictures import defense_picture
    f = getattr(made, 'func', made)
    code = code_of(f)
    own = tride.NAIVE.get(name, {})
    text = escaped(f.__doc__) + (f' `{name}` sets {", ".join(f"`{k}={v!r}`" for k, v in own.items())}.' if own else '')
    picture = pictures(f'defense {name}', lambda: defense_picture(name), f'Where {label} takes the images of a batch')
    options = ', '.join(f'`{o}`' for o in DEFENSES[name].options)
    return f'### {label}\n\n' + beside(
        picture, text, f'{linked(code)}, explained in {cell_link(code)}. By name: `make_defense({name!r}, ...)`.',
        f'<details><summary>Options</summary>\n\n{options}\n\n</details>'
    )


def _methods(modules:tuple[str, ...])->list[str]:
    "Defenses that some modules add, without their variants."
    names = [name for module in modules for name in DEFENSES.names(module)]
    return [name for name in names if DEFENSES[name].name == name]


def defenses_page(pictures:Pictures)->str:
    "Every defence with its picture."
    labels = {name: of.label for name, of in DEFENSES.items()} | dict(
        library_loss='Losses of pytorch-metric-learning', free='Free adversarial training'
    )
    groups = (
        (
            'The table of COLO-TRIDE',
            (
                'Triplet defences of [defenses/00_base](nbs/defenses/00_base.ipynb) and'
                ' [defenses/01_colo_tride](nbs/defenses/01_colo_tride.ipynb). For the two that take turns, orange is'
                ' the first batch (CAP) and black the second (ANP).'
            ),
            ('defenses.base', 'defenses.colo_tride'),
        ),
        (
            'Baselines',
            'More ways to train against attacks, in [defenses/02_baselines](nbs/defenses/02_baselines.ipynb).',
            ('defenses.baselines',)
        ),
        (
            'Robust tuples', 'One element of each tuple moves, in [defenses/03_tuples](nbs/defenses/03_tuples.ipynb).',
            ('defenses.tuples',)
        ),
        (
            'Proxies and ensembles',
            (
                'EAT (our reconstruction) and what stands beside it, in [defenses/04_eat](nbs/defenses/04_eat.ipynb).'
                ' The picture is that of the first member; crosses are mixtures of two images.'
            ),
            ('defenses.eat',),
        ),
    )
    parts = [
        '# Defences',
        (
            'Each picture is made by the library: one batch of twelve glyphs of six classes (colour and shape, a line'
            ' joins a class) in a small network trained for a moment without attack, seen along its two main axes. An'
            ' arrow leads from an image to the copy from which the defence would learn next. No arrow: it learns from'
            ' the clean image. ε = 48/255, 8 steps.'
        ),
    ]
    for title, intro, some in groups:
        parts += [
            f'## {title}', intro,
            *(_defense_section(name, DEFENSES[name].constructor, labels[name], pictures) for name in _methods(some))
        ]
    return '\n\n'.join(parts) + '\n'


def switch_meanings()->dict[str, str]:
    "The comment behind each field of `defenses.colo_tride.Switches`."
    source = inspect.getsource(tride)
    says = comments(source)
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == 'Switches')
    return {f.target.id: says.get(f.lineno, '') for f in node.body if isinstance(f, ast.AnnAssign)}


def switches_table()->str:
    "Values of both profiles, the differing ones first."
    says, decides = switch_meanings(), _decides()
    lines = [['switch', 'paper', 'official code', 'values', 'what it decides'], ['---']*5]
    order = sorted(tride.PAPER, key=lambda k: tride.PAPER[k] == tride.OFFICIAL[k])
    for key in order:
        differs = tride.PAPER[key] != tride.OFFICIAL[key]
        a, b = f'`{_plain(tride.PAPER[key])}`', f'`{_plain(tride.OFFICIAL[key])}`'
        known = (
            ', '.join(map(str, tride.CHOICES[key]))
            if key in tride.CHOICES and key not in ('miner', 'collapse_miner')
            else says[key]
        )
        lines.append([f'`{key}`', a, f'**{b}**' if differs else b, escaped(known), decides.get(key, '')])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _plain(value)->str: return f'{value:.3g}' if isinstance(value, float) else str(value)


def _decides()->dict[str, str]:
    "The last column of the table in the notebook of COLO-TRIDE, which says what each switch is for."
    found = {}
    for line in section(next(p for p in library() if p.stem.endswith('_tride')), 'Choices').splitlines():
        cells = [c.strip() for c in line.strip('|').split('|')]
        if len(cells) == 4:
            for name in cells[0].split(','): found[name.strip().strip('`')] = cells[3]
    return found


def choices()->str:
    "The section Choices of every library notebook."
    parts = []
    for path in library():
        if (text := section(path, 'Choices')) and not path.stem.endswith('_tride'):
            parts += [
                f'### [{address(path)}](nbs/{address(path)}.ipynb)',
                links(re.sub(r'\]\((?=[\w./-]+\.ipynb)', f'](nbs/{folder_of(path)}/', text), 0)
            ]
    return '\n\n'.join(parts)
