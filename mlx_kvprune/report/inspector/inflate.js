// Inflate of a zlib stream (RFC 1950, 1951), for browsers without DecompressionStream.
const inflate = (() => {
  const LENGTH = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
  const LENGTH_BITS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
  const DISTANCE = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577];
  const DISTANCE_BITS = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
  const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

  function tree(lengths) { // canonical Huffman: how many codes of each length, and the symbols in order
    const count = new Uint16Array(16), offset = new Uint16Array(16), symbols = new Uint16Array(lengths.length);
    for (const n of lengths) count[n]++;
    count[0] = 0;
    for (let i = 1; i < 16; i++) offset[i] = offset[i - 1] + count[i - 1];
    lengths.forEach((n, symbol) => { if (n) symbols[offset[n]++] = symbol; });
    return { count, symbols };
  }

  const fixed = () => [
    tree([...Array(144).fill(8), ...Array(112).fill(9), ...Array(24).fill(7), ...Array(8).fill(8)]),
    tree(Array(30).fill(5)),
  ];

  return function inflate(input, size) {
    const out = new Uint8Array(size);
    let at = 2, written = 0, hold = 0, held = 0, last = 0; // the first two bytes are zlib's header
    function bits(n) {
      while (held < n) { hold |= input[at++] << held; held += 8; }
      const value = hold & ((1 << n) - 1);
      hold >>>= n; held -= n;
      return value;
    }
    function symbol({ count, symbols }) {
      let code = 0, first = 0, index = 0;
      for (let n = 1; n < 16; n++) {
        code |= bits(1);
        if (code - first < count[n]) return symbols[index + code - first];
        index += count[n]; first = (first + count[n]) << 1; code <<= 1;
      }
      throw new Error("damaged data");
    }
    function dynamic() {
      const nLiterals = bits(5) + 257, nDistances = bits(5) + 1, nCodes = bits(4) + 4, codes = Array(19).fill(0), lengths = [];
      for (let i = 0; i < nCodes; i++) codes[ORDER[i]] = bits(3);
      const meta = tree(codes);
      while (lengths.length < nLiterals + nDistances) {
        const s = symbol(meta);
        if (s < 16) { lengths.push(s); continue; }
        const value = s === 16 ? lengths[lengths.length - 1] : 0;
        for (let n = s === 16 ? 3 + bits(2) : s === 17 ? 3 + bits(3) : 11 + bits(7); n > 0; n--) lengths.push(value);
      }
      return [tree(lengths.slice(0, nLiterals)), tree(lengths.slice(nLiterals))];
    }
    while (!last) {
      last = bits(1);
      const kind = bits(2);
      if (kind === 0) { // stored
        hold = held = 0;
        const n = input[at] | (input[at + 1] << 8);
        out.set(input.subarray(at + 4, at + 4 + n), written);
        at += 4 + n; written += n;
        continue;
      }
      const [literals, distances] = kind === 1 ? fixed() : dynamic();
      for (let s = symbol(literals); s !== 256; s = symbol(literals)) {
        if (s < 256) { out[written++] = s; continue; }
        const n = LENGTH[s - 257] + bits(LENGTH_BITS[s - 257]), d = symbol(distances);
        const back = DISTANCE[d] + bits(DISTANCE_BITS[d]);
        for (let i = 0; i < n; i++, written++) out[written] = out[written - back];
      }
    }
    return out;
  };
})();
