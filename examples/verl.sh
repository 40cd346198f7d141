#!/usr/bin/env bash
# Puzzles in verl: IMAGES=/my/photos MODEL=/models/Qwen2.5-VL-7B-Instruct bash examples/verl.sh [more settings of verl's]
# Every setting is one of verl 0.9.1's, whose own data set and reward loader read what is exported; no training was run by us.
# Older versions have the reward's two settings without `reward.` in front.
set -euo pipefail

: "${IMAGES:?a folder of images}" "${MODEL:?a folder that holds a Qwen2.5-VL}"
DATA=${DATA:-runs/puzzles-verl}
GPUS=${GPUS:-8}

if [ ! -e "$DATA" ]; then
    python -m sslr1.export puzzles "$IMAGES" "$DATA" --format verl --model "$MODEL" --max-pixels 451584 --val 400
fi
reward=$(python -c 'import sslr1.integrations.verl as verl; print(verl.__file__)')

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/val.parquet" \
    data.image_key=images \
    data.train_batch_size=128 \
    data.max_prompt_length=2048 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    reward.custom_reward_function.path="$reward" \
    reward.custom_reward_function.name=compute_score \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    ++actor_rollout_ref.rollout.limit_images=9 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=24576 \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.nnodes=1 \
    trainer.project_name=sslr1 \
    trainer.experiment_name=puzzles \
    trainer.logger='["console"]' \
    trainer.save_freq=50 \
    trainer.test_freq=10 \
    trainer.total_epochs=1 \
    "$@"
