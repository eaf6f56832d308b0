"""From a model to a plan, and from a plan to a new model."""

from normconv.surgery.apply import Result as Result
from normconv.surgery.apply import apply_plan as apply_plan
from normconv.surgery.apply import apply_plan_ as apply_plan_
from normconv.surgery.apply import check_plan as check_plan
from normconv.surgery.identity import fingerprint as fingerprint
from normconv.surgery.layer_steps import Layers as Layers
from normconv.surgery.lazy import lazy_modules as lazy_modules
from normconv.surgery.lazy import lazy_note as lazy_note
from normconv.surgery.lazy import materialise_ as materialise_
from normconv.surgery.lazy import materialised as materialised
from normconv.surgery.originals import original_norm as original_norm
from normconv.surgery.originals import originals as originals
from normconv.surgery.planner import checked_inputs as checked_inputs
from normconv.surgery.planner import make_plan as make_plan
