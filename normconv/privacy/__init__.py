"""Training with differential privacy: what Opacus has to know of normconv's layers."""

from normconv.privacy.grad_samplers import register_grad_samplers as register_grad_samplers
from normconv.privacy.in_place import without_in_place as without_in_place
