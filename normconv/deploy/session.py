"""ONNX Runtime behind one small class that says which provider really ran. It needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normconv.deploy.values import (
    BFLOAT16,
    ONNX_BFLOAT16,
    InputSpec,
    array,
    bfloat16_bits,
    from_ort_value,
    is_bfloat16,
    mismatches,
    zeros,
)
from normconv.errors import MissingDependency, Problem, Refused, UsageError

__all__ = ["PROVIDERS", "Session", "onnxruntime_module"]

#: The providers this project knows, by the name it gives them.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

_ERRORS_ONLY = 3
_FATAL_ONLY = 4
_WARNINGS = 2  # ONNX Runtime's own default
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


def onnxruntime_module() -> Any:
    """Return the installed ONNX Runtime, whichever distribution brought it.

    Raises:
        MissingDependency: none is installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency.needs("ONNX Runtime", "gpu", "cpu") from None
    # What a distribution leaves behind when another one was uninstalled over it.
    if not hasattr(onnxruntime, "InferenceSession"):
        raise Refused(
            Problem(
                "onnxruntime",
                "the installed package is incomplete (two distributions overwrote each other)",
                "pip uninstall every onnxruntime* and install 'normconv[gpu]' or 'normconv[cpu]'",
            )
        )
    return onnxruntime


class Session:
    """An ONNX file ready to run.

    Args:
        model: a path or the bytes of a file.
        provider: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, ONNX Runtime's own name of another that it
            has, or None for the best of the first two; CPU where torch, which knows, is not loaded.
        tf32: allow TF32 on CUDA; off by default, since it keeps 10 bits of the mantissa.
        threads: threads inside one operator; None takes torch's number, or where torch is not loaded
            ONNX Runtime's own.
        provider_options: more options of the provider.
        frugal: take half the memory to load and run, and a little longer: weights are not copied
            into the processor's layout, and no arena is kept.

    Raises:
        MissingDependency: no ONNX Runtime is installed.
        UsageError: an unknown provider, or no such file.
        Refused: the provider is not available or took no node, or the runtime cannot run the file.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        provider: str | None = None,
        *,
        tf32: bool = False,
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        frugal: bool = False,
    ) -> None:
        self._ort = onnxruntime_module()
        self._subject = "the given bytes" if isinstance(model, bytes) else str(model)
        self._source = model if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise UsageError(Problem(str(model), "there is no such file"))
        self.provider = self._choose(provider)
        self._provider_list = self._providers(tf32, provider_options or {})
        self._threads = threads or _torch_threads()
        self._session = self._start(self._options(frugal))
        self._counts: dict[str, int] | None = None
        self._require_provider()
        self.inputs = tuple(
            InputSpec(value.name, value.type, tuple(value.shape))
            for value in self._session.get_inputs()
        )
        self.outputs = tuple(str(value.name) for value in self._session.get_outputs())
        self._output_types = [str(value.type) for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Run the file once.

        Args:
            inputs: an array or a torch tensor for every input, by name.

        Returns:
            The outputs by name; bfloat16 comes back as float32.

        Raises:
            Refused: an input is missing, unknown, or of another type or shape; all are listed.
        """
        self._check_inputs(inputs)
        if any(spec.type == BFLOAT16 for spec in self.inputs) or BFLOAT16 in self._output_types:
            values = self._run_values(inputs)
        else:
            feeds = {spec.name: array(inputs[spec.name]) for spec in self.inputs}
            values = self._call(lambda: self._session.run(None, feeds))
        return dict(zip(self.outputs, values, strict=True))

    def bound(
        self,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Callable[[], None]:
        """Place inputs where the file computes, once, and return a call that runs it on them.

        Outputs stay there too, and a call has ended when they are there: nothing is copied.

        Args:
            inputs: as for `run`.
            outputs: arrays with the shapes and types of the outputs. With them the outputs' memory is
                taken once, as CUDA graphs need it.

        Raises:
            Refused: as `run`.
        """
        self._check_inputs(inputs)
        device = "cuda" if self.provider in ("cuda", "tensorrt") else "cpu"
        binding = self._session.io_binding()
        for spec in self.inputs:
            binding.bind_ortvalue_input(spec.name, self._ort_value(inputs[spec.name], device))
        for name in self.outputs:
            if outputs is None:
                binding.bind_output(name, device)
            else:
                like = self._ort.OrtValue.ortvalue_from_numpy(outputs[name], device, 0)
                binding.bind_ortvalue_output(name, like)

        def call() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        self._call(call)
        return call

    def nodes_per_provider(self) -> dict[str, int]:
        """Count the nodes that each provider took, as ONNX Runtime assigned them at load.

        Nothing is recorded while the model runs. A runtime too old to keep the assignment is asked
        once, by a second session that profiles one run on zeros.
        """
        if self._counts is None:
            get = getattr(self._session, "get_provider_graph_assignment_info", None)
            if get is None:
                self._counts = self._profiled_counts()
            else:
                counts: Counter[str] = Counter()
                for part in get():
                    counts[_short(part.ep_name)] += len(part.get_nodes())
                self._counts = dict(counts)
        return dict(self._counts)

    # --- starting ---

    def _choose(self, provider: str | None) -> str:
        available = self._ort.get_available_providers()
        if provider is None:
            usable = PROVIDERS["cuda"] in available and _torch_sees_cuda()
            return "cuda" if usable else "cpu"
        if provider not in PROVIDERS and provider in available:
            return _short(provider)
        if provider not in PROVIDERS:
            names = ", ".join(PROVIDERS)
            raise UsageError(Problem("provider", f"{provider!r} is not one of {names}"))
        if PROVIDERS[provider] not in available:
            raise Refused(
                Problem(
                    f"provider {provider}",
                    f"this ONNX Runtime was built with {', '.join(available)} only",
                    "pip install 'normconv[gpu]'",
                )
            )
        return provider

    def _providers(self, tf32: bool, more: Mapping[str, str]) -> list[Any]:
        if self.provider == "cpu":
            return [(PROVIDERS["cpu"], dict(more))]
        cuda = {"use_tf32": "1" if tf32 else "0"}
        if self.provider == "cuda":
            return [(PROVIDERS["cuda"], {**cuda, **more}), PROVIDERS["cpu"]]
        # What TensorRT does not take stays on the GPU.
        rest = [(PROVIDERS["cuda"], cuda)] if self.provider == "tensorrt" else []
        own = PROVIDERS.get(self.provider, self.provider)
        return [(own, dict(more)), *rest, PROVIDERS["cpu"]]

    def _options(self, frugal: bool) -> Any:
        options = self._ort.SessionOptions()
        if frugal:
            levels = self._ort.GraphOptimizationLevel
            options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
            options.enable_cpu_mem_arena = False
            options.enable_mem_pattern = False
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Keeping the assignment costs a few strings at load and nothing at run time.
        options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        return options

    def _start(self, options: Any) -> Any:
        with self._quiet():
            if self.provider in ("cuda", "tensorrt"):
                # Where torch is imported, its wheels' CUDA libraries are the ones to load.
                getattr(self._ort, "preload_dlls", lambda: None)()
            return self._call(
                lambda: self._ort.InferenceSession(
                    self._source, options, providers=self._provider_list
                )
            )

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep the runtime's native log off the terminal while a GPU is looked for."""
        self._ort.set_default_logger_severity(_FATAL_ONLY)
        try:
            # preload_dlls prints what it does not find.
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                yield
        finally:
            self._ort.set_default_logger_severity(_WARNINGS)

    def _require_provider(self) -> None:
        if self.provider == "cpu":
            return
        wanted = PROVIDERS.get(self.provider, self.provider)
        if wanted not in self._session.get_providers():
            what = "it could not be started; no usable GPU or CUDA libraries"
        elif not self.nodes_per_provider().get(self.provider):
            what = f"it took no node ({self.nodes_per_provider()})"
        else:
            return
        raise Refused(Problem(f"provider {self.provider}", what, "use provider='cpu'"))

    def _profiled_counts(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            options = self._ort.SessionOptions()
            options.log_severity_level = _ERRORS_ONLY
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._start(options)
            session.run(None, {spec.name: zeros(spec) for spec in self.inputs})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = {
            event["name"]: _short(event["args"]["provider"])
            for event in events
            if event.get("cat") == "Node" and "provider" in event.get("args", {})
        }
        return dict(Counter(nodes.values()))

    # --- running ---

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        known = {spec.name for spec in self.inputs}
        wanted = "; ".join(str(spec) for spec in self.inputs)
        problems = [
            Problem(name, "the file has no such input", f"it takes {wanted}")
            for name in inputs
            if name not in known
        ]
        for spec in self.inputs:
            if spec.name not in inputs:
                problems.append(Problem(spec.name, "this input is missing", f"it takes {wanted}"))
            else:
                problems.extend(mismatches(spec, inputs[spec.name]))
        if problems:
            raise Refused(problems)

    def _run_values(self, inputs: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """Run with OrtValues: numpy has no bfloat16."""
        feeds = {spec.name: self._ort_value(inputs[spec.name]) for spec in self.inputs}
        values = self._call(lambda: self._session.run_with_ort_values(None, feeds))
        return [from_ort_value(value) for value in values]

    def _ort_value(self, value: Any, device: str = "cpu") -> Any:
        if is_bfloat16(value):
            made = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            return made(bfloat16_bits(value), ONNX_BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(array(value), device, 0)

    def _call(self, work: Any) -> Any:
        try:
            return work()
        except NotImplementedError as error:
            raise Refused(Problem(self._subject, _first_line(error))) from error
        except Exception as error:
            # ONNX Runtime raises its own classes, one per status code, without a common root.
            if type(error).__module__.startswith("onnxruntime"):
                raise Refused(Problem(self._subject, _first_line(error))) from error
            raise


def _torch_threads() -> int:
    torch = sys.modules.get("torch")
    return 0 if torch is None else int(torch.get_num_threads())


def _torch_sees_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def _short(provider: str) -> str:
    for short, name in PROVIDERS.items():
        if provider == name:
            return short
    return provider


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
