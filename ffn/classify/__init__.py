"""Text classification: train a new or pretrained model with a head, save it in one folder, and predict.

config = read_config(words=["data.path=reviews.csv", "base=MODEL", "train.only=head", "out=runs/reviews"])
train(config)                                       # or: ffn classify train reviews.csv --from MODEL ...
load_classifier("runs/reviews").predict(["a fine film"])        # probabilities (N, K)

config        the configuration
vocabulary    tokenizers made from the training texts
batches       texts to rows of token ids, and rows to batches
objective     losses, predictions and the metrics of each loss
loop          epochs, early stopping, cached features
splits        train, val and test
report        progress lines, pictures, predictions.csv
result        the folder of a trained classifier
training      `train`: from the configuration to the folder
commands      ffn classify train | eval | predict | export
"""

from ffn.classify.config import ClassifyConfig, read_config
from ffn.classify.result import TextClassifier, load_classifier
from ffn.classify.training import train

__all__ = ["ClassifyConfig", "TextClassifier", "load_classifier", "read_config", "train"]
