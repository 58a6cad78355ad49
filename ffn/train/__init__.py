"""Training: configuration, optimizer, the loop and its checkpoints."""

from ffn.train.config import LoopConfig, TrainConfig, read_config
from ffn.train.loop import train

__all__ = ["LoopConfig", "TrainConfig", "read_config", "train"]
