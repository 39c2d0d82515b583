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

# Steps with dependencies, run in parallel.
#
#   step NAME "Description" [NAME of a step that must finish before]...
#
# A step runs the function step_NAME (dashes as underscores) in a subshell
# whose output goes to a log file of its own.

declare -a STEP_ORDER=()
declare -A STEP_TEXT=() STEP_NEEDS=()

step() {
    local name=$1
    STEP_ORDER+=("$name")
    STEP_TEXT[$name]=$2
    shift 2
    STEP_NEEDS[$name]="$*"
}

# Shows the end of a failed step's log and how to continue.
explain_failure() {
    local name=$1 log=$LOG/steps/$1.log
    say "${RED}✗ ${STEP_TEXT[$name]}: failed.$PLAIN The last lines of $log:"
    tail -n 25 "$log" | sed 's/^/    /' >&3
    say ''
    say "Services that were started keep running. Fix the cause and run"
    say "  $SELF up"
    say "again to continue. $SELF purge removes everything."
}

steps_ready() {
    local need
    for need in ${STEP_NEEDS[$1]}; do
        [[ ${step_state[$need]:-finished} == finished ]] || return 1
    done
}

show_running() {
    local name list=''
    for name in "${STEP_ORDER[@]}"; do
        [[ ${step_state[$name]} == running ]] || continue
        list+="${list:+, }${STEP_TEXT[$name]} $(elapsed "${step_begin[$name]}") s"
    done
    [[ -n $list ]] || return 0
    if [[ $INTERACTIVE == yes ]]; then
        printf '%s%s… %s%s' "$CLEAR_LINE" "$DIM" \
            "${list:0:$((${COLUMNS:-100} - 4))}" "$PLAIN" >&3
    else
        say "  … $list"
    fi
}

# Starts every step that can start; expects the arrays of run_steps.
start_ready_steps() {
    local name
    for name in "${STEP_ORDER[@]}"; do
        ((${#step_of[@]} < MAX_PARALLEL)) || return 0
        [[ ${step_state[$name]} == waiting ]] || continue
        steps_ready "$name" || continue
        (
            set -euo pipefail
            "step_${name//-/_}"
        ) </dev/null >"$LOG/steps/$name.log" 2>&1 &
        step_of[$!]=$name
        step_state[$name]=running
        step_begin[$name]=$(now_us)
    done
}

# On Ctrl-C running steps may finish (a package manager must not be killed), and
# no further step starts.
interrupted() {
    if [[ $FAILED_STEPS == *interrupt* ]]; then
        exit 130
    fi
    FAILED_STEPS+=' interrupt'
    say 'Interrupted: waiting for the running steps.' \
        'Interrupt again to exit immediately.'
}

# Runs all steps declared so far and sets FAILED_STEPS. Must be called as a
# plain command: after if, && or || bash would ignore errors inside the steps.
run_steps() {
    local name pid status ticker='' seconds
    local -A step_state=() step_begin=() step_of=()

    FAILED_STEPS=''
    trap interrupted INT TERM
    # With a terminal the line of running steps is kept current; a log file
    # gets one line now and then.
    [[ $INTERACTIVE == yes ]] && seconds=0.5 || seconds=15
    mkdir -p "$LOG/steps"
    for name in "${STEP_ORDER[@]}"; do
        step_state[$name]=waiting
    done
    while :; do
        if [[ -z $FAILED_STEPS ]]; then
            start_ready_steps
        fi
        ((${#step_of[@]})) || break
        if [[ -z $ticker ]]; then
            sleep "$seconds" 3>&- {LOCK}>&- &
            ticker=$!
        fi
        status=0
        pid=''
        wait -n -p pid "$ticker" "${!step_of[@]}" || status=$?
        # Interrupted by a signal: nothing has ended.
        [[ -n $pid ]] || continue
        if [[ $pid == "$ticker" ]]; then
            ticker=''
            show_running
            continue
        fi
        name=${step_of[$pid]}
        unset "step_of[$pid]"
        if ((status == 0)); then
            step_state[$name]=finished
            say "${GREEN}✓$PLAIN ${STEP_TEXT[$name]}" \
                "$DIM($(elapsed "${step_begin[$name]}") s)$PLAIN"
        else
            step_state[$name]=failed
            FAILED_STEPS+=" $name"
            explain_failure "$name"
        fi
    done
    [[ -z $ticker ]] || { kill "$ticker" && wait "$ticker"; } 2>/dev/null || :
    trap - INT TERM
    STEP_ORDER=()
}
