"""What a file says of where it comes from: version, target, plan. Nothing of the machine."""

from __future__ import annotations

import hashlib
import json

from torch import nn

from normconv.plan import history_of

__all__ = ["PLAN_KEY", "TARGET_KEY", "stamp"]

#: Where a file says what the model was converted to.
TARGET_KEY = "normconv.target"
#: Where a file has the SHA-256 of the plan that was applied last.
PLAN_KEY = "normconv.plan"


def stamp(model: nn.Module) -> dict[str, str]:
    """Return target and plan hash of a converted model; nothing for another.

    >>> stamp(nn.ReLU())
    {}
    """
    plans = [entry["apply"] for entry in history_of(model) if entry.get("apply")]
    if not plans:
        return {}
    plan = plans[-1]
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    found = {PLAN_KEY: hashlib.sha256(text.encode()).hexdigest()}
    if targets := plan.get("targets"):
        found[TARGET_KEY] = ", ".join(targets)
    return found
