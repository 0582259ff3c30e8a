// Makes elements. All text that they show is put in as text: no markup is ever parsed here, so
// nothing that a client, a server or a configuration says can become an element or a script.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

/** An HTML element; children are nodes, or texts. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element; children likewise. */
export function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** The element with that id. */
export function at(id) {
  return document.getElementById(id);
}

/** Change a node's text, if it is another: what stays is neither drawn nor read out again. */
export function say(node, text) {
  const words = String(text);
  if (node.textContent !== words) node.textContent = words;
}
