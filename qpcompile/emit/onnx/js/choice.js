// How the next token is chosen: penalties, tokens that must not come, then chance where `do_sample` asks for it.
// The same arithmetic as choice.py of the Python runner, which says where it comes from.

import { RunnerError, whole } from "./folder.js";

const MOST_NEW = 2 ** 20;
const DEFAULT_NEW = 32;

export class Choice {
  // settings: generation_config.json; options: what a caller asks for in its place.
  constructor(settings, options) {
    const { temperature, topK, topP } = options;
    const asked = { temperature, top_k: topK, top_p: topP };
    for (const name of Object.keys(asked)) if (asked[name] === undefined) delete asked[name];
    if (temperature === 0) this.settings = { ...settings, do_sample: false };
    else if (Object.keys(asked).length) this.settings = { ...settings, ...asked, do_sample: true };
    else this.settings = settings;
    this.ends = this.tokens("eos_token_id");
    this.sample = this.settings.do_sample === true;
    this.temperature = temperature === 0 ? 1 : this.number("temperature", 1, 1e-9, 1e9);
    this.topK = whole(this.settings.top_k ?? 50, "topK", 0, 2 ** 40);
    this.topP = this.number("top_p", 1, 0, 1);
    this.penalty = Math.fround(this.number("repetition_penalty", 1, 1e-3, 1e3));
    this.least = this.settings.min_new_tokens ?? 0;
    this.leastInAll = this.settings.min_length ?? 0;
    this.suppressed = this.tokens("suppress_tokens");
    this.suppressedFirst = this.tokens("begin_suppress_tokens");
    const length = options.maxNewTokens ?? this.settings.max_new_tokens ?? DEFAULT_NEW;
    this.length = whole(length, "maxNewTokens", 1, MOST_NEW);
  }

  number(name, standard, least, most) {
    const value = this.settings[name] ?? standard;
    if (typeof value !== "number" || !(value >= least && value <= most)) {
      throw new RunnerError(
        `${name} is ${String(value).slice(0, 100)}`,
        name,
        `give a number from ${least} to ${most}`,
      );
    }
    return value;
  }

  tokens(name) {
    const value = this.settings[name] ?? [];
    return Array.isArray(value) ? value : [value];
  }

  // The next token. logits: Float32Array[V]; ids: the prompt, `prompt` tokens, and the answer so far.
  next(logits, ids, prompt, chance) {
    const scores = Float32Array.from(logits);
    if (this.penalty !== 1) {
      for (const id of new Set(ids))
        scores[id] = logits[id] < 0 ? logits[id] * this.penalty : logits[id] / this.penalty;
    }
    const made = ids.length - prompt;
    if (made < this.least || ids.length < this.leastInAll) for (const id of this.ends) scores[id] = -Infinity;
    for (const id of this.suppressed) scores[id] = -Infinity;
    if (made === 0) for (const id of this.suppressedFirst) scores[id] = -Infinity;
    return this.sample ? chance.index(this.shares(scores)) : largest(scores);
  }

  // How probable each token is: Float64Array[V].
  shares(given) {
    const scores = Float64Array.from(given, (score) => score / this.temperature);
    if (this.topK > 0 && this.topK < scores.length) {
      const bound = Float64Array.from(scores).sort()[scores.length - this.topK];
      scores.forEach((score, id) => {
        if (score < bound) scores[id] = -Infinity;
      });
    }
    const shares = softmax(scores);
    if (this.topP === 1) return shares;
    const order = Array.from(shares.keys()).sort((a, b) => shares[a] - shares[b] || a - b);
    let sum = 0;
    for (const id of order.slice(0, -1)) {
      sum += shares[id];
      if (sum <= 1 - this.topP) scores[id] = -Infinity;
    }
    return softmax(scores);
  }
}

function largest(scores) {
  let best = 0;
  for (let id = 1; id < scores.length; id++) if (scores[id] > scores[best]) best = id;
  return best;
}

function softmax(scores) {
  const top = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = scores.map((score) => Math.exp(score - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}
