// Numbers as the report's other files write them: the format of a metric is Python's ('.2f', '.2e').

function formatNumber(value, digits) {
  const [, places, kind] = /^\.(\d+)([feg%])$/.exec(digits) ?? [null, "4", "g"];
  let text;
  if (kind === "f") text = value.toFixed(places);
  else if (kind === "%") text = `${(100 * value).toFixed(places)}%`;
  else if (kind === "e") text = exponential(value, places);
  else text = String(Number(value.toPrecision(places)));
  const shown = Number.parseFloat(text);
  return value !== 0 && shown === 0 ? shortNumber(value) : text;
}

/** Two significant digits, where a format leaves nothing of a value. */
function shortNumber(value) {
  return Math.abs(value) < 1e-4 ? exponential(value, 1) : String(Number(value.toPrecision(2)));
}

function exponential(value, places) {
  return value.toExponential(places).replace(/e([+-])(\d)$/, "e$10$2");
}

/** '40.4 ±0.3 (of 2)': the text of a number's cell, '' where there is none. */
function numberText(column, row) {
  const value = column.values[row];
  if (value === null) return column.words[row] ?? "";
  const parts = [formatNumber(value, column.digits)];
  if (column.spread[row] !== undefined) parts.push(`±${formatNumber(column.spread[row], column.digits)}`);
  if (column.missing[row] !== undefined) parts.push(column.missing[row]);
  return parts.join(" ");
}

function intervalText(column, row) {
  const ends = column.interval[row];
  return ends ? `[${ends.map((end) => formatNumber(end, column.digits)).join(", ")}]` : "";
}

function cellText(column, row) {
  return column.kind === "number" ? numberText(column, row) : column.values[row];
}

/** What a value is of: '200 images', '3 seeds'. */
function countText(column, row) {
  return typeof column.n === "string" ? column.n : column.n[row];
}

/** Its value for sorting and drawing; infinite for a ratio without an error, null where there is none. */
function sortValue(column, row) {
  const value = column.values[row];
  if (column.kind === "number") return value === null && column.words[row] === "exact" ? Infinity : value;
  return value === "" ? null : value;
}

function titleOf(column) {
  return column.unit ? `${column.label} (${column.unit})` : column.label;
}
