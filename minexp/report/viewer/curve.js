// Faithfulness by size, with random circuits as a band and a mark where the slider stands.

const CURVE = { width: 460, height: 150, left: 34, right: 22, top: 10, bottom: 30 };
const curveX = (size) => CURVE.left + ((Math.log10(Math.max(0.001, size)) + 3) / 3) * (CURVE.width - CURVE.left - CURVE.right);
const sizeAt = (x) => 10 ** (((x - CURVE.left) / (CURVE.width - CURVE.left - CURVE.right)) * 3 - 3);

function curveOf(panels) {
  const { width, height, left, right, top, bottom } = CURVE;
  const all = panels.flatMap(({ circuit }) => [...circuit.curve, ...circuit.randomCurve.flat()]).filter(Number.isFinite);
  if (!all.length) return "";
  const low = Math.min(0, ...all), high = Math.max(1, ...all);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const points = (pairs) => pairs.filter(([, f]) => Number.isFinite(f)).map(([size, f]) => curveX(size).toFixed(1) + "," + y(f).toFixed(1)).join(" ");
  const out = ['<svg viewBox="0 0 ' + width + " " + height + '" role="img" aria-label="Faithfulness by the share of nodes kept">'];
  const apart = y(0.8) - y(1) > 11 ? [0, 0.8, 1] : [0, 1, ...(high > 1.5 ? [high] : [])]; // lines whose figures do not touch
  for (const value of apart.filter((value) => value === 0 || y(0) - y(value) > 11)) out.push('<line class="axis" x1="' + left + '" x2="' + (width - right) + '" y1="' + y(value) + '" y2="' + y(value) + '"/><text x="' + (left - 5) + '" y="' + (y(value) + 4) + '" text-anchor="end">' + number(value, 2) + "</text>");
  for (const size of [0.001, 0.01, 0.1, 1]) out.push('<text x="' + curveX(size) + '" y="' + (height - bottom + 14) + '" text-anchor="middle">' + 100 * size + " %</text>");
  out.push('<text x="' + (left + width - right) / 2 + '" y="' + (height - 2) + '" text-anchor="middle">share of the nodes kept · faithfulness · band: random circuits</text>');
  panels.forEach(({ circuit, count }, at) => {
    const { sizes, curve, randomCurve } = circuit, line = at ? "var(--two)" : "var(--one)";
    const band = [...randomCurve.map(([, least], i) => [sizes[i], least]), ...randomCurve.map(([, , largest], i) => [sizes[i], largest]).reverse()];
    if (band.length) out.push('<polygon class="band" fill="' + line + '" points="' + points(band) + '"/>');
    out.push('<polyline stroke="' + line + '"' + (at ? ' stroke-dasharray="6 4"' : "") + ' points="' + points(sizes.map((size, i) => [size, curve[i]])) + '"/>');
    out.push('<text class="what" style="fill:' + line + '" x="' + (left + 8) + '" y="' + (top + 14 + 14 * at) + '">' + (at ? "– – " : "— ") + escaped(circuit.title) + "</text>");
    const share = count / circuit.universe, f = faithfulness(circuit, share);
    out.push('<line class="now" x1="' + curveX(share) + '" x2="' + curveX(share) + '" y1="' + top + '" y2="' + (height - bottom) + '"/>');
    if (Number.isFinite(f)) out.push('<circle cx="' + curveX(share) + '" cy="' + y(f) + '" r="4" fill="' + line + '"/>');
  });
  return out.join("") + "</svg>";
}
