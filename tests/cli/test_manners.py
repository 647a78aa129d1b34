"""Mistyped command lines, the help, progress, and what ``--quiet`` leaves."""

import io
import re

import pytest
import torch

from se_inject.cli.entry import cli
from se_inject.cli.progress_line import ProgressLine
from tests.cli.networks import SMALL, document, files

MISTYPED = {
    "a list with spaces": (("m.pt", "--stages", "3", "4"), "did you mean `--stages 3,4`?"),
    "a list with commas and spaces": (("m.pt", "--stages", "3,", "4"), "did you mean `--stages 3,4`?"),
    "ratios with spaces": (("cost", "m.pt", "--r", "4", "8", "16"), "did you mean `--r 4,8,16`?"),
    "a list before MODEL": (("--stages", "3", "4", "m.pt"), "did you mean `--stages 3,4,m.pt`?"),
    "a shape with spaces": (("m.pt", "--input", "3", "64", "64"), "did you mean `--input 3x64x64`?"),
    "two outputs": (("m.pt", "-o", "a.pt", "b.onnx"), "did you mean `-o a.pt -o b.onnx`?"),
    "two patterns": (("m.pt", "--at", "a.*", "b.*"), "did you mean `--at a.* --at b.*`?"),
    "a misspelt command": (("exprot", "m.pt", "-o", "x.onnx"), "no command `exprot`; did you mean `export`?"),
    "a command in the singular": (("site", "m.pt"), "did you mean `sites`?"),
    "a command that is none": (("quantise", "m.pt"), "no command `quantise`; there are: blocks, "),
    "a misspelt option": (("m.pt", "--stage", "1"), "--stages"),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_a_mistyped_command_line_is_answered_with_the_right_one(se_inject, case):
    arguments, answer = MISTYPED[case]
    if case == "a list before MODEL":
        answer = "--stages 3,4"
        open("m.pt", "w").close()
    done = se_inject(*arguments, code=2)
    assert answer in done.err
    assert done.out == ""


def test_the_help_lists_the_commands_and_groups_the_options(se_inject):
    text = se_inject("--help").out
    sections = re.findall(r"^(\w.*):$", text, re.M)
    assert sections[0].startswith("Commands")
    assert sections[1:] == [
        "Which network", "Which sites", "Which block", "What was chosen before", "What is written",
        "What is done and printed",
    ]  # fmt: skip
    for name in cli.commands:
        assert name == "inject" or re.search(rf"^  {name} +\S", text, re.M), name


def test_every_option_has_a_section_and_a_help():
    for command in cli.commands.values():
        context = command.make_context(command.name, [], resilient_parsing=True)
        text = command.get_help(context)
        assert "\nOthers:" not in text, (command.name, text.partition("\nOthers:")[2])
        for option in command.params:
            record = option.get_help_record(context)
            assert option.param_type_name == "argument" or (record and record[1]), (command.name, option.name)


def test_quiet_leaves_what_was_asked_for(se_inject, tiny):
    done = se_inject("tiny.pt", *SMALL, "-o", "a.pt", "-q")
    assert (done.out, done.err) == ("", "")
    assert files() == {"tiny.pt", "a.pt"}
    done = se_inject("export", "a.pt", *SMALL, "-o", "b.pt", "--quiet")
    assert (done.out, done.err) == ("", "")
    done = se_inject("tiny.pt", *SMALL, "--dry-run", "--json", "-q")
    assert document(done.out)["plan"]
    assert done.err == ""
    assert se_inject("tiny.pt", *SMALL, "--dry-run", "--format", "csv", "-q").out.startswith("site,")
    assert se_inject("sites", "tiny.pt", "-q").out.lstrip().startswith("stage")
    assert "error: no file" in se_inject("absent.pt", "-q", code=2).err


def test_completion_offers_commands_and_options(se_inject, monkeypatch):
    from click.shell_completion import BashComplete

    complete = BashComplete(cli, {}, "se-inject", "_SE_INJECT_COMPLETE")
    assert [item.value for item in complete.get_completions([], "exp")] == ["export"]
    offered = [item.value for item in complete.get_completions(["export", "m.pt"], "--w")]
    assert offered == ["--weights"]
    assert {item.value for item in complete.get_completions(["inject", "m.pt", "--position"], "p")} == {"pre", "post"}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_progress_is_a_line_that_goes_away(monkeypatch):
    terminal = Terminal()
    line = ProgressLine(terminal)
    line.show("reading m.pt")
    line.tick()
    assert terminal.getvalue() == ""  # it takes no time
    line.began -= 3
    line.tick()
    assert re.search(r"\r\x1b\[K\S reading m\.pt 3 s$", terminal.getvalue())
    line.clear()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_progress_is_for_terminals_alone(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    assert ProgressLine.if_wanted() is not None
    assert ProgressLine.if_wanted(quiet=True) is None
    monkeypatch.setenv("TERM", "dumb")
    assert ProgressLine.if_wanted() is None
    monkeypatch.delenv("TERM")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert ProgressLine.if_wanted() is None


def test_inspect_says_what_a_file_names_and_how_it_would_be_read(se_inject, tiny):
    done = se_inject("inspect", "tiny.pt")
    assert done.out.startswith("tiny.pt: ")
    assert "allowed" in done.out
    assert "memory, processor time, size of files" in done.err
    data = document(se_inject("inspect", "tiny.pt", "--json").out)
    assert {named["verdict"] for named in data["names"]} == {"allowed"}
    assert len(data["confinement"]) == 3
    assert se_inject("inspect", "tiny.pt", "-q").err == ""
    torch.save({"net": tiny, "when": Own()}, "odd.pt")
    done = se_inject("inspect", "odd.pt", code=1)
    assert "refused" in done.out
    assert "no file `absent.pt`" in se_inject("inspect", "absent.pt", code=2).err


class Own:
    """A class that nobody allowed."""
