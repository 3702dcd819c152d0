#!/usr/bin/env bash
# A Slurm of one node on this machine, with the PBS commands, for the tests of jobs/.
#
#   tests/slurm.sh up FOLDER      start it; then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm.sh down FOLDER    cancel its jobs and stop what 'up' has started
#
# Needs root and Debian's munge, slurmctld, slurmd, slurm-client and slurm-wlm-torque. Everything of
# it lies in FOLDER and listens on the loopback; the system's own configuration is left alone.
set -euo pipefail
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf

up() {
    mkdir -p "$folder"/{state,spool,run,log}
    (umask 077 && head -c 1024 /dev/urandom >"$folder/key")
    chmod 755 "$folder" "$folder/run"
    cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-26817}
SlurmdPort=$((${SLURM_TEST_PORT:-26817} + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
PlugStackConfig=$folder/plugstack.conf
JobSubmitPlugins=pbs
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1,sched_min_interval=0
KillWait=150
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000
PartitionName=batch Nodes=$(hostname -s) Default=YES MaxTime=48:00:00 State=UP OverSubscribe=NO
CONF
    echo "optional spank_pbs.so" >"$folder/plugstack.conf" # gives jobs their PBS_ variables
    echo "CgroupMountpoint=/sys/fs/cgroup" >"$folder/cgroup.conf"
    munged --force --num-threads=2 --key-file="$folder/key" --socket="$folder/run/munge" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged" \
        --seed-file="$folder/run/seed"
    slurmctld -c -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 80); do
        [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || return 0
        sleep 0.25
    done
    echo "Slurm does not come up:" >&2
    tail -n 5 "$folder"/log/* >&2
    exit 1
}

down() {
    # Jobs first: one that outlives its Slurm would report its end to the next one at this port.
    scancel -u "$(id -un)" 2>/dev/null || true
    scancel --full --signal=KILL -u "$(id -un)" 2>/dev/null || true
    for _ in $(seq 40); do
        [ -n "$(squeue -h 2>/dev/null)" ] || break
        sleep 0.25
    done
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$folder/run/$daemon.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 40); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.25
        done
    done
}

"$1"
