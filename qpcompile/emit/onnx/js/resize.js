// Resampling with the arithmetic of Pillow 13, bit for bit: two passes of 8-bit values with weights of 22 fractional
// bits. Filters by Pillow's numbers (Image.Resampling), weight over distance in source pixels.

const BITS = 22;

const NEAREST = 0;
const FILTERS = {
  1: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, (x) => cubic(Math.abs(x), -0.5)],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  5: [1, (x) => (x === 0 ? 1 : Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)))],
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

// Keys' cubic convolution (IEEE ASSP 29, 1981).
function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// picture: {width, height, data: three bytes per pixel}; filter: Pillow's number.
export function resized(picture, width, height, filter) {
  if (width === picture.width && height === picture.height) return picture;
  if (filter === NEAREST) return nearest(picture, width, height);
  const across = (given) => (width === given.width ? given : horizontal(given, width, FILTERS[filter]));
  const down = (given) => (height === given.height ? given : vertical(given, height, FILTERS[filter]));
  // Where the height shrinks by more than twice what the width does, Pillow (13 and newer) begins with it.
  const shrinks = picture.height - height;
  return shrinks > 0 && shrinks > 2 * (picture.width - width) ? across(down(picture)) : down(across(picture));
}

function nearest({ width: from, height: rows, data }, width, height) {
  const made = new Uint8Array(width * height * 3);
  const [columns, lines] = [places(from, width), places(rows, height)];
  lines.forEach((line, y) => {
    columns.forEach((column, x) => {
      const at = (line * from + column) * 3;
      made.set(data.subarray(at, at + 3), (y * width + x) * 3);
    });
  });
  return { width, height, data: made };
}

// The source pixel of every new one; places are added up, as in Pillow, not multiplied.
function places(from, to) {
  const scale = from / to;
  let next = scale * 0.5;
  return Array.from({ length: to }, () => {
    const place = Math.trunc(next);
    next += scale;
    return place;
  });
}

// For every new pixel: the first source pixel, and the weights from there on.
function weights(from, to, [support, filter]) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: to }, (_, pixel) => {
    const center = (pixel + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(from, Math.trunc(center + reach + 0.5));
    const found = [];
    let sum = 0;
    for (let at = first; at < end; at++) {
      const weight = filter((at - center + 0.5) * (1 / stretch));
      found.push(weight);
      sum += weight;
    }
    const whole = found.map((weight) => {
      const share = sum === 0 ? weight : weight * (1 / sum);
      return Math.trunc(share * 2 ** BITS + (share < 0 ? -0.5 : 0.5));
    });
    return [first, Int32Array.from(whole)];
  });
}

function byte(sum) {
  return Math.min(255, Math.max(0, sum >> BITS));
}

function horizontal({ width: from, height, data }, width, filter) {
  const made = new Uint8Array(width * height * 3);
  weights(from, width, filter).forEach(([first, factors], x) => {
    for (let y = 0; y < height; y++) {
      let [red, green, blue] = [1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)];
      let at = (y * from + first) * 3;
      for (const factor of factors) {
        red += data[at++] * factor;
        green += data[at++] * factor;
        blue += data[at++] * factor;
      }
      const to = (y * width + x) * 3;
      made[to] = byte(red);
      made[to + 1] = byte(green);
      made[to + 2] = byte(blue);
    }
  });
  return { width, height, data: made };
}

function vertical({ width, height: from, data }, height, filter) {
  const line = width * 3;
  const made = new Uint8Array(line * height);
  weights(from, height, filter).forEach(([first, factors], y) => {
    for (let x = 0; x < line; x++) {
      let sum = 1 << (BITS - 1);
      for (let k = 0; k < factors.length; k++) sum += data[(first + k) * line + x] * factors[k];
      made[y * line + x] = byte(sum);
    }
  });
  return { width, height, data: made };
}
