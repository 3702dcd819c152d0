# What differs from cluster to cluster. Every job reads this file; another one: qsub -v SITE=FILE.
# shellcheck shell=bash disable=SC2034
#
# Blue Waters, whose GPU nodes were of the kind xk, submitted as
#   qsub -q normal -A PROJECT -l nodes=1:ppn=16:xk jobs/resnet56.pbs
#
# module load bwpy cudatoolkit              # the environment
# PYTHON=$HOME/resnet/bin/python
# DATA=/scratch/sciteam/$USER/cifar10       # staged on the login node, see the README
# OUT=/scratch/sciteam/$USER/runs
# LAUNCHER="aprun -n 1 -N 1 -d 16 -cc none" # jobs begin on a service node; aprun leads to the GPU
#
# And what other places may want:
# export http_proxy=...                     # nothing here needs the network, though
# PROCESSES=4 COMMUNICATOR=pure_nccl LAUNCHER="mpirun -np 4 --bind-to none"
# export OMP_NUM_THREADS=4                  # threads of each process
