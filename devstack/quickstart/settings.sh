# shellcheck shell=bash
# shellcheck disable=SC2034 # the other files use these variables
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

# Paths, names and settings of the quickstart cloud.
#
# Settings from the environment, QUICKSTART_*, are read only here; the other
# files use the names on the left.

PREFIX=${QUICKSTART_PREFIX:-/opt/nova-lxd}

# Options and settings of an earlier `up` are the defaults of the next.
declare -A SAVED=()
if [[ -r $PREFIX/settings ]]; then
    while IFS='=' read -r key value; do
        SAVED[$key]=$value
    done <"$PREFIX/settings"
fi

# Number of the compute host on which this script works: for the second one it
# runs itself in the namespaces of that host (see second_host.sh).
HOST_NUMBER=${QUICKSTART_HOST_NUMBER:-1}
SECOND_HOME=$PREFIX/compute-2
((HOST_NUMBER == 1)) && HOST_HOME=$PREFIX || HOST_HOME=$SECOND_HOME

VENV=$PREFIX/venv
CACHE=$PREFIX/cache
BIN=$PREFIX/bin
ETC=$HOST_HOME/etc
LOG=$HOST_HOME/log
RUN=$HOST_HOME/run
DATA=$HOST_HOME/data
LXD_HOME=$HOST_HOME/lxd
OVS_RUN=$RUN/ovs

# Unix socket addresses hold 107 characters. The longest one below the prefix
# is that of an OVS control socket:
# compute-2/run/ovs/ovn-controller.4194304.ctl.
MAX_PREFIX_LENGTH=60

# The distribution's interpreter, not another one that is first on PATH.
PYTHON=${QUICKSTART_PYTHON:-/usr/bin/python3}

# Install with pip only, and not with uv.
NO_UV=${QUICKSTART_NO_UV:-}

# Factor for all timeouts, for slow machines.
PATIENCE=${QUICKSTART_PATIENCE:-1}

# Steps that run at the same time, and threads of each API service.
MAX_PARALLEL=${QUICKSTART_PARALLEL:-8}
API_THREADS=${QUICKSTART_THREADS:-6}

COMPUTE_DRIVER=${QUICKSTART_COMPUTE_DRIVER:-${SAVED[COMPUTE_DRIVER]:-lxd.LXDDriver}}
REGION=RegionOne
CLOUD=nova-lxd

# All services listen on this address only.
LOCAL=127.0.0.1
PORT_OFFSET=${QUICKSTART_PORT_OFFSET:-${SAVED[PORT_OFFSET]:-0}}
declare -A PORT=(
    [keystone]=$((5000 + PORT_OFFSET))
    [placement]=$((8778 + PORT_OFFSET))
    [glance]=$((9292 + PORT_OFFSET))
    [neutron]=$((9696 + PORT_OFFSET))
    [nova-api]=$((8774 + PORT_OFFSET))
    [nova-metadata]=$((8775 + PORT_OFFSET))
    [nova-serialproxy]=$((6083 + PORT_OFFSET))
    [cinder-api]=$((8776 + PORT_OFFSET))
    [rabbitmq]=$((5672 + PORT_OFFSET))
    [rabbitmq-dist]=$((25672 + PORT_OFFSET))
    [epmd]=$((4379 + PORT_OFFSET))
)

# Bridges that Neutron expects on a host.
BRIDGE_INTEGRATION=br-int
BRIDGE_PUBLIC=br-ex

# DevStack's public network is 172.24.4.0/24 as well.
PUBLIC_NET=${QUICKSTART_PUBLIC_NET:-${SAVED[PUBLIC_NET]:-172.24.4}}
PRIVATE_NET=${QUICKSTART_PRIVATE_NET:-${SAVED[PRIVATE_NET]:-10.24.0}}
# The network of 4094 addresses that these three numbers are in.
PRIVATE_CIDR=${PRIVATE_NET%.*}.$((${PRIVATE_NET##*.} & 240)).0/20

# lxd or incus; empty means LXD, or Incus if the distribution has no LXD.
CONTAINER_SERVER=${SAVED[CONTAINER_SERVER]:-}

# LXD storage pool: btrfs on a sparse loop file, or a directory.
POOL_NAME=nova
POOL_SIZE=${SAVED[POOL_SIZE]:-20GiB}
POOL_DRIVER=${SAVED[POOL_DRIVER]:-btrfs}

MYSQL_SOCKET=$PREFIX/run/mysql.sock
OVN_SOCKET=$PREFIX/run/ovs/ovn.sock
SECRET_FILE=$PREFIX/data/secret

# Compute hosts, each with its own LXD, Open vSwitch and nova-compute.
COMPUTES=${SAVED[COMPUTES]:-1}

WITH_SERVER=${SAVED[WITH_SERVER]:-yes}
WITH_NAT=${SAVED[WITH_NAT]:-yes}
WITH_CINDER=${SAVED[WITH_CINDER]:-no}

# The user who ran the command gets the clouds.yaml entry and the key.
INVOKER=${SUDO_USER:-root}
INVOKER_HOME=$(getent passwd "$INVOKER" | cut -d: -f6)
