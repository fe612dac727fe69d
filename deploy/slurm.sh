#!/usr/bin/env bash
# A study on a SLURM allocation: `ray symmetric-run` starts Ray on every node, runs the driver on
# the first and stops Ray when it ends. Submit it again to continue the study.
#
#   sbatch --nodes=4 --gpus-per-node=4 deploy/slurm.sh hydra_lv hydra im.h5 label.h5 mask.h5
#
#SBATCH --job-name=hydralv-tune
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
# `ray symmetric-run` refuses a node on which Ray already runs, and stops all of Ray at its end.
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

space=${1:?usage: sbatch slurm.sh SPACE STUDY IMAGE LABEL [MASK]}
study=${2:?} image=${3:?} label=${4:?} mask=${5:-}
out=${HYDRALV_OUT:-$PWD/runs/$study} # a folder that every node sees
mkdir -p "$out"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# Five minutes before the job ends the workers are told to save, and what runs is enqueued again.
# SLURM's own signal would reach Ray's daemons too, and take the workers down before they save.
end=$(date --date "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s)
seconds=$((end - $(date +%s) - 300))

# One token for this cluster; srun hands the environment to every node.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN

# Several jobs on one study: HYDRALV_STORAGE=postgresql+psycopg://user@host/hydralv, with the
# password in PGPASSFILE.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --include-dashboard false -- \
    hydralv-tune run "$space" --image "$image" --label "$label" ${mask:+--mask "$mask"} \
    --study "$study" --out "$out" --storage "${HYDRALV_STORAGE:-sqlite:///$out/study.db}" \
    --ray-address "$head:$port" --timeout-s "$seconds"
