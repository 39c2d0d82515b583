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

# The database: our own MariaDB, which listens on a unix socket only.

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
# A test cloud may lose its last second in a power failure, but nothing when
# only the database is killed.
innodb_flush_log_at_trx_commit = 2
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

# make_schema NAME "DATABASE..." COMMAND...: runs a command that migrates the
# databases to the installed releases. New databases are filled from a dump of
# an earlier run with the same releases, in a tenth of the time. The dump lacks
# the rows of the tables in OF_THIS_CLOUD; if there are any, the command runs in
# any case.
make_schema() {
    local name=$1 kept stamp=$DATA/mysql/.synced-$1
    local -a databases
    read -ra databases <<<"$2"
    shift 2
    if [[ -e $stamp ]] && cmp -s "$REPO/constraints.txt" "$stamp"; then
        return 0
    fi
    kept=$(kept_schema "$name")
    # An incomplete copy looks complete: the version is written first.
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

# Prints the file of the dump for these releases.
kept_schema() {
    local releases
    releases=$(sha256sum "$REPO/constraints.txt")
    printf '%s/schemas/%s-%s.sql' "$CACHE" "$1" "${releases:0:16}"
}

# Checks that the databases are empty, so that a dump after the command holds no
# data of this cloud.
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
