// What the visitor has chosen, and who wants to know of it. Nothing is stored when the page is closed.

const columns = new Map(data.columns.map((column) => [column.id, column]));
const families = new Map(data.families.map((family) => [family.name, family]));

const state = {
  sort: { id: data.sorted_by, falling: false },
  text: "",
  filters: new Map(), // column -> what is typed into its filter
  group: "",
  shown: new Set(data.columns.filter((column) => column.shown).map((column) => column.id)),
  lit: null, // the row that is pointed at
};

const listeners = { rows: [], light: [] };

function listen(what, listener) {
  listeners[what].push(listener);
}

function notify(what) {
  for (const listener of listeners[what]) listener();
}

function lightRow(row) {
  if (state.lit === row) return;
  state.lit = row;
  notify("light");
}

function shownColumns() {
  return data.columns.filter((column) => state.shown.has(column.id));
}

/** The rows that pass the filters, in the order of the table. */
function passingRows() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = data.rows.map((_, row) => row).filter((row) => passes(row, words));
  const column = columns.get(state.sort.id);
  return column ? rows.sort((one, other) => compareRows(column, one, other)) : rows;
}

function passes(row, words) {
  const text = words.length ? rowText(row) : "";
  if (!words.every((word) => text.includes(word))) return false;
  return [...state.filters].every(([id, wanted]) => passesFilter(columns.get(id), row, wanted.trim()));
}

const rowTexts = new Map();

function rowText(row) {
  if (!rowTexts.has(row)) {
    const texts = data.columns.filter((column) => column.kind === "text").map((column) => column.values[row]);
    rowTexts.set(row, [...texts, data.rows[row].message, data.rows[row].key].join(" ").toLowerCase());
  }
  return rowTexts.get(row);
}

/** '<3', '>=40', '2-5' or '=4' of a number; any other text is looked for in what the cell says, '!' before it: not. */
function passesFilter(column, row, wanted) {
  if (!wanted) return true;
  const value = sortValue(column, row);
  const bound = /^([<>]=?|=)\s*(-?[\d.]+(?:e-?\d+)?)$/i.exec(wanted);
  const range = /^(-?[\d.]+)\s*(?:-|–|\.\.)\s*(-?[\d.]+)$/.exec(wanted);
  if (column.kind === "number" && (bound || range)) {
    if (value === null) return false;
    if (range) return value >= Number(range[1]) && value <= Number(range[2]);
    const limit = Number(bound[2]);
    const holds = { "<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit };
    return bound[1] === "=" ? value === limit : holds[bound[1]];
  }
  const text = cellText(column, row).toLowerCase();
  return wanted.startsWith("!") ? !text.includes(wanted.slice(1).toLowerCase()) : text.includes(wanted.toLowerCase());
}

/** Rows without a result come last, then those without the value, whichever way the table is sorted. */
function compareRows(column, one, other) {
  const done = Number(data.rows[other].is_done) - Number(data.rows[one].is_done);
  if (done) return done;
  const [a, b] = [sortValue(column, one), sortValue(column, other)];
  if (a === null || b === null) return Number(a === null) - Number(b === null) || one - other;
  const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : Number(a > b);
  return (state.sort.falling ? -order : order) || one - other;
}

/** [name of the group, its rows], in the order of their first row; one group without a name if there is no grouping. */
function groupedRows(rows) {
  const column = columns.get(state.group);
  if (!column) return [["", rows]];
  const groups = new Map();
  for (const row of rows) {
    const name = cellText(column, row) || "–";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return [...groups];
}

function colorOf(row) {
  const family = families.get(data.rows[row].family);
  return family ? `--family: light-dark(${family.light}, ${family.dark})` : "--family: var(--faint)";
}

/** 'bitsandbytes nf4 · leaf→disk · seed=1': a row in few words. */
function nameOf(row) {
  const [sweep, model, backend, offload, setting] = ["sweep", "model", "backend", "offload", "setting"].map((id) => columns.get(id)?.values[row]);
  const parts = [sweep, model, backend || data.rows[row].name, offload === "none" ? "" : offload, setting];
  return parts.filter(Boolean).join(" · ");
}
