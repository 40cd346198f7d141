#!/usr/bin/env bash
#SBATCH --job-name=sslr1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=sslr1-%j.log
# Training on several nodes that survives time limits and preemption:
#     sbatch examples/slurm.sh configs/qwen2.5-vl-7b.yaml model.path=… data.path=… log.dir=/shared/runs log.name=mine
# Five minutes before the time limit Slurm signals each node's task, which is this script's `node`. It passes the signal on to its ranks;
# they finish their step, write a checkpoint and leave, and the job queues again. The same command then goes on from there.
# model.path, data.path and log.dir must be on storage that all nodes see. Not run under Slurm by us; a test runs it with Slurm's
# commands replaced by stand-ins.
set -uo pipefail

AGAIN=75 # exit code of a node whose ranks were told to stop

# shellcheck disable=SC2329 # srun calls it
node() { # one node's ranks; torchrun would die of the signal, so it ignores it, and the ranks, its children, set handlers of their own
    (trap '' USR1 && exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
        --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" -m sslr1.train "$@") &
    local launcher=$! told="" status=0
    trap 'told=yes; pkill -USR1 -P "$launcher"' USR1 TERM
    while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the ranks have ended
        wait "$launcher"
        status=$?
    done
    [ "$status" = 0 ] && [ -n "$told" ] && exit "$AGAIN"
    exit "$status"
}

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD AGAIN
export -f node
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 bash -c 'node "$@"' node "$@" "train.replicate=$SLURM_NNODES"
status=$?
[ "$status" = "$AGAIN" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$status"
