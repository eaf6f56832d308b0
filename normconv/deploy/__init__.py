"""Deployment: ONNX export with proof, the ONNX Runtime session, verification and timing of models.

The names are resolved when they are first used: reading a graph and running a file need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {
    "bench": "normconv.deploy.benching",
    "export_onnx": "normconv.deploy.export",
    "norm_nodes": "normconv.deploy.onnx_graph",
    "Session": "normconv.deploy.session",
    "verify": "normconv.deploy.verification",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'normconv.deploy' has no attribute {name!r}")


if TYPE_CHECKING:
    from normconv.deploy.benching import bench as bench
    from normconv.deploy.export import export_onnx as export_onnx
    from normconv.deploy.onnx_graph import norm_nodes as norm_nodes
    from normconv.deploy.session import Session as Session
    from normconv.deploy.verification import verify as verify
