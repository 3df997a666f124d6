// One circuit as a Cytoscape graph: what is drawn, how it looks, and what the pointer is over.

const colour = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();

const styles = () => [
  { selector: "node", style: { label: "", "font-family": "system-ui, sans-serif", "font-size": 11, color: colour("--muted"), "overlay-opacity": 0, "border-width": 0 } },
  { selector: ".column", style: { shape: "round-rectangle", width: "data(wide)", height: "data(high)", "background-color": colour("--gone"), "background-opacity": 0.16, events: "no" } },
  { selector: ".name", style: { width: 1, height: 1, "background-opacity": 0, label: "data(label)", "text-valign": "center", "text-halign": "center", events: "no" } },
  { selector: ".name.slanted", style: { "text-halign": "right", "text-rotation": (-40 * Math.PI) / 180 } },
  { selector: ".unit", style: { shape: "data(shape)", width: "data(size)", height: "data(size)", "background-color": colour("--plus") } },
  { selector: ".unit.minus", style: { "background-color": colour("--minus") } },
  { selector: ".unit.stream", style: { "background-color": colour("--panel"), "border-width": 1.4, "border-color": colour("--plus") } },
  { selector: ".unit.stream.minus", style: { "border-color": colour("--minus") } },
  { selector: ".score", style: { width: SCORE, height: SCORE, "background-color": colour("--ink"), label: "data(label)", color: colour("--ink"), "font-weight": 600, "font-size": 12, "text-valign": "top", "text-margin-y": -5 } },
  { selector: "edge", style: { width: "data(width)", "line-color": colour("--plus"), "line-opacity": "data(opacity)", events: "no",
    "curve-style": "unbundled-bezier", "source-endpoint": "inside-to-node", "target-endpoint": "inside-to-node", "edge-distances": "node-position", "control-point-weights": "data(weights)", "control-point-distances": "data(distances)" } },
  { selector: "edge.minus", style: { "line-color": colour("--minus") } },
  { selector: ".hit", style: { "outline-width": 2, "outline-offset": 2, "outline-color": colour("--two") } },
  { selector: ".unit.far", style: { opacity: 0.14 } },
  { selector: "edge.far", style: { "line-opacity": 0.03 } },
  { selector: "edge.near", style: { "line-opacity": 0.95, "z-index": 5 } },
  { selector: ".unit.focus", style: { label: (unit) => shortened(unit.data("label"), NAME + 4), color: colour("--ink"), "font-weight": 600, "text-valign": "top", "text-margin-y": -5, "z-index": 10,
    "text-background-color": colour("--panel"), "text-background-opacity": 0.85, "text-background-padding": 2, "outline-width": 2, "outline-offset": 2, "outline-color": colour("--ink") } },
];

// The elements of a panel by their names, as Cytoscape takes them.
function elements(panel) {
  const { circuit, shown, drawn, places, plan } = panel, { columns, height, head, slanted, score } = plan;
  const found = new Map();
  const add = (id, classes, position, fields = {}) => found.set(id, { group: "nodes", classes, position: { ...position }, data: { id, ...fields } });
  for (const { layer, x, wide } of columns) {
    add("column " + layer, "column", { x, y: head + (height - head) / 2 }, { wide: wide + 22, high: height - head });
    add("name " + layer, slanted ? "name slanted" : "name", { x, y: head - 9 }, { label: columnName(panel, layer) });
  }
  for (const at of shown) {
    const node = circuit.nodes[at];
    const classes = "unit" + (node.score < 0 ? " minus" : "") + (node.rank < 0 ? " stream" : "");
    add("unit " + at, classes, places.get(at), { at, label: node.name, shape: shapeOf(node), size: extent(node) });
  }
  add("score", "score", score, { label: circuit.label });
  for (const edge of drawn) {
    const id = "edge " + edge.at, target = edge.target < 0 ? score : places.get(edge.target);
    found.set(id, { group: "edges", classes: edge.effect < 0 ? "minus" : "", data: {
      id, source: "unit " + edge.source, target: edge.target < 0 ? "score" : "unit " + edge.target,
      width: thickness(edge), opacity: strength(edge), ...asWeights(places.get(edge.source), target),
    } });
  }
  return found;
}

// Bring a graph to what its panel shows: what stays is moved, not made again.
function redraw(panel) {
  const wanted = elements(panel), { graph } = panel;
  graph.batch(() => {
    graph.elements().filter((element) => !wanted.has(element.id())).remove();
    const fresh = [];
    for (const [id, element] of wanted) {
      const known = graph.getElementById(id);
      if (known.empty()) { fresh.push(element); continue; }
      known.data(element.data);
      if (element.position) known.position(element.position);
      known.classes(element.classes);
    }
    graph.add(fresh);
  });
}

// Bring forward a unit and what it is linked to, or nothing; hits of a search are ringed.
function emphasise(panel, name, hits) {
  const { graph } = panel;
  graph.batch(() => {
    graph.elements().removeClass("focus near far hit");
    graph.nodes(".unit").filter((unit) => hits.has(unit.data("at"))).addClass("hit");
    const focus = name === null ? graph.collection() : graph.nodes(".unit").filter((unit) => unit.data("label") === name);
    if (focus.empty()) return;
    const near = focus.closedNeighborhood();
    graph.elements(".unit, edge").not(near).addClass("far");
    near.edges().addClass("near");
    focus.addClass("focus");
  });
}

function graphIn(container, { over, hold, moved }) {
  const graph = cytoscape({
    container, style: styles(), layout: { name: "preset" }, minZoom: 0.05, maxZoom: 12,
    autoungrabify: true, autounselectify: true, boxSelectionEnabled: false,
  });
  graph.on("mouseover", ".unit", (event) => over(event.target.data("at")));
  graph.on("mouseout", ".unit", () => over(null));
  container.addEventListener("pointerleave", () => over(null));
  graph.on("tap", (event) => hold(event.target !== graph && event.target.hasClass("unit") ? event.target.data("at") : null));
  graph.on("viewport", () => moved(graph));
  return graph;
}
