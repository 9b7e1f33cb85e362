"""README's Python examples run, with the demo model in the place of the reader's checkpoint."""

import re
from pathlib import Path

import pytest

from llama_fast import demo

_README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)


@pytest.mark.parametrize("source", _EXAMPLES, ids=lambda source: source.splitlines()[0])
def test_example_runs_and_prints(source, capsys):
    assert "./Llama-3.2-1B" in source
    exec(compile(source.replace("./Llama-3.2-1B", str(demo.PATH)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert len(_EXAMPLES) == 6
