"""Tokens a second at batch 1: GPT-2 small's sizes, random weights, a prompt of 32, 128 new tokens, greedy.

python -m benchmarks generation
python -m benchmarks generation --dtypes float32 --rounds 2 --new-tokens 16

Beside ffn's generate: transformers' GPT-2 with its cache, and the plain GPT without one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.baseline import GPT
from benchmarks.report import arguments, publish
from benchmarks.timing import measure, quartiles, speedup

VOCAB, DIM, LAYERS, HEADS, WINDOW = 50257, 768, 12, 12, 1024
COLUMNS = ["dtype", "implementation", "parameters", "tokens_per_s", "q1", "q3", "speedup", "low", "high"]
Run = Callable[[], int]  # generates once and returns how many tokens came out
Built = tuple[nn.Module, Run]


def build_transformers(dtype: torch.dtype, prompt: Tensor, new_tokens: int) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=DIM, n_layer=LAYERS, n_head=HEADS, n_positions=WINDOW)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    mask = torch.ones_like(prompt)

    def run() -> int:
        out = model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=VOCAB - 1,
        )
        return out.shape[1] - prompt.shape[1]

    return model, run


def build_ffn(dtype: torch.dtype, prompt: Tensor, new_tokens: int) -> Built:
    from ffn import Transformer, TransformerConfig
    from ffn.generate import generate

    config = TransformerConfig(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        hidden_dim=4 * DIM,
        max_seq_len=WINDOW,
        activation="gelu_tanh",
        bias=True,
        attention_bias=True,
        position="learned",
        norm="layernorm",
    )
    model = Transformer(config).to(dtype).eval()
    prompts = prompt.tolist()
    return model, lambda: len(generate(model, prompts, new_tokens, temperature=0.0)[0])


def build_torch(dtype: torch.dtype, prompt: Tensor, new_tokens: int) -> Built:
    model = GPT(VOCAB, DIM, LAYERS, HEADS, WINDOW).to(dtype).eval()
    return model, lambda: model.generate(prompt, new_tokens, cache=False).shape[1] - prompt.shape[1]


IMPLEMENTATIONS: dict[str, Callable[[torch.dtype, Tensor, int], Built]] = {
    "transformers": build_transformers,
    "ffn": build_ffn,
    "torch, no cache": build_torch,
}


def run_dtype(name: str, rounds: int, prompt_tokens: int, new_tokens: int) -> list[dict]:
    torch.manual_seed(0)
    prompt = torch.randint(VOCAB, (1, prompt_tokens))
    runs, rows = {}, []
    for implementation, build in IMPLEMENTATIONS.items():
        row = {"dtype": name, "implementation": implementation}
        try:
            model, run = build(getattr(torch, name), prompt, new_tokens)
        except ModuleNotFoundError as error:
            rows.append(row | {"tokens_per_s": str(error)})
            continue
        made = run()
        assert made == new_tokens, f"{implementation} made {made} tokens where {new_tokens} were asked for"
        runs[implementation] = run
        rows.append(row | {"parameters": sum(p.numel() for p in model.parameters())})
    seconds = measure(runs, rounds=rounds, warmup=0)
    for row in rows:
        if row["implementation"] in seconds:
            taken = seconds[row["implementation"]]
            slow, median, fast = (new_tokens / s for s in reversed(quartiles(taken)))
            row |= {"tokens_per_s": median, "q1": slow, "q3": fast}
            base = seconds.get("transformers", taken)
            row |= dict(zip(("speedup", "low", "high"), speedup(base, taken), strict=True))
    return rows


def main(argv: list[str]) -> None:
    parser = arguments("generation", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    rows = []
    for name in options.dtypes:
        rows += run_dtype(name, options.rounds, options.prompt_tokens, options.new_tokens)
    publish("generation", rows, COLUMNS, options.results)
