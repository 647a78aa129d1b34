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
sys.path.insert(0, str(HERE.parent.parent))
from tests.files.squares import squares  # noqa: E402

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


def run(name, code):
    """Whether it runs, and the last line that it prints."""
    library = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        return "not installed", ""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.py").write_text(code)
        if library == "ultralytics":
            squares(Path(folder), "squares.yaml")
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
