"""The texts that a run generates while it trains."""

from pathlib import Path

import pytest
import torch

from ffn.packing.pack import is_packed
from ffn.text.corpus import prepare
from ffn.train.loop import Trainer, train
from tests import tiny


@pytest.mark.usefixtures("small_is_worth_it")
def test_samples_come_from_packed_weights_and_leave_the_model_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def generate(model, prompts, tokens, **_) -> list[list[int]]:
        packed.append(is_packed(model.head))
        return [[65] * tokens]

    monkeypatch.setattr("ffn.train.loop.generate", generate)
    config = tiny.config(tmp_path)
    corpus = prepare(config.data, Path(config.out))
    trainer = Trainer(config, None, corpus, torch.device("cpu"), "float32", lambda _: None)
    trainer._sample()
    assert packed == [True]
    assert not any(map(is_packed, trainer.model.modules()))


def test_a_prompt_longer_than_the_window_is_cut(tmp_path: Path) -> None:
    said: list[str] = []
    prompt = "a text that is longer than the window"
    config = tiny.config(tmp_path, f"train.sample_prompt={prompt}")
    train(config, said.append)
    read = prompt[: tiny.MODEL.max_seq_len - 1]
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert f"--- step 6\n{read}" in samples
    assert prompt not in samples
    assert f"prompt       {read!r}, what the window has room for of train.sample_prompt" in said
