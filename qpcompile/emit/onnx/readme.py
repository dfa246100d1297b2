"""The README.md of an ONNX folder: commands for each language, the files, and what the numbers are."""

from __future__ import annotations

from collections.abc import Sequence

from qpcompile.ir.program import Program

_SPEAKS = """## Use

```sh
pip install onnxruntime numpy pillow tokenizers
python runner.py --image photo.png --question "what is in the picture?"
python runner.py --image photo.png      # a chat: one question per line
```

Neither torch nor transformers is needed. `--image` may be repeated or left out; `--temperature`, `--top-k`, `--top-p`
and `--seed` ask for sampling; `python runner.py --help` lists the rest. In Python, beside this folder's `runner.py`:

```python
from runner import Runner

runner = Runner(".")
runner.answer("photo.png", "what is in the picture?", max_new_tokens=64)
runner.answer(None, "and on the left?", history=[("photo.png", "what is in the picture?", "a red star")])
runner.answers(["a.png", ["b.png", "c.png"]], ["what is this?", "what differs?"])  # computed together
for part in runner.stream("photo.png", "what is in the picture?", temperature=0.7, seed=1):
    print(part, end="", flush=True)
```

In JavaScript, `qpcompile.js` is one module without a build step. Libraries are passed in: `npm install --ignore-scripts
onnxruntime-node @huggingface/tokenizers sharp`.

```js
import * as ort from "onnxruntime-node";
import { Tokenizer } from "@huggingface/tokenizers";
import sharp from "sharp";
import { Runner } from "./qpcompile.js";

const runner = await Runner.open(".", { ort, Tokenizer, sharp });
console.log(await runner.answer("photo.png", "what is in the picture?", { maxNewTokens: 64 }));
```

In a browser, `index.html` asks about pictures and draws which visual tokens were kept; nothing leaves the machine.
`vendor/` takes the runtime, once:

```sh
npm install --prefix npm --ignore-scripts onnxruntime-web@1.30 @huggingface/tokenizers@0.2
mkdir vendor
cp npm/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs vendor/
cp npm/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.mjs vendor/
cp npm/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm vendor/
cp npm/node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs vendor/
python -m http.server      # then open http://localhost:8000/
```
"""
_MUTE = """## Use

This folder takes token ids, and no pictures and questions: {why}.

```sh
pip install onnxruntime numpy pillow tokenizers
python -c "import numpy; numpy.savez('inputs.npz', **inputs)"      # what the model's processor returns
python runner.py . inputs.npz --max-new-tokens 32                  # prints the new token ids
```
"""
_README = """# {name}, exported for onnxruntime

A `{name}` with {layers} decoder layers, compiled by qpcompile.

{use}
## Files

| file | content |
| --- | --- |
| `vision.onnx`, `prefill.onnx`, `decode.onnx`, `weights.data` | pictures; the prompt; one token more; all weights |
{speech}| `config.json`, `generation_config.json` | the model's settings; stop tokens and how tokens are chosen |
| `recipe.yaml`, `plan.yaml` | what was asked of the compiler, and what it decided |
| `manifest.json` | sizes and hashes of all files, which the runner compares |

{graphs}## Numbers

{numbers}
"""
_FUNCTIONS = """## Graphs

Each operator is one node, a function of the domain `qpcompile` in the same file, which onnxruntime puts in place when
it loads a graph. OpenVINO reads no functions: `qpcompile export --for openvino` writes all nodes in place, and so does
`onnx.inliner.inline_local_functions` for one graph.

"""
_SPEECH = """| `tokenizer.json`, `pictures.json`, `chat.json` | text to tokens, pictures to pixels, the chat template |
| `qpcompile.js`, `index.html`, `worker.js` | the runner in JavaScript, and a page for browsers |
"""


def readme(program: Program, numbers: Sequence[str], mute: str, functions: bool) -> str:
    """Markdown text; mute: why the folder takes token ids alone, "" if it takes questions; functions: of the graphs."""
    return _README.format(
        name=type(program.host).__name__,
        layers=len(program.layers),
        use=_MUTE.format(why=mute) if mute else _SPEAKS,
        speech="" if mute else _SPEECH,
        graphs=_FUNCTIONS if functions else "",
        numbers="\n".join(f"- {line}" for line in numbers),
    )
