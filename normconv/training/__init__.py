"""Training: optimizers, averages, comparisons, and what it does to the directions of weights."""

from normconv.training.averaging import average as average
from normconv.training.caching import CachedWeights as CachedWeights
from normconv.training.caching import cached_weights as cached_weights
from normconv.training.comparing import compare as compare
from normconv.training.comparison import Comparison as Comparison
from normconv.training.directions import bound_directions_ as bound_directions_
from normconv.training.directions import direction_growth as direction_growth
from normconv.training.directions import direction_norms as direction_norms
from normconv.training.directions import keep_directions_bounded as keep_directions_bounded
from normconv.training.groups import param_groups as param_groups
from normconv.training.optimizers import WNSGD as WNSGD
from normconv.training.optimizers import WSSGD as WSSGD
from normconv.training.optimizers import WNAdam as WNAdam
from normconv.training.optimizers import WNAdamW as WNAdamW
from normconv.training.optimizers import WSAdam as WSAdam
from normconv.training.optimizers import WSAdamW as WSAdamW
from normconv.training.optimizers import reparametrise as reparametrise
from normconv.training.own import recipe_of_model as recipe_of_model
from normconv.training.rebinding import Rebound as Rebound
from normconv.training.rebinding import rebind as rebind
from normconv.training.rebinding import rebind_ as rebind_
from normconv.training.recipe import Budget as Budget
from normconv.training.recipe import Recipe as Recipe
from normconv.training.recipes import recipe_of as recipe_of
