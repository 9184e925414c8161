#!/usr/bin/env bash
# What to run in the first quarter of an hour on a GPU: two calls, each step under its own limit.
#
#   benchmarks/gpu_day.sh 1 FOLDER           # at most 420 s: tests, the toy, tables (a), (b), (c)
#   benchmarks/gpu_day.sh 2 FOLDER           # at most 180 s: table (b) with --compile
#   benchmarks/gpu_day.sh 1 FOLDER --quick   # anywhere: the same steps of the toy's networks
#
# FOLDER gets, as it comes, what each step prints (NAME.txt) and its errors (NAME.log), and in
# steps.txt its exit code and seconds; 124 is a step over its limit, which costs no other. Of
# packages that the machine lacks, put wheels into wheels/ beside benchmarks/.
set -uo pipefail
part=${1:-} quick=${3:-}
out=$(mkdir -p "${2:-}" && cd "$2" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=expandable_segments:True

step() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 begin=$SECONDS left=$((total - SECONDS))
  shift 2
  limit=$((limit < left ? limit : left))
  if ((limit < 5)); then
    echo "$name: no time left" | tee -a "$out/steps.txt"
    return
  fi
  timeout -s INT -k 20 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log"
  echo "$name: exit code $?, $((SECONDS - begin)) s" | tee -a "$out/steps.txt"
}

toy=(prdp.py --preset toy --epochs 2)
size=(--steps 1)
if [ "$quick" ]; then
  toy+=(--prompts-per-epoch 1 --images-per-prompt 2 --ddpm-steps 3)
  size=(--quick)
fi
epoch=("$python" benchmarks/epoch.py "${size[@]}" --only)

case $part in
1)
  total=400 # and 20 to end what does not end
  step machine 10 bash -c 'nvidia-smi; df -h /tmp /dev/shm; nproc; free -g'
  if compgen -G "wheels/*.whl" >/dev/null; then
    step install 40 "$python" -m pip install --no-deps --no-index wheels/*.whl
  fi
  step tests 100 "$python" -m pytest -m gpu -v
  step toy 30 "$python" "${toy[@]}" --dtype fp16 --out "$out/toy"
  step toy_compiled 60 "$python" "${toy[@]}" --dtype fp16 --compile --out "$out/toy_compiled"
  step kernels 60 "$python" benchmarks/kernel_speed.py ${quick:+--quick}
  step peers_eager 80 "${epoch[@]}" epoch --dtypes fp16 --loops peers eager
  step tf32 40 "${epoch[@]}" epoch --dtypes tf32 --loops eager
  step noise 100 "${epoch[@]}" noise --dtypes fp16
  ;;
2)
  total=160
  step compiled 160 "${epoch[@]}" epoch --dtypes fp16 --loops compiled
  ;;
*)
  echo "benchmarks/gpu_day.sh: call 1 or 2, a folder, and --quick or nothing" >&2
  exit 2
  ;;
esac
