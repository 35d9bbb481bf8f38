#!/usr/bin/env bash
# The length-generalisation laboratory: trains the base of every recipe tools/recipes/NAME.toml named, post-trains it from each initial state (lab-post.toml), measures all of them far
# beyond the training length, and writes runs/NAME.html for each base, runs/PAGE.html with all bases beside their State Passing, and runs/PAGE.md, a table of numbers. Each
# device trains one model at a time; what is there already is not done again, so a laboratory that was interrupted or gets more seeds goes on. A few minutes on two GPUs; for a CPU there is tools/quickstart.sh.
#   tools/laboratory.sh PILE/train PILE/val.jsonl.zst 20B_tokenizer.json lab-mamba1 lab-mamba2 lab-gla
#   PAGE=seeds SEEDS="2 3" STATES="state-passing tbtt" tools/laboratory.sh PILE/train PILE/val.jsonl.zst 20B_tokenizer.json lab-mamba2
# Settings, from the environment:
#   LONGHAND   the program                              (build/cuda/longhand, else build/cpu/longhand)
#   DEVICES    where to work                            (every GPU, cuda:0 cuda:1 .., else cpu)
#   SEEDS      seeds of the bases; S > 1 is run NAME-seedS                                         (1)
#   STATES     initial states to post-train from, ' ' for none  (zero random-noise fitted-noise state-passing tbtt)
#   SEQUENCES  how many are read for the perplexity at 64 training lengths                         (48)
#   PAGE       name of the page and table of all                                                   (laboratory)
#   BASE, POST more settings of the bases' recipes and of lab-post.toml: KEY=VALUE ...
set -euo pipefail
if [ $# -lt 4 ]; then sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; fi
export RECIPES TRAIN=$1 VAL=$2 TOKENIZER=$3 SEQUENCES=${SEQUENCES:-48} BASE=${BASE:-} POST=${POST:-} STARTED=$EPOCHSECONDS
RECIPES=$(cd "$(dirname "$0")/recipes" && pwd)
shift 3
export LONGHAND=${LONGHAND:-build/cuda/longhand}
[ -x "$LONGHAND" ] || LONGHAND=build/cpu/longhand
if [ -z "${DEVICES:-}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); else gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
  DEVICES=cpu
  [ "$gpus" = 0 ] || DEVICES=$(seq -f 'cuda:%g' -s ' ' 0 $((gpus - 1)))
fi
export DEVICES
mkdir -p runs

say() { printf '%4d s  %s\n' $((EPOCHSECONDS - STARTED)) "$*"; }
base_run() { if [ "$2" = 1 ]; then echo "$1"; else echo "$1-seed$2"; fi; }                               # NAME SEED
length_of() { sed -n '/^\[train\]/,/^\[/s/^length *= *\([0-9]*\).*/\1/p' "runs/$1/config.toml"; }        # RUN

# logged RUN COMMAND...: its output goes to runs/RUN.log, the end of it here if it fails.
logged() {
  local log=runs/$1.log
  shift
  "$@" >>"$log" 2>&1 || { echo "laboratory: failed: $*" >&2; tail -n 15 "$log" >&2; return 1; }
}

# measure RUN DEVICE: four tables in runs/RUN/measures. Most of each is starting, so on a GPU they start together.
measure() {
  local run=$1 device=$2 length at jobs=() failed=0
  length=$(length_of "$run")
  at=(--model "runs/$run" --data "$VAL" --documents packed --threads 2 --device "$device")
  one() {
    local more=()
    [ "$1" != state ] || more=(--histograms "$length,$((64 * length))")
    [ -e "runs/$run/measures/$1.csv" ] || logged "$run" "$LONGHAND" eval "$1" "${at[@]}" --context $(($2 * length)) --sequences "$3" "${more[@]}" --out "runs/$run/measures/$1.csv"
  }
  mkdir -p "runs/$run/measures"
  for what in "ppl 64 $SEQUENCES" "remember 4 64" "state 64 16" "forget 16 8"; do
    # shellcheck disable=SC2086
    one $what & jobs+=($!)
    [ "$device" != cpu ] || wait $! || failed=1
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return $failed
}

# train RUN DEVICE RECIPE ARGUMENTS...: once the device has no other training.
train() {
  local run=$1 device=$2 recipe=$3
  shift 3
  [ -d "runs/$run/checkpoints" ] || logged "$run" flock "runs/.$device" "$LONGHAND" train "$RECIPES/$recipe.toml" --name "$run" --device "$device" --set data.files="$TRAIN" --set data.val_files="$VAL" \
    --set data.tokenizer="$TOKENIZER" "$@"
}

# task NAME SEED STATE, the state - for the base itself, on the device of this slot.
task() {
  local name=$1 seed=$2 state=$3 base run device settings=() start=$EPOCHSECONDS
  device=$(cut -d' ' -f$((SLOT % $(wc -w <<<"$DEVICES") + 1)) <<<"$DEVICES")
  base=$(base_run "$name" "$seed")
  if [ "$state" = - ]; then
    run=$base
    for setting in $BASE; do settings+=(--set "$setting"); done
    train "$run" "$device" "$name" --set seed="$seed" "${settings[@]}"
  else
    run=$base-$state
    case $state in
      tbtt) settings=(--set data.arrangement=streams) ;;
      random-noise)                                            # as large as the base's own state after a row
        settings=(--set initial_state_options.sigma="$(awk -F, -v T="$(length_of "$base")" '$1 == T && $2 == "ssm" && $3 == "all" && $4 == "all" { print $7 }' "runs/$base/measures/state.csv")") ;;
    esac
    for setting in $POST; do settings+=(--set "$setting"); done
    train "$run" "$device" lab-post --init-from "runs/$base" --set train.length="$(length_of "$base")" --set initial_state="$state" --set seed=$((seed + 100)) "${settings[@]}"
  fi
  local trained=$EPOCHSECONDS
  measure "$run" "$device"
  say "$run on $device: trained in $((trained - start)) s with waiting, measured in $((EPOCHSECONDS - trained)) s"
}
export -f say base_run length_of logged measure train task

# in_parallel: tasks from stdin, two on each device, one of which measures while the other trains; waits for all, and fails if one has.
in_parallel() { xargs -r -L 1 -P $((2 * $(wc -w <<<"$DEVICES"))) --process-slot-var=SLOT bash -c 'set -euo pipefail; task "$@"' laboratory; }

# row RUN BASE: a line of the table. Perplexities of the ranges that end at T, 32 T and 64 T, and of all of 1..T; effective remembrance with T tokens left; deviation of the state.
row() {
  awk -F, -v run="$1" -v base="$2" -v T="$(length_of "$1")" '
    FNR == 1 { file++; next }
    file <= 2 && $2 <= T { inside[file] += $4 * ($2 - $1 + 1) }
    file <= 2 { ppl[file, $2] = exp($4) }
    file == 3 && $2 == T { remembrance = $4 }
    file == 4 && $2 == "ssm" && $3 == "all" && $4 == "all" { deviation[$1] = $7 }
    END {
      printf "| %s | %.2f | %.2f | %.2f | %.2f | %.3f | %.3f | %.3f | %.3f | %.3f | %.3g | %.3g |\n", run, exp(inside[1] / T), ppl[1, T], ppl[1, 32 * T], ppl[1, 64 * T], ppl[1, 32 * T] / ppl[1, T], ppl[1, 64 * T] / ppl[1, T],
        exp((inside[1] - inside[2]) / T), ppl[1, T] / ppl[2, T], remembrance, deviation[T], deviation[64 * T]
    }' "runs/$1/measures/ppl.spread.csv" "runs/$2/measures/ppl.spread.csv" "runs/$1/measures/remember.csv" "runs/$1/measures/state.csv"
}

names=("$@") page=${PAGE:-laboratory} seeds=${SEEDS:-1} states=${STATES:-zero random-noise fitted-noise state-passing tbtt}
say "on $DEVICES"
for seed in $seeds; do for name in "${names[@]}"; do echo "$name $seed -"; done; done | in_parallel
for seed in $seeds; do for name in "${names[@]}"; do for state in $states; do echo "$name $seed $state"; done; done; done | in_parallel

pairs=()
for seed in $seeds; do for name in "${names[@]}"; do
  base=$(base_run "$name" "$seed")
  runs=("runs/$base")
  for state in $states; do runs+=("runs/$base-$state"); done
  "$LONGHAND" report "${runs[@]}" --out "runs/$base.html"
  [ ! -d "runs/$base-state-passing" ] || pairs+=("runs/$base" "runs/$base-state-passing")
done; done
[ ${#pairs[@]} -lt 4 ] || "$LONGHAND" report "${pairs[@]}" --out "runs/$page.html"
{
  echo '| run | 1 to T | T | 32 T | 64 T | 32 T / T | 64 T / T | beside its base, 1 to T | beside its base, T | EffRem, T left | std at T | std at 64 T |'
  echo '|---|---|---|---|---|---|---|---|---|---|---|---|'
  for seed in $seeds; do for name in "${names[@]}"; do
    base=$(base_run "$name" "$seed")
    row "$base" "$base"
    for state in $states; do row "$base-$state" "$base"; done
  done; done
} | tee "runs/$page.md"
say "done"
