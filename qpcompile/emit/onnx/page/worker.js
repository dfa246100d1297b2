// The model's side of index.html, in a thread of its own: the page stays alive while a graph runs.
// Messages in: {open}, {ask: {picture, question, options}}, {stop}. Out: {ready}, {seen}, {part}, {done}, {failed}.

const VENDOR = "./vendor/";
let runner = null;
let stopped = false;

async function library(name) {
  try {
    return await import(`${VENDOR}${name}`);
  } catch (error) {
    const advice = "put the files of onnxruntime-web and @huggingface/tokenizers there: README.md has the commands";
    throw Object.assign(new Error(error.message), {
      what: `vendor/${name} cannot be loaded`,
      where: "vendor/",
      advice,
    });
  }
}

async function open() {
  const [{ Runner }, ort, { Tokenizer }] = await Promise.all([
    import("./qpcompile.js"),
    library("ort.wasm.min.mjs"),
    library("tokenizers.min.mjs"),
  ]);
  ort.env.wasm.wasmPaths = new URL(VENDOR, self.location.href).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const check = !!globalThis.crypto?.subtle;
  runner = await Runner.open(new URL(".", self.location.href), { ort, Tokenizer, check });
  const { config } = runner.model;
  const layers = (config.text_config ?? config).num_hidden_layers ?? null;
  postMessage({ ready: { model: config.model_type, layers, threads: ort.env.wasm.numThreads, check } });
}

async function ask({ picture, question, options }) {
  stopped = false;
  const started = performance.now();
  const answer = runner.ask(picture, question, options);
  let seen = false;
  for await (const part of answer) {
    if (!seen) postMessage({ seen: { pictures: answer.pictures, cuts: answer.cuts } });
    seen = true;
    postMessage({ part });
    // Messages of the page are read between two tokens.
    await new Promise((resolve) => setTimeout(resolve));
    if (stopped) break;
  }
  if (!seen) postMessage({ seen: { pictures: answer.pictures, cuts: answer.cuts } });
  postMessage({ done: { tokens: answer.tokens.length, seconds: (performance.now() - started) / 1000, stopped } });
}

onmessage = async ({ data }) => {
  try {
    if (data.stop) stopped = true;
    if (data.open) await open();
    if (data.ask) await ask(data.ask);
  } catch (error) {
    const { what = error.message, where = "", advice = "" } = error;
    postMessage({ failed: { what, where, advice } });
  }
};
