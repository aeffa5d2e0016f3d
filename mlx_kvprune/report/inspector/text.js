// The text, a span per token, built a chunk at a time.
const CHUNK = 320; // tokens, at least; a chunk then ends with the line, so that each line finds its own direction
const LONGEST_CHUNK = 2000;

// Marks that are shown by name: they would be invisible, or reorder what stands around them.
const NAMED = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
function named(c) {
  const code = c.charCodeAt(0);
  if (code < 32) return String.fromCharCode(0x2400 + code);
  return code === 127 ? "\u2421" : `\u27e8${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}
const visible = (text) => text.replace(NAMED, named);

function chunks(pieces) { // [start, stop) of each
  const out = [];
  for (let start = 0, i = 0; i < pieces.length; i++) {
    const n = i + 1 - start;
    if (i + 1 === pieces.length || n >= LONGEST_CHUNK || (n >= CHUNK && pieces[i].endsWith("\n"))) { out.push([start, i + 1]); start = i + 1; }
  }
  return out;
}

class TextView {
  constructor(page, run) {
    this.page = page; this.run = run; this.spans = []; this.shown = []; this.at = -1;
    this.box = make("div", { class: "text", tabindex: 0, role: "region", "aria-label": `The text under ${run.title}; arrow keys go from token to token` });
    this.waiting = chunks(page.pieces);
    this.state = { levels: null, held: null, t: run.n_tokens };
    this.box.addEventListener("pointerover", (e) => this.point(e));
    this.box.addEventListener("pointermove", (e) => { this.mouse = [e.clientX, e.clientY]; });
    this.box.addEventListener("click", (e) => this.point(e, true));
    this.box.addEventListener("pointerleave", () => page.card.hide());
    this.box.addEventListener("keydown", (e) => this.key(e));
    this.box.addEventListener("focus", () => { if (this.at < 0) page.live("Arrow keys go from token to token."); });
    this.box.addEventListener("blur", () => page.card.hide());
    this.box.addEventListener("scroll", () => this.scrolled(), { passive: true });
  }

  // Build chunks until the time is up, or up to token `until`; says whether all of them are there.
  build(deadline = Infinity, until = Infinity) {
    while (this.waiting.length && this.spans.length <= until && performance.now() < deadline) {
      const [start, stop] = this.waiting.shift(), chunk = make("div", { class: "chunk" });
      for (let i = start; i < stop; i++) chunk.append(this.span(i));
      this.box.append(chunk);
      this.paint(start, stop);
    }
    return !this.waiting.length;
  }

  span(i) {
    const piece = this.page.pieces[i], span = document.createElement("s");
    span.textContent = visible(piece).replace(/\n/g, "\u21b5\n");
    this.spans.push(span);
    this.shown.push("");
    return span;
  }

  show(levels, held, t) {
    this.state = { levels, held, t };
    this.paint(0, this.spans.length);
  }

  paint(start, stop) {
    const { levels, held, t } = this.state, { hits, pieces, before } = this.page;
    if (!levels) return;
    for (let i = start; i < stop; i++) {
      let name = i >= t ? "unread" : levels[i] < 0 ? "none" : `l${levels[i]}`;
      if (i < t && held[i]) name += " held";
      if (!pieces[i]) name += " part";
      if (i < before) name += " before";
      if (hits.has(i)) name += " hit";
      if (i === this.at) name += " at";
      if (this.shown[i] !== name) { this.shown[i] = name; this.spans[i].className = name; }
    }
  }

  index(target) { // of the token a span stands for
    if (target.tagName !== "S") return -1;
    let chunk = target.parentNode, i = Array.prototype.indexOf.call(chunk.children, target);
    while ((chunk = chunk.previousElementSibling)) i += chunk.children.length;
    return i;
  }

  point(event, stay = false) {
    const [x, y] = this.mouse || [];
    this.mouse = [event.clientX, event.clientY];
    if (!stay && x === event.clientX && y === event.clientY) return; // the text moved under a mouse that rests
    const i = this.index(event.target);
    if (i < 0) return this.page.card.hide();
    if (stay) this.go(i, false);
    this.page.card.show(i, this.run, this.spans[i].getClientRects()[0]);
  }

  scrolled() {
    this.page.followScroll(this.box);
    this.placeCard();
  }

  placeCard() { // what hovers goes with its token, as long as that can be seen
    if (document.activeElement !== this.box || this.at < 0) { if (this.box.matches(":hover")) this.page.card.hide(); return; }
    const rect = this.spans[this.at].getClientRects()[0], { top, bottom } = this.box.getBoundingClientRect();
    if (!rect || rect.bottom < top || rect.top > bottom) this.page.card.hide();
    else if (!this.page.card.box.hidden) this.page.card.show(this.at, this.run, rect);
  }

  key(event) {
    const last = this.page.pieces.length - 1;
    const moves = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      event.preventDefault();
      this.go(Math.max(0, Math.min(last, moves[event.key])));
      this.page.card.show(this.at, this.run, this.spans[this.at].getClientRects()[0]);
      this.page.live(this.page.card.spoken(this.at, this.run));
    }
  }

  go(i, scroll = true) { // make i the current token
    this.build(Infinity, i);
    const old = this.at;
    this.at = i;
    if (old >= 0) this.paint(old, old + 1);
    this.paint(i, i + 1);
    if (scroll) this.reveal(i);
  }

  reveal(i) { // scroll the box, and the page as far as must be
    this.build(Infinity, i);
    const box = this.box, span = this.spans[i], bar = $("bar").getBoundingClientRect();
    span.parentNode.style.contentVisibility = "visible"; // it has its true height now, not with the next frame
    const y = span.getBoundingClientRect().top - box.getBoundingClientRect().top;
    if (y < 24 || y > box.clientHeight - 60) box.scrollTop += y - box.clientHeight / 3;
    const { top, bottom } = span.getBoundingClientRect();
    if (top < bar.height + 8 || bottom > innerHeight - 8) window.scrollBy(0, top - innerHeight / 2);
  }
}
