"""What all tests share."""
import os
import shutil
from pathlib import Path

import pytest

REPORTS = Path(__file__).resolve().parent.parent/'reports'


@pytest.fixture(autouse=True, scope='session')
def own_cache(tmp_path_factory):
    "Decoded images of tests go to a cache of their own, also in processes that a test starts."
    before = os.environ.get('XDG_CACHE_HOME')
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))
    yield
    if before is None: del os.environ['XDG_CACHE_HOME']
    else: os.environ['XDG_CACHE_HOME'] = before


@pytest.fixture(scope='session')
def built_page(tmp_path_factory):
    "Builds the page of a committed report when it is first asked for; git keeps none."
    from robust_dml.papers import gallery
    home = tmp_path_factory.mktemp('built')
    for name in ('store', 'examples.zip', 'runs.jsonl'): (home/name).symlink_to(REPORTS/name)

    def page(name:str)->Path: # index.html of a copy of the report
        folder = home/name
        if not folder.exists():
            shutil.copytree(REPORTS/name, folder, ignore=shutil.ignore_patterns('index.html', 'figures'))
            gallery.rewrite(folder)
        return folder/'index.html'
    return page
