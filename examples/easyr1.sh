#!/usr/bin/env bash
# Puzzles in EasyR1, from its checkout: IMAGES=/my/photos MODEL=/models/Qwen2.5-VL-7B-Instruct bash …/examples/easyr1.sh [more settings]
# Written after EasyR1's sources of 2026; not run by us. The questions ask for their form themselves: no format_prompt. Its bounds on a
# picture's area are opened up, so that it resizes none.
set -euo pipefail

: "${IMAGES:?a folder of images}" "${MODEL:?a folder that holds a Qwen2.5-VL}"
DATA=${DATA:-runs/puzzles-easyr1}
GPUS=${GPUS:-8}

if [ ! -e "$DATA" ]; then
    python -m sslr1.export puzzles "$IMAGES" "$DATA" --format easyr1 --model "$MODEL" --max-pixels 451584 --val 400
fi
reward=$(python -c 'import sslr1.integrations.easyr1 as easyr1; print(easyr1.__file__)')

python -m verl.trainer.main \
    config=examples/config.yaml \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/val.parquet" \
    data.prompt_key=problem \
    data.answer_key=answer \
    data.image_key=images \
    data.format_prompt=null \
    data.min_pixels=3136 \
    data.max_pixels=1003520 \
    data.max_prompt_length=2048 \
    data.max_response_length=1024 \
    data.rollout_batch_size=128 \
    data.val_batch_size=400 \
    algorithm.adv_estimator=grpo \
    algorithm.disable_kl=true \
    worker.reward.reward_function="$reward:compute_score" \
    worker.actor.model.model_path="$MODEL" \
    worker.actor.global_batch_size=128 \
    worker.actor.optim.lr=1.0e-6 \
    worker.rollout.n=8 \
    worker.rollout.limit_images=9 \
    worker.rollout.tensor_parallel_size=1 \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.project_name=sslr1 \
    trainer.experiment_name=puzzles \
    trainer.logger='["console"]' \
    trainer.total_epochs=1 \
    "$@"
