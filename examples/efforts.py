"""Three efforts, side by side: how small, how robust and how dear an explanation becomes.

    python examples/efforts.py --out efforts.png

trains a classifier of the built-in scenes and a masker for it (three minutes on two cores; --scenes and --steps make it
shorter), explains a few held-out scenes and writes the picture. In a notebook, `explanation` alone shows the same.
"""

import argparse

import torch

import minexp
from minexp.data import scenes, subjects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="efforts.png", help="picture to write")
    parser.add_argument("--scenes", type=int, default=12_000, help="scenes to train the classifier on")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the masker")
    parser.add_argument("--images", type=int, default=4, help="scenes to explain")
    options = parser.parse_args()

    classifier = subjects.classifier(subjects.train_subject("plain", count=options.scenes))
    training = scenes.make("plain", options.scenes // 2, seed=1).images
    masker = minexp.fit(classifier, training, steps=options.steps)

    held_out = scenes.make("plain", options.images, split="test").images
    x = torch.from_numpy(held_out).permute(0, 3, 1, 2).float() / 255
    found = {
        effort: minexp.explain(classifier, x, masker, effort=effort)
        for effort in ("fast", "refined", "minimal")
    }
    for effort, explanation in found.items():
        print(f"{effort:8}", explanation)
    minexp.side_by_side(found).save(options.out)

    # other questions about the same decisions
    second = minexp.multiple(classifier, x, masker, count=2)[1]
    print("images with a second, disjoint explanation:", sum(c.certified for c in second.certificates))
    removal = minexp.necessary(classifier, x, masker)
    print(f"the class goes with {removal.masks.float().mean():.1%} of the pixels")


if __name__ == "__main__":
    main()
