"""Training: configuration, optimizer, the loop and its checkpoints."""

from ffn.train.config import LoopConfig, TrainConfig
from ffn.train.loop import train
from ffn.train.run_folder import read_config

__all__ = ["LoopConfig", "TrainConfig", "read_config", "train"]
