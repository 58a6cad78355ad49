"""Files of rows: damaged lines, and the newest rows of one machine."""

from pathlib import Path

import pytest

from benchmarks import report


def test_load_does_not_tell_machines_apart() -> None:
    rows = [{"block": "a", "load": 0.1}, {"block": "b", "load": 3.0}]
    assert report.newest(rows) == rows


def test_half_a_line_of_a_killed_process_is_ignored_and_hides_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert report.read(file) == []
    file.write_text('{"block": "gpt2"}\n[1]\n2\n{"block": "gp')
    assert report.read(file) == [{"block": "gpt2"}]
    for name in ("small", "minilm"):
        report.keep("rows", [{"block": name}], tmp_path)
    assert [row["block"] for row in report.read(file)] == ["gpt2", "small", "minilm"]
    assert file.read_text().count("\n") == 6


@pytest.mark.parametrize("key", ["cpu", "gpu", "device", "threads", "torch"])
def test_newest_rows_are_from_the_machine_of_the_last_row(key: str) -> None:
    here = {"cpu": "a", "gpu": "b", "device": "cuda", "threads": 2, "torch": "3"}
    rows = [here | {"block": "gpt2"}, here | {"block": "small", key: "another"}, here | {"block": "small"}]
    assert report.newest(rows) == [rows[0], rows[2]]
    assert report.newest(rows[:2]) == [rows[1]]


def test_rows_without_a_device_belong_to_the_gpu_if_there_is_one() -> None:
    for device, facts in (("cpu", {}), ("cuda", {"gpu": "H100"})):
        rows = [{"block": "a"} | facts, {"block": "b", "device": device} | facts]
        assert report.newest(rows) == rows
    dry = {"block": "b", "gpu": "H100", "device": "cpu"}
    assert report.newest([{"block": "a", "gpu": "H100"}, dry]) == [dry]


def test_cpu_model_has_family_and_model(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: A\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A B\n\n")
    assert report.cpu_model(cpuinfo) == "A B, cpu family 25, model 17"
    assert report.cpu_model(tmp_path / "absent")
