// node pixels.mjs PICTURES.JS: from the input {settings, pictures: [{width, height, data in base64}]}; per picture one
// line, {values: float32 in base64, grid, tokens, area}.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";

const { Pictures } = await import(resolve(process.argv[2]));
for (const { settings, width, height, data } of JSON.parse(readFileSync(0, "utf-8"))) {
  const picture = { width, height, data: new Uint8Array(Buffer.from(data, "base64")) };
  const { values, grid, tokens, area } = new Pictures(settings, "pictures.json").prepared(picture);
  console.log(JSON.stringify({ values: Buffer.from(values.buffer).toString("base64"), grid, tokens, area }));
}
