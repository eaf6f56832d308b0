"""Where models and inputs come from: safe files, named models, checkpoints; and where they go."""

from __future__ import annotations

from normconv.sources.data import Transform as Transform
from normconv.sources.data import open_data as open_data
from normconv.sources.folded import load_folded as load_folded
from normconv.sources.inputs import Inputs as Inputs
from normconv.sources.inputs import example_inputs as example_inputs
from normconv.sources.loading import Loaded as Loaded
from normconv.sources.loading import ModelLike as ModelLike
from normconv.sources.loading import load as load
from normconv.sources.loading import open_source as open_source
from normconv.sources.saving import save as save
from normconv.sources.specs import parse_model_args as parse_model_args
