#!/usr/bin/env bash
# Acceptance on an Atlas A2: what could not be checked without one, in one run that leaves one report to send back.
#
# usage: tools/ascend/acceptance.sh [options]
#   --model DIR          float checkpoint (default: the embedded one, minutes; openPangu-Embedded-7B takes hours)
#   --calibration FILE   calibration chats (default: the embedded checkpoint's)
#   --data FILE          texts to compare logits on (default: the embedded checkpoint's)
#   --device ascend|cpu  cpu is a rehearsal: every command the same, the device apart (default: ascend)
#   --recipes LIST       (default: "w8a8 w8a8_static w4a8 w4a8_g256 w4a8_g128")
#   --batch-sizes LIST   of the prefill benchmark (default: 1,2,4,8,16,32)
#   --prompt-lens LIST   of the prefill benchmark (default: 512)
#   --tasks LIST         benchmarks to evaluate (default: humaneval,mbpp; mini for the embedded checkpoint)
#   --limit N            only the first N problems of each (default: all)
#   --max-new-tokens N   of an answer (default: 4096)
#   --kl X               tolerated mean KL between the device's and the CPU's next-token distributions, nats (default: 0.01)
#   --agreement X        wanted share of tokens with the same most likely next token (default: 0.97)
#   --output DIR         (default: acceptance)
#   --help
#
# The CPU computes in float32, the device in bfloat16; the two tolerances are for that and have never been tried on a device.
# Steps: environment, then for the float model and each recipe quantize, verify, logits of both devices and their comparison,
# generate, prefill benchmark, evaluation; then one page. A step that fails does not stop the others, only those that
# need its result. Run again with the same options, what is done is not done again: only failed steps are repeated.
# Exit code: 0 all steps passed, 1 some failed, 2 wrong options.
#
# Example:
#   tools/ascend/acceptance.sh --model openPangu-Embedded-7B --calibration chats.jsonl --data texts.jsonl
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
assets=$root/ms_pangu_quant/assets
model=$assets/openpangu-mini calibration=$assets/calibration.jsonl data=$assets/validation.jsonl device=ascend
recipes="w8a8 w8a8_static w4a8 w4a8_g256 w4a8_g128" batch_sizes=1,2,4,8,16,32 prompt_lens= tasks= limit= max_new_tokens=
kl=0.01 agreement=0.97 output=acceptance

usage() { sed -n '2,/^set /p' "$root/tools/ascend/acceptance.sh" | sed '$d; s/^# \{0,1\}//'; }
wrong() { echo "ascend/acceptance.sh: $1; --help shows the options" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --model | --calibration | --data | --device | --recipes | --batch-sizes | --prompt-lens | --tasks | --limit | \
            --max-new-tokens | --kl | --agreement | --output)
            [ $# -gt 1 ] || wrong "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2 ;;
        *) wrong "unknown option $1" ;;
    esac
done
case $device in ascend | cpu) ;; *) wrong "--device is '$device', wanted ascend or cpu" ;; esac
[ -f "$model/config.json" ] || wrong "--model '$model' has no config.json"
[ -f "$calibration" ] || wrong "--calibration '$calibration' is not a file"
[ -f "$data" ] || wrong "--data '$data' is not a file"
if [ "$model" = "$assets/openpangu-mini" ]; then  # it knows 512 tokens and its own problems only
    : "${tasks:=mini}" "${prompt_lens:=256}" "${max_new_tokens:=230}"
fi
: "${tasks:=humaneval,mbpp}" "${prompt_lens:=512}" "${max_new_tokens:=4096}"
[ -x "$root/.venv/bin/pangu-quant" ] && PATH=$root/.venv/bin:$PATH
command -v pangu-quant >/dev/null || wrong "pangu-quant is not installed: make install"
python=$(dirname "$(command -v pangu-quant)")/python
[ -x "$python" ] || python=python3

mkdir -p "$output"/{done,logs,logits} || wrong "--output '$output' cannot be written"
output=$(cd "$output" && pwd)
settings="$model $calibration $data $device $batch_sizes $prompt_lens $tasks ${limit:-all} $max_new_tokens $kl $agreement"
if [ -f "$output/settings" ] && [ "$(cat "$output/settings")" != "$settings" ]; then
    wrong "--output '$output' was begun with other options; choose another"
fi
echo "$settings" >"$output/settings"

names=() results=() seconds=()
record() { names+=("$1") results+=("$2") seconds+=("$3"); printf '%-34s %s (%s s)\n' "$1" "$2" "$3"; }

# step NAME NEEDS COMMAND...: NEEDS are names of steps, separated by spaces, that must have passed
step() {
    local name=$1 needs=$2 begun=$SECONDS each
    shift 2
    if [ -e "$output/done/$name" ]; then record "$name" "passed before" "$(cat "$output/done/$name")"; return; fi
    for each in $needs; do
        if [ ! -e "$output/done/$each" ]; then record "$name" "not run: $each has not passed" 0; return; fi
    done
    { printf '$'; printf ' %q' "$@"; printf '\n'; } >"$output/logs/$name.log"
    if "$@" >>"$output/logs/$name.log" 2>&1; then
        echo $((SECONDS - begun)) >"$output/done/$name"
        record "$name" passed $((SECONDS - begun))
    else
        record "$name" "FAILED: $(grep -v '^ *$' "$output/logs/$name.log" | tail -1 | cut -c1-200)" $((SECONDS - begun))
    fi
}

environment() {
    pangu-quant doctor
    pangu-quant doctor --json >"$output/environment.json" || return 1
    "$python" - "$output/environment.json" "$device" <<'PY'
import json, sys
found = json.load(open(sys.argv[1]))
state = found["devices"][sys.argv[2]]
print(f"{sys.argv[2]}: {state}")
sys.exit(0 if state == "available" else 1)
PY
    local code=$?
    command -v npu-smi >/dev/null && npu-smi info >"$output/npu-smi.txt" 2>&1
    cat /usr/local/Ascend/ascend-toolkit/latest/version.cfg >"$output/cann-version.txt" 2>/dev/null
    return $code
}

# into DIRECTORY COMMAND...: COMMAND with --output DIRECTORY; what an earlier, failed run left there goes first
into() { local folder=$1; shift; rm -rf "$folder"; "$@" --output "$folder"; }

saved() { local file=$1; shift; "$@" >"$file"; local code=$?; cat "$file"; return $code; }

sandbox=bubblewrap
"$python" -c "import sys; from ms_pangu_quant.cli.doctor import sandbox_fault; sys.exit(bool(sandbox_fault()))" || sandbox=rlimits

step environment "" environment
for name in float $recipes; do
    directory=$output/$name made=environment
    if [ "$name" = float ]; then
        directory=$model
    else
        case $name in *_rtn) with_data=() ;; *) with_data=(--calibration "$calibration") ;; esac
        step "$name-quantize" "" into "$directory" pangu-quant quantize "$model" --recipe "$name" "${with_data[@]}"
        step "$name-verify" "$name-quantize" pangu-quant verify "$directory" --against "$model"
        made=$name-quantize
    fi
    logits=$output/logits/$name
    step "$name-logits-cpu" "${made#environment}" \
        "$python" tools/ascend/logits.py save "$directory" --device cpu --data "$data" --output "$logits-cpu.npz"
    step "$name-logits-device" "environment $made" \
        "$python" tools/ascend/logits.py save "$directory" --device "$device" --data "$data" --output "$logits-device.npz"
    step "$name-logits-compared" "$name-logits-cpu $name-logits-device" \
        saved "$logits.json" "$python" tools/ascend/logits.py compare "$logits-cpu.npz" "$logits-device.npz" \
        --kl "$kl" --agreement "$agreement"
    step "$name-generate" "environment $made" \
        pangu-quant generate "$directory" --device "$device" --max-new-tokens 64 --prompt "Write a Python function that adds two numbers."
    step "$name-bench" "environment $made" \
        saved "$output/$name-bench.json" pangu-quant bench "$directory" --device "$device" --batch-sizes "$batch_sizes" \
        --prompt-lens "$prompt_lens" --json
    step "$name-evaluate" "environment $made" \
        pangu-quant evaluate "$directory" --device "$device" --tasks "$tasks" ${limit:+--limit "$limit"} \
        --max-new-tokens "$max_new_tokens" --batch-size 32 --sandbox $sandbox --output "$output/evaluation/$name"
done
evaluated=()
for name in float $recipes; do
    [ -e "$output/done/$name-evaluate" ] && evaluated+=("$output/evaluation/$name")
done
[ ${#evaluated[@]} -gt 0 ] && { rm -f "$output/done/page"; step page "" pangu-quant report "${evaluated[@]}" --output "$output/page"; }

failed=0
{
    echo "# Acceptance on $device"
    echo
    echo "Model: $model. Recipes: $recipes. $(date -u '+%Y-%m-%d %H:%M UTC'), $(uname -srm)."
    echo "ms_pangu_quant $(git rev-parse --short HEAD 2>/dev/null || echo 'without git'). Tolerances: mean KL $kl nats, agreement $agreement."
    [ "$device" = cpu ] && printf '\n**A rehearsal on the CPU: nothing below is a measurement of an NPU.**\n'
    echo
    echo "| step | result | seconds |"
    echo "|---|---|---|"
    for index in "${!names[@]}"; do
        echo "| ${names[$index]} | ${results[$index]//|//} | ${seconds[$index]} |"
    done
    for file in "$output"/logits/*.json "$output"/*-bench.json "$output/environment.json" "$output/npu-smi.txt" "$output/cann-version.txt"; do
        [ -s "$file" ] && printf '\n## %s\n\n```\n%s\n```\n' "$(basename "$file")" "$(cat "$file")"
    done
} >"$output/report.md"
for result in "${results[@]}"; do case $result in passed*) ;; *) failed=$((failed + 1)) ;; esac; done
sent=(report.md logs settings environment.json)
[ -d "$output/page" ] && sent+=(page)
tar -czf "$output/report.tar.gz" -C "$output" "${sent[@]}" 2>/dev/null
echo
echo "$((${#results[@]} - failed)) of ${#results[@]} steps passed, $failed failed. Send back: $output/report.tar.gz"
[ $failed -eq 0 ]
