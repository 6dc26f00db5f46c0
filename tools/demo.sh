#!/usr/bin/env bash
# The whole of it on the embedded checkpoint: quantize to W8A8 and W4A8, compare with the float model, generate in the
# three thinking modes, solve its held-out problems with each, and put the scores on one page. Prints each command before it
# runs. Writes to demo_output/, or to the folder given.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-demo_output}
PATH=$PWD/.venv/bin:$PATH
assets=ms_pangu_quant/assets
model=$assets/openpangu-mini
started=$SECONDS
rm -rf "$output"

run() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }

for recipe in w8a8 w4a8_g128 w4a8_g128_rtn; do
    case $recipe in *_rtn) data=() ;; *) data=(--calibration $assets/calibration.jsonl) ;; esac
    run pangu-quant quantize $model --recipe $recipe "${data[@]}" --output "$output/$recipe"
    run pangu-quant compare $model "$output/$recipe" --data $assets/validation.jsonl --limit 60
done

prompt=$'def eval_index(names):\n    """Given the word list names, keep words shorter than 6, and finally put the words in the
opposite order.\n    >>> eval_index([\'tree\', \'dog\'])\n    [\'dog\', \'tree\']\n    """\n'
prompt=${prompt//$'in the\nopposite'/'in the opposite'}
for mode in slow_think auto_think no_think; do
    run pangu-quant generate "$output/w4a8_g128" --mode $mode --prompt "$prompt"
done
# A fifth of the problems, to be done in minutes; the page says so.
sandbox=bubblewrap
bwrap --unshare-all --ro-bind / / true 2>/dev/null || sandbox=rlimits
for name in float w8a8 w4a8_g128; do
    directory=$output/$name
    [ $name = float ] && directory=$model
    run pangu-quant evaluate "$directory" --tasks mini --limit 40 --max-new-tokens 230 --batch-size 64 --sandbox $sandbox \
        --output "$output/evaluation/$name"
done
run pangu-quant report "$output"/evaluation/{float,w8a8,w4a8_g128} --output "$output/report"
printf '\nDone in %d s. The quantized checkpoints are in %s/, the page is %s.\n' $((SECONDS - started)) "$output" "$output/report/report.html"
