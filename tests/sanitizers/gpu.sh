#!/usr/bin/env bash
# compute-sanitizer over every test case that uses a GPU, each in a process of its own, many at once, and over training and generation of a
# small model of each family. Ends with a line a case: tool, verdict, seconds, case; reports are in OUT.
# Usage: tests/sanitizers/gpu.sh BUILD OUT [TOOL..]     BUILD: folder of the programs; TOOL: memcheck, synccheck, racecheck, initcheck
#   JOBS   processes at once, spread over the GPUs (the cores)      LIMIT  seconds a case (120)
#   ONLY   a pattern of the cases (all)                             TOTAL  seconds in all, after which the rest is cut off (3600)
# Verdicts: clean; skipped: the case says why; explained: reports of kind (c) of docs/trust.md alone; REPORTS; FAILED: a check of the
# test; CUT: by its time; TOOL BROKE OFF.
set -u
build=$(realpath "$1") OUT=$2; shift 2
tools=${*:-memcheck synccheck racecheck initcheck}
export build OUT LIMIT=${LIMIT:-120} LONGHAND_EXACT=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ids=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $(($(nvidia-smi -L | grep -c '^GPU') - 1)))}
gpus=$(tr , '\n' <<<"$ids" | grep -c .); jobs=${JOBS:-$(nproc)}; export ids END=$(($(date +%s) + ${TOTAL:-3600}))
mkdir -p "$OUT"; OUT=$(realpath "$OUT"); : > "$OUT/summary"

# Models of one layer of width 256: three steps of 2 rows of 160 tokens with a strategy that carries states or adds noise, and a checkpoint.
runs=$OUT/runs; mkdir -p "$runs"; cd "$runs" || exit 1
head -c 60000 /dev/zero | tr '\0' 'x' | fold -w 300 | awk '{print "{\"text\": \"" $0 NR * NR * 7919 "\"}"}' > text.jsonl
recipe() {
  printf 'seed = 5\n[model]\nfamily = "%s"\nd_model = 256\nn_layer = 1\n' "$1"; [ "$1" = gla ] && printf 'num_heads = 2\n'
  printf '[data]\nfiles = ["text.jsonl"]\ntokenizer = "bytes"\n'; [ "$1" = mamba1 ] && printf 'arrangement = "streams"\n'
  printf '[train]\nsteps = 3\nbatch_size = 2\nlength = 160\n[optimizer]\nlr = 1e-3\n'
}
for family in mamba1 mamba2 gla; do
  recipe $family > $family.toml
  "$build/longhand" train $family.toml --name base-$family --device cuda > base-$family.txt 2>&1 || { tail -n 3 base-$family.txt; exit 1; }
done

# A process: TOOL PROGRAM CASE
one() {
  local tool=$1 program=$2 name=$3 file begin=$SECONDS left=$((END - $(date +%s))) rc verdict all known words options=()
  [ "$left" -gt 1 ] || return 0
  file=$OUT/$tool-$program-$(tr -c 'a-zA-Z0-9\n' _ <<<"$name" | cut -c1-60).txt
  case $tool in
    memcheck) options=(--leak-check no);;
    synccheck) options=(--kernel-name-exclude kns=ssd_chunk_bwd_warpgroups);;  # (b) of docs/trust.md
  esac
  [ "$tool" = racecheck ] && export LONGHAND_PARITY_EVERY=${EVERY:-53}
  [[ $tool =~ memcheck|synccheck && $name == gated_rmsnorm*agrees* ]] && export LONGHAND_PARITY_EVERY=7  # 50 s otherwise
  case $program in
    train)
      words="$build/longhand train $name.toml --name $tool-$name --device cuda --set initial_state="
      case $name in mamba1) words+=tbtt;; mamba2) words+=state-passing;; gla) words+=fitted-noise;; esac;;
    generate) words="$build/longhand generate --model runs/base-$name --prompt abcdefg --prompt a --max-tokens 6 --device cuda";;
    doctor) words="$build/longhand doctor --device cuda";;
    *) words="$build/$program";;
  esac
  read -ra words <<<"$words"
  [ -x "$build/$program" ] && words+=("-tc=${name//,/?}")
  timeout -k 3 $((left < LIMIT ? left : LIMIT)) compute-sanitizer --tool "$tool" "${options[@]}" --print-limit 200 --error-exitcode 99 "${words[@]}" > "$file" 2>&1
  rc=$?
  all=$(grep -cE '^========= (Error|Warning|Invalid|Uninitialized|Barrier|Race|Program)' "$file")
  # (c) a race in a kernel of cuBLAS, or the hand-over of sums in SSD's backward
  known=$(awk -v tool="$tool" '/^========= (Error|Warning|Invalid|Uninitialized|Barrier|Race)/ {if (cause) ++known; cause = 0}
    tool == "racecheck" && /libcublas|nvjet|ssd_chunk_bwd_warpgroups/ {cause = 1} END {print known + (cause ? 1 : 0)}' "$file")
  verdict=REPORTS
  case $rc in
    0)
      verdict=clean
      if [ -x "$build/$program" ]; then
        grep -qE 'test cases: +1 \| +1 passed' "$file" || verdict=FAILED  # a case whose name was not found, too
        grep -q 'skipped:' "$file" && verdict=skipped
      fi;;
    124 | 137) verdict=CUT;;
    *)
      if grep -q 'Internal Sanitizer Error' "$file"; then verdict="TOOL BROKE OFF"
      elif [ "$all" -eq 0 ]; then verdict=FAILED
      elif [ "$known" -eq "$all" ]; then verdict=explained; fi;;
  esac
  echo "$tool | $verdict | $((SECONDS - begin)) s | $program: $name | $(grep -aE 'SUMMARY' "$file" | tail -n 1 | tr -d '=')" >> "$OUT/summary"
  [ "$verdict" = clean ] && rm -f "$file"
  return 0
}
export -f one

# Cases that take long go first.
list() {
  local tool program
  for tool in $tools; do
    for program in ops_test models_test train_test eval_test core_test; do
      [ -x "$build/$program" ] || continue
      "$build/$program" -ltc | grep -E 'CUDA|GPU|token step|on every device|with a graph|as a graph' | grep -v '2^31' | grep -v 'and a CPU has none' |
        sed "s/^/$tool|$program|/"
    done
    for program in train generate; do for family in mamba1 mamba2 gla; do echo "$tool|$program|$family"; done; done
    echo "$tool|doctor|known answers"
  done
}
list | grep -E "${ONLY:-.}" | awk -F'|' '{long = ($1 == "racecheck") * 2 + /gives the same bits|gated_rmsnorm|Mamba|joined|replayed|every level/; print long "|" $0}' |
  sort -t'|' -k1,1nr -s | cut -d'|' -f2- > "$OUT/list"
awk -v gpus="$gpus" '{print (NR % gpus + 1) "|" $0}' "$OUT/list" |
  xargs -P "$jobs" -d '\n' -I{} bash -c 'IFS="|" read -r gpu tool program name <<<"$1"
    CUDA_VISIBLE_DEVICES=$(cut -d, -f"$gpu" <<<"$ids") one "$tool" "$program" "$name"' _ {}

sort "$OUT/summary"
echo "$(wc -l < "$OUT/summary") of $(wc -l < "$OUT/list") cases ended"
cut -d'|' -f1,2 "$OUT/summary" | sort | uniq -c
! grep -qE '\| (REPORTS|FAILED|CUT|TOOL BROKE OFF) \|' "$OUT/summary"
