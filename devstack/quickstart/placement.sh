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

# Placement.

configure_placement() {
    mkdir -p "$ETC/placement"
    cat >"$ETC/placement/placement.conf" <<EOF
[DEFAULT]
log_file = $LOG/placement.log
use_stderr = false

[api]
auth_strategy = keystone

[placement_database]
connection = $(database_url placement)

$(token_sections placement)
EOF
}

step_placement_db() {
    configure_placement
    make_schema placement placement \
        "${CLEAN_ENV[@]}" "$VENV/bin/placement-manage" \
        --config-file "$ETC/placement/placement.conf" db sync
}

step_placement() {
    WATCH=$ETC/placement/placement.conf \
        wsgi_start placement placement.wsgi.api:application "${PORT[placement]}" \
        OS_PLACEMENT_CONFIG_DIR="$ETC/placement"
}
