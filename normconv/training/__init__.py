"""Training under different normalizations, and what it does to the directions of weights."""

from normconv.training.comparing import compare as compare
from normconv.training.comparison import Comparison as Comparison
from normconv.training.directions import bound_directions_ as bound_directions_
from normconv.training.directions import direction_growth as direction_growth
from normconv.training.directions import direction_norms as direction_norms
from normconv.training.directions import keep_directions_bounded as keep_directions_bounded
from normconv.training.own import recipe_of_model as recipe_of_model
from normconv.training.recipe import Budget as Budget
from normconv.training.recipe import Recipe as Recipe
from normconv.training.recipes import recipe_of as recipe_of
