// The table: sorted by a click on a header, filtered, grouped, with the columns that are chosen.

function startTable() {
  const filter = byId("filter");
  filter.oninput = () => { state.text = filter.value; notify("rows"); };
  const grouping = data.columns.filter((column) => column.kind === "text" && !["#", "seeds"].includes(column.id));
  const useful = grouping.filter((column) => new Set(column.values).size > 1);
  const choices = [["", "nothing"], ...useful.map((column) => [column.id, column.label])];
  fillChooser("group", choices, "", (id) => { state.group = id; notify("rows"); });
  byId("column-filters").onclick = toggleColumnFilters;
  fillColumnMenu();
  startMenus();
  listen("rows", drawRows);
  listen("light", lightTable);
  drawTable();
}

function drawTable() {
  const head = element("thead", {}, element("tr", {}, shownColumns().map(headerCell)));
  if (byId("column-filters").getAttribute("aria-pressed") === "true") head.append(filterRow());
  byId("table").replaceChildren(element("caption", { class: "unseen" }, data.title), head);
  byId("table").style.setProperty("--head", `${head.firstChild.offsetHeight}px`); // filters stay below the header
  drawRows();
}

function headerCell(column) {
  const isSorted = state.sort.id === column.id;
  const arrow = isSorted ? (state.sort.falling ? " ↓" : " ↑") : "";
  const sign = { higher: "higher is better", lower: "lower is better" }[column.better];
  const title = [column.meaning, sign].filter(Boolean).join("; ");
  const button = element("button", { type: "button", class: "sort", title, onclick: () => sortBy(column) },
    element("span", {}, column.label), element("span", { class: "arrow", "aria-hidden": "true" }, arrow));
  const n = column.kind === "number" && typeof column.n === "string" && column.n !== "1 run" ? `n = ${column.n}` : "";
  return element("th", {
    scope: "col", class: column.kind, "aria-sort": isSorted ? (state.sort.falling ? "descending" : "ascending") : null,
  }, button, [column.unit, n].filter(Boolean).map((line) => element("span", { class: "below" }, line)));
}

/** Numbers that are better when they are higher are sorted with the best first. */
function sortBy(column) {
  const isSame = state.sort.id === column.id;
  state.sort = { id: column.id, falling: isSame ? !state.sort.falling : column.better === "higher" };
  drawTable();
  notify("rows");
  const heads = [...byId("table").querySelectorAll("thead tr:first-child th")];
  heads[shownColumns().indexOf(column)].querySelector("button").focus({ preventScroll: true });
  announce(`sorted by ${column.label}, ${state.sort.falling ? "falling" : "rising"}`);
}

function filterRow() {
  return element("tr", { class: "filters" }, shownColumns().map((column) => {
    const input = element("input", {
      type: "search", "aria-label": `Filter ${column.label}`, placeholder: column.kind === "number" ? "<3, 2-5" : "text",
      value: state.filters.get(column.id) ?? "", autocomplete: "off", spellcheck: "false",
    });
    input.oninput = () => { state.filters.set(column.id, input.value); notify("rows"); };
    return element("td", {}, input);
  }));
}

function toggleColumnFilters() {
  const button = byId("column-filters");
  const isOn = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(isOn));
  if (!isOn) state.filters.clear();
  drawTable();
  notify("rows");
}

function drawRows() {
  const rows = passingRows();
  const shown = shownColumns();
  byId("table").querySelectorAll("tbody").forEach((body) => body.remove());
  byId("table").append(...groupedRows(rows).map(([name, members]) => groupBody(name, members, shown)));
  const failed = data.rows.filter((row) => !row.is_done).length;
  const all = `${data.rows.length} row${data.rows.length === 1 ? "" : "s"}`;
  byId("shown").textContent = rows.length < data.rows.length
    ? `${rows.length} of ${all} pass the filter`
    : `${all}${failed ? `, ${failed} without a result` : ""}`;
}

function groupBody(name, rows, shown) {
  const body = element("tbody");
  if (name) {
    const count = element("span", { class: "fine" }, ` ${rows.length} row${rows.length === 1 ? "" : "s"}`);
    body.append(element("tr", { class: "group" },
      element("th", { colspan: shown.length, scope: "rowgroup" }, element("span", { class: "pinned" }, name, count))));
  }
  body.append(...rows.map((row) => tableRow(row, shown)));
  return body;
}

function tableRow(row, shown) {
  const { is_done: isDone } = data.rows[row];
  const line = element("tr", { "data-row": row, class: isDone ? null : "undone" }, shown.map((column) => tableCell(column, row)));
  line.onpointerenter = () => lightRow(row);
  line.onpointerleave = () => lightRow(null);
  line.addEventListener("focusin", () => lightRow(row));
  return line;
}

function tableCell(column, row) {
  const text = cellText(column, row);
  if (column.id === "backend") {
    const button = element("button", { type: "button", class: "row-name", onclick: () => openDetails(row) }, swatch(row), text || data.rows[row].name);
    return element("th", { scope: "row" }, button);
  }
  if (column.kind === "text") {
    const isOther = column.id === "status" && data.rows[row].other;
    return element("td", { class: column.id.startsWith("setting:") ? "setting" : null, title: isOther || null }, isOther ? `${text} †` : text);
  }
  const best = column.best.includes(row);
  const n = typeof column.n === "string" ? "" : column.n[row];
  const busy = column.is_time && data.rows[row].is_busy && column.values[row] !== null ? " *" : "";
  return element("td", { class: best ? "number best" : "number" },
    element("span", {}, text + busy, best ? element("span", { class: "unseen" }, " (best)") : ""),
    smallLine([intervalText(column, row), versusMark(column.versus[row])]), smallLine([n && n !== "1 run" ? `n = ${n}` : ""]));
}

function smallLine(parts) {
  const found = parts.filter(Boolean);
  return found.length ? element("small", {}, found.map((part, place) => [place ? " " : "", part])) : "";
}

function versusMark(verdict) {
  return verdict ? element("span", { class: `verdict ${verdict.replace(/ /g, "-")}` }, verdict) : "";
}

function lightTable() {
  byId("table").querySelectorAll("tr.lit").forEach((line) => line.classList.remove("lit"));
  if (state.lit !== null) byId("table").querySelector(`tr[data-row="${state.lit}"]`)?.classList.add("lit");
}

function fillColumnMenu() {
  const groups = new Map();
  for (const column of data.columns) {
    if (!groups.has(column.group)) groups.set(column.group, []);
    groups.get(column.group).push(column);
  }
  const body = byId("columns").querySelector(".menu-body");
  body.replaceChildren(...[...groups].map(([group, members]) =>
    element("fieldset", {}, element("legend", {}, group), members.map(columnBox))));
}

function columnBox(column) {
  const box = element("input", { type: "checkbox", "data-column": column.id });
  box.checked = state.shown.has(column.id);
  box.disabled = column.id === "backend"; // it names the row
  box.onchange = () => {
    if (box.checked) state.shown.add(column.id);
    else state.shown.delete(column.id);
    state.filters.delete(column.id);
    drawTable();
  };
  return element("label", {}, box, titleOf(column));
}

/** Menus close on Escape, and when something else is clicked. */
function startMenus() {
  const menus = [...document.querySelectorAll("details.menu")];
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (!menu.contains(event.target)) menu.open = false;
  });
  for (const menu of menus) {
    menu.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      menu.open = false;
      menu.querySelector("summary").focus();
    };
  }
}
