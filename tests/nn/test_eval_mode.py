"""Eval mode for a while: every flag is off inside, and restored afterwards, after an error too."""

from contextlib import suppress

from torch import nn

from ffn.nn.eval_mode import eval_mode


def test_training_flags_are_off_inside_and_restored_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()
    model[1][0].train()
    flags = [module.training for module in model.modules()]
    with suppress(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == flags
    assert set(flags) == {True, False}
