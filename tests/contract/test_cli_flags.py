"""The command line is a promise: a flag, its variable or its default changes here first, on purpose."""

from __future__ import annotations

import argparse

from engine.config import EngineOptions
from server.settings import ENGINE_FLAGS, SERVER_FLAGS, ServerSettings, add_arguments

FLAGS = {
    "--host": ("QUIRE_HOST", "host", "127.0.0.1"),
    "--port": ("QUIRE_PORT", "port", 8000),
    "--api-key": ("QUIRE_API_KEY", "api_keys", ()),
    "--api-keys-file": ("QUIRE_API_KEYS_FILE", "named_tenants", ()),
    "--admin-key": ("QUIRE_ADMIN_KEY", "admin_keys", ()),
    "--share-cache": ("QUIRE_SHARE_CACHE", "share_cache", False),
    "--served-model-name": ("QUIRE_SERVED_MODEL_NAME", "model_name", "quire-demo"),
    "--log-level": ("QUIRE_LOG_LEVEL", "log_level", "info"),
    "--log-format": ("QUIRE_LOG_FORMAT", "log_format", "text"),
    "--log-prompts": ("QUIRE_LOG_PROMPTS", "log_prompts", False),
    "--otlp-endpoint": ("QUIRE_OTLP_ENDPOINT", "otlp_endpoint", ""),
    "--tool-call-parser": ("QUIRE_TOOL_CALL_PARSER", "tool_call_parser", "auto"),
    "--reasoning-parser": ("QUIRE_REASONING_PARSER", "reasoning_parser", "auto"),
    "--strict": ("QUIRE_STRICT", "strict", False),
    "--metrics-compat": ("QUIRE_METRICS_COMPAT", "metrics_compat", "none"),
    "--no-access-log": ("QUIRE_NO_ACCESS_LOG", "access_log", True),
    "--no-ui": ("QUIRE_NO_UI", "ui", True),
    "--max-body-size": ("QUIRE_MAX_BODY_SIZE", "max_body_bytes", 8388608),
    "--max-header-size": ("QUIRE_MAX_HEADER_SIZE", "max_header_bytes", 65536),
    "--max-connections": ("QUIRE_MAX_CONNECTIONS", "max_connections", 4096),
    "--header-timeout": ("QUIRE_HEADER_TIMEOUT", "header_timeout_s", 10.0),
    "--body-timeout": ("QUIRE_BODY_TIMEOUT", "body_timeout_s", 30.0),
    "--stall-timeout": ("QUIRE_STALL_TIMEOUT", "stall_timeout_s", 30.0),
    "--keep-alive": ("QUIRE_KEEP_ALIVE", "keep_alive_s", 75.0),
    "--sse-keep-alive": ("QUIRE_SSE_KEEP_ALIVE", "sse_keep_alive_s", 15.0),
    "--shutdown-timeout": ("QUIRE_SHUTDOWN_TIMEOUT", "shutdown_timeout_s", 30.0),
    "--dtype": ("QUIRE_DTYPE", "dtype", "auto"),
    "--quantization": ("QUIRE_QUANTIZATION", "quantization", None),
    "--device": ("QUIRE_DEVICE", "device", "auto"),
    "--max-model-len": ("QUIRE_MAX_MODEL_LEN", "max_model_len", None),
    "--max-num-seqs": ("QUIRE_MAX_NUM_SEQS", "max_num_seqs", None),
    "--max-num-batched-tokens": ("QUIRE_MAX_NUM_BATCHED_TOKENS", "max_num_batched_tokens", None),
    "--max-queued-requests": ("QUIRE_MAX_QUEUED_REQUESTS", "max_queued_requests", None),
    "--block-size": ("QUIRE_BLOCK_SIZE", "block_size", None),
    "--gpu-memory-utilization": ("QUIRE_GPU_MEMORY_UTILIZATION", "gpu_memory_utilization", 0.9),
    "--kv-cache-dtype": ("QUIRE_KV_CACHE_DTYPE", "kv_cache_dtype", "auto"),
    "--kv-cache-memory": ("QUIRE_KV_CACHE_MEMORY", "kv_cache_memory_bytes", None),
    "--no-prefix-caching": ("QUIRE_NO_PREFIX_CACHING", "prefix_caching", True),
    "--threads": ("QUIRE_THREADS", "threads", None),
    "--cuda-graphs": ("QUIRE_CUDA_GRAPHS", "cuda_graphs", "auto"),
    "--deterministic": ("QUIRE_DETERMINISTIC", "deterministic", False),
    "--seed": ("QUIRE_SEED", "seed", None),
}


def test_flags() -> None:
    found = {}
    for flags, defaults in ((SERVER_FLAGS, ServerSettings()), (ENGINE_FLAGS, EngineOptions(model=""))):
        for flag in flags:
            found[flag.option] = (flag.variable, flag.target, getattr(defaults, flag.target))
    assert found == FLAGS


def test_help_tells_each_flag_its_variable_and_its_default() -> None:
    parser = argparse.ArgumentParser("quire serve")
    add_arguments(parser)
    text = parser.format_help()
    for option, (variable, _, _) in FLAGS.items():
        assert option in text and variable in text
    for flag in (*SERVER_FLAGS, *ENGINE_FLAGS):
        assert flag.switch_to is not None or "default" in flag.help, flag.name
