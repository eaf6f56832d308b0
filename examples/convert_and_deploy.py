"""From a BatchNorm model to a folded ONNX file, each step proved."""

import torch
from torch import nn

import normconv as nc


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


net = Net().eval()
x = torch.randn(4, 3, 32, 32)

plan = nc.make_plan(net, "wn", example_inputs=(x,))
for step in plan.steps:
    print(f"{step.site}: {step.action} {step.reason}")

model, report = nc.convert(net, plan, example_inputs=(x,))
print("proved:", report.passed, type(model.conv1).__name__)

report = nc.export_onnx(model, "net.onnx", example_inputs=(x,))
print("norm nodes in the file:", report.facts["norm_nodes"])
print("same function:", nc.verify(net, "net.onnx", (x,)).passed)
