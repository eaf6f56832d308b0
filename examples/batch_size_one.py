"""Fine-tuning at batch size 1, where BatchNorm cannot: convert to weight norm and train on."""

import torch
import torch.nn.functional as F
from torch import nn

import normconv as nc

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(8, 2),
)
model, _ = nc.convert(net, "wn", example_inputs=(torch.randn(2, 1, 8, 8),))
model.train()

# g and the biases are not decayed: they carry scale, not direction.
directions = [p for name, p in model.named_parameters() if name.endswith("weight_v")]
others = [p for name, p in model.named_parameters() if not name.endswith("weight_v")]
optimizer = torch.optim.SGD(
    [{"params": directions, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}], lr=0.05
)
for step in range(60):
    label = torch.tensor([step % 2])
    image = torch.randn(1, 1, 8, 8) + (2 * label - 1).view(1, 1, 1, 1)
    loss = F.cross_entropy(model(image), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"last loss at batch size 1: {loss.item():.3f}")

plain, report = nc.fold(model)
print("folded:", dict(report.facts["folded"]))
