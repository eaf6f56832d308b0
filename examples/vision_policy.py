"""A robot policy, one ResNet for two cameras: BatchNorm out, then batch size 1 with an EMA."""

import inspect
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock

import normconv as nc

torch.set_num_threads(1)  # the images are tiny, both processes round alike


class VisionPolicy(nn.Module):
    """Denoises an action, given two images and a state; of a demonstration it returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        blocks = BasicBlock(16, 16), nn.MaxPool2d(2), BasicBlock(16, 16), nn.MaxPool2d(2)
        self.backbone = nn.Sequential(*stem, *blocks, nn.Flatten())
        self.head = nn.Sequential(nn.Linear(2 * 256 + 2 + 3, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, observation: dict[str, Tensor], actions: Tensor | None = None) -> Tensor:
        seen = [self.backbone(observation[camera]) for camera in ("front", "wrist")]
        state = torch.cat([*seen, observation["state"]], 1)
        action = torch.randn(len(state), 2)
        if actions is not None:
            t = torch.rand(len(state), 1)
            return F.mse_loss(self.head(torch.cat([state, action.lerp(actions, t), t], 1)), actions)
        for step in range(4):
            t = torch.full((len(state), 1), step / 4)
            action = action.lerp(self.head(torch.cat([state, action, t], 1)), 1 / (4 - step))
        return action


def demonstrations(number: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draw scenes; the right action is where the front camera sees an object, the wrist none."""
    place, pixels = torch.rand(number, 2) * 2 - 1, torch.linspace(-1, 1, 16)
    x, y = (-8 * (pixels - place[:, axis, None]).square() for axis in (0, 1))
    front, wrist = 0.1 * torch.randn(2, number, 3, 16, 16)
    front += (x[:, None, None, :] + y[:, None, :, None]).exp()
    return {"front": front, "wrist": wrist, "state": torch.randn(number, 2)}, place


def train_(policy: nn.Module, steps: int, batch: int, lr: float) -> AveragedModel:
    """Train in place; return the moving average of the weights."""
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.Adam(policy.train().parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(*demonstrations(batch)).backward()
        optimizer.step()
        average.update_parameters(policy)
    return average


def act(policy: nn.Module, observation: dict[str, Tensor]) -> Tensor:
    """Return actions, from the same noise at every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        return policy.eval()(observation)  # type: ignore[no-any-return]


IN_A_NEW_PROCESS = """
import sys, torch, normconv as nc
from vision_policy import VisionPolicy, act
expected = torch.load(sys.argv[1] + "/expected.pt")
for name in ("policy", "ema"):
    policy = nc.load(f"{sys.argv[1]}/{name}.safetensors", model=VisionPolicy)
    assert torch.equal(act(policy, expected["observation"]), expected[name])
"""

if __name__ == "__main__":
    torch.manual_seed(0)
    original = VisionPolicy()
    train_(original, steps=150, batch=16, lr=3e-3)
    observation, actions = demonstrations(64)
    few = {name: value[:5] for name, value in observation.items()}
    gn, _ = nc.convert(original, "gn", at="backbone", example_inputs=(few,))
    wn, _ = nc.convert(original, "wn", at="backbone", example_inputs=(few,))  # exact
    assert nc.audit(gn, (few,)).passed  # no sample sees another, in training or eval mode
    for name, policy in {"BatchNorm": original, "weight norm": wn, "GroupNorm": gn}.items():
        before = F.mse_loss(act(policy, observation), actions)
        ema = train_(policy, steps=40, batch=1, lr=3e-4)
        after = F.mse_loss(act(ema.module, observation), actions)
        print(f"{name}: error {before:.4f}, after 40 steps at batch size 1 {after:.4f} (EMA)")
    nc.save(gn, "policy.safetensors")
    nc.save(ema.module, "ema.safetensors")  # .module knows how it was converted
    expected = {"policy": act(gn, observation), "ema": act(ema.module, observation)}
    torch.save({"observation": observation, **expected}, "expected.pt")
    here = Path(inspect.getfile(demonstrations)).parent
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, Path.cwd()], cwd=here, check=True)
    print("policy and EMA act the same in a new process")
