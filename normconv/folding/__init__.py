"""Any reparametrisation to plain weights, and rebuilding a converted structure from its history."""

from normconv.folding.constant_norms import put_constant_norms_ as put_constant_norms_
from normconv.folding.constant_norms import sampled_norms as sampled_norms
from normconv.folding.original_class import applied_plans as applied_plans
from normconv.folding.original_class import refactor_norms as refactor_norms
from normconv.folding.refactoring import refactor_layers as refactor_layers
from normconv.folding.refactoring import reparametrise_layers_ as reparametrise_layers_
from normconv.folding.whole_model import fold as fold
from normconv.folding.whole_model import rebuild as rebuild
