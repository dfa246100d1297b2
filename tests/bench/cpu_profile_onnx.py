"""Profile the first token of an ONNX folder: python tests/bench/cpu_profile_onnx.py SHAPE FOLDER [ROUNDS]

FOLDER is an export, as `cpu.py` makes one in build/bench/SHAPE/onnx-fast-quota-30. One thread. onnxruntime's own
profile of tower and prompt: milliseconds by graph, operator and sizes of the result, the mean over all rounds but the
first. A node inside a loop or a branch is counted in both, so rows add up to more than the total.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort
from cpu_shapes import SHAPES, asked_inputs

from qpcompile.emit.onnx.runner.runner import OnnxVLM, Steps

SHOWN = 14
Place = tuple[str, str]


def main(shape: str, folder: str, rounds: str = "3") -> None:
    """Print a table per graph."""
    model = OnnxVLM(folder, threads=1)
    given = asked_inputs(SHAPES[shape], {"prompt": 0})
    ids, mask, grids = given["input_ids"], given["attention_mask"], given.get("image_grid_thw")
    with tempfile.TemporaryDirectory() as aside:
        model.vision, model.prefill = (profiled(model, name, aside) for name in ("vision", "prefill"))
        for _ in range(int(rounds) + 1):
            start = time.process_time()
            pictures = model.encode(given["pixel_values"], grids)
            Steps(model, mask, model._positions(ids == model.image_token, mask, grids, ())).prefill(ids, pictures)
            print(f"{1e3 * (time.process_time() - start):.0f} ms")
        for name in ("vision", "prefill"):
            table(name, json.loads(Path(getattr(model, name).end_profiling()).read_text("utf-8")), int(rounds))


def profiled(model: OnnxVLM, name: str, aside: str) -> ort.InferenceSession:
    """A graph of the folder with the runner's own options and profiling."""
    options = getattr(model, name).get_session_options()
    options.enable_profiling, options.profile_file_prefix = True, f"{aside}/{name}"
    return ort.InferenceSession(model.folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])


def table(graph: str, events: list[dict[str, Any]], rounds: int) -> None:
    """The largest rows of a profile; its first run is left out."""
    first = min(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    spent, calls = Counter[Place](), Counter[Place]()
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < first:
            continue
        shapes = event["args"].get("output_type_shape") or [{}]
        place = event["args"]["op_name"], " ".join(str(sizes) for sizes in shapes[0].values())
        spent[place] += event["dur"]
        calls[place] += 1
    print(f"\n| {graph} | result | calls | ms |\n| --- | --- | --- | --- |")
    for place, microseconds in spent.most_common(SHOWN):
        print(f"| {' | '.join(place)} | {calls[place] / rounds:.0f} | {microseconds / 1e3 / rounds:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
