#!/usr/bin/env bash
# One experiment of the length-generalisation laboratory: trains a base of a recipe lab-NAME.toml, post-trains it from every initial state, measures all of them far beyond the
# training length, and writes runs/lab-NAME.html. A few minutes on one GPU. What is there already is not done again; runs/lab-NAME* holds it.
#   tools/laboratory.sh lab-mamba2 PILE/train PILE/val.jsonl.zst 20B_tokenizer.json [--set KEY=VALUE ...]     settings are for the base
# LONGHAND names the program (default build/cuda/longhand, else build/cpu/longhand), SEED the base's seed (default 1), STATES the initial states.
set -euo pipefail
if [ $# -lt 4 ]; then sed -n 2,6p "$0" >&2; exit 2; fi
recipes=$(cd "$(dirname "$0")/recipes" && pwd)
name=$1 train=$2 val=$3 tokenizer=$4
shift 4
longhand=${LONGHAND:-build/cuda/longhand}
[ -x "$longhand" ] || longhand=build/cpu/longhand
seed=${SEED:-1}
base=$name; [ "$seed" = 1 ] || base=$name-seed$seed
data=(--set data.files="$train" --set data.val_files="$val" --set data.tokenizer="$tokenizer")
length=256

[ -d "runs/$base" ] || "$longhand" train "$recipes/$name.toml" --name "$base" "${data[@]}" --set seed="$seed" "$@"
runs=("runs/$base")
for state in ${STATES:-zero random-noise fitted-noise state-passing tbtt}; do
  extra=()
  [ "$state" != tbtt ] || extra=(--set data.arrangement=streams)
  run=$base-$state
  [ -d "runs/$run" ] || "$longhand" train "$recipes/lab-post.toml" --name "$run" --init-from "runs/$base" "${data[@]}" --set initial_state="$state" --set seed=$((seed + 100)) "${extra[@]}"
  runs+=("runs/$run")
done
for run in "${runs[@]}"; do
  at=(--model "$run" --data "$val" --documents packed)
  "$longhand" eval ppl "${at[@]}" --context $((64 * length)) --sequences 48
  "$longhand" eval remember "${at[@]}" --context $((4 * length)) --sequences 64
  "$longhand" eval state "${at[@]}" --context $((64 * length)) --sequences 16
done
"$longhand" report "${runs[@]}" --out "runs/$base.html"
