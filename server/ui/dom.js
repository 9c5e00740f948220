// Elements without HTML: text stays text, whatever a model or a user wrote.

/** el("button.small", {title: "…", onclick}, "text", child) */
export function el(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const made = document.createElement(tag || "div");
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export const $ = (id) => document.getElementById(id);

/** Writes only what changed: the browser lays out nothing for the rest. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Keeps one element per key, in order; `make(item)` once, `update(element, item)` each time. */
export function keyed(parent, items, key, make, update) {
  const known = (parent.rows ??= new Map());
  const seen = new Set();
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    seen.add(name);
    let row = known.get(name);
    if (!row) known.set(name, (row = make(item)));
    update(row, item);
    if (row === next) next = next.nextElementSibling;
    else parent.insertBefore(row, next);
  }
  for (const [name, row] of known) {
    if (!seen.has(name)) {
      row.remove();
      known.delete(name);
    }
  }
}
