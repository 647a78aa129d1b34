"""Run every recipe of ``examples/guides/trainers.md`` as it stands there, each in a process and a folder of its own.

    python tests/recipes/run.py                # those whose library is installed; the others are named
    python tests/recipes/run.py lightning      # some

Outside of CI: the libraries are large. Writes ``results.md``.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
GUIDE = HERE.parent.parent / "examples" / "guides" / "trainers.md"
LIBRARIES = {
    "Lightning": "lightning",
    "Accelerate": "accelerate",
    "Hugging Face": "transformers",
    "fastai": "fastai",
    "timm's training script": "timm",
    "Ultralytics": "ultralytics",
}


def recipes():
    """What comes first in each, and the code of each by its heading."""
    first, *rest = GUIDE.read_text().split("\n## ")
    code = re.compile(r"```python\n(.*?)```", re.S)
    return code.search(first)[1], {part.split("\n")[0]: code.search(part)[1] for part in rest}


def squares(folder):
    """Four images with a square in them, as Ultralytics reads them."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(4):
            image = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            image[16:40, 20:44] = 200
            Image.fromarray(image).save(folder / "images" / part / f"{number}.png")
            (folder / "labels" / part / f"{number}.txt").write_text("0 0.5 0.4375 0.375 0.375\n")
    (folder / "squares.yaml").write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n"
    )


def run(name, code):
    """Whether it runs, and the last line that it prints."""
    library = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        return "not installed", ""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.py").write_text(code)
        if library == "ultralytics":
            squares(Path(folder))
        quiet = {"YOLO_CONFIG_DIR": folder, "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "recipe.py"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | quiet,
        )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    version = importlib.metadata.version(library)
    return ("runs" if done.returncode == 0 else "fails") + f" with {library} {version}", lines[-1]


def main():
    first, parts = recipes()
    assert parts.keys() == LIBRARIES.keys(), parts.keys()
    wanted = [name for name in parts if not sys.argv[1:] or any(name.lower().startswith(a) for a in sys.argv[1:])]
    rows = []
    for name in wanted:
        rows.append((name, *run(name, first + parts[name])))
        print(*rows[-1], sep=": ", flush=True)
    if len(rows) == len(parts):
        table = "".join(f"| {name} | {how} | `{last}` |\n" for name, how, last in rows)
        head = "# Recipes\n\nMade by `python tests/recipes/run.py`.\n\n| recipe | | its last line |\n|---|---|---|\n"
        (HERE / "results.md").write_text(head + table)
    sys.exit(any(how.startswith("fails") for _, how, _ in rows))


if __name__ == "__main__":
    main()
