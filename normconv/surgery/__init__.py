"""From a model to a plan, and from a plan to a new model."""

from normconv.surgery.apply import Result as Result
from normconv.surgery.apply import apply_plan as apply_plan
from normconv.surgery.identity import fingerprint as fingerprint
from normconv.surgery.planner import checked_inputs as checked_inputs
from normconv.surgery.planner import make_plan as make_plan
