# shellcheck shell=bash
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

# For scripts that need root: they source this file and call
#
#   as_root "$0" "$@"
#
# which returns if root runs the script, and otherwise runs it again with sudo.

# Variables that the scripts of this repository and the programs that they run
# read; sudo removes them unless told not to.
readonly AS_ROOT_KEPT='(QUICKSTART|NOVA_LXD|LXD|CAMPAIGN|PIP|KERNEL)_.*'\
'|UV_(DEFAULT_INDEX|INDEX_URL|NO_CACHE)|.*_proxy|.*_PROXY|PYTHON|CI|KEEP_CLOUD'\
'|(SSL_CERT|REQUESTS_CA|CURL_CA)_(FILE|BUNDLE)|MEMORY|DISK|CPUS|ACCEL'

# as_root SCRIPT [ARGUMENT...]
as_root() {
    local name
    local -a kept=()
    ((EUID != 0)) || return 0
    if ! command -v sudo >/dev/null; then
        echo "$1 needs root, and this machine has no sudo:" \
            "run it as root." >&2
        exit 1
    fi
    while read -r name; do
        [[ ! $name =~ ^($AS_ROOT_KEPT)$ ]] || kept+=("$name")
    done < <(compgen -e)
    [[ ! -t 2 ]] || echo "$1 needs root: running it with sudo." >&2
    # Arrays are empty, not unset, for old versions of bash as well.
    exec sudo ${kept[0]:+"--preserve-env=$(IFS=, && echo "${kept[*]}")"} \
        -- "$(readlink -f "$1")" "${@:2}"
}
