#!/bin/bash
# A sweep on a Ray cluster of the nodes of one SLURM job; README.md has what it needs. With the environment
# activated, and PGPASSWORD and MLFLOW_TRACKING_* set:
#   sbatch --nodes=4 --cpus-per-task=16 sweeps/cluster/slurm.sh sweep.trials=200 \
#       study.storage=postgresql+psycopg://optuna@HOST/optuna tracking=server tracking.uri=http://HOST:5000
#SBATCH --job-name=sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --no-kill               # a lost node costs its trials' workers, not the job
#SBATCH --requeue               # after preemption or the loss of the first node
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@60      # before the time limit: the sweep stops, to go on by sweep.name

port=$((20000 + SLURM_JOB_ID % 5000 * 2))  # and the next one: jobs may share a node
address=$(hostname -I | cut -d' ' -f1):$port
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export port address RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# shellcheck disable=SC2016  # expanded on the nodes
srun --no-kill --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    role=(--address="$address")
    ((SLURM_PROCID)) || role=(--head --node-ip-address="${address%:*}" --port="$port"
        --ray-client-server-port=$((port + 1)) --include-dashboard=false)
    exec ray start "${role[@]}" --num-cpus="$SLURM_CPUS_PER_TASK" \
        ${SLURM_MEM_PER_NODE:+--memory=$((SLURM_MEM_PER_NODE * 2**20))} --block' >"ray-$SLURM_JOB_ID.log" 2>&1 &

for _ in {1..60}; do
    nodes=$(ray status --address="$address" 2>/dev/null | grep -c '^ 1 node_')
    ((nodes == SLURM_NNODES)) && break
    sleep 2
done

# In place of this shell: signals reach the launcher alone, and when it ends, so does the job.
exec python -m sweeps.run executor=ray executor.address="$address" "sweep.name=slurm-$SLURM_JOB_ID" "$@"
