"""Text classification: a pretrained model or a new one, a head on it, training, and the folder it leaves.

config = read_config(words=["data.path=reviews.csv", "base=MODEL", "train.only=head", "out=runs/reviews"])
train(config)                                       # or: ffn classify train reviews.csv --from MODEL ...
load_classifier("runs/reviews").predict(["a fine film"])        # probabilities (N, K)

config        the configuration
vocabulary    tokenizers made from the training texts
batches       texts to token rows, and rows to batches
objective     losses, predictions, metrics
loop          epochs, the best of them, cached features
splits        train, validation and test
report        progress, pictures, predictions.csv
result        the folder
training      all of it, in order
commands      ffn classify train | eval | predict | export
"""

from ffn.classify.config import ClassifyConfig, read_config
from ffn.classify.result import TextClassifier, load_classifier
from ffn.classify.training import train

__all__ = ["ClassifyConfig", "TextClassifier", "load_classifier", "read_config", "train"]
