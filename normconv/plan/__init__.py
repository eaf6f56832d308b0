"""What the user wants (recipe) and what will happen (plan), as pure data. Loads no torch."""

from normconv.plan.history import forget as forget
from normconv.plan.history import history_of as history_of
from normconv.plan.history import record as record
from normconv.plan.plan import Action as Action
from normconv.plan.plan import Plan as Plan
from normconv.plan.plan import Step as Step
from normconv.plan.recipe import KEEP as KEEP
from normconv.plan.recipe import Recipe as Recipe
from normconv.plan.recipe import Rule as Rule
from normconv.plan.span import Span as Span
