"""A store as a real run leaves it: discs on noisy pictures, saved as PNG files, with believable certificates."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from minexp.data.preprocessing import Preprocessing
from minexp.data.store import StoreWriter
from minexp.report.intervals import share_of

CLASSES = ("red disc", "green disc", "blue disc", "yellow ring", "violet ring")
COLOURS = ((220, 60, 50), (60, 170, 80), (60, 100, 220), (235, 190, 50), (150, 80, 200))


def scene(rng, label, side):
    """A picture [side, side, 3], and the disc or ring in it as a mask."""
    noise = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    ground = noise.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(side / 40))
    picture = np.asarray(ground).astype(float) * 0.6 + 40
    radius = rng.uniform(0.1, 0.24) * side
    y, x = rng.uniform(radius, side - radius, 2)
    distance = np.hypot(*(np.indices((side, side)) - np.array([y, x])[:, None, None]))
    shape = distance < radius
    if label >= 3:
        shape &= distance > 0.55 * radius
    picture[shape] = np.array(COLOURS[label]) * rng.uniform(0.85, 1.1) + rng.normal(
        0, 9, (int(shape.sum()), 3)
    )
    return picture.clip(0, 255).astype(np.uint8), shape


def make_store(directory, count=300, side=96, errors=5, seed=0, lost=0):
    """Write ``count`` rows and their pictures below ``directory``; the last ``lost`` pictures are removed again."""
    directory, rng = Path(directory), np.random.default_rng(seed)
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        label = int(rng.integers(len(CLASSES)))
        picture, shape = scene(rng, label, side)
        path = directory / "pictures" / f"{index:05d}.png"
        row = {"id": f"{CLASSES[label].split()[0]}/{index:05d}.png", "uri": str(path)}
        if index < errors:
            path.write_bytes(b"not a picture")
            reason = (
                "cannot be decoded: image file is truncated"
                if index % 2
                else "its content is none of PNG, JPEG"
            )
            rows.append(row | {"status": "error", "error": reason})
            continue
        Image.fromarray(picture).save(path)
        rows.append(row | certificate(rng, label, shape))
    for row in rows[count - lost :]:
        Path(row["uri"]).unlink()
    run = {
        "fingerprint": f"{seed:064x}",
        "model": "SmallResNet",
        "source_name": "discs",
        "predicate": "top-1 kept and robust >= 0.95 on 10 backgrounds",
        "preprocessing": Preprocessing((side, side)).to_json(),
        "class_names": list(CLASSES),
        "versions": {"minexp": "0.1.0", "torch": "2.13.0"},
    }
    with StoreWriter(directory / "store", run=run) as writer:
        writer.write(rows)
    return directory / "store"


def certificate(rng, label, shape):
    """A mask a little larger than the shape, with some noise in every figure."""
    grown = np.asarray(Image.fromarray(shape).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    mask = grown & (rng.random(shape.shape) < 0.995)
    kept = bool(rng.random() < 0.97)
    given = label if rng.random() < 0.93 else int(rng.integers(len(CLASSES)))
    train = rng.binomial(20, 0.985 if kept else 0.5)
    held = rng.binomial(12, min(0.99, 0.75 + mask.mean()))
    certified = kept and train >= 18
    conf = float(1 - rng.beta(1, 20))
    families = dict(
        zip(("mean", "uniform", "gaussian", "flat", "phase"), rng.binomial(4, 0.97, 5) / 4, strict=True)
    )
    families |= dict(
        zip(
            ("blur", "shuffled", "texture", "other"), rng.binomial(4, (0.95, 0.85, 0.9, 0.6)) / 4, strict=True
        )
    )
    row = {
        "status": "certified" if certified else "uncertified",
        "truth": label,
        "label": given,
        "label_name": CLASSES[given],
        "conf": conf,
        "label_masked": given if kept else (given + 1) % len(CLASSES),
        "conf_masked": min(1.0, max(0.0, conf + rng.normal(-0.02, 0.05))) if kept else 0.2,
        "conf_complement": float(rng.beta(1, 6)),
        "conf_empty": float(rng.beta(1, 8)) if given != 2 else float(rng.beta(4, 5)),
        "kept": kept,
        "area": float(mask.mean()),
        "components": int(rng.integers(1, 4)),
        "border_share": float(rng.beta(1, 12)),
        "threshold": 0.5 if rng.random() < 0.8 else float(rng.uniform(0.1, 0.5)),
        "robust_other": float(families["other"]),
        "robust_other_n": 4,
        "robust_families": json.dumps(families),
        "dilation_kept": bool(rng.random() < 0.98),
        "predicate": "top-1 kept and robust >= 0.95 on 10 backgrounds",
        "evaluations": int(40 + rng.integers(0, 60)),
        "ms": float(math.exp(rng.normal(3, 0.3))),
        "mask": mask,
    }
    for name, hits, n in (("train", train, 20), ("heldout", held, 12)):
        share = share_of(int(hits), n)
        row |= {f"robust_{name}": share.mean, f"robust_{name}_low": share.low}
        row |= {f"robust_{name}_high": share.high, f"robust_{name}_n": n}
    return row
