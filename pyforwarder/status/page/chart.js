// Rates of the last 15 minutes as small drawings: up as an area, down as a line.

import { drawn } from "./dom.js";

export const SHOWN_S = 900;

/** The points of one thing: when, how long each stands for, and the three rates. */
export class Series {
  constructor() {
    this.points = []; // [at, span, up, down, new]
  }

  add(at, span, rates) {
    this.points.push([at, span, ...rates]);
    const oldest = at - SHOWN_S;
    while (this.points.length && this.points[0][0] < oldest) this.points.shift();
  }

  clear() {
    this.points = [];
  }

  peak() {
    return this.points.reduce((most, point) => Math.max(most, point[2], point[3]), 0);
  }
}

/** A drawing of a series; `draw` again when it has grown. */
export class Chart {
  constructor(width, height, title) {
    this.width = width;
    this.height = height;
    this.up = drawn("path", { class: "up" });
    this.down = drawn("path", { class: "down" });
    this.node = drawn(
      "svg",
      {
        class: "chart",
        viewBox: `0 0 ${width} ${height}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": title,
      },
      drawn("path", { class: "floor", d: `M0 ${height - 0.5}H${width}` }),
      this.up,
      this.down,
    );
    this.upPath = "";
    this.downPath = "";
  }

  draw(series, now) {
    const peak = series.peak();
    this.set(peak ? this.path(series, now, peak, 2, true) : "", peak ? this.path(series, now, peak, 3, false) : "");
  }

  set(up, down) {
    if (up !== this.upPath) this.up.setAttribute("d", (this.upPath = up));
    if (down !== this.downPath) this.down.setAttribute("d", (this.downPath = down));
  }

  path(series, now, peak, column, closed) {
    const x = (at) => Math.max(0, this.width * (1 - (now - at) / SHOWN_S)).toFixed(1);
    const y = (value) => (this.height - 1 - (this.height - 3) * (value / peak)).toFixed(1);
    let path = "";
    let last = null;
    for (const point of series.points) {
      const [at, span] = point;
      const from = at - span;
      // A step: the rate is the mean of the time that the point stands for.
      const begins = last === null || from > last + 1;
      if (begins) {
        if (closed && last !== null) path += `V${this.height}`;
        path += closed ? `M${x(from)} ${this.height}V${y(point[column])}` : `M${x(from)} ${y(point[column])}`;
      } else {
        path += `V${y(point[column])}`;
      }
      path += `H${x(at)}`;
      last = at;
    }
    if (closed && last !== null) path += `V${this.height}`;
    return path;
  }
}
