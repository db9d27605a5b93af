#!/usr/bin/env bash
# Everything a machine with a GPU should do, in one command that needs no network:
#
#     benchmarks/gpu_run.sh --output DIR [--part smoke,tune,layers,step,tests,accuracy,sanitizer] [--minutes 9]
#         [--wheels DIR] [--python python3] [--model MODEL --data DIR] [--no-build] [--dry]
#
# Each part has a time box, and one that fails or is stopped does not stop the others. DIR gets summary.txt, the table of
# tuned picks (DEVICE-NAME.json), what the benches measured (layers.csv, step.csv, ...) and logs.tar.gz, brought up to date
# after every part. --wheels installs a folder of wheels beside, not into, that Python. --dry does the same on the CPU with
# tiny sizes. Exit status 1 where a part failed. See benchmarks/README.md.
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ALL=smoke,tune,layers,step,tests,accuracy,sanitizer
PARTS=$ALL MINUTES=9 OUTPUT='' WHEELS='' PYTHON=python3 MODEL='' DATA='' BUILD=1 DRY=0

refuse() { echo "gpu_run.sh: $1" >&2; exit 2; }

while (($#)); do
    case $1 in
    --no-build) BUILD=0; shift; continue ;;
    --dry) DRY=1; shift; continue ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    (($# > 1)) || refuse "$1: wants a value, or is no option"
    case $1 in
    --part) PARTS=$2 ;;
    --minutes) MINUTES=$2 ;;
    --output) OUTPUT=$2 ;;
    --wheels) WHEELS=$2 ;;
    --python) PYTHON=$2 ;;
    --model) MODEL=$2 ;;
    --data) DATA=$2 ;;
    *) refuse "$1: no such option" ;;
    esac
    shift 2
done
[[ $OUTPUT ]] || refuse "--output: got none, wants a folder"
[[ $MINUTES =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--minutes: got '$MINUTES', wants a number"
TOTAL=$(awk "BEGIN { printf \"%d\", $MINUTES * 58 }") # seconds, less what stopping a part takes
for part in ${PARTS//,/ }; do [[ ,$ALL, == *,$part,* ]] || refuse "--part: got '$part', wants some of $ALL"; done
[[ ! $WHEELS || -d $WHEELS ]] || refuse "--wheels: got '$WHEELS', wants a folder"
[[ ${MODEL:+x} == "${DATA:+x}" ]] || refuse "--model and --data: wants both or neither"
command -v "$PYTHON" >/dev/null || refuse "--python: got '$PYTHON', which is not there"
whole() { (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); } # a link to a Python stays one: it may be a venv's
[[ $PYTHON != */* ]] || PYTHON=$(whole "$PYTHON")
for name in WHEELS DATA MODEL; do [[ ! ${!name} || ! -e ${!name} ]] || printf -v $name %s "$(whole "${!name}")"; done
mkdir -p "$OUTPUT" || refuse "--output: cannot make $OUTPUT"
OUTPUT=$(cd "$OUTPUT" && pwd)

BEGUN=$SECONDS
WORK=$(mktemp -d) || refuse "cannot make a temporary folder"
BUILDING='' CHILD=''
stop() { # this run's own processes alone
    for pid in $BUILDING $CHILD; do kill -INT -- "-$pid" 2>/dev/null; done
    pack
    exit 130
}
trap stop INT TERM
trap 'rm -rf "$WORK"' EXIT
LOGS=$WORK/logs
mkdir -p "$LOGS" "$WORK/tuned"
: >"$LOGS/parts.tsv"

export PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[[ $DRY == 1 ]] && export CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
cd "$ROOT" || exit 2

left() { echo $((TOTAL - (SECONDS - BEGUN))); }
box() { # percent of the whole -> seconds, at most what is left
    local seconds=$((TOTAL * $1 / 100))
    ((seconds <= $(left))) || seconds=$(left)
    echo "$seconds"
}

pack() { # everything that is known by now
    "$PYTHON" benchmarks/gpu/summary.py "$LOGS" "$WORK/tuned" >"$LOGS/summary.txt" 2>"$LOGS/summary.err" || cat "$LOGS/summary.err" >>"$LOGS/summary.txt"
    cp "$LOGS/summary.txt" "$OUTPUT/"
    for file in "$WORK"/tuned/*.json; do [[ -f $file ]] && cp "$file" "$OUTPUT/"; done
    for file in "$LOGS"/*/bench.csv "$LOGS"/*/*.png "$LOGS"/accuracy/results.json; do # layers.csv, layers-more.csv, ...
        [[ -f $file ]] || continue
        local part=$(basename "$(dirname "$file")") name=$(basename "$file")
        cp "$file" "$OUTPUT/$([[ $name == bench.csv ]] && echo "$part.csv" || echo "$part-${name#bench-}")"
    done
    tar -czf "$OUTPUT/logs.tar.gz" -C "$WORK" logs tuned
}

how() { # exit status, seconds that it took, seconds that it had
    case $1 in
    0) echo ok ;;
    124 | 137) (($2 >= $3)) && echo "stopped after $3 s" || echo "FAILED ($1)" ;; # 137 before its time: no memory
    *) echo "FAILED ($1)" ;;
    esac
}
note() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$LOGS/parts.tsv"; } # what, how it went, seconds, log

job() { # name, seconds, command...: in its own process group, interrupted and then killed after that long
    local name=$1 seconds=$2 begun=$SECONDS status
    shift 2
    if ((seconds < 5)); then
        note "$name" "left out: no time" 0 ''
        return 1
    fi
    echo "$name: at most $seconds s"
    echo "+ $*" >"$LOGS/$name.log"
    setsid timeout -s INT -k 15 "$seconds" "$@" >>"$LOGS/$name.log" 2>&1 &
    CHILD=$!
    wait "$CHILD"
    status=$?
    CHILD=''
    note "$name" "$(how $status $((SECONDS - begun)) "$seconds")" $((SECONDS - begun)) "$name.log"
    return "$status"
}

wanted() { [[ ,$PARTS, == *,$1,* ]]; }
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [[ $WHEELS ]]; then
    job wheels "$(box 10)" "$PYTHON" -m pip install --no-index --no-deps --no-compile --no-cache-dir \
        --target "$WORK/site" "$WHEELS"/*.whl && export PYTHONPATH=$ROOT:$WORK/site${PYTHONPATH#"$ROOT"}
fi
"$PYTHON" -c 'import torch' 2>"$LOGS/python.err" || refuse "--python: $PYTHON has no torch: $(tail -1 "$LOGS/python.err")"
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || [[ $DRY == 1 ]] ||
    refuse "there is no GPU; --dry does the same on the CPU with tiny sizes"
command -v nvidia-smi >/dev/null && nvidia-smi >"$LOGS/nvidia-smi.txt" 2>&1
"$PYTHON" - >"$LOGS/environment.txt" 2>&1 <<'END'
import importlib.metadata, platform

import torch

from echolora_kernels import __version__, backends
from echolora_kernels.environment import variables_set

devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("devices:", ", ".join(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices) or f"none ({platform.machine()})")
print(f"echolora_kernels {__version__}, python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
for name in ("triton", "peft", "transformers", "pytest"):
    try:
        print(name, importlib.metadata.version(name), end="; ")
    except importlib.metadata.PackageNotFoundError:
        print("no", name, end="; ")
print("before the build:", backends.availability(), variables_set())
END

LIBRARY=$ROOT/build/gpu_run/echolora_kernels/_native.so
if [[ $BUILD == 1 ]]; then # beside the smoke part, which does not need it
    rm -f "$LIBRARY"
    ARCHS=()
    [[ $DRY == 1 ]] && ARCHS=(ECHOLORA_CUDA_ARCHS=none)
    BUILD_BOX=$(box 35)
    setsid timeout -s INT -k 15 "$BUILD_BOX" env ECHOLORA_BUILD=require "${ARCHS[@]}" \
        "$PYTHON" setup.py --quiet build_ext --build-lib build/gpu_run >"$LOGS/build.log" 2>&1 &
    BUILDING=$!
    BUILD_BEGUN=$SECONDS
fi
finish_build() { # once
    [[ $BUILDING ]] || return 0
    wait "$BUILDING"
    local status=$? took=$((SECONDS - BUILD_BEGUN)) library
    BUILDING=''
    if [[ $status != 0 ]]; then
        note build "$(how $status $took "$BUILD_BOX")" $took build.log
    elif library=$(ECHOLORA_LIBRARY=$LIBRARY "$PYTHON" -c '
import sys
from echolora_kernels import native
print(native.why_unavailable() or " ".join(native.cuda_architectures()) or "no CUDA")
sys.exit(native.why_unavailable() is not None)'); then
        export ECHOLORA_LIBRARY=$LIBRARY
        note build "ok: $library" $took build.log
    else
        note build "FAILED: $library" $took build.log
    fi
}

if wanted smoke; then
    if [[ $DRY == 1 ]]; then
        finish_build
        job smoke "$(box 40)" "$PYTHON" benchmarks/gpu/smoke.py all --backend triton --dtype float32 float64 --skip checks
        [[ ${ECHOLORA_LIBRARY:-} ]] && job smoke-cpp "$(box 20)" "$PYTHON" benchmarks/gpu/smoke.py all --backend cpp --dtype float32
    else
        job smoke "$(box 20)" "$PYTHON" benchmarks/gpu/smoke.py all --backend triton
    fi
    pack
fi

in_minutes() { awk "BEGIN { print ($1 > 20 ? $1 - 20 : $1 / 2) / 60 }"; } # a little less than the box
less() { echo $(($1 > 30 ? $1 - 25 : $1 / 2)); }

if wanted tune; then
    TUNE=("$PYTHON" -m echolora_kernels.tuning --output "$WORK/tuned")
    if [[ $DRY == 1 ]]; then
        job tune "$(box 20)" "${TUNE[@]}" --dry-run --shapes llama3-8b
    else
        SECONDS_HERE=$(box 20)
        job tune "$SECONDS_HERE" "${TUNE[@]}" --shapes llama3-8b --minutes "$(in_minutes "$SECONDS_HERE")"
        SECONDS_HERE=$(box 5)
        job tune-more "$SECONDS_HERE" "${TUNE[@]}" --shapes llama2-7b,smollm2 --tokens 8192,2048 --rank 16 \
            --minutes "$(in_minutes "$SECONDS_HERE")"
    fi
    pack
fi
finish_build
if wanted smoke && [[ $DRY == 0 ]]; then
    WHY=$("$PYTHON" -c 'from echolora_kernels.backends import availability; print(availability()["cuda"])')
    if [[ $WHY == available ]]; then
        job smoke-cuda "$(box 8)" "$PYTHON" benchmarks/gpu/smoke.py all --backend cuda
    else
        note smoke-cuda "skipped: ${WHY//[$'\t\n']/ }" 0 ''
    fi
fi
compgen -G "$WORK/tuned/*.json" >/dev/null && export ECHOLORA_TUNED=$WORK/tuned

bench() { # name, seconds, options...
    local name=$1 seconds=$2
    shift 2
    job "$name" "$seconds" "$PYTHON" -m echolora_kernels.benchmarks "$@" --output "$LOGS/$name" --time-limit "$(less "$seconds")"
}
if wanted layers; then
    if [[ $DRY == 1 ]]; then
        bench layers "$(box 20)" --cases 'smollm2/layer/q/*/r16/p0/plain/fp32' --rows 48 --rounds 2 --device cpu
    else
        USUAL=(--kind layer --model llama3-8b --dtype bf16 --echo off --seconds 0.3 --roofline)
        bench layers "$(box 15)" "${USUAL[@]}" --part q qkv down --rank 16 --dropout 0 --implementations 'ours*' peft peft-bf16 addmm
        bench layers-compiled "$(box 8)" "${USUAL[@]}" --part q --method lora --rank 16 --dropout 0 --implementations 'ours*' peft-compiled
        bench layers-more "$(box 5)" "${USUAL[@]}" --part q qkv --rank 16 64 --dropout 0.1 --implementations 'ours*' peft-bf16 addmm
    fi
    if has peft; then
        [[ $DRY == 1 ]] && TINY=(--shape 32x64x48 --calls 20) || TINY=()
        job host "$(box 10)" "$PYTHON" benchmarks/gpu/host.py "${TINY[@]}"
    else
        note host "skipped: peft is not installed" 0 ''
    fi
    pack
fi
if wanted step; then
    if [[ $DRY == 1 ]]; then
        bench step "$(box 40)" --cases 'smollm2/step/arc-easy/lora/r16/kept/fp32' --implementations shared-ours --rounds 1 \
            --device cpu --no-memory
    else
        bench step "$(box 25)" --kind step --model smollm2 --part arc-easy --method lora dora --dtype bf16 fp32 --seconds 0.5
    fi
    pack
fi
if wanted tests; then
    if ! has pytest; then
        note tests "skipped: pytest is not installed" 0 ''
    else
        PYTEST=(env -u ECHOLORA_TUNED "$PYTHON" -m pytest -q -ra -p no:cacheprovider --continue-on-collection-errors)
        has xdist && [[ $DRY == 0 ]] && PYTEST+=(-n "$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))")
        job tests-gpu "$(box 14)" "${PYTEST[@]}" tests/triton/test_triton_gpu.py -m gpu -k 'not compute_sanitizer'
        if [[ $DRY == 1 ]]; then
            job tests-backends "$(box 20)" "${PYTEST[@]}" tests/triton/test_triton_candidates.py -x
        else
            job tests-backends "$(box 16)" "${PYTEST[@]}" tests/triton tests/backends tests/losses \
                -m 'not gpu and not codegen and not full' -k 'triton or cuda'
        fi
    fi
    pack
fi
if wanted accuracy; then
    if [[ $MODEL ]]; then
        job accuracy "$(box 15)" "$PYTHON" examples/commonsense/experiment.py --data "$DATA" --model "$MODEL" \
            --output "$LOGS/accuracy" $([[ $DRY == 1 ]] && echo --device cpu || echo --device cuda --workers 4) --lrs 1e-3 --seeds 1 \
            --steps 60 --train-size 300 --held-out-size 50 --test-size 100
    elif ! has transformers; then
        note accuracy "skipped: transformers is not installed" 0 ''
    elif [[ $DRY == 1 ]]; then
        job accuracy "$(box 20)" "$PYTHON" benchmarks/gpu/training.py --device cpu --backend cpp --steps 12 --width 64 --blocks 4
    else
        for dtype in float32 bfloat16; do
            job "accuracy-$dtype" "$(box 6)" "$PYTHON" benchmarks/gpu/training.py --dtype "$dtype"
        done
    fi
    pack
fi
if wanted sanitizer; then
    if has pytest && command -v compute-sanitizer >/dev/null && [[ $DRY == 0 ]]; then
        job sanitizer "$(left)" env -u ECHOLORA_TUNED "$PYTHON" -m pytest -q -ra -p no:cacheprovider tests/triton/test_triton_gpu.py -k compute_sanitizer
    else
        note sanitizer "skipped: it wants pytest, compute-sanitizer and a GPU" 0 ''
    fi
fi

pack
cat "$LOGS/summary.txt"
grep -E 'stopped|left out' "$LOGS/parts.tsv" | cut -f 1,2 | sed 's/^/not finished: /'
echo "$((SECONDS - BEGUN)) s; all is in $OUTPUT"
! grep -q FAILED "$LOGS/parts.tsv"
