#!/usr/bin/env bash
# One experiment of the length-generalisation laboratory: trains a base of a recipe lab-NAME.toml, post-trains it from every initial state, measures all of them far beyond the
# training length, and writes runs/lab-NAME.html. A few minutes on one GPU. What is there already is not done again; runs/lab-NAME* holds it.
#   tools/laboratory.sh lab-mamba2 PILE/train PILE/val.jsonl.zst 20B_tokenizer.json [--set KEY=VALUE ...]     settings are for the base
# LONGHAND names the program (default build/cuda/longhand, else build/cpu/longhand), SEED the base's seed (default 1), STATES the initial states, SEQUENCES how many are read at
# 64 times the training length (default 48); TOGETHER=1 measures a run while the next one trains, which takes their memory together. Families on devices of their own:
#   for i in 1 2; do CUDA_VISIBLE_DEVICES=$((i - 1)) tools/laboratory.sh lab-mamba$i PILE/train PILE/val.jsonl.zst 20B_tokenizer.json & done; wait
set -euo pipefail
if [ $# -lt 4 ]; then sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; fi
recipes=$(cd "$(dirname "$0")/recipes" && pwd)
name=$1 train=$2 val=$3 tokenizer=$4
shift 4
longhand=${LONGHAND:-build/cuda/longhand}
[ -x "$longhand" ] || longhand=build/cpu/longhand
seed=${SEED:-1}
base=$name; [ "$seed" = 1 ] || base=$name-seed$seed
data=(--set data.files="$train" --set data.val_files="$val" --set data.tokenizer="$tokenizer")
length=256
runs=() measuring=()

# measure RUN: prints its three tables, which also lie in RUN/eval.
measure() {
  local at=(--model "runs/$1" --data "$val" --documents packed --threads 2)
  echo "== $1"
  "$longhand" eval ppl "${at[@]}" --context $((64 * length)) --sequences "${SEQUENCES:-48}"
  "$longhand" eval remember "${at[@]}" --context $((4 * length)) --sequences 64
  "$longhand" eval state "${at[@]}" --context $((64 * length)) --sequences 16
}

# done_with RUN: measures it, now or in the background.
done_with() {
  runs+=("runs/$1")
  if [ "${TOGETHER:-0}" = 1 ]; then
    measure "$1" >"runs/$1/measures.txt" 2>&1 &
    measuring+=($!)
  else
    measure "$1" 2>&1 | tee "runs/$1/measures.txt"
  fi
}

[ -d "runs/$base/checkpoints" ] || "$longhand" train "$recipes/$name.toml" --name "$base" "${data[@]}" --set seed="$seed" "$@"
done_with "$base"
for state in ${STATES:-zero random-noise fitted-noise state-passing tbtt}; do
  extra=()
  [ "$state" != tbtt ] || extra=(--set data.arrangement=streams)
  run=$base-$state
  [ -d "runs/$run/checkpoints" ] || "$longhand" train "$recipes/lab-post.toml" --name "$run" --init-from "runs/$base" "${data[@]}" --set initial_state="$state" --set seed=$((seed + 100)) "${extra[@]}"
  done_with "$run"
done
failed=0
for i in "${!measuring[@]}"; do
  wait "${measuring[$i]}" || failed=1
  cat "${runs[$i]}/measures.txt"
done
[ "$failed" = 0 ] || { echo "laboratory: a measurement failed" >&2; exit 1; }
"$longhand" report "${runs[@]}" --out "runs/$base.html"
