"""What normconv puts into models, and the in-place edits of single layers."""

from normconv.layers.absorb import absorb_affine_ as absorb_affine_
from normconv.layers.absorb import absorb_input_affine_ as absorb_input_affine_
from normconv.layers.channel_affine import ChannelAffine as ChannelAffine
from normconv.layers.copying import copy_model as copy_model
from normconv.layers.operators import kind_of as kind_of
from normconv.layers.operators import layout_of as layout_of
from normconv.layers.reparametrised import Reparametrised as Reparametrised
from normconv.layers.reparametrised import WeightNormed as WeightNormed
from normconv.layers.reparametrised import fold_layer_ as fold_layer_
from normconv.layers.reparametrised import unfit_for_weight_norm as unfit_for_weight_norm
from normconv.layers.reparametrised import weight_norm_ as weight_norm_
