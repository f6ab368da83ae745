"""The benchmark and the profile at a miniature size; ours in a profile goes into the right groups."""

import json
import subprocess
import sys

import bench
import profile_step
from bench_ours import group_of
from conftest import ROOT


def test_bench_writes_figures_of_both_sides(tmp_path):
    file = tmp_path / "bench.json"
    command = [
        sys.executable,
        ROOT / "scripts/bench/bench.py",
        "--preset=smoke",
        "--figures=lora",
        "--rounds=1",
        f"--json={file}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(file.read_text())
    names = [figure["name"] for figure in report["figures"]]
    assert names == [
        "lora_step", "peak_memory_lora_step", "lora_step_of_full", "peak_memory_lora_step_of_full"
    ]  # fmt: skip
    for figure in report["figures"]:
        assert (
            figure["ours"] > 0 and figure["peer"] > 0 and figure["ratio"] == figure["ours"] / figure["peer"]
        ), figure
        assert figure["name"] in done.stdout and figure["name"] in done.stderr
    assert (
        report["preset"] == "smoke"
        and report["processor"]
        and report["versions"].keys() >= {"mindspore", "torch"}
    )


def test_a_side_that_dies_leaves_a_row_that_says_so(tmp_path):
    preset = bench.presets()["smoke"]
    runs = bench.Runs(preset, 2, tmp_path)
    runs.results["ours", ("task", "decode")] = [{"error": "killed by signal 9"}]
    runs.results["peer", ("task", "decode")] = [
        {"seconds": [1.0, 3.0], "peak_gib": 4.0},
        {"seconds": [2.0], "peak_gib": 5.0},
    ]
    figure, memory = bench.figures("decode", runs)
    assert figure == {
        "name": "vae_decode",
        "ours": None,
        "peer": 2.0,
        "ratio": None,
        "unit": "s",
        "error": "ours: killed by signal 9",
    }
    assert (memory["name"], memory["ours"], memory["peer"]) == ("peak_memory_vae_decode", None, 5.0)
    assert bench.line(figure).endswith("killed by signal 9")


def test_profile_names_operators_and_their_shapes(tmp_path):
    result = bench.run_job("ours", bench.presets()["smoke"], tmp_path, task="profile", steps=2)
    assert "error" not in result, result
    groups = {row["group"]: row["ms"] for row in profile_step.totals(result["operators"], "group")}
    assert groups.keys() >= {"convolution", "matrix product", "attention", "clipping, optimizer"}
    assert all(row["calls"] == 1 for row in result["operators"])
    assert any(
        row["kind"] == "ConvolutionAndBias" and row["shapes"].startswith("[2, 4, 16, 16]")
        for row in result["operators"]
    )
    assert group_of("Softmax", "Default/a/softmax_attention-SoftmaxAttention/Softmax-op0") == "attention"
