"""The eager backend's passes against the formula in float64."""

import pytest
import torch

from ffn.activations import TABLE
from ffn.ops import eager
from ffn.ops.between import Between, Needs
from ffn.ops.dense import Dense
from ffn.ops.dropout_mask import noise
from tests.ops.samples import F64, NAMES

SEED = torch.tensor([11])
CASES = [(None, 0), (SEED, 0), (SEED, 7)]


def expected(name: str, pre, pre_gate, dh, factors):
    """(h, dpre, dpre_gate) by the row's formula."""
    value, slope = TABLE[name].formula(pre if pre_gate is None else pre_gate)
    h, dh = factors * value, factors * dh
    if pre_gate is None:
        return h, dh * slope, None
    return h * pre, dh * value, dh * pre * slope


@pytest.mark.parametrize(("seed", "row_start"), CASES, ids=["plain", "dropout", "later rows"])
@pytest.mark.parametrize("name", NAMES)
def test_passes_equal_the_formula(name: str, seed, row_start: int) -> None:
    gated = TABLE[name].gated
    pre, pre_gate = torch.randn(5, 8, dtype=F64), torch.randn(5, 8, dtype=F64) if gated else None
    dy, down = torch.randn(5, 3, dtype=F64), Dense(torch.randn(3, 8, dtype=F64))
    between = Between(TABLE[name], seed, 0.4, row_start)
    factors = 1.0 if seed is None else noise(seed, 5, 8, 0.4, F64, row_start)
    h, dpre, dpre_gate = expected(name, pre, pre_gate, dy @ down.weight, factors)
    sums = dpre.sum(0), dpre_gate.sum(0) if gated else None
    torch.testing.assert_close(eager.act(pre, pre_gate, between), h)
    for reuse in (False, True):
        given = pre.clone(), None if pre_gate is None else pre_gate.clone()
        dh = dy @ down.weight
        found = eager.dact_(dh, *given, between, Needs(True, True, gated), reuse)
        torch.testing.assert_close(tuple(found), (dpre, dpre_gate, h, *sums))
        assert reuse == (found[0] is given[0])
        assert reuse or torch.equal(given[0], pre)
    found = eager.dact_(dy @ down.weight, pre.clone(), pre_gate, between, Needs(False, False, False), False)
    torch.testing.assert_close(tuple(found), (dpre, dpre_gate, None, None, None))
    rest = pre, pre_gate, between, Needs(True, True, gated), False
    fused = eager.linear_dact(dy, down, (True, False), *rest)
    if seed is not None:
        assert fused is None
    else:
        torch.testing.assert_close(tuple(fused), (dpre, dpre_gate, [dy.t() @ h, None], *sums))
