"""Presets of ``--preset``: how much time a conversion may take.

| preset   | first search pass            | calibration windows                         | scales and norms |
|----------|------------------------------|---------------------------------------------|------------------|
| fast     | short: a quarter less search | 32                                          | as rounded       |
| balanced | full                         | 64                                          | as rounded       |
| best     | full                         | 460: own text on a GPU that holds the model | tuned            |

The bundled texts are 240 windows; best takes them all where the model does not write its own.

A recipe file and explicit options win over a preset; the recipe records the values, not the preset's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ernieq.kernels.viterbi import FULL_FIRST_PASS, SHORT_FIRST_PASS


class PresetName(StrEnum):
    """Names of the presets."""

    FAST = "fast"
    BALANCED = "balanced"
    BEST = "best"


@dataclass(frozen=True)
class Preset:
    """Values of a preset.

    Args:
        first_pass_steps: length of the first tail-biting pass.
        windows: calibration windows.
        tune_steps: steps of tuning the continuous parameters after the conversion; none if 0.
        own_text: whether the model writes the calibration text, on a GPU that holds it.
    """

    first_pass_steps: int
    windows: int
    tune_steps: int = 0
    own_text: bool = False

    def settings(self) -> Mapping[str, Any]:
        """The values that a recipe holds, in the layout of ``recipe.toml``."""
        return {
            "encode": {"first_pass_steps": self.first_pass_steps},
            "calibration": {"windows": self.windows},
            "tune": {"enabled": self.tune_steps > 0} | ({"steps": self.tune_steps} if self.tune_steps else {}),
        }


PRESETS: dict[PresetName, Preset] = {
    PresetName.FAST: Preset(SHORT_FIRST_PASS, 32),
    PresetName.BALANCED: Preset(FULL_FIRST_PASS, 64),
    PresetName.BEST: Preset(FULL_FIRST_PASS, 460, tune_steps=400, own_text=True),
}
