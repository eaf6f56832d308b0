"""Pure tensor maths: the affine map of a norm, rows of a weight, weight norm, error, noise floor."""

from normconv.numerics.affine import Affine as Affine
from normconv.numerics.affine import apply_affine as apply_affine
from normconv.numerics.affine import norm_affine as norm_affine
from normconv.numerics.columns import response_to_shift as response_to_shift
from normconv.numerics.columns import scale_columns_ as scale_columns_
from normconv.numerics.error import NOISE_FACTOR as NOISE_FACTOR
from normconv.numerics.error import noise_bound as noise_bound
from normconv.numerics.error import relative_l2 as relative_l2
from normconv.numerics.error import unprovable as unprovable
from normconv.numerics.memory import give_back_memory as give_back_memory
from normconv.numerics.modes import evaluating as evaluating
from normconv.numerics.modes import state_kept as state_kept
from normconv.numerics.rows import RowLayout as RowLayout
from normconv.numerics.rows import all_finite as all_finite
from normconv.numerics.rows import row_norms as row_norms
from normconv.numerics.rows import scale_rows as scale_rows
from normconv.numerics.rows import scale_rows_ as scale_rows_
from normconv.numerics.rows import wide_row_norms as wide_row_norms
from normconv.numerics.weight_norm import GainDirection as GainDirection
from normconv.numerics.weight_norm import normed_weight as normed_weight
from normconv.numerics.weight_norm import split_weight as split_weight
from normconv.numerics.weight_norm import split_weight_ as split_weight_
from normconv.numerics.weight_norm import true_weight as true_weight
