"""How easily is a model fooled, and what does hardening gain? `audit(model, images)` measures and writes a page."""
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ['audit', 'load_model', 'harden']

if TYPE_CHECKING:
    from .hardening import harden
    from .measure import audit, load_model

_PLACES = dict(audit='measure', load_model='measure', harden='hardening')


def __getattr__(name:str)->Any:
    "One of the public names, from its module."
    if name not in _PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_PLACES[name]}', __name__), name)


class _Callable(ModuleType):
    "Once imported, this package hides the function of the same name in `robust_dml`; so it can be called like it."
    def __call__(self, *args:Any, **kwargs:Any)->Any: return self.audit(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
