import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from sophia.lab import cli
from sophia.lab.jobs import audit
from sophia.lab.protocols import plan, protocol_file


def sophia(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "sophia.lab.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def code(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code


@pytest.fixture
def short(text_file, tmp_path):
    """A comparison of seconds: arguments without and with its folder."""
    return [
        "compare",
        "--preset",
        "tiny",
        "--data",
        text_file,
        "--seeds",
        1,
        "--workers",
        1,
        "--out",
        tmp_path / "c",
    ]


def test_a_comparison_ends_with_verdict_and_report_and_is_not_repeated(short, tmp_path, capsys):
    """Else the command that the project is about would not work."""
    cli.main([str(a) for a in short])
    out = capsys.readouterr().out
    folder = tmp_path / "c"
    assert "sophia-g" in out
    assert "report.html" in out.replace("\n", "")
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "comparison.json").read_text())
    assert content["contenders"] == ["adamw", "sophia-g"]
    assert content["baseline"] == "adamw"
    assert content["budgets"] == [20, 40]
    assert content["seeds"] == [1]
    assert len(content["runs"]) == 4
    for run in content["runs"]:
        result = json.loads((folder / "runs" / run["run"] / "result.json").read_text())
        assert result["status"] == "finished"
        assert result["steps"] == run["steps"]
    first = {run["contender"]: run["run"] for run in content["runs"] if run["steps"] == 40}
    logs = [(folder / "runs" / first[name] / "log.jsonl").read_text() for name in content["contenders"]]
    start = [json.loads(log.splitlines()[0]) for log in logs]
    assert start[0] == start[1]  # the same weights, before the first step
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}

    cli.main([str(a) for a in short])
    assert "ended before" in " ".join(capsys.readouterr().out.split())
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}
    assert code([*short, "--budgets", "30", "--resume"]) == 2
    assert "differs in budgets" in capsys.readouterr().err


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(short, tmp_path):
    """Else stopping a comparison would lose it."""
    arguments = [*short, "--budgets", "4000"]
    process = sophia(*arguments, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "c").glob("runs/*/attempts.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all processes of the group get it
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    said = err.rstrip().rpartition("To go on: ")[2]
    assert said == shlex.join(["sophia", *map(str, arguments)]), "the same command"
    assert list((tmp_path / "c").glob("runs/*/checkpoint.pt"))

    again = sophia(*arguments, start_new_session=True)
    while time.monotonic() < deadline + 60:
        attempts = [p.read_text().splitlines() for p in (tmp_path / "c").glob("runs/*/attempts.jsonl")]
        if any(len(a) == 2 for a in attempts):
            break
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 143
    again.communicate()
    assert any(json.loads(a[-1])["from_step"] > 0 for a in attempts if len(a) == 2)


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_what_is_killed_goes_on_with_the_same_command_and_redoes_nothing(
    command, short, text_file, tmp_path, capsys
):
    """Else a machine that goes down would cost the runs that had ended, or end them with other numbers."""
    more = {"compare": ["--budgets", 150], "sweep": ["lion", "--trials", 4]}[command]
    if command == "sweep":
        pytest.importorskip("optuna")
        short = ["sweep", "--preset", "tiny", "--data", text_file, "--workers", 1, "--out", tmp_path / "c"]
    arguments = [*short, *more]
    process = sophia(*arguments, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (ended := list((tmp_path / "c").glob("runs/*/result.json"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # as if the power had failed: the workers too
    process.communicate(timeout=60)
    before = {path.parent: {f: f.read_bytes() for f in path.parent.iterdir()} for path in ended}
    everything = {"compare": 2, "sweep": 8}[command]
    assert 0 < len(before) < everything, "it was killed on its way"

    cli.main([str(a) for a in arguments])
    said = " ".join(capsys.readouterr().out.split())
    assert "have ended before" in said or "has ended before" in said
    assert len(list((tmp_path / "c").glob("runs/*/result.json"))) == everything
    for folder, files in before.items():
        assert {f: f.read_bytes() for f in folder.iterdir()} == files, "a finished run was touched"

    whole = tmp_path / "whole"
    cli.main([str(whole if a == tmp_path / "c" else a) for a in arguments])
    for path in whole.glob("runs/*/result.json"):
        one, other = (json.loads((f / "runs" / path.parent.name / "result.json").read_text())
                      for f in (whole, tmp_path / "c"))  # fmt: skip
        assert one["loss"] == other["loss"]
    if command == "sweep":
        assert (whole / "trials.jsonl").read_text() == (tmp_path / "c" / "trials.jsonl").read_text()
        assert (whole / "tuned.toml").read_text() == (tmp_path / "c" / "tuned.toml").read_text()


def test_resume_refuses_to_begin(short, tmp_path, capsys):
    """Else a misspelt folder would start hours of work anew."""
    for command in (
        [*short],
        ["sweep", *short[1:5], "--out", tmp_path / "c"],
        ["train", *short[1:5], "--out", tmp_path / "c"],
    ):
        assert code([*command, "--resume"]) == 2
        assert "nothing to resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


BAD = {
    "contender": (["compare", "adam"], "no contender 'adam'"),
    "preset": (["compare", "--preset", "huge"], "no preset 'huge'"),
    "seeds": (["compare", "--seeds", "0"], "--seeds is 0"),
    "workers": (["compare", "--workers", "0"], "--workers is 0"),
    "budget": (["compare", "--budgets", "0"], "protocol.budgets[0] is 0: write a whole number from 1"),
    "data": (["compare", "--data", "nowhere.txt"], "no corpus and no file"),
    "lr without a name": (["compare", "--lr", "1e-3"], "whose value"),
    "lr as a word": (["compare", "--lr", "adamw=high"], "is no float"),
    "lr below zero": (["compare", "--lr", "adamw=-1"], "above 0"),
    "lr of nobody": (["compare", "--lr", "lion=1e-3"], "not in this comparison"),
    "setting": (["compare", "--set", "sophia-g.gama=1"], "no setting 'gama'"),
    "setting as a word": (["compare", "--set", "sophia-g.update_every=often"], "is no int"),
    "device": (["compare", "--device", "abacus"], "Invalid choice"),
    "steps": (["train", "--steps", "0"], "steps is 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_values_are_named_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys, text_file):
    """Else a slip of the finger would end in a traceback, or in a folder that blocks the next attempt."""
    monkeypatch.chdir(tmp_path)
    if "--data" not in arguments:
        arguments = [*arguments, "--data", str(text_file)]
    if "--preset" not in arguments:
        arguments = [*arguments, "--preset", "tiny"]
    assert code(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_the_audit_prints_its_table_and_speaks_through_its_exit_code(tmp_path, capsys, monkeypatch):
    """Else a script could not tell a Sophia from something else, nor a reader why."""
    path = tmp_path / "audit.json"
    cli.main(["audit", "sophia:Sophia", "--json", str(path)])  # 0 is no exit at all
    out = " ".join(capsys.readouterr().out.split())
    assert "sophia:Sophia: Sophia in 4 of 4 right ways" in out
    assert {row["verdict"] for row in json.loads(path.read_text())["findings"]} == {"Sophia"}
    monkeypatch.setattr(audit, "audit", functools.partial(audit.audit, refreshes=50))  # enough to see that
    assert code(["audit", "torch.optim:AdamW"]) == 1
    assert "not Sophia in 4 of 4" in " ".join(capsys.readouterr().out.split())
    assert code(["audit", "nonsense"]) == 2
    assert "Write module:name, for instance" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys):
    """Else a misspelt option would silently be the default."""
    assert code(["compare", "--sedes", "3"]) == 2


def test_texts_that_are_too_short_are_named(tmp_path, capsys):
    """Else a short file would end in an index error."""
    path = tmp_path / "short.txt"
    path.write_text("just a few words\n")
    assert code(["compare", "--preset", "tiny", "--data", path]) == 2
    assert "short.txt is too short" in capsys.readouterr().err


def test_a_folder_with_other_things_is_not_written_into(short, tmp_path, capsys):
    """Else a comparison would mix with somebody's files."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("x")
    assert code(short) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.txt"]


def test_one_run_can_be_trained_and_is_not_repeated(text_file, tmp_path, capsys):
    """Else a single curve would need a whole comparison."""
    arguments = ["train", "--preset", "tiny", "--data", text_file, "--contender", "lion", "--steps", 20]
    arguments += ["--lr", "1e-3", "--set", "beta1=0.8", "--out", tmp_path]
    for _ in range(2):
        cli.main([str(a) for a in arguments])
        assert "lion, 20 steps, seed 1: loss" in capsys.readouterr().out
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    assert config["optimizer"]["settings"]["lr"] == 1e-3
    assert config["optimizer"]["settings"]["beta1"] == 0.8


def test_without_arguments_it_prints_help(capsys):
    """Else a newcomer would not see what there is."""
    assert code([]) == 0
    out = capsys.readouterr().out
    assert "compare" in out
    assert "train" in out
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("torch-sophia ")


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    """Else `pip install torch-sophia && sophia` would end in an import error."""
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "tyro" else find(name))
    assert code(["compare"]) == 1
    assert "pip install 'torch-sophia[lab]'" in capsys.readouterr().err


def test_asking_for_help_loads_no_heavy_package():
    """Else every slip of the finger would cost seconds."""
    script = (
        "import sys, sophia.lab.cli; sys.modules['sophia.lab.cli'].main(['--version']);"
        "print([m for m in ('transformers', 'matplotlib', 'scipy', 'tyro') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_settings_reach_their_contender(text, ids):
    """Else a given learning rate would be another's."""
    protocol = protocol_file.chosen("tiny", None).with_contenders(["sophia-g"])
    over = plan.parse_settings(["adamw=2e-3,sophia-g=1e-3"], ["sophia-g.gamma=0.5"], protocol.row)
    made = plan.make_plan(protocol.with_settings(over), text, ids)
    settings = made.to_json()["settings"]
    assert settings["adamw"]["lr"] == 2e-3
    assert (settings["sophia-g"]["lr"], settings["sophia-g"]["gamma"]) == (1e-3, 0.5)
    assert made.contenders == ("adamw", "sophia-g")  # the baseline joins by itself, and comes first


def test_a_plan_pairs_its_runs(text, ids):
    """Else contenders would differ in more than the optimizer."""
    protocol = protocol_file.chosen("tiny", None).with_contenders(["lion", "adamw"])
    made = plan.make_plan(dataclasses.replace(protocol, seeds=(1, 2, 3)), text, ids)
    assert len(made.runs) == 2 * 2 * 3 == len({run.hash for run in made.runs})
    for steps in made.budgets:
        for seed in protocol.seeds:
            pair = [r for r in made.runs if (r.steps, r.seed) == (steps, seed)]
            assert {r.optimizer.contender for r in pair} == {"adamw", "lion"}
            assert len({(r.model, r.schedule, r.batch, r.data, r.evaluation) for r in pair}) == 1
