"""Attention: laws of masks and permutations, and the formula written out."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ffn.nn.attention import Attention, LayerCache, attend_in_full, causal_mask, padding_mask
from ffn.nn.norm import build_norm
from ffn.nn.rotary import rotary_tables
from ffn.ops.attention import attend
from tests.nn.test_rotary import turned

F64 = torch.float64
build = partial(Attention, dtype=F64)


def written_out(attention: Attention, x: Tensor, allowed: Tensor | None, rotary: bool) -> Tensor:
    """Compute attention one head and one query at a time."""
    B, T, _ = x.shape
    Q, G, C = attention.num_heads, attention.num_kv_heads, attention.head_dim
    q = attention.q_proj(x).view(B, T, Q, C)
    k = attention.k_proj(x).view(B, T, G, C)
    v = attention.v_proj(x).view(B, T, G, C)
    if attention.q_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary:
        q, k = turned(q), turned(k)
    heads = torch.zeros(B, T, Q, C, dtype=x.dtype)
    for b in range(B):
        for h in range(Q):
            g = h * G // Q
            for t in range(T):
                scores = k[b, :, g] @ q[b, t, h] / math.sqrt(C)
                if allowed is not None:
                    scores = scores.masked_fill(~allowed[t], -torch.inf)
                heads[b, t, h] = scores.softmax(0) @ v[b, :, g]
    return attention.o_proj(heads.reshape(B, T, Q * C))


@pytest.mark.parametrize("groups", [None, 4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", [None, partial(nn.RMSNorm, dtype=F64)], ids=["plain", "qk_norm"])
def test_attention_equals_its_formula(groups: int | None, causal: bool, norm) -> None:
    attention = build(12, 4, groups, 6, causal=causal, qkv_bias=True, out_bias=True, qk_norm=norm)
    for part in filter(None, (attention.q_norm, attention.k_norm)):
        nn.init.normal_(part.weight)
    x, rotary = torch.randn(2, 5, 12, dtype=F64), rotary_tables(torch.arange(5), 6)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() if causal else None
    expected = written_out(attention, x, allowed, rotary=True)
    torch.testing.assert_close(attention(x, rotary), expected, atol=1e-5, rtol=1e-5)  # float32 tables
    torch.testing.assert_close(attention(x), written_out(attention, x, allowed, rotary=False))


def test_causal_attention_ignores_later_tokens() -> None:
    attention = build(8, 2)
    x = torch.randn(1, 6, 8, dtype=F64)
    changed = x.clone()
    changed[:, 3] += 1.0
    before, after = attention(x), attention(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32), (0, 0, 32)])
def test_no_tokens_work(shape: tuple[int, ...]) -> None:
    attention, x = Attention(32, 4, 2), torch.zeros(shape, requires_grad=True)
    y = attention(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


def test_permuting_tokens_permutes_outputs_without_a_mask() -> None:
    attention = build(8, 2, causal=False)
    x = torch.randn(2, 6, 8, dtype=F64)
    order = torch.randperm(6)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_grouped_queries_equal_repeated_key_value_heads() -> None:
    grouped, full = build(12, 6, 2), build(12, 6)
    C = grouped.head_dim
    full.load_state_dict(
        {
            name: weight.view(2, C, 12).repeat_interleave(3, 0).flatten(0, 1)
            if weight.shape[0] == 2 * C
            else weight
            for name, weight in grouped.state_dict().items()
        }
    )
    x = torch.randn(2, 5, 12, dtype=F64)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotary_attention_depends_only_on_relative_positions() -> None:
    attention = build(16, 2)
    x = torch.randn(1, 5, 16, dtype=F64)
    at = [attention(x, rotary_tables(torch.arange(start, start + 5), 8)) for start in (0, 40)]
    torch.testing.assert_close(at[0], at[1], atol=1e-5, rtol=1e-5)


def test_cache_in_pieces_equals_one_pass() -> None:
    attention = build(8, 4, 2)
    x = torch.randn(2, 7, 8, dtype=F64)
    tables = rotary_tables(torch.arange(7), 2)
    whole = attention(x, tables)
    cache, parts = LayerCache(7), []
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, 7)):
            rotary = tuple(table[start:end] for table in tables)
            parts.append(attention(x[:, start:end], rotary, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole.detach())
    assert cache.length == 7


def test_cache_allocates_once() -> None:
    cache = LayerCache(4)
    k = torch.randn(2, 3, 2, 5)
    keys, values = cache.append(k, k + 1)
    memory = cache.memory
    assert memory is not None
    assert [tuple(part.shape) for part in memory] == [(2, 3, 4, 5)] * 2
    keys, values = cache.append(k + 2, k + 3)
    assert cache.memory is memory
    assert [keys.data_ptr(), values.data_ptr()] == [part.data_ptr() for part in memory]
    assert torch.equal(keys, torch.cat((k, k + 2), 2))
    assert torch.equal(values, torch.cat((k + 1, k + 3), 2))
    with pytest.raises(ValueError, match=r"capacity .* 6 .* 4"):
        cache.append(k, k)
    assert cache.length == 4  # a failed append changes nothing


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal: bool) -> None:
    attention = build(8, 2, causal=causal)
    x = torch.randn(1, 6, 8, dtype=F64)
    real = torch.tensor([[False, False, True, True, True, True]])
    y = attention(x, mask=padding_mask(real, 6, causal))
    torch.testing.assert_close(y[:, 2:], attention(x[:, 2:]))
    assert y.isfinite().all()


def test_masks_select_the_allowed_keys() -> None:
    assert causal_mask(2, 4, "cpu").tolist() == [[True, True, True, False], [True, True, True, True]]
    real = torch.tensor([[False, True, True]])
    assert padding_mask(real, 1, True).tolist() == [[[[False, True, True]]]]
    assert padding_mask(real, 3, True)[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, True, True],
    ]
    assert padding_mask(real, 2, False)[0, 0].tolist() == [[False, True, True], [False, True, True]]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("masked", [None, "causal", "padding"])
def test_attend_in_full_equals_torch(groups: int, masked: str | None) -> None:
    q = torch.randn(2, 4, 5, 6, dtype=F64, requires_grad=True)
    k, v = torch.randn(2, 2, groups, 5, 6, dtype=F64)
    mask = {"causal": causal_mask(5, 5, "cpu"), None: None}.get(masked)
    if masked == "padding":
        mask = padding_mask(torch.tensor([[False, True, True, True, True], [True] * 5]), 5, True)
    ours = attend_in_full(q, k, v, mask, 0.0)
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups == 1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), q), torch.autograd.grad(theirs.square().sum(), q)
    )


def test_attention_dropout_keeps_the_mean_and_stops_in_eval() -> None:
    attention = build(8, 2, dropout=0.5)
    x = torch.randn(1, 4, 8, dtype=F64)
    expected = build(8, 2)
    expected.load_state_dict(attention.state_dict())
    draws = torch.stack([attention(x) for _ in range(3000)]).detach()
    assert draws.std(0).max() > 0.05
    torch.testing.assert_close(draws.mean(0), expected(x).detach(), atol=0.05, rtol=0.0)
    assert torch.equal(attention.eval()(x), expected(x))


def test_output_dropout() -> None:
    attention = build(64, 2, out_dropout=0.5)
    x = torch.randn(1, 16, 64, dtype=F64)
    assert 0.4 < (attention(x) == 0).double().mean() < 0.6
    assert not (attention.eval()(x) == 0).any()


def test_autocast_attends_in_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args, **kwargs) -> Tensor:
        seen.extend((t.dtype, torch.is_autocast_enabled("cpu")) for t in args)
        return attend(*args, **kwargs)

    monkeypatch.setattr("ffn.nn.attention.attend", spy)
    attention = Attention(8, 2, qk_norm=nn.RMSNorm)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x, rotary_tables(torch.arange(3), 4))
    y.float().sum().backward()
    half = Attention(8, 2, dtype=torch.bfloat16)
    assert half(x.detach().bfloat16()).dtype == y.dtype == torch.bfloat16
    assert seen == [(torch.float32, False)] * 6
    assert x.grad is not None
    assert attention.q_proj.weight.grad is not None
    torch.testing.assert_close(
        y.float(), attention(x, rotary_tables(torch.arange(3), 4)), atol=0.03, rtol=0.03
    )


def test_names_and_shapes_of_the_weights() -> None:
    norm = partial(nn.RMSNorm, device="meta")
    attention = Attention(12, 4, 2, 5, qkv_bias=True, qk_norm=norm, device="meta")
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "q_proj.weight": (20, 12), "q_proj.bias": (20,),
        "k_proj.weight": (10, 12), "k_proj.bias": (10,),
        "v_proj.weight": (10, 12), "v_proj.bias": (10,),
        "o_proj.weight": (12, 20),
        "q_norm.weight": (5,), "k_norm.weight": (5,),
    }  # fmt: skip
    assert all(type(m) is nn.Linear for name, m in attention.named_children() if name.endswith("proj"))
    assert attention(torch.empty(2, 3, 12, device="meta")).shape == (2, 3, 12)


def test_sizes_that_do_not_divide_raise() -> None:
    with pytest.raises(ValueError, match=r"^dim .*got 10"):
        Attention(10, 4)
    with pytest.raises(ValueError, match=r"^num_heads .*got 4"):
        Attention(8, 4, 3)
    for sizes, name in (
        ((8, None), "num_heads"),
        ((8, 0), "num_heads"),
        ((8, 2, 0), "num_kv_heads"),
        ((8, 2, 1, -4), "head_dim"),
        ((8, 2.0), "num_heads"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            Attention(*sizes)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_cuda_autocast_attends_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    """On CUDA the norms return float32 and the values stay bfloat16; checked on meta tensors."""
    seen = []
    fused = nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs) -> Tensor:
        seen.extend(t.dtype for t in args[:3])
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    attention = Attention(32, 2, qk_norm=partial(build_norm, norm, device="meta"), device="meta")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would need a device
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast warns that there is no device
            for module in attention.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda"), False))
            x, *rotary = (torch.empty(s, device="cuda") for s in ((2, 8, 32), (8, 1, 16), (8, 1, 16)))
            y = attention(x, rotary)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [torch.bfloat16] * 3
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["eval", "in_full"])
@pytest.mark.parametrize(("window", "scale", "softcap"), [(3, None, None), (None, 0.7, None), (2, 0.7, 1.5)])
def test_window_scale_and_softcap_equal_their_formula(dropout: float, window, scale, softcap) -> None:
    attention = Attention(12, 3, window=window, scale=scale, softcap=softcap, dropout=dropout, dtype=F64)
    x, T = torch.randn(2, 6, 12, dtype=F64), 6
    q, k, v = (
        p(x).unflatten(-1, (3, 4)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = q @ k.mT * (0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    seen = [[i - (window or T) < j <= i for j in range(T)] for i in range(T)]
    weights = scores.masked_fill(~torch.tensor(seen), -math.inf).softmax(-1)
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)
    real = torch.ones(2, T, dtype=torch.bool)
    torch.testing.assert_close(attention(x, mask=padding_mask(real, T, True)), expected)
    cache = LayerCache(T)
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split([2, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_qk_norm_over_all_heads() -> None:
    attention = Attention(
        12, 3, 1, qk_norm=partial(build_norm, "rmsnorm", dtype=F64), qk_norm_scope="all", dtype=F64
    )
    assert attention.q_norm is not None
    assert (attention.q_norm.weight.shape, attention.k_norm.weight.shape) == ((12,), (4,))
    torch.nn.init.normal_(attention.q_norm.weight)
    x = torch.randn(2, 5, 12, dtype=F64)
    normed = [attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))]
    plain = Attention(12, 3, 1, dtype=F64)
    plain.o_proj = attention.o_proj
    torch.testing.assert_close(attention(x), plain.mix([*normed, attention.v_proj(x)]))


def test_invalid_options_raise() -> None:
    with pytest.raises(ValueError, match=r"^window"):
        Attention(12, 3, window=3, causal=False)
    with pytest.raises(ValueError, match=r"^qk_norm_scope"):
        Attention(12, 3, qk_norm_scope="row")
