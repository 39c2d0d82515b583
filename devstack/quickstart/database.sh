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

# make_schema NAME "DATABASE..." COMMAND...: has the command bring databases to
# the releases in use now. New ones are filled from what the command made of
# them the last time, with the same releases: it takes a tenth of the time.
# What it writes into the tables OF_THIS_CLOUD is not kept, so that it has to
# run in any case.
make_schema() {
    local name=$1 kept stamp=$DATA/mysql/.synced-$1
    local -a databases
    read -ra databases <<<"$2"
    shift 2
    if [[ -e $stamp ]] && cmp -s "$REPO/constraints.txt" "$stamp"; then
        return 0
    fi
    kept=$(kept_schema "$name")
    # Half of a copy says that it is a whole one: its version comes first.
    if [[ -e $stamp.loading ]]; then
        empty_databases "${databases[@]}"
        rm "$stamp.loading"
    fi
    if [[ -s $kept ]] && are_new "${databases[@]}"; then
        touch "$stamp.loading"
        sql <"$kept"
        rm "$stamp.loading"
        [[ -z ${OF_THIS_CLOUD:-} ]] || "$@"
    elif are_new "${databases[@]}"; then
        "$@"
        keep_schema "$kept" "${databases[@]}"
    else
        "$@"
    fi
    cp "$REPO/constraints.txt" "$stamp"
}

# Where the schema of these releases is kept.
kept_schema() {
    local releases
    releases=$(sha256sum "$REPO/constraints.txt")
    printf '%s/schemas/%s-%s.sql' "$CACHE" "$1" "${releases:0:16}"
}

# Nobody has put anything into them yet, so that what the command makes of
# them holds no data of this cloud.
are_new() {
    local name tables
    for name; do
        tables=$(sql "$name" -e 'SHOW TABLES') || return 1
        [[ -z $tables ]] || return 1
    done
}

empty_databases() {
    local name
    for name; do
        echo "DROP DATABASE $name; CREATE DATABASE $name" \
            'CHARACTER SET utf8mb3 COLLATE utf8mb3_general_ci;'
    done | sql
}

keep_schema() {
    local file=$1
    local -a left_out
    shift
    read -ra left_out <<<"${OF_THIS_CLOUD:-}"
    mkdir -p "${file%/*}"
    rm -f "${file%-*}"-*.sql
    mariadb-dump --no-defaults --user=root --socket="$MYSQL_SOCKET" \
        --single-transaction "${left_out[@]/#/--ignore-table-data=}" \
        --databases "$@" >"$file.new"
    mv "$file.new" "$file"
}
