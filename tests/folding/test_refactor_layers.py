"""Plain weights back into g and v, or gain and v, and the same weights out of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.folding import rebuild
from normconv.layers import Reparametrised, WeightStandardized, weight_standardize_
from normconv.plan import history_of
from normconv.proof import randomise_norms_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 8, 3, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 3, groups=2)
        self.rnn = nn.GRU(6, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.conv(self.emb(tokens).mT)))).mT
        y: Tensor = self.head(self.rnn(x)[0])
        return y


TOKENS = torch.randint(0, 9, (2, 8))


def net() -> Any:
    made = Net()
    randomise_norms_(made, (TOKENS,))
    with torch.no_grad():
        made.conv.weight[2] = 0
        made.up.weight[:4, 1] = 0
        made.rnn.weight_hh_l0[4] = 0
    return made.eval()


def ulps(one: Tensor, other: Tensor) -> float:
    """The largest distance in units of the last place."""
    spacing = torch.nextafter(one.abs(), torch.full_like(one, torch.inf)) - one.abs()
    return float(((one - other).abs() / spacing).detach().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_come_back_to_one_ulp(dtype: torch.dtype) -> None:
    plain = nc.fold(nc.convert(net(), "plain", example_inputs=(TOKENS,)).model).model.to(dtype)
    model, report = nc.refactor(plain, layers=["*"])
    assert sum(isinstance(m, Reparametrised) for m in model.modules()) == len(report.sites) == 3
    back = nc.fold(model).model
    for name, value in plain.state_dict().items():
        again = back.state_dict()[name]
        assert torch.equal(again == 0, value == 0), name
        if dtype in (torch.float32, torch.float64):
            assert ulps(value, again) <= 1, name
        else:
            assert ulps(value.float(), again.float()) <= 2 * torch.finfo(dtype).eps * 2**23, name


def test_the_history_says_which_layers() -> None:
    model = nc.convert(net(), "wn", example_inputs=(TOKENS,)).model
    plain = nc.fold(model).model
    again, report = nc.refactor(plain, example_inputs=(TOKENS,))
    assert report.passed
    assert [row.site for row in report.sites] == ["conv"]
    assert list(again.state_dict()) == list(model.state_dict())
    assert history_of(again)[-1]["refactor"]["to"] == "wn"
    Net().load_state_dict(nc.refactor(again, to="bn").model.state_dict())
    twice = nc.refactor(nc.fold(again).model).model
    assert list(twice.state_dict()) == list(model.state_dict())
    again.train()
    again(TOKENS).sum().backward()
    assert all(p.grad is not None for p in again.conv.parameters())


def test_all_layers_and_ties() -> None:
    model: Any = net()
    whole = nc.convert(
        model, "wn", example_inputs=(TOKENS,), layers="all", options={"embeddings": True}
    ).model
    again: Any = nc.refactor(nc.fold(whole).model).model
    assert again.head.weight_v is again.emb.weight_v
    assert list(again.state_dict()) == list(whole.state_dict())
    # By layers="all" an embedding stays plain, and with it the head that shares its weight.
    half: Any = nc.refactor(nc.fold(whole).model, layers="all").model
    assert type(half.emb) is nn.Embedding
    assert type(half.head) is nn.Linear
    some = nc.refactor(nc.fold(whole).model, layers=["emb", "head"]).model
    assert isinstance(some.head, Reparametrised)
    assert ulps(nc.fold(some).model.emb.weight, nc.fold(whole).model.emb.weight) <= 1


def test_like_says_which_layers() -> None:
    model = net()
    unfolded = nc.convert(model, "wn", example_inputs=(TOKENS,), layers="all").model
    plain = nc.fold(unfolded).model
    del plain.__dict__["_normconv_history"]
    with pytest.raises(nc.UsageError, match="neither its history nor like="):
        nc.refactor(plain)
    again = nc.refactor(plain, like=unfolded).model
    assert list(again.state_dict()) == list(unfolded.state_dict())
    with pytest.raises(nc.UsageError, match="like= says which already"):
        nc.refactor(plain, like=unfolded, layers="all")


def test_like_under_torch_s_weight_norm() -> None:
    vocoder = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3)),
        nn.Conv1d(4, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 2, 4), dim=1),
    )
    again = nc.refactor(nc.fold(vocoder).model, like=vocoder).model
    assert [isinstance(layer, Reparametrised) for layer in again] == [True, False, True]
    x = torch.randn(1, 3, 9)
    assert torch.allclose(again(x), vocoder(x), atol=1e-6)


@pytest.mark.parametrize("dialect", ["timm", "qiao", "bit", "nf"])
def test_standardized_weights_come_back(dialect: str) -> None:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    weight_standardize_(made[0], dialect=dialect)
    plain: Any = nc.fold(made).model
    again: Any = nc.refactor(plain, to="ws", like=made, example_inputs=(torch.randn(2, 3, 8, 8),))
    layer = again.model[0]
    assert isinstance(layer, WeightStandardized)
    assert layer.dialect == dialect
    largest = plain[0].weight.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    spacing = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
    back: Any = nc.fold(again.model).model
    assert bool(((back[0].weight - plain[0].weight).abs() <= spacing).all())
    with pytest.raises(nc.UsageError, match="2: its weight has a mean in its rows"):
        nc.refactor(plain, to="ws", layers="all")


def test_group_norm_results_keep_their_dialect() -> None:
    made = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    made.append(nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 9, 9)
    options = {"dialect": "qiao"}
    model = nc.convert(made.eval(), "gn+ws", example_inputs=(x,), options=options).model
    assert isinstance(model[3], WeightStandardized)
    again = nc.refactor(nc.fold(model).model, to="ws", example_inputs=(x,)).model
    assert [getattr(layer, "dialect", "") for layer in again] == [
        getattr(layer, "dialect", "") for layer in model
    ]


@pytest.mark.parametrize("to", ["wn", "ws"])
def test_a_saved_file_of_weights_is_rebuilt(tmp_path: Path, to: Any) -> None:
    made = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(6, 2))
    if to == "ws":
        made = nc.fold(nn.Sequential(*(weight_standardize_(m) if list(m.children()) == [] and
                       list(m.parameters()) else m for m in made))).model  # fmt: skip
    model = nc.refactor(made, to=to, layers=["0", "2"]).model
    nc.save(model, tmp_path / "m.safetensors")
    again = nc.load(tmp_path / "m.safetensors", model=lambda: copy.deepcopy(made))
    assert [type(m) for m in again] == [type(m) for m in model]
    x = torch.randn(2, 3, 8)
    assert torch.equal(again(x), model(x))
    assert history_of(rebuild(made, history_of(model))) == history_of(model)


def test_bad_calls_leave_the_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nc.UsageError, match="matches no site"):
        nc.refactor(model, layers=["hed"])
    with pytest.raises(nc.UsageError, match="it is 'wn', 'ws' or 'bn'"):
        nc.refactor(model, to="gn")  # type: ignore[arg-type]
    with pytest.raises(nc.UsageError, match=r"makes a int, no nn\.Module"):
        nc.refactor(model, like=lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(nc.UsageError, match="puts back every norm"):
        nc.refactor(model, to="bn", layers="all")
    with pytest.raises(nc.UsageError, match="head"):
        nc.refactor(model, layers=["head"])  # its weight is the embedding's
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
