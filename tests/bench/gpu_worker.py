"""One peer of the GPU benchmark of answers: gpu_worker.py MODEL PEER DEVICE NEW_TOKENS ROUNDS BATCH ...

PEER is torch:eager, torch:compile, ours:PRESET, or grown:PRESET, which decodes without CUDA graphs. It answers
prompts of each batch size and prints one line of JSON for each: medians of the rounds after two warm-up rounds.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from cpu_models import model_inputs
from cpu_prepare import recipe
from cpu_worker import Clock, memory_mb, now
from gpu_models import MODELS, make

import qpcompile

WARM_UP = 2
# Answers, given the inputs of `generate` and a clock; returns a function that counts the cache's bytes (may copy it).
Answer = Callable[[dict[str, Any], Clock], Callable[[], int]]


def peak_mb(device: torch.device) -> float:
    """Peak memory of tensors since `forget_peak`, in MB (10^6 bytes); on the CPU that of the process."""
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else memory_mb()["peak_mb"]


def forget_peak(device: torch.device) -> None:
    """Reset the peak, where that is possible."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def inputs_of(name: str, prompt: int, batch: int, model: Any) -> dict[str, Any]:
    """The inputs of one batch, on the model's device."""
    found = model_inputs(MODELS[name], {"prompt": prompt, "batch": batch}, model.dtype)
    return {key: value.to(model.device) for key, value in found.items()}


def load_torch(name: str, mode: str, device: torch.device, new_tokens: int) -> tuple[Answer, dict[str, float]]:
    """The model as transformers runs it; `compile` with a static cache, and CUDA graphs where they exist."""
    model = make(name, device)
    if mode == "compile":
        model.generation_config.cache_implementation = "static"
        graphs: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        model.forward = torch.compile(model.forward, dynamic=False, **graphs)

    def answer(inputs: dict[str, Any], clock: Clock) -> Callable[[], int]:
        result = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, return_dict_in_generate=True
        )
        layers = result.past_key_values.layers
        return lambda: sum(each.keys.nbytes + each.values.nbytes for each in layers)

    return answer, {"weights_mb": sum(each.nbytes for each in model.parameters()) / 1e6}


def load_ours(name: str, preset: str, graphs: bool, device: torch.device, new_tokens: int) -> tuple[Answer, Any]:
    """The model compiled on the device it runs on; the original is freed before it answers."""
    model = make(name, device)
    samples = [inputs_of(name, number, 1, model) for number in (101, 102)]
    forget_peak(device)
    started = time.perf_counter()
    compiled = qpcompile.compile(model, recipe(MODELS[name], preset), calibration=samples).to(device, graphs)
    facts = {"compile_s": time.perf_counter() - started, "compile_peak_mb": peak_mb(device)}
    facts |= {"host_peak_mb": memory_mb()["peak_mb"], "weights_mb": compiled.weight_bytes() / 1e6}
    del model, samples
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def answer(inputs: dict[str, Any], clock: Clock) -> Callable[[], int]:
        compiled.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        assert compiled.machine.last is not None
        return compiled.machine.last.nbytes

    return answer, facts


def main(name: str, peer: str, device_name: str, new_tokens: int, rounds: int, batches: list[int]) -> None:
    """Load, then a line for each batch size."""
    device = torch.device(device_name)
    kind, _, what = peer.partition(":")
    if kind == "torch":
        answer, facts = load_torch(name, what, device, new_tokens)
    else:
        answer, facts = load_ours(name, what, kind == "ours", device, new_tokens)
    # Dtype and device of the inputs are the same for every peer's model.
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    for batch in batches:
        clocks: list[dict[str, float]] = []
        held: list[Callable[[], int]] = []
        for turn in range(WARM_UP + rounds):
            if turn == WARM_UP:
                forget_peak(device)
            clock, inputs = Clock(), inputs_of(name, turn, batch, like)
            held = []  # exclude the cache of the previous answer from this one's memory
            clock.start = now()
            held.append(answer(inputs, clock))
            clocks += [clock.result()] if turn >= WARM_UP else []
        line: dict[str, float] = {"batch": batch, "peak_mb": peak_mb(device), "kv_mb": held[0]() / 1e6, **facts}
        for field, key in (("first", "first_wall_ms"), ("decode", "decode_wall_ms")):
            found = [each[key] for each in clocks]
            line |= {f"{field}_ms": median(found), f"{field}_low": min(found), f"{field}_high": max(found)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _, named, asked, place, *numbers = sys.argv
    count, times, *sizes = map(int, numbers)
    main(named, asked, place, count, times, sizes)
