// The page's data: unpacking, and what is computed of it.
const ARRAYS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array };
const LEVELS = 9, UNRANKED = 255;

async function unpack(block) {
  const Type = ARRAYS[block.type], width = Type.BYTES_PER_ELEMENT, n = block.shape.reduce((a, b) => a * b, 1);
  const planes = await inflated(bytesOf(block.data), n * width);
  if (width === 1) return planes;
  const out = new Type(n);
  for (let p = 0; p < width; p++) for (let i = 0, at = p * n; i < n; i++, at++) out[i] |= planes[at] << (8 * p);
  return out;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

async function inflated(packed, size) {
  if (typeof DecompressionStream === "undefined") return inflate(packed, size);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// What became of the text in one list of caches. A row is one KV head of one layer.
class Run {
  static async from(about, index) {
    const run = Object.assign(new Run(), about);
    run.index = index;
    run.color = `var(--r${index % 6})`;
    run.dash = ["", "7 3", "2 3", "9 3 2 3", "4 4", "1 2"][index % 6];
    for (const name of ["rows", "caps", "starts", "gone", "held"]) run[name] = await unpack(about.arrays[name]);
    run.ranks = new Uint8Array(run.gone.length).fill(UNRANKED); // until ``finish``
    run.scores = new Uint16Array(0);
    run.floor = about.arrays.floor ? await unpack(about.arrays.floor) : new Uint8Array(run.caps.length);
    run.gates = null; // until ``finish``, and where the policy has none
    run.nRows = run.caps.length;
    run.layers = [...new Set(Array.from({ length: run.nRows }, (_, r) => run.rows[2 * r]))];
    run.bounds = Float64Array.from([...run.starts, run.n_tokens]); // tokens read when a step began; at last, all of them
    run.steps = run.starts.length;
    return run;
  }

  // The largest arrays, which the first picture does not need.
  async finish() {
    this.ranks = await unpack(this.arrays.ranks);
    this.scores = await unpack(this.arrays.scores);
    if (this.arrays.gates) this.gates = await unpack(this.arrays.gates);
    this.arrays = null;
  }

  layer(r) { return this.rows[2 * r]; }
  headOf(r) { return this.rows[2 * r + 1]; }
  label(r) { return `layer ${this.layer(r)}, head ${this.headOf(r)}`; }
  get title() { return `${this.policy}${this.allocator === "uniform" ? "" : `, ${this.allocator}`}`; }

  // Tokens read when row r evicted token i; Infinity where it holds it to the end.
  end(r, i) { const g = this.gone[r * this.n_tokens + i]; return g === this.steps ? Infinity : this.bounds[g]; }
  holds(r, i, t) { return i < t && this.end(r, i) >= t; }
  score(r, i) { return Run.wide(this.scores[r * this.n_tokens + i]); }
  gate(r, i) { return this.gates ? Run.wide(this.gates[r * this.n_tokens + i]) : NaN; } // NaN in local layers, too
  static wide(half) { Run.bits[0] = half << 16; return Run.number[0]; } // of bfloat16
  rank(r, i) { return this.ranks[r * this.n_tokens + i]; }
  all() { return Array.from({ length: this.nRows }, (_, r) => r); }

  // For each token: what the measure says, from 0 to 1 (NaN: nothing), and how many of the rows hold it.
  perToken(rows, t, measure) {
    const n = this.n_tokens, value = new Float32Array(n), count = new Uint16Array(n);
    const ends = Float64Array.from(this.bounds), known = measure === "rank" ? new Uint16Array(n) : null;
    ends[this.steps] = Infinity;
    for (const r of rows) {
      for (let i = 0, at = r * n; i < t; i++, at++) {
        const end = ends[this.gone[at]];
        if (end >= t) count[i]++;
        if (measure === "stay") value[i] += (end < t ? end : t) - i;
        else if (known && this.ranks[at] !== UNRANKED) { value[i] += this.ranks[at] / 254; known[i]++; }
      }
    }
    for (let i = 0; i < t; i++) {
      if (measure === "stay") value[i] /= rows.length * (t - i);
      else if (measure === "heads") value[i] = count[i] / rows.length;
      else value[i] = known[i] ? value[i] / known[i] : NaN;
    }
    return { value, count };
  }

  // For each row, of what it holds when t tokens were read: how many; their mean age in tokens; and the mean share of
  // the other rows that hold the same token.
  perRow(t) {
    const held = new Uint32Array(this.nRows), age = new Float32Array(this.nRows), common = new Float32Array(this.nRows);
    const ends = Float64Array.from(this.bounds), n = this.n_tokens, { count } = this.perToken(this.all(), t, "heads");
    ends[this.steps] = Infinity;
    for (let r = 0; r < this.nRows; r++) {
      let slots = 0, ages = 0, others = 0;
      for (let i = 0, at = r * n; i < t; i++, at++) if (ends[this.gone[at]] >= t) { slots++; ages += t - i; others += count[i] - 1; }
      held[r] = slots;
      age[r] = slots ? ages / slots : 0;
      common[r] = slots && this.nRows > 1 ? others / slots / (this.nRows - 1) : 0;
    }
    return { held, age, common };
  }

  // Means over tokens in bins, row by row: what the map of positions shows. NaN where nothing was read.
  binned(t, measure, bins) {
    const n = this.n_tokens, out = new Float32Array(this.nRows * bins).fill(NaN);
    const ends = Float64Array.from(this.bounds);
    ends[this.steps] = Infinity;
    for (let r = 0; r < this.nRows; r++) {
      for (let b = 0; b < bins; b++) {
        const start = Math.floor((b * n) / bins), stop = Math.min(t, Math.max(start + 1, Math.floor(((b + 1) * n) / bins)));
        let sum = 0, known = 0;
        for (let i = start; i < stop; i++) {
          const at = r * n + i, end = ends[this.gone[at]];
          if (measure === "stay") { sum += ((end < t ? end : t) - i) / (t - i); known++; }
          else if (measure === "heads") { sum += end >= t; known++; }
          else if (this.ranks[at] !== UNRANKED) { sum += this.ranks[at] / 254; known++; }
        }
        if (known) out[r * bins + b] = sum / known;
      }
    }
    return out;
  }

  // Over steps: tokens read, mean, least and most slots of any row.
  overTime() {
    const x = [0], mean = [0], least = [0], most = [0];
    for (let s = 0; s < this.steps; s++) {
      const row = this.held.subarray(s * this.nRows, (s + 1) * this.nRows);
      let sum = 0, low = Infinity, high = 0;
      for (const h of row) { sum += h; if (h < low) low = h; if (h > high) high = h; }
      x.push(this.bounds[s + 1]); mean.push(sum / this.nRows); least.push(low); most.push(high);
    }
    return { x, mean, least, most };
  }

  get cap() { let sum = 0; for (const c of this.caps) sum += c; return sum / this.nRows; }
}
Run.bits = new Uint32Array(1);
Run.number = new Float32Array(Run.bits.buffer);

const level = (x) => (Number.isNaN(x) ? -1 : Math.min(LEVELS - 1, Math.floor(x * LEVELS)));
const count = (x) => Math.round(x).toLocaleString("en");
const percent = (x) => `${(100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0)} %`;
function bytes(n) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return `${(n / size).toFixed(1)} ${unit}`;
  return `${n} bytes`;
}
