#!/usr/bin/env bash
# Fine-tune Stable Diffusion 2.0-base on one Ascend device. Every variable can be set from the environment;
# further arguments are passed on to train_dreambooth.py.
set -euo pipefail

export GLOG_v="${GLOG_v:-3}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-6000}"
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"
# export SD_VERSION=2.1-v chooses the checkpoint in models/ and its configuration; without it 2.0-base is taken
export RANK_SIZE="${RANK_SIZE:-1}"
[[ -n ${launch_words:-} ]] || export DEVICE_ID="${DEVICE_ID:-0}" # launchers give each process its own

output_path="${output_path:-output/}"
task_name="${task_name:-txt2img}"
# A folder that holds an earlier run is never emptied: give another task_name, or --resume=latest.
mkdir -p "${output_path:?}/${task_name:?}"
export MS_COMPILER_CACHE_PATH="${MS_COMPILER_CACHE_PATH:-${output_path:?}/${task_name:?}}"

instance_data_dir="${instance_data_dir:-dreambooth/dataset/dog}"
instance_prompt="${instance_prompt:-a photo of sks dog}"
class_data_dir="${class_data_dir:-temp_class_images/dog}"
class_prompt="${class_prompt:-a photo of a dog}"
pretrained_model_path="${pretrained_model_path:-models/}"
train_config_file="${train_config_file:-configs/train_dreambooth_sd_v2.json}"
train_batch_size="${train_batch_size:-1}"

start=()
[[ -z ${launch_words:-} ]] || mapfile -t start <<<"$launch_words" # a word a line, from run_train_dreambooth_distributed.sh
exec ${start[@]+"${start[@]}"} "${PYTHON:-python}" train_dreambooth.py \
  --mode=0 \
  --use_parallel="${use_parallel:-False}" \
  --instance_data_dir="$instance_data_dir" \
  --instance_prompt="$instance_prompt" \
  --class_data_dir="$class_data_dir" \
  --class_prompt="$class_prompt" \
  --train_config="$train_config_file" \
  --output_path="$output_path/$task_name" \
  --pretrained_model_path="$pretrained_model_path" \
  ${pretrained_model_file:+--pretrained_model_file="$pretrained_model_file"} \
  ${image_size:+--image_size="$image_size"} \
  --train_batch_size="$train_batch_size" \
  --epochs="${epochs:-8}" \
  --start_learning_rate="${start_learning_rate:-2e-6}" \
  --train_text_encoder="${train_text_encoder:-True}" \
  "$@"
