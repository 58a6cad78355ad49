"""`ffn classify`: its output, its exit codes, and one line for each mistake."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from ffn.classify import load_classifier
from ffn.cli import main
from ffn.train.base import Base, open_base
from tests.classify.samples import WORDS, texts, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    table = write_table(folder / "texts.csv", texts(90))
    words = [*WORDS, "train.epochs=1", f"out={folder / 'run'}"]
    assert main(["classify", "train", str(table), *words]) == 0
    return folder / "run"


def test_train_takes_data_a_config_keys_and_a_base(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "c.toml").write_text("[train]\nonly = 'head'\nepochs = 2\n")
    data, out = str(run.parent / "texts.csv"), tmp_path / "out"
    command = [
        "classify",
        "train",
        data,
        str(tmp_path / "c.toml"),
        "--from",
        str(run),
        f"out={out}",
        "device=cpu",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown
    assert f"predict      ffn classify predict {out} TEXT" in shown
    assert "base = " in (out / "config.toml").read_text()
    run.rename(run.parent / "gone")
    try:
        assert main(["classify", "predict", str(out), "some bread"]) == 0, "the base is no longer needed"
        assert main(["classify", "eval", str(out), data]) == 0
    finally:
        (run.parent / "gone").rename(run)
    capsys.readouterr()
    fast = ["train.only=head", "train.epochs=1", "device=cpu"]
    assert main(["classify", "train", "--from", str(run), data, *fast, f"out={out}2"]) == 0
    assert main(["classify", "train", data, *fast, f"--from={run}", f"out={out}3"]) == 0
    assert "base = " in Path(f"{out}3", "config.toml").read_text()
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"ffn: out={out} already exists")


def test_train_opens_its_base_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(path: str, *arguments) -> Base:
        opened.append(path)
        return open_base(path, *arguments)

    for module in ("config", "training"):
        monkeypatch.setattr(f"ffn.classify.{module}.open_base", counted)
    words = ["train.only=head", "train.epochs=1", "device=cpu", f"out={tmp_path / 'out'}"]
    assert main(["classify", "train", str(run.parent / "texts.csv"), "--from", str(run), *words]) == 0
    assert opened == [str(run)]


def test_predict_prints_json_lines(run: Path, capsys) -> None:
    assert main(["classify", "predict", str(run), "some bread", "wäve"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["some bread", "wäve"]
    found = load_classifier(run).predict(["some bread", "wäve"])
    for line, row in zip(lines, found.tolist(), strict=True):
        assert list(line["probabilities"]) == ["food", "music", "sea"]
        assert list(line["probabilities"].values()) == pytest.approx(row)
        assert line["probability"] == max(line["probabilities"].values())
        assert line["probabilities"][line["label"]] == line["probability"]


def test_a_text_may_be_longer_than_a_file_name(run: Path, capsys) -> None:
    text = "some bread " * 500
    assert main(["classify", "predict", str(run), text]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_predict_prints_a_table(run: Path, capsys) -> None:
    assert main(["classify", "predict", str(run), "some bread\x1b[31m", "--table"]) == 0
    label, share, text = capsys.readouterr().out.rstrip("\n").split(None, 2)
    assert label in ("food", "music", "sea")
    assert 1 / 3 <= float(share) <= 1
    assert text == "some bread\N{REPLACEMENT CHARACTER}[31m"


def test_predict_reads_files_and_standard_input(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["some bread", "a, wave", "drum"]

    def predicted(*arguments: str) -> list[str]:
        assert main(["classify", "predict", str(run), *arguments]) == 0
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    (tmp_path / "t.txt").write_text("\n".join(words) + "\n")
    assert predicted(str(tmp_path / "t.txt")) == words
    write_table(tmp_path / "t.csv", [(word, "?") for word in words])
    assert predicted(str(tmp_path / "t.csv")) == words
    write_table(tmp_path / "r.csv", [(word, "?") for word in words], ("review", "id"))
    assert predicted(str(tmp_path / "r.csv"), "data.text=review") == words
    for arguments in (["-"], ["--device", "cpu", "-"], ["-", "--device", "cpu"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\r\n".join(words)))
        assert predicted(*arguments) == words
    assert predicted("some bread", "--device", "cpu", "a, wave", "-") == ["some bread", "a, wave", "-"]


def test_truncated_texts_are_counted(run: Path, capsys) -> None:
    main(["classify", "predict", str(run), "bread " * 20, "a"])
    assert capsys.readouterr().err == "warning: 1 of 2 texts are truncated to 12 tokens\n"


def test_predict_prints_whole_chunks_before_an_error(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("ffn.classify.commands.AT_ONCE", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n\nc\n"))
    assert main(["classify", "predict", str(run), "-"]) == 2
    shown = capsys.readouterr()
    assert [json.loads(line)["text"] for line in shown.out.splitlines()] == ["a", "b"]
    assert shown.err.endswith("ffn: standard input:3: empty text\n")


def test_predict_prints_the_texts_before_an_error(run: Path, monkeypatch, capsys) -> None:
    for said, mistake in (("a\nb\n\n", "empty text"), ("a\nb\n\udcff\n", "not utf-8")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        assert main(["classify", "predict", str(run), "-"]) == 2
        shown = capsys.readouterr()
        assert [json.loads(line)["text"] for line in shown.out.splitlines()] == ["a", "b"]
        assert shown.err.startswith(f"ffn: standard input:3: {mistake}")


def test_standard_input_is_utf_8_in_any_locale(run: Path, monkeypatch, capsys) -> None:
    for locale in ("utf-8", "ascii"):
        lines = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfwave\r\nw\xc3\xa4ve\n\xff\n"), encoding=locale)
        monkeypatch.setattr(sys, "stdin", lines)
        assert main(["classify", "predict", str(run), "-"]) == 2
        shown = capsys.readouterr()
        assert [json.loads(line)["text"] for line in shown.out.splitlines()] == ["wave", "wäve"]
        assert shown.err.startswith("ffn: standard input:3: not utf-8")


def test_a_text_with_line_ends_is_one_line_of_the_table(run: Path, capsys) -> None:
    assert main(["classify", "predict", str(run), "some\nbread\tand", "a wave", "--table"]) == 0
    assert [line.split(None, 2)[2] for line in capsys.readouterr().out.splitlines()] == [
        "some bread and", "a wave",
    ]  # fmt: skip


def test_eval_prints_a_table_and_writes_predictions(run: Path, tmp_path: Path, capsys) -> None:
    data = write_table(tmp_path / "new.csv", texts(12, seed=3), ("words", "topic"))
    file = tmp_path / "p.csv"
    command = ["classify", "eval", str(run), str(data), "data.text=words", "data.label=topic"]
    assert main([*command, "--predictions", str(file)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("food", "music", "sea", "macro", "accuracy", "true \\ predicted"))
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert f"{right / 12:.4f}" in shown


def test_regression(tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path / "texts.csv", [(text, len(text)) for text, _ in texts(40)])
    words = [*WORDS, "train.loss=mse", "train.epochs=1", f"out={tmp_path / 'run'}"]
    assert main(["classify", "train", str(table), *words]) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["classify", "predict", run, "abc"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["text", "value"]
    assert main(["classify", "predict", run, "abc", "--table"]) == 0
    assert float(capsys.readouterr().out.split()[0])
    assert main(["classify", "eval", run, str(tmp_path / "texts.csv")]) == 0
    assert "mse" in capsys.readouterr().out


def test_transformers_reads_an_export(tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    words = ["data.tokenizer=word", "head.pooling=first", "head.transform=tanh", "train.epochs=1"]
    table = write_table(tmp_path / "texts.csv", texts(60))
    assert main(["classify", "train", str(table), *WORDS, *words, f"out={tmp_path / 'run'}"]) == 0
    out = tmp_path / "hf"
    assert main(["classify", "export", str(tmp_path / "run"), str(out)]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    said = ["some bread", "A wave on the sea, and the storm", "bread " * 20]
    batch = tokenizer(said, return_tensors="pt", padding=True, truncation=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    expected = load_classifier(tmp_path / "run").predict(said)
    assert found.double().tolist() == [pytest.approx(row, abs=1e-6) for row in expected.tolist()]
    assert list(model.config.id2label.values()) == ["food", "music", "sea"]
    capsys.readouterr()
    answers = []
    for folder in (tmp_path / "run", out):
        assert main(["classify", "predict", str(folder), *said]) == 0
        assert main(["classify", "eval", str(folder), str(table)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1], "predict and eval read the export too"
    again = ["train.only=head", "train.epochs=1", "device=cpu", f"out={tmp_path / 'again'}"]
    assert main(["classify", "train", str(table), "--from", str(out), *again]) == 0
    capsys.readouterr()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for there in (out, tmp_path / "run"):
        assert main(["classify", "export", str(tmp_path / "run"), str(there)]) == 2
        assert capsys.readouterr().err.startswith(f"ffn: out={there} already exists")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "a.csv", "b.csv"], "a.csv b.csv: "),
        (["train", "a.csv", "x.toml", "y.toml"], "x.toml y.toml: "),
        (["train", "train.epochs=1"], "data.path "),
        (["train", "/nowhere.csv"], "/nowhere.csv: "),
        (["train", "/nowhere.csv", "epoch=1"], "epoch"),
        (["predict", "/nowhere", "a"], "/nowhere is not the folder of a classifier"),
        (["predict", "RUN", "a", " "], "text:2: empty text"),
        (["predict", "RUN", "a\udcff"], "text:1: not utf-8"),
        (["predict", "RUN", "/nowhere.csv"], "/nowhere.csv: no such file"),
        (["predict", "RUN", "RUN"], "RUN: no such file"),
        (["predict", "RUN", "NEW", "a wave"], "a wave: "),
        (["predict", "RUN", "NEW", "data.text=txt"], "NEW:1: no column 'txt'"),
        (["eval", "RUN", "a=b"], "a"),
        (["eval", "RUN", "NEW", "train.epochs=3"], "train.epochs=3: "),
        (["eval", "RUN", "data.label=x"], "eval needs"),
        (["eval", "RUN", "NEW"], "NEW:3: unknown label 'see'"),
        (["eval", "RUN", "NEW", "--predictions", "NEW"], "--predictions must be"),
        (["eval", "RUN", "NEW", "--predictions", "OUT/p.csv"], "--predictions must be"),
        (["export", "RUN", "OUT"], "bert: the classifier of transformers has pooling='first'"),
    ],
)
def test_mistakes_give_one_line(command: list[str], message: str, run: Path, tmp_path: Path, capsys) -> None:
    new = write_table(tmp_path / "new.csv", [("a", "sea"), ("b", "see")])
    places = {"RUN": str(run), "NEW": str(new), "OUT": str(tmp_path / "out")}
    assert main(["classify", *(places.get(word, word) for word in command)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"ffn: {message.replace('NEW', str(new)).replace('RUN', str(run))}")
    assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]
