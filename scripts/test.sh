#!/usr/bin/env bash
# Lint and tests in .venv (made where there is none). Arguments go to pytest: bash scripts/test.sh -k tokenizer
# Two processes with a thread each: compiling, most of the time, takes one thread only.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-test.txt
# Only its tokenizer is compared with: without what it depends on, which is another PyTorch vision stack.
.venv/bin/python -c 'from importlib.metadata import version; assert version("open_clip_torch") == "3.3.0"' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
# Its own code is compared with; the convolutions come from the test.
.venv/bin/python -c 'from importlib.metadata import version; assert version("lpips") == "0.1.4"' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lpips==0.1.4
# What people look at is tested in a Chromium, of the system's packages. MindSpore's compiler takes and frees small
# blocks of memory by the million, at which Google's allocator is better than the C library's: in a process that has
# compiled much, tests take two thirds of the time.
allocator() { { PATH=$PATH:/sbin:/usr/sbin ldconfig -p || true; } | sed -n '/libtcmalloc_minimal\.so\.4$/s/.* => //p'; }
browser() { command -v chromium chromium-browser google-chrome google-chrome-stable || true; }
wanted=()
[ -n "$(browser)" ] || wanted+=(chromium)
[ -n "$(allocator)" ] || wanted+=(libtcmalloc-minimal4)
[ ${#wanted[@]} -eq 0 ] || apt-get update -qq >/dev/null || true
for package in "${wanted[@]}"; do
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
    echo "scripts/test.sh: apt-get cannot install $package: without a browser tests fail, without tcmalloc they take longer" >&2
done
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
export OMP_NUM_THREADS=1
# MindSpore's own convolutions, which the layers of other devices have: beyond AVX2 a step takes ten times as long
export ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA:-AVX2}
preloaded=$(allocator)
export LD_PRELOAD=${LD_PRELOAD:-$preloaded}
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
