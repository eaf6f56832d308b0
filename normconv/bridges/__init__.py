"""Checkpoints from one convention of names to another, without the model they are for."""

from normconv.bridges.conventions import CONVENTIONS as CONVENTIONS
from normconv.bridges.files import convert_file as convert_file
from normconv.bridges.state_dicts import Converted as Converted
from normconv.bridges.state_dicts import convert_state_dict as convert_state_dict
