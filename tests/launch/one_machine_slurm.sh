#!/usr/bin/env bash
# A real Slurm on one machine, for tests: one controller and n nodes, each in a network namespace with a host name,
# an address and a loopback of its own, so that nothing works between nodes that would not work between machines.
#
#   one_machine_slurm.sh install                    # Debian: slurm-wlm, munge, iproute2 (needs a package mirror)
#   one_machine_slurm.sh start FOLDER [NUM_NODES]   # default 2; prints what to export
#   one_machine_slurm.sh stop FOLDER
#
# Needs root (network namespaces). Touches nothing outside FOLDER but: namespaces and links that start with "refit-",
# and lines marked "# refit-slurm" in /etc/hosts; stop takes all of it away. One at a time on a machine.
# Nodes share memory, processes and file system, as namespaces do: a test of scripts, not of capacity.
set -Eeuo pipefail

network=10.231.77
bridge=refit-br
controller="$network.1"

die() { echo "one_machine_slurm: $*" >&2; exit 1; }

node_address() { echo "$network.$((10 + $1))"; }

write_slurm_conf() { # FOLDER NUM_NODES
  local memory_mb number
  memory_mb="$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
  cat >"$1/slurm.conf" <<CONF
ClusterName=refit
SlurmctldHost=$(hostname)($controller)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$1/munge/socket
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool-%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd-%n.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
TopologyPlugin=topology/tree
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=60
CONF
  for ((number = 1; number <= $2; number++)); do
    echo "NodeName=refit-n$number NodeAddr=$(node_address "$number") Sockets=1 CoresPerSocket=$(nproc) ThreadsPerCore=1 RealMemory=$memory_mb"
  done >>"$1/slurm.conf"
  echo "PartitionName=main Nodes=refit-n[1-$2] Default=YES MaxTime=INFINITE OverSubscribe=YES:4 State=UP" >>"$1/slurm.conf"
  # Odd nodes at one leaf switch, even nodes at the other: the order by switch differs from the order by name.
  awk -v n="$2" 'BEGIN {
    for (k = 1; k <= n; k++) leaf[k % 2] = leaf[k % 2] (leaf[k % 2] ? "," : "") "refit-n" k
    if (leaf[1]) print "SwitchName=leaf-a Nodes=" leaf[1]
    if (leaf[0]) print "SwitchName=leaf-b Nodes=" leaf[0]
    print "SwitchName=spine Switches=leaf-a" (leaf[0] ? ",leaf-b" : "")
  }' >"$1/topology.conf"
}

start_munge() { # FOLDER
  mkdir -p "$1/munge"
  chmod 755 "$1/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$1/munge/key")
  munged --force --key-file="$1/munge/key" --socket="$1/munge/socket" --pid-file="$1/munge/pid" \
    --log-file="$1/munge/log" --seed-file="$1/munge/seed"
}

start_node() { # FOLDER NUMBER
  local name="refit-n$2"
  ip netns add "$name"
  ip link add "$name" type veth peer name eth0 netns "$name"
  ip link set "$name" master "$bridge" up
  ip -n "$name" addr add "$(node_address "$2")/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" link set lo up
  echo "$(node_address "$2") $name # refit-slurm" >>/etc/hosts
  mkdir -p "$1/spool-$name"
  # nsenter, not `ip netns exec`: that one mounts a new /sys, without the control groups that slurmd looks at.
  # shellcheck disable=SC2016  # the inner shell expands these
  nsenter --net="/run/netns/$name" unshare --uts bash -c 'hostname "$1" && exec slurmd -f "$2/slurm.conf" -N "$1"' _ "$name" "$1"
}

start() { # FOLDER NUM_NODES
  local folder number deadline_s=$((SECONDS + 60))
  [ "$(id -u)" = 0 ] || die "needs root, for network namespaces"
  for number in munged slurmctld slurmd sbatch ip unshare; do
    command -v "$number" >/dev/null || die "$number is not installed; run: $0 install"
  done
  ip link show "$bridge" >/dev/null 2>&1 && die "$bridge is there already; stop the other one first"
  mkdir -p "$1"
  folder="$(cd "$1" && pwd)"
  trap 'stop "$folder"' ERR
  mkdir -p "$folder/state"
  write_slurm_conf "$folder" "$2"
  ip link add "$bridge" type bridge
  ip addr add "$controller/24" dev "$bridge"
  ip link set "$bridge" up
  start_munge "$folder"
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld -i -f "$SLURM_CONF"
  for ((number = 1; number <= $2; number++)); do start_node "$folder" "$number"; done
  until [ "$(sinfo -h -N -o '%T' 2>/dev/null | grep -c '^idle$')" = "$2" ]; do
    ((SECONDS < deadline_s)) || { sinfo -N -l >&2 || true; echo "not all $2 nodes are idle after 60 s; see $folder/*.log" >&2; false; }
    sleep 0.5
  done
  echo "export SLURM_CONF=$SLURM_CONF"
}

end_pid_file() { # FILE: ask the process in it to end, force it after 10 s
  local pid deadline_s=$((SECONDS + 10))
  [ -f "$1" ] || return 0
  pid="$(cat "$1")"
  kill "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null; do
    ((SECONDS < deadline_s)) || { kill -9 "$pid"; break; }
    sleep 0.2
  done
}

stop() { # FOLDER
  local folder file name
  folder="$(cd "$1" && pwd)"
  SLURM_CONF="$folder/slurm.conf" timeout 20 scancel --user=root 2>/dev/null || true
  for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do end_pid_file "$file"; done
  for name in $(ip netns list | awk '/^refit-n/ {print $1}'); do
    ip netns pids "$name" | xargs -r kill -9 2>/dev/null || true
    ip netns del "$name"
  done
  ip link del "$bridge" 2>/dev/null || true
  cp /etc/hosts "$folder/hosts" && sed -i '/# refit-slurm$/d' "$folder/hosts" && cat "$folder/hosts" >/etc/hosts
}

case "${1:-}" in
  install) apt-get install -y --no-install-recommends slurm-wlm munge iproute2 ;;
  start) start "${2:?FOLDER}" "${3:-2}" ;;
  stop) stop "${2:?FOLDER}" ;;
  *) die "usage: $0 install | start FOLDER [NUM_NODES] | stop FOLDER" ;;
esac
