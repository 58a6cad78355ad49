"""ffn: the feed-forward block of the transformer, and a decoder assembled from it.

    tokens -> Embedding -> Block(Norm, Attention, Norm, FeedForward) x L -> Norm -> Head -> loss

The tree, in the order data flows through it:

    activations     one table, one formula x -> (value, slope) a row
    ops             functions on tensors: feed_forward, dropout; the autograd rule; no weights
    nn              modules that hold weights: Embedding, norms, Attention, FeedForward, Block, Head
    transformer     TransformerConfig and Transformer, the sentence above
    packing         pack: faster inference on the CPU from copies of the weights
    generate        sampling with a key/value cache
    tokenizer data  text in, tokens on disk out; batches makes them (B, T)
    optim train     the loop; checkpoint saves it, recipe and config describe it, report shows it
    classify        texts sorted into classes: a head on a model, its training, the folder it leaves
    interop         swap: the block in models written elsewhere; checkpoints and classes of other libraries
    cli             ffn train | generate | eval | classify | info | doctor

The letters of shapes, everywhere: B batch, T time, S keys seen, N = B T tokens, D model width, H hidden
width, O output width, Q query heads, G key/value heads, C head channels, V vocabulary.
"""

from ffn.disk import load, load_tokenizer
from ffn.gpt.generate import generate
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.swap.in_place import swap, unswap
from ffn.nn import FeedForward, gated_hidden_dim
from ffn.ops import feed_forward
from ffn.packing.pack import pack, packing_error, unpack
from ffn.version import __version__ as __version__

__all__ = [
    "FeedForward",
    "Transformer",
    "TransformerConfig",
    "feed_forward",
    "gated_hidden_dim",
    "generate",
    "load",
    "load_tokenizer",
    "pack",
    "packing_error",
    "swap",
    "unpack",
    "unswap",
]


def __dir__() -> list[str]:
    """List the public names; the submodules would hide them."""
    return sorted([*__all__, "__doc__", "__version__"])
