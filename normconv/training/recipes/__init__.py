"""The built-in recipes: one file each, one entry in the table."""

from __future__ import annotations

import difflib

from normconv.errors import Problem, UsageError
from normconv.training.recipe import Recipe
from normconv.training.recipes import (
    cifar_convpool_cnn_c,
    conv_vae,
    digits,
    fashion_microbatch,
    mnist_dense,
    q_network,
    recurrent,
    tfa_tutorial,
)

__all__ = ["RECIPES", "recipe_of"]

RECIPES: dict[str, Recipe] = {
    room.RECIPE.name: room.RECIPE
    for room in (
        digits,
        tfa_tutorial,
        mnist_dense,
        fashion_microbatch,
        cifar_convpool_cnn_c,
        conv_vae,
        recurrent,
        q_network,
    )
}


def recipe_of(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        UsageError: there is none.

    >>> recipe_of("mnist-dense").normalizations
    ('plain', 'wn', 'wn+init', 'bn', 'ln')
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        way_out = f"did you mean {close[0]}?" if close else f"known are {', '.join(RECIPES)}"
        raise UsageError(Problem("recipe", f"{name!r} is unknown", way_out))
    return RECIPES[name]
