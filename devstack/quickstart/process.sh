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

# Daemons: started in the background, recognised and stopped by their PID.
#
# $RUN/NAME.pid holds the PID and the start time of the process, so that a
# reused PID, also after a reboot, is never mistaken for ours.

# Variables that daemons must not inherit: they connect only to the loopback
# address and unix sockets, and a CA bundle in the environment overrides the
# certificate that the driver pins.
readonly -a CLEAN_ENV=(
    env -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY
    -u all_proxy -u ALL_PROXY -u REQUESTS_CA_BUNDLE -u CURL_CA_BUNDLE
    -u PYTHONDONTWRITEBYTECODE -u PYTHONHOME -u PYTHONPATH
    NO_PROXY="localhost,$LOCAL" no_proxy="localhost,$LOCAL"
    XDG_CACHE_HOME="$CACHE/xdg" PYTHONWARNINGS=ignore NOVA_LXD_QUICKSTART="$PREFIX"
)

# Start time of a process in clock ticks since boot, with the boot's id.
process_birth() {
    local stat
    # Not $(<file): with errexit bash ends when there is no such file.
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    # The second field is the command name, which may contain spaces.
    stat=${stat##*) }
    # shellcheck disable=SC2086 # fields are wanted
    set -- $stat
    # State Z: the process has ended and only waits for its parent.
    [[ $1 != Z ]] || return 1
    printf '%s@%s' "${20}" "$(</proc/sys/kernel/random/boot_id)"
}

# Prints the PID of a running daemon of ours, and fails if there is none.
daemon_pid() {
    local pid birth
    [[ -s $RUN/$1.pid ]] || return 1
    read -r pid birth _ <"$RUN/$1.pid" || return 1
    [[ $(process_birth "$pid") == "$birth" ]] || return 1
    printf '%s' "$pid"
}

daemon_running() {
    daemon_pid "$1" >/dev/null
}

# Checks that the files that the daemon read at its start are unchanged.
daemon_current() {
    local watched
    read -r _ _ watched <"$RUN/$1.pid"
    [[ $watched == "$(watched_files)" ]]
}

# Prints a checksum of the files whose change requires a restart.
watched_files() {
    # shellcheck disable=SC2086 # a list of files
    [[ -z ${WATCH:-} ]] || cat $WATCH | cksum | tr ' ' -
}

# Filters for PIDs of this PID namespace: a container on this host may have a
# quickstart cloud of its own, below the same path.
same_pid_namespace() {
    local pid own
    own=$(readlink /proc/self/ns/pid)
    while read -r pid; do
        if [[ $(readlink "/proc/$pid/ns/pid") == "$own" ]]; then
            echo "$pid"
        fi
    done
}

# Prints the PIDs of processes that write to a daemon's log: the daemon, and
# workers that outlived it, which titles and environments do not identify
# reliably.
daemon_processes() {
    find /proc/[0-9]*/fd -maxdepth 1 -name 2 -lname "$LOG/$1.log" 2>/dev/null |
        cut -d/ -f3 | same_pid_namespace
}

# Ends workers of a dead daemon; LXD's containers keep running.
kill_orphans() {
    local -a pids
    [[ $1 != lxd ]] || return 0
    mapfile -t pids < <(daemon_processes "$1")
    ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || :
}

# daemon_start NAME [VARIABLE=value]... COMMAND [argument]...
#
# With WATCH set to a list of files, a running daemon is restarted if one of
# them has changed. NOFILE raises its limit of open files above that of root.
daemon_start() {
    local name=$1 pid
    shift
    if daemon_running "$name"; then
        if daemon_current "$name"; then
            return 0
        fi
        echo "The configuration of $name has changed."
        daemon_stop "$name" 30
    fi
    kill_orphans "$name"
    (
        cd /
        { [[ -n ${NOFILE:-} ]] && ulimit -n "$NOFILE"; } 2>/dev/null ||
            ulimit -n "$(ulimit -Hn)" || :
        [[ -z ${LOCK:-} ]] || exec {LOCK}>&-
        exec setsid "${CLEAN_ENV[@]}" "$@" </dev/null >>"$LOG/$name.log" \
            2>&1 3>&-
    ) &
    pid=$!
    printf '%s %s %s\n' "$pid" "$(process_birth "$pid")" \
        "$(watched_files)" >"$RUN/$name.pid"
}

# daemon_stop NAME [seconds until SIGKILL]
daemon_stop() {
    local name=$1 patience=${2:-10} pid i
    if ! pid=$(daemon_pid "$name"); then
        kill_orphans "$name"
        rm -f "$RUN/$name.pid"
        return 0
    fi
    kill -TERM "$pid" 2>/dev/null || :
    for ((i = 0; i < patience * 10; i++)); do
        daemon_running "$name" || break
        sleep 0.1
    done
    if daemon_running "$name"; then
        kill -KILL "$pid" 2>/dev/null || :
        sleep 0.2
    fi
    kill_orphans "$name"
    rm -f "$RUN/$name.pid"
}

# wait_until "what" SECONDS DAEMON COMMAND...: polls COMMAND until it succeeds;
# fails when the time is up or the daemon ends.
wait_until() {
    local what=$1 seconds=$2 daemon=$3 end
    shift 3
    seconds=$((seconds * PATIENCE))
    end=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        if ! daemon_running "$daemon"; then
            echo "$daemon ended. The last lines of $LOG/$daemon.log:"
            tail -n 20 "$LOG/$daemon.log"
            return 1
        fi
        if ((SECONDS >= end)); then
            echo "$what: not ready after $seconds seconds. The last lines" \
                "of $LOG/$daemon.log:"
            tail -n 20 "$LOG/$daemon.log"
            return 1
        fi
        sleep 0.25
    done
}

# Checks that an HTTP server answers at the URL with a status below 500.
http_answers() {
    local code
    code=$("${CLEAN_ENV[@]}" curl -s -o /dev/null --max-time 5 \
        -w '%{http_code}' "$1") && ((code > 0 && code < 500))
}

# Checks that a port of the loopback address accepts TCP connections.
port_open() {
    (exec 4<>"/dev/tcp/$LOCAL/$1") 2>/dev/null
}
