// Everything about one row: how it ended, every number with its unit and n, and the commands that repeat it.

function openDetails(row) {
  const { name, status, message, other, runs, folder } = data.rows[row];
  const lines = [element("p", { class: "status" }, status)];
  if (message) lines.push(element("p", { class: "message" }, message));
  if (other) lines.push(element("p", { class: "fine" }, `† ${other}`));
  lines.push(element("h3", {}, "Run it again"), ...runs.map((run) => copyable(data.runs[run].command)));
  const typed = runs.map((run) => data.runs[run].typed).filter((command, place) => command !== data.runs[runs[place]].command);
  if (typed.length) lines.push(element("h3", {}, "As it was typed"), ...typed.map(copyable));
  if (folder) lines.push(element("p", { class: "fine" }, "Folder: ", element("a", { href: encodeURI(folder) }, folder)));
  const numbers = data.columns.filter((column) => column.kind === "number" && numberText(column, row));
  if (numbers.length) lines.push(element("h3", {}, "Numbers"), numbersTable(numbers, row));
  openDialog(name, lines);
}

function numbersTable(numbers, row) {
  const head = [["metric"], ["value", "number"], ["unit"], ["95 %", "number"], ["n"], ["what it is"]];
  return element("table", { class: "plain" },
    element("thead", {}, element("tr", {}, head.map(([name, kind]) => element("th", { scope: "col", class: kind }, name)))),
    element("tbody", {}, numbers.map((column) => element("tr", {},
      element("th", { scope: "row" }, column.label),
      element("td", { class: "number" }, numberText(column, row)),
      element("td", {}, column.unit),
      element("td", { class: "number" }, intervalText(column, row)),
      element("td", { class: "count" }, column.values[row] === null ? "" : countText(column, row)),
      element("td", { class: "meaning" }, column.meaning)))));
}
