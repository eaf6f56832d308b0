"""Any reparametrisation to plain weights, and rebuilding a converted structure from its history."""

from normconv.folding.whole_model import fold as fold
from normconv.folding.whole_model import rebuild as rebuild
