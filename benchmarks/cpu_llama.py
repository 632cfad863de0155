"""llama.cpp in a process of its own, from its wheel: what cpu_engines.Engine starts with the baselines' Python.

Reads requests and writes answers, one JSON object a line. "stream" is the wheel's own server with text and sampling;
"bare" calls llama.cpp's C functions, which the wheel exports: given tokens, one after another, and argmax after each.

python cpu_llama.py '{"model": "FILE.gguf", "threads": 2, "context": 2048, "flash": true}'
"""

import ctypes
import json
import os
import sys
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

BATCH = 512
# Fields of structures of VERSION that must have these values, or the structures below are of another version.
DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "type_k": 1, "type_v": 1, "offload_kqv": True}


class ModelParams(Structure):
    """llama_model_params."""

    _fields_ = (
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab", "check", "extra_buffers", "no_host", "no_alloc", "load_mtp")),
    )


class ContextParams(Structure):
    """llama_context_params."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling", "pooling")),
        *((name, c_int32) for name in ("attention", "flash_attention")),
        *((name, c_float) for name in ("rope_base", "rope_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort", c_void_p),
        ("abort_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("other", c_void_p),
    )


class Batch(Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# Result and arguments of the functions in use; the structures are passed by value.
FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_size": (ctypes.c_uint64, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_sampler_init_greedy": (c_void_p, []),
    "llama_sampler_sample": (c_int32, [c_void_p, c_void_p, c_int32]),
    "llama_print_system_info": (c_char_p, []),
}


class Bare:
    """A context of llama.cpp, and one prompt that it holds."""

    def __init__(self, library: Path, config: dict):
        self.lib = ctypes.CDLL(str(library))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.lib.llama_backend_init()
        self.system = self.lib.llama_print_system_info().decode()
        params = self.lib.llama_context_default_params()
        found = {name: getattr(params, name) for name in DEFAULTS}
        if found != DEFAULTS:
            raise RuntimeError(f"{library} has other structures than this script: {found}")
        params.n_ctx, params.n_batch, params.n_ubatch = config["context"], BATCH, BATCH
        params.n_threads = params.n_threads_batch = config["threads"]
        params.flash_attention = int(config["flash"])
        model_params = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(config["model"].encode(), model_params)
        self.context = self.lib.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {config['model']}")
        self.memory = self.lib.llama_get_memory(self.context)
        self.greedy = self.lib.llama_sampler_init_greedy()
        self.prompt: list[int] = []

    def run(self, prompt: list[int], feed: list[int], fresh: bool = False) -> dict:
        """Decode ``feed``, one by one. The prompt is computed if ``fresh`` or if it is another one than before."""
        prefill = None
        if fresh or prompt != self.prompt:
            self.lib.llama_memory_seq_rm(self.memory, -1, -1, -1)
            started = time.perf_counter()
            for at in range(0, len(prompt), BATCH):
                self.decode(prompt[at : at + BATCH])
            self.lib.llama_sampler_sample(self.greedy, self.context, -1)
            prefill = time.perf_counter() - started
            self.prompt = prompt
        else:
            self.lib.llama_memory_seq_rm(self.memory, 0, len(prompt), -1)
        started = time.perf_counter()
        for token in feed:
            self.decode([token])
            self.lib.llama_sampler_sample(self.greedy, self.context, -1)
        seconds = time.perf_counter() - started
        return {"prefill_seconds": prefill, "decode_seconds": seconds, "decoded": len(feed)}

    def decode(self, tokens: list[int]) -> None:
        array = (c_int32 * len(tokens))(*tokens)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


class Stream:
    """The wheel's server."""

    def __init__(self, config: dict):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = config["model"]
        params.n_ctx, params.n_parallel = config["context"], 1
        params.n_batch = params.n_ubatch = BATCH
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config["threads"]
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = (
            kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if config["flash"] else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.server = xllamacpp.Server(params)

    def run(self, prompt: list[int], tokens: int, temp: float, top_p: float, top_k: int) -> dict:
        times, pieces, usage = [], [], {}

        def piece(chunk: dict) -> bool:
            times.append(time.perf_counter())
            if "error" in chunk or "choices" not in chunk:
                raise RuntimeError(str(chunk))
            pieces.append(chunk["choices"][0]["text"])
            usage.update(chunk.get("usage") or {})
            return False  # go on

        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": temp,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": 0.0,
            "seed": 1,
            "stream": True,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        started = time.perf_counter()
        self.server.handle_completions(request, piece)
        return {
            "prefill_seconds": times[0] - started,
            "decode_seconds": times[-1] - times[0],
            "decoded": usage["completion_tokens"] - 1,
            "text": "".join(pieces),
        }


class Session:
    """One of the two ways, made when it is asked for. Both in one process would slow each other down."""

    def __init__(self, config: dict):
        self.config = config

    @cached_property
    def bare(self) -> Bare:
        import xllamacpp

        return Bare(Path(xllamacpp.xllamacpp.__file__), self.config)

    @cached_property
    def stream(self) -> Stream:
        return Stream(self.config)

    def answer(self, op: str, request: dict) -> dict:
        if op == "describe":
            size = self.bare.lib.llama_model_size(self.bare.model)
            return {"system": self.bare.system, "size_bytes": size, "version": version("xllamacpp")}
        return (self.bare if op == "bare" else self.stream).run(**request)


def main() -> None:
    session = Session(json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    sys.stderr = os.fdopen(os.dup(2), "w")  # Python's own, while llama.cpp's log goes nowhere
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(session.answer(request.pop("op"), request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
