"""The texts that a run generates while it trains."""

from pathlib import Path

from ffn.train.loop import train
from tests import tiny


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
