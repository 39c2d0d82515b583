#!/usr/bin/env bash
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

# Makes the test environments and runs the tests.
# shellcheck disable=SC2329 # run_stage calls the stages by name

set -uo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" || exit 1
readonly REPO=$PWD
readonly ENVS=$REPO/.venv
readonly TOOLS=$ENVS/tools NOVA34=$ENVS/nova34
readonly TEMPEST=$ENVS/tempest MUTATION=$ENVS/mutation
readonly RESULTS=$ENVS/results
readonly PYTHON=${PYTHON:-python3}
readonly QUICKSTART=$REPO/devstack/quickstart.sh
readonly OVS_LOG=${QUICKSTART_PREFIX:-/opt/nova-lxd}/log/ovs-vswitchd.log
# Of the functional tests, which mostly wait for LXD, and of those of the cloud.
PROCESSES=${NOVA_LXD_TEST_PROCESSES:-$(($(nproc) > 2 ? 4 : 3))}
CLOUD_PROCESSES=${NOVA_LXD_TEST_PROCESSES:-2}
# Of the unit tests, which also wait; less where other stages run at the same
# time.
UNIT_PROCESSES=$(($(nproc) > 4 ? 8 : 2 * $(nproc)))
# shellcheck source=tools/as_root.sh
. tools/as_root.sh
# Not below the repository: setuptools walks through it while uv makes and
# removes files in its cache.
export UV_CACHE_DIR=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/uv}
# uv compiles nothing, and without bytecode each process that imports Nova takes
# twice the processor time to start.
unset PYTHONDONTWRITEBYTECODE

usage() {
    cat <<END
Usage: ./run_tests.sh [stage]... [--server lxd|incus] [-- pytest option...]
       ./run_tests.sh tempest [regular expression]

Without arguments all stages run: "functional" and then "cloud", which is started
meanwhile, and the others at the same time. From "cloud" it leaves out the tests
that change the whole host for minutes and have counterparts in "functional"
(CLOUD_BY_NAME below); "run_tests.sh cloud" runs all. Those marked with * need
root: the script runs itself with sudo if it is not root already.

  pep8         style, order of imports, shell scripts, spelling
  mypy         types
  docs         documentation and release notes
  unit         unit tests, twice: Nova 34 with native threads, Nova 32 with
               eventlet
  threads, eventlet
               one of both
  cover        like threads, and checks the line coverage of each package
  packaging    every way to install the driver with Nova; as root with Debian's
               packages as well
  functional * tests with a real LXD and a real Open vSwitch
  cloud      * end-to-end tests with the quickstart cloud. A cloud that
               devstack/quickstart.sh has started is used and kept, otherwise
               one is started and removed afterwards

These run only if they are named; mutation, campaign and tempest take an hour
each:

  nova31       unit tests with Nova 31 and eventlet
  nova33       unit tests with Nova 33 and native threads
  fuzz         what reads images, for FUZZ_SECONDS (default: 600); see
               tests/fuzz/README.rst
  mutation     whether unit tests notice small changes of the driver; options
               after -- are those of tests/mutation/README.rst
  two_hosts  * end-to-end tests with a second compute host in the same cloud
  campaign   * random operations with the same cloud while its daemons are
               killed, CAMPAIGN_OPERATIONS (default: 1000) or for
               CAMPAIGN_SECONDS (default: 3600)
  tempest    * tempest with the same cloud: the compute and scenario tests and
               those of this project's plugin, or what the regular expression
               selects; its files are in .venv/tempest/run

Results and the durations of all tests are left in .venv/results.

--server incus runs the tests of "functional" with Incus. Where it is not
installed, the packages of Debian 13 are unpacked into /var/cache/nova-lxd-py
(NOVA_LXD_TEST_CACHE names another directory).

Environment: PYTHON (default python3), NOVA_LXD_TEST_NO_UV=1 (install with pip
only), NOVA_LXD_TEST_PROCESSES=N (for the stages "functional", default: three or
four, and "cloud", default: two), NOVA_LXD_TEST_SEED=N (seed of random numbers,
which failed tests report), KEEP_CLOUD=1 (leave the cloud of the stage "cloud"
running).
END
}

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'run_tests.sh: %s\n' "$*" >&2; exit 1; }
is_root() { ((EUID == 0)); }

# -- environments -------------------------------------------------------------

# install PYTHON ARGUMENT...: uses uv if it is available, which takes seconds, or
# else pip, which takes a minute. uv does not read pip's settings.
install() {
    local python=$1 index bundle=${SSL_CERT_FILE:-${PIP_CERT:-}}
    shift
    if [[ -x $TOOLS/bin/uv && -z ${NOVA_LXD_TEST_NO_UV:-} ]]; then
        index=$("$TOOLS/bin/python" -m pip config get global.index-url \
            2>/dev/null) || index=''
        index=${PIP_INDEX_URL:-$index}
        env ${index:+UV_DEFAULT_INDEX="$index"} \
            ${bundle:+SSL_CERT_FILE="$bundle"} UV_HTTP_TIMEOUT=180 \
            "$TOOLS/bin/uv" pip install --quiet --python "$python" "$@" &&
            return 0
        echo 'uv failed; trying pip.'
    fi
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

make_tools() {
    [[ ! -e $TOOLS/.complete ]] || return 0
    rm -rf "$TOOLS"
    mkdir -p "$ENVS"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or later is needed; set PYTHON to another one."
    "$PYTHON" -m venv "$TOOLS" ||
        fail 'python3 cannot create virtual environments (package python3-venv).'
    if [[ -z ${NOVA_LXD_TEST_NO_UV:-} ]]; then
        "$TOOLS/bin/python" -m pip install --quiet \
            --disable-pip-version-check uv ||
            echo 'uv is not available; using pip, which is slower.'
    fi
    touch "$TOOLS/.complete"
}

# Prints a checksum of what an environment is made from.
stamp() {
    cat pyproject.toml setup.cfg ./*requirements.txt doc/requirements.txt \
        "$@" | cksum
}

# make_env DIRECTORY CONSTRAINTS... -- ARGUMENT...: creates a virtual environment
# with what the arguments of "pip install" name.
make_env() {
    local directory=$1 wanted
    local -a files=() pins=()
    shift
    while [[ $1 != -- ]]; do
        files+=("$1")
        pins+=(--constraint "$1")
        shift
    done
    shift
    wanted=$(stamp "${files[@]}")
    [[ $(cat "$directory/.complete" 2>/dev/null) != "$wanted" ]] || return 0
    make_tools
    say "Making the environment $directory"
    rm -rf "$directory"
    "$PYTHON" -m venv "$directory" &&
        install "$directory/bin/python" "${pins[@]}" "$@" &&
        printf '%s\n' "$wanted" >"$directory/.complete"
}

need_nova34() {
    make_env "$NOVA34" constraints.txt constraints-test.txt -- \
        --requirement test-requirements.txt \
        --requirement lint-requirements.txt --requirement doc/requirements.txt \
        --editable '.[nova,tempest]'
}

# need_release NUMBER: an earlier release of Nova.
need_release() {
    make_env "$ENVS/nova$1" "constraints-nova$1.txt" -- \
        --requirement test-requirements.txt --editable '.[nova]'
}

need_tempest() {
    make_env "$TEMPEST" constraints.txt -- --editable '.[tempest]' openstacksdk
}

# need_packages [MORE...]: installs the distribution's packages for tests that need
# root; their services are not started.
need_packages() (
    set -e
    # shellcheck source=devstack/quickstart/packages.sh
    . devstack/quickstart/packages.sh
    # shellcheck disable=SC2046 # words are wanted
    set -- "${FIRST_PACKAGES[@]}" "${SERVER_PACKAGES[@]}" xfsprogs \
        dosfstools mtools "$@"
    if [[ -n $(missing_packages "$@") ]] ||
        ! { package_installed lxd || package_installed incus; }; then
        say "Installing packages"
        for attempt in 1 2 3; do
            apt-get update --quiet -o DPkg::Lock::Timeout=300 && break
            ((attempt < 3)) || exit 1
            sleep $((attempt * 5))
        done
        # shellcheck disable=SC2046
        install_packages "$@" $(lxd_packages)
    fi
)

# -- stages -------------------------------------------------------------------

# run_pytest NAME PYTHON DIRECTORY SECONDS [OPTION]...: no test may take longer
# than so many seconds. The counts go into the summary.
run_pytest() {
    local name=$1 python=$2 directory=$3 seconds=$4
    shift 4
    PATH="$TOOLS/bin:$PATH" \
        "$python" ${MEASURE:+-m coverage run --parallel-mode} -m pytest -q -rs \
        --junit-xml="$RESULTS/$name.xml" -o junit_family=xunit1 \
        -o junit_logging=log -o junit_log_passing_tests=false \
        --durations=5 --durations-min=5 --timeout="$seconds" "$directory" "$@" \
        ${PYTEST_OPTIONS[@]+"${PYTEST_OPTIONS[@]}"}
}

# run_shared COUNT NAME PYTHON DIRECTORY SECONDS: like run_pytest, in several
# processes that share the test files. Each file runs in one process, so that it
# must not use anything of the machine that another file uses, but daemons of its
# own, or take turns (tests/fixtures/turns.py).
run_shared() {
    local count=$1 name=$2 number pid status=0
    shift
    local -A pids=()
    # Options may select a few tests, or start a debugger.
    ((${#PYTEST_OPTIONS[@]} == 0)) || count=1
    if ((count == 1)); then
        run_pytest "$@"
        return
    fi
    mkdir "$RESULTS/$name.share"
    for ((number = 1; number <= count; number++)); do
        NOVA_LXD_TEST_SHARE=$RESULTS/$name.share \
            run_pytest "$name-$number" "${@:2}" \
            > >(sed --unbuffered "s/^/$number| /") 2>&1 &
        JOBS+=($!)
        pids[$!]=$number
    done
    while ((${#pids[@]})); do
        wait -n -p pid "${!pids[@]}" || status=1
        unset "pids[$pid]"
    done
    return "$status"
}

stage_pep8() {
    need_nova34 || return
    local status=0
    "$NOVA34/bin/flake8" || status=1
    "$NOVA34/bin/lint-imports" --no-logo --no-cache || status=1
    PATH=$NOVA34/bin:$PATH tools/shellcheck.sh || status=1
    "$NOVA34/bin/codespell" || status=1
    "$NOVA34/bin/sphinx-lint" --enable=default-role README.rst \
        CONTRIBUTING.rst HACKING.rst doc/source releasenotes || status=1
    return "$status"
}

stage_mypy() {
    need_nova34 && "$NOVA34/bin/mypy" --cache-dir "$ENVS/mypy"
}

stage_docs() {
    need_nova34 || return
    local status=0 part
    for part in doc releasenotes; do
        rm -rf "$part/build"
        "$NOVA34/bin/python" -m sphinx -q -W --keep-going -b html \
            -d "$part/build/doctrees" "$part/source" "$part/build/html" ||
            status=1
    done
    return "$status"
}

stage_threads() {
    need_nova34 && OS_NOVA_DISABLE_EVENTLET_PATCHING=1 \
        run_shared "$UNIT_PROCESSES" threads "$NOVA34/bin/python" tests/unit 120
}

stage_cover() {
    local status=0
    local -x OS_NOVA_DISABLE_EVENTLET_PATCHING=1
    local -x COVERAGE_FILE=$RESULTS/coverage
    need_nova34 || return
    MEASURE=yes run_shared "$UNIT_PROCESSES" cover "$NOVA34/bin/python" \
        tests/unit 120 || status=1
    "$NOVA34/bin/python" -m coverage combine -q &&
        "$NOVA34/bin/python" -m coverage json -q -o "$RESULTS/coverage.json" &&
        "$NOVA34/bin/python" tools/check_coverage.py \
            "$RESULTS/coverage.json" || status=1
    return "$status"
}

# Unit tests for which the release of Nova and its concurrency mode make no
# difference: of this repository's own files, and of functions that read images
# with Python's library, without Nova and without threads.
readonly -a WITHOUT_NOVA=(campaign image/test_{format_inspector,memory}.py
    image/test_{repack,rootfs_rules,squashfs,tar}.py
    test_{devstack,docs,host_scripts,quickstart}.py
    test_{tempest_skips,variants,zuul}.py)

stage_eventlet() {
    need_release 32 && OS_NOVA_DISABLE_EVENTLET_PATCHING=0 \
        run_shared "$UNIT_PROCESSES" eventlet "$ENVS/nova32/bin/python" \
            tests/unit 120 "${WITHOUT_NOVA[@]/#/--ignore=tests/unit/}"
}

stage_nova31() {
    need_release 31 && OS_NOVA_DISABLE_EVENTLET_PATCHING=0 \
        run_shared "$UNIT_PROCESSES" nova31 "$ENVS/nova31/bin/python" \
            tests/unit 120
}

stage_nova33() {
    need_release 33 && OS_NOVA_DISABLE_EVENTLET_PATCHING=1 \
        run_shared "$UNIT_PROCESSES" nova33 "$ENVS/nova33/bin/python" \
            tests/unit 120
}

stage_packaging() {
    if is_root; then
        need_packages || return
    fi
    need_nova34 && run_pytest packaging "$NOVA34/bin/python" tests/packaging 1200
}

stage_fuzz() {
    local found=$ENVS/fuzz
    need_nova34 || return
    install "$NOVA34/bin/python" --requirement tests/fuzz/requirements.txt ||
        return
    mkdir -p "$found/corpus"
    PYTHONPATH=$REPO "$NOVA34/bin/python" tests/fuzz/fuzz_images.py \
        -max_total_time="${FUZZ_SECONDS:-600}" -timeout=20 \
        -rss_limit_mb=1024 -max_len=65536 -artifact_prefix="$found/" \
        "$found/corpus" tests/fuzz/corpus
}

stage_mutation() {
    local requirements=tests/mutation/requirements.txt
    make_env "$MUTATION" constraints.txt constraints-test.txt \
        "$requirements" -- --requirement test-requirements.txt \
        --requirement "$requirements" --editable '.[nova]' || return
    PYTHONPATH=$REPO nice -n 19 "$MUTATION/bin/python" \
        -m tests.mutation.mutate ${PYTEST_OPTIONS[@]+"${PYTEST_OPTIONS[@]}"}
}

# Unpacks Incus if the tests are for it and the host has none.
need_server() {
    [[ ${NOVA_LXD_TEST_SERVER:-lxd} != incus ]] ||
        "$NOVA34/bin/python" -m tests.fixtures.incus_root
}

stage_functional() {
    need_packages && need_nova34 && need_server &&
        run_shared "$PROCESSES" functional "$NOVA34/bin/python" \
            tests/functional 600
}

# Tests of the cloud that run only if the stage is named.
readonly -a CLOUD_BY_NAME=(bandwidth cloud_init_keys device_tags diagnostics
    many pinning)

stage_cloud() {
    local -a left_out=(two_hosts)
    [[ -z ${RUNS_ALL:-} ]] || left_out+=("${CLOUD_BY_NAME[@]}")
    left_out=("${left_out[@]/#/--ignore=tests/cloud/test_}")
    need_packages && need_nova34 && need_cloud --with-cinder || return
    run_shared "$CLOUD_PROCESSES" cloud "$NOVA34/bin/python" tests/cloud 900 \
        "${left_out[@]/%/.py}"
}

stage_two_hosts() {
    need_packages && need_nova34 && need_cloud --with-cinder || return
    run_pytest two_hosts "$NOVA34/bin/python" tests/cloud/test_two_hosts.py 900
}

stage_campaign() {
    need_packages && need_nova34 && need_cloud --with-cinder || return
    # What it does is printed while it goes on.
    run_pytest campaign "$NOVA34/bin/python" tests/campaign 900 -s
}

# Starts the cloud in the background.
prepare_cloud() {
    local status=0
    "$QUICKSTART" status >/dev/null 2>&1 || status=$?
    # 3: there is none.
    ((status == 3)) || return 0
    CLOUD_IS_OURS=yes
    "$QUICKSTART" up --with-cinder >"$RESULTS/quickstart.log" 2>&1 &
    CLOUD_JOB=$!
    JOBS+=("$CLOUD_JOB")
}

# The stages "cloud", "two_hosts", "campaign" and "tempest" use the same cloud.
need_cloud() {
    if [[ -n ${CLOUD_JOB:-} ]]; then
        local job=$CLOUD_JOB status=0
        CLOUD_JOB=''
        wait "$job" || status=$?
        cat "$RESULTS/quickstart.log"
        return "$status"
    fi
    if "$QUICKSTART" status >/dev/null 2>&1; then
        echo 'Using the quickstart cloud of this machine.'
    else
        local was=$?
        # It belongs to the user: neither repaired nor removed here.
        ((was == 3)) || {
            echo "There is a quickstart cloud here that does not work" \
                "($QUICKSTART status tells why)."
            return 1
        }
        CLOUD_IS_OURS=yes
        "$QUICKSTART" up "$@"
    fi
}

# Tests of Nova, and scenarios: servers with volumes and networks.
readonly TEMPEST_DEFAULT='^(tempest\.(api\.compute|scenario)|nova_lxd_py)\.'

stage_tempest() {
    need_packages iputils-ping && need_tempest &&
        need_cloud --with-cinder && run_tempest
}

run_tempest() (
    run=$TEMPEST/run status=0
    python=("$TEMPEST/bin/python" -W ignore)
    parts=$REPO/tests/tempest
    rm -rf "$run"
    trap '"${python[@]}" "$parts/configure.py" clean "$run"' EXIT
    "${python[@]}" "$parts/configure.py" write "$run" && cd "$run" || exit
    PYTHONWARNINGS=ignore "$TEMPEST/bin/tempest" run \
        --config-file "$run/tempest.conf" --exclude-list "$run/skips" \
        --regex "${TEMPEST_REGEX:-$TEMPEST_DEFAULT}" --concurrency 2 || status=1
    say 'Results of tempest'
    "$TEMPEST/bin/stestr" last --subunit |
        "${python[@]}" "$parts/summary.py" "$RESULTS/tempest.xml" || status=1
    exit "$status"
)

remove_cloud() {
    [[ -n ${CLOUD_IS_OURS:-} && -z ${KEEP_CLOUD:-} ]] || return 0
    CLOUD_IS_OURS=
    # Servers lose their network for a moment when it crashes.
    grep --no-messages -E 'assertion|crashes' "$OVS_LOG" || :
    say 'Removing the cloud'
    "$QUICKSTART" purge
}

# -- running ------------------------------------------------------------------

# Jobs in the background.
JOBS=()

# counts STAGE: passed, failed and skipped tests; nothing if it has none.
counts() {
    local -a reports
    shopt -s nullglob
    # Patterns: a file that does not exist is left out.
    reports=("$RESULTS/$1"[.]xml "$RESULTS/$1"-[0-9].xml)
    ((${#reports[@]} == 0)) ||
        "$PYTHON" tools/test_results.py counts "${reports[@]}"
}

readonly -a STAGES=(pep8 mypy docs cover eventlet packaging functional cloud)

is_stage() {
    local more='unit threads nova31 nova33 fuzz mutation two_hosts campaign tempest'
    [[ " ${STAGES[*]} $more " == *" $1 "* ]]
}

run_stage() {
    local name=$1 status=0 passed failed skipped took=$SECONDS
    say "$name"
    "stage_$name" || status=$?
    if [[ $name == cloud || $name == two_hosts || $name == campaign ||
        $name == tempest ]]; then
        remove_cloud || status=1
    fi
    took=$((SECONDS - took))
    read -r passed failed skipped <<<"$(counts "$name")"
    if [[ -z $passed ]]; then
        passed=$((status == 0)) failed=0 skipped=0
    fi
    # A stage may break before or after its tests, and without a test that has
    # passed it has shown nothing.
    (((status == 0 && passed > 0) || failed > 0)) || failed=1
    echo "$took $passed $failed $skipped" >"$RESULTS/$name.result"
}

run_stages() {
    local name
    for name in "$@"; do
        run_stage "$name"
    done
}

# run_beside LOG STAGE...: runs stages in the background, with the priority of the
# others, since unit tests do not wait for ever. Sets BESIDE to the job.
run_beside() {
    local log=$1
    shift
    run_stages "$@" >"$log" 2>&1 &
    BESIDE=$!
    JOBS+=("$BESIDE")
}

# Makes environments and installs packages at the same time, unless a package is
# needed to make environments.
need_everything() {
    local packages='' status=0
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        need_packages >"$RESULTS/packages.log" 2>&1 &
        packages=$!
        JOBS+=("$packages")
    else
        need_packages || return
    fi
    # Both use make_tools.
    { need_nova34 && need_release 32; } || status=1
    if [[ -n $packages ]]; then
        wait "$packages" || status=1
        cat "$RESULTS/packages.log"
    fi
    return "$status"
}

# Runs all stages. The functional tests and those of the cloud mostly wait, so that
# the cloud is started and the other stages run at the same time.
run_all() {
    local -a beside=()
    local name
    for name in "${STAGES[@]}"; do
        case $name in
        functional | cloud) ;;
        *) beside+=("$name") ;;
        esac
    done
    # The stages share these, which must not be made twice at the same time.
    need_everything || fail 'Cannot create the test environments.'
    prepare_cloud
    UNIT_PROCESSES=1
    run_beside "$RESULTS/beside.log" "${beside[@]}"
    run_stages functional cloud
    say "Meanwhile: ${beside[*]}"
    wait "$BESIDE" || :
    cat "$RESULTS/beside.log"
}

# Runs the unit tests of both environments at the same time.
run_unit() {
    { need_nova34 && need_release 32; } ||
        fail 'Cannot create the test environments.'
    UNIT_PROCESSES=$((UNIT_PROCESSES > 1 ? UNIT_PROCESSES / 2 : 1))
    run_beside "$RESULTS/beside.log" eventlet
    run_stages threads
    wait "$BESIDE" || :
    cat "$RESULTS/beside.log"
}

# Prints which tests have failed and why tests were skipped, and writes down what
# each test took.
summarize_tests() {
    local -a reports
    local failures
    shopt -s nullglob
    reports=("$RESULTS"/*.xml)
    ((${#reports[@]})) || return 0
    "$PYTHON" tools/test_results.py durations "${reports[@]}" \
        >"$RESULTS/durations.txt"
    failures=$("$PYTHON" tools/test_results.py failures "${reports[@]}")
    [[ -z $failures ]] || printf '\nFailed:\n%s\n' "$failures"
    printf '\nSkipped:\n'
    "$PYTHON" tools/test_results.py skips "${reports[@]}"
    printf '\nResults and the durations of all tests: %s\n' "$RESULTS"
}

# summary STAGE...: prints the results, and fails if a stage has failed.
summary() {
    local name took passed failed skipped
    local -i all_passed=0 all_failed=0 all_skipped=0
    SUMMARIZED=yes
    say Summary
    for name in "$@"; do
        if [[ -e $RESULTS/$name.result ]]; then
            read -r took passed failed skipped <"$RESULTS/$name.result"
        else
            # Interrupted.
            took=0
            read -r passed failed skipped <<<"$(counts "$name")"
            passed=${passed:-0} failed=$((${failed:-0} + 1))
        fi
        printf '%-12s %4d s  %5d passed %4d failed %4d skipped\n' \
            "$name" "$took" "$passed" "$failed" "$skipped"
        ((all_passed += passed, all_failed += failed,
          all_skipped += skipped)) || :
    done
    summarize_tests
    printf '\nTook %d min %d s.\n' $((SECONDS / 60)) $((SECONDS % 60))
    printf '%d passed, %d failed, %d skipped\n' "$all_passed" "$all_failed" \
        "$all_skipped"
    ((all_failed == 0))
}

# Ends the jobs in the background. What they have started in turn may take a
# while, because tests clean up.
end_jobs() {
    local pid pids
    local -i seconds
    for pid in ${JOBS[@]+"${JOBS[@]}"}; do
        kill -0 "$pid" 2>/dev/null || continue
        pids=$(pgrep -P "$pid")
        # First the shell, which would go on with the next stage.
        # shellcheck disable=SC2086 # several words
        kill -TERM "$pid" $pids 2>/dev/null || :
        for ((seconds = 0; seconds < 120; seconds++)); do
            # shellcheck disable=SC2086
            kill -0 $pids 2>/dev/null || break
            sleep 1
        done
    done
    JOBS=()
}

clean_up() {
    local status=$?
    trap - EXIT INT TERM
    end_jobs
    remove_cloud
    # A signal comes before the summary, or a failure to begin.
    [[ -n ${SUMMARIZED:-} ]] || summary "${SELECTED[@]}"
    # The files that root has made belong to the user of sudo.
    if [[ -n ${SUDO_UID:-} && -d $ENVS ]]; then
        find "$ENVS" -mindepth 1 -maxdepth 1 ! -name '*-nova*' \
            -exec chown -R "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" {} +
    fi
    exit "$status"
}

main() {
    local -a arguments=("$@")
    SELECTED=()
    PYTEST_OPTIONS=()
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            exit
            ;;
        --)
            shift
            PYTEST_OPTIONS=("$@")
            break
            ;;
        --server)
            [[ ${2:-} == lxd || ${2:-} == incus ]] || {
                usage >&2
                exit 2
            }
            export NOVA_LXD_TEST_SERVER=$2
            shift
            ;;
        unit) SELECTED+=(threads eventlet) ;;
        tempest)
            SELECTED+=(tempest)
            if [[ -n ${2:-} && $2 != -- ]] && ! is_stage "$2"; then
                TEMPEST_REGEX=$2
                shift
            fi
            ;;
        *)
            is_stage "$1" || {
                usage >&2
                exit 2
            }
            SELECTED+=("$1")
            ;;
        esac
        shift
    done
    case " ${SELECTED[*]:-all} " in
    *' all '* | *' functional '* | *' cloud '* | *' tempest '* | \
        *' campaign '* | *' two_hosts '*)
        as_root "$REPO/run_tests.sh" ${arguments[@]+"${arguments[@]}"}
        ;;
    esac
    rm -rf "$RESULTS"
    mkdir -p "$RESULTS"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if ((${#SELECTED[@]} == 0)); then
        SELECTED=("${STAGES[@]}")
        RUNS_ALL=yes
        run_all
    elif [[ ${SELECTED[*]} == 'threads eventlet' ]] &&
        ((${#PYTEST_OPTIONS[@]} == 0)); then
        # Options may start a debugger.
        run_unit
    else
        run_stages "${SELECTED[@]}"
    fi
    summary "${SELECTED[@]}"
}

# On one line, so that bash reads no further when the script changes meanwhile.
main "$@"; exit
