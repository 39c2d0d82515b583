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

# Clients: clouds.yaml and the openstack command.

edit_clouds_yaml() {
    "${CLEAN_ENV[@]}" "$VENV/bin/python" "$HERE/clouds_yaml.py" "$@"
}

write_client_files() {
    local file=$INVOKER_HOME/.config/openstack/clouds.yaml
    local message
    message=$(QS_SECRET=$(secret) QS_URL_KEYSTONE=$(service_url keystone) \
        QS_REGION=$REGION QS_CLOUD=$CLOUD QS_OWNER=$INVOKER \
        edit_clouds_yaml add "$file" "$PREFIX/clouds.yaml" 2>&1) || warn "$message"
    printf '%s\n' "$file" >"$DATA/undo/clouds-yaml"
    mkdir -p "$BIN"
    cat >"$BIN/openstack" <<EOF
#!/bin/sh
# The OpenStack client of the quickstart cloud.
export OS_CLOUD="\${OS_CLOUD:-$CLOUD}"
export NO_PROXY="localhost,$LOCAL\${NO_PROXY:+,\$NO_PROXY}"
export no_proxy="\$NO_PROXY"
export PYTHONWARNINGS=ignore
grep -qs 'BEGIN $CLOUD quickstart' "\$HOME/.config/openstack/clouds.yaml" ||
    export OS_CLIENT_CONFIG_FILE="\${OS_CLIENT_CONFIG_FILE:-$PREFIX/clouds.yaml}"
exec "$VENV/bin/openstack" "\$@"
EOF
    chmod 755 "$BIN/openstack"
    if ! command -v openstack >/dev/null; then
        ln -s "$BIN/openstack" /usr/local/bin/openstack
        hash -r
    fi
}

step_client() {
    write_client_files
}

undo_client() {
    local file
    if [[ $(readlink /usr/local/bin/openstack) == "$BIN/openstack" ]]; then
        rm -f /usr/local/bin/openstack
    fi
    [[ -s $DATA/undo/clouds-yaml ]] || return 0
    file=$(<"$DATA/undo/clouds-yaml")
    [[ ! -e $file ]] || QS_CLOUD=$CLOUD edit_clouds_yaml remove "$file" || :
}
