// What one unit responds to, what its ablation does, and what it is linked to.

const LINKS = 12; // of either direction

function crops(name) {
  const { rows, units, uri, count, columns } = data.crops, box = make("div", { className: "crops" });
  if (!(name in rows)) return box;
  const lines = Math.ceil((units * count) / columns), share = (at, all) => (all > 1 ? (100 * at) / (all - 1) : 0) + "%";
  for (let at = rows[name] * count; at < (rows[name] + 1) * count; at++) {
    const tile = make("i");
    tile.style.backgroundImage = "url(" + uri + ")";
    tile.style.backgroundSize = columns * 100 + "% " + lines * 100 + "%";
    tile.style.backgroundPosition = share(at % columns, columns) + " " + share(Math.floor(at / columns), lines);
    box.append(tile);
  }
  return box;
}

function about({ panel, node }, hold) {
  const { circuit, edges } = panel;
  const figure = (term, value) => [make("dt", { textContent: term }), make("dd", { textContent: number(value) })];
  const ablated = make("dl", { className: "ablated" });
  if (node.effect !== null) ablated.append(...figure("the class’s score falls by", node.effect));
  if (node.needed !== null) ablated.append(...figure("the circuit’s faithfulness by", node.needed));
  const facts = node.kind + (node.rank < 0 ? " · carried, no node" : " · rank " + (node.rank + 1) + " of " + most(circuit)) + " · score " + number(node.score);
  const close = make("button", { type: "button", className: "close", textContent: "×", title: "Let go (Esc)", onclick: () => hold(null) });
  const parts = [close, make("h3", { textContent: node.name }), make("p", { className: "muted", textContent: facts })];
  const tiles = crops(node.name);
  if (tiles.childElementCount) parts.push(make("h4", { textContent: "Responds most to" }), tiles);
  if (ablated.childElementCount) parts.push(make("h4", { textContent: "It alone ablated" }), ablated);
  const link = (edge, at) => {
    const other = at < 0 ? null : circuit.nodes[at];
    const button = make("button", { type: "button", textContent: other ? other.name : circuit.label, disabled: !other, onclick: () => hold({ panel, node: other }) });
    return make("li", { className: edge.effect < 0 ? "minus" : "plus" }, button, make("span", { textContent: number(edge.effect) }));
  };
  const list = (title, links, end) => {
    if (!links.length) return;
    const strongest = [...links].sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, LINKS);
    parts.push(make("h4", { textContent: title + (links.length > LINKS ? " · " + LINKS + " of " + links.length : "") }), make("ul", {}, ...strongest.map((edge) => link(edge, end(edge)))));
  };
  list("Reads", edges.filter((edge) => edge.target === node.at), (edge) => edge.source);
  list("Acts on", edges.filter((edge) => edge.source === node.at), (edge) => edge.target);
  return parts;
}
