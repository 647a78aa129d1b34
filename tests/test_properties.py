"""Every promise, checked on random networks.

A few dozen examples, always the same ones, run by default; ``--hypothesis-profile=long`` draws thousands of new ones.
"""

import collections
import copy
import pickle

import pytest
import torch
from hypothesis import assume, event, given, note
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from se_inject.errors import AlreadyInjected, InjectError, OptionError
from se_inject.plans.planner import plan, plan_of
from se_inject.plans.value import Plan
from se_inject.sites.finder import sites_in
from se_inject.sites.positions import POSITIONS
from se_inject.surgery.swap import eject_, injected_blocks
from se_inject.tracing.inputs import observe_model
from tests.common import difference, portrait, same_portrait
from tests.networks.random_nets import networks
from tests.networks.random_parts import Dense, Hourglass, Joined, Partial, Residual, Shuffled


def run(model, recipe, *, training=False, batch=3):
    """What a call of a copy returns, and its buffers afterwards."""
    twin = copy.deepcopy(model).train(training)
    args, kwargs = recipe.call(batch)
    torch.manual_seed(0)
    with torch.no_grad():
        result = twin(*args, **kwargs)
    return result, dict(twin.named_buffers())


def gradients(model, recipe):
    """The gradient of every parameter in training."""
    twin = copy.deepcopy(model).train()
    args, kwargs = recipe.call(4)
    torch.manual_seed(0)
    outputs = [leaf for leaf in tree_leaves(twin(*args, **kwargs)) if leaf.requires_grad]
    generator = torch.Generator().manual_seed(1)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def trains(model, recipe):
    """Whether the network as drawn can be trained: not if it overwrites what its backward pass needs, or normalises one value."""
    try:
        gradients(model, recipe)
    except (RuntimeError, ValueError):
        return False
    return True


def trained(model):
    """A copy whose blocks are far from identities, and let gradients through."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, block in injected_blocks(twin):
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            block.fc1.bias.abs_().add_(2.0)
    return twin


@given(networks(), st.sampled_from([None, None, "*"]), st.sampled_from(["standard", *POSITIONS]))
def test_every_promise(recipe, at, position):
    model = recipe.build()
    assume(trains(model, recipe))
    args, kwargs = recipe.call(2)
    options = {"example_inputs": args, "example_kwargs": kwargs, "at": at, "position": position, "reduction": 2}
    before = portrait(model)
    try:
        planned = plan(model, **options)
    except InjectError as error:
        same_portrait(before, portrait(model))
        event(f"refused: {type(error).__name__}")
        assert position != "standard" or "already has attention" in str(error), f"nothing to do: {error}"
        return
    same_portrait(before, portrait(model))
    note(str(planned))
    sites = sites_in(observe_model(model, args, kwargs))
    for site in sites.all_sites:
        event(f"site: {site.kind}")
    for refusal in sites.refused:
        event(f"refused: {refusal.reason}")

    with torch.random.fork_rng(devices=[]):  # new blocks draw their weights
        after = planned.apply(model)
    same_portrait(before, portrait(model))
    starts_as_the_original(model, after, recipe)
    keeps_the_state(model, after)
    costs_what_was_said(planned, model, after, recipe)
    refuses_a_second_time(planned, after, options)
    ejects_exactly(planned, model, recipe)
    changed = trained(after)
    copies_alike(changed, recipe)
    applies_from_json(planned, changed, recipe)
    reaches_every_block(changed, recipe)
    matters_everywhere(after, recipe)
    if position == "standard":
        acts_on_the_named_values(model, changed, recipe)
        leaves_no_unit_out(model, sites)


def starts_as_the_original(model, after, recipe):
    for training in (False, True):
        expected, (result, buffers) = run(model, recipe, training=training), run(after, recipe, training=training)
        assert not difference(expected, (result, buffers))


def keeps_the_state(model, after):
    old, new = model.state_dict(), after.state_dict()
    assert [key for key in new if key in old] == list(old)
    assert not difference(dict(old), {key: new[key] for key in old})
    added = [f"{path}." for path, _ in injected_blocks(after)]
    blocks = {id(tensor) for _, block in injected_blocks(after) for tensor in block.parameters()}
    ours = {id(tensor) for key, tensor in after.state_dict(keep_vars=True).items() if key not in old}
    assert added
    assert ours == blocks
    for path, module in model.named_modules():
        assert isinstance(after.get_submodule(path), type(module)), path


def costs_what_was_said(planned, model, after, recipe):
    """Parameters counted one by one; MACs by torch's counter in one real call of each network."""

    def counted(network):
        args, kwargs = recipe.call(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(network).eval()(*args, **kwargs)
        return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()

    cost = planned.cost()
    (params, flops), (params_after, flops_after) = counted(model), counted(after)
    assert (cost.before.params, cost.before.flops) == (params, flops)
    assert (cost.after.params, cost.after.flops) == (params_after, flops_after)
    assert cost.added.params == sum(row.cost.params for row in cost.rows) == params_after - params


def refuses_a_second_time(planned, after, options):
    before = portrait(after)
    with pytest.raises(AlreadyInjected):
        planned.apply_(after)
    same_portrait(before, portrait(after))
    # the sites without this position are left over, and refused for that
    with pytest.raises(AlreadyInjected if options["position"] == "standard" else (AlreadyInjected, OptionError)):
        plan(after, **options)
    same_portrait(before, portrait(after))


def ejects_exactly(planned, model, recipe):
    def shape_of(network):
        modules = [
            (path, type(module), list(vars(module)), list(module._modules)) for path, module in network.named_modules()
        ]
        return modules, {key: id(value) for key, value in network.state_dict(keep_vars=True).items()}

    twin = recipe.build()
    before = shape_of(twin)
    planned.apply_(twin)
    assert shape_of(twin) != before
    assert eject_(twin) is twin
    assert shape_of(twin) == before
    for training in (False, True):
        assert not difference(run(model, recipe, training=training), run(twin, recipe, training=training))


def copies_alike(changed, recipe):
    loaded = pickle.loads(pickle.dumps(changed))
    assert plan_of(loaded).steps == plan_of(changed).steps
    for training in (False, True):
        assert not difference(run(changed, recipe, training=training), run(loaded, recipe, training=training))


def applies_from_json(planned, changed, recipe):
    stored = Plan.from_json(planned.to_json())
    assert stored.steps == planned.steps
    if stored.inputs is None:
        return  # more than tensors: the plan can't hold them
    twin = stored.apply(recipe.build())
    twin.load_state_dict(changed.state_dict())
    assert not difference(run(changed, recipe), run(twin, recipe))


def reaches_every_block(changed, recipe):
    found = gradients(changed, recipe)
    for path, block in injected_blocks(changed):
        for name, _ in block.named_parameters():
            gradient = found[f"{path}.{name}"]
            assert gradient is not None, f"{path}.{name}"
            assert gradient.isfinite().all(), f"{path}.{name}"


class Poison(nn.Module):
    """What it gives shows in everything that is made from it, dead rectifiers notwithstanding."""

    def forward(self, x):
        return torch.full_like(x, torch.nan)


def matters_everywhere(after, recipe):
    for path, _ in injected_blocks(after):
        poisoned = copy.deepcopy(after)
        owner, _, name = path.rpartition(".")
        poisoned.get_submodule(owner)._modules[name] = Poison()
        for training in (False, True):
            leaves = tree_leaves(run(poisoned, recipe, training=training)[0])
            assert any(leaf.isnan().any() for leaf in leaves), f"{path} changes nothing"


def leaves_no_unit_out(model, sites):
    """Every innermost unit is a site or refused; joins within what may be a residual unit are that unit's own."""
    named = dict(model.named_modules(remove_duplicate=False))
    joins = Joined, Partial, Shuffled, Dense, Hourglass
    units = {path for path, module in named.items() if isinstance(module, (Residual, *joins))}
    told = [site.address for site in sites.all_sites] + [refusal.address for refusal in sites.refused]
    for path in units:
        above = [named[other] for other in units if path.startswith(f"{other}.")]
        if any(other.startswith(f"{path}.") for other in units):
            continue
        joins_only = isinstance(named[path], joins) or named[path].shortcut is not None  # as deep as its branch
        if joins_only and any(isinstance(module, Residual | Joined | Hourglass) for module in above):
            continue
        names = [name for name, module in named.items() if module is named[path]]
        assert any(address == name or address.startswith(f"{name}.") for name in names for address in told), path


# -- a block at every named value, by other means ---------------------------------------------------------


class Gating(TorchFunctionMode):
    """Passes the values that addresses name through blocks, without a change to any module's forward.

    It follows the calls of modules, and in each of them counts the calls of functions and children under the names
    that addresses use: ``parts.0.norm``, ``parts.1.relu#2``.
    """

    def __init__(self, model, blocks):
        super().__init__()
        self.paths = collections.defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(path)
        self.blocks = blocks
        self.calls = []
        self.ran = set()

    def __enter__(self):
        self.hooks = [
            register_module_forward_pre_hook(lambda module, _: self.calls.append((module, collections.Counter()))),
            register_module_forward_hook(self.leave),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def leave(self, module, args, output):
        self.calls.pop()
        if not self.calls or id(module) not in self.paths:
            return None
        return self.gated(id(module), self.paths[id(module)], output)

    def gated(self, called, names, value):
        """A value through the block of its address, if there is one: ``names`` are what the address may end in."""
        caller, counts = self.calls[-1]
        counts[called] += 1
        number = f"#{counts[called]}" if counts[called] > 1 else ""
        for name in names:
            for path in [""] if not isinstance(called, str) else self.paths[id(caller)]:
                block = self.blocks.get(".".join(part for part in (path, name) if part) + number)
                if block is not None:
                    self.ran.add(block)
                    return block(value)
        return value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__
        if not self.calls or not isinstance(result, Tensor):
            return result
        names = {"add_": ["iadd", "add_"], "mul_": ["imul", "mul_"]}.get(name, [name])  # `+=` or the method
        return self.gated(name, names, result)


def acts_on_the_named_values(model, changed, recipe):
    steps = plan_of(changed).steps
    for training in (False, True):
        blocks = {step.site: copy.deepcopy(changed.get_submodule(step.path)).train(training) for step in steps}
        gating = Gating(twin := copy.deepcopy(model).train(training), blocks)
        args, kwargs = recipe.call(3)
        torch.manual_seed(0)
        with torch.no_grad(), gating:
            expected = twin(*args, **kwargs)
        missing = [site for site, block in blocks.items() if block not in gating.ran]
        assert not missing, f"no such value: {missing}"
        assert not difference(expected, run(changed, recipe, training=training)[0])
