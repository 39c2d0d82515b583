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

# The virtual environment with OpenStack and the driver.

readonly -a PYTHON_PACKAGES=(keystone glance openstack-placement nova neutron
    pylxd pyuwsgi PyMySQL python-openstackclient openstacksdk
    setuptools pbr)

# Value of a setting in pip's own configuration, empty when there is none.
pip_setting() {
    "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || :
}

# pip_install [argument]...: uses uv, which is several times faster, or else
# pip.
pip_install() {
    local index bundle
    local -a settings=(UV_SYSTEM_CERTS=true UV_CACHE_DIR="$CACHE/uv"
        UV_HTTP_TIMEOUT=180)
    if [[ -x $VENV/bin/uv && -z $NO_UV ]]; then
        # uv does not read pip's configuration.
        index=${PIP_INDEX_URL:-$(pip_setting index-url)}
        bundle=${PIP_CERT:-${SSL_CERT_FILE:-$(pip_setting cert)}}
        [[ -z $index ]] || settings+=(UV_DEFAULT_INDEX="$index")
        [[ -z $bundle ]] || settings+=(SSL_CERT_FILE="$bundle")
        if env -u PYTHONDONTWRITEBYTECODE "${settings[@]}" \
            "$VENV/bin/uv" pip install --python "$VENV/bin/python" "$@"; then
            return 0
        fi
        echo 'uv failed; trying pip.'
    fi
    env -u PYTHONDONTWRITEBYTECODE \
        PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check \
        "${@/--compile-bytecode/--compile}"
}

step_venv() {
    if cmp -s "$REPO/constraints.txt" "$VENV/.constraints"; then
        return 0
    fi
    if [[ ! -x $VENV/bin/python ]] ||
        ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        rm -rf "$VENV"
        "$PYTHON" -m venv "$VENV"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$REPO/constraints.txt" uv ||
        echo 'uv is not available; using pip, which is slower.'
    pip_install --compile-bytecode -c "$REPO/constraints.txt" \
        "${PYTHON_PACKAGES[@]}"
    cp "$REPO/constraints.txt" "$VENV/.constraints"
}

# Installs the driver editable: a change in the checkout needs no new install.
step_driver() {
    local version=()
    if [[ ! -e $REPO/pyproject.toml && ! -e $REPO/setup.py ]]; then
        echo 'Not installing the driver: no packaging metadata in the checkout.'
        return 0
    fi
    if [[ -s $VENV/.driver && $(<"$VENV/.driver") == "$(driver_stamp)" ]]; then
        return 0
    fi
    # git refuses the checkout of another user; without git or history pbr
    # cannot determine a version.
    if ! git -c safe.directory='*' -C "$REPO" rev-parse HEAD \
        >/dev/null 2>&1; then
        version=(PBR_VERSION=0.0.1)
    fi
    (
        export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory
        export GIT_CONFIG_VALUE_0='*'
        ((${#version[@]} == 0)) || export "${version[@]}"
        pip_install --no-build-isolation -c "$REPO/constraints.txt" \
            --editable "$REPO"
    )
    driver_stamp >"$VENV/.driver"
}

# Prints a string that changes when the driver has to be reinstalled.
driver_stamp() {
    printf '%s ' "$REPO"
    cat "$REPO"/{pyproject.toml,setup.cfg,setup.py,requirements.txt} \
        2>/dev/null | cksum
}
