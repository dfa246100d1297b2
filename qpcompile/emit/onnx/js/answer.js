// Ask an exported folder about pictures: text in, text out, in node and in browsers.
//
//     import * as ort from "onnxruntime-node";                  // or onnxruntime-web
//     import { Tokenizer } from "@huggingface/tokenizers";
//     import sharp from "sharp";                                // node only: decodes pictures
//     import { Runner } from "./out-onnx/qpcompile.js";
//
//     const runner = await Runner.open("out-onnx", { ort, Tokenizer, sharp });
//     console.log(await runner.answer("photo.png", "what is in the picture?"));
//     const answer = runner.ask("photo.png", "and now?", { temperature: 0.7, seed: 1 });
//     for await (const part of answer) process.stdout.write(part);
//
// The file stands alone; libraries are passed in, so that it needs no build step and no fixed place. Answers are those
// of runner.py in the same folder. Whatever fails is a RunnerError: what, where, advice.

import { Chance } from "./chance.js";
import { Chat, Spelling, stripped } from "./chat.js";
import { Choice } from "./choice.js";
import { Folder, RunnerError, whole } from "./folder.js";
import { Model, Steps } from "./model.js";
import { opened, Pictures } from "./pictures.js";

export class Runner {
  // place: the folder's path in node, its URL in a browser. check: compare files with their hashes.
  static async open(place, { ort, Tokenizer, sharp, threads, check = true } = {}) {
    if (!ort?.InferenceSession || !Tokenizer) {
      const advice = "pass { ort, Tokenizer }: onnxruntime-node or -web, and Tokenizer of @huggingface/tokenizers";
      throw new RunnerError("a library is missing", "Runner.open", advice);
    }
    const folder = await Folder.open(place, check);
    if (!folder.has("chat.json")) {
      throw new RunnerError("the folder takes token ids, and no questions", folder.name, "README.md in it says why");
    }
    const runner = new Runner();
    const [pictures, pieces, rules] = await Promise.all(
      ["pictures.json", "chat.json", "tokenizer.json"].map((name) => folder.json(name)),
    );
    runner.sharp = sharp;
    runner.pictures = new Pictures(pictures, folder.where("pictures.json"));
    runner.model = await Model.open(folder, ort, threads);
    runner.chat = new Chat(pieces, rules, Tokenizer, runner.model.imageToken, folder.where("tokenizer.json"));
    return runner;
  }

  // An Answer, whose parts come while it is iterated. picture: one, a list, or null; see `opened` of pictures.js.
  // options: history, [{picture, question, answer}] of the turns before; maxNewTokens; temperature, topK and topP ask
  // for sampling, which begins at `seed`; temperature 0 asks for the most probable token; without any the folder's
  // settings count.
  ask(picture, question, options = {}) {
    return new Answer(this, picture, question, options);
  }

  // The whole answer, without white space around it.
  async answer(picture, question, options = {}) {
    const parts = [];
    for await (const part of this.ask(picture, question, options)) parts.push(part);
    return stripped(parts.join(""));
  }

  // Give the memory of the graphs back.
  async release() {
    await this.model.release();
  }
}

export class Answer {
  constructor(runner, picture, question, options) {
    this.runner = runner;
    this.asked = { picture, question, options };
    // The tokens made so far, the one that ended the answer included.
    this.tokens = [];
    // Known when the first part comes. pictures: {tokens, rows, columns, area} each, in order; cuts: {layer, kept}
    // each, where kept has a 1 for every visual token, of all pictures in order, that the layers after `layer` see.
    this.pictures = null;
    this.cuts = null;
  }

  async *[Symbol.asyncIterator]() {
    const { picture, question, options } = this.asked;
    const { model, chat } = this.runner;
    const choice = new Choice(model.generation, options);
    const chance = new Chance(whole(options.seed ?? 0, "seed", 0, Number.MAX_SAFE_INTEGER));
    const turns = [];
    const seen = [];
    for (const turn of [...(options.history ?? []), { picture, question }]) {
      const prepared = await this.prepared(turn.picture);
      seen.push(...prepared);
      turns.push({ tokens: prepared.map((each) => each.tokens), question: turn.question, answer: turn.answer });
    }
    const ids = chat.prompt(turns);
    const prompt = ids.length;
    const steps = new Steps(model);
    let logits = await steps.begin(ids, seen);
    this.pictures = seen.map(({ tokens, rows, columns, area }) => ({ tokens, rows, columns, area }));
    this.cuts = steps.cuts(ids);
    const spelling = new Spelling(chat);
    for (;;) {
      const token = choice.next(logits, ids, prompt, chance);
      ids.push(token);
      this.tokens.push(token);
      const part = spelling.add(token);
      if (part) yield part;
      if (choice.ends.includes(token) || this.tokens.length === choice.length) break;
      logits = await steps.next(token);
    }
    const rest = spelling.rest();
    if (rest) yield rest;
  }

  async prepared(given) {
    const list = given === null || given === undefined ? [] : Array.isArray(given) ? given : [given];
    const prepared = [];
    for (const each of list) {
      prepared.push(this.runner.pictures.prepared(await opened(each, this.runner.sharp)));
    }
    return prepared;
  }
}
