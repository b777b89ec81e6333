"""Adversarially robust deep metric learning: train, attack, score and audit image-retrieval models.

The names below are the public face; each is imported when it is first asked for,
so that `import robust_dml` loads nothing else.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ['load_data', 'build_model', 'make_defense', 'train', 'evaluate', 'audit', 'harden']

if TYPE_CHECKING:
    from .audit.hardening import harden
    from .audit.measure import audit
    from .data.archives import load as load_data
    from .defenses.base import make_defense
    from .defenses.train import train
    from .metrics.evaluate import evaluate
    from .models.networks import build as build_model

_PLACES = dict(
    load_data='data.archives:load', build_model='models.networks:build', make_defense='defenses.base:make_defense',
    train='defenses.train:train', evaluate='metrics.evaluate:evaluate',
    audit='audit.measure:audit', harden='audit.hardening:harden')


def __getattr__(name:str)->Any:
    "One of the public names, from its module."
    if name not in _PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, _, thing = _PLACES[name].partition(':')
    found = getattr(import_module(f'.{module}', __name__), thing)
    if name != 'audit': globals()[name] = found # the name of a package too, which can be called as well
    return found


def __dir__()->list[str]: return sorted({*globals(), *__all__})
