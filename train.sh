#!/bin/sh
# Train a method. Settings are environment variables; flags and key.sub=value overrides of train.py may follow.
#   DATA_ROOT=data/mini sh train.sh init.first_stage_model=AUTOENCODER
#                                                              all GPUs of this machine, or the CPU when there is none
#   GPUS=0,1 NAME=gid CONFIG=configs/model/tisynth_sd15.yaml BASE=configs/train/gid.yaml DATA_ROOT=data/gid sh train.sh
#                                                              GPUS has numbers of GPUs, as --gpus: 0 is the first one
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 sh train.sh          several machines by torchrun: start it on each of them
#   sbatch --nodes 2 --ntasks-per-node 4 --gres gpu:4 train.sh      SLURM: one task for each GPU
#   RESUME=logs/RUN sh train.sh                                go on with a run, exactly
set -eu
here=$(dirname "$0")
[ -f "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-.} # sbatch runs a copy of this script from elsewhere
cd "$here"
PYTHON=$(sh scripts/setup_env.sh train)

if [ -n "${RESUME:-}" ]; then
    set -- --resume "$RESUME" "$@"
else
    # shellcheck disable=SC2086 # BASE may name several files, merged left to right
    set -- --base ${BASE:-configs/train/mini.yaml} --config_model "${CONFIG:-configs/model/tisynth_mini.yaml}" "$@"
    if [ -n "${DATA_ROOT:-}" ]; then set -- --data_root "$DATA_ROOT" "$@"; fi
    if [ -n "${NAME:-}" ]; then set -- --name "$NAME" "$@"; fi
fi

if [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    if [ -n "${GPUS:-}" ]; then set -- --gpus "$GPUS" "$@"; fi # default: all that the job was given
    exec srun "$PYTHON" train.py --num_nodes "$SLURM_NNODES" "$@"
fi
if [ "${NODES:-1}" -gt 1 ]; then
    gpus=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}
    count=$(echo "$gpus" | tr ',' '\n' | grep -c .)
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$count" --node_rank "${NODE_RANK:?}" \
        --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" \
        train.py --num_nodes "$NODES" --gpus "$gpus" "$@"
fi
if [ -n "${GPUS+set}" ]; then set -- --gpus "$GPUS" "$@"; fi
exec "$PYTHON" train.py "$@"
