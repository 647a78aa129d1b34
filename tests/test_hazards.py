"""Every promise, checked on every network of the zoo."""

import copy
import dataclasses
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import se_inject.errors
from se_inject.plans.planner import plan, plan_of
from se_inject.plans.value import Plan
from se_inject.sites.finder import sites_in
from se_inject.surgery.swap import eject_, injected_blocks
from se_inject.tracing.inputs import observe_model
from se_inject.verification.checks import verify
from tests.common import difference, portrait, same_portrait
from tests.networks.hazards import HAZARDS

INJECTABLE = [name for name, hazard in HAZARDS.items() if hazard.sites and not hazard.raises]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.nn.utils.weight_norm")


def every(names):
    names = list(names)
    return pytest.mark.parametrize("hazard", [HAZARDS[name] for name in names], ids=names)


def planned(hazard, model, **options):
    args, kwargs = hazard.call(2)
    example = {} if hazard.infer else {"example_inputs": args, "example_kwargs": kwargs or None}
    return plan(model, at=hazard.at, reduction=4, **example, **options)


def injected(hazard):
    model = hazard.make()
    return planned(hazard, model).apply(model)


def trained(model, seed=5):
    """The model with blocks that are far from identities, and whose gradients nothing cuts off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, block in injected_blocks(model):
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            block.fc1.bias.abs_().add_(2.0)
    return model


def run(model, hazard, *, training=False, seed=0, batch=3):
    """What a call returns, and the buffers afterwards."""
    args, kwargs = hazard.call(batch)
    model.train() if training else model.eval()
    random.seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result, dict(model.named_buffers())


# -- the sites --------------------------------------------------------------------------------------------


@every(name for name in HAZARDS if not HAZARDS[name].raises)
def test_sites_and_refusals(hazard):
    args, kwargs = hazard.call(2)
    sites = sites_in(observe_model(hazard.make(), None if hazard.infer else args, kwargs or None))
    chosen = sites.at(hazard.at) if hazard.at else sites
    assert tuple(site.address for site in chosen) == hazard.sites
    refused = {item.address: item.reason for item in sites.refused}
    for address, reason in hazard.refused.items():
        assert reason in refused.get(address, f"nothing; refused are {refused}")
    held = {site.address: site.held_back.reason for site in sites.all_sites if site.held_back}
    for address, reason in hazard.held.items():
        assert reason in held.get(address, f"nothing; held back are {held}")


@every(name for name in HAZARDS if HAZARDS[name].raises)
def test_refused_networks(hazard):
    kind, text = hazard.raises
    model = hazard.make()
    before = portrait(model)
    with pytest.raises(getattr(se_inject.errors, kind)) as caught:
        planned(hazard, model).apply_(model)
    assert text in str(caught.value)
    same_portrait(before, portrait(model))


# -- looking and copying ----------------------------------------------------------------------------------


@every(INJECTABLE)
def test_a_plan_leaves_the_model_alone(hazard):
    model = hazard.make()
    before = portrait(model)
    planned(hazard, model)
    same_portrait(before, portrait(model))


@every(INJECTABLE)
def test_apply_leaves_the_original_alone(hazard):
    model = hazard.make()
    chosen = planned(hazard, model)
    before = portrait(model)
    torch.manual_seed(3)
    chosen.apply(model)
    same_portrait((*before[:2], portrait(model)[2], *before[3:]), portrait(model))
    expected, seen = run(hazard.make(), hazard), run(model, hazard)
    assert not difference(expected, seen)


@every(INJECTABLE)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_output_is_bit_equal_at_the_start(hazard, training):
    for seed in range(hazard.seeds):
        expected = run(hazard.make(), hazard, training=training, seed=seed)
        after = injected(hazard)
        result, buffers = run(after, hazard, training=training, seed=seed)
        added = {f"{path}.{key}" for path, block in injected_blocks(after) for key, _ in block.named_buffers()}
        buffers = {key: value for key, value in buffers.items() if key not in added}
        assert not difference(expected, (result, buffers))


@every(INJECTABLE)
def test_keys_are_kept_and_old_weights_load(hazard):
    before = hazard.make()
    after = planned(hazard, before).apply(before)
    old, new = before.state_dict(), after.state_dict()
    assert [key for key in new if key in old] == list(old)
    blocks = {id(block) for _, block in injected_blocks(after)}
    paths = [path for path, module in after.named_modules(remove_duplicate=False) if id(module) in blocks]
    for key in set(new) - set(old):
        assert any(key.startswith(f"{path}.fc") for path in paths), key
    assert len({id(module) for module in after.modules()}) == len(
        {id(module) for module in before.modules()}
    ) + 4 * len(hazard.sites)
    assert isinstance(after, type(before))
    for path, module in before.named_modules():
        assert isinstance(after.get_submodule(path), type(module)), path
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.mul_(0.5)
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(old)
    assert not difference(run(before, hazard)[0], run(after, hazard)[0])


# -- gradients --------------------------------------------------------------------------------------------


def gradients(model, hazard):
    args, kwargs = hazard.call(8)  # enough for drop path to leave some
    model.train()
    random.seed(0)
    torch.manual_seed(0)
    outputs = [leaf for leaf in flat(model(*args, **kwargs)) if leaf.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def flat(value):
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, tuple | list) else []


@every(name for name in INJECTABLE if HAZARDS[name].trains)
def test_gradients_reach_every_new_parameter(hazard):
    after = trained(injected(hazard))
    found = gradients(after, hazard)
    for path, block in injected_blocks(after):
        for name, _ in block.named_parameters():
            gradient = found[f"{path}.{name}"]
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert gradient.any(), name


@every(name for name in INJECTABLE if HAZARDS[name].trains and name != "all_frozen")
def test_old_gradients_are_as_before(hazard):
    before = hazard.make()
    assert any(parameter.requires_grad for parameter in before.parameters())
    expected, seen = gradients(before, hazard), gradients(injected(hazard), hazard)
    for name, gradient in expected.items():
        assert (gradient is None) == (seen[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(seen[name], gradient, rtol=1e-5, atol=1e-6)


# -- the blocks act on the right values -------------------------------------------------------------------


class Intercept(TorchFunctionMode):
    """Sends what the n-th call of a function returns through a block."""

    def __init__(self, gates, in_place):
        super().__init__()
        self.gates, self.in_place, self.seen = gates, in_place, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for target, call, block in self.gates:
            if function is target:
                self.seen[id(block)] = self.seen.get(id(block), 0) + 1
                if call in (None, self.seen[id(block)]):
                    result = gated(block, result, self.in_place)
        return result


def gated(block, value, in_place):
    return value.copy_(block(value)) if in_place else block(value)


def by_other_means(model, hazard, blocks):
    """The network with each block called by a hook or an interception at its value; and the context to call it in."""
    functions = []
    for address, block in blocks.items():
        target, call = hazard.probes.get(address, (address, None))
        if not isinstance(target, str):
            functions.append((target, call, block))
            continue
        count = iter(range(1, 1000))

        def hook(module, args, output, block=block, call=call, count=count):
            if call in (None, next(count)):
                return gated(block, output, hazard.in_place)
            return None

        model.get_submodule(target).register_forward_hook(hook)
    return Intercept(functions, hazard.in_place)


@every(name for name in INJECTABLE if None not in HAZARDS[name].probes.values())
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_blocks_act_on_exactly_their_values(hazard, training):
    after = trained(injected(hazard))
    blocks = {step.site: copy.deepcopy(after.get_submodule(step.path)) for step in plan_of(after).steps}
    assert set(blocks) == set(hazard.sites)
    for block in blocks.values():
        block.train(training)
    plain = run(hazard.make(), hazard, training=training)[0]
    reference = hazard.make()
    with by_other_means(reference, hazard, blocks):
        expected = run(reference, hazard, training=training)[0]
    seen = run(after, hazard, training=training)[0]
    assert difference(plain, seen), "the blocks change nothing"
    assert not difference(expected, seen)


@every(INJECTABLE)
def test_blocks_without_a_reference_change_the_output(hazard):
    after = trained(injected(hazard))
    whole = run(after, hazard)[0]
    for path, _ in injected_blocks(after):
        without = copy.deepcopy(after)
        owner, _, name = path.rpartition(".")
        without.get_submodule(owner)._modules[name] = nn.Identity()
        assert difference(whole, run(without, hazard)[0]), f"{path} changes nothing"


# -- back and forth ---------------------------------------------------------------------------------------


@every(INJECTABLE)
def test_eject_gives_the_original_back(hazard):
    def shape_of(model):
        modules = [
            (path, type(module), sorted(vars(module)), list(module._modules)) for path, module in model.named_modules()
        ]
        return modules, {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}

    after = hazard.make()
    before = shape_of(after)
    planned(hazard, after).apply_(after)
    assert shape_of(after) != before
    assert eject_(trained(after)) is after
    assert shape_of(after) == before
    for training in (False, True):
        assert not difference(
            run(hazard.make(), hazard, training=training)[0], run(copy.deepcopy(after), hazard, training=training)[0]
        )


@every(INJECTABLE)
def test_copies_and_pickles_compute_the_same(hazard):
    after = trained(injected(hazard))
    twins = [copy.deepcopy(after)]
    if hazard.pickles:
        twins.append(pickle.loads(pickle.dumps(after)))
    for training in (False, True):
        expected = run(copy.deepcopy(after), hazard, training=training)
        for twin in twins:
            assert not difference(expected, run(copy.deepcopy(twin), hazard, training=training))
    for twin in twins:
        assert plan_of(twin).steps == plan_of(after).steps


@every(INJECTABLE)
def test_a_plan_applies_to_another_instance(hazard):
    first = hazard.make()
    chosen = planned(hazard, first)
    expected = trained(chosen.apply(first))
    seen = chosen.apply(hazard.make())
    seen.load_state_dict(expected.state_dict())
    assert not difference(run(expected, hazard)[0], run(seen, hazard)[0])


@every(INJECTABLE)
def test_a_stored_plan_applies_to_another_instance(hazard):
    first = hazard.make()
    chosen = planned(hazard, first)
    stored = Plan.from_json(chosen.to_json())
    assert stored.steps == chosen.steps
    if not hazard.json:
        with pytest.raises(se_inject.errors.InjectError):
            stored.apply(hazard.make())
        return
    expected, seen = trained(chosen.apply(first)), stored.apply(hazard.make())
    seen.load_state_dict(expected.state_dict())
    assert not difference(run(expected, hazard)[0], run(seen, hazard)[0])


@every(INJECTABLE)
def test_a_second_time_is_refused(hazard):
    after = hazard.make()
    chosen = planned(hazard, after)
    chosen.apply_(after)
    before = portrait(after)
    for attempt in (lambda: chosen.apply_(after), lambda: planned(hazard, after)):
        with pytest.raises(se_inject.errors.AlreadyInjected):
            attempt()
        same_portrait(before, portrait(after))


@every(name for name in INJECTABLE if HAZARDS[name].trains)
def test_verification_passes(hazard):
    args, kwargs = hazard.call(2)
    before = hazard.make()
    after = planned(hazard, before).apply(before)
    verdict = verify(before, after, None if hazard.infer else args, kwargs or None)
    refused = hazard.at == "stem.2"  # as many units as have a block, or all
    beside = {"blocks where units are"} if refused else set()
    assert {check.name for check in verdict.checks if check.passed is not True} == beside


# -- used otherwise than in the observed call -------------------------------------------------------------

VARIANTS = [(HAZARDS[name], use) for name in INJECTABLE for use in HAZARDS[name].variants]


@pytest.mark.parametrize(("hazard", "use"), VARIANTS, ids=[f"{hazard.name}-{use}" for hazard, use in VARIANTS])
def test_another_use_is_the_same_or_refused(hazard, use):
    """The worst an edited forward can do is to be silently another one."""
    variant = hazard.variants[use]
    torch.manual_seed(0)
    expected = variant(hazard.make().eval())
    after = injected(hazard).eval()
    torch.manual_seed(0)
    try:
        seen = variant(after)
    except (RuntimeError, AssertionError, TypeError):
        return
    assert not difference(expected, seen)


MUSTS = [(HAZARDS[name], use) for name in INJECTABLE for use in HAZARDS[name].must]


@pytest.mark.parametrize(("hazard", "use"), MUSTS, ids=[f"{hazard.name}-{use}" for hazard, use in MUSTS])
def test_another_use_is_the_same(hazard, use):
    expected = hazard.must[use](hazard.make().eval())
    assert not difference(expected, hazard.must[use](injected(hazard).eval()))


@every(name for name in INJECTABLE if HAZARDS[name].recomputes)
def test_recomputation_is_kept(hazard):
    counts = []
    for model in (hazard.make(), injected(hazard)):
        calls = []
        model.get_submodule(hazard.recomputes).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients(model, hazard)
        counts.append(len(calls))
    assert counts == [2, 2]
