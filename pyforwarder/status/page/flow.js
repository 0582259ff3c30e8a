// Who touches the bytes: one lane for each datapath, from the clients to the servers. A lane's line is
// as wide as its rate has digits, and says it.

import { drawn, say } from "./dom.js";
import { grouped, rate } from "./format.js";

const WORDS = {
  copy: ["a worker copies them", "userspace"],
  sockmap: ["the kernel redirects them", "kernel, socket to socket"],
  splice: ["nobody: packets pass through", "kernel, packet by packet"],
  express: ["nobody: packets pass through", "kernel, from the first packet"],
};
const LANE = 92;
// On a narrow screen the letters keep their size, and some words are left out.
const SHAPES = {
  wide: { width: 640, box: 96, middle: 206, words: true },
  narrow: { width: 344, box: 28, middle: 116, words: false },
};

/** Twice the digits of the rate: 1 B/s and 10 GiB/s must both be seen. */
function thickness(perSecond) {
  return perSecond < 1 ? 1 : Math.min(16, 1 + Math.log10(perSecond) * 1.5);
}

export class Flow {
  /** `lanes`: names of datapaths; `states`: for each, `available` or why it is not. */
  constructor(lanes, states, isNarrow) {
    const shape = SHAPES[isNarrow ? "narrow" : "wide"];
    const height = lanes.length * LANE;
    this.lanes = lanes.map((name, index) => new Lane(name, states[name] ?? "", index * LANE, shape));
    const words = "Clients at the left, servers at the right, a lane for each datapath; the table below says the same.";
    this.node = drawn(
      "svg",
      { class: "flow", viewBox: `0 0 ${shape.width} ${height}`, role: "img", "aria-label": words },
      ...this.lanes.map((lane) => lane.node),
      end("Clients", 0, height, shape),
      end("Servers", shape.width - shape.box, height, shape),
    );
  }

  /** `rows`: for each lane its pairs and the rates up and down. */
  draw(rows) {
    this.lanes.forEach((lane, index) => lane.draw(...rows[index]));
  }
}

function end(words, x, height, shape) {
  const [middleX, middleY] = [x + shape.box / 2, height / 2];
  const turned = shape.words ? null : `rotate(-90 ${middleX} ${middleY})`;
  return drawn(
    "g",
    { class: "end" },
    drawn("rect", { x: x + 0.5, y: 4.5, width: shape.box - 1, height: height - 9, rx: 8 }),
    drawn("text", { x: middleX, y: middleY + 5, "text-anchor": "middle", transform: turned }, words),
  );
}

class Lane {
  constructor(name, state, y, shape) {
    const [who, where] = WORDS[name] ?? ["", ""];
    const center = shape.width / 2;
    const text = (dy, kind, words) =>
      drawn("text", { x: center, y: y + dy, "text-anchor": "middle", class: kind }, words);
    this.up = arrow(y + LANE / 2 - 12, "up", shape);
    this.down = arrow(y + LANE / 2 + 12, "down", shape);
    this.pairs = text(shape.words ? 62 : 60, "count", "");
    this.node = drawn(
      "g",
      { class: state === "available" ? "lane" : "lane off", "data-lane": name },
      this.up.line,
      this.down.line,
      drawn("rect", {
        x: shape.middle + 0.5,
        y: y + 8.5,
        width: shape.width - 2 * shape.middle - 1,
        height: LANE - 17,
        rx: 8,
      }),
      text(shape.words ? 28 : 40, "name", name),
      ...(shape.words ? [text(45, "who", who), text(77, "where", where)] : []),
      this.pairs,
      this.up.label,
      this.down.label,
    );
  }

  draw(pairs, up, down) {
    say(this.pairs, `${grouped(pairs)} ${pairs === 1 ? "pair" : "pairs"}`);
    for (const [{ label, line }, perSecond, sign] of [
      [this.up, up, "▸"],
      [this.down, down, "◂"],
    ]) {
      say(label, perSecond < 0.5 ? "" : `${sign} ${rate(perSecond)}`);
      line.setAttribute("stroke-width", thickness(perSecond).toFixed(1));
      line.classList.toggle("moving", perSecond >= 0.5);
    }
  }
}

/** Behind the box in the middle: what is seen of it at both sides is one line. */
function arrow(y, direction, shape) {
  const [left, right] = [shape.box, shape.width - shape.box];
  const isUp = direction === "up";
  const line = drawn("path", { class: `line ${direction}`, d: isUp ? `M${left} ${y}H${right}` : `M${right} ${y}H${left}` });
  const label = drawn("text", {
    x: (shape.box + shape.middle) / 2,
    y: isUp ? y - 11 : y + 21,
    "text-anchor": "middle",
    class: `rate ${direction}`,
  });
  return { line, label };
}
