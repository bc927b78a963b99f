// The table of a language: finds the translation of a text, exactly or by a pattern.

const MOST = 6000; // longer texts are no texts of the page
const REMEMBERED = 4000;
const DEPTH = 4;
const NUMBER = /^[-+]?[\d.,:/×x ]*\d[%]?$/;
// The labels of fields in messages, as “LoRA > Rank”; those that are always visible have no section.
const QUOTED = /“([^”]{1,80})”/g;
const FIRST = ["Base model", "Folder of images", "Name of the LoRA", "Trigger word"];

class Pattern {
  constructor(key, value) {
    const parts = key.split(/\{([0-9a-zA-Z])\}/);
    this.literals = parts.filter((_, i) => i % 2 === 0);
    this.names = parts.filter((_, i) => i % 2 === 1);
    this.value = value;
    this.weight = this.literals.join("").length;
    this.first = /^(\S+)\s/.exec(this.literals[0])?.[1] ?? null;
  }
  // What stands for the pattern's names in a text, each found at its first possible place; null where it does not fit.
  held(text) {
    const last = this.literals.length - 1, end = text.length - this.literals[last].length;
    if (!text.startsWith(this.literals[0]) || !text.endsWith(this.literals[last])) return null;
    const found = {};
    for (let i = 1, at = this.literals[0].length; i <= last; i += 1) {
      const to = i === last ? end : text.indexOf(this.literals[i], at), name = this.names[i - 1];
      if (to < at || to > end) return null;
      const part = text.slice(at, to);
      if (/\d/.test(name) && !NUMBER.test(part)) return null;
      found[name] = part;
      at = to + this.literals[i].length;
    }
    return found;
  }
}

class Part {
  constructor(entries) {
    this.exact = new Map();
    this.byWord = new Map();
    this.open = [];
    for (const [key, value] of Object.entries(entries)) {
      if (!/\{[0-9a-zA-Z]\}/.test(key)) { this.exact.set(key, value); continue; }
      const pattern = new Pattern(key, value);
      if (pattern.first === null) this.open.push(pattern);
      else this.byWord.set(pattern.first, [...(this.byWord.get(pattern.first) || []), pattern]);
    }
    for (const list of [this.open, ...this.byWord.values()]) list.sort((one, other) => other.weight - one.weight);
    this.known = new Map();
  }
  find(text) {
    if (text.length > MOST) return null;
    if (this.known.has(text)) return this.known.get(text);
    const found = this.of(text.trim(), DEPTH);
    const value = found === null ? null : /^\s*/.exec(text)[0] + found + /\s*$/.exec(text)[0];
    if (this.known.size >= REMEMBERED) this.known.clear();
    this.known.set(text, value);
    return value;
  }
  of(text, depth) {
    const exact = this.exact.get(text) ?? this.exact.get(text.replace(/\s+/g, " "));
    if (exact !== undefined) return exact;
    if (!depth) return null;
    for (const list of [this.byWord.get(/^\S*/.exec(text)[0]), this.open])
      for (const pattern of list || []) {
        const held = pattern.held(text);
        const filled = held && this.filled(pattern, held, depth - 1);
        if (filled) return filled;
      }
    return text.includes("\n") ? this.lines(text, depth - 1) : null;
  }
  filled(pattern, held, depth) {
    const words = {};
    for (const [name, part] of Object.entries(held)) {
      words[name] = /[A-Z]/.test(name) ? this.of(part, depth) : this.kept(part);
      if (words[name] === null) return null;
    }
    return pattern.value.replace(/\{([0-9a-zA-Z])\}/g, (all, name) => words[name] ?? all);
  }
  kept(part) {
    return part.replace(QUOTED, (all, inner) => {
      const names = inner.split(" > ").map((name) => this.exact.get(name));
      const isLabel = names.every((name) => name !== undefined) && (names.length > 1 || FIRST.includes(inner));
      return isLabel ? `“${names.join(" > ")}”` : all;
    });
  }
  lines(text, depth) {
    const lines = text.split("\n");
    const found = lines.map((line) => { const of = this.of(line.trim(), depth); return of === null ? null : /^\s*/.exec(line)[0] + of; });
    return found.some((line) => line !== null) ? found.map((line, i) => line ?? lines[i]).join("\n") : null;
  }
}

// `page` is for everything; of `names` is what may stand in lists of names that users gave.
export class Table {
  constructor({ page, names }) {
    this.page = new Part({ ...names, ...page });
    this.names = new Part(names);
  }
  find(text, isName) { return (isName ? this.names : this.page).find(text); }
}
