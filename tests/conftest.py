"""What all tests share."""
import os

import pytest


@pytest.fixture(autouse=True, scope='session')
def own_cache(tmp_path_factory):
    "Decoded images of tests go to a cache of their own, also in processes that a test starts."
    before = os.environ.get('XDG_CACHE_HOME')
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))
    yield
    if before is None: del os.environ['XDG_CACHE_HOME']
    else: os.environ['XDG_CACHE_HOME'] = before
