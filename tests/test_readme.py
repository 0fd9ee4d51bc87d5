"""The README's Python blocks run, and its tables are those of the code."""

import re
from pathlib import Path

import pytest

from hf_r2 import ENCODERS, PTQ_METHODS, RANGE_LOSSES

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_first_block_is_the_two_commands():
    first = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        "bash scripts/demo.sh",
        "bash scripts/test.sh",
    ]


def test_methods_table_is_that_of_the_code():
    rows = [f"| `{n}` | {m.paper} | {'no' if m.data_free else 'yes'} |" for n, m in PTQ_METHODS.items()]
    rows += [f"| `{n}` | {m.paper} | no; trains on yours with `prepare` |" for n, m in ENCODERS.items()]
    assert "\n".join(rows) in README


def test_range_losses_are_those_of_the_code():
    listed = ", ".join(f"`{name}` ({row.paper})" for name, row in RANGE_LOSSES.items())
    assert f"Range losses: {listed}." in README
