"""A data set of four images with a square in them, as Ultralytics reads it."""

import numpy as np
from PIL import Image


def squares(folder, name):
    """Write it into a folder, its description into the file of this name there."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(4):
            image = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            image[16:40, 20:44] = 200
            Image.fromarray(image).save(folder / "images" / part / f"{number}.png")
            (folder / "labels" / part / f"{number}.txt").write_text("0 0.5 0.4375 0.375 0.375\n")
    (folder / name).write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n")
