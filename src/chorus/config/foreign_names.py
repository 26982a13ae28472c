"""Keys of transformers, TRL, PEFT, LLaMA-Factory, Axolotl and torchtune, and what they are called here.

An entry gives our key and how its meaning differs. An entry without a key says why there is none and what to
do instead. A name that is one of our keys is never looked up.
"""

from typing import NamedTuple


class Answer(NamedTuple):
    """Our key for a foreign name (None: there is none) and a note for the user."""

    key: str | None
    note: str = ""


def _same(key: str, *names: str, note: str = "") -> dict[str, Answer]:
    return dict.fromkeys(names, Answer(key, note))


def _none(note: str, *names: str) -> dict[str, Answer]:
    return dict.fromkeys(names, Answer(None, note))


ONE_PROCESS = "it counts the rows of one micro-batch on one process"
PRECISION = "one of no, fp16, bf16 and auto"

FOREIGN_NAMES: dict[str, Answer] = {
    # model and adapters
    **_same(
        "model_name",
        *("model_name_or_path", "base_model", "model", "model_id", "pretrained_model_name_or_path"),
        "base_model_name_or_path",
    ),
    **_none(
        "a hub id is read at its main revision; leave it out, or download another one and name its folder",
        *("revision", "model_revision"),
    ),
    **_same("lora_rank", "lora_r", "r", "rank", "lora_dim"),
    **_same("lora_alpha", "alpha"),
    **_same("lora_target_modules", "target_modules", "lora_target", "lora_modules", "lora_attn_modules"),
    **_same(
        "lora_target_modules",
        "lora_target_linear",
        "apply_lora_to_mlp",
        note="all-linear names every linear layer",
    ),
    **_same("num_agents", "num_adapters", "ensemble_size", "num_models", "num_members", "k_agents"),
    **_none(
        "every agent is a LoRA adapter; leave it out",
        *("use_peft", "peft_type", "adapter", "finetuning_type", "use_lora", "task_type", "stage"),
    ),
    **_same(
        "load_in_4bit", "quantization_bit", "quantization_method", "quantize_base", note="or load_in_8bit"
    ),
    **_none(
        "load_in_4bit means NF4 with double quantisation; leave it out",
        *(
            "bnb_4bit_quant_type",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_use_double_quant",
            "use_bnb_nested_quant",
        ),
    ),
    **_same("lora_exclude_modules", "exclude_modules"),
    **_same(
        "layers_to_transform",
        *("layers_pattern", "peft_layers_to_transform", "peft_layers_pattern"),
        note="numbers of decoder layers; the pattern of their names is known",
    ),
    **_same(
        "initialize_adapters_rand",
        *("init_lora_weights", "peft_init_lora_weights"),
        note="false is PEFT's own start, and lora_init_gain scales it",
    ),
    **_none(
        "adapters are plain LoRA on linear layers, and nothing else is trained; leave it out",
        *("use_dora", "peft_use_dora", "lora_bias", "bias", "target_parameters", "lora_target_parameters"),
        *("modules_to_save", "lora_modules_to_save", "additional_target", "trainable_token_indices"),
        *("ensure_weight_tying", "layer_replication", "alora_invocation_tokens", "arrow_config"),
        *("use_bdlora", "use_qalora", "qalora_group_size", "kasa_config", "velora_config"),
        *("monteclora_config", "loraplus_lr_ratio", "loraplus_lr_embedding"),
    ),
    **_none(
        "all layers of an agent have one rank and one alpha; leave it out, and set lora_rank and lora_alpha",
        *("rank_pattern", "alpha_pattern"),
    ),
    **_none(
        "adapters start at random, or from init_adapters_from; leave it out",
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    ),
    **_none(
        "it is found from the base; leave it out",
        *("fan_in_fan_out", "lora_fan_in_fan_out", "megatron_config", "megatron_core", "auto_mapping"),
        *("runtime_config", "inference_mode", "peft_version"),
    ),
    **_none(
        "load_in_4bit means NF4 with double quantisation, and load_in_8bit LLM.int8; set one of them to true",
        *("quantization_config", "quantization", "bnb_config", "bnb_config_kwargs"),
    ),
    **_same(
        "init_adapters_from",
        *("adapter_name_or_path", "lora_model_dir", "resume_lora_training"),
        *("adapter_path", "lora_weights_path"),
        note="a run's output_dir, or a list of PEFT LoRA folders, one for each agent",
    ),
    # precision and execution
    **_same(
        "mixed_precision", "bf16", "bf16_full_eval", "use_bf16", note=f"{PRECISION}: mixed_precision=bf16"
    ),
    **_same("mixed_precision", "fp16", "use_fp16", note=f"{PRECISION}: mixed_precision=fp16"),
    **_same("mixed_precision", "torch_dtype", "dtype", "precision", "pure_bf16", note=PRECISION),
    **_same(
        "attn_implementation",
        "flash_attn",
        "flash_attention",
        "use_flash_attention_2",
        "attn_impl",
        "sdp_attention",
    ),
    **_same("gradient_checkpointing", "activation_checkpointing", "enable_activation_checkpointing", "gc"),
    **_none(
        "recomputation is that of torch without reentry; leave it out, and set gradient_checkpointing",
        "gradient_checkpointing_kwargs",
    ),
    **_same("compile", "torch_compile"),
    **_none(
        "the kernels of adapters and loss are built in; leave it out",
        *("use_liger_kernel", "liger_kernel", "use_liger", "enable_liger_kernel", "liger_kernel_config"),
        *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "padding_free"),
    ),
    **_none(
        "torch decides it; leave it out",
        *(
            "tf32",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "jit_mode_eval",
        ),
    ),
    **_same(
        "deepspeed_config_file",
        "deepspeed",
        note="that file holds DeepSpeed's settings; use_deepspeed turns it on",
    ),
    **_same("collective_timeout_s", "ddp_timeout", "ddp_timeout_seconds"),
    **_none("several GPUs are used through DDP or DeepSpeed ZeRO; leave it out", "fsdp", "fsdp_config"),
    # data
    **_same(
        "dataset_name",
        "dataset",
        "datasets",
        "dataset_path",
        "data_path",
        "train_file",
        "dataset_dir",
        "data_files",
    ),
    **_same("dataset_subset", "dataset_config", "dataset_config_name", "subset", "config_name"),
    **_same(
        "max_seq_length",
        *("max_length", "max_seq_len", "seq_len", "sequence_len"),
        *("cutoff_len", "model_max_length", "block_size"),
        note="prompt, completion and end token together",
    ),
    **_same(
        "max_seq_length", "max_prompt_length", "max_completion_length", note="prompt and completion together"
    ),
    **_same("packing", "sample_packing", "packed", "pack"),
    **_same("pad_to_multiple_of", "pad_to_sequence_len"),
    **_same(
        "validation_split",
        "val_set_size",
        "val_size",
        "test_size",
        "eval_split_ratio",
        note="a fraction of the rows",
    ),
    **_same("debug_subset_size", "max_samples", "max_train_samples", "num_samples"),
    **_same("num_workers", "dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc"),
    **_same(
        "completion_template",
        *("dataset_text_field", "text_column", "label_column"),
        *("response_template", "field_output", "completion_column"),
        note="such as completion_template=' {answer}', with the column in braces",
    ),
    **_same(
        "prompt_template",
        *("template", "prompt_format", "prompt_style"),
        *("instruction_template", "field_instruction", "prompt_column"),
        note="such as 'prompt_template=Question: {question}', with columns in braces",
    ),
    **_none(
        "the loss is that of the completion alone; leave it out, or set prompt_template to empty text",
        *("completion_only_loss", "train_on_inputs", "train_on_prompt", "assistant_only_loss", "mask_inputs"),
    ),
    **_none(
        "rows come in a random order, or as they are with shuffle=false; leave it out",
        *("group_by_length", "length_column_name", "curriculum_sampling"),
    ),
    **_none(
        "columns that no template names are not read; leave it out", "remove_unused_columns", "label_names"
    ),
    **_none(
        "the tokenizer is the base's own; name a base whose files hold the right one",
        *("tokenizer_type", "tokenizer_name", "tokenizer_config", "eos_token", "pad_token", "special_tokens"),
    ),
    # training
    **_same("lr", "learning_rate", "max_lr", "peak_lr"),
    **_same("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler"),
    **_same(
        "epochs", "num_train_epochs", "num_epochs", "n_epochs", note="it counts where max_train_steps is null"
    ),
    **_same("max_train_steps", "max_steps", "total_steps", "max_steps_per_epoch", "num_training_steps"),
    **_same(
        "batch_size",
        *("per_device_train_batch_size", "micro_batch_size"),
        *("train_micro_batch_size_per_gpu", "per_gpu_train_batch_size"),
        *("per_device_batch_size", "micro_batch_size_per_gpu"),
        note=ONE_PROCESS,
    ),
    **_same(
        "batch_size",
        *("train_batch_size", "global_batch_size", "total_batch_size"),
        note=f"{ONE_PROCESS}; a step takes batch_size x gradient_accumulation_steps x processes",
    ),
    **_same("eval_batch_size", "per_device_eval_batch_size", "per_gpu_eval_batch_size", "val_batch_size"),
    **_same(
        "gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches", "grad_accum_steps"
    ),
    **_same("num_warmup_steps_ratio", "warmup_ratio", "warmup_fraction"),
    **_same(
        "num_warmup_steps_ratio",
        "warmup_steps",
        "num_warmup_steps",
        note="a fraction of all steps, not their number",
    ),
    **_same(
        "max_grad_norm",
        "gradient_clipping",
        "grad_clip",
        "clip_grad_norm",
        "gradient_clip_val",
        "grad_norm_clip",
    ),
    **_same("seed", "data_seed", "random_seed"),
    **_none(
        "the optimizer is AdamW; leave it out", "optim", "optimizer", "optim_args", "optim_target_modules"
    ),
    **_none(
        "AdamW's betas and epsilon are those of PyTorch; leave it out",
        *("adam_beta1", "adam_beta2", "adam_epsilon", "betas", "eps"),
    ),
    **_none(
        "the loss is cross-entropy on the completion; leave it out",
        *("loss_type", "label_smoothing_factor", "neftune_noise_alpha", "noisy_embedding_alpha"),
    ),
    **_none(
        "before the base is loaded a line says which batch_size would fit; leave it out",
        "auto_find_batch_size",
    ),
    **_none("a resumed run continues at its place in the rows; leave it out", "ignore_data_skip"),
    **_none("train.py trains; leave it out", "do_train"),
    # evaluation
    **_same("eval_samples", "max_eval_samples", "num_eval_samples"),
    **_same("max_new_tokens_eval", "max_new_tokens", "generation_max_length", "eval_max_new_tokens"),
    **_same(
        "eval_samples",
        *("do_eval", "do_predict"),
        note="so many held-out rows are scored before and after training; 0 is no evaluation",
    ),
    **_same(
        "eval_steps",
        *("eval_strategy", "evaluation_strategy", "run_validation_every_n_steps", "evals_per_epoch"),
        note="every N optimiser steps; 0 is before and after training alone",
    ),
    **_none("scores are kept on the CPU; leave it out", "eval_accumulation_steps"),
    # output
    **_same("output_dir", "out_dir", "save_dir", "checkpoint_dir"),
    **_same(
        "save_steps",
        "save_strategy",
        "save_interval",
        "saves_per_epoch",
        note="in optimiser steps; 0 is at the end",
    ),
    **_same("save_total_limit", "max_checkpoints", "keep_last_n_checkpoints"),
    **_same(
        "logging_steps", "log_every_n_steps", "logging_strategy", "log_interval", note="in optimiser steps"
    ),
    **_same("resume_from_checkpoint", "resume", "resume_from", "auto_resume_from_checkpoints", "ckpt_path"),
    **_same(
        "resume_from_checkpoint",
        *("overwrite_output_dir", "overwrite"),
        note="null is a fresh start, and an earlier run in output_dir is moved aside",
    ),
    **_same(
        "report_to", "logger", "use_wandb", "metric_logger", "log_with", note="such as report_to=[wandb]"
    ),
    **_none(
        "trackers read their own environment variables, such as WANDB_PROJECT; leave it out",
        *("wandb_project", "wandb_name", "wandb_entity", "run_name", "logging_dir"),
    ),
    **_none(
        "nothing is uploaded; output_dir/agents holds ordinary PEFT folders; leave it out",
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
    ),
    # instruments
    **_same("profile_steps", "profiler", "profile", "use_profiler"),
    **_same("log_memory_usage", "log_peak_memory_stats", "skip_memory_metrics", note="true logs memory"),
}

FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "mixed_precision": {
        **dict.fromkeys(["fp32", "float32", "32", "none", "false", "full"], "no"),
        **dict.fromkeys(["bfloat16", "bf16-mixed", "true"], "bf16"),
        **dict.fromkeys(["float16", "half", "16", "16-mixed"], "fp16"),
    },
    "attn_implementation": dict.fromkeys(
        ["flash", "flash_attention", "flash_attn", "fa2"], "flash_attention_2"
    ),
    "gradient_checkpointing": {"true": "full", "false": "none"},
}


def answer(name: str) -> Answer | None:
    """Look up a foreign name. Those of torchtune and Axolotl may be nested, such as `optimizer.lr`."""
    plain = name.lower().replace("-", "_")
    return FOREIGN_NAMES.get(plain) or FOREIGN_NAMES.get(plain.rpartition(".")[2])
