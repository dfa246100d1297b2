"""How compile time and memory grow with the number of decoder layers, at the widths of a real model.

    python tests/bench/compile_growth.py --layers 2 4 --recipe w4a4kv4 --set quantize.weights.solver=rtn

Weights are random, so only time and memory are meaningful. Every size is compiled in a process of its own; the compile
gets the only reference to the model. Linux only: memory is what the system counts as resident (`VmHWM`, which is
reset after every pass), without its file cache. What Python and its libraries take before a model is loaded
is excluded from the ratio to the weights. Seconds are CPU time of one thread, so that other load on the machine matters
less; time that waits for files is in `waited`. A line per pass follows with --passes, and with --to what a model of
that many layers would take if each took what the last one did: extrapolated, not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

GIB = 2**30


def main() -> None:
    """Print the table, or with --one the line of one size as JSON."""
    options = arguments()
    if options.one is not None:
        print(json.dumps(measure(options.one, options)))
        return
    print(
        f"{'layers':>6} {'weights':>9} {'start':>9} {'peak':>9} {'ratio':>6} {'seconds':>8} {'waited':>8}  each layer"
    )
    before: dict[str, Any] | None = None
    for layers in options.layers:
        found = alone(layers)
        ratio = (found["peak"] - found["start"]) / found["weights"]
        sizes = " ".join(f"{found[key] / GIB:5.2f} GiB" for key in ("weights", "start", "peak"))
        times = f"{found['seconds']:8.1f} {found['waited']:8.1f}"
        print(f"{layers:6d} {sizes} {ratio:6.2f} {times}   {growth(before, found)}", flush=True)
        for line in found["passes"] if options.passes else ():
            memory = f"peak {line['peak'] / GIB:5.2f}, behind it {line['resident'] / GIB:5.2f} GiB"
            print(f"       {line['name']:20s} {line['seconds']:8.1f} s   {memory}")
        if options.to is not None and before is not None:
            print(f"       {extrapolated(before, found, options.to)}")
        before = found


def growth(before: dict[str, Any] | None, found: dict[str, Any]) -> str:
    """Seconds and peak of one additional layer."""
    if before is None:
        return ""
    layers = found["layers"] - before["layers"]
    seconds, peak, weights = ((found[key] - before[key]) / layers for key in ("seconds", "peak", "weights"))
    return f"{seconds:.1f} s, {peak / GIB:.2f} GiB ({peak / weights:.2f} of its weights)"


def extrapolated(before: dict[str, Any], found: dict[str, Any], layers: int) -> str:
    """Minutes of one thread and the peak of `layers` layers, from two sizes."""
    steps = (layers - found["layers"]) / (found["layers"] - before["layers"])
    seconds, peak, weights = (found[key] + steps * (found[key] - before[key]) for key in ("seconds", "peak", "weights"))
    return (
        f"extrapolated to {layers}: {seconds / 60:.0f} min, {peak / GIB:.1f} GiB ({peak / weights:.2f} of its weights)"
    )


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=2000, help="32064 for the real one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", default="w4a4kv4")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    parser.add_argument("--passes", action="store_true", help="also a line per pass")
    parser.add_argument("--to", type=int, metavar="LAYERS", help="extrapolate to this many layers")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def alone(layers: int) -> dict[str, Any]:
    """Measure one size in a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(layers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Build, compile, and return how long it took and how much memory it needed."""
    import qpcompile

    models = [llava(layers, options)]
    weights = sum(parameter.nbytes for parameter in models[0].parameters())
    start = memory("VmRSS") - weights
    passes: list[dict[str, Any]] = []
    forget_peak()
    began = last = time.process_time()
    clock = time.monotonic()

    def note(step: Any, _: Any) -> None:
        nonlocal last
        now = time.process_time()
        sizes = {"resident": memory("VmRSS"), "peak": memory("VmHWM")}
        passes.append({"name": step.name, "seconds": now - last, **sizes})
        print(passes[-1], file=sys.stderr, flush=True)
        forget_peak()
        last = now

    recipe = qpcompile.Recipe.load(options.recipe).with_overrides(options.set)
    samples = [sample(number, options.tokens) for number in range(options.samples)]
    qpcompile.compile(models.pop(), recipe, calibration=samples, after=note)
    seconds, waited = time.process_time() - began, time.monotonic() - clock
    peak = max(line["peak"] for line in passes)
    sizes = {"layers": layers, "weights": weights, "start": start, "peak": peak}
    return {**sizes, "seconds": seconds, "waited": waited - seconds, "passes": passes}


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process: bytes in memory, now or at most since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Reset VmHWM to what is in memory now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def llava(layers: int, options: argparse.Namespace) -> Any:
    """LLaVA with a small tower and a decoder of the given widths; random weights, each in memory once."""
    import torch
    import transformers

    torch.set_num_threads(1)
    text = transformers.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=layers,
        num_attention_heads=options.heads,
        vocab_size=options.vocabulary,
        pad_token_id=0,
    )
    tower = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_seq_length=16)
    config.image_token_id = 5
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def sample(number: int, tokens: int) -> dict[str, Any]:
    """A picture of 16 tokens and words up to `tokens`."""
    import torch

    generator = torch.Generator().manual_seed(number)
    words = torch.randint(6, 1000, (1, tokens - 16), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, 16), 5), words[:, 4:]], dim=1)
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


if __name__ == "__main__":
    main()
