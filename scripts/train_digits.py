"""Train the embedded digits model and its classifier from scikit-learn's handwritten digits (1,797 real 8x8 images).

    pip install scikit-learn && python scripts/train_digits.py            # writes qexp/assets/digits

Seeded. The classifier trains first, on 80 % of the images, and must reach 97 % on the other 20 %. The transformer
learns the flow-matching velocity on the same 80 %; an exponential moving average of its weights is stored in bf16.
At the end 200 images are generated and classified.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from qexp.models.digits_network import NULL_LABEL, DigitsClassifier, DigitsConfig, DigitsTransformer

ASSETS = Path(__file__).parents[1] / "qexp" / "assets" / "digits"


def load_digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, held-out images, held-out labels); images [n, 1, 8, 8] in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0  # pixels are 0..16
    labels = torch.tensor(data.target)
    train, held = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=data.target)
    return images[train], labels[train], images[held], labels[held]


def shifted(images: Tensor) -> Tensor:
    """Return each image moved by up to one pixel in each direction."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(0, 3, (2, len(images)))
    rows = torch.arange(8)[None, :, None] + dy[:, None, None]
    columns = torch.arange(8)[None, None, :] + dx[:, None, None]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train_classifier(images: Tensor, labels: Tensor, steps: int) -> DigitsClassifier:
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.randint(0, len(images), (128,))
        loss = F.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"classifier step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return model.eval()


def train_transformer(images: Tensor, labels: Tensor, steps: int, batch_size: int) -> DigitsTransformer:
    model = DigitsTransformer(DigitsConfig())
    for name, parameter in model.named_parameters():
        if ".modulation." in name:  # adaLN-Zero: every block starts as the identity
            torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(model.proj_out.weight)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        batch = torch.randint(0, len(images), (batch_size,))
        clean, target = images[batch], labels[batch].clone()
        target[torch.rand(batch_size) < 0.1] = NULL_LABEL
        t = torch.sigmoid(torch.randn(batch_size))  # logit-normal times, arXiv:2403.03206
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        loss = F.mse_loss(model(noisy, t, target), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {running / 100:.4f} {seconds:.0f} s, {left:.0f} s left", flush=True)
            running = 0.0
    return average.eval()


@torch.no_grad()
def generated_accuracy(model: DigitsTransformer, classifier: DigitsClassifier, count: int, steps: int) -> float:
    labels = torch.arange(count) % 10
    x = torch.randn(count, 1, 8, 8)
    for step in range(steps):
        t = torch.full((count,), 1 - step / steps)
        x = x - model(x, t, labels).float() / steps
    return (classifier(x.clamp(-1, 1)).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    images, labels, held_images, held_labels = load_digits_split()

    classifier = train_classifier(images, labels, arguments.classifier_steps)
    with torch.no_grad():
        accuracy = (classifier(held_images).argmax(-1) == held_labels).float().mean().item()
        features = classifier.features(torch.cat([images, held_images])).double()
    print(f"classifier held-out accuracy {accuracy:.4f}", flush=True)
    if accuracy < 0.97:
        raise SystemExit("the classifier did not reach 97 % on the held-out images")

    model = train_transformer(images, labels, arguments.steps, arguments.batch_size).to(torch.bfloat16)
    generated = generated_accuracy(model, classifier, count=200, steps=20)
    seconds = time.perf_counter() - started

    arguments.out.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(contiguous, arguments.out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (arguments.out / "config.json").write_text(
        json.dumps({"_class_name": "DigitsTransformer", **asdict(DigitsConfig())}, indent=2) + "\n", encoding="utf-8"
    )
    statistics = {"real_features.mean": features.mean(0), "real_features.covariance": features.T.cov()}
    save_file({**classifier.state_dict(), **statistics}, arguments.out / "classifier.safetensors", {"format": "pt"})
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "classifier_held_out_accuracy": round(accuracy, 4),
        "generated_class_accuracy": generated,
        "train_images": len(images),
        "held_out_images": len(held_images),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
