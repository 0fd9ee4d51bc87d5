"""Registers the quantizer "hf_r2" with transformers once transformers has loaded what models are made of.

`import transformers` alone loads next to nothing: its models, and with them `PreTrainedModel`, come at first use.
Registering at once would load them, and double the time of an import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.modeling_utils"  # from_pretrained is in it: no model is loaded before
REGISTERS = "hf_r2.checkpoint"


def register() -> None:
    """Imports what registers the quantizer: now, if transformers has loaded its models, or else as soon as it has."""
    if AWAITED in sys.modules:
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds `AWAITED` where it always is, and has its loader register us afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for any other module."""
        if name != AWAITED:
            return None
        specs = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    """A module's own loader, which registers us when the module is there."""

    def __init__(self, loader: Any, finder: Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]  # for inspect and pickle
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(REGISTERS)
