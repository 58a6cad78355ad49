"""Jobs give configurations; transformers' classifier gives our logits from the same weights."""

from pathlib import Path

import pytest
import torch

from benchmarks import classification
from ffn.classify.vocabulary import train_tokenizer
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.folder import save_folder
from ffn.text.tokenizer import HFTokenizer
from tests.classify.samples import texts

BERT = TransformerConfig(
    vocab_size=60, dim=16, num_layers=2, num_heads=2, hidden_dim=24, max_seq_len=512, causal=False,
    head="none", norm="layernorm", norm_position="post", norm_eps=1e-12, activation="gelu", bias=True,
    attention_bias=True, position="learned", embedding_norm=True, num_token_types=2,
)  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> dict:
    """Reviews of two topics and titles, and a tiny encoder of Hugging Face."""
    pytest.importorskip("tokenizers")
    rows = texts(80, 2)
    for suffix, name in (("pos", "food"), ("neg", "sea")):
        lines = "".join(f"{text}\n" for text, label in rows if label == name)
        (tmp_path / f"rt-polarity.{suffix}").write_text(lines)
    titles = "".join(f"{text}\t{label}\n" for text, label in texts(150))
    (tmp_path / "thucnews-dev.txt").write_text(titles)
    tokenizer = train_tokenizer("word", [text for text, _ in rows], 60)
    assert isinstance(tokenizer, HFTokenizer)
    save_folder(tmp_path / "base", Transformer(BERT), tokenizer=tokenizer)
    paths = {"data": str(tmp_path), "base": str(tmp_path / "base"), "out": str(tmp_path / "run")}
    return {"task": "reviews", "implementation": "ffn", "what": "head", **paths, "rows": 0, "epochs": 1}


@pytest.mark.parametrize(("task", "name", "what"), classification.JOBS)
def test_every_job_makes_a_configuration(task: str, name: str, what: str, job: dict) -> None:
    config, splits = classification.splits_of({**job, "task": task, "implementation": name, "what": what})
    assert config.train.epochs == 1
    assert len(splits.objective.classes) == (2 if task == "reviews" else 3)


@pytest.mark.parametrize("what", ["head", "all"])
def test_both_implementations_train_the_same_number_of_parameters(what: str, job: dict) -> None:
    pytest.importorskip("transformers")
    ours = classification.run_ffn({**job, "what": what})
    theirs = classification.run_transformers({**job, "what": what})
    for key in ("parameters", "trained", "epochs"):
        assert ours[key] == theirs[key]
    assert set(theirs) <= {*classification.COLUMNS}


def test_both_classifiers_give_the_same_logits(job: dict) -> None:
    pytest.importorskip("transformers")
    from benchmarks.finetune import TheirClassifier

    theirs = TheirClassifier(job["base"], 2, "ffn", 0.1).eval()
    ours = classification._our_classifier(job["base"], "ffn").eval()
    with torch.no_grad():
        ours.head.out_proj.weight.copy_(theirs.head[1].weight)
    tokens = torch.randint(60, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    torch.testing.assert_close(ours(tokens, attention_mask=mask), theirs(tokens, mask), rtol=1e-5, atol=1e-6)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_ffn_saves_less_for_backward(job: dict) -> None:
    pytest.importorskip("transformers")
    rows = [
        classification.run_memory({**job, "implementation": name, "what": "ffn memory"})
        for name in ("ffn", "transformers")
    ]
    assert 0 < rows[0]["kept_MB"] < rows[1]["kept_MB"]


def test_tf_idf_separates_two_topics(job: dict) -> None:
    pytest.importorskip("sklearn")
    assert classification.run_sklearn({**job, "what": "TF-IDF of words"})["accuracy"] > 0.8
