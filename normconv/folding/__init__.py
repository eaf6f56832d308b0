"""Any reparametrisation to plain weights, and rebuilding a converted structure from its history."""

from normconv.folding.fold import fold as fold
from normconv.folding.fold import rebuild as rebuild
