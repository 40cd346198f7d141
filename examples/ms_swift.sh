#!/usr/bin/env bash
# Puzzles in ms-swift: IMAGES=/my/photos MODEL=/models/Qwen2.5-VL-7B-Instruct bash examples/ms_swift.sh [more settings of swift's]
# ms-swift 4.6.0 loads the data and calls the plugin; no training was run by us.
set -euo pipefail

: "${IMAGES:?a folder of images}" "${MODEL:?a folder that holds a Qwen2.5-VL}"
DATA=${DATA:-runs/puzzles-ms-swift}
here=$(cd "$(dirname "$0")" && pwd)

if [ ! -e "$DATA" ]; then
    python -m sslr1.export puzzles "$IMAGES" "$DATA" --format ms-swift --model "$MODEL" --max-pixels 451584 --val 400
fi

# paths in the rows are relative to the data's folder
ROOT_IMAGE_DIR="$DATA" NPROC_PER_NODE=${GPUS:-8} MAX_PIXELS=1003520 swift rlhf \
    --rlhf_type grpo \
    --model "$MODEL" \
    --dataset "$DATA/train.jsonl" \
    --val_dataset "$DATA/val.jsonl" \
    --external_plugins "$here/ms_swift_plugin.py" \
    --reward_funcs sslr1 \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.5 \
    --vllm_limit_mm_per_prompt '{"image": 9}' \
    --num_generations 8 \
    --max_length 2048 \
    --max_completion_length 1024 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-6 \
    --beta 0 \
    --temperature 1.0 \
    --num_train_epochs 1 \
    --deepspeed zero2 \
    --logging_steps 1 \
    --log_completions true \
    --output_dir runs/ms-swift \
    "$@"
