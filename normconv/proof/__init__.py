"""Proof that two models compute the same: runs in float64, site by site, against the noise floor."""

from normconv.proof.conversion import Proof as Proof
from normconv.proof.conversion import prove as prove
from normconv.proof.conversion import prove_outputs as prove_outputs
from normconv.proof.conversion import prove_recorded as prove_recorded
from normconv.proof.outputs import cast_inputs as cast_inputs
from normconv.proof.outputs import evaluate as evaluate
from normconv.proof.outputs import flat_outputs as flat_outputs
from normconv.proof.recorder import record_outputs as record_outputs
from normconv.proof.recording import Recording as Recording
from normconv.proof.recording import coarsest_dtype as coarsest_dtype
from normconv.proof.recording import record_original as record_original
from normconv.proof.trained_statistics import prove_converted as prove_converted
from normconv.proof.trained_statistics import (
    with_trained_statistics as with_trained_statistics,
)
from normconv.proof.visible import blind_sites as blind_sites
from normconv.proof.visible import randomise_norms_ as randomise_norms_
from normconv.proof.within import record_original_within as record_original_within
