"""Capture of models into one neutral call graph, the sites in it, and passes over GraphModules."""

from normconv.graph.branches import train_branches_ as train_branches_
from normconv.graph.branches import training_branches as training_branches
from normconv.graph.calls import Call as Call
from normconv.graph.calls import CallGraph as CallGraph
from normconv.graph.capturing import capture as capture
from normconv.graph.coupling import couples_in_training as couples_in_training
from normconv.graph.families import NormState as NormState
from normconv.graph.families import is_norm as is_norm
from normconv.graph.families import norm_state as norm_state
from normconv.graph.families import trailing_of as trailing_of
from normconv.graph.fx_capture import trace as trace
from normconv.graph.fx_capture import untouched_defaults as untouched_defaults
from normconv.graph.names import Names as Names
from normconv.graph.sites import Site as Site
from normconv.graph.sites import Survey as Survey
from normconv.graph.sites import judge as judge
from normconv.graph.sites import norm_names as norm_names
from normconv.graph.sites import survey as survey
from normconv.graph.within import Reached as Reached
from normconv.graph.within import reach as reach
from normconv.graph.within import relative_names as relative_names
from normconv.graph.within import submodule as submodule
from normconv.graph.within import survey_within as survey_within
