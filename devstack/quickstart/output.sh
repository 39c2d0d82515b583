# shellcheck shell=bash
#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

# Output for the user.

# File descriptor 3 is the terminal; standard output of a step is its log file.
exec 3>&1

if [[ -t 3 && ${TERM:-dumb} != dumb ]]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m'
    PLAIN=$'\e[0m' CLEAR_LINE=$'\r\e[K'
    INTERACTIVE=yes
else
    BOLD='' DIM='' RED='' GREEN='' YELLOW='' PLAIN='' CLEAR_LINE=''
    INTERACTIVE=no
fi

# Prints the seconds, with one decimal, since a time in microseconds.
elapsed() {
    local now=${EPOCHREALTIME/[.,]/} tenths
    tenths=$(((now - $1) / 100000))
    printf '%d.%d' $((tenths / 10)) $((tenths % 10))
}

now_us() {
    printf '%s' "${EPOCHREALTIME/[.,]/}"
}

say() {
    printf '%s%s\n' "$CLEAR_LINE" "$*" >&3
}

title() {
    say "$BOLD$*$PLAIN"
}

warn() {
    say "${YELLOW}Note:$PLAIN $*"
}

# Ends the script, or the step that calls it.
die() {
    printf '%s%sError:%s %s\n' "$CLEAR_LINE" "$RED" "$PLAIN" "$*" >&3
    exit 1
}
