"""Execute a notebook of ``examples/`` in a kernel of its own, in an empty folder.

python tests/notebooks.py examples/whole_job.ipynb           # prints it, executed
python tests/notebooks.py examples/whole_job.ipynb --write   # stores what its cells print now
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

import nbformat
from nbclient import NotebookClient


def execute(path: Path, folder: str) -> nbformat.NotebookNode:
    """Run all cells; raise where one of them does."""
    os.environ |= {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "OMP_NUM_THREADS": "1"}
    notebook = nbformat.read(path, as_version=4)
    work = Path(folder, "work")
    work.mkdir()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it was run
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(options.path, folder)
    if options.write:
        nbformat.write(notebook, options.path)
    else:
        nbformat.write(notebook, sys.stdout)


if __name__ == "__main__":
    main()
