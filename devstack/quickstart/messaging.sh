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

# Messaging: our own RabbitMQ node on the loopback address.

readonly RABBIT_NODE=novalxd@localhost

rabbit_url() {
    printf 'rabbit://openstack:%s@%s:%s/' "$(secret)" "$LOCAL" \
        "${PORT[rabbitmq]}"
}

# Variables that make all RabbitMQ and Erlang tools use our directories.
rabbit_env() {
    RABBIT_ENV=(
        HOME="$DATA/rabbitmq"
        RABBITMQ_NODENAME="$RABBIT_NODE"
        RABBITMQ_CONF_ENV_FILE="$ETC/rabbitmq/rabbitmq-env.conf"
        RABBITMQ_CONFIG_FILE="$ETC/rabbitmq/rabbitmq.conf"
        RABBITMQ_ADVANCED_CONFIG_FILE="$ETC/rabbitmq/advanced.config"
        RABBITMQ_ENABLED_PLUGINS_FILE="$ETC/rabbitmq/enabled_plugins"
        RABBITMQ_MNESIA_BASE="$DATA/rabbitmq/mnesia"
        RABBITMQ_LOG_BASE="$LOG/rabbitmq"
        RABBITMQ_LOGS=-
        RABBITMQ_PID_FILE="$RUN/rabbitmq.own.pid"
        RABBITMQ_GENERATED_CONFIG_DIR="$DATA/rabbitmq/config"
        RABBITMQ_DIST_PORT="${PORT[rabbitmq-dist]}"
        # One scheduler that sleeps when idle.
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
        ERL_EPMD_ADDRESS="$LOCAL"
        ERL_EPMD_PORT="${PORT[epmd]}"
        LANG=C.UTF-8
    )
}

step_rabbitmq() {
    local -a RABBIT_ENV
    rabbit_env
    mkdir -p "$ETC/rabbitmq" "$DATA/rabbitmq" "$LOG/rabbitmq"
    : >"$ETC/rabbitmq/rabbitmq-env.conf"
    echo '[].' >"$ETC/rabbitmq/enabled_plugins"
    cat >"$ETC/rabbitmq/rabbitmq.conf" <<EOF
listeners.tcp.local = $LOCAL:${PORT[rabbitmq]}
default_user = openstack
default_pass = $(secret)
loopback_users = none
vm_memory_high_watermark.relative = 0.3
disk_free_limit.absolute = 200MB
log.console.level = warning
EOF
    daemon_start epmd epmd -address "$LOCAL" -port "${PORT[epmd]}"
    wait_until epmd 10 epmd port_open "${PORT[epmd]}"
    # The distribution's wrapper script would switch to another user.
    WATCH=$ETC/rabbitmq/rabbitmq.conf daemon_start rabbitmq "${RABBIT_ENV[@]}" \
        /usr/lib/rabbitmq/bin/rabbitmq-server
    wait_until RabbitMQ 90 rabbitmq port_open "${PORT[rabbitmq]}"
}
