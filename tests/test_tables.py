"""The pages' measured tables are those that bench/tables.py makes of bench/results/."""

import re
import subprocess
import sys

from tests.conftest import ROOT


def check():
    return subprocess.run([sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)


def test_tables_are_fresh():
    done = check()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run python bench/tables.py"


def test_a_table_changed_by_hand_is_found():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import tables
    finally:
        sys.path.remove(str(ROOT / "bench"))
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        names = re.findall(r"<!-- table: (\w+) -->", text)
        assert text.count("<!-- end of table -->") == len(names)
        for name in names:
            other = text.replace(tables.TABLES[name](), "| a | b |")
            assert other != text and tables.rewritten(other) == text
