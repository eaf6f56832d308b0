"""Checking a certificate again where a model is served: numpy, onnx, ONNX Runtime, and no torch."""

from normconv.recheck.checking import verify_certificate as verify_certificate
