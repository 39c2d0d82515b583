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

# What the configuration files of the OpenStack services have in common.

# All services share one password: none listens outside of this host.
secret() {
    cat "$SECRET_FILE"
}

make_secret() {
    [[ -s $SECRET_FILE ]] || (
        umask 077
        od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$SECRET_FILE"
    )
}

service_url() {
    printf 'http://%s:%s' "$LOCAL" "${PORT[$1]}"
}

# auth_options USER: prints the options with which a service authenticates as
# USER.
auth_options() {
    cat <<EOF
auth_type = password
auth_url = $(service_url keystone)/v3
username = $1
password = $(secret)
project_name = service
user_domain_name = Default
project_domain_name = Default
region_name = $REGION
EOF
}

# Prints the sections of a service that checks tokens.
token_sections() {
    cat <<EOF
[keystone_authtoken]
www_authenticate_uri = $(service_url keystone)
$(auth_options "$1")
service_token_roles_required = true

[oslo_policy]
enforce_new_defaults = true
EOF
}

messaging_sections() {
    cat <<EOF
[oslo_messaging_rabbit]
rabbit_quorum_queue = false
heartbeat_in_pthread = false

[oslo_messaging_notifications]
driver = noop
EOF
}

# privsep_sections FILE GROUP...: services run as root and need no sudo.
privsep_sections() {
    local file=$1 group
    shift
    for group; do
        printf '\n[%s]\nhelper_command = %s --config-file %s\n' "$group" \
            "$VENV/bin/privsep-helper" "$file"
    done
}

# wsgi_start NAME MODULE PORT [VARIABLE=value]...: starts a WSGI application in
# uWSGI with one process. PYARGV holds its command line, if it needs one.
wsgi_start() {
    local name=$1 module=$2 port=$3
    shift 3
    cat >"$ETC/uwsgi/$name.ini" <<EOF
[uwsgi]
http-socket = $LOCAL:$port
module = $module
need-app = true
processes = 1
threads = $API_THREADS
enable-threads = true
lazy-apps = true
die-on-term = true
thunder-lock = true
buffer-size = 65535
http-raw-body = true
wsgi-manage-chunked-input = true
# glanceclient sends chunks of 1 MiB.
chunked-input-limit = 67108864
chunked-input-timeout = 60
add-header = Connection: close
disable-logging = true
${PYARGV:+pyargv = $PYARGV}
EOF
    WATCH="${WATCH:-} $ETC/uwsgi/$name.ini $VENV/.constraints" \
        daemon_start "$name" "$@" "$VENV/bin/uwsgi" --ini "$ETC/uwsgi/$name.ini"
    wait_until "$name" 90 "$name" http_answers "http://$LOCAL:$port/"
}
