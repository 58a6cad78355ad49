"""What a row says of the machine."""

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
