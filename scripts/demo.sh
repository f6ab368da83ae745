#!/usr/bin/env bash
# DreamBooth on the embedded tiny model: fine-tune on five pictures of a penguin, then draw it in other places.
# Leaves output/demo/<time>/demo.png: the five pictures, and the answers before and after to the same prompts and seeds;
# and report.html: how the training went.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt
exec .venv/bin/python scripts/demo.py "$@"
