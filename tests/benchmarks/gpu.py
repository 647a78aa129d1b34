"""What fused blocks compute and cost on a GPU: one command that tests and times, in a few minutes.

    python tests/benchmarks/gpu.py > tests/benchmarks/gpu-CARD.md
    python tests/benchmarks/gpu.py --dry       # no GPU: tiny shapes in Triton's interpreter, to see that it runs

Ratios are against the plain network in the same mode, measured in turns in one run: medians over rounds.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
import warnings

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch  # noqa: E402
import torchvision  # noqa: E402
import triton  # noqa: E402
from torch import nn  # noqa: E402

import se_inject as si  # noqa: E402
from se_inject import kernels  # noqa: E402
from se_inject.blocks import SqueezeExcitation, fuse_block_  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
LAST = torch.channels_last
FAILURES: list[str] = []


def say(*words):
    print(*words, flush=True)


def expect(condition, what):
    if not condition:
        FAILURES.append(what)
        say(f"- **FAILED**: {what}")


# -- timing ------------------------------------------------------------------------------------------------


def timed(function, calls):
    """Milliseconds a call."""
    if DRY:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def in_turns(functions, rounds=7, calls=10):
    """The median milliseconds of each function, and the median of its ratios to the first one's, round by round."""
    rounds, calls = (1, 1) if DRY else (rounds, calls)
    for function in functions.values():
        for _ in range(1 if DRY else 3):
            function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function, calls))
    first = next(iter(times.values()))
    ratios = {name: statistics.median(a / b for a, b in zip(each, first, strict=True)) for name, each in times.items()}
    return {name: statistics.median(each) for name, each in times.items()}, ratios


def graphed(model, x):
    """A replay of the model's call as a CUDA graph."""
    if DRY:
        return lambda: model(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay


def row(name, ratios, milliseconds, first):
    cells = " | ".join(f"{ratios[each]:.2f}" for each in ratios if each != first)
    say(f"| {name} | {milliseconds[first]:.3g} | {cells} |")


def header(title, names):
    say(f"\n### {title}\n")
    say(f"| | {names[0]}, ms | " + " | ".join(f"{name} ×" for name in names[1:]) + " |")
    say("|---" * (len(names) + 1) + "|")


# -- networks ----------------------------------------------------------------------------------------------


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.3, 0.7)
                module.bias.normal_(0, 0.1)
    return model


def trained(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in si.injected_parameters(model):
            parameter.normal_(0, 0.2)
    return model


def networks(names):
    for name in names:
        if name == "yolo":
            try:
                from ultralytics import YOLO
            except ImportError:
                say("\n(ultralytics is not installed: no YOLO)")
                continue
            yield name, YOLO("yolov8n.yaml").model, 640
        else:
            yield name, torchvision.models.get_model(name, weights=None), 224


def variants(plain, x):
    """The plain network, and what is made of it."""
    plain = randomise(plain).eval().requires_grad_(False)
    unfused = trained(si.inject(plain, x, reduction=16))
    return {"plain": plain, "SE": unfused, "fused": si.fuse_(copy.deepcopy(unfused))}


def first(out):
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


# -- parts -------------------------------------------------------------------------------------------------


def exactness():
    """Kernels against float64 and torch's own roundings, on this device, and on another card if there is one."""
    say("\n## Right\n")
    if torch.cuda.device_count() > 1:
        value = torch.randn(2, 8, 5, 5, device="cuda:1")
        block = SqueezeExcitation(8, reduction=4).to("cuda:1")
        block.identity_init()
        fuse_block_(block)
        expect(
            torch.equal(block(value, value, "relu"), torch.relu(value + value)), "on a card that is not the current one"
        )
    shapes = (
        [(2, 8, 5, 5), (10, 6, 3, 4)]
        if DRY
        else [(1, 256, 56, 56), (64, 2048, 7, 7), (16, 64, 17, 13), (3, 5, 7), (2, 8, 4, 6, 5)]
    )
    dtypes = [torch.float32, torch.float16] if DRY else [torch.float32, torch.float16, torch.bfloat16]
    worst = {}
    for shape in shapes:
        for dtype in dtypes:
            for last in (False, True):
                for activation in ("relu", "silu", "hardswish", "gelu", "relu6", "none"):
                    error, equal = compared(shape, dtype, last, activation)
                    worst[dtype] = max(worst.get(dtype, 0.0), error)
                    expect(equal, f"bit-equal at the start: {shape} {dtype} {activation}")
    for dtype, error in worst.items():
        allowed = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        expect(error <= allowed, f"{dtype}: relative error {error:.1e}, allowed {allowed:.0e}")
        say(f"- {dtype}: outputs and gradients within {error:.1e} of float64 (norms, relative)")


def compared(shape, dtype, last, activation):
    torch.manual_seed(0)
    block = SqueezeExcitation(shape[1], rank=len(shape) - 2, reduction=4).to(DEVICE)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    fuse_block_(block)
    exact = copy.deepcopy(block).double()
    block = block.to(dtype)
    layout = {4: LAST, 5: torch.channels_last_3d}.get(len(shape)) if last else None
    value, shortcut, grad = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(3))
    if layout is not None:
        value, shortcut = (t.contiguous(memory_format=layout) for t in (value, shortcut))
    given = [value.requires_grad_(), shortcut.requires_grad_(), *block.parameters()]
    wide = [value.detach().double().requires_grad_(), shortcut.detach().double().requires_grad_(), *exact.parameters()]
    out, wanted = block(given[0], given[1], activation), exact(wide[0], wide[1], activation)
    expect("se_inject" in type(out.grad_fn).__name__, f"a kernel for {shape} {dtype} {activation}")
    found = [out, *torch.autograd.grad(out, given, grad)]
    others = [wanted, *torch.autograd.grad(wanted, wide, grad.double())]
    error = max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, others, strict=True))
    with torch.no_grad():
        block.identity_init()
        same = torch.equal(block(value, shortcut, activation), kernels.activated(value + shortcut, activation))
    if DRY and activation in ("silu", "gelu", "hardswish"):
        same = True  # exp and erf of NumPy
    return error, same


def inference(names, batches):
    """Inference in half precision, eager and as CUDA graphs, against plain and against plain folded."""
    say("\n## Inference (float16, channels_last)")
    dtype = torch.float32 if DRY else torch.float16
    for name, plain, side in networks(names):
        side = 32 if DRY else side
        example = torch.randn(2, 3, side, side)
        made = variants(plain, example)
        made |= {
            "plain folded": si.for_inference(made["plain"], example),
            "for inference": si.for_inference(made["SE"], example),
        }
        made = {key: model.to(DEVICE, dtype, memory_format=LAST) for key, model in made.items()}
        for how, call in (("eager", lambda m, x: lambda: m(x)), ("CUDA graph", graphed)):
            header(f"{name}, {how}", [*made, "for inference / plain folded"])
            for batch in batches:
                x = torch.randn(batch, 3, side, side, device=DEVICE, dtype=dtype).to(memory_format=LAST)
                with torch.inference_mode():
                    wanted = first(made["SE"](x)).float()
                    for key in ("fused", "for inference"):
                        error = float((first(made[key](x)).float() - wanted).norm() / wanted.norm())
                        expect(error < 2e-2, f"{name} {key} at batch {batch}: relative error {error:.1e}")
                    milliseconds, ratios = in_turns({key: call(model, x) for key, model in made.items()})
                ratios["of folded"] = ratios["for inference"] / ratios["plain folded"]
                row(f"batch {batch}", ratios, milliseconds, "plain")


def training(names, batches):
    """A training step under bfloat16 autocast, eager and compiled, and its peak memory."""
    say("\n## Training step (bfloat16 autocast, channels_last)")
    for name, plain, side in networks(names):
        side = 32 if DRY else side
        if name == "yolo":
            continue
        made = {
            key: model.float().requires_grad_(True)
            for key, model in variants(plain, torch.randn(2, 3, side, side)).items()
        }
        for how in ("eager",) if DRY else ("eager", "compiled"):
            header(f"{name}, {how}", list(made))
            for batch in batches:
                steps, peaks = {}, {}
                for key, model in made.items():
                    torch._dynamo.reset()
                    steps[key] = step_of(copy.deepcopy(model).to(DEVICE, memory_format=LAST).train(), how, batch, side)
                milliseconds, ratios = in_turns(steps, rounds=5, calls=5)
                for key, step in steps.items() if not DRY else ():
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step()
                    torch.cuda.synchronize()
                    peaks[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row(f"batch {batch}", ratios, milliseconds, "plain")
                if peaks:
                    say(f"| peak, MiB | {peaks['plain']:.0f} | {peaks['SE']:.0f} | {peaks['fused']:.0f} |")
                    expect(peaks["fused"] <= 1.005 * peaks["SE"], f"peak memory of {name} at {batch}")
                    expect(
                        ratios["fused"] <= 1.02 * ratios["SE"], f"{name} {how} at {batch}: fused slower than unfused"
                    )


def step_of(model, how, batch, side):
    call = torch.compile(model) if how == "compiled" else model
    x = torch.randn(batch, 3, side, side, device=DEVICE).to(memory_format=LAST)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = call(x).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def bandwidth(batch):
    """What each kernel moves against the fewest bytes possible, as a share of what a copy reaches on this card."""
    from se_inject.kernels import launch

    say(
        f"\n## Bytes (float16, channels_last, batch {batch}): the fewest possible over the time, as a share of a copy's\n"
    )
    say("| value | copy, GB/s | squeeze | tail | tail back | value back |\n|---|---|---|---|---|---|")
    shapes = [(8, 4, 4)] if DRY else [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    for channels, height, width in shapes:
        shape = (batch, channels, height, width)
        dtype = torch.float32 if DRY else torch.float16
        value, shortcut, grad, out = (
            torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=LAST) for _ in range(4)
        )
        gate = torch.rand(batch, channels, device=DEVICE)
        mean = torch.rand(batch, channels, device=DEVICE)
        layout, size = launch.Layout.of(value), value.numel() * value.element_size()
        runs = {
            "copy": (lambda v=value, o=out: o.copy_(v), 2),
            "squeeze": (lambda v=value, k=layout: launch.parts_of_mean(v, k, torch.float32), 1),
            "tail": (lambda v=value, g=gate, s=shortcut: launch.tail(v, g, s, "relu"), 3),
            "back": (lambda d=grad, v=value, g=gate, o=out: launch.tail_backward(d, v, g, o, "relu", True, False), 4),
            "value": (
                lambda d=grad, v=value, g=gate, z=mean: launch.value_backward(d, v, None, g, z, "none", False),
                2,
            ),
        }
        milliseconds, _ = in_turns({name: run for name, (run, _) in runs.items()}, calls=30)
        speed = {name: passes * size / milliseconds[name] / 1e6 for name, (_, passes) in runs.items()}
        shares = {name: speed[name] / speed["copy"] for name in speed if name != "copy"}
        say(
            f"| {shape} | {speed['copy']:.0f} | "
            + " | ".join(f"{100 * share:.0f} %" for share in shares.values())
            + " |"
        )
        if not DRY and batch >= 64:
            expect(shares["tail"] >= 0.8, f"the tail of {shape} reaches {100 * shares['tail']:.0f} % of a copy")


def few(batches):
    """Up to which batch the bottleneck is faster as kernels (two launches) than as torch's products (four or five)."""
    from se_inject.kernels import launch
    from se_inject.kernels.formulas import Excitation

    say(
        f"\n## Bottleneck of a block as kernels, against torch's products (float16, CUDA graphs); now up to {launch.FEW}\n"
    )
    say("| value | " + " | ".join(f"batch {batch}, × " for batch in batches) + " |\n|---" + "|---" * len(batches) + "|")
    limit, dtype = launch.FEW, torch.float32 if DRY else torch.float16
    shapes = [(64, 4, 4)] if DRY else [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    for channels, height, width in shapes:
        w1, b1, w2, b2 = (
            torch.randn(size, device=DEVICE, dtype=dtype)
            for size in ((channels // 16, channels), channels // 16, (channels, channels // 16), channels)
        )
        e, cells = Excitation(w1, b1, w2, b2, "relu", "sigmoid", True), []
        for batch in batches:
            value = torch.randn(batch, channels, height, width, device=DEVICE, dtype=dtype).to(memory_format=LAST)
            runs = {}
            for name, most in (("products", 0), ("kernels", 2**30)):
                launch.FEW = most
                with torch.no_grad():
                    runs[name] = graphed(lambda v, e=e: launch.excite_from(v, v, v, e, "relu"), value)
                if DRY:
                    runs[name]()
            launch.FEW = limit
            cells.append(f"{in_turns(runs, calls=30)[1]['kernels']:.2f}")
        say(f"| {(channels, height, width)} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--models", default="resnet50,mobilenet_v2,convnext_tiny,yolo")
    parser.add_argument("--parts", default="exactness,bandwidth,few,inference,training")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry runs it in the interpreter")
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = True
    card = "the interpreter, no card" if DRY else torch.cuda.get_device_name()
    say(
        f"# Fused blocks on {card}\n\ntorch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    )
    names = ["resnet18"] if DRY else options.models.split(",")
    parts = {
        "exactness": exactness,
        "bandwidth": lambda: bandwidth(2 if DRY else 64),
        "few": lambda: few((2,) if DRY else (1, 4, 8, 16, 32, 64)),
        "inference": lambda: inference(names, (1,) if DRY else (1, 64, 256)),
        "training": lambda: training(names, (2,) if DRY else (64, 256)),
    }
    for part in options.parts.split(","):
        start = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            parts[part]()
        say(f"\n({part}: {time.perf_counter() - start:.0f} s)")
    say("\n" + ("All as it should be." if not FAILURES else f"{len(FAILURES)} failed: " + "; ".join(FAILURES)))
    return bool(FAILURES)


if __name__ == "__main__":
    sys.exit(main())
