"""The commands: their output, their exit codes, and one line per mistake."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ffn
from ffn import classify
from ffn.cli import main
from ffn.disk import load, load_tokenizer, save
from ffn.files.dataclass_toml import flatten
from ffn.packing.pack import is_packed
from ffn.text.corpus import prepare
from ffn.train.loop import train
from tests import tiny
from tests.classify import samples
from tests.conftest import ROOT
from tests.tiny import outcome, quiet

CLASSIFY = ["classify train", "classify eval", "classify predict", "classify export"]


def words(folder: Path, *more: str) -> list[str]:
    """Return the tiny configuration as command-line words."""
    values = flatten(tiny.config(folder, *more)).items()
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config(tmp_path_factory.mktemp("cli"), "train.sample_prompt=1 ")
    train(config, quiet)
    return Path(config.out)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = samples.config(tmp_path_factory.mktemp("classifier"), "train.epochs=1")
    classify.train(config, quiet)
    return Path(config.out)


def test_train_generate_eval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", str(run), "--prompt", "12 t", "--tokens", "5", "--seed", "1", "--device", "cpu"])
        == 0
    )
    first = capsys.readouterr().out
    assert first.startswith("12 t")
    assert first.endswith("\n")
    main(["generate", str(run), "--prompt", "12 t", "--tokens", "5", "--seed", "1", "--device", "cpu"])
    assert capsys.readouterr().out == first
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model        {run / 'checkpoints' / 'step-000012' / 'model.safetensors'}"
    assert lines[1].endswith("in windows of 16")
    per_token, per_byte = (float(part.split()[0]) for part in lines[2].removeprefix("loss").split(","))
    assert per_token == per_byte


def test_unknown_arguments_raise_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    hint = "; keys are written train.steps=3"
    for command, after in (("train 3 --steps", hint), ("generate a b", ""), ("doctor now", "")):
        with pytest.raises(SystemExit) as stopped:
            main(command.split())
        assert stopped.value.code == 2
        wrong = command.split()[-1]
        assert f"error: unrecognized arguments: {wrong}{after}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate", "eval", "info", "doctor", "classify", *CLASSIFY])
def test_help_says_what_a_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\. (positional arguments|options):", shown), "the help begins with a sentence"
    assert "--device DEVICE" not in shown or "--device DEVICE auto, cpu, cuda" in shown
    assert ("runs/stdlib" in shown) == (command == "train")
    assert ("out=FOLDER" in shown) == (command == "classify train")


def test_generate_passes_its_options_on(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    given: dict[str, object] = {}

    def stream(model, prompt, tokens, **options) -> list[int]:
        given.update(options, prompt=prompt, tokens=tokens)
        return [65, 66]

    monkeypatch.setattr("ffn.cli.stream", stream)
    command = ["generate", str(run), "--device", "cpu", "--prompt", "1 "]
    assert main(command) == 0
    assert capsys.readouterr().out == "1 AB\n"
    usual = {"temperature": 0.8, "top_k": None, "top_p": None, "seed": None}
    assert given == {"prompt": [49, 32], "tokens": 14, **usual}
    options = {"tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.25, "seed": 9}
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    assert main(command) == 0
    assert given == {"prompt": [49, 32], **options}


@pytest.mark.usefixtures("small_is_worth_it")
def test_generate_reads_packed_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[bool] = []

    def stream(model, prompt, tokens, **_) -> Iterator[int]:
        packed.append(is_packed(model.head))
        yield 65

    monkeypatch.setattr("ffn.cli.stream", stream)
    assert main(["generate", str(run), "--device", "cpu", "--prompt", "1 "]) == 0
    assert packed == [True]


def test_eval_makes_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(tmp_path)
    train(config, quiet)
    run = Path(config.out)
    data = run / "data"
    whole = {path: path.read_bytes() for path in data.iterdir()}
    (data / "val.bin").write_bytes(bytes(len(whole[data / "val.bin"])))
    damaged = {path: path.read_bytes() for path in data.iterdir()}
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    remedy = f"ffn train {run / 'config.toml'} out={run}"
    err = capsys.readouterr().err
    assert err.startswith(f"ffn: {data} ")
    assert err.endswith(f": {remedy}\n")
    assert {path: path.read_bytes() for path in data.iterdir()} == damaged
    assert main(remedy.split()[1:]) == 0
    assert {path: path.read_bytes() for path in data.iterdir()} == whole
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    (tmp_path / "text.txt").write_text("another text altogether, " * 100)
    prepare(config.data, run)
    capsys.readouterr()
    assert main(["eval", str(run), "--device", "cpu"]) == 2, "intact, but not the data of this model"
    assert capsys.readouterr().err.startswith(f"ffn: {data} ")


def test_default_prompt_is_how_the_text_begins_if_the_tokenizer_lacks_the_usual_one(
    tmp_path: Path, capsys
) -> None:
    config = tiny.config(tmp_path, "data.tokenizer=char")
    text = tiny.TEXT.replace("\n", "")
    (tmp_path / "text.txt").write_text(text)
    said: list[str] = []
    train(config, said.append)
    line = "prompt       '0', how the training text begins: its tokenizer cannot encode "
    assert f"{line}'def '" in said
    assert (Path(config.out) / "samples.txt").read_text().startswith("--- step 6\n0")
    assert main(["generate", config.out, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0")
    assert err == line + "'\\n'\n"
    assert main(["generate", config.out, "--device", "cpu", "--prompt", "def"]) == 2
    assert capsys.readouterr().err.startswith("ffn: character 'd' (U+0064) at 0 is not one of")


@pytest.mark.parametrize("form", ["run", "file", "words", "checkpoint", "weights"])
def test_info_counts_parameters(form: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-000012"
    arguments = {
        "run": [str(run)],
        "file": [str(run / "config.toml")],
        "words": ["data.tokenizer=tok.json", "model.num_layers=1", "model.dim=16", "model.num_heads=2"],
        "checkpoint": [str(step)],
        "weights": [str(step / "model.safetensors")],
    }
    assert main(["info", *arguments[form]]) == 0
    out = capsys.readouterr().out
    assert "architecture ffn: decoder, 1 layers of 16, swiglu\n" in out
    assert out.startswith("assuming vocab_size=256") == (form == "words")
    assert ("weights      float32, 0.0 MiB in 1 file\n" in out) == (form in ("checkpoint", "weights"))
    assert "feed-forward" in out
    assert "FLOPs per token" in out
    assert f'save="preact" float32 {4 * (16 + 2 * 128):,} bytes' in " ".join(out.split())


@pytest.mark.parametrize("form", ["folder", "config", "shipped"])
def test_info_describes_classifiers(form: str, classifier: Path, capsys) -> None:
    path = {
        "folder": classifier,
        "config": classifier / "config.toml",
        "shipped": ROOT / "configs/classify.toml",
    }
    assert main(["info", str(path[form])]) == 0
    out = capsys.readouterr().out
    layers = "2 layers of 128, gelu" if form == "shipped" else "2 layers of 16, gelu"
    assert f"architecture ffn: encoder, {layers}\n" in out
    assert ("weights      float32" in out) == (form == "folder")


def test_info_takes_the_key_of_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--wrong"])
    key = capsys.readouterr().err.split()[-1]
    assert main(["info", key]) == 0


def test_a_model_of_hugging_face(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """info reads only its config and headers; generate reads its tokenizer.json."""
    folder = tmp_path / "hf"
    model = load(run)
    save(folder, model, format="hf")
    load_tokenizer(run).save(folder / "tokenizer.json")
    assert main(["generate", str(folder), "--device", "cpu", "--prompt", "12 t", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("12 t")
    monkeypatch.setattr("safetensors.safe_open.get_tensor", None, raising=False)
    config = folder / "config.json"
    for path in (folder, config, folder / "model.safetensors"):
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith("architecture llama: decoder, 1 layers of 16, swiglu\n")
        assert ("weights      float32" in out) == (path != config)
        assert f"{model.num_parameters():,}" in out
    for arguments, named in (([str(folder), "model.dim=8"], "model.dim=8"), ([str(tmp_path)], str(tmp_path))):
        assert main(["info", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"ffn: {named}: ")
        assert err.count("\n") == 1
    config.write_text('{"model_type": "nose"}')
    assert main(["info", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ffn: {config}: model_type must be")
    assert err.count("\n") == 1


def test_doctor_names_versions_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    heads = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"python", "ffn", "torch", "device", "precision", "feed-forward", "kernels"} <= set(heads)


def test_doctor_reports_another_distribution_of_the_same_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, conflict in (("torch-ffn", False), ("ffn", True)):
        info = tmp_path / f"{name.replace('-', '_')}-9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")
        (info / "top_level.txt").write_text("ffn\n")
        assert main(["doctor"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("conflict")]
        assert bool(lines) == conflict
        assert all("ffn also installs" in line and "pip uninstall ffn" in line for line in lines)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ffn {ffn.__version__}\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ffn ")
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "train.lr_rate=1"], "train.lr_rate"),
        (["train", "train.steps=1", "a.toml", "b"], "a.toml b"),
        (["train", "lr_rate=1"], "lr_rate"),
        (["train", "model.num_heads=5"], "model.dim"),
        (["train", "absent.toml"], "absent.toml"),
        (["train", "data.path=absent", "out=run"], "data.path"),
        (["train", "device=tpu"], "device"),
        (["train", "train.only=head"], "train.only=head"),
        (["train", "adapter.rank=4"], "adapter is not a key; did you mean train.adapter.rank?"),
        (["generate", "absent", "--prompt", ""], "--prompt must not be empty"),
        (["generate", "absent"], "absent"),
        (["eval", "absent"], "absent"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ffn: {named}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"."):
        main(["--debug", *arguments])


def test_eval_names_the_command_for_classifiers(classifier: Path, capsys) -> None:
    assert main(["eval", str(classifier)]) == 2
    assert capsys.readouterr().err.endswith(f": ffn classify eval {classifier} DATA\n")


@pytest.mark.parametrize("command", ["train", "classify train"])
def test_a_second_base_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--from", "a", "--from", "b"])
    assert stopped.value.code == 2
    assert "--from: must be given once, got a and b\n" in capsys.readouterr().err


def test_interrupt_outside_the_loop_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ffn.cli.train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "ffn: interrupted\n"


def test_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("ffn.cli.train", lambda *_: torch.empty(1 << 55))
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ffn: not enough memory: you tried to allocate {4 << 55} bytes")
    assert err.endswith("; a smaller model, window or batch may fit\n")
    assert err.count("\n") == 1
    monkeypatch.setattr("ffn.cli.train", lambda *_: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["train"])


def test_mistakes_about_a_run_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-000012"
    for arguments, named in (
        (["eval", str(run), "--batch-size", "0"], "batch_size"),
        (["eval", str(step)], str(step)),
        (["generate", str(run), "--prompt", "1" * 40], "prompt"),
        (["generate", str(run), "--seed", str(10**20)], "seed"),
    ):
        assert main([*arguments, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"ffn: {named}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_damaged_checkpoints_are_a_line_each(command: str, run: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-000012" / "state.json").write_text("{}")
    assert main([command, str(copy), "--device", "cpu"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("checkpoint step-000012 ")
    assert all(line.startswith("checkpoint step-0000") for line in lines)


def test_absent_cuda_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", "device=cuda"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ffn: device")
    assert err.count("\n") == 1


def test_a_full_disk_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ffn.disk.write_tensors", full)
    assert main(["train", *words(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "step 4" in err
    assert "No space left on device" in err
    assert err.count("\n") == 1


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    """In a real process, with the output of plain lines without control characters."""
    whole = tiny.config(tmp_path, "train.steps=60", f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    command = [sys.executable, "-m", "ffn", "train", *words(tmp_path, "train.steps=60")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGINT)
            break
    rest, err = process.communicate()
    text = "".join(lines) + rest
    assert (process.returncode, err) == (130, "\nstopping after this step; once more stops at once\n")
    assert rest.endswith("resume       with the same command\n")
    assert all(character.isprintable() or character == "\n" for character in text)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming" in done.stdout
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
