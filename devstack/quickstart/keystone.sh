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

# Keystone, and the users, projects and endpoints of the cloud.

configure_keystone() {
    mkdir -p "$ETC/keystone" "$DATA/keystone"
    cat >"$ETC/keystone/keystone.conf" <<EOF
[DEFAULT]
log_file = $LOG/keystone.log
use_stderr = false

[database]
connection = $(database_url keystone)

[token]
provider = fernet

[fernet_tokens]
key_repository = $DATA/keystone/fernet

[fernet_receipts]
key_repository = $DATA/keystone/fernet

[credential]
key_repository = $DATA/keystone/credential

[cache]
# Without it every request of every service costs half a second here. One
# process serves all, so memory is the right place.
enabled = true
backend = dogpile.cache.memory

[identity]
# Cheap hashes: every service logs in, and nothing outside can.
password_hash_rounds = 4

[oslo_policy]
enforce_new_defaults = true
EOF
}

keystone_manage() {
    "${CLEAN_ENV[@]}" "$VENV/bin/keystone-manage" \
        --config-file "$ETC/keystone/keystone.conf" "$@"
}

# The two keys that "keystone-manage fernet_setup" and "credential_setup" write:
# each would import all of keystone for a few random bytes.
key_repository() {
    local number
    mkdir -p "$1"
    chmod 700 "$1"
    for number in 0 1; do
        (
            umask 077
            head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' \
                >"$1/$number"
        )
    done
}

step_keystone_db() {
    configure_keystone
    make_schema keystone keystone keystone_manage db_sync
    if [[ ! -e $DATA/keystone/.bootstrapped ]]; then
        key_repository "$DATA/keystone/fernet"
        key_repository "$DATA/keystone/credential"
        keystone_manage bootstrap --bootstrap-password "$(secret)" \
            --bootstrap-admin-url "$(service_url keystone)/v3" \
            --bootstrap-internal-url "$(service_url keystone)/v3" \
            --bootstrap-public-url "$(service_url keystone)/v3" \
            --bootstrap-region-id "$REGION"
        touch "$DATA/keystone/.bootstrapped"
    fi
}

step_keystone() {
    WATCH=$ETC/keystone/keystone.conf \
        wsgi_start keystone keystone.wsgi.api:application "${PORT[keystone]}" \
        OS_KEYSTONE_CONFIG_DIR="$ETC/keystone"
}

step_identity() {
    cloud_setup identity
}
