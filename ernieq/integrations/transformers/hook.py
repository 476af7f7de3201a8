"""Makes transformers know the method ``ernieq``, whichever of the two is imported first.

Importing transformers' list of methods brings in torch and takes seconds, and most of ernieq's commands need
neither. So a finder waits in ``sys.meta_path`` for that one module, lets the others find it, and registers the
method as soon as the module has run. It costs a comparison of strings per import.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ernieq.integrations.transformers.versions import requirement

METHODS_MODULE = "transformers.quantizers.auto"
METHOD = "ernieq"


def register_when_imported() -> None:
    """Register the method: now if transformers has its list of methods already, else when it is imported."""
    methods = sys.modules.get(METHODS_MODULE)
    if methods is not None:
        register(methods)
    elif not any(isinstance(finder, _MethodsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MethodsFinder())


def register(methods: ModuleType) -> None:
    """Add the method to transformers' lists; a second call changes nothing (transformers would raise).

    A transformers that has no such lists is still of use for other models, so it is warned of and goes on.
    """
    try:
        from ernieq.integrations.transformers.config import ErnieqConfig
        from ernieq.integrations.transformers.quantizer import ErnieqQuantizer

        if METHOD not in methods.AUTO_QUANTIZATION_CONFIG_MAPPING:
            methods.register_quantization_config(METHOD)(ErnieqConfig)
            methods.register_quantizer(METHOD)(ErnieqQuantizer)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"this transformers can't load packed checkpoints of ernieq ({error}); "
            f"pip install '{requirement()}' brings one that can",
            stacklevel=2,
        )


class _MethodsFinder(MetaPathFinder):
    """Finds one module as the finders behind it do, with a registration added to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != METHODS_MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
