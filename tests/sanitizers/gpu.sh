#!/usr/bin/env bash
# compute-sanitizer over every test case that uses a GPU, each in a process of its own, many at once, and over training and generation of a
# small model of each family. Ends with a line a case: tool, verdict, seconds, case; reports are in OUT.
# Usage: tests/sanitizers/gpu.sh BUILD OUT [TOOL..]     BUILD: folder of the programs; TOOL: memcheck, synccheck, racecheck, initcheck
#   JOBS   processes at once, spread over the GPUs (the cores)      LIMIT  seconds a case (120)
#   ONLY   a pattern of the cases (all)                             TOTAL  seconds in all, after which no case begins (3600)
#   EVERY  under racecheck a parity test makes every 53rd of its comparisons; EVERY=1 makes all
# Verdicts: clean; skipped: the case says why, or used no GPU; explained: reports of the kinds (c) and (e) of docs/trust.md alone; REPORTS;
# FAILED: a check of the test; CUT: by its time; NOT RUN; TOOL BROKE OFF. The exit code is 0 where there are only clean, skipped and
# explained cases.
set -u
build=$(realpath "$1") OUT=$2; shift 2
tools=${*:-memcheck synccheck racecheck initcheck}
reports='Error|Warning|Invalid|Uninitialized|Barrier|Race|Program|Host|Leaked'
export build OUT reports LIMIT=${LIMIT:-120} LONGHAND_EXACT=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ids=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $(($(nvidia-smi -L | grep -c '^GPU') - 1)))}
gpus=$(tr , '\n' <<<"$ids" | grep -c .); jobs=${JOBS:-$(nproc)}; export ids END=$(($(date +%s) + ${TOTAL:-3600}))
mkdir -p "$OUT/sessions"; OUT=$(realpath "$OUT"); : > "$OUT/summary"

# A case has a session of its own, so that nothing of it outlives it, whatever groups of processes the tool makes.
end_session() {
  local file=$OUT/sessions/$1 session _
  if [ -s "$file" ]; then
    session=$(cat "$file")
    pkill -KILL -s "$session" && for _ in {1..50}; do pgrep -s "$session" > /dev/null || break; sleep 0.1; done  # a GPU is let go of slowly
  fi
  rm -f "$file"
}
end_all() {
  local file
  for file in "$OUT"/sessions/*; do [ -e "$file" ] && end_session "$(basename "$file")"; done
}
export -f end_session
trap end_all EXIT
trap 'exit 1' INT TERM

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
  local tool=$1 program=$2 name=$3 file id begin=$SECONDS left=$((END - $(date +%s))) rc verdict all known no_gpu=0 words options=()
  if [ "$left" -le 1 ]; then
    echo "$tool | NOT RUN | 0 s | $program: $name | " >> "$OUT/summary"
    return 0
  fi
  id=$tool-$program-$(tr -c 'a-zA-Z0-9\n' _ <<<"$name" | cut -c1-60)-$$
  file=$OUT/$id.txt
  case $tool in
    memcheck)
      options=(--leak-check full)
      [[ $name == 'a graph replays what was queued'* ]] && options+=(--report-api-errors no);;  # it provokes some
    synccheck) options=(--kernel-name-exclude kns=ssd_chunk_bwd_warpgroups);;  # (b) of docs/trust.md
  esac
  [ "$tool" = racecheck ] && export LONGHAND_PARITY_EVERY=${EVERY:-53}
  # A minute and more otherwise.
  [[ $tool != racecheck && $name =~ gated_rmsnorm.*agrees|'a step replayed' ]] && export LONGHAND_PARITY_EVERY=7
  case $program in
    train)
      words="$build/longhand train $name.toml --name $tool-$name --device cuda --set initial_state="
      case $name in mamba1) words+=tbtt;; mamba2) words+=state-passing;; gla) words+=fitted-noise;; esac
      [ "$tool" = initcheck ] && words+=' --set train.graph=false';;  # (e) of docs/trust.md
    generate) words="$build/longhand generate --model runs/base-$name --prompt abcdefg --prompt a --max-tokens 6 --device cuda";;
    doctor) words="$build/longhand doctor --device cuda";;
    *) words="$build/$program";;
  esac
  read -ra words <<<"$words"
  [ -x "$build/$program" ] && words+=("-tc=${name//,/?}")
  setsid --wait bash -c 'echo $$ > "$1"; shift; exec timeout -k 3 "$@"' _ "$OUT/sessions/$id" $((left < LIMIT ? left : LIMIT)) \
    compute-sanitizer --tool "$tool" "${options[@]}" --print-limit 10000 --error-exitcode 99 "${words[@]}" > "$file" 2>&1
  rc=$?
  end_session "$id"
  all=$(grep -cE "^========= ($reports)" "$file")
  # (c) of docs/trust.md: a race in a kernel of cuBLAS, or the hand-over of sums in SSD's backward. (e): what a graph reads, which a node of
  # it may have filled or copied. And what a device keeps to the end of the process, which is no loss: its workspace, once, and the pages
  # of its arena.
  known=$(awk -v tool="$tool" -v reports="^========= ($reports)" '$0 ~ reports {known += cause; cause = 0}
    tool == "racecheck" && /libcublas|nvjet|ssd_chunk_bwd_warpgroups/ {cause = 1}
    tool == "initcheck" && /cuGraphLaunch/ {cause = 1}
    /^========= Leaked 67,108,864 bytes/ && !workspace {workspace = cause = 1}
    /^========= Leaked 33,554,432 bytes/ {page = 1; next}
    page && /cuMemSetAccess/ {cause = 1}
    /^=========  *$/ {page = 0} END {print known + cause}' "$file")
  [ "$tool" = memcheck ] && [ "$all" -eq "$known" ] && [ "$rc" = 99 ] && rc=0
  [ -x "$build/$program" ] && grep -q 'terminated before first instrumented API call' "$file" && no_gpu=1 rc=0
  verdict=REPORTS
  case $rc in
    0)
      verdict=clean
      if [ -x "$build/$program" ]; then
        grep -qE 'test cases: +1 \| +1 passed' "$file" || verdict=FAILED  # a case whose name was not found, too
        { [ "$no_gpu" = 1 ] || grep -q 'skipped:' "$file"; } && [ $verdict = clean ] && verdict=skipped
      fi;;
    124 | 137) verdict=CUT;;
    *)
      if grep -q 'Internal Sanitizer Error' "$file"; then verdict="TOOL BROKE OFF"
      elif [ "$all" -eq 0 ]; then verdict=FAILED
      elif [ "$known" -eq "$all" ] && ! grep -q 'were not printed' "$file"; then verdict=explained; fi;;
  esac
  echo "$tool | $verdict | $((SECONDS - begin)) s | $program: $name | $(grep -aE 'SUMMARY' "$file" | tail -n 1 | tr -d '=')" >> "$OUT/summary"
  [ "$verdict" = clean ] && rm -f "$file"
  return 0
}
export -f one

# Cases that take long go first, those of racecheck last: it needs minutes for some, and the other tools should have had their turn.
list() {
  local tool program
  for tool in $tools; do
    for program in ops_test models_test train_test eval_test core_test; do
      [ -x "$build/$program" ] || continue
      "$build/$program" -ltc | grep -E 'CUDA|GPU|token step|on every device|with a graph|as a graph|survives gates|not finite|of the masters|device memory' |
        grep -v '2^31' | sed "s/^/$tool|$program|/"
    done
    for program in train generate; do for family in mamba1 mamba2 gla; do echo "$tool|$program|$family"; done; done
    echo "$tool|doctor|known answers"
  done
}
list | grep -E "${ONLY:-.}" | awk -F'|' '{late = $1 == "racecheck"; long = /gives the same bits|gated_rmsnorm|Mamba|joined|replayed|every level/
  print late "|" 1 - long "|" $0}' | sort -t'|' -k1,2 -s | cut -d'|' -f3- > "$OUT/list"
[ -s "$OUT/list" ] || { echo "error: no case has this name" >&2; exit 2; }
awk -v gpus="$gpus" '{print (NR % gpus + 1) "|" $0}' "$OUT/list" |
  xargs -P "$jobs" -d '\n' -I{} bash -c 'IFS="|" read -r gpu tool program name <<<"$1"
    CUDA_VISIBLE_DEVICES=$(cut -d, -f"$gpu" <<<"$ids") one "$tool" "$program" "$name"' _ {}

sort "$OUT/summary"
echo "$(wc -l < "$OUT/summary") of $(wc -l < "$OUT/list") cases"
cut -d'|' -f1,2 "$OUT/summary" | sort | uniq -c
[ "$(wc -l < "$OUT/summary")" -eq "$(wc -l < "$OUT/list")" ] && ! grep -qE '\| (REPORTS|FAILED|CUT|NOT RUN|TOOL BROKE OFF) \|' "$OUT/summary"
