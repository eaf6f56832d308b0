"""Fine-tuning a BatchNorm network under differential privacy: convert, check, train with Opacus, fold.

The network learns upright digits in the open. The digits lying on their side are private: they are
learnt by DP-SGD (Abadi et al. 2016), which clips the gradient of every sample, so that samples must not
see each other.
"""

import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

import normconv as nc
from normconv.demo.digits import DigitsResNet, accuracy, load_digits, train
from normconv.privacy import register_grad_samplers, without_in_place

# An experiment: for a release, `PrivacyEngine(secure_mode=True)` draws noise nobody can foresee.
warnings.filterwarnings("ignore", message="Secure RNG turned off")
# Torch's word on the first layer, whose input needs no gradient.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

EPOCHS, NOISE, CLIP, DELTA = 3, 1.0, 1.0, 1e-4

torch.manual_seed(0)
data = load_digits()
pretrained = DigitsResNet()
train(pretrained, data, epochs=4, step=lambda loss: None)
images, tests = data.train_images.rot90(1, (2, 3)), data.test_images.rot90(1, (2, 3))
private = TensorDataset(images, data.train_labels)

# BatchNorm: samples see each other.
assert not nc.audit(pretrained, (data.train_images[:7],)).passed
register_grad_samplers()

for target in ("gn", "wn"):
    # Statistics come from the public images alone: `data=` of private ones would not be accounted for.
    converted, _ = nc.convert(pretrained, target, example_inputs=(data.train_images[:64],))
    model, _ = without_in_place(converted, example_inputs=(data.train_images[:64],))
    audit = nc.audit(model, (data.train_images[:7],))
    before = accuracy(model.eval()(tests), data.test_labels)

    model.train()
    engine = PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    watched, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(private, batch_size=128),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
    )
    for _epoch in range(EPOCHS):
        for batch, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(watched(batch), labels).backward()
            optimizer.step()

    model = watched.to_standard_module().eval()
    after = accuracy(model(tests), data.test_labels)
    spent = engine.get_epsilon(DELTA)
    print(f"{target}: audit {'passed' if audit.passed else 'failed'}, right {before:.1%} before")
    print(f"    {after:.1%} after {EPOCHS} epochs at epsilon {spent:.2f}, delta {DELTA}")

plain, report = nc.fold(model)  # that of the last target
print("folded:", dict(report.facts["folded"]))
nc.export_onnx(plain, "digits.onnx", example_inputs=(tests[:4],))
