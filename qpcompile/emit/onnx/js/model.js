// The three graphs of a folder, for one prompt at a time: pictures, the prompt, one token more.
// Inputs, caches and positions are those of runner.py of the Python runner.

import { RunnerError, whole } from "./folder.js";
import { patchLayout, picturePositions } from "./layout.js";

const ARRAYS = {
  float32: Float32Array,
  int64: BigInt64Array,
  int32: Int32Array,
  uint8: Uint8Array,
  int8: Int8Array,
  bool: Uint8Array,
};
// What the vision graph says of each visual token.
const OF_PICTURES = ["image_features", "visual_scores", "visual_keys"];
const PAST = "past_key_values.";
const CUTS = ["kept.", "alive."];

export class Model {
  static async open(folder, ort, threads) {
    const model = new Model();
    model.ort = ort;
    model.where = folder.name;
    model.config = await folder.json("config.json");
    model.generation = await folder.json("generation_config.json");
    [model.vision, model.prefill, model.decode] = await folder.sessions(ort, ["vision", "prefill", "decode"], threads);
    model.imageToken = whole(model.config.image_token_id, "image_token_id", 0, 2 ** 31, folder.where("config.json"));
    model.packed = inputs(model.vision).some((entry) => entry.name === "hidden_states");
    return model;
  }

  async release() {
    for (const session of [this.vision, this.prefill, this.decode]) await session.release();
  }

  // What the vision graph says of all pictures in order: name -> {data, dims}; null without pictures.
  async encode(pictures) {
    const parts = [];
    for (const { values, sizes, grid } of pictures) {
      const pixels = this.packed ? [values, sizes] : [values, [1, ...sizes]];
      const layout = this.packed ? patchLayout(grid, this.config.vision_config) : {};
      parts.push(await this.run(this.vision, { pixel_values: pixels, hidden_states: pixels, ...layout }));
    }
    if (!parts.length) return null;
    return Object.fromEntries(Object.keys(parts[0]).map((name) => [name, joined(parts.map((part) => part[name]))]));
  }

  // Run a graph on those of `feeds` ([numbers, sizes] each) and `state` (tensors) that it takes.
  async run(session, feeds, state = {}) {
    const given = {};
    for (const entry of inputs(session)) {
      if (state[entry.name]) given[entry.name] = state[entry.name];
      else if (feeds[entry.name]) given[entry.name] = this.tensor(entry.type, ...feeds[entry.name]);
      else
        throw new RunnerError(
          `a graph needs ${entry.name}`,
          this.where,
          "use this module of the version that exported it",
        );
    }
    try {
      return await session.run(given);
    } catch (error) {
      const what = `the graphs do not do what the runner expects: ${String(error?.message ?? error).slice(0, 300)}`;
      throw new RunnerError(what, this.where, "make the picture or the prompt smaller, or export again", {
        cause: error,
      });
    }
  }

  tensor(type, numbers, sizes) {
    const kind = ARRAYS[type];
    if (!kind) throw new RunnerError(`a graph takes numbers of type ${type}`, this.where, "use the Python runner");
    const data = numbers instanceof kind ? numbers : kind.from(numbers, type === "int64" ? BigInt : Number);
    return new this.ort.Tensor(type, data, sizes);
  }
}

// One prompt's prefill and the decode steps after it.
export class Steps {
  constructor(model) {
    this.model = model;
    this.state = {};
    this.seen = 0;
  }

  // Logits after the prompt: Float32Array[V]. ids: token ids; pictures: as `Pictures.prepared` gives them.
  async begin(ids, pictures) {
    const { model } = this;
    const visual = ids.map((id) => id === model.imageToken);
    const count = visual.filter(Boolean).length;
    const wanted = pictures.reduce((sum, picture) => sum + picture.tokens, 0);
    if (count !== wanted) {
      const what = `the prompt has ${count} image tokens, the pictures give ${wanted}`;
      throw new RunnerError(what, "question", "report it with chat.json and pictures.json of the folder");
    }
    const said = (await model.encode(pictures)) ?? this.nothing();
    const length = ids.length;
    this.seen = length;
    this.axes = this.positions(visual, pictures);
    const feeds = {
      ...Object.fromEntries(Object.entries(said).map(([name, { data, dims }]) => [name, [data, dims]])),
      ...this.tokens(ids, length),
      visual_mask: [visual, [1, length]],
      valid_mask: [new Array(length).fill(1), [1, length]],
      visual_count: [counted(count), [count]],
    };
    return this.step(model.prefill, feeds);
  }

  // Logits after one more token.
  async next(token) {
    const last = this.axes.map((axis) => [axis[axis.length - 1] + 1]);
    this.axes = last;
    for (const name of Object.keys(this.state)) {
      const cut = CUTS.findIndex((start) => name.startsWith(start));
      // The new token joins the kept ones of every cut, at its own position.
      if (cut >= 0) this.state[name] = this.grown(this.state[name], cut ? 1 : BigInt(this.seen));
    }
    const feeds = { ...this.tokens([token], this.seen + 1), tokens_seen: [counted(this.seen), [this.seen]] };
    this.seen += 1;
    return this.step(this.model.decode, feeds);
  }

  // Which visual tokens are seen after each cut: {layer, kept: Uint8Array} each. ids: of the prompt.
  cuts(ids) {
    const places = new Map();
    ids.forEach((id, at) => {
      if (id === this.model.imageToken) places.set(at, places.size);
    });
    const names = Object.keys(this.state).filter((name) => name.startsWith("kept."));
    const found = names.map((name) => {
      const layer = Number(name.slice("kept.".length));
      const kept = new Uint8Array(places.size);
      const alive = this.state[`alive.${layer}`].data;
      this.state[name].data.forEach((at, index) => {
        if (alive[index] && places.has(Number(at))) kept[places.get(Number(at))] = 1;
      });
      return { layer, kept };
    });
    return found.sort((a, b) => a.layer - b.layer);
  }

  tokens(ids, seen) {
    const rank = this.axes.length;
    const sizes = rank === 1 ? [1, ids.length] : [rank, 1, ids.length];
    return {
      input_ids: [ids, [1, ids.length]],
      attention_mask: [new Array(seen).fill(1), [1, seen]],
      position_ids: [this.axes.flat(), sizes],
    };
  }

  // Positions by axis: text alone, or text, frames, rows and columns.
  positions(visual, pictures) {
    const entry = inputs(this.model.prefill).find((each) => each.name === "position_ids");
    const text = counted(visual.length);
    if (!entry || entry.shape.length === 2) return [text];
    if (!pictures.length) return [text, text, text, text];
    const merge = this.model.config.vision_config?.spatial_merge_size ?? 1;
    return [
      text,
      ...picturePositions(
        visual,
        pictures.map((picture) => picture.grid),
        merge,
      ),
    ];
  }

  // One row that nobody reads, in place of the pictures.
  nothing() {
    const taken = inputs(this.model.prefill).filter((entry) => OF_PICTURES.includes(entry.name));
    return Object.fromEntries(
      taken.map(({ name, shape }) => {
        const dims = [1, ...shape.slice(1)];
        return [name, { data: new Float32Array(dims.reduce((a, b) => a * b, 1)), dims }];
      }),
    );
  }

  grown(tensor, value) {
    const data = new tensor.data.constructor(tensor.data.length + 1);
    data.set(tensor.data);
    data[tensor.data.length] = value;
    return new this.model.ort.Tensor(tensor.type, data, [1, data.length]);
  }

  async step(session, feeds) {
    const { logits, ...results } = await this.model.run(session, feeds, this.state);
    for (const [name, value] of Object.entries(results)) {
      const path = name.replace(/^present\./, "");
      this.state[CUTS.some((start) => path.startsWith(start)) ? path : PAST + path] = value;
    }
    return logits.data;
  }
}

function inputs(session) {
  return session.inputMetadata;
}

function counted(length) {
  return Array.from({ length }, (_, at) => at);
}

// Arrays one after the other along the first axis.
function joined(parts) {
  if (parts.length === 1) return { data: parts[0].data, dims: parts[0].dims };
  const data = new parts[0].data.constructor(parts.reduce((sum, part) => sum + part.data.length, 0));
  let at = 0;
  for (const part of parts) {
    data.set(part.data, at);
    at += part.data.length;
  }
  return { data, dims: [parts.reduce((sum, part) => sum + part.dims[0], 0), ...parts[0].dims.slice(1)] };
}
