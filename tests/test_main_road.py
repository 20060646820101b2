"""calibrate → export → inspect → check → run on the command line, and every bad input a user can give it."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import transformers

from kvcc.cli import main
from tests.saved import CONTEXT, save_tiny_llama
from tests.test_signing import write_keys

Call = Callable[..., tuple[int, str, str]]
RECIPE = """\
name: small
windows: {sinks: 2, recent: 8, page: 16}
passes:
  - fold-values: {}
  - think: {keep_ratio: 0.75, score: centred}
  - kivi: {k_bits: 4, v_bits: 4, group_size: 16}
"""
CHECK = (
    "--texts",
    "2",
    "--length",
    "200",
    "--context",
    "120",
    "--retrieval",
    "60",
    "--retrieval-tasks",
    "1",
    "--greedy",
    "8",
)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """`kvcc` with these arguments, in this process: exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvcc", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, a recipe and an artifact, made by the commands."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(RECIPE)
    for arguments in (
        [
            "calibrate",
            model,
            "--data",
            "prose,code",
            "--samples",
            4,
            "--length",
            128,
            "-o",
            folder / "profile",
        ],
        ["export", model, "-p", folder / "profile", "-r", folder / "small.yaml", "-o", folder / "model.kvcc"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kvcc", *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                main()
            assert left.value.code == 0
    return folder


def test_export_explains_and_counts(call: Call, model: Path, made: Path, tmp_path: Path) -> None:
    arguments = ["export", model, "-p", made / "profile", "-r", made / "small.yaml", "-o"]
    status, shown, _ = call(*arguments, tmp_path / "a.kvcc", "--explain")
    assert status == 0
    for text in (
        "fold-values",
        "think",
        "kivi",
        "layer 1: K keeps 12 of 16 channels",
        "bytes per token",
        "smaller than an fp16",
    ):
        assert text in shown
    status, shown, _ = call(*arguments, tmp_path / "b.kvcc", "--json")
    summary = json.loads(shown)
    # 2 layers, 2 heads, 16 tokens a page: K 12 channels x (8 code bytes + 2 metadata of 2 bytes), V 16 x (8 + 4)
    assert summary["bytes_per_token"] == sum(2 * (12 * 8 + 2 * 32 + 16 * 8 + 2 * 32) / 16 for _ in range(2))
    assert summary["fp16_bytes_per_token"] == 2 * 2 * 2 * 32
    same = [(tmp_path / name / "plan.json").read_bytes() for name in ("a.kvcc", "b.kvcc")]
    assert same[0] == same[1]


def test_inspect(call: Call, made: Path) -> None:
    status, shown, _ = call("inspect", made / "model.kvcc", "--verify")
    assert status == 0
    for text in ("verified", "small", "reference kernels", "accuracy: not measured"):
        assert text in shown
    status, shown, _ = call("inspect", made / "model.kvcc", "--json")
    layer = json.loads(shown)["layers"][0]
    assert layer["page"] == 16
    assert layer["stored"] == "K 12 ch x 4 bit; V 16 ch x 4 bit"


def test_check_gates_decide_the_exit_status(call: Call, model: Path, made: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(made / "model.kvcc", tmp_path / "m.kvcc")
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "kl: 5\ntop1: 0.0\nbytes_per_token_max: 1e6\nneedle_drop_points: 100\ngreedy_agreement: 0\n"
    )
    key = write_keys(tmp_path, "ours")[0]
    assert call("sign", artifact, "--key", key)[0] == 0
    report, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    arguments = ["check", artifact, "--against", model, *CHECK, "--gates", gates, "--junit", report]
    status, shown, error = call(*arguments, "--markdown", summary, "--store")
    assert status == 0, error
    assert "sign it again" in error
    assert not (artifact / "signature.json").exists()
    assert "gates" in shown
    assert "all gates hold" in summary.read_text()
    suite = ElementTree.fromstring(report.read_text())
    assert suite.get("failures") == "0"
    assert suite.get("tests") == "6"  # five gates and the default one on cache bytes
    assert json.loads((artifact / "accuracy.json").read_text())["passed"]
    assert "accuracy on held-out prose" in call("inspect", artifact, "--verify")[1]
    assert "<svg" in (artifact / "report.html").read_text()

    gates.write_text("kl: 0\n")
    status, shown, _ = call(*arguments)
    assert status == 1
    assert "FAIL" in shown
    failed = ElementTree.fromstring(report.read_text()).find("testcase[@name='kl']/failure")
    assert failed is not None

    status, shown, _ = call(*arguments, "--json")
    verdict = json.loads(shown)
    assert status == 1
    assert verdict["texts"][0]["overall"]["kl"] > 0
    assert verdict["texts"][0]["cache_bytes"] == verdict["texts"][0]["formula_bytes"]


def test_the_exact_recipe_loses_nothing(call: Call, model: Path, tmp_path: Path) -> None:
    assert call("export", model, "-r", "exact", "-o", tmp_path / "e.kvcc")[0] == 0
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "kl: 1e-6\ntop1: 1.0\nppl_increase_percent: 0.001\ngreedy_agreement: 1.0\nneedle_drop_points: 0\n"
    )
    status, shown, error = call("check", tmp_path / "e.kvcc", "--against", model, *CHECK, "--gates", gates)
    assert status == 0, shown + error


def test_run_streams_and_reports(call: Call, made: Path, tmp_path: Path) -> None:
    artifact, prompt = made / "model.kvcc", tmp_path / "prompt.txt"
    prompt.write_text("Hello there")
    status, shown, error = call("run", artifact, "-p", f"@{prompt}", "-n", 5, "--json")
    first = json.loads(shown)
    assert status == 0
    # the chat template adds its markers around the 11 bytes
    assert first["prompt_tokens"] == len("<|user|>Hello there\n<|assistant|>")
    assert (
        call("run", artifact, "-p", "Hello there", "-n", 5, "--raw", "--json")[1].count('"prompt_tokens": 11')
        == 1
    )
    status, shown, error = call("run", artifact, "-p", "Hello there", "-n", 5)
    assert shown.rstrip("\n") == first["text"].rstrip("\n")
    assert "tokens/s" in error
    assert "fp16" in error


BAD = {
    "missing model": (
        ["calibrate", "absent-folder/model", "--data", "prose", "-o", "{new}"],
        "absent-folder/model",
    ),
    "unreadable GGUF": (["calibrate", "{gguf}", "--data", "prose", "-o", "{new}"], "garbage.gguf"),
    "encoder": (["calibrate", "{encoder}", "--data", "prose", "-o", "{new}"], "bert"),
    "text-free data": (["calibrate", "{model}", "--data", "{blank}", "-o", "{new}"], "blank.txt"),
    "binary data": (["calibrate", "{model}", "--data", "{binary}", "-o", "{new}"], "binary.txt"),
    "unknown data": (["calibrate", "{model}", "--data", "poetry", "-o", "{new}"], "prose"),
    "length over context": (
        ["calibrate", "{model}", "--length", "4096", "--data", "prose", "-o", "{new}"],
        "2048",
    ),
    "recipe typo": (["export", "{model}", "-r", "kivvi-4", "-o", "{new}"], "kivi-4"),
    "group does not divide": (
        ["export", "{model}", "-r", "{group}", "-o", "{new}"],
        "layer 0: group_size 24",
    ),
    "no profile": (["export", "{model}", "-r", "think-40", "-o", "{new}"], "needs calibration statistics"),
    "missing profile": (["export", "{model}", "-r", "think-40", "-p", "absent", "-o", "{new}"], "absent"),
    "profile of another model": (
        ["export", "{other}", "-r", "think-40", "-p", "{profile}", "-o", "{new}"],
        "profile was taken on",
    ),
    "existing artifact": (["export", "{model}", "-r", "exact", "-o", "{artifact}"], "model.kvcc"),
    "missing artifact": (["run", "absent.kvcc", "-p", "x"], "absent.kvcc"),
    "truncated weights": (["run", "{truncated}", "-p", "x"], "weights.safetensors"),
    "altered weights": (["run", "{altered}", "-p", "x"], "weights.safetensors"),
    "altered weights, inspect": (["inspect", "{altered}", "--verify"], "weights.safetensors"),
    "another schema": (["inspect", "{schema}"], "schema"),
    "prompt longer than the context": (
        ["run", "{artifact}", "--raw", "-p", "x" * (CONTEXT + 1)],
        "context of 2048",
    ),
    "empty prompt": (["run", "{artifact}", "-p", " "], "empty"),
    "missing prompt file": (["run", "{artifact}", "-p", "@absent.txt"], "absent.txt"),
    "unknown backend": (["run", "{artifact}", "-p", "x", "--backend", "magic"], "magic"),
    "no GPU": (["run", "{artifact}", "-p", "x", "--backend", "triton"], "triton"),
    "gate typo": (["check", "{artifact}", "--against", "{model}", "--gates", "{gates}"], "perplexity"),
    "check against another model": (["check", "{artifact}", "--against", "{other}"], "not from"),
    "bad temperature": (["run", "{artifact}", "-p", "x", "--temperature", "-1"], "temperature"),
    "unknown option": (["run", "{artifact}", "--fast"], "--fast"),
    "unknown command": (["compress"], "compress"),
}


@pytest.fixture(scope="module")
def inputs(model: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every file and folder that BAD names."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "garbage.gguf").write_bytes(b"GGUF" + bytes(200))
    (folder / "blank.txt").write_text(" \n\n\t\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "group.yaml").write_text("passes:\n  - kivi: {group_size: 24}\n")
    (folder / "gates.yaml").write_text("perplexity: 1\n")
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(folder / "encoder")
    save_tiny_llama(folder / "other", layers=3)
    found = {
        "model": model,
        "artifact": made / "model.kvcc",
        "profile": made / "profile",
        "new": folder / "new",
    }
    found |= {"gguf": folder / "garbage.gguf", "other": folder / "other", "encoder": folder / "encoder"}
    found |= {name: folder / f"{name}.txt" for name in ("blank", "binary")}
    found |= {name: folder / f"{name}.yaml" for name in ("group", "gates")}
    for name in ("truncated", "altered", "schema"):
        found[name] = shutil.copytree(made / "model.kvcc", folder / f"{name}.kvcc")
    weights = found["truncated"] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = found["altered"] / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    manifest = found["schema"] / "manifest.json"
    data = json.loads(manifest.read_text())
    data["schema_version"] = 2
    manifest.write_text(json.dumps(data))
    return found


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, call: Call, inputs: dict[str, Path]) -> None:
    arguments, names = BAD[case]
    status, shown, error = call(*(a.format(**inputs) for a in arguments))
    assert status == 2, (shown, error)
    assert "Traceback" not in error
    assert names in error
    lines = [line for line in error.splitlines() if line.strip()]
    assert sum("kvcc: " in line or line.startswith("Error") for line in lines) == 1
    if case not in ("unknown command", "unknown option", "unknown backend"):  # click adds its usage
        assert lines[-1].startswith("kvcc: ")
    assert not inputs["new"].exists()


def test_a_batch_too_large_for_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcc.errors import CapacityError
    from kvcc.runtime import cache, load

    model = load(made / "model.kvcc")

    class Little:
        available = 100_000

    monkeypatch.setattr(cache.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(CapacityError, match=r"memory has 0\.1 MiB left; use a smaller batch"):
        model.generate([[5] * 50] * 64, max_tokens=4)
    # On a GPU it is the GPU's, with what torch holds there and does not use.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert cache._available(torch.device("cuda", 1)) == 1200


def test_a_full_disk_is_one_error(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real = os.fsync

    def full(fd: int) -> None:
        real(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, error = call("export", model, "-r", "exact", "-o", tmp_path / "full.kvcc")
    assert status == 2
    assert "No space left on device" in error
    assert list(tmp_path.iterdir()) == []


def test_stop_strings_and_streaming_agree(made: Path) -> None:
    from kvcc.errors import DataError
    from kvcc.runtime import load

    model = load(made / "model.kvcc")
    whole = model.generate(["Once upon"], max_tokens=40, ignore_eos=True)[0].text
    pieces = "".join(p.text for p in model.stream(["Once upon"], max_tokens=40, ignore_eos=True))
    assert pieces == whole
    stop = whole[10:13]
    cut = model.generate(["Once upon"], max_tokens=40, ignore_eos=True, stop=[stop])[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish == "stop"
    assert model.generate(["Once upon"], max_tokens=40, ignore_eos=True, stop=stop)[0] == cut
    without = dataclasses.replace(model, tokenizer=None)
    assert without.generate([[7] * 5], max_tokens=2, ignore_eos=True)[0].finish == "length"
    with pytest.raises(DataError, match="no stop strings"):
        without.generate([[7] * 5], max_tokens=2, stop=[stop])


def test_half_precision_models_compile(call: Call, model: Path, tmp_path: Path) -> None:
    from kvcc.runtime import load

    for dtype in ("bfloat16", "float16"):
        path = tmp_path / f"{dtype}.kvcc"
        assert call("export", model, "-r", "exact", "--dtype", dtype, "-o", path)[0] == 0
        found = load(path)
        assert found.plan.dtype == dtype
        assert found.plan.bytes_per_token() == found.plan.uncompressed_bytes_per_token()
        with torch.inference_mode():
            logits = found.forward([[7] * 120], found.new_cache(1))
        assert logits.isfinite().all()


def test_a_sequence_ends_where_the_context_does(made: Path) -> None:
    from kvcc.runtime import load

    model = load(made / "model.kvcc")
    ended, short = model.generate([[7] * (CONTEXT - 3), [7] * 5], max_tokens=6, ignore_eos=True)
    assert (len(ended.tokens), ended.finish) == (3, "length")
    assert (len(short.tokens), short.finish) == (6, "length")
