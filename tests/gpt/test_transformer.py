"""The whole model: causality, padding, precision, compilation."""

import copy
import dataclasses
import operator
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.gpt.transformer import Transformer, TransformerConfig, build_block
from ffn.nn.attention import LayerCache
from tests.models import F64, SMALL, VARIANTS, build, tokens_of, variants


@variants
def test_shapes_and_loss(options: dict) -> None:
    model = build(**options)
    tokens, targets = tokens_of(2, 7), tokens_of(2, 7)
    logits = model(tokens)
    assert logits.shape == (2, 7, 13)
    targets[0, 3] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(model.loss(tokens, targets, label_smoothing=0.1), expected)
    model.loss(tokens, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@variants
def test_a_change_reaches_only_what_may_see_it(options: dict) -> None:
    model = build(**options)
    tokens = tokens_of(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 13
    before, after = model(tokens), model(changed)
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()
    assert torch.equal(before[:, :5], after[:, :5]) == model.config.causal


def test_an_encoder_without_positions_permutes() -> None:
    model, tokens, order = build(causal=False, position="none"), tokens_of(2, 8), torch.randperm(8)
    torch.testing.assert_close(model(tokens[:, order]), model(tokens)[:, order])


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"causal": False}, ["attention.causal"]),
        ({"num_kv_heads": 2}, ["attention.num_kv_heads"]),
        ({"head_dim": 6}, ["attention.head_dim"]),
        ({"attention_dropout": 0.5}, ["attention.dropout"]),
        ({"dropout": 0.5}, ["attention.out_dropout", "feed_forward.out_dropout"]),
        ({"ffn_dropout": 0.5}, ["feed_forward.dropout"]),
        ({"hidden_dim": 40}, ["feed_forward.hidden_dim"]),
        ({"activation": "reglu"}, ["feed_forward.activation"]),
        ({"save": "input"}, ["feed_forward.save"]),
        ({"chunk_tokens": 3, "save": "input"}, ["feed_forward.chunk_tokens"]),
        ({"init": "zero_out"}, ["feed_forward.init"]),
        ({"norm_eps": 0.5}, ["attention_norm.eps", "feed_forward_norm.eps"]),
        ({"norm_eps": 0.5, "qk_norm": True}, ["attention.q_norm.eps", "attention.k_norm.eps"]),
        ({"norm_position": "post"}, ["norm_position"]),
        ({"parallel": True}, ["parallel"]),
    ],
    ids=str,
)
def test_a_block_is_given_its_options(options: dict, places: list[str]) -> None:
    block = build_block(dataclasses.replace(SMALL, **options), device="meta")
    for place in places:
        assert operator.attrgetter(place)(block) == next(iter(options.values())), place


def test_the_sentence_written_out() -> None:
    model, tokens = build(position="learned", tie_embeddings=False), tokens_of(2, 5)
    x = model.embedding.token.weight[tokens] + model.embedding.position.weight[:5]
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    torch.testing.assert_close(model(tokens), model.norm(x) @ model.head.weight.T)


@variants
def test_padding_changes_nothing(options: dict) -> None:
    model = build(**options)
    short, pad = tokens_of(1, 4), tokens_of(1, 3)
    real = torch.tensor([[False] * 3 + [True] * 4])
    alone = model(short)
    left = model(torch.cat((pad, short), 1), attention_mask=real)[:, 3:]
    right = model(torch.cat((short, pad), 1), attention_mask=real.flip(1))[:, :4]
    torch.testing.assert_close(left, alone)
    torch.testing.assert_close(right, alone)


@pytest.mark.parametrize("cuts", [(7,), (1,) * 7, (3, 1, 3)])
@pytest.mark.parametrize("options", [v for v in VARIANTS.values() if v.get("causal", True)])
def test_cached_logits_are_the_uncached_ones(options: dict, cuts: tuple[int, ...]) -> None:
    model, tokens = build(**options), tokens_of(2, 7)
    cache = [LayerCache(7) for _ in model.blocks]
    with torch.inference_mode():
        parts = [model(part, cache=cache) for part in tokens.split(list(cuts), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


def test_given_positions() -> None:
    model, tokens = build(position="learned"), tokens_of(1, 3)
    whole = model(tokens, positions=torch.tensor([[4, 5, 6]]))
    assert not torch.allclose(whole, model(tokens))
    torch.testing.assert_close(model(tokens, positions=torch.arange(3)), model(tokens))


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 5), (), (5, 2)])
def test_positions_that_do_not_fit(position: str, shape: tuple[int, ...]) -> None:
    model, tokens = build(position=position), tokens_of(2, 5)
    want = r"^positions want \(T\) or \(B, T\) of the tokens, which are \(2, 5\); got "
    with pytest.raises(ValueError, match=want + re.escape(str(shape)) + "$"):
        model(tokens, positions=torch.zeros(shape, dtype=torch.int64))
    same = [model(tokens, positions=torch.arange(5).expand(shape)) for shape in ((5,), (1, 5), (2, 5))]
    torch.testing.assert_close(same, [model(tokens)] * 3)


def test_rotary_angles_stay_float32_in_a_small_dtype() -> None:
    config = dataclasses.replace(SMALL, max_seq_len=2000)
    model = Transformer(config, dtype=F64).to(torch.bfloat16).to(F64)
    late = torch.arange(1990, 1998)
    near = model(tokens := tokens_of(1, 8))
    torch.testing.assert_close(model(tokens, positions=late), near, atol=1e-5, rtol=1e-4)


def test_autocast_keeps_the_stream_in_float32() -> None:
    model, tokens, targets = Transformer(SMALL), tokens_of(2, 8), tokens_of(2, 8)
    dtypes = set()
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype) or None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert dtypes == {torch.float32}
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(loss, model.loss(tokens, targets), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    exact = build(torch.float32)
    model, tokens = copy.deepcopy(exact).to(dtype), tokens_of(2, 8)
    assert model(tokens).dtype == dtype
    model.loss(tokens, tokens).backward()
    torch.testing.assert_close(model(tokens).float(), exact(tokens), atol=0.6, rtol=0.2)


def test_dropout_is_for_training() -> None:
    model = build(dropout=0.2, ffn_dropout=0.2, attention_dropout=0.2)
    tokens = tokens_of(2, 8)
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(5)
    first = model(tokens)
    torch.manual_seed(5)
    assert torch.equal(model(tokens), first)
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens), plain(tokens))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(("name", "autocast"), [("qk_norm", True), ("gpt2", False), ("gemma2", True)])
def test_compiled_whole(name: str, autocast: bool) -> None:
    model = build(torch.float32, **VARIANTS[name], num_layers=1)
    tokens, targets, parameters = tokens_of(2, 8), tokens_of(2, 8), list(model.parameters())
    results = []
    for loss in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(tokens, targets)
        results.append((value, *torch.autograd.grad(value, parameters)))
    tolerance = {"atol": 0.02, "rtol": 0.05} if autocast else {}
    torch.testing.assert_close(results[0], results[1], **tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_once_for_all_lengths() -> None:
    model, graphs = build(num_layers=1), []
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g.forward
    )
    for shape in ((3, 5), (2, 8), (4, 11)):
        tokens = tokens_of(*shape)
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the exporter's own
def test_exported() -> None:
    model, tokens = build().eval(), tokens_of(2, 8)
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 13, dtype=torch.int64), r"T <= 12; got \(1, 13\); cut the sequence or build with a"),
        (torch.tensor(1), r"wants tokens \(B, T\) with T <= 12; got \(\); cut"),
        (torch.zeros(4, dtype=torch.int64), r"wants tokens \(B, T\) with T <= 12; got \(4,\)"),
        (torch.full((1, 2), 13), "tokens"),
    ],
)
def test_bad_tokens(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(tokens)


def test_a_full_cache_is_a_full_window() -> None:
    model = build()
    cache = [LayerCache(20) for _ in model.blocks]
    with torch.no_grad():
        model(tokens_of(1, 10), cache=cache)
        with pytest.raises(ValueError, match=r"T <= 12; got \(1, 3\) after 10 cached"):
            model(tokens_of(1, 3), cache=cache)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_cache_of_another_model_stays_as_it_was(layers: int) -> None:
    cache = [LayerCache(20) for _ in range(layers)]
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=f"one LayerCache a block, 2 of them; got {layers}$"),
    ):
        build()(tokens_of(1, 3), cache=cache)
    assert not any(layer.length for layer in cache)


def test_only_a_config_makes_a_model() -> None:
    with pytest.raises(
        TypeError, match=r"^Transformer wants a TransformerConfig; got a dict; from_dict reads"
    ):
        Transformer({"dim": 64})


def test_a_model_without_a_head_gives_hidden_states() -> None:
    model, tokens = build(head="none"), tokens_of(2, 5)
    assert torch.equal(model(tokens), model.hidden(tokens))
    for call in (lambda: model.logits(torch.zeros(1, 16, dtype=F64)), lambda: model.loss(tokens, tokens)):
        with pytest.raises(ValueError, match="head='none': this Transformer gives hidden states alone"):
            call()


def test_token_types() -> None:
    model, tokens = build(**VARIANTS["bert"]), tokens_of(2, 5)
    types = torch.tensor([[0, 0, 1, 1, 2]]).expand(2, 5)
    assert torch.equal(model(tokens), model(tokens, token_types=torch.zeros_like(types)))
    assert not torch.allclose(model(tokens), model(tokens, token_types=types))
    loss = F.cross_entropy(model(tokens, token_types=types).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model.loss(tokens, tokens, token_types=types), loss)


def test_a_padding_token_has_no_position() -> None:
    model = build(**VARIANTS["bert"], pad_token_id=3)
    tokens = torch.tensor([[3, 5, 3, 6, 7]])
    expected = model(tokens, positions=torch.tensor([[-1, 0, -1, 1, 2]]))
    assert torch.equal(model(tokens), expected)
    assert not torch.allclose(model(tokens), model(tokens, positions=torch.arange(5)))


@pytest.mark.parametrize(("options", "at"), [({"no_rope_layers": (0, 1)}, "none"), ({}, "rotary")])
def test_layers_without_rotary(options: dict, at: str) -> None:
    model, tokens = build(**options), tokens_of(1, 6)
    other = Transformer(dataclasses.replace(SMALL, position=at), dtype=F64)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))


def test_positions_of_one_row_are_exported_for_any_batch() -> None:
    model = Transformer(
        TransformerConfig(vocab_size=17, dim=16, num_layers=1, num_heads=2, max_seq_len=8)
    ).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    given = torch.randint(17, (3, 5)), {"positions": torch.arange(5)}
    shapes = {"tokens": {0: batch}, "positions": None}
    program = torch.export.export(model, given[:1], given[1], dynamic_shapes=shapes)
    tokens = torch.randint(17, (7, 5))
    torch.testing.assert_close(program.module()(tokens, positions=torch.arange(5)), model(tokens))
