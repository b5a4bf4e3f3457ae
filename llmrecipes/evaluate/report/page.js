"use strict";
// Answers stand in the page as JSON; only one page of them is ever in the document, and only as text.
(function () {
  const source = document.getElementById("answers");
  if (!source) return;
  const all = JSON.parse(source.textContent);
  const size = 50;
  let found = all.rows, page = 0;
  const by = (id) => document.getElementById(id);
  const choice = (id, values) => {
    for (const value of values) {
      const option = document.createElement("option");
      option.value = option.textContent = value;
      by(id).append(option);
    }
  };
  choice("of", [...new Set(all.rows.map((r) => all.sets[r.s]))]);
  choice("about", [...new Set(all.rows.flatMap((r) => r.a))].sort());

  function filter() {
    const words = by("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const of = by("of").value, about = by("about").value, score = by("score").value, order = by("order").value;
    found = all.rows.filter((r) =>
      (!of || all.sets[r.s] === of) &&
      (!about || r.a.includes(about)) &&
      (!score || (score === "right" ? r.v >= 1 : score === "wrong" ? r.v <= 0 : score === "partly" ? r.v > 0 && r.v < 1 : r.o === false)) &&
      words.every((w) => r.t.includes(w)));
    if (order === "low") found = [...found].sort((a, b) => a.v - b.v);
    if (order === "high") found = [...found].sort((a, b) => b.v - a.v);
    page = 0;
    show();
  }

  function cell(row, text, kind) {
    const td = document.createElement(kind === "judged" ? "div" : "td");
    td.textContent = text;
    td.className = kind;
    row.append(td);
    return td;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(Math.max(0, page), pages - 1);
    const body = by("list");
    body.replaceChildren();
    for (const r of found.slice(page * size, (page + 1) * size)) {
      const row = document.createElement("tr");
      cell(row, all.sets[r.s] + " #" + r.i, "");
      cell(row, r.q, "text");
      cell(row, r.r, "text");
      const answer = cell(row, r.x, "text " + (r.v >= 1 ? "right" : r.v <= 0 ? "wrong" : ""));
      if (r.j) cell(answer, "judge: " + r.j, "judged");
      cell(row, r.v.toFixed(2) + (r.o === false ? " (form)" : ""), "number");
      body.append(row);
    }
    const mean = found.length ? (found.reduce((sum, r) => sum + r.v, 0) / found.length).toFixed(3) : "-";
    by("count").textContent = found.length + " of " + all.rows.length + " answers, mean score " + mean;
    by("where").textContent = "page " + (page + 1) + " of " + pages;
  }

  // What is searched is put together once: a list of hundreds of pages answers to each key.
  for (const r of all.rows) r.t = (r.q + "\n" + r.r + "\n" + r.x).toLowerCase();
  for (const id of ["words", "of", "about", "score", "order"]) by(id).addEventListener("input", filter);
  by("before").addEventListener("click", () => { page -= 1; show(); });
  by("after").addEventListener("click", () => { page += 1; show(); });
  filter();
})();
