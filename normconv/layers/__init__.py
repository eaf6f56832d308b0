"""What normconv puts into models, and the in-place edits of single layers."""

from normconv.layers.absorb import absorb_affine_ as absorb_affine_
from normconv.layers.absorb import absorb_input_affine_ as absorb_input_affine_
from normconv.layers.channel_affine import ChannelAffine as ChannelAffine
from normconv.layers.clone import Clone as Clone
from normconv.layers.clone import Cloned as Cloned
from normconv.layers.constant_norm import ConstantNorm as ConstantNorm
from normconv.layers.copying import copy_model as copy_model
from normconv.layers.mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from normconv.layers.normed import Normed as Normed
from normconv.layers.operators import kind_of as kind_of
from normconv.layers.operators import layout_of as layout_of
from normconv.layers.operators import row_layouts as row_layouts
from normconv.layers.reparametrised import Reparametrised as Reparametrised
from normconv.layers.reparametrised import fold_layer_ as fold_layer_
from normconv.layers.reparametrised import on_each_class as on_each_class
from normconv.layers.reparametrised import share_parts_ as share_parts_
from normconv.layers.weight_norm import LogWeightNormed as LogWeightNormed
from normconv.layers.weight_norm import WeightNormed as WeightNormed
from normconv.layers.weight_norm import linear_gain_ as linear_gain_
from normconv.layers.weight_norm import log_gain_ as log_gain_
from normconv.layers.weight_norm import unfit_for_weight_norm as unfit_for_weight_norm
from normconv.layers.weight_norm import weight_norm_ as weight_norm_
from normconv.layers.weight_standardization import WeightStandardized as WeightStandardized
from normconv.layers.weight_standardization import mean_share as mean_share
from normconv.layers.weight_standardization import (
    unfit_for_weight_standardization as unfit_for_weight_standardization,
)
from normconv.layers.weight_standardization import weight_standardize_ as weight_standardize_
from normconv.layers.wrapping import check_scale as check_scale
from normconv.layers.wrapping import obstacle_to as obstacle_to
from normconv.layers.wrapping import wrap_ as wrap_
