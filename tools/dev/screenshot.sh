#!/usr/bin/env bash
# The picture of a report page in the READMEs: tools/dev/screenshot.sh demo_output/report/report.html docs/images/report.png
# Needs Chromium (CHROMIUM names another one); WIDTH and HEIGHT are those of the window, in pixels.
set -euo pipefail
page=$(realpath "${1:?the report.html to show}")
picture=$(realpath -m "${2:?the .png to write}")
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"${CHROMIUM:-chromium}" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
    --window-size="${WIDTH:-1000},${HEIGHT:-1440}" --screenshot="$picture" "file://$page" 2>"$profile/log" || { cat "$profile/log" >&2; exit 1; }
