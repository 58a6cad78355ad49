"""ffn: the feed-forward block of the transformer, and a decoder assembled from it.

    tokens -> Embedding -> Block(Norm, Attention, Norm, FeedForward) x L -> Norm -> Head -> loss

The package, in the order data flows through it:

    activations     the table of activations: one formula x -> (value, slope) per row
    files           files that are whole or absent: atomic writes, safetensors, strict JSON, TOML
    ops             functions on tensors without weights: feed_forward, its autograd rule, dropout, attention
    nn              modules that hold weights: Embedding, norms, Attention, FeedForward, Block, Head
    packing         pack: faster inference on the CPU from copies of the weights
    gpt             TransformerConfig, RotaryConfig and Transformer; generation, cost, freezing, adapters
    text            tokenizers, tokens on disk, batches (B, T)
    interop         swap, from_module: the block in other libraries' models; their checkpoints
    disk            load, save and inspect a model
    train           ffn train: configuration, optimizer, loop, checkpoints, exact resume
    classify        ffn classify: a head on a model, its training and the folder of results
    cli             ffn train | generate | eval | classify | info | doctor

Letters in shapes: B batch, T time, S keys seen, N = B T tokens, D model width, H hidden width, O output
width, Q query heads, G key/value heads, C head channels, V vocabulary.
"""

from ffn.disk import load, load_tokenizer, save
from ffn.gpt.config import RotaryConfig
from ffn.gpt.generate import generate
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.swap.from_module import from_module
from ffn.interop.swap.in_place import swap, unswap
from ffn.nn import FeedForward, gated_hidden_dim
from ffn.ops.feed_forward import feed_forward
from ffn.packing.pack import pack, packing_error, unpack
from ffn.version import __version__ as __version__

__all__ = [
    "FeedForward",
    "RotaryConfig",
    "Transformer",
    "TransformerConfig",
    "feed_forward",
    "from_module",
    "gated_hidden_dim",
    "generate",
    "load",
    "load_tokenizer",
    "pack",
    "packing_error",
    "save",
    "swap",
    "unpack",
    "unswap",
]


def __dir__() -> list[str]:
    """List the public names, without the submodules."""
    return sorted([*__all__, "__doc__", "__version__"])
