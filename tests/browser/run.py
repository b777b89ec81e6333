"""Run the tests of this folder with node in a real browser: `make browser-test`, or `make browser-test T=lab` for one
file."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

HERE = Path(__file__).resolve().parent
CHROMIUM = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def installed()->str:
    "Why the tests cannot run here; empty when they can."
    for name in ('node', 'npm'):
        if not which(name): return f'expected {name} on the PATH, found none; install Node.js 20 or newer'
    if not chromium():
        return 'expected Chromium on the PATH or its file in CHROMIUM, found none; install the package chromium'
    if (HERE/'node_modules'/'playwright-core').is_dir(): return ''
    made = subprocess.run(
        ['npm', 'ci', '--ignore-scripts', '--no-audit', '--no-fund', '--silent'], cwd=HERE, capture_output=True,
        text=True
    )
    return (
        ''
        if made.returncode == 0
        else (
            'expected npm ci to install playwright-core, found:'
            f' {made.stderr.strip().splitlines()[-1:] or made.returncode}; is a registry in reach?'
        )
    )


def chromium()->str: return os.environ.get('CHROMIUM') or next(filter(None, map(which, CHROMIUM)), '')


def counted(output:str)->tuple[int, int]:
    """Passed and failed tests in the output of node's test runner; a test with parts counts by its parts, unless it
    fails by itself."""
    passed = failed = inner = bad = 0
    for indent, word in re.findall(r'^( {4})?(ok|not ok) \d+', output, re.M):
        good = word == 'ok'
        if not indent and inner and (good or bad): inner = bad = 0
        else: passed, failed = passed + good, failed + (not good)
        if indent: inner, bad = inner + 1, bad + (not good)
    return passed, failed


def run(file:Path)->tuple[int, int]:
    "One file; whatever ends without a count of its own has failed."
    began = time.monotonic()
    env = os.environ | {'CHROMIUM': chromium(), 'PYTHON': sys.executable}
    done = subprocess.run(
        ['node', '--test', '--test-reporter=tap', file.name], cwd=HERE, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True
    )
    passed, failed = counted(done.stdout)
    if (done.returncode and not failed) or not passed + failed: failed += 1
    if failed: print(done.stdout)
    print(f'{file.name}: {passed} passed, {failed} failed, {time.monotonic() - began:.0f} s', flush=True)
    return passed, failed


def build_pages()->None:
    "Pages of the committed reports that are not built yet, for git keeps none."
    from robust_dml.papers import gallery
    for folder in gallery.report_folders(HERE.parent.parent/'reports'):
        if not (folder/'index.html').is_file(): gallery.rewrite(folder)


def main(names)->int:
    if why := installed():
        required = os.environ.get('CI_REQUIRE_BROWSER') == '1'
        print(f'browser tests {"failed" if required else "skipped"}: {why}')
        return int(required)
    files = [f for f in sorted(HERE.glob('*.test.mjs')) if not names or f.name.removesuffix('.test.mjs') in names]
    if not files:
        raise SystemExit(
            f'expected names of {", ".join(f.name.removesuffix(".test.mjs") for f in sorted(HERE.glob("*.test.mjs")))},'
            f' found {", ".join(names)}'
        )
    if {'report', 'explorer'} & {f.name.removesuffix('.test.mjs') for f in files}: build_pages()
    passed, failed = map(sum, zip(*map(run, files)))
    print(f'{passed} passed, {failed} failed')
    return int(failed > 0)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
