"""Damage an exported ONNX folder at random and ask the runner: nothing may crash it, hang it, or raise another error.

    python tests/reliability/damage_onnx.py --seed 0 --count 400 [--folder out-onnx --inputs in.npz]

Without a folder a tiny random LLaVA is exported first. A folder that takes questions is asked one as well. Half of the
damage leaves the manifest's hashes as they are, half has them recomputed. `changed` is an answer that differs from the
undamaged folder's: allowed only with recomputed hashes, where weights and graphs may differ. Exit code 1 for anything
bare, crashed, slow, or let through.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT, MEMORY, NEW_TOKENS = 5.0, 6 << 30, 4
OUTCOMES = ("refused", "same", "changed", "bare", "crashed", "slow")
GRAPHS = ("vision.onnx", "prefill.onnx", "decode.onnx")
TEXTS = ("config.json", "generation_config.json", "manifest.json")
SPEECH = ("tokenizer.json", "pictures.json", "chat.json")
Damage = Callable[[Path, random.Random], None]


def any_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.iterdir()))


def flipped(path: Path, chance: random.Random, most: int) -> None:
    """Flip up to `most` bits of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, most)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def one_bit(folder: Path, chance: random.Random) -> None:
    """A fault of a disk or a network."""
    flipped(any_file(folder, chance), chance, 1)


def cut(folder: Path, chance: random.Random) -> None:
    """An interrupted copy."""
    path = any_file(folder, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def missing(folder: Path, chance: random.Random) -> None:
    any_file(folder, chance).unlink()


def link(folder: Path, chance: random.Random) -> None:
    """A link to the same bytes outside."""
    path = any_file(folder, chance)
    outside = folder.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def graph_bits(folder: Path, chance: random.Random) -> None:
    flipped(folder / chance.choice(GRAPHS), chance, 8)


def weight_bits(folder: Path, chance: random.Random) -> None:
    flipped(folder / "weights.data", chance, 64)


def weights_cut(folder: Path, chance: random.Random) -> None:
    path = folder / "weights.data"
    os.truncate(path, chance.randrange(path.stat().st_size))


def place(folder: Path, chance: random.Random) -> None:
    """Another location for the data of one tensor."""
    import onnx

    path = folder / chance.choice(GRAPHS)
    model = onnx.load(path, load_external_data=False)
    tensor = chance.choice([tensor for tensor in model.graph.initializer if tensor.external_data])
    entry = chance.choice(list(tensor.external_data))
    paths = [
        "../weights.data",
        "/etc/passwd",
        "config.json",
        "",
        "weights.data\0",
        "./weights.data",
        "*/_ORT_MEM_ADDR_/*",
    ]
    numbers = ["-1", str(2**63), str(2**64 + 64), "0x10", "", "1e3", str(chance.randrange(10**6))]
    entry.value = chance.choice(paths if entry.key == "location" else numbers)
    path.write_bytes(model.SerializeToString())


def graph_parts(folder: Path, chance: random.Random) -> None:
    """Valid protobuf, another graph: operators, edges, attributes, sizes and types changed."""
    import onnx

    path = folder / chance.choice(GRAPHS)
    model = onnx.load(path, load_external_data=False)
    nodes, tensors = list(model.graph.node), list(model.graph.initializer)
    for _ in range(chance.randint(1, 3)):
        node, tensor = chance.choice(nodes), chance.choice(tensors)
        what = chance.randrange(6)
        if what == 0:
            node.op_type = chance.choice(nodes).op_type
        elif what == 1 and node.input:
            names = [name for other in nodes for name in other.input] + [tensor.name for tensor in tensors]
            node.input[chance.randrange(len(node.input))] = chance.choice(names)
        elif what == 2:
            for attribute in node.attribute:
                attribute.i = chance.choice([-1, 0, 7, 2**31, -(2**63), 2**63 - 1])
                attribute.ints[:] = [chance.choice([-1, 0, 1, 2**40]) for _ in attribute.ints]
        elif what == 3 and tensor.dims:
            tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice([0, 1, 2, 2**20, 2**40, 2**62])
        elif what == 4:
            tensor.data_type = chance.choice([1, 2, 3, 6, 7, 9, 10, 11, 16, 22])
        elif tensor.raw_data:
            tensor.raw_data = bytes(chance.randrange(256) for _ in tensor.raw_data)
    path.write_bytes(model.SerializeToString())


def values(chance: random.Random) -> list[Any]:
    """Unexpected values for JSON."""
    return [None, True, -1, 0, 10**12, 10**400, 1.5, "", "x", [], [[]], {}, {"a": 1}, float("nan"), "9" * 5000]


def settings(folder: Path, chance: random.Random) -> None:
    """Change one value of config.json, generation_config.json or the manifest."""
    change_value(folder / chance.choice(TEXTS), chance)


def change_value(path: Path, chance: random.Random) -> None:
    content = json.loads(path.read_text())
    inner = chance.choice([content, *(value for value in content.values() if isinstance(value, dict) and value)])
    inner[chance.choice(list(inner))] = chance.choice(values(chance))
    path.write_text(json.dumps(content))


def text_bits(folder: Path, chance: random.Random) -> None:
    flipped(folder / chance.choice(TEXTS), chance, 3)


def speech(folder: Path, chance: random.Random) -> None:
    """Change one value of the tokenizer, the picture settings or the chat's pieces."""
    change_value(folder / chance.choice(SPEECH), chance)


def speech_bits(folder: Path, chance: random.Random) -> None:
    flipped(folder / chance.choice(SPEECH), chance, 3)


TRUE_HASHES: dict[str, Damage] = {"one bit": one_bit, "cut": cut, "missing": missing, "link": link}
RECOMPUTED: dict[str, Damage] = {
    "bits of a graph": graph_bits,
    "parts of a graph": graph_parts,
    "place of a tensor": place,
    "bits of weights": weight_bits,
    "weights cut": weights_cut,
    "settings": settings,
    "bits of settings": text_bits,
    "speech": speech,
    "bits of speech": speech_bits,
}


def reseal(folder: Path) -> None:
    """Recompute sizes and hashes, if there is a manifest to write them to."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for name in manifest["files"]:
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    manifest.pop("digest", None)
    digest = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "digest": digest}))


def work(runner: str, inputs: str, pipe: Connection) -> None:
    """Ask every folder received; send (outcome, answer or message) back."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = importlib.util.spec_from_file_location("runner", runner)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["runner"] = module
    spec.loader.exec_module(module)
    arrays = module.read_arrays(Path(inputs))
    picture = module.Image.new("RGB", (50, 70), (200, 30, 90))
    while True:
        folder = pipe.recv()
        try:
            model = module.OnnxVLM(folder, threads=1)
            answer = [model.generate(**arrays, max_new_tokens=NEW_TOKENS).tolist()]
            if model.speaks:
                answer.append(module.Runner(folder, 1).answer(picture, "what is red?", max_new_tokens=NEW_TOKENS))
            pipe.send(("answer", answer))
        except module.RunnerError as error:
            pipe.send(("refused", str(error)))
        except BaseException as error:  # noqa: BLE001 - any exception is counted here
            pipe.send(("bare", f"{type(error).__name__}: {error}"))


class Worker:
    """A process that asks folders one after the other; it is replaced if it dies or hangs."""

    def __init__(self, runner: Path, inputs: Path) -> None:
        self.arguments = (str(runner), str(inputs))
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(*self.arguments, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, folder: Path, limit: float) -> tuple[str, Any]:
        """The outcome of a folder; limit: CPU seconds of the worker."""
        self.pipe.send(str(folder))
        end = time.monotonic() + 60
        began = self._seconds()
        while not self.pipe.poll(0.05):
            if self._seconds() - began > limit or time.monotonic() > end:
                self.close()
                self._start()
                return "slow", ""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self._start()
            return "crashed", f"exit code {code}"

    def _seconds(self) -> float:
        """CPU time: the work of other programs on this machine does not count."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def exported(place: Path) -> tuple[Path, Path]:
    """A tiny folder and inputs for it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    from qpcompile.capture.capture import capture
    from qpcompile.capture.chat import about_picture, chat_inputs
    from qpcompile.emit.onnx.export import export_onnx
    from qpcompile.recipe.recipe import Recipe
    from tests.tiny_checkpoint import TESTBED, tiny_model

    processor = AutoProcessor.from_pretrained(TESTBED)
    inputs = chat_inputs(processor, [about_picture(Image.new("RGB", (40, 60), "green"), "what is red?")], ["here"])
    export_onnx(capture(tiny_model(), inputs, Recipe.load("none")), place / "whole", processor=processor)
    given: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    np.savez(place / "in.npz", **given)
    return place / "whole", place / "in.npz"


def damaged(whole: Path, inputs: Path, place: Path, seed: int, count: int, show: bool) -> dict[str, Counter[str]]:
    """Damage copies of a folder; kind of damage -> how often each outcome came."""
    shutil.copy(whole / "runner.py", place / "trusted.py")
    worker = Worker(place / "trusted.py", inputs)
    kind, expected = worker.ask(whole, 60)
    if kind != "answer":
        raise SystemExit(f"the undamaged folder: {kind}: {expected}")
    table: dict[str, Counter[str]] = {}
    kinds = [*((name, damage, False) for name, damage in TRUE_HASHES.items())]
    others = [*((name, damage, True) for name, damage in RECOMPUTED.items())]
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        name, damage, recomputed = chance.choice(others if number % 2 else kinds)
        folder = place / "copy"
        shutil.copytree(whole, folder)
        damage(folder, chance)
        if recomputed:
            reseal(folder)
        kind, found = worker.ask(folder, LIMIT)
        outcome = ("same" if found == expected else "changed") if kind == "answer" else kind
        row = table.setdefault(f"{name}, hashes {'recomputed' if recomputed else 'true'}", Counter())
        row[outcome] += 1
        if show and outcome in ("bare", "crashed", "slow", *(() if recomputed else ("same", "changed"))):
            print(f"case {number}: {name}: {outcome}: {str(found)[:300]}", flush=True)
        shutil.rmtree(folder)
        (place / "outside").unlink(missing_ok=True)
    worker.close()
    return table


def wrong(table: dict[str, Counter[str]]) -> int:
    """The number of failures."""
    bad = sum(row[outcome] for row in table.values() for outcome in ("bare", "crashed", "slow"))
    return bad + sum(row["same"] + row["changed"] for name, row in table.items() if name.endswith("true"))


def main() -> None:
    """Print the seed and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=4000, help="folders, half of them with true hashes")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--inputs", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        whole, inputs = options.folder, options.inputs
        if whole is None or inputs is None:
            whole, inputs = exported(Path(place))
        print(f"seed {options.seed}", flush=True)
        table = damaged(whole, inputs, Path(place), options.seed, options.count, show=True)
    print("| " + " | ".join(("what", "count", *OUTCOMES)) + " |")
    print("| --- |" + " ---: |" * (len(OUTCOMES) + 1))
    for name, row in sorted(table.items()):
        print("| " + " | ".join((name, str(row.total()), *(str(row[outcome]) for outcome in OUTCOMES))) + " |")
    raise SystemExit(1 if wrong(table) else 0)


if __name__ == "__main__":
    main()
