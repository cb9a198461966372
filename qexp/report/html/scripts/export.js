// The table as it stands (its rows, columns and order) as CSV, LaTeX with booktabs, or Markdown.

function startCopying() {
  const formats = { csv: tableAsCsv, latex: tableAsLatex, markdown: tableAsMarkdown };
  for (const button of byId("copy").querySelectorAll("button")) {
    button.onclick = () => copyText(formats[button.dataset.format](), `Table as ${button.textContent}`, button);
  }
}

/** Each number in a cell of its own: the value, its standard deviation, the ends of its interval, its verdict. */
function tableAsCsv() {
  const parts = shownColumns().flatMap(csvColumns);
  const lines = [parts.map(([name]) => name), ...passingRows().map((row) => parts.map(([, valueOf]) => valueOf(row) ?? ""))];
  return lines.map((line) => line.map(csvCell).join(",")).join("\n") + "\n";
}

function csvColumns(column) {
  const name = column.unit ? `${column.label} ${column.unit}` : column.label;
  if (column.kind === "text") return [[name, (row) => column.values[row]]];
  const found = [[name, (row) => column.values[row] ?? column.words[row]]];
  const has = (part) => Object.keys(column[part]).length;
  if (has("spread")) found.push([`${name} standard deviation`, (row) => column.spread[row]]);
  if (has("interval")) found.push(...["low", "high"].map((end, side) => [`${name} ${end}`, (row) => column.interval[row]?.[side]]));
  if (has("versus")) found.push([`${name} vs`, (row) => column.versus[row]]);
  if (countText(column, 0) !== "1 run") found.push([`${name} n`, (row) => (column.values[row] === null ? "" : countText(column, row))]);
  return found;
}

function csvCell(value) {
  const text = String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

function printedCell(column, row) {
  if (column.kind === "text") return column.values[row];
  return [numberText(column, row), intervalText(column, row), column.versus[row] ?? ""].filter(Boolean).join(" ");
}

const TEX = {
  "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "%": "\\%", "&": "\\&", _: "\\_", "#": "\\#", $: "\\$",
  "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "→": "$\\to$", "±": "$\\pm$", "×": "$\\times$", "·": "$\\cdot$",
  "−": "$-$", "–": "--", "…": "\\dots{}", "∞": "$\\infty$", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}",
};

function escapeTex(text) {
  return text.replace(/[\\{}%&_#$~^→±×·−–…∞<>|]/g, (letter) => TEX[letter]).replace(/\s+/g, " ");
}

function texNumber(text) {
  return escapeTex(text).replace(/^-/, "$-$");
}

function tableAsLatex() {
  const shown = shownColumns();
  const head = shown.map((column) => `${escapeTex(titleOf(column))}${{ higher: " $\\uparrow$", lower: " $\\downarrow$" }[column.better] ?? ""}`);
  const lines = passingRows().map((row) => shown.map((column) => {
    const text = (column.kind === "number" ? texNumber : escapeTex)(printedCell(column, row));
    return column.kind === "number" && column.best.includes(row) ? `\\textbf{${text}}` : text;
  }));
  return [
    `% ${data.title.replace(/\s+/g, " ")}; needs \\usepackage{booktabs}`,
    `\\begin{tabular}{${shown.map((column) => (column.kind === "number" ? "r" : "l")).join("")}}`, "\\toprule",
    `${head.join(" & ")} \\\\`, "\\midrule", ...lines.map((line) => `${line.join(" & ")} \\\\`), "\\bottomrule", "\\end{tabular}", "",
  ].join("\n");
}

function tableAsMarkdown() {
  const shown = shownColumns();
  const escape = (text) => text.replace(/([\\|*_`<])/g, "\\$1").replace(/\s+/g, " ");
  const rows = passingRows().map((row) => shown.map((column) => {
    const text = escape(printedCell(column, row));
    return column.kind === "number" && column.best.includes(row) ? `**${text}**` : text;
  }));
  const lines = [shown.map((column) => escape(titleOf(column))), shown.map((column) => (column.kind === "number" ? "--:" : ":--")), ...rows];
  return lines.map((line) => `| ${line.join(" | ")} |`).join("\n") + "\n";
}
