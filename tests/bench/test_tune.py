"""bench/tune.py: which candidates there are, what drops one, and its whole way without a GPU."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_script(*arguments, module=None, **environment):
    command = [sys.executable, *(["-m", module] if module else [str(ROOT / "bench" / "tune.py")]), *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=900, check=False)


class Pretended:
    """A GPU on which a tile takes the time that a test gives it."""

    device = torch.device("cpu")
    name = "pretended"
    l2_bytes = 0
    bandwidth, flops = 1e12, 1e15

    def __init__(self, bench, us=lambda tile: 2.0):
        self.bench, self.us = bench, us

    def time(self, function, sets):
        us = self.us(self.bench._trial.tile)
        return types.SimpleNamespace(median=us)

    def release(self):
        pass


@pytest.fixture
def choice(bench):
    """A choice whose kernel adds up as the tile's step says: a step of 7 gives other bits, 9 other instructions."""
    module = types.SimpleNamespace(kernel=None)

    class Kernel:
        def __getitem__(self, grid):
            def launch(x, tile):
                if tile.block_k == 8:
                    raise RuntimeError("out of shared memory")
                ptx = "mma.sync" if tile.block_k == 9 else "wgmma.mma_async"
                return types.SimpleNamespace(asm={"ptx": ptx}, n_regs=40, n_spills=0, metadata=None)

            return launch

    module.kernel = Kernel()

    def ours(x):
        tile = bench.configs.int4_tile(90, torch.bfloat16, 128, 1)
        module.kernel[(1,)](x, tile)
        return x + (1 if tile.block_k == 7 else 0)

    def tile(step, warps=4):
        return bench.configs.LinearTile(64, 16, step, warps, 4, 1.0)

    setup = bench.Setup([(torch.ones(2, dtype=torch.bfloat16),)], ours, lambda: None)
    cases = tuple((label, lambda device, l2_bytes: setup) for label in ("a", "b"))
    return bench.Choice(
        kind="test",
        slot="1",
        lookup="int4_tile",
        kernel=(module, "kernel"),
        current=tile(1),
        base=tile(1),
        candidates=tuple(tile(step) for step in (2, 3, 7, 8, 9)),
        rows=(1,),
        cases=cases,
        first=1,
    )


def never():
    return False


def test_the_fastest_of_the_right_ones_is_chosen(bench, choice, capsys):
    lookup, kernel = bench.configs.int4_tile, choice.kernel[0].kernel
    times = {1: 4.0, 2: 3.0, 3: 2.0, 7: 1.0, 8: 1.0, 9: 1.0}
    results = bench.tune(choice, Pretended(bench, lambda tile: times[tile.block_k]), 1, never)
    assert [result.tile.block_k for result in results[:3]] == [1, 3, 2]
    assert results[1].score == pytest.approx(0.5) and results[1].us == {"a": 2.0, "b": 2.0}
    assert (results[0].family, results[0].registers, results[0].spills) == ("wgmma", 40, 0)
    dropped = {result.tile.block_k: result.dropped for result in results[3:]}
    assert dropped == {
        7: "other bits (a)",
        8: "RuntimeError: out of shared memory",
        9: "mma.sync instead of wgmma",
    }
    assert bench.chosen_of(results) is results[1]
    # What was replaced for the trial is back.
    assert bench.configs.int4_tile is lookup and choice.kernel[0].kernel is kernel
    bench.print_choice(choice, results)
    out = capsys.readouterr().out.splitlines()
    assert out[2].startswith("  current ") and out[3].startswith("  -50.0% ")
    assert any("other bits" in line for line in out[4:])


def test_a_gain_within_the_spread_changes_nothing(bench, choice):
    results = bench.tune(choice, Pretended(bench, lambda tile: 4.0 - 0.01 * (tile.block_k == 2)), 1, never)
    assert bench.chosen_of(results) is results[0]


def test_a_candidate_that_missed_a_case_is_not_chosen(bench, choice):
    # Faster on the first case, but with only one finalist it was not timed on the second.
    times = {1: 4.0, 2: 1.0, 3: 2.0}
    results = bench.tune(
        replace(choice, candidates=choice.candidates[:2]), Pretended(bench, lambda tile: times[tile.block_k]), 1, never
    )
    results[1].us.pop("b")
    assert bench.chosen_of(results) is results[2]


def test_when_the_time_is_up_the_current_tile_is_still_measured(bench, choice):
    results = bench.tune(choice, Pretended(bench), 1, lambda: True)
    assert results[0].us == {"a": 2.0}
    assert {result.dropped for result in results[1:]} >= {"not run: the time was up"}
    assert bench.chosen_of(results) is results[0]


def test_a_table_whose_first_tile_does_not_run_fails_by_name(bench, choice):
    broken = replace(choice.current, block_k=8)
    with pytest.raises(RuntimeError, match="the table's first tile .* does not run: RuntimeError: out of shared"):
        bench.tune(replace(choice, base=broken), Pretended(bench), 1, never)


def test_a_table_of_mixed_bits_is_reported(bench, choice, capsys):
    # The current tile itself gives other bits than the table's first.
    mixed = replace(choice, current=replace(choice.current, block_k=7))
    args = types.SimpleNamespace(minutes=1, seed=0, jobs=1, json=None, commit=None)
    assert bench.run([mixed], 90, Pretended(bench), args) == 1
    assert "failed: RuntimeError: the current tile is out: other bits (a)" in capsys.readouterr().out


def test_a_replaced_name_comes_back_after_an_error(bench):
    owner = types.SimpleNamespace(name=1)

    def fail():
        assert owner.name == 2
        raise KeyError

    with pytest.raises(KeyError), bench.replaced(owner, "name", 2):
        fail()
    assert owner.name == 1


def test_candidates_fit_the_chip(bench):
    tile = bench.configs.LinearTile
    # (64 + 16) x 128 x 2 bytes, 11 times: 225,280; 12 times is above 227 KiB.
    assert bench.linear_fits(90, False, tile(64, 16, 128, 4, 11, 1.0))
    assert not bench.linear_fits(90, False, tile(64, 16, 128, 4, 12, 1.0))
    assert not bench.linear_fits(89, False, tile(64, 16, 128, 4, 5, 1.0))
    # Gate and up: 144 rows of a step.
    assert bench.linear_fits(90, True, tile(64, 16, 128, 4, 6, 1.0))
    assert not bench.linear_fits(90, True, tile(64, 16, 128, 4, 7, 1.0))
    # 128 x 256 sums over 8 warps are 128 a thread, over 4 warps 256.
    assert bench.linear_fits(90, False, tile(128, 256, 64, 8, 3, 1.0))
    assert not bench.linear_fits(90, False, tile(128, 256, 64, 4, 3, 1.0))
    assert not bench.int4_fits(90, bench.configs.Int4Tile(128, 256, 8, 2))
    assert not bench.attention_fits(90, 128, bench.configs.AttentionTile(128, 4, 2))


@pytest.mark.parametrize("table", [80, 89, 90, 100])
def test_what_the_tables_hold_is_a_choice_and_no_candidate_twice(bench, table):
    found = bench.choices(table, ["1b", "8b"])
    assert len({choice.name for choice in found}) == len(found)
    for choice in found:
        assert choice.current not in choice.candidates
        assert len(set(choice.candidates)) == len(choice.candidates) > 0
        assert 0 < choice.first <= len(choice.cases)
    listed = {choice.current for choice in found if choice.kind == "linear" and not choice.new}
    assert listed == set(bench.configs.linear_tiles(table, torch.bfloat16, False))


def test_selection(bench):
    found = bench.choices(90, ["1b", "8b"])

    def names(only):
        return [choice.name for choice in bench.selected(found, only)]

    assert names(None) == [choice.name for choice in found]
    assert names("int4:16") == ["int4:16"]
    assert set(names("linear:1")) == {choice.name for choice in found if choice.kind == "linear" and 1 in choice.rows}
    assert names("attention_prompt:128,attention_prompt") == ["attention_prompt:128", "attention_prompt:64"]
    with pytest.raises(ValueError, match="--only linear:3: use attention_generated, "):
        names("linear:3")


def test_list_needs_no_gpu():
    done = run_script("--list", "--only", "linear,attention_generated")
    assert done.returncode == 0, done.stderr
    assert "LinearTile(64, 16, " in done.stdout and "current; timed on 1b qkv x1, " in done.stdout
    assert "attention_generated:128" in done.stdout and "int4" not in done.stdout


def test_without_a_gpu_nothing_is_tuned():
    done = run_script()
    assert done.returncode == 2
    assert "PyTorch finds no GPU here; --list prints the candidates" in done.stderr


def test_the_whole_run_in_the_interpreter(tmp_path):
    path = tmp_path / "tune.json"
    only = "linear:64x16,gated:64x16,int4:16,attention_prompt,attention_generated"
    arguments = ["tune", "--smoke", "--only", only, "--minutes", "30", "--json", str(path)]
    done = run_script(*arguments, module="tests.bench.dry_run", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert [choice["choice"].partition(":")[0] for choice in result["choices"]] == [
        part.partition(":")[0] for part in only.split(",")
    ]
    for choice in result["choices"]:
        assert choice["gain"] == "as it is"
        assert [tried["dropped"] for tried in choice["results"]] == [None, None, None], choice
        assert all(us == 2.0 for tried in choice["results"] for us in tried["us"].values())
    assert "    Int4Tile(" in done.stdout


def test_help_has_examples(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    assert stopped.value.code == 0
    assert "python bench/tune.py --list" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "70b"], "--models 70b: use 1b, 8b, smoke"),
        (["--minutes", "0"], "give more than 0"),
        (["--list", "--only", "softmax"], "--only softmax: use attention_generated"),
    ],
)
def test_wrong_usage(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err
