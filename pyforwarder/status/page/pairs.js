// The pairs: as many rows as fit are drawn, and as many are asked for. The server orders and filters.

import { at, element, say } from "./dom.js";
import { age, grouped, rate, size } from "./format.js";

// [name in a row, heading, order that it asks for, how it is written]
const COLUMNS = [
  ["id", "ID", "id", String],
  ["client", "Client", "client", String],
  ["server", "Server", "server", String],
  ["up_per_s", "Up", "up", rate],
  ["down_per_s", "Down", "down", rate],
  ["state", "State", "state", String],
  ["datapath", "Datapath", "datapath", String],
  ["rule", "Rule", "rule", String],
  ["age_s", "Age", "age", age],
];
const ORDERS = [
  ["rate", "rate"],
  ["up", "rate up"],
  ["down", "rate down"],
  ["bytes", "bytes"],
  ["age", "age"],
  ["idle", "time idle"],
  ["id", "id"],
  ["client", "client"],
  ["server", "server"],
  ["rule", "rule"],
  ["state", "state"],
  ["datapath", "datapath"],
];
// Texts are read from A on, numbers from the largest down.
const RISING = new Set(["client", "server", "rule", "state", "datapath"]);
// Rows above and below what is seen, so that a short way needs no answer.
const SPARE = 20;
const MOST_ROWS = 100;
const TYPING_MS = 150;

export class Pairs {
  /** `flush(row)` is called with the row whose pair is to be reset. */
  constructor(flush) {
    this.table = at("pairs-table");
    this.view = at("pairs-view");
    this.space = at("pairs-space");
    this.sort = "rate";
    this.rising = false;
    this.words = "";
    this.rows = new Map(); // place in the order -> row
    this.shown = 0; // how many there are with this filter
    this.total = 0;
    this.chosen = null; // the chosen pair's id
    this.place = 0; // and where it was
    this.pending = false; // the pair at that place is to be chosen once it is known
    this.nodes = [];
    this.asking = null;
    this.stale = false;
    this.typing = 0;
    this.head();
    this.listen(flush);
  }

  head() {
    const cells = COLUMNS.map(([name, heading, order]) => {
      const button = element("button", { type: "button", "data-order": order }, heading);
      button.addEventListener("click", () => this.order(order, this.sort === order ? !this.rising : RISING.has(order)));
      return element("div", { role: "columnheader", class: `cell ${name}` }, button);
    });
    at("pairs-head").replaceChildren(element("div", { role: "row", class: "row" }, ...cells));
    at("sort").replaceChildren(...ORDERS.map(([value, words]) => element("option", { value }, words)));
    this.table.setAttribute("aria-colcount", COLUMNS.length);
  }

  listen(flush) {
    at("pairs-form").addEventListener("submit", (event) => event.preventDefault());
    at("filter").addEventListener("input", () => {
      window.clearTimeout(this.typing);
      this.typing = window.setTimeout(() => this.filter(at("filter").value), TYPING_MS);
    });
    at("sort").addEventListener("change", () => this.order(at("sort").value, RISING.has(at("sort").value)));
    at("order").addEventListener("click", () => this.order(this.sort, !this.rising));
    this.view.addEventListener("scroll", () => this.draw(true), { passive: true });
    this.table.addEventListener("keydown", (event) => {
      if (event.target === this.table || event.target === this.view) this.key(event);
    });
    this.space.addEventListener("click", (event) => {
      const node = event.target.closest("[role=row]");
      if (node !== null) this.choose(Number(node.getAttribute("aria-rowindex")) - 2);
    });
    at("flush").addEventListener("click", () => {
      const row = this.chosenRow();
      if (row) flush(row);
    });
    new ResizeObserver(() => this.draw(true)).observe(this.view);
    this.tellOrder();
  }

  order(sort, rising) {
    this.sort = sort;
    this.rising = rising;
    this.tellOrder();
    this.begin();
  }

  tellOrder() {
    at("sort").value = this.sort;
    const numbers = !RISING.has(this.sort);
    say(at("order"), this.rising ? (numbers ? "smallest first" : "from A") : numbers ? "largest first" : "from Z");
    for (const button of at("pairs-head").querySelectorAll("button")) {
      const head = button.parentElement;
      if (button.dataset.order === this.sort) head.setAttribute("aria-sort", this.rising ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }

  filter(words) {
    this.words = words;
    this.begin();
  }

  /** Another order or filter: what is known of places is of no use any more. */
  begin() {
    this.rows.clear();
    this.view.scrollTop = 0;
    this.ask();
  }

  rowHeight() {
    return Number.parseFloat(getComputedStyle(this.view).getPropertyValue("--row")) || 28;
  }

  /** The places that are seen: the first, and how many. */
  seen() {
    const height = this.rowHeight();
    const first = Math.floor(this.view.scrollTop / height);
    return [first, Math.ceil(this.view.clientHeight / height) + 1];
  }

  /** Ask for what is seen now; while an answer is on the way, once more after it. */
  async ask() {
    if (this.asking !== null) {
      this.stale = true;
      return;
    }
    const [first, count] = this.seen();
    const from = Math.max(0, first - SPARE);
    const question = { sort: this.sort, order: this.rising ? "rising" : "falling", filter: this.words };
    const query = new URLSearchParams({
      ...question,
      first: from,
      count: Math.min(MOST_ROWS, first - from + count + SPARE),
    });
    this.asking = query;
    this.stale = false;
    try {
      const answer = await fetch(`pairs?${query}`, { headers: { Accept: "application/json" } });
      if (answer.ok) {
        const page = await answer.json();
        const same = question.sort === this.sort && question.filter === this.words;
        if (same && (question.order === "rising") === this.rising) this.take(page);
      }
    } catch {
      // The server has gone; the events tell of that, and of its return.
    } finally {
      this.asking = null;
    }
    if (this.stale) this.ask();
  }

  take(page) {
    this.rows.clear();
    page.rows.forEach((row, index) => {
      this.rows.set(page.first + index, row);
      if (row.id === this.chosen && !this.pending) this.place = page.first + index;
    });
    if (this.pending && this.rows.has(this.place)) {
      this.chosen = this.rows.get(this.place).id;
      this.pending = false;
    }
    this.shown = page.shown;
    this.total = page.total;
    const of = this.shown === this.total ? "" : ` of ${grouped(this.total)}`;
    say(at("pairs-count"), `${grouped(this.shown)}${of} ${this.total === 1 ? "pair" : "pairs"}`);
    this.table.setAttribute("aria-rowcount", this.shown + 1);
    this.space.style.height = `${this.shown * this.rowHeight()}px`;
    this.draw(false);
  }

  /** Put the rows that are known where they are seen; `asks` for those that are not. */
  draw(asks) {
    const height = this.rowHeight();
    const [first, count] = this.seen();
    const last = Math.min(this.shown, first + count);
    let missing = false;
    let used = 0;
    for (let place = first; place < last; place += 1) {
      const row = this.rows.get(place);
      if (row === undefined) {
        missing = true;
        continue;
      }
      if (used === this.nodes.length) this.nodes.push(this.makeRow());
      const { node, cells } = this.nodes[used];
      used += 1;
      node.style.transform = `translateY(${place * height}px)`;
      node.setAttribute("aria-rowindex", place + 2);
      node.setAttribute("aria-selected", row.id === this.chosen);
      node.id = `pair-${row.id}`;
      COLUMNS.forEach(([name, , , write], column) => say(cells[column], write(row[name])));
    }
    const nodes = this.nodes.slice(0, used).map(({ node }) => node);
    if (nodes.length !== this.space.childElementCount) this.space.replaceChildren(...nodes);
    this.tellChosen();
    if (missing && asks) this.ask();
  }

  makeRow() {
    const cells = COLUMNS.map(([name]) => element("div", { role: "gridcell", class: `cell ${name}` }));
    return { cells, node: element("div", { role: "row", class: "row" }, ...cells) };
  }

  chosenRow() {
    for (const row of this.rows.values()) if (row.id === this.chosen) return row;
    return null;
  }

  tellChosen() {
    const row = this.chosenRow();
    const drawn = row !== null && at(`pair-${row.id}`) !== null;
    if (drawn) this.table.setAttribute("aria-activedescendant", `pair-${row.id}`);
    else this.table.removeAttribute("aria-activedescendant");
    at("flush").disabled = row === null;
    if (row === null) {
      say(at("pair-details"), this.chosen === null ? "" : `Pair ${this.chosen} has ended, or is further away.`);
      return;
    }
    const why = row.reason ? ` (${row.reason})` : "";
    say(
      at("pair-details"),
      `Pair ${row.id}: ${row.client} > ${row.listener}, ${row.source} > ${row.server}; ${row.state}, ` +
        `${row.datapath}${why}; rule ${row.rule || "-"} of ${row.listener_name || "-"}; up ${size(row.up_bytes)}, ` +
        `down ${size(row.down_bytes)}, age ${age(row.age_s)}, idle ${age(row.idle_s)}`,
    );
  }

  choose(place) {
    if (!this.shown) return;
    this.place = Math.max(0, Math.min(this.shown - 1, place));
    const height = this.rowHeight();
    const top = this.place * height;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top + height > this.view.scrollTop + this.view.clientHeight) this.view.scrollTop = top + height - this.view.clientHeight;
    const row = this.rows.get(this.place);
    this.pending = row === undefined;
    if (row !== undefined) this.chosen = row.id;
    this.draw(true);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.view.clientHeight / this.rowHeight()) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.shown, End: this.shown }[event.key];
    if (by !== undefined) {
      event.preventDefault();
      const begins = this.chosen === null && !this.pending && Math.abs(by) === 1;
      this.choose(begins ? 0 : this.place + by);
    } else if (event.key === "Escape") {
      this.chosen = null;
      this.pending = false;
      this.draw(false);
    } else if (event.key === "Delete" && !at("flush").hidden && this.chosenRow() !== null) {
      event.preventDefault();
      at("flush").click();
    }
  }
}
