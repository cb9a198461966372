// A map of layers against runs or formats: a table whose cells are as colored as their loss, with the number in each.

function startMaps() {
  if (byId("map")) fillChooser("map", data.maps.map((map, place) => [place, map.title]), 0, (place) => drawMap(data.maps[place]));
  drawMap(data.maps[0]);
}

function drawMap(map) {
  const share = shareOfRange(map);
  const head = element("tr", {}, element("th", { scope: "col" }, "layer"), map.columns.map((column) => mapHeader(column)));
  const body = map.rows.map((layer, line) => element("tr", {}, element("th", { scope: "row" }, layer),
    map.values[line].map((value, place) => mapCell(value, share, map.columns[place].row))));
  const table = element("table", { class: "heat" }, element("caption", {}, `${map.title}${map.unit ? ` (${map.unit})` : ""}`),
    element("thead", {}, head), element("tbody", {}, body));
  const legend = element("p", { class: "fine scale" }, map.better === "higher" ? "lowest" : "lowest", element("span", { class: `ramp ${map.better}`, "aria-hidden": "true" }), "highest; the stronger the color, the worse");
  byId("heatmap").replaceChildren(element("div", { class: "scroll tall", role: "region", "aria-label": map.title, tabindex: 0 }, table), legend,
    map.note ? element("p", { class: "fine" }, `${map.note}.`) : "");
}

function mapHeader({ row, label }) {
  const name = label ?? nameOf(row);
  const head = element("th", { scope: "col", title: name }, element("span", { class: "slanted" }, name));
  if (label === null) {
    head.onpointerenter = () => lightRow(row);
    head.onpointerleave = () => lightRow(null);
  }
  return head;
}

/** A function from a value to 0 (best) .. 1 (worst) of the map. */
function shareOfRange({ values, is_log: isLog, better }) {
  const numbers = values.flat().filter((value) => typeof value === "number" && (!isLog || value > 0));
  const forward = isLog ? Math.log10 : (value) => value;
  let [low, high] = [Infinity, -Infinity];
  for (const value of numbers) [low, high] = [Math.min(low, forward(value)), Math.max(high, forward(value))];
  return (value) => {
    if (isLog && value <= 0) return 0;
    const share = high > low ? (forward(value) - low) / (high - low) : 0;
    return better === "higher" ? 1 - share : share;
  };
}

function mapCell(value, share) {
  if (typeof value !== "number") return element("td", { class: "nothing" }, value ?? "–");
  const loss = share(value);
  const text = Math.abs(value) >= 0.01 && Math.abs(value) < 1e4 ? value.toPrecision(3) : value === 0 ? "0" : exponential(value, 1);
  return element("td", { class: loss > 0.75 ? "full" : loss > 0.575 ? "half" : null, style: `--loss: ${(100 * loss).toFixed(0)}%` }, text);
}
