"""`sophia pretrain`: token files, one process and several, stops, and the trained model for transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from needs import torch_from
from sophia.lab.data import corpus, token_files, tokens, vocabulary
from sophia.lab.forecast import pretraining
from sophia.lab.protocols import recipe
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint, export_model, processes
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import rows

SHARDS = torch_from("2.7", "fully_shard on a CPU")

RECIPE = """
name = "tiny"
about = "a GPT-2 for tests"
tokens = "own"
vocabulary = "{vocabulary}"
steps = 12
batch = 8
warmup = 3
precision = "{precision}"
evaluations = 2
held_out = 7

[model]
layers = 2
heads = 2
width = 32
context = 16
vocabulary = {size}

[contenders.adamw]
lr = 1e-2

[contenders.sophia-g]
lr = 1e-2
update_every = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, text):
    """A folder with a recipe and the bytes of a text as token files."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "tiny.toml").write_text(RECIPE.format(vocabulary="bytes", precision="float32", size=256))
    token_files.write(folder / "tokens", tokens.as_bytes(text))
    return folder


def planned(place, contender="adamw", **changes):
    found = recipe.find(str(place / "tiny.toml"))
    ids, data = token_files.read(place / "tokens", name="own", vocabulary="bytes", size=256)
    return found.run(contender, data=data, seed=1, device="cpu", **changes), ids


def launch(place, *options, processes=1):
    command = [
        "-m",
        "sophia.lab.cli",
        "pretrain",
        "tiny.toml",
        "--tokens",
        "tokens",
        "--device",
        "cpu",
        *options,
    ]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    several += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [sys.executable, *(several if processes > 1 else []), *command],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("contender", "options", "tolerance"),
    [
        ("adamw", [], 1e-5),
        pytest.param(
            "adamw", ["--layout", "fsdp2", "--micro-batches", "2", "--recompute"], 1e-5, marks=SHARDS
        ),
        # The labels that Sophia draws are each rank's own, so h is another estimate of the same.
        pytest.param("sophia-g", ["--layout", "fsdp2"], 1e-2, marks=SHARDS),
    ],
)
def test_two_processes_train_what_one_trains(place, tmp_path, contender, options, tolerance):
    """A run on eight devices that is another run: rows seen twice, gradients not averaged, or half a loss."""
    out = tmp_path / "several"
    ended = launch(
        place, "--contender", contender, "--out", str(out), "--save-every", "5", *options, processes=2
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("step 10:") == 1  # one process speaks
    assert ended.stdout.count("Forecast: ") == 1
    assert ended.stdout.index("Forecast: ") < ended.stdout.index("step 10:")
    config, ids = planned(place, contender, micro_batches=2 if "2" in options else 1)
    alone = train(config, tmp_path / "alone", ids)
    several = json.loads((out / config.hash / "result.json").read_text())
    assert several["loss"] == pytest.approx(alone["loss"], abs=tolerance)
    assert several["environment"]["processes"] == 2
    for one, two in zip(rows(out / config.hash), rows(tmp_path / "alone" / config.hash), strict=True):
        assert one["kind"] == two["kind"]
        assert one["loss"] == pytest.approx(two["loss"], abs=tolerance)
    model, _ = export_model.trained(out / config.hash)
    with torch.no_grad():
        held_out, _ = ids.held_out(sequences=7, context=16)
        loss = float(model(input_ids=held_out, labels=held_out).loss)
    assert loss == pytest.approx(several["loss"], abs=1e-5)
    left = {p.name for p in (out / config.hash).glob("shards-*")}
    named = {s["shards"] for s in checkpoint.readable(out / config.hash) if "shards" in s}
    assert left == named  # older shards are gone


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp2", marks=SHARDS)])
def test_a_run_of_several_goes_on_where_it_was(place, tmp_path, layout):
    """A lost run: shards that cannot be read again, or copies that go on from different weights."""
    out = tmp_path / "out"
    options = ["--contender", "sophia-g", "--out", str(out), "--layout", layout, "--save-every", "4"]
    straight = launch(place, *options, processes=2)
    assert straight.returncode == 0, straight.stderr[-2000:]
    config, _ = planned(place, "sophia-g")
    folder = out / config.hash
    whole = json.loads((folder / "result.json").read_text())
    logged = [{k: v for k, v in r.items() if "seconds" not in k} for r in rows(folder)]
    (folder / "result.json").unlink()
    (folder / "checkpoint-previous.pt").replace(folder / "checkpoint.pt")  # as if killed after step 8
    resumed = launch(place, *options, processes=2)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    again = json.loads((folder / "result.json").read_text())
    assert again["loss"] == whole["loss"]
    assert [{k: v for k, v in r.items() if "seconds" not in k} for r in rows(folder)] == logged
    starts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [s["from_step"] for s in starts] == [0, 8]


def test_shards_on_a_cpu_are_refused_where_torch_cannot(monkeypatch):
    """An error deep inside torch, about a stream, in every process of a run."""
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    layout = object.__new__(processes.Shards)
    with pytest.raises(LabError, match=r"fully_shard of torch 2.6.0.* runs on GPUs alone.*--layout ddp"):
        layout.place(torch.nn.Linear(1, 1), torch.device("cpu"), precision="float32")


def test_bfloat16_computes_in_it_and_keeps_weights_in_float32(place, tmp_path):
    """A precision in the recipe that nothing follows; or weights rounded to eight bits of mantissa."""
    config, ids = planned(place)
    import dataclasses

    half = dataclasses.replace(config, precision="bfloat16")
    ends = [train(c, tmp_path, ids, keep=True)["loss"] for c in (config, half)]
    assert ends[0] != ends[1]
    assert ends[0] == pytest.approx(ends[1], abs=0.05)
    state = checkpoint.load(tmp_path / half.hash)
    assert {t.dtype for t in state["model"].values()} == {torch.float32}
    assert "precision" not in json.loads((tmp_path / config.hash / "config.json").read_text())


def test_token_files_are_read_back_and_named_by_their_content(tmp_path):
    """Two texts under one name, or a text read with another vocabulary."""
    draw = np.random.default_rng(1)
    made = tokens.Tokens(*(draw.integers(0, 50, n).astype(np.uint16) for n in (5000, 700)))
    token_files.write(tmp_path / "a", made)
    ids, data = token_files.read(tmp_path / "a", name="mine", vocabulary="gpt2", size=50)
    assert (ids.train == made.train).all()
    assert (ids.validation == made.validation).all()
    assert (data.corpus, data.vocabulary) == ("mine", "gpt2")
    assert ids.held_out(sequences=2, context=8)[1] == 0  # bytes are not known
    assert tokens.bits_per_byte(1.0, predictions=14, bytes_=0) is None
    made.train[2500] = 49 - made.train[2500]
    token_files.write(tmp_path / "b", made)
    assert token_files.read(tmp_path / "b", name="mine", vocabulary="gpt2", size=50)[1].text != data.text
    with pytest.raises(UsageError, match=r"holds the token 49, but the model has 40"):
        token_files.read(tmp_path / "a", name="mine", vocabulary="gpt2", size=40)
    (tmp_path / "a" / "val.bin").write_bytes(b"abc")
    with pytest.raises(UsageError, match=r"val.bin is no file of 16-bit tokens"):
        token_files.read(tmp_path / "a", name="mine", vocabulary="gpt2", size=50)


def test_the_time_of_the_rest_is_said_once_from_its_own_steps(place):
    """Else a run of weeks would begin without a word of it, or count the seconds that fill caches."""
    run, _ = planned(place, steps=100)
    now = [0.0]
    pacer = pretraining.Pacer(run, clock=lambda: now[0])
    said = []
    for step, seconds in ((40, 500.0), (50, 520.0), (60, 900.0), (100, 1000.0)):  # it went on from 30
        now[0] = seconds
        said.append(pacer.row(step))
    assert said == [
        None,
        "Forecast: about 1 min 40 s for the other 50 steps, checkpoints not counted; 2.0 s a step, measured "
        "over steps 41 to 50.",
        None,
        None,
    ]
    short = pretraining.Pacer(run, clock=lambda: now[0])
    assert (short.row(90), short.row(100)) == (None, None)  # nothing is left


@pytest.mark.parametrize("contender", ["adamw", "sophia-g"])
def test_the_disk_that_is_foretold_is_what_the_run_leaves(place, tmp_path, contender, monkeypatch):
    """Else a run of days would end on a full disk that the forecast had room on."""
    run, ids = planned(place, contender)
    for save_every in (5, 100):
        out = tmp_path / str(save_every)
        foretold = pretraining.disk(run, save_every)
        train(run, out, ids, save_every=save_every, keep=True)
        files = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert foretold == pytest.approx(files, rel=0.1)
    how = {"devices": 2, "sharded": False, "recompute": False, "save_every": 5}
    assert "That is more" not in pretraining.needs(run, tmp_path / "not" / "there", **how)
    monkeypatch.setattr(pretraining.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "1.0 kB are free. That is more than there is." in pretraining.needs(run, tmp_path, **how)


def test_a_batch_that_cannot_be_shared_is_refused(place, tmp_path):
    """Tokens that weigh unequally, on some processes only."""
    config, ids = planned(place)

    class Three(type(train.__globals__["Solo"]())):
        size = 3

    with pytest.raises(UsageError, match="cannot be cut into 1 equal parts on each of 3 processes"):
        train(config, tmp_path, ids, team=Three())


def test_an_exported_run_says_the_same_in_transformers(tmp_path, text, ids):
    """Weights under other names, or a tokenizer that cuts the text in other places than training did."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(vocabulary=vocabulary.SHA256, precision="float32", size=vocabulary.SIZE))
    token_files.write(tmp_path / "tokens", ids)
    _, data = token_files.read(
        tmp_path / "tokens", name="own", vocabulary=vocabulary.SHA256, size=vocabulary.SIZE
    )
    config = recipe.find(str(path)).run("adamw", data=data, seed=1, device="cpu")
    stop = Request()
    stop.signal = 15
    with pytest.raises(Stopped):
        train(config, tmp_path, ids, stop=stop)
    with pytest.raises(UsageError, match="has weights of step 1, and its run has 12"):
        export_model.export(tmp_path / config.hash, tmp_path / "exported")
    train(config, tmp_path, ids, keep=True)
    out = export_model.export(tmp_path / config.hash, tmp_path / "exported")
    sentence = corpus.load(str(path)).train[0][:40]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(sentence)["input_ids"] == vocabulary.tokenizer().encode(sentence).ids
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    x, _ = ids.held_out(sequences=2, context=16)
    model, _ = export_model.trained(tmp_path / config.hash)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(out)(input_ids=x).logits
        torch.testing.assert_close(again, model(input_ids=x).logits)
