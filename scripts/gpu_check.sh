#!/usr/bin/env bash
# Check MiniGPT on a card within ten minutes, the most important first, and print one table.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() {
  cat <<'END'
usage: scripts/gpu_check.sh [--quick] [NUMBER ...]

Runs the tests that need a GPU, then the benchmark of the 125m size; with numbers only those lines.

  --quick   on a machine without a GPU: run what of each line a CPU can show, in small, and name
            the tests of each line that need a GPU, with the number of their cases

The environment's PYTHON names the interpreter (.venv/bin/python).
END
}

QUICK= CHOSEN=()
for argument in "$@"; do
  case $argument in
    --quick) QUICK=1 ;;
    -h | --help) usage; exit 0 ;;
    [1-9]) CHOSEN+=("$argument") ;;
    *) usage >&2; exit 2 ;;
  esac
done
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=600 # seconds of all lines together
LOG=$(mktemp) RESULTS=$(mktemp) LEFT_OUT=$(mktemp)
trap 'rm -f "$LOG" "$RESULTS" "$LEFT_OUT"' EXIT
export OMP_NUM_THREADS=1
if [[ ! $QUICK ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: PyTorch finds no GPU here; --quick runs what a CPU can show." >&2
  exit 2
fi

NUMBER=0 STATUS=0

# What a benchmark has to say of a card; its table calls a ratio by the same name, with an x.
figures() {
  awk '$1 ~ /^(useful_tokens_per_s|ratio|gemm_peak_fraction|mfu)$/ && $2 !~ /x$/ {
    printf "%s%s %s", (n++ ? ", " : ""), $1, $2
  }' "$LOG"
}

# Whether the line with this number is to be run.
is_chosen() {
  [[ ${#CHOSEN[@]} -eq 0 || " ${CHOSEN[*]} " == *" $NUMBER "* ]]
}

# line NAME COMMAND...: run a command as the next line of the table, in the time that is left.
line() {
  local name=$1 start=$SECONDS result
  shift
  NUMBER=$((NUMBER + 1))
  is_chosen || return 0
  if [[ $1 == cuda-only ]]; then
    result="skipped: CUDA only"
  elif [[ ! $QUICK && $SECONDS -ge $LIMIT ]]; then
    result="skipped: no time left" STATUS=1
  elif timeout $((QUICK ? 3600 : LIMIT - SECONDS)) "$@" >"$LOG" 2>&1; then
    if [[ $name == benchmark* ]]; then
      cat "$LOG" >&2
      result=$(figures)
    else
      result=$(grep -v '^ *$' "$LOG" | tail -n 1)
    fi
  else
    result="FAILED" STATUS=1
    tail -n 40 "$LOG" >&2
  fi
  printf '| %s. %s | %s | %d |\n' "$NUMBER" "$name" "$result" $((SECONDS - start)) |
    tee -a "$RESULTS" >&2
}

# tests NAME ON_A_GPU ON_A_CPU: test files or functions that show a line; "" where a CPU shows nothing.
tests() {
  local chosen=$2 marked=gpu
  [[ $QUICK ]] && chosen=$3 marked="not gpu"
  if [[ ! $chosen ]]; then
    line "$1" cuda-only
  else
    # shellcheck disable=SC2086  # several paths
    line "$1" "$PYTHON" -m pytest --no-header -W ignore -m "$marked" $chosen
  fi
  if [[ $QUICK ]] && is_chosen; then
    # shellcheck disable=SC2086  # several paths
    "$PYTHON" -m pytest --collect-only --no-header -W ignore -m gpu $2 | grep :: | sed 's/\[.*//' | uniq -c |
      while read -r cases name; do echo "$NUMBER. $name ($cases)"; done >>"$LEFT_OUT"
  fi
}

bench() {
  local sizes=(--size 125m --max-length 1024 --batch-size 96 --repeats 1)
  [[ $QUICK ]] && sizes=(--size 26m --max-length 64 --batch-size 2 --repeats 1 --seconds 1 --steps 2)
  line "benchmark: pretrain ${sizes[*]}" \
    "$PYTHON" scripts/bench/train.py --stage pretrain --data data/pretrain.jsonl "${sizes[@]}"
}

unit=tests/unit stages=tests/stages distributed=tests/distributed
tests "kernels equal fp32" "$unit/accel/test_gpu_attention.py $unit/accel/test_linear_loss.py" "$unit/accel/test_cpu_attention.py"
tests "the stages' losses are the CPU's" \
  "$stages/test_gpu.py::test_losses_are_those_of_the_cpu $stages/test_gpu.py::test_bf16_trains_alike" \
  "$stages/test_golden.py"
tests "fp16's gradient norm is fp32's" \
  "$stages/test_gpu.py::test_fp16_measures_the_gradients_of_fp32" \
  "$stages/test_precision.py::test_fp16_takes_the_steps_of_fp32"
tests "starts and added vocabulary rows are the CPU's" \
  "$stages/test_equal_starts.py" "$stages/test_equal_starts.py"
tests "no new graph after the compiler's warm-up" "$unit/accel/test_compiled_layers.py" \
  "$stages/test_compiled_runs.py::test_no_graph_is_new_after_the_first_step"
tests "exact resume with deterministic kernels" \
  "$stages/test_gpu.py::test_a_deterministic_run_goes_on_exactly" \
  "$stages/test_gpu.py::test_a_deterministic_run_goes_on_exactly"
tests "NCCL with one process (DDP, FSDP)" \
  "$distributed/test_one_process.py $distributed/test_fsdp1.py" "$distributed/test_one_process.py"
tests "the hardware is found, compiled runs go on" \
  "$stages/test_gpu.py::test_the_hardware_is_found $stages/test_gpu.py::test_a_compiled_run_goes_on_where_it_was" ""
bench

printf '\n| line | result | seconds |\n|---|---|---|\n'
cat "$RESULTS"
if [[ -s $LEFT_OUT ]]; then
  printf '\nNot run, as they need CUDA (cases):\n'
  cat "$LEFT_OUT"
fi
exit $STATUS
