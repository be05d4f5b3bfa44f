#!/usr/bin/env bash
# Every question that needs a GPU, and tests/gpu, in under nine minutes on one H200-class card.
#
#   PYTHONPATH=.gpu-site benchmarks/gpu.sh                 torch 2.11, fbgemm-gpu 1.6.0, torchrec 1.6.1
#   benchmarks/gpu.sh --device cpu                         the same code paths, toy sizes, HOST for DEVICE
#
# Rows go to $OUT/gpu_rows.csv as they come, everything printed to $OUT/gpu.log (OUT unset: a new folder, named at the
# end), so that a run that is cut off keeps what it had. Add the rows to the repository's:
#   tail -n +2 gpu_rows.csv >>benchmarks/data/all_benchmark_data.csv
#
# Settings: PYTHON (python), SECONDS_LEFT (530; 110 on a CPU) for everything, ONLY="floor adam" for some parts alone.
# Each part may take its weight's share of the time that is left when it begins, so what one leaves over the next ones
# have; one that fails or is cut off stops no other. The exit status is 1 if any failed.
#
# What the parts should take, reckoned from PCIe 5 x16 (about 50 GB/s), 20 GB of tables, and imports of 10 s a process.
# Not known: how fast the driver hands out managed pages when they are first touched. 2 GB/s would be 10 s for 20 GB.
# FBGEMM also makes the map of a cached table's rows as a Python list: 3 s or so for 40 million rows, each time.
#   smoke          15 s  imports, the first kernel, a small managed table; if that fails, nothing else is tried
#   floor          25 s  12 GiB touched; 3 row sizes x 17 rounds x 9 ways x 256 MiB
#   rowwise       135 s  20 GB in HBM, 2 x 20 GB managed, 20 GB host-mapped: 25 to 60 s; then 6 groups of providers a
#                        budget, 2.5 s of steps and about 1.5 s of warming each: 24 s a budget, 10% first
#   adam           70 s  10 GB of weights, 31 GB with state, three times, two of them managed: 15 to 50 s; 18 s a budget
#   tests          80 s  about 560 small tests, in 6 processes where pytest-xdist is there
#   prefetch       45 s  20 GB managed, twice; 6 points of 5 rounds x 2 x 16 steps of 5 to 30 ms
#   sgd            35 s  as rowwise, 10% only, fewer providers
#   update_filter  30 s
#   throughput     45 s  whole DLRMs, TorchRec's UVM and cache among them; a third of it is making batches on the host
#   inputs         25 s  5 trainings of 125 steps, for their times: too short for AUC to say much
#   profiler       25 s
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=${2:-}; shift ;;
    *) echo "gpu.sh: unknown option $1; it takes --device cuda or --device cpu" >&2; exit 2 ;;
    esac
    shift
done
case $device in cuda | cpu) ;; *) echo "gpu.sh: --device $device; give cuda or cpu" >&2; exit 2 ;; esac

python=${PYTHON:-python}
command -v "$python" >/dev/null || python=python3
total=${SECONDS_LEFT:-$([ "$device" = cpu ] && echo 110 || echo 530)}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
csv=$out/gpu_rows.csv log=$out/gpu.log memories=$out/memories.json

[ -d .gpu-site ] && PYTHONPATH=$PWD/.gpu-site:${PYTHONPATH:-}
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TQDM_MININTERVAL=10
for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do # fbgemm wants libnvidia-ml.so.1
    [ -e $folder/libnvidia-ml.so.1 ] && export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done

bench() { "$python" -W ignore -m "benchmarks.$1" --device "$device" --csv "$csv" "${@:2}"; }

smoke() {
    [ "$device" = cpu ] || nvidia-smi || true
    "$python" -W ignore - "$device" <<'PY'
import sys, time
import fbgemm_gpu, torch, torchrec
from benchmarks.tbe_exactness import difference
print("torch", torch.__version__, "fbgemm", fbgemm_gpu.__version__, "torchrec", torchrec.__version__)
print("ours against stock, one look-up a bag:", difference("uvm", "rowwise_adagrad", sys.argv[1], dim=16, bag=1))
began = time.perf_counter()
try:
    import examples.metrics  # torchmetrics loads much of what it finds installed; throughput and inputs need it
except Exception as error:
    print(f"examples.metrics does not load: {error!r}")
print(f"metrics took {time.perf_counter() - began:.1f} s to load")
PY
}

tests() {
    # What goes by the clock is not to run beside other tests.
    local beside=tests/gpu/test_hotline_cuda.py::test_second_forward_runs_beside_the_firsts_backward
    local parallel=() rest=tests/gpu/test_calibration_cuda.py
    if ! "$python" -c 'import pytest, hypothesis'; then
        echo "not run: pytest or hypothesis is missing"
        return 77
    fi
    if [ "$device" = cpu ]; then
        "$python" -m pytest -q -p no:cacheprovider --collect-only tests/gpu | tail -n 3
        return
    fi
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
    "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests/gpu --ignore $rest --deselect $beside
    local status=$?
    "$python" -m pytest -q -p no:cacheprovider $rest $beside && return $status
}

if [ "$device" = cuda ]; then
    floor() { bench floor --out "$memories"; }
    rowwise() {
        bench hbm_budget "${measured[@]}" --seconds 2.5 --kernels 16 --optimizers rowwise_adagrad \
            --budgets 0.1 0.25 0.05 0.01
    }
    adam() {
        bench hbm_budget "${measured[@]}" --kernels 16 --optimizers adam --rows 2000000 --budgets 0.1 0.25 \
            --leave-out uvm_host_mapped ours_host_mapped
    }
    sgd() {
        bench hbm_budget "${measured[@]}" --optimizers sgd --budgets 0.1 --search 1.0 \
            --leave-out uvm_host_mapped ours_host_mapped ours_caching
    }
    prefetch() { bench prefetch_overlap --rounds 5; }
    update_filter() {
        bench update_filter --rounds 24 --overhead-rounds 60 --batches 16 --more-dims 128 --shares 0.5 0.75
    }
    throughput() {
        local status=0
        bench throughput --configurations kaggle --max-rows 1000000 --batch 8192 --warmup 60 --test 16384 || status=$?
        # Half a million look-ups a step: on the host they would take longer than all others together.
        bench throughput --configurations embedding_bound --warmup 60 --test 8192 --providers torchrec_fused \
            torchrec_uvm torchrec_uvm_caching_lru torchrec_uvm_caching_lfu ours_counting ours ours_everywhere \
            ours_tail random_lookups ours_hot_rows ours_all || status=$?
        return $status
    }
    inputs() {
        bench inputs --samples 160000 --rows-per-table 1000000 --batch-size 1024 --seeds 1 --share 0.3 \
            --methods negatives ours slipstream_half --undropped hotline
    }
    profiler() { bench profiler --rounds 96 --steps 64; }
else
    toy=(--tables 3 --rows 3000 --dim 16 --batch 3000 --profile 8 --seconds 0.1 --rounds 2 --most-rounds 2 --steps 2)
    small=(--tables 3 --rows 400 --dim 8 --batch 64 --batches 6 --rounds 4 --warmup 2)
    floor() { bench floor --out "$memories" --row-bytes 64 --buffer-bytes 1048576 --moved-bytes 65536 --rounds 3; }
    rowwise() {
        bench hbm_budget "${measured[@]}" "${toy[@]}" --kernels 4 --optimizers rowwise_adagrad --budgets 0.1 0.5
    }
    adam() { bench hbm_budget "${measured[@]}" "${toy[@]}" --optimizers adam --budgets 0.1; }
    sgd() { bench hbm_budget "${measured[@]}" "${toy[@]}" --optimizers sgd --budgets 0.1; }
    prefetch() { bench prefetch_overlap; }
    update_filter() { bench update_filter "${small[@]}" --overhead-rounds 20 --shares 0.5 --more-dims; }
    throughput() {
        bench throughput --configurations kaggle --max-rows 300 --batch 64 --rounds 2 --warmup 2 --test 256
    }
    inputs() {
        bench inputs --samples 2000 --rows-per-table 100 --batch-size 64 --seeds 1 --share 0.3 \
            --methods ours --undropped hotline
    }
    profiler() { bench profiler "${small[@]}" --steps 8; }
fi

parts=(smoke:30 floor:35 rowwise:135 adam:75 tests:80 prefetch:45 sgd:35 update_filter:30 throughput:50 inputs:25
    profiler:25)
# On a CPU all parts are imports, and little else.
[ "$device" = cpu ] && parts=("${parts[@]/%:*/:1}")
began=$SECONDS
weights=0
for part in "${parts[@]}"; do weights=$((weights + ${part#*:})); done

summary=() failed=0 smoked=1
for part in "${parts[@]}"; do
    name=${part%:*} weight=${part#*:}
    limit=$(((total - (SECONDS - began)) * weight / weights))
    weights=$((weights - weight))
    [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]] && continue
    if [ "$smoked" -eq 0 ]; then
        summary+=("$name: not started, as smoke failed")
        continue
    fi
    if [ "$limit" -lt 5 ]; then
        summary+=("$name: not started, $limit s are left for it")
        continue
    fi
    measured=()
    [ -e "$memories" ] && measured=(--memories "$memories")
    echo "=== $name, at most $limit s" | tee -a "$log"
    started=$SECONDS
    # The part runs in a shell of its own, which `timeout` ends with all that it started; SIGTERM lets hbm_budget record
    # what it has. The shell itself waits for what it started, or `timeout` would never come to SIGKILL. What crosses is
    # in the environment, or declared.
    export python device csv memories
    what="trap : TERM; $(declare -f bench "$name"); $(declare -p measured toy small 2>/dev/null); $name"
    timeout --kill-after=15 "$limit" bash -c "$what" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    took=$((SECONDS - started))
    [ "$name" = smoke ] && [ "$status" -ne 0 ] && [ "$device" = cuda ] && smoked=0
    case $status in
    0) summary+=("$name: ran, $took s") ;;
    77) summary+=("$name: not run, see the log") ;;
    124 | 137 | 143) summary+=("$name: CUT OFF after $took s") ;;
    *) summary+=("$name: FAILED (exit status $status) after $took s"); failed=1 ;;
    esac
done

{
    echo "=== summary, $((SECONDS - began)) s of $total"
    printf '%s\n' "${summary[@]}"
    [ -e "$csv" ] && echo "$(($(wc -l <"$csv") - 1)) rows in $csv; all that was printed in $log"
} | tee -a "$log"
exit $failed
