"""Exported modules and notebooks must agree, notebooks must be clean, and no module may outlive its notebook."""
import hashlib, json, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin_dir = Path(sys.executable).parent


def contents()->dict[str, str]:
    "Hash of every notebook and module."
    files = sorted([*root.glob('nbs/**/*.ipynb'), *root.glob('robust_dml/**/*.py')])
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if '.ipynb_checkpoints' not in f.parts
    }


def exported()->set[str]:
    "Modules that a notebook exports."
    names = set()
    for f in root.glob('nbs/**/*.ipynb'):
        source = '\n'.join(''.join(c['source']) for c in json.loads(f.read_text(encoding='utf-8'))['cells'])
        names |= {
            f'robust_dml/{n.replace(".", "/")}.py' for n in re.findall(r'^#\|\s*default_exp\s+([\w.]+)', source, re.M)
        }
    return names


before = contents()
for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([bin_dir/command], cwd=root, check=True)
after = contents()
orphans = {
    f for f in after if f.startswith('robust_dml/') and Path(f).name not in ('__init__.py', '_modidx.py')
} - exported()
changed = [f for f in before.keys() | after.keys() if before.get(f) != after.get(f)]
if changed:
    sys.exit(
        f'expected notebooks and modules in sync, found changes in {", ".join(sorted(changed))}; they are written now:'
        ' look at them and commit'
    )
if orphans:
    sys.exit(f'expected a notebook for every module, found none for {", ".join(sorted(orphans))}; delete the module')
print(f'{len(exported())} modules and their notebooks are in sync')
