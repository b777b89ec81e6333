"""Writes the sources of the HTML pages from notebooks, modules and committed reports; `make docs` calls it."""
import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from builder import api, catalogues, notebooks, results

MATHJAX = '3.2.2'


def fill(
    text:str,           # a page of docs/pages
    parts:dict[str, str], # what {{name}} stands for
)->str:
    "A written page with its generated parts."
    for name, part in parts.items(): text = text.replace('{{' + name + '}}', part)
    if '{{' in text:
        raise ValueError(f'expected parts {sorted(parts)}, found another in a page: {text[text.index("{{"):][:40]}')
    return text


def write_pages(
    target:Path, # folder of the sources, empty
    cache:Path,  # pictures of earlier builds
)->None:
    "Everything but MathJax."
    shutil.copytree(DOCS/'_static', target/'_static')
    shutil.copy(DOCS/'conf.py', target)
    notebooks.write(target, results.experiments())
    api.write(target)
    pictures = catalogues.Pictures(target, cache)
    results.copy_reports(target/'_extra', cache.parent/'reports')
    parts = dict(
        extend=notebooks.extend(), switches=catalogues.switches_table(), choices=catalogues.choices(),
        explorers=results.explorers()
    )
    for page in sorted((DOCS/'pages').glob('*.md')):
        (target/page.name).write_text(fill(page.read_text(encoding='utf-8'), parts), encoding='utf-8')
    made = dict(
        equations=catalogues.equations_page(), attacks=catalogues.attacks_page(pictures),
        defenses=catalogues.defenses_page(pictures), reports=results.reports_page(), claims=results.claims_page(),
        errata=results.errata_page(), benchmarks=results.benchmarks_page(target)
    )
    for name, text in made.items(): (target/f'{name}.md').write_text(text, encoding='utf-8')


def fetch_mathjax(
    target:Path, # folder of the sources
    cache:Path,  # keeps the file between builds
)->None:
    "tex-svg.js of the npm package, beside the pages, so that they need no network."
    kept = cache/f'mathjax-{MATHJAX}'
    if not (kept/'tex-svg.js').exists():
        if not shutil.which('npm'):
            sys.exit(
                'expected npm, which brings MathJax for the formulas of the pages, found none; install Node.js 18 or'
                ' newer and run make docs again'
            )
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ['npm', 'pack', '--silent', f'mathjax@{MATHJAX}'], cwd=folder, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(
                    f'expected npm to fetch mathjax {MATHJAX}, found an error: {done.stderr.strip()[-300:]}; check the'
                    ' network and run make docs again'
                )
            kept.mkdir(parents=True, exist_ok=True)
            with tarfile.open(next(Path(folder).glob('*.tgz'))) as archive:
                for member, name in (('package/LICENSE', 'LICENSE'), ('package/es5/tex-svg.js', 'tex-svg.js')):
                    (kept/name).write_bytes(archive.extractfile(member).read())
    shutil.copytree(kept, target/'_static'/'mathjax', dirs_exist_ok=True)


def bring(
    new:Path, # folder
    old:Path, # folder that becomes equal to it
)->None:
    "Files that did not change keep their time, so that Sphinx builds only what did."
    names = {p.relative_to(new) for p in new.rglob('*') if p.is_file()}
    for path in [p for p in old.rglob('*') if p.is_file() and p.relative_to(old) not in names]: path.unlink()
    for name in names:
        (old/name).parent.mkdir(parents=True, exist_ok=True)
        if not (old/name).exists() or (old/name).read_bytes() != (new/name).read_bytes():
            shutil.copy(new/name, old/name)


def main()->None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('target', type=Path, help='folder of the sources')
    parser.add_argument(
        '--cache', type=Path, default=Path('build/docs/cache'), help='folder of what later builds take again'
    )
    args, began = parser.parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder)/'source'
        new.mkdir()
        write_pages(new, args.cache/'pictures')
        fetch_mathjax(new, args.cache)
        bring(new, args.target)
    print(
        f'{sum(1 for p in args.target.rglob("*") if p.suffix in (".md", ".ipynb") and "_extra" not in p.parts)} pages'
        f' prepared in {time.perf_counter() - began:.0f} s'
    )


if __name__ == '__main__': main()
