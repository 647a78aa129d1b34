"""Wherever fewer places are found than were asked for, the units that can take no block are named, with the commonest reason."""

import pytest
import torch

import se_inject as si
from se_inject.errors import AlreadyInjected, InjectError
from tests.networks import partly

X = torch.zeros(2, 3, 16, 16)
NUMBER, FOLD = "turns a size or a tensor into a Python number", "its channels are in dimensions 1 and 2"


def said(network, **options):
    with pytest.raises(InjectError) as caught:
        si.plan(network, X, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "options", "parts"),
    [
        (partly.attended_and_refused, {}, ["already has attention", "3 sites", "2 of 5 units can take no block", NUMBER]),
        (partly.attended_and_refused, {"stages": 1}, ["2 sites", "2 of 5 units can take no block", NUMBER]),
        (partly.refused, {}, ["5 units, and none can take a block", FOLD]),
        (partly.refused, {"stages": 1}, ["no stage matches `1`", "refused there: 2 places", NUMBER]),
        (partly.free_and_refused, {"stages": 2}, ["no stage matches `2`", "2 of 4 units can take no block"]),
        (partly.free_and_refused, {"stages": "3"}, ["refused there: 2 places, `3.0` the first"]),
        (partly.free_and_refused, {"stages": "3.1"}, ["refused there: 1 place", FOLD]),
        (partly.free_and_refused, {"at": "3.1.*"}, ["no site matches `3.1.*`", "refused there: 1 place", FOLD]),
        (partly.free_and_refused, {"at": "3"}, ["refused there: 2 places, `3.0` the first"]),
        (partly.free_and_refused, {"at": "re:3\\.1\\..*"}, ["refused there: 1 place", FOLD]),
        (partly.free_and_refused, {"at": "nowhere.*"}, ["no site matches", "2 of 4 units can take no block"]),
        (partly.free_and_refused, {"at": lambda site: False}, ["true for no site", "2 of 4 units can take no block"]),
        (partly.mixed, {"stages": 2}, ["every site of `2`", "2 of 5 units can take no block"]),
        (partly.attention_and_gated, {}, ["1 site with a gate", "left alone: 2 units of attention between positions"]),
    ],
)  # fmt: skip
def test_an_error_names_the_units_that_can_take_no_block(make, options, parts):
    text = said(make(), **options)
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize("options", [{}, {"stages": 1}, {"at": "1.*"}, {"stages": "last"}, {"position": "identity"}])
def test_a_plan_notes_them_however_it_was_chosen(options):
    plan = si.plan(partly.free_and_refused(), X, **options)
    assert any(note.startswith("2 of 4 units can take no block, most often: ") for note in plan.notes)
    assert any(
        note.startswith("left alone: 1 module that can't be traced, most often: " + NUMBER) for note in plan.notes
    )


def test_a_plan_notes_units_of_attention():
    plan = si.plan(partly.attention_and_free(), X)
    assert len(plan) == 1 and "left alone: 2 units of attention between positions" in plan.notes


def test_what_holds_blocks_already_is_not_taken_for_all_there_is():
    network = si.inject(partly.free_and_refused(), X)
    with pytest.raises(AlreadyInjected) as caught:
        si.plan(network, X)
    assert "2 of 4 units can take no block, most often: " in str(caught.value)


def test_values_of_sites_say_it():
    found = si.find_sites(partly.free_and_refused(), X)
    assert found.shortfall().startswith("2 of 4 units can take no block, most often: ")
    assert found.shortfall() in str(found)
    for wrong in (lambda: found.expect(4), lambda: found.where(lambda site: False), lambda: found.stages(5)):
        with pytest.raises(InjectError) as caught:
            wrong()
        assert found.shortfall() in str(caught.value)
    assert si.find_sites(partly.network([partly.Free]), X).shortfall() == ""


def test_a_position_that_no_site_has_is_said_of_all():
    chain = torch.nn.Sequential(partly.layer(3), partly.layer(), partly.layer()).eval()
    assert "all 3 chosen sites" in said(chain, position="pre")
