"""Networks of ours behave as their original under every facility of torch: ``facilities.py``, in fresh processes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INJECTED = (
    "anomaly", "flop_counter", "fake_tensors", "dispatch_mode", "function_mode", "profiler",
    "vmap", "jvp", "jacrev", "functional_call", "saved_tensor_hooks", "checkpoint_reentrant", "checkpoint",
    "compile_eager", "compile_aot_eager", "export", "export_strict", "symbolic_trace", "script",
    "package", "cloudpickle", "pickles", "deepcopy_of_a_copy", "spawn", "data_loader", "plan_again",
)  # fmt: skip
PROGRAM = ("anomaly", "flop_counter", "fake_tensors", "pickles")


def compared(kind, names):
    """What differs between a network of this kind and the original under these facilities."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.surgery import facilities; facilities.main(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, kind, *names], capture_output=True, text=True)
    assert f"{len(names)} compared" in done.stdout, done.stderr[-2000:]
    return done.stdout.removesuffix(f"{len(names)} compared\n")


def test_injected_networks_behave_as_their_original():
    assert not compared("injected", INJECTED)


def test_networks_out_of_programs_behave_as_their_original():
    assert not compared("program", PROGRAM)
