# What all jobs share: environment, checks, the walltime, the continuation. A job script says
#
#   . jobs/common.sh jobs/resnet20.pbs       its own name, since a batch system runs a copy of it
#   train experiments/resnet.py --n 3        the command to bring to its end
#
# It needs of the batch system no more than PBS commands, so that the same file runs under Torque,
# OpenPBS, PBS Pro, Slurm's qsub, and as 'bash jobs/resnet20.pbs' without any of them.
# shellcheck shell=bash
#
# Settings, from jobs/site.sh or 'qsub -v NAME=VALUE,...'; the latter wins.
#   PYTHON       interpreter that has the project (default: .venv/bin/python, else python3)
#   DATA         as --data: CIFAR-10, or synthetic (default: where Chainer keeps it)
#   OUT          folder for the run folders (default: runs)
#   FLAGS        more flags for the command
#   PROCESSES    processes that share a batch (default: 1); COMMUNICATOR, as --communicator
#   LAUNCHER     what starts them (default: mpirun -np PROCESSES, nothing for one)
#   MARGIN       seconds before the walltime at which training stops (default: 120)
#   CONTINUE     how many continuations may follow (default: 100)
#   QSUB         options of qsub for a continuation (default: what this job was given)
SETTINGS="SITE PYTHON DATA OUT FLAGS PROCESSES COMMUNICATOR LAUNCHER MARGIN CONTINUE QSUB ROW"
UNFINISHED=75 # exit status of a training that was asked to stop; the same command goes on

SCRIPT=$1
JOB=${PBS_JOBID:-${SLURM_JOB_ID:-}}
ROW=${ROW:-${PBS_ARRAYID:-${PBS_ARRAY_INDEX:-${SLURM_ARRAY_TASK_ID:-}}}} # of an array
SUBMITTERS_PATH=${PBS_O_PATH:-$PATH}
PATH=${PBS_O_PATH:+$PBS_O_PATH:}$PATH # the submitter's, which OpenPBS does not hand on
[ -t 1 ] || export TERM=dumb          # mpirun gives its processes a terminal, but nobody sits there
# It also binds each of two to one core, and divides no cores among their threads; of Open MPI 4, 5:
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none

say() { echo "$(date '+%F %T') ${JOB:-no batch system}: $*"; }

fail() {
    say "error: $*"
    exit 1
}

exports() { # of the variables that are set, as bash reads them
    for name in "$@"; do [ -z "${!name+set}" ] || printf 'export %s=%q\n' "$name" "${!name}"; done
}

# A property of this job as qstat tells it: asked Resource_List.walltime
asked() {
    # Torque and PBS Pro fold long lines; the rest of one begins with a tab, as Slurm's properties do.
    awk -v name="$1 = " '
        function show() { sub(/^[ \t]+/, "", line); if (index(line, name) == 1) print substr(line, length(name) + 1) }
        /^\t/ && !/^\t[A-Za-z_.]+ = / { line = line substr($0, 2); next }
        { show(); line = $0 }
        END { show() }' <<<"$description"
}
description=$([ -z "$JOB" ] || qstat -f "$JOB" 2>/dev/null)

# What the first qsub of a chain was given by -v and -V, for the continuations: the names are qstat's,
# the values are here. The rest is the system's.
SUBMITTED="${SUBMITTED:-} "$(asked Variable_List | grep -oE '(^|,)[A-Za-z_][A-Za-z0-9_]*=' |
    tr -d ',=' | grep -vxE 'PBS_.*|SLURM_.*|PATH|PWD|OLDPWD|SHLVL|_|TMPDIR|HOSTNAME|TERM' | tr '\n' ' ')
# shellcheck disable=SC2086 # lists of words
given=$(exports $SETTINGS) submitted=$(exports SUBMITTED $SUBMITTED)
SITE=${SITE:-jobs/site.sh}
# shellcheck source=jobs/site.sh
. "$SITE" || fail "SITE=$SITE: cannot be read"
eval "$given" # a value from the command line wins over the site's
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
OUT=${OUT:-runs} PROCESSES=${PROCESSES:-1} MARGIN=${MARGIN:-120} CONTINUE=${CONTINUE:-100}
for name in PROCESSES MARGIN CONTINUE; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$name=${!name}; legal: a whole number"
done
if [ "$PROCESSES" -gt 1 ]; then
    LAUNCHER=${LAUNCHER:-mpirun -np $PROCESSES}
    COMMUNICATOR=${COMMUNICATOR:-naive}
fi
# Threads of a process: its share of the processors of a node that are this job's. OpenPBS says all of
# them, unless 'ompthreads' does. Torque and Slurm say nothing, and may let a job use the whole node.
cpus=${NCPUS:-${PBS_NUM_PPN:-${SLURM_CPUS_ON_NODE:-}}}
if [[ $cpus =~ ^[1-9][0-9]{0,5}$ ]] && case ${OMP_NUM_THREADS:-} in
    '') true ;;
    "${NCPUS:-none}") [[ $(asked Resource_List.select) != *ompthreads* ]] ;;
    *) false ;;
esac; then
    nodes=${SLURM_JOB_NUM_NODES:-$(sort -u "${PBS_NODEFILE:-/dev/null}" 2>/dev/null | wc -l)}
    here=$(((PROCESSES + (nodes > 1 ? nodes : 1) - 1) / (nodes > 1 ? nodes : 1))) # processes of a node
    export OMP_NUM_THREADS=$((here > 1 ? (cpus > here ? cpus / here : 1) : cpus))
fi

seconds() { # of [[days-]hours:]minutes:seconds, or of a plain number
    awk -F '[-:]' '{ for (i = 1; i <= NF; i++) s = s * (i == 2 && NF == 4 ? 24 : 60) + $i } END { print s + 0 }' <<<"$1"
}

# Seconds this job may take; 0 when nobody says. Only Torque sets PBS_WALLTIME.
LIMIT=$(seconds "${PBS_WALLTIME:-$(asked Resource_List.walltime)}")
[ "$LIMIT" -eq 0 ] || [ "$LIMIT" -gt "$MARGIN" ] ||
    fail "MARGIN=$MARGIN: the walltime is $LIMIT s; legal: less than that"

# Compute nodes reach no network: everything must be there before the queue's time is spent.
"$PYTHON" -c 'import resnet.compat, chainer' ||
    fail "PYTHON=$PYTHON: cannot import the project; on the login node: make demo, or see README"
"$PYTHON" -m resnet.cifar10 --no-download ${DATA:+"$DATA"} || fail "DATA=${DATA:-}: see above"

# Run a training to its end; or it stops before the walltime, and its continuation is queued.
train() {
    local child status left=() own=() stopped='' signal again
    if [ "$LIMIT" -gt 0 ]; then
        left=(--time-limit $((LIMIT - MARGIN - SECONDS)))
        [ "${left[1]}" -gt 0 ] || fail "MARGIN=$MARGIN: nothing is left of the walltime, $LIMIT s"
    fi
    say "$PYTHON $* (walltime: ${LIMIT} s)"
    # A session of its own: Torque ends all of the script's 50 ms after SIGTERM, and mpirun stops
    # its processes without waiting when SIGTERM reaches it. Whatever ends this script, the kernel
    # then asks the training to stop. Launchers hand SIGUSR1 on, not all SIGTERM.
    ! setpriv --pdeathsig USR1 true 2>/dev/null || own=(setsid setpriv --pdeathsig USR1)
    # shellcheck disable=SC2086 # LAUNCHER and FLAGS are lists of words
    "${own[@]}" ${LAUNCHER:-} "$PYTHON" "$@" --out "$OUT" "${left[@]}" ${DATA:+--data "$DATA"} \
        ${COMMUNICATOR:+--communicator "$COMMUNICATOR"} ${FLAGS:-} &
    child=$!
    # qdel, or a walltime that we did not know of; without a batch system a closed terminal, Ctrl-C.
    trap 'signal=1 stopped=1; kill -USR1 $child' TERM HUP INT
    while signal='' && { wait "$child"; status=$?; [ -n "$signal" ]; }; do :; done # wait again
    trap - TERM HUP INT
    [ "$status" -ne 0 ] || return 0
    if [ -n "$stopped" ]; then # whatever the launcher makes of it
        again=${JOB:+qsub}
        say "stopped by a signal; to go on: ${again:-bash} $SCRIPT"
        exit $UNFINISHED
    fi
    [ "$status" -eq $UNFINISHED ] || fail "exit status $status of $*"
    resubmit
}

# One training of several: the row of an array job, or all of them in turn without an array.
row() {
    rows=$((rows + 1))
    if [ -z "$ROW" ]; then
        train "$@"
    elif [ "$ROW" = $((rows - 1)) ]; then
        trap - EXIT
        train "$@"
        exit
    else # none at all would look like a training that is done
        trap 'fail "ROW=$ROW: no such row; legal: 0 to $((rows - 1))"' EXIT
    fi
}
rows=0

# Queue this job once more, with the same settings: a file, since variables with commas and spaces
# do not survive 'qsub -v' everywhere.
resubmit() {
    local file options next
    [ -n "$JOB" ] && command -v qsub >/dev/null || exit $UNFINISHED
    [ "$CONTINUE" -gt 0 ] || {
        say "CONTINUE=0: no continuation; to go on: qsub $SCRIPT"
        exit $UNFINISHED
    }
    mkdir -p "$OUT/jobs"
    file=$OUT/jobs/$(basename "$SCRIPT" .pbs)${ROW:+-$ROW}.pbs
    options=${QSUB:-$(same_resources)}
    {
        # The options name all resources; PBS Pro refuses 'select' there and 'nodes' in the file.
        grep '^#' "$SCRIPT" | grep -v "^${QSUB:+no }#PBS -l"
        # As this job was given it, so that the site's file is read anew.
        printf '%s\n' "$submitted" "$given" "export CONTINUE=$((CONTINUE - 1))"
        grep -v '^#' "$SCRIPT"
    } >"$file"
    # shellcheck disable=SC2086 # a list of words
    if next=$(PATH=$SUBMITTERS_PATH qsub $options "$file" 2>&1); then
        say "walltime: stopped; goes on as job $next"
        exit 0
    fi
    say "walltime: stopped; no continuation: $next; to go on: qsub $SCRIPT"
    exit $UNFINISHED
}

same_resources() {
    local queue name account priority project group place resources kind value
    # The queue that it was given to: a routing queue's own may take none from elsewhere.
    queue=${PBS_O_QUEUE:-$(asked queue)} name=$(asked Job_Name) account=$(asked Account_Name)
    resources=walltime=$(asked Resource_List.walltime)
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        resources+=,nodes=$SLURM_JOB_NUM_NODES:ppn=$SLURM_CPUS_ON_NODE
    else
        priority=$(asked Priority) group=$(asked group_list)
        project=$(asked project | grep -vx _pbs_project_default)
        value=$(asked Resource_List.select) place=$(asked Resource_List.place)
        resources+=${value:+,select=$value}${place:+,place=$place} # PBS Pro
        for kind in nodes mem pmem vmem pvmem; do                  # Torque
            [ -z "$value" ] && resources+=$(asked "Resource_List.$kind" | sed "s/^/,$kind=/")
        done
    fi
    # One -l: of several, Slurm's qsub takes the last.
    echo "${queue:+-q $queue} ${name:+-N $name} ${account:+-A $account} ${priority:+-p $priority}" \
        "${project:+-P $project} ${group:+-W group_list=$group} -l $resources"
}
