"""llama_fast.kernels.compile_report: what it finds in machine code, and that today's kernels pass.

What records or compiles runs in processes of its own: it makes Triton compile for chips that are not here, for good.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from llama_fast.kernels import compile_report, machine_code
from llama_fast.kernels.machine_code import Row

_ROOT = Path(__file__).resolve().parents[1]
_COMMITTED = sorted((_ROOT / "bench" / "results" / "compile").glob("*/*.json"))
_GOOD = Row(
    arch=80,
    kernel="linear._linear_kernel",
    config={"x_ptr": "*bf16:16", "BLOCK_OUT": 64, "num_warps": 4},
    source="0123456789abcdef",
    uses={"linear": {"8b": [1, 16]}},
    registers=128,
    shared=49152,
    wide_loads=8,
    mma=["HMMA.16816"],
    programs=3,
    dot="bf16",
    bulk=True,
)
_LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function _linear_kernel:
  REG:48 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : _linear_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e700000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;             /* 0x0000000402047981 */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ; /* 0x0000000002077fae */
        /*0030*/                   LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;    /* 0x0000000402047981 */
        /*0040*/              @UP1 LDG.E.64 R4, desc[UR4][R2.64] ;              /* 0x0000000402047981 */
        /*0050*/                   LDGDEPBAR ;                                  /* 0x00000000000079af */
        /*0060*/                   STL.64 [R1], R4 ;                            /* 0x0000000401007387 */
        /*0070*/               @P2 LDL R4, [R1+0x8] ;                           /* 0x0000080001047983 */
        /*0080*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;                /* 0x00000000ff047435 */
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00a0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;        /* 0x0000000a0804723c */
        /*00c0*/                   HMMA.1688.F32.BF16 R4, R8, R10, R4 ;         /* 0x0000000a0804723c */
        /*00d0*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR4] ;  /* 0x0000000a0804723c */
"""


def _python(*arguments):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=_ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)


def _report(*arguments):
    return _python("-m", "llama_fast.kernels.compile_report", *arguments)


def test_usage_is_parsed():
    assert machine_code.parse_usage(_LISTING) == (48, 16)


def test_instructions_are_counted():
    assert machine_code.parse_instructions(_LISTING) == {
        "spills": 2,
        "wide_loads": 3,
        "narrow_loads": 1,
        "mma": ["HGMMA.16", "HMMA.16816", "HMMA.1688", "UTCHMMA"],
    }


def test_source_says_what_is_to_be_expected():
    load = "%x_60 = tt.load %ptrs, %x, %cst_0 : tensor<128x16x!tt.ptr<bf16>> loc(#loc110)\n"
    dot = "%acc = tt.dot %w, %x, %acc_59 : tensor<64x128xbf16> * tensor<128x16xbf16> -> tensor<64x16xf32> loc(#loc1)\n"
    assert machine_code.parse_source(load + dot, 128) == ("bf16", True)
    assert machine_code.parse_source(load + dot, 512) == ("bf16", False)
    assert machine_code.parse_source("%x = tt.load %p : tensor<256x!tt.ptr<f32>>\n", 64) == (None, True)
    assert machine_code.parse_source("%x = tt.load %p : tensor<256x!tt.ptr<i64>>\n", 32) == (None, False)
    assert machine_code.parse_source("%x = tt.load %p : !tt.ptr<f32>\n", 32) == (None, False)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        (80, 32, 0, 4, 16),  # warps
        (80, 32, 0, 1, 32),  # programs
        (80, 255, 0, 8, 1),  # registers
        (80, 128, 0, 4, 4),
        (90, 129, 0, 4, 3),  # 136, as registers come in eights
        (90, 64, 113 * 1024, 4, 2),  # shared memory, one KiB of which is the driver's
        (90, 64, 114 * 1024, 4, 1),
        (89, 32, 0, 4, 12),
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, shared, warps, programs):
    assert machine_code.programs_per_multiprocessor(arch, registers, shared, warps) == programs


def test_a_good_row_passes():
    assert machine_code.violations([_GOOD]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 8}, "a stack frame of 8 bytes"),
        ({"spills": 2}, "2 loads and stores of local memory"),
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory; the chip has 166912"),
        ({"wide_loads": 0, "narrow_loads": 9}, "no 128-bit load among 9"),
        ({"mma": []}, "bf16 matrix product without MMA"),
        ({"dot": "f32"}, "fp32 matrix product by HMMA.16816, which is tf32"),
        ({"programs": 0}, "no program fits a multiprocessor"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
)
def test_what_is_forbidden_is_found(changes, message):
    (line,) = machine_code.violations([_GOOD, dataclasses.replace(_GOOD, **changes)])
    assert line.startswith("sm_80 linear._linear_kernel bf16 (linear 8b; BLOCK_OUT=64 num_warps=4): ")
    assert line.endswith(message)


def test_what_is_allowed_is_not():
    allowed = [{"wide_loads": 0, "bulk": False}, {"dot": "f32", "mma": []}, {"dot": None, "mma": []}]
    assert machine_code.violations([dataclasses.replace(_GOOD, **changes) for changes in allowed]) == []


def test_two_mma_families_in_one_route_are_found():
    other = dataclasses.replace(_GOOD, mma=["HMMA.1688"], config={**_GOOD.config, "BLOCK_OUT": 128})
    (line,) = machine_code.violations([_GOOD, other])
    assert line.startswith("sm_80 linear 8b bf16: 2 MMA families in one route")
    assert "HMMA.1688: sm_80 linear._linear_kernel bf16 (linear 8b; BLOCK_OUT=128 num_warps=4)" in line
    for apart in (
        {"arch": 90, "mma": ["HGMMA.16"]},
        {"dot": "f16"},
        {"uses": {"linear": {"1b": [1, 1]}}},
        {"uses": {"attention prompt": {"8b": [1, 1]}}},
    ):
        assert machine_code.violations([_GOOD, dataclasses.replace(other, **apart)]) == []


@pytest.mark.parametrize("arch", [80, 90])
def test_todays_kernels_pass(arch, tmp_path):
    out = tmp_path / "folder" / "rows.json"
    against = ["--against", *map(str, _COMMITTED)] if _COMMITTED else []
    result = _report("--quick", "--arch", str(arch), "--out", str(out), *against)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    file = json.loads(out.read_text())
    assert (file["bench"], file["arch"], file["model"], file["dtype"]) == ("compile", [arch], ["8b"], ["bf16"])
    assert all(row["registers"] and row["programs"] for row in file["rows"])
    # No kernel is forgotten.
    launchers = {path.stem for path in (_ROOT / "kernels").glob("*.py") if "_kernel[" in path.read_text()}
    assert {row["kernel"].partition(".")[0] for row in file["rows"]} == launchers
    assert f"## sm_{arch} linear._linear_kernel bf16" in result.stdout
    assert f"{len(file['rows'])} configurations" in result.stdout


@pytest.mark.parametrize("path", _COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_file_is_not_stale(path):
    result = _report("--check", str(path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


# A whole file takes minutes to make; what `--check` compares does not need the compiler.
_STALE = """
import json, sys
from pathlib import Path
from llama_fast.kernels.compile_report import _row, changes, main, write
from llama_fast.kernels.launches import model_launches

path = Path(sys.argv[1])
selection = {"arch": [90], "model": ["1b"], "dtype": ["fp16"]}
rows = [_row(launch, uses) for launch, uses in model_launches(90, ["1b"], ["fp16"], quick=True).items()]
write(path, rows, selection | {"quick": True})
assert main(["--check", str(path)]) == 0
assert changes(path, rows) == []
whole = json.loads(path.read_text())

def edited(name, value):
    file = json.loads(json.dumps(whole))
    file["rows"][0][name] = value
    path.write_text(json.dumps(file))

edited("source", "another")
assert main(["--check", str(path)]) == 1
edited("config", {"x_ptr": "*fp16:16"})
assert main(["--check", str(path)]) == 1
edited("registers", 7)
assert main(["--check", str(path)]) == 0
assert len(changes(path, rows)) == 1
path.write_text(json.dumps(whole | {"triton": "0.0"}))
assert changes(path, rows) == []
"""


def test_a_stale_file_is_found(tmp_path):
    result = _python("-c", _STALE, str(tmp_path / "rows.json"))
    assert result.returncode == 0, result.stderr
    for message in ("the source changed", "no longer launched", "not in the file"):
        assert f"{message}: sm_90 rms_norm._rms_norm_kernel" in result.stdout


# The report calls launchers, as its layer may; here the graph itself runs, with the gpu backend on meta tensors.
_GRAPH = """
import torch
from llama_fast.config import LlamaConfig
from llama_fast.kernels.launches import model_launches, recording
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import gpu

config = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)
meta = torch.device("meta")

def integers(*shape):
    return torch.empty(shape, dtype=torch.int64, device=meta)

with torch.inference_mode(), torch.device("meta"):
    model = LlamaLM(config).bfloat16()
    cache = PagedKVCache(config, 8, dtype=torch.bfloat16, device=meta)
    with recording(90) as launches:
        model.prepare(gpu)
        for generated, rows, seqs in ((False, 100, 4), (True, 8, 8)):
            batch = Batch(
                ops=gpu, token_ids=integers(rows), slots=integers(rows), seq_ids=integers(rows),
                query_starts=integers(seqs + 1), seq_lens=integers(seqs), page_table=integers(seqs, 5),
                cos=torch.empty(rows, 64), sin=torch.empty(rows, 64), split_size=cache.split_size, generated=generated,
            )
            logits = model.logits(model.model.run(batch, cache), gpu)
            assert logits.shape == (rows, 128256)
            gpu.log_probs(logits, integers(rows), 3)
known = model_launches(90, ["1b"], ["bf16"])
assert len(set(launches)) > 10
missing = {f"{launch.module} {launch.name} {launch.config}" for launch in launches if launch not in known}
assert not missing, missing
"""


def test_the_graph_launches_nothing_that_the_report_does_not_know():
    result = _python("-c", _GRAPH)
    assert result.returncode == 0, result.stderr


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        compile_report.main(["--help"])
    text = capsys.readouterr().out
    assert "python -m llama_fast.kernels.compile_report --quick" in text
    assert "default: 80,89,90,100; with --quick: 80,90" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "argument --arch: '75' is not one of 80, 89, 90, 100"),
        (["--model", "1b,7b"], "argument --model: '7b' is not one of 1b, 8b, 70b"),
        (["--dtype", ""], "argument --dtype: '' is not one of bf16, fp16, fp32"),
        (["--jobs", "0"], "argument --jobs: 0 is not a positive number"),
        (["--check", "nowhere.json"], "no file nowhere.json"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_report.main(arguments)
    text = capsys.readouterr().err
    assert text.startswith("usage: python -m llama_fast.kernels.compile_report")
    assert message in text


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "INTERPRETED", True)
    with pytest.raises(SystemExit, match="2"):
        compile_report.main(["--quick"])
    message = "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it"
    assert message in capsys.readouterr().err
