"""Deployment: ONNX export with proof, the ONNX Runtime session, verification and timing of models."""

from normconv.deploy.benching import bench as bench
from normconv.deploy.export import export_onnx as export_onnx
from normconv.deploy.onnx_graph import norm_nodes as norm_nodes
from normconv.deploy.session import Session as Session
from normconv.deploy.verification import verify as verify
