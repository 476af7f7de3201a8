"""How long a job was announced to take, kept beside its work: who resumes it need not measure again."""

from __future__ import annotations

import socket
from typing import Any

import torch

from ernieq.convert.estimate import Estimate
from ernieq.convert.plan import Plan
from ernieq.convert.staging import PACE, Staging
from ernieq.convert.unit_store import journalled_modules
from ernieq.convert.workplace import Workplace


def keep_pace(staging: Staging, estimate: Estimate, device: torch.device) -> None:
    """Keep an estimate for a run that goes on with this one.

    Raises:
        StorageError: the disk refuses.
    """
    staging.write_json(PACE, {"layers": estimate.layers, "rest": estimate.rest, "where": _where(device)})


def remaining_seconds(staging: Staging, plan: Plan, device: torch.device) -> float | None:
    """Seconds that the rest of a job takes, by what was measured when it began.

    None if nothing is finished yet, or if it was begun on another machine, device or number of threads.
    """
    kept = staging.read_json(PACE)
    if not staging.has_units or kept is None or kept.get("where") != _where(device):
        return None
    done = sum(plan.module_weights.get(module, 0) for module in journalled_modules(staging.journal))
    left: float = kept["layers"] * (1 - done / plan.encoded_weights) + kept["rest"]
    return left


def _where(device: torch.device) -> dict[str, Any]:
    return {
        "machine": socket.gethostname(),
        "device": Workplace(device, None).name,
        "threads": torch.get_num_threads(),
    }
