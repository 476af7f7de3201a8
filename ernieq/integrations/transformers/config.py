"""The ``quantization_config`` of a packed checkpoint as transformers wants it."""

from __future__ import annotations

import sys
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ernieq.integrations.transformers.hook import METHOD
from ernieq.integrations.transformers.versions import check_version
from ernieq.pack.quantization import check_version as check_format_version


class ErnieqConfig(QuantizationConfigMixin):
    """Holds the JSON object as it is (FORMAT.md, section 6), so that it is saved as it was loaded.

    Args:
        quant_method: ``ernieq``.
        entries: all other keys.

    Raises:
        BackendUnavailableError: this version of transformers is not supported.
        FormatError: the checkpoint has a format version that this ernieq can't read.
    """

    def __init__(self, quant_method: str = METHOD, **entries: Any) -> None:
        check_version(sys.modules["transformers"].__version__)
        check_format_version(entries.get("format_version"), "quantization_config of config.json")
        self.__dict__.update(quant_method=quant_method, **entries)
