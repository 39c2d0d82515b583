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

# The database: a MariaDB of our own that listens on a unix socket only.

readonly -a DATABASES=(keystone glance placement nova_api nova nova_cell0
    neutron)

# URL of a database for oslo.db.
database_url() {
    printf 'mysql+pymysql://root@localhost/%s?unix_socket=%s&charset=utf8' \
        "$1" "$MYSQL_SOCKET"
}

sql() {
    mariadb --no-defaults --user=root --socket="$MYSQL_SOCKET" --batch \
        --skip-column-names "$@"
}

step_mariadb() {
    local name dir=$DATA/mysql
    cat >"$ETC/mariadb.cnf" <<EOF
[mariadbd]
user = root
datadir = $dir
socket = $MYSQL_SOCKET
pid-file = $RUN/mysql.own.pid
skip-networking
skip-name-resolve
max_connections = 400
performance_schema = OFF
innodb_buffer_pool_size = 256M
# A lab may lose the last second of its life when the power goes.
innodb_flush_log_at_trx_commit = 0
innodb_doublewrite = 0
sync_frm = OFF
log_bin = OFF
EOF
    if [[ ! -e $dir/.complete ]]; then
        rm -rf "$dir"
        mariadb-install-db --no-defaults --user=root --datadir="$dir" \
            --auth-root-authentication-method=normal --skip-test-db
        touch "$dir/.complete"
    fi
    WATCH=$ETC/mariadb.cnf daemon_start mariadb mariadbd --defaults-file="$ETC/mariadb.cnf"
    wait_until MariaDB 60 mariadb sql -e 'SELECT 1'
    for name in "${DATABASES[@]}"; do
        echo "CREATE DATABASE IF NOT EXISTS $name CHARACTER SET utf8mb3" \
            "COLLATE utf8mb3_general_ci;"
    done | sql
}

# db_synced NAME: the schema of NAME was made by the releases in use now.
db_synced() {
    [[ -e $DATA/mysql/.synced-$1 ]] &&
        cmp -s "$REPO/constraints.txt" "$DATA/mysql/.synced-$1"
}

mark_db_synced() {
    cp "$REPO/constraints.txt" "$DATA/mysql/.synced-$1"
}
