"""Two of transformers' feed-forward blocks with less kept for backward: its signatures, attributes and keys.

    modeling_llama.LlamaMLP = ffn.interop.hf.LlamaMLP            before the model is built

Their activations and GPT-2's Conv1D are transformers' own classes, imported when a block is built: adapters,
initialisers and pruning know a Conv1D by its class, and would pass over a copy of it. While the children are
plain, with an activation of the table, their weights go to the op; otherwise the children are called.
"""

from torch import Tensor, nn

from ffn.interop.swap.plain_modules import drop, fused


class LlamaMLP(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)), D + 2 H elements a token kept. Mistral's and Qwen2's too.

    Args:
        config: has hidden_size D, intermediate_size H, hidden_act (a name that transformers knows) and
            mlp_bias (False if it has none).

    Shape:
        x (..., D) -> (..., D), in the weights' dtype and device (or under autocast).

    Raises:
        ImportError: transformers is not installed.

    Source: transformers 5, `models/llama/modeling_llama.py`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_size, self.intermediate_size = D, H = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(D, H, bias=bias)
        self.up_proj = nn.Linear(D, H, bias=bias)
        self.down_proj = nn.Linear(H, D, bias=bias)
        self.act_fn = _activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        y = fused(x, self.act_fn, self.up_proj, self.down_proj, self.gate_proj)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) if y is None else y


class GPT2MLP(nn.Module):
    """dropout(c_proj(act(c_fc(x)))), D + H elements a token kept; the weights are (in, out).

    Args:
        intermediate_size: width H.
        config: has hidden_size D, activation_function (a name that transformers knows) and resid_pdrop.

    Shape:
        hidden_states (..., D) -> (..., D), in the weights' dtype and device (or under autocast).

    Raises:
        ImportError: transformers is not installed.

    Source: transformers 5, `models/gpt2/modeling_gpt2.py`.
    """

    def __init__(self, intermediate_size: int, config):
        super().__init__()
        act = _activation(config.activation_function)
        from transformers.pytorch_utils import Conv1D

        self.c_fc = Conv1D(intermediate_size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, intermediate_size)
        self.act = act
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = fused(hidden_states, self.act, self.c_fc, self.c_proj)
        if y is None:
            y = self.c_proj(self.act(self.c_fc(hidden_states)))
        return drop(y, self.dropout)


def _activation(name: str) -> nn.Module:
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        raise ImportError(
            "this block is built of transformers' own parts: pip install transformers"
        ) from None
    return ACT2FN[name]
