"""The capture that runs the model: what it sees of memory, views, writes and escapes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import CaptureError
from normconv.graph import CallGraph, Site, capture, survey
from normconv.graph.tensor_identity import Memory, key_of
from normconv.graph.tracing import copied, tensors_in
from normconv.surgery import make_plan
from tests.zoo import ZOO, x
from tests.zoo_forms import ConvNorm, Opaque

C2 = x(2, 3, 6, 6)


def hooked(model: nn.Module, *args: Any, **kwargs: Any) -> CallGraph:
    return capture(model.eval(), args, kwargs, methods=("hooks",))


def site(forward: Callable[[Any, Tensor], Any], *args: Any) -> Site:
    """The only site of a conv, a norm and what `forward` does with them."""
    model = type("Net", (ConvNorm,), {"forward": forward})()
    return survey(model, args or (C2,), methods=("hooks",)).sites[0]


def test_calls_users_shapes_and_names_are_those_of_fx() -> None:
    model = ZOO["residual_net"].build().eval()
    by_hooks, by_fx = hooked(model, C2), capture(model, (C2,), methods=("fx",))
    assert by_hooks.method == "hooks"
    assert list(by_hooks.calls_of) == [n for n in by_fx.calls_of if n in by_hooks.calls_of]
    for name, calls in by_hooks.calls_of.items():
        assert [call.shape for call in calls] == [call.shape for call in by_fx.calls_of[name]]
    assert [c.index for c in by_hooks.calls] == list(range(len(by_hooks.calls)))
    assert all(i < call.index for call in by_hooks.calls for i in call.inputs)


def test_nothing_of_model_inputs_and_random_state_is_changed() -> None:
    class Writes(ConvNorm):
        count = 0

        def forward(self, image: Tensor) -> Tensor:
            self.count = self.count + 1
            self.cache = image.add_(torch.randn(()))
            return self.bn(self.conv(image))

    model, given, state = Writes().train(), C2.clone(), torch.random.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, (given,), methods=("hooks",))
    assert list(graph.calls_of) == ["conv", "bn"]
    assert torch.equal(given, C2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (model.count, hasattr(model, "cache"), model.training) == (0, False, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda y: y.mul_(2), "mul_"),
        (lambda y: y[:, 0].mul_(2), "view"),
        (lambda y: y.view(-1)[:3].zero_(), "view"),
        (lambda y: F.relu(y, inplace=True), "relu"),
        (lambda y: torch.add(y, 1, out=y), "add"),
        (lambda y: y.detach().numpy(), "detach"),
        (lambda y: y.tolist(), "tolist"),
        (lambda y: y.data_ptr(), "data_ptr"),
        (lambda y: float(y.sum()), "sum"),
        (lambda y: y.data.mul_(2), "mul_"),
        (lambda y: torch.nn.init.zeros_(y), "zero"),
    ],
)
def test_what_happens_to_the_output_before_the_norm_is_seen(
    between: Callable[[Tensor], Any], words: str
) -> None:
    """Each is a use or a write through memory that the norm reads as well; no result is taken."""

    def forward(self: Any, image: Tensor) -> Tensor:
        y = self.conv(image)
        between(y)
        return self.bn(y)

    found = site(forward)
    assert not found.producers
    assert words in found.obstacle


def test_a_view_taken_before_a_write_is_a_view_of_what_was_written() -> None:
    def forward(self: Any, image: Tensor) -> Tensor:
        y = self.conv(image)
        same = y.view(y.shape)
        y.add_(1)
        return self.bn(same)

    assert not site(forward).producers


def test_a_write_after_the_norm_is_a_use() -> None:
    def forward(self: Any, image: Tensor) -> Tensor:
        y = self.conv(image)
        z = self.bn(y)
        y.add_(1)
        return z

    assert "also used by add_" in site(forward).obstacle


def test_what_changes_no_value_is_no_use() -> None:
    def forward(self: Any, image: Tensor) -> Tensor:
        y = self.conv(image)
        assert y.shape[0] == y.size(0)
        assert y.dim() == 4
        assert y.is_contiguous()
        assert y.dtype == image.dtype
        assert not y.requires_grad
        assert len(y) == 2
        return self.bn(y)

    assert site(forward).producers == ("conv",)


def test_memory_that_is_used_again_is_not_mistaken() -> None:
    """Freed outputs give their address to later tensors: hundreds of times the same `id`."""

    def forward(self: Any, image: Tensor) -> Tensor:
        for _ in range(200):
            image + 1  # freed at once
        y = self.conv(image)
        z = self.bn(y)
        del y
        for _ in range(200):
            z = z + 0
        return z

    assert site(forward).producers == ("conv",)


def test_no_tensor_is_kept_alive() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def forward(self: Any, image: Tensor) -> Tensor:
        y = self.conv(image)
        seen.append(weakref.ref(y))
        y = self.bn(y)
        assert seen[0]() is None
        return y

    assert site(forward).producers == ("conv",)
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_what_the_model_keeps_is_a_use() -> None:
    def keeps(self: Any, image: Tensor) -> Tensor:
        self.feature = self.conv(image)
        return self.bn(self.feature)

    def hides(self: Any, image: Tensor) -> Opaque:
        y = self.conv(image)
        hidden = Opaque(y, y)
        return Opaque(self.bn(y), [lambda: hidden])  # type: ignore[arg-type]

    assert "kept after the forward" in site(keeps).obstacle
    assert "kept after the forward" in site(hides).obstacle


def test_an_input_of_an_unknown_class_is_found() -> None:
    @dataclasses.dataclass
    class Batch:
        image: Tensor

    def forward(self: Any, batch: Batch) -> Tensor:
        return self.bn(self.conv(batch.image))

    model = type("Net", (ConvNorm,), {"forward": forward})()
    for method in ("export", "hooks"):
        found = survey(model, (Batch(C2),), methods=(method,))
        assert found.sites[0].producers == ("conv",)


def test_an_input_that_is_given_twice_is_one_tensor() -> None:
    a, (b, c) = copied((C2, (C2, C2[:1])))
    assert a is b
    assert a is not C2
    assert c.shape[0] == 1


def test_tensors_are_found_in_objects_that_refer_to_themselves() -> None:
    thing = Opaque(C2, C2)
    thing.me = thing  # type: ignore[attr-defined]
    assert [path for path, _ in tensors_in(thing)] == [(0,), (1,)]


def test_memory_knows_stale_views() -> None:
    memory, y = Memory(), torch.zeros(4)
    key = memory.hold(y)
    assert not memory.knows(key)
    memory.write(key, 3)
    memory.put(y, 3)
    assert memory.maker(y) == 3
    assert memory.maker(y[:2]) is None
    memory.write(key_of(y[1:]), 5)
    assert memory.maker(y) is None
    assert memory.writer(key) == 5
    assert list(memory.alive()) == [key]
    del y
    assert list(memory.alive()) == []


def test_outside_reads_and_functional_norms() -> None:
    assert hooked(ZOO["reads_norm"].build(), C2).outside_reads == {"bn"}
    assert hooked(ZOO["reads_conv"].build(), C2).outside_reads == {"conv"}
    model = ZOO["functional"].build()
    assert hooked(model, C2).functional_norms == ("batch_norm",)
    assert capture(model.train(), (C2,), methods=("hooks",)).functional_norms == ()


def test_a_layer_that_returns_several_tensors_and_one_that_hands_on_its_input() -> None:
    class Pair(nn.Conv2d):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(image)
            return y, y * 2

    class Lazy(nn.Conv2d):
        def forward(self, image: Tensor) -> Tensor:
            return image

    class Net(ConvNorm):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.none = Pair(3, 4, 3), Lazy(4, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            first, _ = self.pair(image)
            return self.bn(self.none(first))

    graph = hooked(Net(), C2)
    norm = graph.calls_of["bn"][0]
    source = graph.calls[norm.inputs[0]]
    assert (source.kind, source.target) == ("function", "another view")
    names = {graph.calls[i].target for i in source.inputs}
    assert names == {"none", "getitem"}


def test_export_takes_plain_tensors_where_a_class_stands_in_the_way() -> None:
    found = survey(ZOO["returns_opaque"].build(), (C2,), methods=("export",))
    assert "the model's output" in found.sites[0].obstacle


def test_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = ZOO["value_branch"].build()
    with pytest.raises(CaptureError, match="meta device has no values"):
        survey(model, (C2.to("meta"),))


def test_the_plan_says_that_only_one_path_was_seen() -> None:
    plan = make_plan(ZOO["value_branch"].build(), example_inputs=(C2,))
    assert plan.capture == "hooks"
    assert any("other inputs may take other paths" in note for note in plan.notes)
    assert sum("failed" in note for note in plan.notes) == 2
    assert not any("other paths" in n for n in make_plan(ConvNormNet(), example_inputs=(C2,)).notes)


class ConvNormNet(ConvNorm):
    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)


# --- inputs that the model does not take ----------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "where", "words"),
    [
        ((x(2, 5, 6, 6),), "conv (Conv2d)", "5 channels"),
        ((x(2, 3),), "conv (Conv2d)", "Expected 3D"),
        ((), "ConvNormNet", "missing 1 required positional argument"),
        (("text",), "conv (Conv2d)", "str"),
    ],
)
def test_the_module_that_raised_is_named_once(args: Any, where: str, words: str) -> None:
    with pytest.raises(CaptureError) as caught:
        survey(ConvNormNet(), args)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert words in problem.what
    assert "example inputs" in problem.way_out


def test_the_innermost_module_is_named_after_a_handled_exception() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(nn.Linear(9, 9)), nn.BatchNorm2d(3)

        def forward(self, image: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.first(image)
            return self.second(image[:, :2])

    with pytest.raises(CaptureError) as caught:
        survey(Net(), (C2,))
    assert [problem.where for problem in caught.value.problems] == ["second (BatchNorm2d)"]


def test_meta_models_are_told_apart_from_wrong_inputs() -> None:
    with torch.device("meta"):
        model = ConvNormNet()
    with pytest.raises(CaptureError) as caught:
        survey(model, (torch.empty(2, 5, 6, 6, device="meta"),))
    assert [problem.where for problem in caught.value.problems] == ["conv (Conv2d)"]


def test_all_ways_are_told_when_the_model_runs_and_none_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> CallGraph:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("normconv.graph.capturing.METHODS", (("one", broken), ("two", broken)))
    with pytest.raises(CaptureError) as caught:
        capture(ConvNormNet(), (C2,))
    (problem,) = caught.value.problems
    assert problem.where == "ConvNormNet (one and two)"
    assert "no such thing" in problem.what
    assert "at=" in problem.way_out


def test_hooks_that_a_forward_installs_are_taken_off_again() -> None:
    """As transformers does: hooks on first use, and an attribute that says so."""

    class Installs(ConvNorm):
        ready = False

        def forward(self, image: Tensor) -> list[Tensor]:
            taken: list[Tensor] = []
            if not self.ready:
                self.conv.register_forward_hook(lambda m, i, o: self.sink.append(o))
                self.ready = True
            self.sink = taken
            return [self.features(image) if image.sum() < 1e9 else image, *taken]

    model = Installs()
    before = len(model(C2))
    model = Installs()
    survey(model, (C2,))
    assert len(model(C2)) == before
