// What is known of one token, beside it; and the same as a sentence.
const QUOTED = 200; // characters of a token, at most
class Card {
  constructor(page) { this.page = page; this.box = document.getElementById("card"); }

  hide() { this.box.hidden = true; }

  show(i, run, rect, row) { // of one head, or of those that are chosen
    if (!rect) return;
    const facts = make("dl");
    for (const [term, fact] of this.facts(i, run, row)) facts.append(make("dt", {}, term), make("dd", {}, fact));
    this.box.replaceChildren(make("p", {}, make("b", {}, this.quoted(i)), ` token ${count(i)}`, i < this.page.before ? ", of the prompt" : ""), facts);
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect(), below = rect.bottom + 6;
    this.box.style.left = `${Math.max(6, Math.min(rect.left, innerWidth - width - 6))}px`;
    this.box.style.top = `${below + height < innerHeight ? below : Math.max(6, rect.top - height - 6)}px`;
  }

  quoted(i) {
    const piece = this.page.pieces[i];
    return piece ? `\u201c${visible(piece.length > QUOTED ? `${piece.slice(0, QUOTED)}\u2026` : piece).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5")}\u201d` : "(part of a character)";
  }

  facts(i, run, row) {
    const { t, rows: chosen } = this.page, rows = row === undefined ? chosen(run) : [row], out = [], all = run.all();
    if (i >= t) return [["read", "not yet, at this moment"]];
    const holding = rows.filter((r) => run.holds(r, i, t)).length;
    const stay = rows.reduce((sum, r) => sum + Math.min(run.end(r, i), t) - i, 0) / rows.length;
    out.push([run.title, rows.length === 1 ? run.label(rows[0]) : rows.length === all.length ? "all heads" : `${rows.length} heads`]);
    if (rows.length > 1) out.push(["held by", `${holding} of ${rows.length} heads`]);
    out.push([rows.length > 1 ? "stayed, mean" : "stayed", `${count(stay)} of ${count(t - i)} tokens (${percent(stay / (t - i))})`]);
    out.push(["evicted", this.evictions(rows.map((r) => run.end(r, i)).filter((end) => end < t), rows.length)]);
    out.push(...this.gates(rows, i, run), ...this.scores(rows, i, run));
    for (const other of this.page.runs) {
      if (other === run || !this.page.visible(other)) continue;
      const theirs = this.page.rows(other);
      out.push([other.title, `held by ${theirs.filter((r) => other.holds(r, i, t)).length} of ${theirs.length}`]);
    }
    return out;
  }

  evictions(ends, n) {
    if (!ends.length) return "no";
    ends.sort((a, b) => a - b);
    if (n === 1) return `when ${count(ends[0])} tokens were read`;
    const range = ends[0] === ends[ends.length - 1] ? count(ends[0]) : `${count(ends[0])} to ${count(ends[ends.length - 1])}`;
    return `by ${ends.length}, when ${range} tokens were read`;
  }

  gates(rows, i, run) { // retention remembers log beta: a token is worth half as much after log 2 / -log beta tokens
    const said = rows.map((r) => run.gate(r, i)).filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
    if (!said.length) return [];
    const decay = run.policy === "retention", text = (x) => (decay ? `${number(Math.exp(x))}, half after ${count(Math.min(1e9, Math.LN2 / -x))} tokens` : number(x));
    const range = said.length === 1 ? text(said[0]) : `${number(decay ? Math.exp(said[0]) : said[0])} to ${number(decay ? Math.exp(said[said.length - 1]) : said[said.length - 1])}, median ${text(said[said.length >> 1])}`;
    return [[decay ? "gate, \u03b2" : "gate", range]];
  }

  scores(rows, i, run) {
    const known = rows.filter((r) => run.rank(r, i) !== UNRANKED);
    if (!known.length) return [["score", "never competed: a sink, in the ring to the end, or of a local layer"]];
    const rank = known.reduce((sum, r) => sum + run.rank(r, i), 0) / known.length / 254;
    const scores = known.map((r) => run.score(r, i)).sort((a, b) => a - b);
    const text = known.length === 1 ? number(scores[0]) : `${number(scores[0])} to ${number(scores[scores.length - 1])}, median ${number(scores[scores.length >> 1])}`;
    const when = this.page.t < run.n_tokens ? ", at the end of the text" : ""; // no other is known
    return [[`last score${when}`, text], ["its rank", `above ${percent(rank)} of what competed`]];
  }

  spoken(i, run) {
    return `Token ${i}, ${this.quoted(i)}. ${this.facts(i, run).map(([a, b]) => `${a}: ${b}`).join(". ")}.`;
  }
}

function number(x) {
  if (!Number.isFinite(x)) return x > 0 ? "kept whatever comes" : "below the threshold: dropped whatever room there is";
  const size = Math.abs(x);
  return size && (size < 1e-3 || size >= 1e5) ? x.toExponential(1) : String(Number(x.toPrecision(3)));
}
