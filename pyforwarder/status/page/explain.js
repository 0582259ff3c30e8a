// The form that asks which rule would take some first bytes.

import { at, element, say } from "./dom.js";
import { Table } from "./tables.js";

const SHOWN_BYTES = 256;
const OUTCOMES = { match: "match", "no-match": "no match", "need-more": "needs more" };

/** What the form's text stands for, as hex digits; throws a sentence for people. */
export function toHex(text, crlf) {
  const bytes = [];
  const lines = crlf ? text.replace(/\r?\n/g, "\r\n") : text;
  const encoder = new TextEncoder();
  for (const [piece, escape] of pieces(lines)) {
    if (escape === null) {
      bytes.push(...encoder.encode(piece));
    } else if (escape.length === 3) {
      bytes.push(Number.parseInt(escape.slice(1), 16));
    } else {
      bytes.push({ r: 13, n: 10, t: 9, "\\": 92 }[escape]);
    }
  }
  return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function* pieces(text) {
  let from = 0;
  for (const found of text.matchAll(/\\(x[0-9a-fA-F]{2}|[rnt\\]|)/g)) {
    if (found[1] === "") throw new Error(`\\ at ${found.index + 1}: \\r, \\n, \\t, \\\\ or \\x and two digits`);
    if (found.index > from) yield [text.slice(from, found.index), null];
    yield [found[0], found[1]];
    from = found.index + found[0].length;
  }
  if (from < text.length) yield [text.slice(from), null];
}

export class Explain {
  /** `ask(path, question)` sends a question and resolves to the answer. */
  constructor(ask) {
    this.table = new Table(at("explain-rules"), "What each rule says", [
      ["Rule", "text"],
      ["Says", "text"],
      ["After byte", "number"],
      ["Why", "text"],
    ]);
    at("explain-rules").hidden = true;
    at("explain-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        this.show(await ask("explain", this.question()));
      } catch (error) {
        this.refuse(error.message);
      }
    });
  }

  listeners(names) {
    const before = at("explain-listener").value;
    at("explain-listener").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    if (names.includes(before)) at("explain-listener").value = before;
  }

  question() {
    const text = at("explain-bytes").value;
    const isText = document.querySelector("input[name=form]:checked").value === "text";
    const question = {
      listener: at("explain-listener").value,
      hex: isText ? toHex(text, at("explain-crlf").checked) : text,
      end: at("explain-end").value,
    };
    const client = at("explain-client").value.trim();
    return client ? { ...question, client } : question;
  }

  refuse(words) {
    say(at("explain-verdict"), words);
    at("explain-verdict").className = "bad";
    at("explain-dump").replaceChildren();
    at("explain-rules").hidden = true;
  }

  show(answer) {
    say(at("explain-verdict"), words(answer));
    at("explain-verdict").className = answer.outcome;
    this.table.reset(answer.rules.map((rule) => rule.rule), undefined, (index) =>
      answer.rules[index].rule === answer.rule ? "chosen" : "",
    );
    answer.rules.forEach((rule, index) => {
      this.table.write(index, [rule.rule, OUTCOMES[rule.outcome] ?? rule.outcome, rule.after_bytes, rule.why]);
    });
    at("explain-rules").hidden = false;
    at("explain-dump").replaceChildren(dump(answer.hex, answer.after_bytes));
  }
}

function words(answer) {
  const after = `after ${answer.after_bytes} of ${answer.bytes} ${answer.bytes === 1 ? "byte" : "bytes"}`;
  if (answer.outcome === "route") {
    const may = { true: "allowed", false: "denied", null: "not known whether allowed" }[String(answer.allowed)];
    return `Rule ${answer.rule} takes it ${after}, to ${answer.to}; ${may}: ${answer.why}. ${answer.skip} of the bytes are the forwarder's own.`;
  }
  if (answer.outcome === "refuse") {
    const by = answer.rule === "-" ? "No rule takes it" : `Rule ${answer.rule} refuses it`;
    return `${by}, decided ${after}: ${answer.why}.`;
  }
  return `Undecided ${after}: ${answer.why}.`;
}

/** The bytes, those that were needed to decide apart from the rest. */
function dump(hex, needed) {
  const bytes = hex.match(/../g) ?? [];
  const text = (from, to) => bytes.slice(from, Math.min(to, SHOWN_BYTES)).join(" ");
  const rest = bytes.length > SHOWN_BYTES ? " ..." : "";
  return element(
    "p",
    { class: "dump" },
    element("mark", { title: "needed to decide" }, text(0, needed)),
    ` ${text(needed, bytes.length)}${rest}`,
  );
}
