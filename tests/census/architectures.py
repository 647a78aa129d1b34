"""The table by which weights are recognised: `python tests/census/architectures.py` (one core, ten minutes).

Every network of torchvision and timm is built on the meta device, and its fingerprint written to
`se_inject/architectures.json`. A network that is in no table any more is only no longer recognised.
"""

import json
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import timm  # noqa: E402 - the project's own tests folder comes first
import torch  # noqa: E402
import torchvision  # noqa: E402

from se_inject.loading import load  # noqa: E402
from se_inject.loading.architectures import fingerprint  # noqa: E402


def main():
    warnings.simplefilter("ignore")
    names = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    names += [f"timm:{name}" for name in timm.list_models()]
    table: dict[str, list[str]] = {}
    for name in names:
        with torch.device("meta"):
            table.setdefault(fingerprint(load(name).state_dict()), []).append(name)
    write(table)


def write(table):
    for same in table.values():
        same.sort(key=lambda name: ("quantized" in name, not name.startswith("torchvision:"), len(name), name))
    rows = [f"{json.dumps(key)}: {json.dumps(same)}" for key, same in sorted(table.items(), key=lambda row: row[1])]
    target = HERE.parent.parent / "se_inject" / "architectures.json"
    target.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
