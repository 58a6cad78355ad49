"""report: blocks as a list, and as a table."""

from ffn.interop.swap.probe import Inner
from ffn.interop.swap.report import BlockReport, Report, describe
from ffn.interop.swap.reroute import Plan
from ffn.interop.swap.source import Chain

BLOCKS = [
    BlockReport("model.layers.0.mlp", "LlamaMLP", "swapped", "", "swiglu", 1000.0, 400.0),
    BlockReport("model.layers.1.mlp", "LlamaMLP", "swapped", "", "swiglu", 1000.0, 400.0),
    BlockReport("vision.fc", "MLP", "left", "no activation of the table gives its values"),
    BlockReport("", "Whole", "left", "a mixture of experts"),
]


def test_a_report_lists_swapped_and_left_blocks() -> None:
    report = Report(BLOCKS)
    assert list(report) == BLOCKS
    assert report.swapped == BLOCKS[:2]
    assert report.left == BLOCKS[2:]


def test_equal_blocks_share_a_line() -> None:
    text = str(Report(BLOCKS))
    assert repr(Report(BLOCKS)) == text
    lines = text.splitlines()
    assert lines[1].split() == [
        "model.layers.*.mlp",
        "LlamaMLP",
        "swapped",
        "swiglu",
        "1,000",
        "->",
        "400",
        "2",
    ]
    assert lines[2].split()[:3] == ["vision.fc", "MLP", "left"]
    assert lines[3].startswith("(the model)")
    assert lines[4].startswith("2 of 4 blocks swapped")
    assert "800 bytes" in lines[4]
    assert all(line == line.rstrip() for line in lines)


def test_describe_names_activation_packing_and_dropout() -> None:
    def plan(**fields) -> Plan:
        inner = Inner(
            **({"gate": None, "packing": None, "dropout": None, "watched": (), "passed": ()} | fields)
        )
        return Plan(Chain("forward", ("a",), "b"), ("a",), "b", inner)

    assert describe(plan(activation="gelu")) == "gelu"
    packed = plan(activation="swiglu", gate=0, packing="gate_first", dropout=("drop", "p"))
    assert describe(packed) == "swiglu, gate first, dropout"
