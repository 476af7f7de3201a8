"""Presets of ``--preset``: how much time a conversion may take.

| preset   | first search pass             | calibration windows             | scales and norms |
|----------|-------------------------------|---------------------------------|------------------|
| fast     | short: a quarter less search  | 32                              | as rounded       |
| balanced | full                          | 64                              | as rounded       |
| best     | full                          | 200: all of the bundled texts   | tuned            |

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
        tune: whether the continuous parameters are tuned after the conversion.
    """

    first_pass_steps: int
    windows: int
    tune: bool = False

    def settings(self) -> Mapping[str, Any]:
        """The values that a recipe holds, in the layout of ``recipe.toml``."""
        return {
            "encode": {"first_pass_steps": self.first_pass_steps},
            "calibration": {"windows": self.windows},
            "tune": {"enabled": self.tune},
        }


PRESETS: dict[PresetName, Preset] = {
    PresetName.FAST: Preset(SHORT_FIRST_PASS, 32),
    PresetName.BALANCED: Preset(FULL_FIRST_PASS, 64),
    PresetName.BEST: Preset(FULL_FIRST_PASS, 200, tune=True),
}
