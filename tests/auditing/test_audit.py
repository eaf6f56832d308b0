"""`audit` finds every planted coupling, and nothing on nets whose samples are independent."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import normconv as nc
from normconv import CaptureError, Report, UsageError


class Net(nn.Module):
    """Its parts under their names, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.how(self, *args, **kwargs)


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function between two layers."""
    return Net(
        lambda self, x: self.after(function(self.before(x))),
        before=nn.Linear(6, 6),
        after=nn.Linear(6, 2),
    )


def found(report: Report, action: str = "couples") -> dict[str, str]:
    """The modules found, with the modes."""
    rows = [row for row in report.sites if row.action == action]
    return {row.site: row.reason.partition(":")[0] for row in rows}


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def conv_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3))


def frozen_affine() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    return norm


class Renamed(nn.BatchNorm2d):
    """A subclass."""


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.LazyBatchNorm2d(),
        nn.SyncBatchNorm(6),
        frozen_affine(),
        Renamed(6),
    ],
    ids=["plain", "affine=False", "lazy", "sync", "frozen affine", "subclass"],
)
def test_batch_norm_couples_in_training_and_keeps_statistics(norm: nn.Module) -> None:
    report = nc.audit(conv_norm(norm).eval(), (IMAGES,))
    assert not report.passed
    assert found(report) == found(report, "keeps statistics") == {"1": "train"}
    row = report.sites[0]
    assert row.norm == type(norm).__name__
    assert row.error is not None
    assert row.error > 1e-3
    assert "--to wn, plain, frozen" in report.failed_checks[0].way_out
    assert nc.audit(conv_norm(norm), (IMAGES,), modes=("eval",)).passed


def test_without_statistics_it_couples_in_eval_too() -> None:
    report = nc.audit(conv_norm(nn.BatchNorm2d(6, track_running_stats=False)), (IMAGES,))
    assert found(report) == {"1": "train and eval"}
    assert "GroupNorm" in report.failed_checks[0].way_out


def test_a_fused_norm_of_timm_is_blamed_itself() -> None:
    layers = pytest.importorskip("timm.layers")
    report = nc.audit(conv_norm(layers.BatchNormAct2d(6)), (IMAGES,))
    assert found(report) == {"1": "train"}
    assert report.sites[0].norm == "BatchNormAct2d"


def test_instance_norm_with_statistics_only_keeps_them() -> None:
    report = nc.audit(conv_norm(nn.InstanceNorm2d(6, track_running_stats=True)), (IMAGES,))
    assert not report.passed
    assert found(report) == {}
    assert found(report, "keeps statistics") == {"1": "train"}


def test_every_layer_is_found_not_only_the_first() -> None:
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())]
    assert list(found(nc.audit(nn.Sequential(*layers), (X,)))) == ["1", "4", "7"]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: x - x.mean(0), "mean over dim 0"),
        (lambda x: x.softmax(0), "softmax over dim 0"),
        (lambda x: F.softmax(x, dim=0), "softmax over dim 0"),
        (lambda x: x.cumsum(0), "cumsum over dim 0"),
        (lambda x: x + x.flip(0).detach(), "flip over dim 0"),
        (lambda x: (x @ x.T) @ x, "matmul"),
        (lambda x: F.batch_norm(x, None, None, training=True), "F.batch_norm with training=True"),
        (lambda x: x / x.norm(), "norm"),
        (lambda x: x * x.abs().max().item(), "max"),
        (lambda x: x.mean(0, keepdim=True).expand(4, 6) + x, "mean over dim 0"),
        (lambda x: x.add_(x.sum(0)), "sum over dim 0"),
    ],
)
def test_functions_are_blamed_on_the_module_that_calls_them_and_named(
    function: Callable[[Tensor], Tensor], named: str
) -> None:
    report = nc.audit(nn.Sequential(nn.Linear(6, 6), between(function)), (X,))
    assert found(report) == {"1": "train and eval"}
    assert named in report.sites[0].reason
    assert "rewrite it" in report.failed_checks[0].way_out


def test_functional_batch_norm_in_training_alone_goes_by_the_graph() -> None:
    net = Net(lambda self, x: F.batch_norm(self.fc(x), self.fc.bias * 0, self.fc.bias**2 + 1,
                                           training=self.training), fc=nn.Linear(6, 6))  # fmt: skip
    report = nc.audit(net, (X,))
    assert found(report) == {"": "train"}
    assert "--output graph" in report.failed_checks[0].way_out


def test_a_shared_norm_called_twice() -> None:
    norm = nn.BatchNorm1d(6)
    report = nc.audit(nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm), (X,))
    assert found(report) == {"1": "train"}


def test_a_norm_that_only_training_calls() -> None:
    net = Net(
        lambda self, x: self.norm(self.fc(x)) if self.training else self.fc(x),
        fc=nn.Linear(6, 6),
        norm=nn.BatchNorm1d(6),
    )
    assert found(nc.audit(net, (X,))) == {"norm": "train"}
    alone = nc.audit(net, (X,), modes=("eval",))
    assert alone.passed
    assert found(alone, "not called") == {"norm": "eval"}


def test_norms_that_no_change_reaches_are_told_by_their_class() -> None:
    never = Net(lambda self, x: self.fc(x), fc=nn.Linear(6, 6), norm=nn.LazyBatchNorm1d())
    report = nc.audit(never, (X,))
    assert report.passed
    assert found(report, "not called") == {"norm": "train and eval"}
    constant = Net(
        lambda self, x: self.fc(x) + self.norm(self.fc.weight), fc=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)
    )  # fmt: skip
    report = nc.audit(constant, (torch.randn(6, 6),))
    assert found(report) == {"norm": "train"}
    assert "by its class" in report.sites[0].reason


def test_keyword_inputs_and_dict_outputs() -> None:
    net = Net(
        lambda self, *, image, scale: {
            "out": self.norm(self.fc(image)) * scale,
            "loss": self.fc(image).mean(),
        },
        fc=nn.Linear(6, 6),
        norm=nn.BatchNorm1d(6),
    )
    kwargs = {"image": X, "scale": torch.tensor(2.0)}
    report = nc.audit(net, None, example_kwargs=kwargs)
    assert found(report) == {"norm": "train"}
    assert any("no axis of samples" in note for note in report.notes)


def test_tokens_flattened_chunks_of_a_batch_and_time_first() -> None:
    tokens = torch.randn(4, 5, 6)

    def flattened(norm: nn.Module) -> nn.Module:
        return Net(
            lambda self, x: self.norm(self.fc(x).flatten(0, 1)).view(x.shape),
            fc=nn.Linear(6, 6),
            norm=norm,
        )

    assert found(nc.audit(flattened(nn.BatchNorm1d(6)), (tokens,))) == {"norm": "train"}
    centred = Net(lambda self, x: x - x.mean(0))
    assert found(nc.audit(flattened(centred), (tokens,))) == {"norm": "train and eval"}
    assert nc.audit(flattened(nn.LayerNorm(6)), (tokens,)).passed
    inner = Net(
        lambda self, x: self.fc(x.view(4, 5, 6)), fc=nn.Linear(6, 6)
    )  # is given what is wrong
    outer = Net(lambda self, x: self.inner(x.flatten(0, 1) - x.mean((0, 1))), inner=inner)
    assert found(nc.audit(nn.Sequential(nn.Linear(6, 6), outer), (tokens,))) == {
        "1": "train and eval"
    }
    chunks = Net(
        lambda self, x: torch.cat([self.norm(part) for part in x.chunk(2)]), norm=nn.BatchNorm1d(6)
    )
    assert found(nc.audit(chunks, (torch.randn(8, 6),))) == {"norm": "train"}
    layer = nn.TransformerEncoderLayer(6, 2, 8)  # time first: a batch-first input mixes samples
    assert list(found(nc.audit(layer, (tokens,)))) == ["self_attn"]
    assert nc.audit(layer, (tokens,), batch_axis=1).passed


class Experts(nn.Module):
    """Each token goes to one expert."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(p)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = self.gate(tokens).argmax(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(tokens[rows])
        return out.view(x.shape)


def test_experts_are_judged_by_what_they_give_back() -> None:
    tokens = torch.randn(4, 5, 6)
    report = nc.audit(nn.Sequential(nn.Linear(6, 6), Experts(0.0)), (tokens,))
    assert report.passed
    assert any("judged by its outputs" in note for note in report.notes)
    wrong = Net(lambda self, x: self.moe(x) + x.mean(), moe=Experts(0.0))
    assert found(nc.audit(wrong, (tokens,))) == {"": "train and eval"}


def test_randomness_that_depends_on_values_is_not_guessed() -> None:
    report = nc.audit(nn.Sequential(nn.Linear(6, 6), Experts(0.5)), (torch.randn(4, 5, 6),))
    assert not report.passed
    assert found(report) == {}
    assert found(report, "not judged") == {"1": "train"}
    draws = Net(lambda self, x: x + torch.rand(int((x > 0.3).sum()) + 6)[-6:])
    assert found(nc.audit(draws, (X,)), "not judged") == {"": "train and eval"}
    generator = torch.Generator()
    unseeded = between(lambda x: x + torch.rand(x.shape, generator=generator, dtype=x.dtype))
    assert found(nc.audit(unseeded, (X,)), "not judged") == {"": "train and eval"}


class FirstBatch(nn.Module):
    """Sets its bias by the first batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.bias.data.copy_(-x.mean(0))
            self.ready = True
        return x + self.bias


def test_parameters_written_from_the_batch() -> None:
    net = nn.Sequential(nn.Linear(6, 6), FirstBatch())
    report = nc.audit(net, (X,))
    assert found(report) == found(report, "keeps statistics") == {"1": "train and eval"}
    assert not net[1].ready
    assert not net[1].bias.any()


CLEAN: dict[str, tuple[nn.Module, Tensor]] = {
    "group norm": (conv_norm(nn.GroupNorm(2, 6)), IMAGES),
    "instance norm": (conv_norm(nn.InstanceNorm2d(6)), IMAGES),
    "dropout": (conv_norm(nn.Dropout2d(0.5)), IMAGES),
    "layer norm": (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5)), X),
    "attention": (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), torch.randn(4, 4, 6)),
    "lstm": (nn.LSTM(6, 6, 2, bidirectional=True, dropout=0.5), torch.randn(4, 8, 6)),
    "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), X),
    "tokens": (nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6)), torch.arange(8).view(2, 4)),
    "random of Python and NumPy": (
        between(lambda x: x * random.random() + np.random.rand() if random.random() < 2 else x),  # noqa: NPY002
        X,
    ),
    "softmax over features": (between(lambda x: x.softmax(-1) - x.mean(1, keepdim=True)), X),
    "only parameters": (Net(lambda self, x: x @ F.normalize(self.fc.weight), fc=nn.Linear(6, 6)), X),
    "weight standardized by batch_norm": (
        Net(lambda self, x: F.linear(x, F.batch_norm(self.fc.weight.T, None, None, training=True).T),
            fc=nn.Linear(6, 6)), X),
    "packed": (
        Net(lambda self, x: self.rnn(pack_padded_sequence(x, [5, 4, 4, 2], batch_first=True))[1][0],
            rnn=nn.GRU(6, 6)), torch.randn(4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_where_samples_are_independent(name: str) -> None:
    model, inputs = CLEAN[name]
    axis = 1 if name == "lstm" else 0
    report = nc.audit(model, (inputs,), batch_axis=axis)
    assert report.passed, report.to_json()
    assert report.sites == ()
    assert len(report.checks) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_models(dtype: torch.dtype) -> None:
    model = conv_norm(nn.BatchNorm2d(6)).to(dtype)
    report = nc.audit(model, (IMAGES.to(dtype),))
    assert report.facts["run in"] == "float64"
    assert found(report) == {"1": "train"}
    assert nc.audit(conv_norm(nn.GroupNorm(2, 6)).to(dtype), (IMAGES.to(dtype),)).passed


def test_a_dtype_written_into_the_model() -> None:
    inside = Net(lambda self, x: self.norm(self.fc(x.float()).float()), fc=nn.Linear(6, 6),
                 norm=nn.BatchNorm1d(6))  # fmt: skip
    assert found(nc.audit(inside, (X,))) == {"norm": "train"}
    fixed = Net(
        lambda self, x: self.norm(x @ torch.ones(6, 6, dtype=torch.float32)), norm=nn.BatchNorm1d(6)
    )
    report = nc.audit(fixed, (X,))
    assert report.facts["run in"] == "its own dtype"
    assert found(report) == {"norm": "train"}
    assert nc.audit(between(lambda x: x.to(torch.float32).to(torch.float64)), (X,)).passed


def test_one_sample_is_enough() -> None:
    report = nc.audit(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), X[:1])
    assert found(report) == {"1": "train"}
    assert report.facts["samples"] == 3
    assert any("one sample given" in note for note in report.notes)


def test_nothing_of_the_model_is_changed() -> None:
    model = conv_norm(nn.BatchNorm2d(6))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    inputs = IMAGES.clone()
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(1), random.random()
    torch.manual_seed(7)
    random.seed(7)
    nc.audit(model, (inputs,))
    assert (torch.rand(1), random.random()) == expected
    assert torch.equal(inputs, IMAGES)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lazy = conv_norm(nn.LazyBatchNorm2d())
    nc.audit(lazy, (IMAGES,))
    assert isinstance(lazy[1], nn.LazyBatchNorm2d)


def test_a_converted_model_is_clean() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    assert not nc.audit(net, (IMAGES,)).passed
    for target in ("wn", "plain", "frozen"):
        assert nc.audit(nc.convert(net, target, example_inputs=(IMAGES,)).model, (IMAGES,)).passed


def test_what_cannot_be_audited_is_refused_with_the_reason() -> None:
    linear = nn.Linear(6, 6)
    with pytest.raises(CaptureError, match=r"weight: it is on the meta device.*to_empty"):
        nc.audit(nn.Linear(6, 6, device="meta"), (X,))
    with pytest.raises(UsageError, match="NaN"):
        nc.audit(linear, (X * float("nan"),))
    with pytest.raises(CaptureError, match=r"wrapped in DataParallel; audit the model inside"):
        nc.audit(nn.DataParallel(linear), (X,))
    with pytest.raises(UsageError, match="no mode 'both'"):
        nc.audit(linear, (X,), modes=("both",))
    with pytest.raises(CaptureError, match=r"1 \(Linear\): in train mode.*\(4, 6\)"):
        nc.audit(nn.Sequential(linear, nn.Linear(5, 5)), (X,))
    with pytest.raises(CaptureError, match="several samples"):
        nc.audit(Net(lambda self, x: self.fc(x.view(1, 6)), fc=linear), (X[:1],))


@pytest.mark.parametrize(("share", "passes"), [(1e-2, False), (1e-7, False), (1e-13, True)])
def test_how_small_a_coupling_is_seen(share: float, passes: bool) -> None:
    assert nc.audit(between(lambda x: x + share * x.mean(0)), (X,)).passed is passes


def test_a_blind_run_does_not_pass() -> None:
    dead = Net(lambda self, x: self.late(self.fc(x) * 0.0), fc=nn.Linear(6, 6), late=nn.ReLU())
    nan = Net(lambda self, x: self.late(self.fc(x) / 0.0 * 0.0), fc=nn.Linear(6, 6), late=nn.ReLU())
    for net in (Net(lambda self, x: torch.ones(4, 6)), dead, nan):
        report = nc.audit(net, (X,))
        assert not report.passed
        assert "nothing could be seen" in report.failed_checks[0].detail


def test_a_head_of_zeros_hides_no_layer() -> None:
    head = nn.Linear(6, 2)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    clean = nc.audit(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), head), (X,))
    assert clean.passed
    assert any("no output changes" in note for note in clean.notes)
    coupled = nc.audit(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), head), (X,))
    assert found(coupled) == {"1": "train"}


def test_what_a_validator_by_class_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus as it comes: `register_grad_samplers` teaches it some of these for good."""
    validators = pytest.importorskip("opacus.validators")
    known = validators.ModuleValidator.VALIDATORS
    own = {kind: check for kind, check in known.items() if "normconv" not in check.__module__}
    monkeypatch.setattr(validators.ModuleValidator, "VALIDATORS", own)
    layers = pytest.importorskip("timm.layers")
    through = {
        "affine=False": conv_norm(nn.BatchNorm2d(6, affine=False)),
        "subclass": conv_norm(layers.BatchNormAct2d(6)),
        "frozen affine": conv_norm(frozen_affine()),
        "function": between(lambda x: F.batch_norm(x, None, None, training=True)),
        "mean": between(lambda x: x - x.mean(0)),
    }
    for name, model in through.items():
        inputs = X if name in ("function", "mean") else IMAGES
        assert validators.ModuleValidator.is_valid(model.train()), name
        assert not nc.audit(model, (inputs,)).passed, name
    assert not validators.ModuleValidator.is_valid(conv_norm(nn.BatchNorm2d(6)).train())


def test_a_functional_norm_that_no_change_reaches_goes_by_the_graph() -> None:
    net = Net(
        lambda self, x: self.fc(x) + F.batch_norm(self.fc(x) * 0.0, None, None, training=True),
        fc=nn.Linear(6, 6),
    )
    report = nc.audit(net, (X,))
    assert found(report) == {"": "train and eval"}
    assert "its graph calls F.batch_norm" in report.sites[0].reason
