"""Networks in styles that the package was not written for: planned, verified and exported at the first try."""

import argparse

import onnxruntime
import pytest
import torch
from torch.utils._pytree import tree_leaves

from se_inject.errors import UntrustedGlobals
from se_inject.exporting.exporter import export
from se_inject.loading import load
from se_inject.plans.planner import plan
from se_inject.sites.finder import sites_in
from se_inject.surgery.swap import eject_, injected_blocks
from se_inject.tracing.inputs import observe_model
from se_inject.verification.checks import verify
from tests.networks.strangers import STRANGERS

EXPORTED = ("WaveNet", "VNet", "RowsDetector", "ChangeDetector", "CRNN", "SuperResolution", "SpeechSeparation")
"""One for each kind of input, output and operation: writing a file takes seconds."""


def every(names):
    return pytest.mark.parametrize("name", list(names))


@every(STRANGERS)
def test_stages_are_those_that_a_person_would_draw(name):
    stranger = STRANGERS[name]
    sites = sites_in(observe_model(stranger.make(), stranger.call(2)))
    table = []
    for stage in sites.table:
        strides = tuple(stride[0] for stride in stage.strides)
        table.append((strides if len(strides) > 1 else strides[0], tuple(site.address for site in stage.sites)))
    assert tuple(table) == stranger.stages


@every(STRANGERS)
def test_injection_is_verified_and_undone(name):
    stranger = STRANGERS[name]
    model, inputs = stranger.make(), stranger.call(2)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    after = plan(model, inputs, reduction=2).apply(model)
    assert [check for check in verify(model, after, inputs).checks if check.passed is not True] == []
    eject_(after)
    assert list(after.state_dict()) == keys
    assert [type(module) for module in after.modules()] == classes


@every(STRANGERS)
def test_a_file_of_it_is_taken_by_who_trusts_its_package(name, tmp_path):
    stranger = STRANGERS[name]
    model = stranger.make().eval()
    path = tmp_path / "last.pt"
    torch.save({"epoch": 3, "model": model, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UntrustedGlobals):
        load(path)
    loaded = load(path, trust=["tests"])
    assert type(loaded) is type(model)
    with torch.no_grad():
        outputs = [tree_leaves(each(*stranger.call(2))) for each in (model, loaded)]
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


@every(EXPORTED)
def test_the_exported_network_computes_the_same(name, tmp_path):
    stranger = STRANGERS[name]
    model = stranger.make()
    after = plan(model, stranger.call(2), reduction=2).apply(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, block in injected_blocks(after):
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        expected = tree_leaves(after(*stranger.call(3)))
    path = tmp_path / "stranger.onnx"
    export(after, path, stranger.call(2))
    session = onnxruntime.InferenceSession(path)
    given = [each.numpy() for each in stranger.call(3)]
    found = session.run(None, {each.name: value for each, value in zip(session.get_inputs(), given, strict=True)})
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), one, rtol=1e-4, atol=1e-4)
