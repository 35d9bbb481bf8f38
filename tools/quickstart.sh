#!/usr/bin/env bash
# From a fresh clone to the paper's comparison in a few minutes on a laptop CPU: installs what is missing, builds, packs longhand's own sources into a
# shard, trains a small Mamba-2 on short sequences, post-trains it with State Passing and, as a control, without, reads all three far beyond the training length, and
# writes runs/quickstart-report.html: beyond the training length the base and the control fail, and State Passing does not.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
step() { echo; echo "== $1   [$(( $(date +%s) - started )) s]"; }

step "1/6 install what is missing"
tools/install_dependencies.sh
installed=$(date +%s)

step "2/6 build"
cmake --preset cpu >/dev/null
cmake --build --preset cpu --target longhand -- -j "$(nproc)"
longhand=$PWD/build/cpu/longhand

step "3/6 pack the sources and docs into shards"
rm -rf runs/quickstart-base runs/quickstart-state-passing runs/quickstart-zero runs/quickstart-data
mkdir -p runs/quickstart-data
"$longhand" data pack . --include '*.h' --include '*.cpp' --include '*.cu' --include '*.md' --include '*.sh' --include '*.toml' --exclude 'build/*' --exclude 'runs/*' \
  --set-name longhand --out runs/quickstart-data/train.jsonl.zst --split-val 0.15 --val-out runs/quickstart-data/val.jsonl.zst

step "4/6 train a small Mamba-2 from zero states"
"$longhand" train tools/recipes/quickstart-base.toml

step "5/6 post-train it with State Passing, and from zero states as before"
"$longhand" train tools/recipes/quickstart-state-passing.toml
"$longhand" train tools/recipes/quickstart-zero.toml

step "6/6 perplexity by position, to 32 times the training length, and the report"
for run in quickstart-base quickstart-state-passing quickstart-zero; do
  "$longhand" eval ppl --model runs/$run --data runs/quickstart-data/val.jsonl.zst --context 4096 --packed --sequences 32 --out runs/$run/eval/ppl-val.csv
done
"$longhand" report runs/quickstart-base runs/quickstart-state-passing runs/quickstart-zero --out runs/quickstart-report.html

echo
echo "done in $(( $(date +%s) - installed )) s after the installs; open runs/quickstart-report.html"
