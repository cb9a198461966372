// What was recorded at each step of a run: its error, the memory while loading and running, the time of a step.

const SERIES = {
  error: { label: "relative L2 error", unit: "", mayBeLog: true },
  host: { label: "host memory above the start", unit: "GiB", isMemory: true },
  device: { label: "device memory", unit: "GiB", isMemory: true },
  ms: { label: "time of a step", unit: "ms", mayBeLog: true },
};
const GIB = { GiB: 1, MiB: 1024 };
const lines = { series: "", rows: "all", redraw: () => {} };

function startLines() {
  const known = Object.keys(SERIES).filter((name) => data.steps.some((run) => run[name]));
  lines.series = known[0] ?? "ms";
  fillChooser("step-series", known.map((name) => [name, SERIES[name].label]), lines.series, (name) => { lines.series = name; lines.redraw(); });
  const rows = [...new Set(data.steps.map((run) => run.row))].sort((one, other) => one - other);
  fillChooser("step-rows", [["all", "all in the table"], ...rows.map((row) => [row, nameOf(row)])], "all", (rowsShown) => { lines.rows = rowsShown; lines.redraw(); });
  lines.redraw = drawWhenWide(byId("lines"), drawLines);
  listen("rows", () => lines.redraw());
  listen("light", lightLines);
}

/** Memory is drawn over time, from the beginning of loading; everything else over steps. */
function drawLines(width) {
  const { label, isMemory, mayBeLog } = SERIES[lines.series];
  const passing = new Set(passingRows());
  const runs = data.steps.filter((run) => (lines.rows === "all" ? passing.has(run.row) : run.row === Number(lines.rows)));
  const curves = runs.map((run) => curveOf(run, isMemory)).filter((curve) => curve.points.length);
  const found = curves.flatMap((curve) => [...curve.points.map(([, value]) => value), ...(curve.load ? [curve.load.peak] : [])]);
  const values = mayBeLog ? found.filter((value) => value > 0) : found; // an error of 0 has no place on a logarithmic axis
  const unit = isMemory && found.every((value) => value < 1) ? "MiB" : SERIES[lines.series].unit;
  const factor = isMemory ? GIB[unit] : 1;
  const height = Math.max(280, Math.min(Math.round(width * 0.4), 420));
  const box = { left: 62, top: 34, right: width - 16, bottom: height - 50 };
  const xs = curves.flatMap((curve) => [...curve.points.map(([at]) => at), ...(curve.load ? [0] : [])]);
  const x = makeScale(xs, [box.left, box.right], false);
  const y = makeScale(isMemory ? [0, ...values.map((value) => value * factor)] : values, [box.bottom, box.top], mayBeLog);
  const xName = isMemory ? "seconds from the start of loading" : "step";
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label} of ${curves.length} runs over ${xName}` },
    drawAxes(x, y, box, xName, unit ? `${label} (${unit})` : label), curves.map((curve) => drawCurve(curve, x, y, factor)));
  byId("lines").replaceChildren(drawing, linesLegend(curves, isMemory, y.isLog));
  lightLines();
}

function curveOf(run, isMemory) {
  const values = run[lines.series] ?? [];
  const delay = isMemory ? run.load.seconds ?? 0 : 0;
  const places = isMemory ? run.seconds.map((seconds) => delay + seconds) : run.step;
  const points = values.map((value, place) => [places[place], value]).filter(([, value]) => value !== null);
  const peak = isMemory ? run.load[lines.series] : null;
  const trace = lines.series === "host" ? run.load.trace : [];
  return { run, points, load: peak && delay ? { seconds: delay, peak, trace } : null };
}

/** Loading is a box as high as its peak, and in it the memory over that time, where it was recorded. */
function drawCurve({ run, points, load }, x, y, factor) {
  const drawn = y.isLog ? points.filter(([, value]) => value > 0) : points;
  const path = drawn.map(([at, value], place) => `${place ? "L" : "M"}${x(at).toFixed(1)},${y(value * factor).toFixed(1)}`).join("");
  const curve = shape("path", { class: "curve", d: path });
  const group = shape("g", { class: "run", "data-row": run.row, style: colorOf(run.row) });
  if (load) {
    const top = y(load.peak * factor);
    group.append(shape("path", { class: "loading", d: `M${x(0)},${y(0)}V${top}H${x(load.seconds)}V${y(0)}Z` }));
    const way = load.trace.map(([at, value], place) => `${place ? "L" : "M"}${x(at).toFixed(1)},${y(value * factor).toFixed(1)}`).join("");
    if (way) group.append(shape("path", { class: "curve while-loading", d: way }));
  }
  group.append(curve, ...(drawn.length === 1 ? [shape("circle", { class: "dot", cx: x(drawn[0][0]), cy: y(drawn[0][1] * factor), r: 3 })] : []));
  group.onpointermove = (event) => { lightRow(run.row); showTip(event, [nameOf(run.row), `${seedText(run.run)}${points.length} points`]); };
  group.onpointerleave = () => { lightRow(null); hideTip(); };
  return group;
}

function seedText(run) {
  const { seed } = data.runs[run];
  return seed === "" ? "" : `seed ${seed}, `;
}

function linesLegend(curves, isMemory, isLog) {
  const first = new Map(curves.map(({ run }) => [data.rows[run.row].family, run.row]).reverse());
  const items = [...first].sort().map(([family, row]) => element("li", {}, colorMark(row), family));
  if (isMemory && curves.some((curve) => curve.load)) {
    items.push(element("li", {}, element("span", { class: "box-sample", "aria-hidden": "true" }), "loading: as high as its peak"));
  }
  if (isLog && curves.some((curve) => curve.points.some(([, value]) => value <= 0))) items.push(element("li", {}, "0 is not drawn"));
  return element("ul", { class: "legend" }, items);
}

function lightLines() {
  const figure = byId("lines");
  figure.querySelectorAll(".lit").forEach((node) => node.classList.remove("lit"));
  const found = state.lit === null ? [] : [...figure.querySelectorAll(`.run[data-row="${state.lit}"]`)];
  figure.classList.toggle("dimmed", found.length > 0);
  for (const node of found) {
    node.classList.add("lit");
    node.parentNode.append(node); // above the others
  }
}
