"""The pages' measured tables are those that bench/tables.py makes of bench/results/."""

import re
import sys

import pytest

from tests.conftest import ROOT


def test_tables_are_fresh(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as found:
        bench("tables").main()
    assert not found.value.code, f"{capsys.readouterr().out}: run python bench/tables.py"


def test_a_table_changed_by_hand_is_found(bench):
    tables = bench("tables")
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        names = re.findall(r"<!-- table: (\w+) -->", text)
        assert text.count("<!-- end of table -->") == len(names)
        for name in names:
            other = text.replace(tables.TABLES[name](), "| a | b |")
            assert other != text and tables.rewritten(other) == text
