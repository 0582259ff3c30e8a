// Tables whose rows stay and whose cells change.

import { Chart } from "./chart.js";
import { element, say } from "./dom.js";

/** A table with one row for each of some things that are known from the start. */
export class Table {
  /**
   * `columns`: [heading, kind, ...]; kind is "text", "number", "chart", or "action" for what the caller puts there. The first cell of a row is
   * its header.
   */
  constructor(node, caption, columns) {
    this.columns = columns;
    this.rows = [];
    this.body = element("tbody");
    const cells = columns.map(([heading, kind]) => element("th", { scope: "col", class: kind }, heading));
    node.replaceChildren(
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...cells)),
      this.body,
    );
  }

  /** Begin anew, with a row for each title; `charted` says which of them have a chart. */
  reset(titles, charted = () => true, kindOf = () => "") {
    this.rows = titles.map((title, index) => {
      const row = { cells: [], chart: null };
      const nodes = this.columns.map(([, kind], column) => {
        const node = column ? element("td", { class: kind }) : element("th", { scope: "row", class: kind });
        if (kind === "chart" && charted(index)) {
          row.chart = new Chart(180, 28, `${title}, the last 15 minutes`);
          node.append(row.chart.node);
        }
        row.cells.push(node);
        return node;
      });
      row.node = element("tr", { class: kindOf(index) }, ...nodes);
      return row;
    });
    this.body.replaceChildren(...this.rows.map((row) => row.node));
  }

  /** The cells of a row; for a chart the cell that is given is left out. */
  write(index, values) {
    const row = this.rows[index];
    this.columns.forEach(([, kind], column) => {
      if (kind !== "chart" && kind !== "action") say(row.cells[column], values[column]);
    });
  }
}
