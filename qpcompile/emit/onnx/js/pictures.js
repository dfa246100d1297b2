// From a picture to pixel values, with the arithmetic of pictures.py of the Python runner: the settings of
// `pictures.json`, where null leaves a step out.
//
//     fixed     pad to a square, resize, crop the centre, rescale, normalize  -> pixel_values f[n, 3, H, W]
//     patches   resize to whole patches, rescale, normalize, cut              -> pixel_values f[P, C], rows, columns

import { RunnerError } from "./folder.js";
import { resized } from "./resize.js";

const FIXED = "fixed";
const MOST_PIXELS = 178956970;
const MOST_RESIZED = 2 ** 26;
const MOST_ASPECT = 200;
const REPLACE = "replace the picture, or save it again as PNG or JPEG";

// A picture as RGB: {width, height, data: three bytes per pixel}, upright, on white. source: pixels ({width, height,
// data}, three or four bytes each, as ImageData has them), in a browser whatever a canvas draws or fetches, in node a
// path or the bytes of a file, which `sharp` decodes.
export async function opened(source, sharp) {
  if (source?.data && source.width && source.height) return onWhite(source);
  try {
    if (sharp) return await decoded(source, sharp);
    if (typeof createImageBitmap === "function") return await drawn(source);
  } catch (error) {
    if (error instanceof RunnerError) throw error;
    throw new RunnerError(`the picture cannot be read: ${error.message}`, "picture", REPLACE, { cause: error });
  }
  const advice = "pass sharp to Runner.open (npm install sharp), or give pixels: {width, height, data}";
  throw new RunnerError("node decodes no pictures by itself", "picture", advice);
}

async function decoded(source, sharp) {
  const file = sharp(source, { ignoreIcc: true, limitInputPixels: MOST_PIXELS });
  const upright = file.autoOrient().toColourspace("srgb").ensureAlpha();
  const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
  const { width, height, channels } = info;
  if (channels === 4) return onWhite({ width, height, data });
  // Grey and opacity.
  const colours = new Uint8Array(width * height * 4);
  for (let at = 0; at < colours.length; at++) colours[at] = data[Math.floor(at / 4) * 2 + (at % 4 === 3 ? 1 : 0)];
  return onWhite({ width, height, data: colours });
}

async function drawn(source) {
  if (typeof source === "string" || source instanceof URL) {
    const answer = await fetch(source);
    if (!answer.ok) throw new Error(`HTTP status ${answer.status}`);
    source = await answer.blob();
  }
  const options = { colorSpaceConversion: "none", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(source, options);
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new RunnerError(`the picture has ${width} x ${height} pixels`, "picture", "make it smaller first");
  }
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = "white";
  canvas.fillRect(0, 0, width, height);
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  return onWhite(canvas.getImageData(0, 0, width, height));
}

function onWhite({ width, height, data }) {
  const pixels = width * height;
  const channels = data.length / pixels;
  if (channels !== 3 && channels !== 4) {
    const what = `pixels of ${width} x ${height} are ${data.length} bytes`;
    throw new RunnerError(what, "picture", "give three bytes per pixel, or four with opacity");
  }
  if (channels === 3) return { width, height, data };
  const made = new Uint8Array(pixels * 3);
  for (let at = 0; at < pixels; at++) {
    const opacity = data[at * 4 + 3];
    for (let band = 0; band < 3; band++) {
      made[at * 3 + band] = Math.round((data[at * 4 + band] * opacity + 255 * (255 - opacity)) / 255);
    }
  }
  return { width, height, data: made };
}

export class Pictures {
  constructor(settings, where) {
    if (settings.kind !== FIXED && settings.kind !== "patches") {
      throw new RunnerError(
        `kind is ${settings.kind}`,
        where,
        "use this module of the version that exported the folder",
      );
    }
    this.settings = settings;
    this.fixed = settings.kind === FIXED;
  }

  // What the graphs take of one RGB picture, {values: Float32Array, sizes, grid}; how many visual tokens it becomes,
  // in how many rows and columns (null where they form no single grid); and the part of the picture that these cover,
  // in pixels.
  prepared(picture) {
    return this.fixed ? this.square(picture) : this.patches(picture);
  }

  square(picture) {
    const { pad, size, crop, resample, tokens } = this.settings;
    const padded = pad === null ? { ...picture, left: 0, top: 0 } : squared(picture, pad);
    let seen = padded;
    if (size !== null) {
      let [height, width] = size;
      if (size.length === 1) {
        const [short, long] = [Math.min(seen.width, seen.height), Math.max(seen.width, seen.height)];
        const longest = Math.floor((size[0] * long) / short);
        [width, height] = seen.width <= seen.height ? [size[0], longest] : [longest, size[0]];
      }
      seen = this.resized(seen, width, height, resample);
    }
    const [across, down] = [padded.width / seen.width, padded.height / seen.height];
    const cut = crop === null ? { ...seen, left: 0, top: 0 } : cropped(seen, ...crop);
    const side = Math.round(Math.sqrt(tokens));
    return {
      values: this.normalized(cut),
      sizes: [3, cut.height, cut.width],
      grid: null,
      tokens,
      rows: side * side === tokens ? side : null,
      columns: side * side === tokens ? side : null,
      area: {
        x: cut.left * across - padded.left,
        y: cut.top * down - padded.top,
        width: cut.width * across,
        height: cut.height * down,
      },
    };
  }

  patches(picture) {
    const { patch, merge, frames, size, resample } = this.settings;
    const [width, height] = wholeBlocks(picture, patch * merge, ...(size ?? [1, 1]));
    const image = this.normalized(this.resized(picture, width, height, resample));
    const [rows, columns] = [height / patch, width / patch];
    const wide = 3 * frames * patch * patch;
    const values = new Float32Array(rows * columns * wide);
    let at = 0;
    for (let top = 0; top < rows; top += merge) {
      for (let left = 0; left < columns; left += merge) {
        for (let block = 0; block < merge * merge; block++) {
          const y = (top + Math.floor(block / merge)) * patch;
          const x = (left + (block % merge)) * patch;
          for (let band = 0; band < 3; band++) {
            for (let frame = 0; frame < frames; frame++) {
              for (let line = 0; line < patch; line++) {
                const from = band * height * width + (y + line) * width + x;
                values.set(image.subarray(from, from + patch), at);
                at += patch;
              }
            }
          }
        }
      }
    }
    return {
      values,
      sizes: [rows * columns, wide],
      grid: [rows, columns],
      tokens: (rows * columns) / merge ** 2,
      rows: rows / merge,
      columns: columns / merge,
      area: { x: 0, y: 0, width: picture.width, height: picture.height },
    };
  }

  resized(picture, width, height, resample) {
    if (width * height > MOST_RESIZED) {
      const what = `a picture of ${picture.width} x ${picture.height} pixels would become ${width} x ${height}`;
      throw new RunnerError(what, "picture", `cut it to a shape that needs at most ${MOST_RESIZED} pixels`);
    }
    return resized(picture, width, height, resample);
  }

  // Bands of floats: [3, H, W].
  normalized({ width, height, data }) {
    const { rescale, mean, std } = this.settings;
    const pixels = width * height;
    const made = new Float32Array(3 * pixels);
    for (let band = 0; band < 3; band++) {
      const [shift, scale] = [mean?.[band] ?? 0, std?.[band] ?? 1].map(Math.fround);
      // There are 256 values: each is computed once, with numpy's roundings.
      const table = Float32Array.from({ length: 256 }, (_, value) => {
        const scaled = rescale === null ? value : Math.fround(value * rescale);
        return mean === null ? scaled : Math.fround(scaled - shift) / scale;
      });
      for (let at = 0; at < pixels; at++) made[band * pixels + at] = table[data[at * 3 + band]];
    }
    return made;
  }
}

function squared(picture, colour) {
  const side = Math.max(picture.width, picture.height);
  const [left, top] = [Math.floor((side - picture.width) / 2), Math.floor((side - picture.height) / 2)];
  const data = new Uint8Array(side * side * 3);
  for (let at = 0; at < data.length; at++) data[at] = colour[at % 3];
  return { ...pasted(picture, { width: side, height: side, data }, left, top), left, top };
}

// The middle of a picture, with black around one that is smaller. left, top: where it lies in the picture.
function cropped(picture, height, width) {
  const start = (given, wanted) =>
    given < wanted ? -Math.ceil((wanted - given) / 2) : Math.floor((given - wanted) / 2);
  const [left, top] = [start(picture.width, width), start(picture.height, height)];
  const canvas = { width, height, data: new Uint8Array(width * height * 3) };
  return { ...pasted(picture, canvas, -left, -top), left, top };
}

// Copy a picture to a place on another one, which may cut it off on all sides.
function pasted(picture, onto, left, top) {
  const [first, end] = [Math.max(0, left), Math.min(onto.width, left + picture.width)];
  for (let y = Math.max(0, top); y < Math.min(onto.height, top + picture.height); y++) {
    const from = ((y - top) * picture.width + first - left) * 3;
    onto.data.set(picture.data.subarray(from, from + (end - first) * 3), (y * onto.width + first) * 3);
  }
  return onto;
}

// Width and height, multiples of `side` of nearly the same aspect, with so many pixels in all.
function wholeBlocks({ width, height }, side, fewest, most) {
  if (Math.max(width, height) > MOST_ASPECT * Math.min(width, height)) {
    const what = `a picture of ${width} x ${height} pixels is too long`;
    throw new RunnerError(what, "picture", `give sides that differ by at most ${MOST_ASPECT} times`);
  }
  const sizes = [width, height].map((each) => evenly(each / side) * side);
  const area = sizes[0] * sizes[1];
  if (area > most) {
    const shrink = Math.sqrt((width * height) / most);
    return [width, height].map((each) => Math.max(side, Math.floor(each / shrink / side) * side));
  }
  if (area >= fewest) return sizes;
  const grow = Math.sqrt(fewest / (width * height));
  return [width, height].map((each) => Math.ceil((each * grow) / side) * side);
}

// The nearest whole number; halves go to the even one, as in Python.
function evenly(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}
