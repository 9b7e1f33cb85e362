"""README's figures are those of the committed result files."""

import json
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def _report(root, *arguments):
    command = [sys.executable, str(root / "bench" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_readme_says_what_the_results_say():
    assert _report(_ROOT, "--check").returncode == 0


def test_a_changed_figure_and_a_missing_result_show(tmp_path):
    (tmp_path / "bench" / "results" / "machine").mkdir(parents=True)
    (tmp_path / "bench" / "report.py").write_text((_ROOT / "bench" / "report.py").read_text())
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench/report.py writes this -->\n<!-- until here -->\nafter\n")
    assert _report(tmp_path, "--check").returncode == 1
    assert _report(tmp_path).returncode == 0
    assert readme.read_text().count("not measured yet") == 2
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")

    result = {
        "bench": "load",
        "model": "tiny",
        "dtype": "bfloat16",
        "num_threads": 2,
        "file_bytes": 2_000_000,
        "bound_ms": 1.0,
        "total_ms": {"median": 4.0},
        "share_of_bound": 0.25,
        "peak_anon_bytes": 3_000_000,
    }
    (tmp_path / "bench" / "results" / "machine" / "load.json").write_text(json.dumps(result))
    assert _report(tmp_path, "--check").returncode == 1
    _report(tmp_path)
    expected = "| tiny, bfloat16 | 2.0 MB | 1.00 ms | 4.00 ms | 25.0% | 3.0 MB | machine, 2 threads |"
    assert expected in readme.read_text()
    readme.write_text(readme.read_text().replace("25.0%", "99.0%"))
    assert _report(tmp_path, "--check").returncode == 1
