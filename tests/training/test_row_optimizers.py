"""Optimizers of rows take a plain model where training (g, v) or (gain, v) takes the wrapped one."""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconv.errors import UsageError
from normconv.layers import Reparametrised, weight_norm_, weight_standardize_
from normconv.training import direction_norms, keep_directions_bounded, optimizers
from normconv.training.optimizers import WNSGD, WSSGD, WNAdam, reparametrise
from normconv.training.optimizers.rules import ADAM, SGD

BOUND = 1e-10
STEPS = 50
KINDS: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.02}),
    "sgd-decay": ("SGD", {"lr": 0.02, "weight_decay": 0.05}),
    "momentum": ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.02}),
    "dampening": ("SGD", {"lr": 0.02, "momentum": 0.8, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.005, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "adam": ("Adam", {"lr": 0.02}),
    "adam-decay": ("Adam", {"lr": 0.02, "weight_decay": 0.05}),
    "amsgrad": ("Adam", {"lr": 0.02, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
}


def net(form: str = "wn", seed: int = 0) -> nn.Sequential:
    """Each layout of rows; one row of weight norm is zero, the mean of a row is not."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.Tanh(),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(14, 5),
    ).double()
    if form == "wn":
        with torch.no_grad():
            made[2].weight[1] = 0
    return made


def wrapped(model: nn.Sequential, form: str, **options: Any) -> nn.Sequential:
    wrap_ = weight_norm_ if form == "wn" else weight_standardize_
    for layer in weighted(model):
        wrap_(layer, **options)
    return model


def weighted(model: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in model if not isinstance(layer, nn.Tanh | nn.Flatten)]


def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, generator=rng).double()
    return x, torch.randn(4, 5, generator=rng).double()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, micro: int = 1) -> None:
    x, y = batch()
    optimizer.zero_grad()
    for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (model(part) - target).square().mean().backward()
    optimizer.step()


def apart(a: nn.Sequential, b: nn.Sequential) -> float:
    """The largest difference of a weight or bias; NaN is the largest of all."""
    found = 0.0
    for one, other in zip(weighted(a), weighted(b), strict=True):
        for name in ("weight", "bias"):
            distance = (getattr(one, name) - getattr(other, name)).detach().abs().max()
            found = max(found, float(distance.nan_to_num(nan=float("inf"))))
    return found


def trajectories(
    form: str,
    kind: str,
    options: dict[str, Any],
    fused: str,
    steps: int = STEPS,
    micro: int = 1,
    resume: bool = False,
) -> tuple[float, nn.Sequential, torch.optim.Optimizer, nn.Sequential]:
    plain, graph = net(form), wrapped(net(form), form)
    ours = reparametrise(KINDS[kind](plain.parameters(), **options), plain, form, fused=fused)
    theirs = KINDS[kind](graph.parameters(), **options)
    worst = apart(plain, graph)
    for turn in range(steps):
        if resume and turn == steps // 2:
            plain, ours = resumed(plain, ours, form, kind, fused)
        learn(plain, ours, micro)
        learn(graph, theirs, micro)
        worst = max(worst, apart(plain, graph))
    assert all(bool(p.isfinite().all()) for p in plain.parameters())
    return worst, plain, ours, graph


def resumed(
    plain: nn.Sequential, ours: torch.optim.Optimizer, form: Any, kind: str, fused: str
) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Another model and optimizer that go on from a file."""
    file = io.BytesIO()
    torch.save({"model": plain.state_dict(), "optimizer": ours.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(form, seed=3)
    other = reparametrise(KINDS[kind](again.parameters(), lr=9.0), again, form, fused=fused)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    return again, other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["wn", "ws"])
def test_fifty_steps_are_those_of_the_graph(form: str, case: str) -> None:
    """Of two micro-batches each, with a checkpoint in the middle."""
    kind, options = CASES[case]
    worst, plain, ours, _ = trajectories(form, kind, options, "loop", micro=2, resume=True)
    assert worst <= BOUND
    start = net(form)
    assert apart(plain, start) > 1e-2
    assert type(ours).__name__ == f"{form.upper()}{kind}"


@pytest.mark.parametrize(
    ("form", "case"), [("wn", "nesterov"), ("wn", "amsgrad"), ("ws", "sgd"), ("ws", "adamw")]
)
def test_all_at_once_is_the_same(form: str, case: str) -> None:
    assert trajectories(form, *CASES[case], "foreach", micro=2)[0] <= BOUND


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler to compile with")
def test_compiled_steps_are_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's compiler says of itself
        # The longer one of the forms and of the rules; layers of one layout, since each compiles anew.
        assert straight("ws", *CASES["amsgrad"], "compile") <= BOUND


def straight(form: str, kind: str, options: dict[str, Any], fused: str) -> float:
    """The largest distance between trajectories of a network of Linear layers."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    graph = wrapped(copy.deepcopy(plain), form)
    ours = reparametrise(KINDS[kind](plain.parameters(), **options), plain, form, fused=fused)
    theirs = KINDS[kind](graph.parameters(), **options)
    worst = 0.0
    for turn in range(STEPS):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - turn / STEPS)
        learn(plain, ours)
        learn(graph, theirs)
        worst = max(worst, apart(plain, graph))
    assert ours.way == fused
    return worst


@pytest.mark.parametrize("rule", [SGD, ADAM])
@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_the_arithmetic_to_compile_is_that_of_torch(rule: Any, flags: tuple[bool, bool]) -> None:
    """Without a compiler: the same function, uncompiled."""
    maximize, other = flags
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0 if other else 0.4, "nesterov": other}
    group |= {"betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": other, "maximize": maximize}
    group |= {"decoupled_weight_decay": other}
    ours = torch.randn(5).double()
    theirs = ours.clone()
    names = rule.buffers(group)
    mine, torchs = ([torch.zeros(5).double() for _ in names] for _ in range(2))
    for count in range(1, 6):
        grad = torch.randn(5).double()
        numbers = torch.tensor([0.05, *rule.numbers(group, count)], dtype=torch.float64)
        decay, *others = numbers.unbind()
        rule.arithmetic_(rule.flags(group), others, decay, ours, grad.clone(), mine)
        named = {name: [b] for name, b in zip(names, torchs, strict=True)}
        rule.step_(group, 0.05, count, [theirs], [grad], named, False)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["wn", "ws"])
@pytest.mark.parametrize("case", ["sgd", "momentum", "adam-decay"])
def test_resuming_is_bit_for_bit(form: str, case: str) -> None:
    kind, options = CASES[case]
    _, plain, ours, _ = trajectories(form, kind, options, "loop", steps=5)
    again, other = resumed(plain, ours, form, kind, "loop")
    for _ in range(5):
        learn(plain, ours)
        learn(again, other)
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_before_the_first_step_has_the_means() -> None:
    options = {"lr": 0.02, "weight_decay": 0.05}
    plain, again, graph = net("ws"), net("ws", seed=3), wrapped(net("ws"), "ws")
    ours = optimizers.WSAdam(plain.parameters(), plain, fused="loop", **options)
    other = optimizers.WSAdam(again.parameters(), again, fused="loop", **options)
    again.load_state_dict(plain.state_dict())
    other.load_state_dict(ours.state_dict())
    theirs = torch.optim.Adam(graph.parameters(), **options)
    for _ in range(5):
        learn(again, other)
        learn(graph, theirs)
    assert apart(again, graph) <= BOUND


def test_a_copy_of_model_and_optimizer_goes_on_alike() -> None:
    _, plain, ours, _ = trajectories("wn", *CASES["adam"], "loop", steps=3)
    again, other = copy.deepcopy((plain, ours))
    for _ in range(3):
        learn(plain, ours)
        learn(again, other)
    assert apart(plain, again) == 0.0


def test_gains_of_zero_keep_their_direction_and_cross() -> None:
    """Decay of the gain alone stops at g = 0 exactly; then the row goes on to the other side."""
    plain, graph = net(), wrapped(net(), "wn")
    ours = WNSGD(plain.parameters(), plain, lr=1.0, gain_weight_decay=1.0, fused="loop")
    gains = [p for name, p in graph.named_parameters() if name.endswith("weight_g")]
    others = [p for name, p in graph.named_parameters() if not name.endswith("weight_g")]
    theirs = torch.optim.SGD([{"params": gains, "weight_decay": 1.0}, {"params": others}], lr=1.0)
    for model, optimizer in ((plain, ours), (graph, theirs)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.05
    ours.param_groups[0]["gain_weight_decay"] = None
    theirs.param_groups[0]["weight_decay"] = 0.0
    assert all(not bool(g.any()) for g in gains)
    assert all(not bool(ours.state[layer.weight]["gain"].any()) for layer in weighted(plain))
    assert all(0 < float(layer.weight.detach().abs().max()) < 1e-280 for layer in weighted(plain))
    signs = [g.detach().sign() for g in gains]
    worst, crossed = 0.0, 0
    for _ in range(STEPS):
        learn(plain, ours)
        learn(graph, theirs)
        worst = max(worst, apart(plain, graph))
        now = [g.detach().sign() for g in gains]
        crossed += sum(int((a * b < 0).sum()) for a, b in zip(signs, now, strict=True))
        signs = now
    assert worst <= BOUND
    assert crossed > 0
    assert any(bool((g < 0).any()) for g in gains)


def test_a_row_that_nothing_moves_stays_zero() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    optimizer = WNSGD(layer.parameters(), layer, lr=0.1, momentum=0.9, fused="loop")
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 3))[0, 1].backward()
        optimizer.step()
    assert float(layer.weight[0].detach().abs().max()) < 1e-28
    assert optimizer.state[layer.weight]["gain"][0] == 0
    assert bool(layer.weight.isfinite().all())


def wrong_lift(original: Any) -> Any:
    def lift_(w: Tensor, grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        along, grad_v = original(w, grad, *others)
        return along, grad_v + 1e-3 * grad  # no longer orthogonal to v

    return lift_


@pytest.mark.parametrize("form", ["wn", "ws"])
def test_the_comparison_sees_a_wrong_gradient(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from normconv.training.optimizers import stepping

    monkeypatch.setattr(stepping, "lift_", wrong_lift(stepping.lift_))
    assert trajectories(form, *CASES["momentum"], "loop")[0] > 1e-6


def test_the_comparison_sees_plain_training() -> None:
    plain, graph = net(), wrapped(net(), "wn")
    both = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (plain, graph)]
    for _ in range(5):
        learn(plain, both[0])
        learn(graph, both[1])
    assert apart(plain, graph) > 1e-6


@pytest.mark.parametrize("dialect", ["qiao", "bit", "nf"])
def test_every_dialect(dialect: str) -> None:
    plain, graph = net("ws"), wrapped(net("ws"), "ws", dialect=dialect)
    options = {"lr": 0.01, "weight_decay": 0.05}
    ours = optimizers.WSAdam(plain.parameters(), plain, dialect=dialect, fused="loop", **options)
    theirs = torch.optim.Adam(graph.parameters(), **options)
    for _ in range(15):
        learn(plain, ours)
        learn(graph, theirs)
    assert apart(plain, graph) <= BOUND
    # The dialects are far enough from one another to be told apart.
    other = optimizers.WSAdam(
        (again := net("ws")).parameters(), again, dialect="timm", fused="loop", **options
    )
    for _ in range(15):
        learn(again, other)
    assert apart(again, graph) > 1e-7


def test_recurrent_and_attention_weights_have_rows() -> None:
    torch.manual_seed(0)
    plain: Any = nn.LSTM(3, 4).double()
    graph: Any = weight_norm_(copy.deepcopy(plain))
    ours = WNAdam(plain.parameters(), plain, lr=0.02, fused="foreach")
    theirs = torch.optim.Adam(graph.parameters(), lr=0.02)
    x = torch.randn(5, 2, 3).double()
    for _ in range(10):
        for model, optimizer in ((plain, ours), (graph, theirs)):
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        distance = (getattr(plain, name) - getattr(graph, name)).detach().abs().max()
        assert float(distance) <= BOUND
    attention = nn.MultiheadAttention(4, 2)
    layouts = WNSGD(attention.parameters(), attention)._layouts.values()
    assert [name for name, _ in layouts] == ["in_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize("fused", ["loop", "foreach"])
def test_channels_last_weights_and_other_gradients(fused: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).double()
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    grads = [torch.randn_like(layer.weight) for _ in range(4)]
    for at, model in enumerate((layer, last)):
        optimizer = WNSGD(model.parameters(), model, lr=0.1, momentum=0.9, fused=fused)
        for turn, grad in enumerate(grads):
            same = turn % 2 == at  # gradients that are laid out otherwise too
            model.weight.grad = grad.clone(
                memory_format=torch.contiguous_format if same else torch.channels_last
            )
            optimizer.step()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer.weight, last.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_have_a_float32_master(dtype: torch.dtype) -> None:
    """Steps of less than half a unit in the last place add up, across a resume too."""
    layer = nn.Linear(4, 3, bias=False).to(dtype)
    wide = copy.deepcopy(layer).float()
    pair = []
    for model in (layer, wide):
        optimizer = WNSGD(model.parameters(), model, lr=1e-4, momentum=0.9, fused="loop")
        pair.append((model, optimizer))
    grad = torch.randn(3, 4).to(dtype)
    start = layer.weight.detach().clone()
    for turn in range(40):
        for model, optimizer in pair:
            model.weight.grad = grad.to(model.weight.dtype)
            optimizer.step()
        if turn == 20:
            model, optimizer = pair[0]
            saved = optimizer.state_dict()
            pair[0] = model, WNSGD(model.parameters(), model, lr=1e-4, momentum=0.9, fused="loop")
            pair[0][1].load_state_dict(saved)
    state = pair[0][1].state[layer.weight]
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert torch.equal(state["master"], wide.weight)
    assert torch.equal(layer.weight, wide.weight.to(dtype))
    assert not torch.equal(layer.weight, start)


def test_state_is_row_numbers_and_what_torch_keeps() -> None:
    for options, buffers in (({}, []), ({"momentum": 0.9}, ["momentum_buffer"])):
        _, plain, ours, _ = trajectories("wn", "SGD", {"lr": 0.01, **options}, "loop", steps=2)
        state = ours.state[plain[0].weight]
        large = [name for name, v in state.items() if v.numel() > plain[0].weight.shape[0]]
        assert large == buffers
        assert {"gain", "length"} <= state.keys()


@pytest.mark.parametrize("case", ["momentum", "amsgrad"])
def test_directions_stay_bounded_as_those_of_the_graph(case: str) -> None:
    kind, options = CASES[case]
    plain, graph = net("ws"), wrapped(net("ws"), "wn")
    given = KINDS[kind](plain.parameters(), **options)
    ours = reparametrise(given, plain, max_norm=0.5, fused="loop")
    theirs = KINDS[kind](graph.parameters(), **options)
    keep_directions_bounded(graph, theirs, 0.5)
    lengthened = 0
    for _ in range(20):
        learn(plain, ours)
        learn(graph, theirs)
        for layer, (name, norms) in zip(
            weighted(plain), direction_norms(graph).items(), strict=True
        ):
            length = ours.state[layer.weight]["length"]
            assert bool((length <= 0.5).all()), name
            torch.testing.assert_close(length, norms, rtol=1e-12, atol=1e-12)
            lengthened += int((length > 0.4).sum())
    assert apart(plain, graph) <= BOUND
    assert lengthened > 0


def test_groups_keep_their_options_and_others_can_be_added() -> None:
    model = net()
    head = weighted(model)[-1]
    body = [p for layer in weighted(model)[:-1] for p in layer.parameters()]
    groups = [{"params": body, "lr": 0.1}, {"params": [head.weight], "form": "plain"}]
    optimizer = reparametrise(torch.optim.SGD(groups, lr=0.5, momentum=0.9), model, fused="loop")
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert [g["form"] for g in optimizer.param_groups] == ["wn", "plain"]
    optimizer.add_param_group({"params": [head.bias], "lr": 0.2})
    extra = nn.Linear(2, 2)
    optimizer.add_param_group({"params": extra.parameters()})  # of no layer of the model: plain
    assert optimizer.param_groups[2]["momentum"] == 0.9
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = head.weight.detach().clone()
    x, y = batch()
    (model(x) - y).square().sum().backward()
    grad = head.weight.grad.clone()
    optimizer.step()
    scheduler.step()
    assert torch.equal(head.weight, before - 0.5 * grad)
    assert torch.equal(head.weight.grad, grad)
    assert calls == [1]
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25, 0.1, 0.25]
    assert "gain" in optimizer.state[model[0].weight]
    assert "gain" not in optimizer.state[head.weight]


def test_a_closure_is_called_and_parameters_without_gradient_stay() -> None:
    model = net()
    optimizer = WNSGD(model.parameters(), model, lr=0.01, fused="loop")
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert float(second.detach()) < float(first.detach())
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state


def test_scaled_gradients_are_unscaled_and_overflow_skips_the_step() -> None:
    plain, scaled = net(), net()
    both = [WNSGD(m.parameters(), m, lr=0.01, momentum=0.9, fused="loop") for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    for _ in range(3):
        learn(plain, both[0])
        both[1].zero_grad()
        scaler.scale((scaled(x) - y).square().mean()).backward()
        scaler.step(both[1])
        scaler.update()
    assert apart(plain, scaled) <= 1e-14
    both[1].zero_grad()
    scaler.scale((scaled(x) * float("inf")).sum()).backward()
    scaler.step(both[1])
    assert apart(plain, scaled) <= 1e-14


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from normconv.training.optimizers import stepping

    def no_compiler(*_: Any) -> Any:
        def step(*_: Any) -> None:
            raise RuntimeError("no compiler")

        return step

    monkeypatch.setattr(stepping, "_compiled", no_compiler)
    plain, expected = net(), net()
    optimizer = WNSGD(plain.parameters(), plain, lr=0.01, fused="compile")
    with pytest.warns(UserWarning, match="goes by 'loop': no compiler"):
        learn(plain, optimizer)
    assert optimizer.way == "loop"
    learn(expected, WNSGD(expected.parameters(), expected, lr=0.01, fused="loop"))
    assert apart(plain, expected) == 0.0
    quiet = net()
    monkeypatch.setattr("normconv.training.optimizers.row_optimizer._WORTH_COMPILING", 1)
    optimizer = WNSGD(quiet.parameters(), quiet, lr=0.01)
    learn(quiet, optimizer)
    assert optimizer.way == "loop"
    assert apart(quiet, expected) == 0.0


def test_what_is_refused_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=4), nn.Linear(3, 3))
    before = copy.deepcopy(model.state_dict())
    wrong: list[tuple[str, Any]] = [
        ("one element each", lambda: WSSGD(model.parameters(), model)),
        ("one element each", lambda: WSSGD([{"params": [m.weight]} for m in model[::-1]], model)),
        ("no positive number", lambda: WNSGD(model.parameters(), model, max_norm=0.0)),
        ("by way of eps", lambda: WSSGD(model[1].parameters(), model, max_norm=1.0)),
        ("is none of", lambda: WNSGD(model.parameters(), model, fused="triton")),
        ("no weight standardization", lambda: WSSGD(model[1].parameters(), model, dialect="x")),
        ("cannot be capturable", lambda: WNAdam(model.parameters(), model, capturable=True)),
        (
            "no form of Adagrad",
            lambda: reparametrise(torch.optim.Adagrad(model.parameters()), model),
        ),
        ("neither 'wn'", lambda: reparametrise(torch.optim.SGD(model.parameters()), model, "bn")),
        ("is none of plain", lambda: WNSGD([{"params": model.parameters(), "form": "x"}], model)),
    ]
    for match, make in wrong:
        with pytest.raises(UsageError, match=match):
            make()
    stepped = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stepped.step()
    with pytest.raises(UsageError, match="it has taken steps"):
        reparametrise(stepped, model)
    tied = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match="along another axis"):
        WNSGD(tied.parameters(), tied)
    with pytest.raises(TypeError, match="momentun"):
        WNSGD(model.parameters(), model, momentun=0.9)
    optimizer = WNSGD(model.parameters(), model, lr=1.0)
    model[1].weight.grad = torch.zeros(3, 3).to_sparse()
    with pytest.raises(UsageError, match=r"1\.weight: its gradient is sparse"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_layers_that_compute_their_weights_are_stepped_as_they_are() -> None:
    model = wrapped(net(), "wn")
    twin = copy.deepcopy(model)
    learn(model, WNSGD(model.parameters(), model, lr=0.02, fused="loop"))
    learn(twin, torch.optim.SGD(twin.parameters(), lr=0.02))
    assert isinstance(model[0], Reparametrised)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
