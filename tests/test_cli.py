"""The command line itself: what needs no model."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from rich.console import Console

import kvcc
from kvcc.cli import cli, main
from kvcc.cli._console import print_json
from kvcc.cli._outputs import write_output
from kvcc.cli.demo import table_of
from kvcc.demo import RECIPES, Row
from kvcc.kernels import BACKENDS
from kvcc.passes import REGISTRY
from kvcc.recipe import shipped

COMMANDS = {
    "bench",
    "calibrate",
    "check",
    "compare",
    "demo",
    "env",
    "export",
    "inspect",
    "plan",
    "profile",
    "recipes",
    "run",
}


def test_the_demo_s_table_fits_a_terminal() -> None:
    nbytes = (29_000_000, 189_000_000)
    rows = [Row(name, 3.59, nbytes, nbytes, (94371840, 188743680), 12.52, 0.114, 54.6) for name in RECIPES]
    written = io.StringIO()
    Console(width=80, file=written).print(table_of(rows))
    shown = written.getvalue()
    assert "…" not in shown
    assert all(name in shown for name in RECIPES)
    assert "allocated: 100.0 to 100.0 % of what plans say" in shown


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `kvcc` with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["kvcc", *arguments])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert kvcc.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, flag) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed >= COMMANDS


def test_every_command_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    context = click.Context(cli)
    names = cli.list_commands(context)
    assert set(names) >= COMMANDS
    for name in names:
        command = cli.get_command(context, name)
        assert command is not None, name
        assert command.help, name
        assert call(monkeypatch, name, "--help") == 0
        assert f" {name} " in capsys.readouterr().out.splitlines()[0]


def test_env(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "env") == 0
    shown = capsys.readouterr().out
    assert all(f"kernels: {name}" in shown for name in BACKENDS)
    assert call(monkeypatch, "env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kvcc"] == kvcc.__version__
    assert facts["backends"]["reference"] is None
    assert all(reason is None or (reason and "\n" not in reason) for reason in facts["backends"].values())
    assert set(facts["backends"]) == set(BACKENDS)
    assert facts["packages"]["torch"]


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "recipes") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*shipped(), *REGISTRY))
    assert call(monkeypatch, "recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in listed["recipes"]] == shipped()
    assert all(recipe["summary"] for recipe in listed["recipes"])
    assert set(listed["passes"]) == set(REGISTRY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["recipes", "--nonsense"], "No such option"),
        (["export"], "Missing argument"),
        (["export", "x", "--recipe", "kivi-5", "-o", "y"], "no recipe 'kivi-5'"),
        (["inspect", "no-such-folder"], "does not exist"),
        (["run", "no-such-folder", "-p", "Hello"], "does not exist"),
        (["run", "no-such-folder", "-p", "Hello", "--device", "gpu"], "device 'gpu': torch cannot use it"),
        (["run", "x", "-p", "Hello", "--temperature", "nan"], "not finite"),
        (["check", "x", "--against", "y", "--junit", "no/such/j.xml"], "there is no folder no/such"),
        (["check", "x", "--against", "y", "--markdown", "."], "is a folder"),
        (["compare", "x", "--against", "y", "-o", "no/such/c.json"], "there is no folder no/such"),
        (["plan", "x", "--budget", "4x", "-o", "no/such/plan.json"], "there is no folder no/such"),
        (["plan", "x", "--budget", "4x", "-o", "."], "is a folder"),
        (["plan", "x", "--budget", "4x", "-o", "p", "--recipe", "./p"], "have the same name"),
        (["check", "x", "--against", "y", "--retrieval", "-1"], "0 for none"),
        (["plan", "x", "--budget", "nan", "-o", "p"], "give a ratio to fp16"),
        (["plan", "x", "--max-kl", "nan", "-o", "p"], "finite numbers"),
        (["export", "x", "-r", "kivi-4", "-o", "y", "--explain", "--json"], "--explain is for people"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_what_the_system_refuses_is_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not 1, which says that a gate does not hold."""

    @click.command("full")
    def full() -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(type(cli), "get_command", lambda *_: full)
    assert call(monkeypatch, "full") == 2
    assert capsys.readouterr().err == "kvcc: [Errno 28] No space left on device: 'somewhere'\n"


def test_outputs_go_where_links_lead_and_into_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_output(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_output(target, "er", append=True)
    assert target.read_text() == "newer"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, "through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_json_has_no_numbers_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"kl": [float("nan"), 1.5, (float("inf"), None)]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "kl": [None, 1.5, [None, None]]
    }


def test_a_command_decides_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvcc check` ends with 1 when a gate fails, by ctx.exit."""

    @click.command("fails")
    @click.pass_context
    def fails(context: click.Context) -> None:
        context.exit(1)

    monkeypatch.setitem(cli.commands, "fails", fails)
    monkeypatch.setattr(type(cli), "get_command", lambda self, context, name: self.commands.get(name))
    assert call(monkeypatch, "fails") == 1


def test_as_a_program() -> None:
    """The installed entry point, in a process of its own, away from this folder."""
    code = "from kvcc.cli import main; main()"
    for arguments, status in ((["--version"], 0), (["nonsense"], 2)):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
