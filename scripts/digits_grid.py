"""Draw what the embedded model generates, in plain bf16 on the CPU: docs/images/digits.png, one column a digit.

    python scripts/digits_grid.py                     # ten seconds; prints the class accuracy over 200 images

It reads the checkpoint directly, without the loader, quantization or offloading, and ends with exit code 1 if fewer
than 90 % of 200 images are the digit they should be.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qexp.config.generate import GenerateConfig
from qexp.models.digits import Config, Source
from qexp.scoring.pictures import image_sheet, save_png

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "digits.png"
ROWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    source = Source(Config())
    folder = source.checkpoints()["transformer"]
    model = source.skeleton("transformer", json.loads((folder / "config.json").read_text(encoding="utf-8"))).to(
        torch.bfloat16
    )
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    outputs = source.generate(
        {"transformer": model.eval()},
        GenerateConfig(),
        seed=arguments.seed,
        device=torch.device("cpu"),
        on_step=lambda step, state: None,
    )
    scores = source.scores(outputs)
    shown = 10 * ROWS
    labels = outputs["labels"][:shown].tolist()
    save_png(image_sheet(outputs["images"][:shown], "generated, bf16", labels), arguments.out)
    print(
        f"{arguments.out}: class accuracy {scores['class_accuracy']:.3f} over {len(outputs['images'])} images, "
        f"Fréchet distance {scores['frechet_distance']:.3f}"
    )
    if not scores["class_accuracy"] or scores["class_accuracy"] < 0.9:
        raise SystemExit("class accuracy is below 0.9")


if __name__ == "__main__":
    main()
