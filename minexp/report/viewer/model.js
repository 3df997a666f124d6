// Circuits as data: decoded, arranged within their layers, cut to a size, and their figures read off.

const byId = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const number = (value, digits = 3) => (value === null || value === undefined || Number.isNaN(value) ? "–"
  : Math.abs(value) >= 100 ? value.toFixed(0) : value && Math.abs(value) < 1e-3 ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toString());
const percent = (share) => number(100 * share, 2) + " %";

const data = JSON.parse(byId("data").textContent);
data.circuits.forEach(decode);

const circuitsOf = (image) => data.images[image].circuits.map((at) => data.circuits[at]);
const most = (circuit) => Math.max(1, circuit.nodes.filter((node) => node.rank >= 0).length);
// Half of a slider's way is the square root of all there is: small circuits get as much room as large ones.
const along = (all, share) => Math.max(1, Math.round(Math.exp(Math.log(Math.max(1, all)) * share)));

function decode(circuit) {
  circuit.nodes = circuit.nodes.map(([layer, unit, rank, score, effect, needed], at) => (
    { at, layer, unit, rank, score, effect, needed, name: circuit.layers[layer].name + "/" + unit, kind: circuit.layers[layer].kind }));
  const largest = (nodes) => Math.max(1e-12, ...nodes.map((node) => Math.abs(node.score)));
  const members = largest(circuit.nodes.filter((node) => node.rank >= 0));
  const streams = largest(circuit.nodes.filter((node) => node.rank < 0));
  for (const node of circuit.nodes) node.weight = Math.abs(node.score) / (node.rank < 0 ? streams : members);
  circuit.edges = circuit.edges.map(([source, target, effect, change], at) => ({ at, source, target, effect, change }));
  const strongest = new Map(); // into each layer, so that layers of small numbers show their structure too
  const into = (edge) => (edge.target < 0 ? -1 : circuit.nodes[edge.target].layer);
  for (const edge of circuit.edges) strongest.set(into(edge), Math.max(strongest.get(into(edge)) || 0, Math.abs(edge.effect)));
  for (const edge of circuit.edges) edge.weight = Math.abs(edge.effect) / (strongest.get(into(edge)) || 1);
  arrange(circuit);
}

// Units of a layer are ordered by where their edges lead, from the score backwards: fewer edges cross.
function arrange(circuit) {
  const out = circuit.nodes.map(() => []), place = circuit.nodes.map(() => 0.5);
  for (const edge of circuit.edges) out[edge.source].push(edge);
  circuit.order = new Map();
  for (const layer of [...new Set(circuit.nodes.map((node) => node.layer))].sort((a, b) => b - a)) {
    const nodes = circuit.nodes.filter((node) => node.layer === layer);
    const key = new Map(nodes.map((node) => {
      let sum = 0, total = 0;
      for (const edge of out[node.at]) {
        sum += edge.weight * (edge.target < 0 ? 0.5 : place[edge.target]);
        total += edge.weight;
      }
      return [node, total ? sum / total : 1];
    }));
    nodes.sort((a, b) => key.get(a) - key.get(b) || b.weight - a.weight);
    nodes.forEach((node, index) => { place[node.at] = (index + 0.5) / nodes.length; });
    circuit.order.set(layer, nodes);
  }
}

// What is in the circuit at a size: its nodes, units of streams with an edge on both sides, edges among them.
function visible(circuit, count) {
  const shown = new Set(circuit.nodes.filter((node) => node.rank >= 0 && node.rank < count).map((node) => node.at));
  const streams = circuit.nodes.filter((node) => node.rank < 0);
  const candidates = new Set([...shown, ...streams.map((node) => node.at)]);
  const kept = circuit.edges.filter((edge) => candidates.has(edge.source) && (edge.target < 0 || candidates.has(edge.target)));
  const from = new Set(kept.map((edge) => edge.source)), to = new Set(kept.map((edge) => edge.target));
  for (const node of streams) if (from.has(node.at) && to.has(node.at)) shown.add(node.at);
  return { shown, edges: kept.filter((edge) => shown.has(edge.source) && (edge.target < 0 || shown.has(edge.target))) };
}

// The tested faithfulness at a share of the nodes, between two tested sizes on the line that joins them.
function faithfulness({ sizes, curve }, share) {
  const next = sizes.findIndex((size) => size >= share - 1e-9);
  if (next <= 0) return sizes.length ? curve[next < 0 ? curve.length - 1 : 0] : null;
  const t = (share - sizes[next - 1]) / (sizes[next] - sizes[next - 1]);
  return curve[next - 1] + t * (curve[next] - curve[next - 1]);
}
