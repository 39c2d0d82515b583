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

# Glance with a directory as its store.

configure_glance() {
    local name
    for name in images staging tasks; do
        mkdir -p "$DATA/glance/$name"
    done
    mkdir -p "$ETC/glance"
    cat >"$ETC/glance/glance-api.conf" <<EOF
[DEFAULT]
log_file = $LOG/glance.log
use_stderr = false
enabled_backends = store:file
worker_self_reference_url = $(service_url glance)
workers = 0
hashing_algorithm = sha256

[database]
connection = $(database_url glance)

[glance_store]
default_backend = store

[store]
filesystem_store_datadir = $DATA/glance/images

[os_glance_staging_store]
filesystem_store_datadir = $DATA/glance/staging

[os_glance_tasks_store]
filesystem_store_datadir = $DATA/glance/tasks

[paste_deploy]
flavor = keystone
config_file = $VENV/etc/glance/glance-api-paste.ini

$(token_sections glance)
EOF
}

step_glance_db() {
    configure_glance
    make_schema glance glance "${CLEAN_ENV[@]}" "$VENV/bin/glance-manage" \
        --config-file "$ETC/glance/glance-api.conf" db_sync
}

step_glance() {
    WATCH=$ETC/glance/glance-api.conf \
        wsgi_start glance glance.wsgi.api:application "${PORT[glance]}" \
        OS_GLANCE_CONFIG_DIR="$ETC/glance"
}
