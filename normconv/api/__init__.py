"""The public verbs that are composed from several rooms."""

from normconv.api.converting import convert as convert
from normconv.api.converting import convert_ as convert_
from normconv.api.freezing import freeze_norms as freeze_norms
from normconv.api.layer import wrap as wrap
from normconv.api.proving import prove_conversion as prove_conversion
from normconv.api.proving import to_graph as to_graph
from normconv.api.refactoring import refactor as refactor
