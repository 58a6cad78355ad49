"""What a row says of the machine, and what a file of rows holds."""

import platform
from pathlib import Path

import pytest

from benchmarks import report


def test_clocks_stand_where_the_machine_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    told = "processor : 0\ncpu MHz\t\t: 2000.4\n\nprocessor : 1\ncpu MHz\t\t: 3000.0\n"
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, *rest: told)
    assert report.clocks() == {"cpu_MHz": 2500}
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert report.clocks() == {}


def test_a_row_names_its_python() -> None:
    assert report.machine()["python"] == platform.python_version()


def test_a_row_says_how_busy_its_machine_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.os, "getloadavg", lambda: (1.26, 0.0, 0.0), raising=False)
    assert report.machine()["load"] == 1.3
    rows = [{"block": "a", "load": 0.1}, {"block": "b", "load": 3.0}]
    assert report.newest(rows) == rows


def test_half_a_line_of_a_killed_process_is_passed_over_and_swallows_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert report.read(file) == []
    file.write_text('{"block": "gpt2"}\n[1]\n2\n{"block": "gp')
    assert report.read(file) == [{"block": "gpt2"}]
    for name in ("small", "minilm"):
        report.keep("rows", [{"block": name}], tmp_path)
    assert [row["block"] for row in report.read(file)] == ["gpt2", "small", "minilm"]
    assert file.read_text().count("\n") == 6


@pytest.mark.parametrize("key", ["cpu", "gpu", "device", "threads", "torch"])
def test_the_newest_rows_are_of_the_last_rows_machine(key: str) -> None:
    here = {"cpu": "a", "gpu": "b", "device": "cuda", "threads": 2, "torch": "3"}
    rows = [here | {"block": "gpt2"}, here | {"block": "small", key: "another"}, here | {"block": "small"}]
    assert report.newest(rows) == [rows[0], rows[2]]
    assert report.newest(rows[:2]) == [rows[1]]


def test_rows_that_name_no_device_are_of_the_gpu_where_there_is_one() -> None:
    for device, facts in (("cpu", {}), ("cuda", {"gpu": "H100"})):
        rows = [{"block": "a"} | facts, {"block": "b", "device": device} | facts]
        assert report.newest(rows) == rows
    dry = {"block": "b", "gpu": "H100", "device": "cpu"}
    assert report.newest([{"block": "a", "gpu": "H100"}, dry]) == [dry]


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: A\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A B\n\n")
    assert report.cpu_model(cpuinfo) == "A B, cpu family 25, model 17"
    assert report.cpu_model(tmp_path / "absent")
