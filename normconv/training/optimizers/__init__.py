"""Optimizers that train the weights of a plain model as weight norm or standardization would."""

from normconv.training.optimizers.classes import WNSGD as WNSGD
from normconv.training.optimizers.classes import WSSGD as WSSGD
from normconv.training.optimizers.classes import WNAdam as WNAdam
from normconv.training.optimizers.classes import WNAdamW as WNAdamW
from normconv.training.optimizers.classes import WSAdam as WSAdam
from normconv.training.optimizers.classes import WSAdamW as WSAdamW
from normconv.training.optimizers.classes import reparametrise as reparametrise
