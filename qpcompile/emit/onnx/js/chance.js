// Random numbers from a seed, the same ones as numpy.random.default_rng gives: O'Neill's PCG64 (XSL-RR, "PCG: A Family
// of Simple Fast Space-Efficient Statistically Good Algorithms", 2014), seeded by her seed_seq_fe as numpy does it.

const WORD = 0xffffffffn;
const LONG = (1n << 64n) - 1n;
const WIDE = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

export class Chance {
  // seed: a whole number from 0 to 2**53.
  constructor(seed) {
    const [a, b, c, d] = seedWords(BigInt(seed));
    this.increment = ((((c << 64n) | d) << 1n) | 1n) & WIDE;
    this.state = 0n;
    this.step();
    this.state = (this.state + ((a << 64n) | b)) & WIDE;
    this.step();
  }

  step() {
    this.state = (this.state * MULTIPLIER + this.increment) & WIDE;
  }

  // A number from 0 to 1, 1 excluded, with 53 random bits.
  random() {
    this.step();
    const turn = this.state >> 122n;
    const folded = (this.state >> 64n) ^ (this.state & LONG);
    const bits = ((folded >> turn) | (folded << (64n - turn))) & LONG;
    return Number(bits >> 11n) * 2 ** -53;
  }

  // An index, each with its share; shares: Float64Array with sum 1.
  index(shares) {
    let total = 0;
    const sums = shares.map((share) => (total += share));
    const reached = this.random();
    const found = sums.findIndex((sum) => sum / total > reached);
    return found < 0 ? shares.length - 1 : found;
  }
}

// Four 64-bit words from the pool of the seed.
function seedWords(seed) {
  let constant = 0x43b0d7e5n;
  const hashed = (value) => {
    const mixed = value ^ constant;
    constant = (constant * 0x931e8875n) & WORD;
    return scrambled((mixed * constant) & WORD);
  };
  const pool = [seed & WORD, (seed >> 32n) & WORD, 0n, 0n].map(hashed);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from === to) continue;
      const difference = pool[to] * 0xca01f9ddn - hashed(pool[from]) * 0x4973f715n;
      pool[to] = scrambled(difference & WORD);
    }
  }
  let second = 0x8b51f9ddn;
  const words = Array.from({ length: 8 }, (_, number) => {
    const mixed = pool[number % 4] ^ second;
    second = (second * 0x58f38dedn) & WORD;
    return scrambled((mixed * second) & WORD);
  });
  return [0, 2, 4, 6].map((at) => words[at] | (words[at + 1] << 32n));
}

function scrambled(word) {
  return word ^ (word >> 16n);
}
