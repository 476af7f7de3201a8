"""What transformers calls while it loads, saves and dequantizes a packed model.

This module is imported while transformers imports itself, so it brings in nothing of its models; what does is
imported when a packed checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from ernieq.errors import BackendUnavailableError


class ErnieqQuantizer(HfQuantizer):
    """Loads checkpoints that ``ernieq quantize`` has written; transformers itself can't make them.

    Attributes:
        origin: the checkpoint that the model was loaded from; saving needs it.
    """

    requires_calibration = True

    def validate_environment(
        self, *_: Any, device_map: Mapping[str, Any] | str | None = None, **__: Any
    ) -> None:
        """Refuse a placement that packed weights can't follow, before anything is loaded.

        Raises:
            BackendUnavailableError: the map has a place that is neither a CPU nor an NVIDIA GPU, or both.
        """
        if not isinstance(device_map, Mapping):
            return
        kinds = {_device_kind(place) for place in device_map.values()}
        if len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
            raise BackendUnavailableError(
                f"device_map puts packed weights on {' and '.join(sorted(kinds))}; they run all on the CPU or "
                "all on NVIDIA GPUs and can't be offloaded: pass device_map='cpu', 'cuda' or more max_memory"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from ernieq.integrations.transformers.save import Origin
        from ernieq.integrations.transformers.source import open_checked
        from ernieq.integrations.transformers.swap import insert_packed

        source = open_checked(model.config.name_or_path, checkpoint_files)
        insert_packed(model, source)
        self.origin = Origin(source.directory, source.reader.manifest)

    def update_weight_conversions(self, weight_conversions: list[Any], _model: Any = None) -> list[Any]:
        """Keep what renames tensors and drop what joins experts: packed experts stay one by one.

        Up to transformers 5.20.2 no model is passed.
        """
        from transformers.core_model_loading import WeightRenaming

        return [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from ernieq.integrations.transformers.save import save_completely
        from ernieq.integrations.transformers.swap import finish_packed

        finish_packed(model)
        model._weight_conversions = []  # get_state_dict_and_metadata gives the names of the checkpoint
        model.save_pretrained = save_completely.__get__(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that ``save_pretrained`` writes."""
        from ernieq.integrations.transformers.save import packed_state

        return packed_state(model, self.origin), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from ernieq.integrations.transformers.dequantize import dequantize_modules

        dequantize_modules(model, dtype or torch.bfloat16)
        # From here on the model saves and ties as transformers' own does.
        for attribute in ("save_pretrained", "_weight_conversions"):
            delattr(model, attribute)
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: see ``get_state_dict_and_metadata``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradients."""
        return False


def _device_kind(place: Any) -> str:
    """``cpu``, ``cuda``, ``disk`` or another type of device; a number is a GPU's."""
    if isinstance(place, int):
        return "cuda"
    return str(place).partition(":")[0]
