// node ask.mjs FOLDER node|web: questions from the input as JSON, [[picture, question, options], ...]; per answer one
// line, {text, tokens, cuts} or {what, where, advice}.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import sharp from "sharp";

const [folder, runtime] = process.argv.slice(2);
const ort = await import(runtime === "web" ? "onnxruntime-web" : "onnxruntime-node");
const { Runner, RunnerError } = await import(resolve(folder, "qpcompile.js"));

function tell(content) {
  console.log(JSON.stringify(content));
}

async function told(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof RunnerError)) throw error;
    tell({ what: error.what, where: error.where, advice: error.advice });
  }
}

await told(async () => {
  const runner = await Runner.open(folder, { ort, Tokenizer, sharp, threads: 1 });
  for (const [picture, question, options] of JSON.parse(readFileSync(0, "utf-8"))) {
    await told(async () => {
      const answer = runner.ask(picture, question, options);
      const parts = [];
      for await (const part of answer) parts.push(part);
      const cuts = answer.cuts.map(({ layer, kept }) => ({ layer, kept: Array.from(kept) }));
      tell({ text: parts.join(""), tokens: answer.tokens, cuts, pictures: answer.pictures });
    });
  }
  await runner.release();
});
